"""Every MMA instruction the project issues or models: one frozen description each, in ``INSTRUCTIONS``.

Shapes, formats and scale selectors are the PTX ISA's ("Warp Level Matrix Instructions", mma and "Block Scaling for
mma.sync"). Targets, versions and selectors are those that the assemblers of CUDA 13.0 and 13.5 accept, and a test asks
them. The numerics are a published model of the hardware: see :class:`Numerics`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_PTX_ISA = "PTX ISA, Warp Level Matrix Instructions: mma"
_ARCHITECTURE_SPECIFIC = ("sm_120a", "sm_120f", "sm_121a")


@dataclass(frozen=True)
class Numerics:
    """How an MMA adds. Source: arXiv 2511.10909, where the parameters were read from hardware by test inputs.

    The products are gathered in groups of ``group`` elements of k; a group's sum is exact. The groups' sums, times
    their scales, and C are the addends. Each has the exponent of its unnormalised significand (see
    :mod:`ptx_inline.isa.arithmetic`); all are aligned to the largest one, at least ``min_exponent``, and truncated
    toward zero at ``fraction_bits`` binary places of it, added exactly and rounded once, toward zero, to float32.

    With ``step`` only that many elements of k are added at a time: the result of each step is C of the next.
    """

    group: int
    fraction_bits: int
    min_exponent: int
    step: int = 0


@dataclass(frozen=True)
class Instruction:
    """One MMA: D (M, N) = A (M, K) times B (K, N) + C, of one warp.

    Attributes:
        key: name in ``INSTRUCTIONS``.
        template: the PTX mnemonic with ``{a}``, ``{b}`` and ``{sf}`` where the formats go.
        shape: (M, N, K).
        element_bits: bits of an element of A and B in a register (the container where the format is smaller).
        a_formats, b_formats: formats of A and B; the first is the default.
        sf_formats: formats of the scales, the first the default; empty without block scaling.
        sf_vec_size: elements of k that share a scale; 0 without block scaling.
        byte_ids: byte selectors allowed, each the lowest of the ``K / sf_vec_size`` bytes that are read.
        thread_ids_a, thread_ids_b: thread selectors allowed.
        min_targets: the targets that have it (the first is the one we compile for), or the oldest of all later ones.
        min_ptx: version of the PTX ISA that introduced it; a target may need a later one (sm_120f and sm_121a: 8.8).
        numerics: how it adds, on sm_90 and later.
        numerics_before_sm_90: how it adds on older targets, where that is different.
        source: where the facts stand.
        note: exceptions to the above.
    """

    key: str
    template: str
    shape: tuple[int, int, int]
    element_bits: int
    a_formats: tuple[str, ...]
    b_formats: tuple[str, ...]
    numerics: Numerics
    min_targets: tuple[str, ...] = _ARCHITECTURE_SPECIFIC
    min_ptx: str = "8.7"
    sf_formats: tuple[str, ...] = ()
    sf_vec_size: int = 0
    byte_ids: tuple[int, ...] = (0,)
    thread_ids_a: tuple[int, ...] = (0,)
    thread_ids_b: tuple[int, ...] = (0,)
    numerics_before_sm_90: Numerics | None = None
    source: str = _PTX_ISA
    note: str = ""

    @property
    def mnemonic(self) -> str:
        """The full PTX name with the default formats."""
        return self.ptx_name()

    def ptx_name(self, a_format: str | None = None, b_format: str | None = None, sf_format: str | None = None) -> str:
        """The full PTX name with these formats (``None``: the default). Raises ``ValueError`` as :meth:`formats`."""
        a, b, sf = self.formats(a_format, b_format, sf_format)
        return self.template.format(a=a, b=b, sf=sf)

    def formats(
        self, a_format: str | None = None, b_format: str | None = None, sf_format: str | None = None
    ) -> tuple[str, str, str | None]:
        """The three formats, defaults filled in. Raises ``ValueError`` for one that the instruction does not take."""
        chosen = []
        for name, value, allowed in (
            ("a_format", a_format, self.a_formats),
            ("b_format", b_format, self.b_formats),
            ("sf_format", sf_format, self.sf_formats),
        ):
            if value is not None and value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed) or 'none'} for {self.key}, got {value!r}")
            chosen.append(value if value is not None else next(iter(allowed), None))
        return tuple(chosen)

    def on(self, target: str | None) -> Instruction:
        """The same MMA with ``numerics`` as a target such as ``"sm_86"`` has them; ``None`` is the newest."""
        match = re.match(r"sm_(\d+)", target or "")
        if self.numerics_before_sm_90 is None or match is None or int(match[1]) >= 90:
            return self
        return replace(self, numerics=self.numerics_before_sm_90)

    @property
    def scales_per_row(self) -> int:
        """Scales of a row of A or a column of B, which is the number of bytes read of a scale register."""
        return self.shape[2] // self.sf_vec_size if self.sf_vec_size else 0

    @property
    def min_target(self) -> str:
        """The target to compile for."""
        return self.min_targets[0]

    @property
    def registers(self) -> dict[str, int]:
        """32-bit registers a lane of each operand: a, b, c, d, sfa, sfb."""
        m, n, k = self.shape
        scale = 1 if self.sf_vec_size else 0
        per_lane = 32 * 32
        return {
            "a": m * k * self.element_bits // per_lane,
            "b": n * k * self.element_bits // per_lane,
            "c": m * n // 32,
            "d": m * n // 32,
            "sfa": scale,
            "sfb": scale,
        }


_F8F6F4 = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")
_K64 = Numerics(group=16, fraction_bits=35, min_exponent=-139)
_K32 = Numerics(group=1, fraction_bits=25, min_exponent=-133)
_K16 = {
    "shape": (16, 8, 16),
    "element_bits": 16,
    "numerics": Numerics(group=1, fraction_bits=25, min_exponent=-133),
    "numerics_before_sm_90": Numerics(group=1, fraction_bits=24, min_exponent=-132, step=8),
    "min_targets": ("sm_80",),
    "min_ptx": "7.0",
}
_FP4 = {"shape": (16, 8, 64), "element_bits": 4, "a_formats": ("e2m1",), "b_formats": ("e2m1",), "numerics": _K64}
_SELECTORS = {"thread_ids_a": (0, 1), "thread_ids_b": (0, 1, 2, 3)}

#: Every MMA by its key: shape, then kind, then scales a row.
INSTRUCTIONS = {
    instruction.key: instruction
    for instruction in (
        Instruction(
            "m16n8k64.mxf4nvf4.4x",
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.{a}.{b}.f32.{sf}",
            sf_formats=("ue4m3", "ue8m0"),
            note="ue8m0 with 4X since PTX 9.1.",
            sf_vec_size=16,
            **_FP4,
            **_SELECTORS,
        ),
        Instruction(
            "m16n8k64.mxf4nvf4.2x",
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.{a}.{b}.f32.{sf}",
            sf_formats=("ue8m0",),
            sf_vec_size=32,
            byte_ids=(0, 2),
            **_FP4,
            **_SELECTORS,
        ),
        Instruction(
            "m16n8k64.mxf4.2x",
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.{a}.{b}.f32.{sf}",
            sf_formats=("ue8m0",),
            sf_vec_size=32,
            byte_ids=(0, 2),
            **_FP4,
            **_SELECTORS,
        ),
        Instruction(
            "m16n8k32.f8f6f4",
            "mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.{a}.{b}.f32",
            shape=(16, 8, 32),
            element_bits=8,
            a_formats=_F8F6F4,
            b_formats=_F8F6F4,
            numerics=_K32,
        ),
        Instruction(
            "m16n8k32.mxf8f6f4.1x",
            "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.{a}.{b}.f32.{sf}",
            shape=(16, 8, 32),
            element_bits=8,
            a_formats=_F8F6F4,
            b_formats=_F8F6F4,
            numerics=_K32,
            sf_formats=("ue8m0",),
            sf_vec_size=32,
            byte_ids=(0, 1, 2, 3),
            **_SELECTORS,
        ),
        Instruction(
            "m16n8k16.f16",
            "mma.sync.aligned.m16n8k16.row.col.f32.{a}.{b}.f32",
            a_formats=("f16",),
            b_formats=("f16",),
            **_K16,
        ),
        Instruction(
            "m16n8k16.bf16",
            "mma.sync.aligned.m16n8k16.row.col.f32.{a}.{b}.f32",
            a_formats=("bf16",),
            b_formats=("bf16",),
            **_K16,
        ),
    )
}


def instruction(key: str) -> Instruction:
    """``INSTRUCTIONS[key]``. Raises ``ValueError`` that lists the keys for another one."""
    if key not in INSTRUCTIONS:
        raise ValueError(f"mma must be one of {', '.join(INSTRUCTIONS)}, got {key!r}")
    return INSTRUCTIONS[key]
