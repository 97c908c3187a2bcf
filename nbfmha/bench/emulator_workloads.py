"""What ``nbfmha bench emulator`` runs: small PTX kernels that each stress one part, and our own kernels.

Every workload knows its expected outputs, computed with NumPy and never by the emulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

THREADS = 128
TARGET = "sm_120a"

_ENTRY = """.version 8.8
.target sm_120a
.address_size 64
.visible .entry {name}({parameters})
{{
\t.reg .pred %p<4>;
\t.reg .b16 %h<2>;
\t.reg .b32 %r<40>;
\t.reg .b64 %d<8>;
{body}
\tret;
}}
"""
#: A thread's number in the grid -> %r1, and that times 4 plus the address in the last parameter -> %d1.
_THREAD = """
\tld.param.u64 %d0, [out];
\tmov.u32 %r2, %ctaid.x;
\tmov.u32 %r3, %ntid.x;
\tmov.u32 %r4, %tid.x;
\tmad.lo.u32 %r1, %r2, %r3, %r4;
\tmul.wide.u32 %d1, %r1, 4;
\tadd.u64 %d1, %d0, %d1;
"""


@dataclass(frozen=True)
class Workload:
    """One launch and what must come out: ``expected`` position of the argument -> array."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple
    expected: dict[int, np.ndarray]
    target: str = TARGET

    def run(self, workers: int):
        """The ``ptx_inline.emu.Emulation`` of the launch."""
        from ptx_inline.emu import emulate

        return emulate(self.kernel, self.grid, self.block, self.arguments, self.target, workers=workers)

    def check(self, outputs: tuple) -> None:
        """Raises ``AssertionError`` where an output is not what it must be."""
        for position, expected in self.expected.items():
            np.testing.assert_array_equal(outputs[position], expected, err_msg=self.name)


def _kernel(name: str, body: str, *inputs: str) -> str:
    parameters = ", ".join(f".param .u64 {parameter}" for parameter in (*inputs, "out"))
    return _ENTRY.format(name=name, parameters=parameters, body=body)


def _loop(steps: int, body: str) -> str:
    return f"\tmov.u32 %r0, {steps};\nloop:\n{body}\tsub.u32 %r0, %r0, 1;\n\tsetp.ne.u32 %p0, %r0, 0;\n\t@%p0 bra loop;\n"


def _per_thread(name: str, ctas: int, body: str, expected: np.ndarray, what: str) -> Workload:
    """A workload that leaves one word a thread."""
    from ptx_inline.emu import Output

    text = _kernel(name, _THREAD + body)
    return Workload(what, text, (ctas,), (THREADS,), (Output(expected.shape, expected.dtype),), {0: expected})


def integers(ctas: int, steps: int = 64) -> Workload:
    """Integer arithmetic and logic in registers; 8 of 11 instructions of a turn, the rest is the loop."""
    body = _loop(
        steps,
        "\tmad.lo.u32 %r1, %r1, 1664525, 1013904223;\n\tshr.u32 %r5, %r1, 15;\n\txor.b32 %r1, %r1, %r5;\n"
        "\tshl.b32 %r6, %r1, 7;\n\tadd.u32 %r1, %r1, %r6;\n\tand.b32 %r7, %r1, 0xFFFF;\n\tmin.u32 %r8, %r7, 40000;\n"
        "\tsub.u32 %r1, %r1, %r8;\n",
    )
    x = np.arange(ctas * THREADS, dtype=np.uint32)
    for _ in range(steps):
        x = x * np.uint32(1664525) + np.uint32(1013904223)
        x ^= x >> np.uint32(15)
        x += x << np.uint32(7)
        x -= np.minimum(x & np.uint32(0xFFFF), np.uint32(40000))
    return _per_thread("integers", ctas, f"{body}\tst.global.u32 [%d1], %r1;", x, "integer arithmetic")


def fused(ctas: int, steps: int = 64) -> Workload:
    """Four chains of ``fma.rn.f32``; 8 of 11 instructions of a turn."""
    chain = "".join(f"\tfma.rn.f32 %r{r}, %r{r}, 0f3F500000, 0f3F200000;\n" for r in (5, 6, 7, 8)) * 2
    start = "\tcvt.rn.f32.u32 %r5, %r4;\n" + "".join(f"\tadd.f32 %r{r + 1}, %r{r}, 0f3F800000;\n" for r in (5, 6, 7))
    end = "\tadd.f32 %r5, %r5, %r6;\n\tadd.f32 %r7, %r7, %r8;\n\tadd.f32 %r5, %r5, %r7;\n\tst.global.f32 [%d1], %r5;"
    lanes = np.tile(np.arange(THREADS, dtype=np.float64), ctas)
    chains = []
    for offset in range(4):
        x = lanes + offset
        for _ in range(2 * steps):  # exact in float64: a 24-bit significand times a 4-bit one, plus 0.625
            x = (x * 0.8125 + 0.625).astype(np.float32).astype(np.float64)
        chains.append(x.astype(np.float32))
    expected = (chains[0] + chains[1]) + (chains[2] + chains[3])
    return _per_thread("fused", ctas, start + _loop(steps, chain) + end, expected, "f32 FMA")


