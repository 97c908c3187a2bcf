"""What outputs are compared by before anything is timed, and which of torch's kernels are there to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FLASH, CUDNN = "FlashAttention-2", "cuDNN"
PEER_BOUND = 0.01
"""Of a peer's head, relative L2 against exact attention or another peer's."""


def worst_head(torch, out: Any, expected: Any) -> float:
    """The largest relative L2 distance of one head, of tensors (batch, heads, tokens, head_dim)."""
    out, expected = out.float().flatten(2), expected.float().flatten(2)
    return (torch.linalg.vector_norm(out - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)).max().item()


def check_below(error: float, bound: float, name: str) -> None:
    """Raise ``AssertionError`` naming a run whose error is not below the bound, or is NaN."""
    if not error < bound:
        raise AssertionError(f"{name}: relative L2 of a head is {error:.4f}, must be below {bound}")


def runs_here(run: Callable[[], Any]) -> bool:
    """False where torch, its build or this GPU has no kernel for the call. Raises torch's ``OutOfMemoryError``: a peer
    that finds no memory is not a peer that is not there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of each reason why it cannot
            run()
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        return False
    return True


@contextmanager
def poisoned(torch) -> Iterator[None]:
    """Every tensor that torch allocates uninitialised begins as NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
