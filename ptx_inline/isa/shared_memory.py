"""Shared memory that a CTA may have, by target (CUDA programming guide, "Compute Capabilities", opt-in maximum)."""

from __future__ import annotations

_KIB = {"sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_110": 227}
_OTHERS_KIB = 99


def shared_limit(target: str) -> int:
    """Bytes, for a PTX target by name, with or without its suffix: 227, 163 or 99 KiB."""
    return 1024 * _KIB.get(target.rstrip("af"), _OTHERS_KIB)