def mixed(ctas: int, steps: int = 64) -> Workload:
    """Integers, a conversion, a float product, a comparison, a select and a guarded instruction in turn."""
    body = "\tmov.u32 %r9, 0f00000000;\n" + _loop(
        steps,
        "\tmad.lo.u32 %r1, %r1, 1664525, 1013904223;\n\tshr.u32 %r5, %r1, 20;\n\tcvt.rn.f32.u32 %r6, %r5;\n"
        "\tmul.f32 %r6, %r6, 0f3B000000;\n\tsetp.gt.f32 %p1, %r6, 0f3F800000;\n\tselp.b32 %r7, %r6, %r9, %p1;\n"
        "\t@!%p1 xor.b32 %r1, %r1, %r5;\n\tmax.f32 %r9, %r9, %r7;\n",
    )
    x = np.arange(ctas * THREADS, dtype=np.uint32)
    top = np.zeros(x.shape, np.float32)
    for _ in range(steps):
        x = x * np.uint32(1664525) + np.uint32(1013904223)
        high = x >> np.uint32(20)
        y = high.astype(np.float32) * np.float32(2.0**-9)
        x = np.where(y > 1, x, x ^ high)
        top = np.maximum(top, np.where(y > 1, y, top))
    return _per_thread("mixed", ctas, f"{body}\tst.global.f32 [%d1], %r9;", top, "mixed arithmetic")


def copy(ctas: int, steps: int = 16) -> Workload:
    """Global memory to global memory, 16 bytes a lane; an address each for the load and the store."""
    from ptx_inline.emu import Output

    words = ctas * THREADS * steps * 4
    source = np.random.default_rng(0).integers(0, 2**32, words, np.uint32)
    stride = ctas * THREADS * 16
    body = (
        "\tld.param.u64 %d2, [source];\n\tshl.b32 %r5, %r1, 4;\n\tcvt.u64.u32 %d3, %r5;\n\tadd.u64 %d1, %d0, %d3;\n"
        "\tadd.u64 %d2, %d2, %d3;\n"
    ) + _loop(
        steps,
        "\tld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%d2];\n\tst.global.v4.u32 [%d1], {%r10, %r11, %r12, %r13};\n"
        f"\tadd.u64 %d1, %d1, {stride};\n\tadd.u64 %d2, %d2, {stride};\n",
    )
    text = _kernel("copy", _THREAD + body, "source")
    arguments = (source, Output(source.shape, np.uint32))
    return Workload("copy, 16 bytes a lane", text, (ctas,), (THREADS,), arguments, {1: source})


def transpose(ctas: int, steps: int = 16) -> Workload:
    """32 x 32 words through shared memory, the padded way: a row in, a barrier, a column out, a barrier."""
    from ptx_inline.emu import Output

    body = (
        "\t.shared .align 4 .b8 tile[4224];\n\tld.param.u64 %d2, [source];\n\tmov.u32 %r5, tile;\n"
        "\tmov.u32 %r6, %tid.y;\n\tmad.lo.u32 %r7, %r6, 132, %r5;\n\tmul.lo.u32 %r8, %r4, 4;\n\tadd.u32 %r7, %r7, %r8;\n"
        "\tmad.lo.u32 %r9, %r4, 132, %r5;\n\tmul.lo.u32 %r10, %r6, 4;\n\tadd.u32 %r9, %r9, %r10;\n"
        f"\tmul.lo.u32 %r11, %r2, {steps * 4096};\n\tmul.lo.u32 %r12, %r6, 128;\n\tadd.u32 %r11, %r11, %r12;\n"
        "\tadd.u32 %r11, %r11, %r8;\n\tcvt.u64.u32 %d3, %r11;\n\tadd.u64 %d2, %d2, %d3;\n\tadd.u64 %d1, %d0, %d3;\n"
    )
    rows = range(0, 32, 4)  # 4 warps, 8 rows each
    turn = "".join(f"\tld.global.u32 %r20, [%d2+{128 * y}];\n\tst.shared.u32 [%r7+{132 * y}], %r20;\n" for y in rows)
    turn += "\tbar.sync 0;\n"
    turn += "".join(f"\tld.shared.u32 %r20, [%r9+{4 * y}];\n\tst.global.u32 [%d1+{128 * y}], %r20;\n" for y in rows)
    turn += "\tbar.sync 0;\n\tadd.u64 %d1, %d1, 4096;\n\tadd.u64 %d2, %d2, 4096;\n"
    text = _kernel("transpose", _THREAD + body + _loop(steps, turn), "source")
    source = np.random.default_rng(0).integers(0, 2**32, (ctas * steps, 32, 32), np.uint32)
    expected = np.ascontiguousarray(source.swapaxes(1, 2))
    arguments = (source, Output(source.shape, np.uint32))
    return Workload("transpose through shared memory", text, (ctas,), (32, 4), arguments, {1: expected})


def block_scale(ctas: int, steps: int = 16) -> Workload:
    """A chain of block-scale MMAs on registers: the accumulator goes in and out. One warp a CTA, a tile each."""
    from ptx_inline.emu import Output
    from ptx_inline.isa import arithmetic

    mma = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3"
    loads = ""
    for name, first, count in (("a", 10, 4), ("b", 14, 2), ("sfa", 16, 1), ("sfb", 17, 1)):
        registers = ", ".join(f"%r{first + i}" for i in range(count))
        vector = f".v{count}" if count > 1 else ""
        loads += f"\tld.param.u64 %d2, [{name}];\n\tmad.wide.u32 %d2, %r1, {4 * count}, %d2;\n"
        loads += f"\tld.global{vector}.u32 {'{' + registers + '}' if count > 1 else registers}, [%d2];\n"
    zero = "".join(f"\tmov.u32 %r{r}, 0;\n" for r in range(20, 24))
    turn = f"\t{mma} {{%r20,%r21,%r22,%r23}}, {{%r10,%r11,%r12,%r13}}, {{%r14,%r15}}, {{%r20,%r21,%r22,%r23}}, "
    turn += "{%r16}, {0, 0}, {%r17}, {0, 0};\n"
    end = "\tmad.wide.u32 %d1, %r1, 16, %d0;\n\tst.global.v4.u32 [%d1], {%r20, %r21, %r22, %r23};"
    text = _kernel("block_scale", _THREAD + loads + zero + _loop(steps, 4 * turn) + end, "a", "b", "sfa", "sfb")
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2**32, (ctas, 32, count), np.uint32) for count in (4, 2))
    # finite scales, and zero to 1, so that sums stay finite
    sfa, sfb = (rng.integers(0, 0x38, (ctas, 32, 4), np.uint8).view(np.uint32)[..., 0] for _ in range(2))
    expected = np.zeros((ctas, 32, 4), np.float32)
    for _ in range(4 * steps):
        expected = arithmetic.mma_registers("m16n8k64.mxf4nvf4.4x", a, b, expected, sfa, sfb)
    arguments = (a, b, sfa, sfb, Output(expected.shape, np.float32))
    return Workload("block-scale MMA", text, (ctas,), (32,), arguments, {4: expected})


def quantize(rows: int) -> Workload:
    """The quantiser of float16 to NVFP4 as it would run on sm_120a."""
    from nbfmha import nvfp4
    from nbfmha.kernels.quantize import THREADS as threads
    from nbfmha.kernels.quantize import flat_kernel
    from ptx_inline.emu import Output

    x = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float16)
    expected = nvfp4.quantize(x)
    blocks = expected.scales.size
    outputs = (Output(expected.codes.shape, np.uint8), Output(expected.scales.shape, np.uint8))
    return Workload(
        "quantise f16", flat_kernel("float16", "nvfp4", "amax", False), (-(-blocks // threads),), (threads,),
        (x, 0, *outputs, blocks), {2: expected.codes, 3: expected.scales},
    )  # fmt: skip


def qk(tokens: int, implementation: str, target: str) -> Workload:
    """Q K^T on sm_120a with the block-scale MMA, or on sm_90a with dequantised inputs, head_dim 64; E2M1 values with unit
    scales, so that every score is exact."""
    from nbfmha import nvfp4
    from nbfmha.kernels.qk import THREADS as threads
    from nbfmha.kernels.qk import TILE_M, TILE_N, qk_kernel
    from ptx_inline.emu import Output
    from ptx_inline.isa.formats import E2M1

    rng = np.random.default_rng(0)
    values = E2M1.decode(rng.integers(0, 16, (2, tokens, 64), np.uint8))
    values[..., ::16] = 6  # amax / 6 is 1
    q, k = (nvfp4.quantize(matrix.astype(np.float32)) for matrix in values)
    expected = (values[0].astype(np.float64) @ values[1].astype(np.float64).T).astype(np.float32)
    m_tiles, n_tiles = -(-tokens // TILE_M), -(-tokens // TILE_N)
    arguments = (
        q.codes, q.scales, 0, k.codes, k.scales, 0, Output(expected.shape, np.float32), tokens, tokens, 1, m_tiles, n_tiles,
    )  # fmt: skip
    name = f"Q·K^T, {implementation}, {target}"
    grid = (m_tiles * n_tiles,)
    return Workload(name, qk_kernel(implementation, 64), grid, (threads,), arguments, {6: expected}, target)


def all_workloads(size: float = 1.0) -> list[Callable[[], Workload]]:
    """Every workload, made when called; ``size`` scales the number of CTAs (at 1 a run takes some tenths of a second)."""

    def ctas(count: int) -> int:
        return max(1, round(count * size))

    return [
        lambda: integers(ctas(512)),
        lambda: fused(ctas(512)),
        lambda: mixed(ctas(512)),
        lambda: copy(ctas(128)),
        lambda: transpose(ctas(64)),
        lambda: block_scale(ctas(256)),
        lambda: quantize(ctas(32768)),
        lambda: qk(64 * ctas(16), "blockscale", "sm_120a"),
        lambda: qk(64 * ctas(8), "dequant", "sm_90a"),
    ]
