"""One MMA tile of the implementation under test: registers in, registers out.

Operands are packed by the fragment maps, the implementation multiplies (the NumPy model, or the probe kernel on a GPU
or the emulator), and the accumulator is unpacked. The last cases pack wrongly on purpose.
"""

from __future__ import annotations

import numpy as np

from nbfmha.testing import accumulation_budget, compare
from nbfmha.validate import problems
from nbfmha.validate.case import Context, Registry, Result
from nbfmha.validate.warp_model import BLOCKS, MMA_K, MMA_M, MMA_N, Packing
from ptx_inline.isa import patterns

registry = Registry()

TILE = (MMA_M, MMA_N, MMA_K)
SELECTORS = tuple((thread_id_a, thread_id_b) for thread_id_a in range(2) for thread_id_b in range(4))
_TILES = 64
#: A register that the MMA must not read: NaN in every UE4M3 byte, so a single wrong read shows.
_UNREAD = 0x7F7F7F7F


def multiply(context: Context, a, b, c, sfa, sfb, *, packing: Packing, selectors=(0, 0)) -> np.ndarray:
    """Tiles of codes (T, 16, 64), (T, 8, 64), float32 (T, 16, 8), scale bytes (T, 16, 4), (T, 8, 4) through registers:
    D, float32 (T, 16, 8). Scale registers that the selectors do not name hold NaN."""
    registers = context.implementation.mma_registers(
        packing.a.pack(a),
        packing.b.pack(b),
        packing.c.pack(c.view(np.uint32)).view(np.float32),
        packing.sfa.pack(sfa, fill=_UNREAD)[..., 0],
        packing.sfb.pack(sfb, fill=_UNREAD)[..., 0],
        *selectors,
    )
    return packing.c.unpack(registers.view(np.uint32)).view(np.float32)


def _random_tiles(rng: np.random.Generator, tiles: int = _TILES):
    """Random codes, accumulators and finite scales, zero and subnormals among them."""
    return (
        rng.integers(0, 16, (tiles, MMA_M, MMA_K), dtype=np.uint8),
        rng.integers(0, 16, (tiles, MMA_N, MMA_K), dtype=np.uint8),
        (rng.standard_normal((tiles, MMA_M, MMA_N)) * 1000).astype(np.float32),
        rng.integers(0, 0x7F, (tiles, MMA_M, BLOCKS), dtype=np.uint8),
        rng.integers(0, 0x7F, (tiles, MMA_N, BLOCKS), dtype=np.uint8),
    )


def _expected(context: Context, a, b, c, sfa, sfb) -> tuple[np.ndarray, np.ndarray]:
    """D = A B + C without rounding, and the error budget of the implementation's MMA."""
    from ptx_inline.isa.formats import E2M1, UE4M3

    scales_a, scales_b = UE4M3.decode(sfa).astype(np.float64), UE4M3.decode(sfb).astype(np.float64)
    rows = E2M1.decode(a) * np.repeat(scales_a, 16, axis=-1)
    cols = np.swapaxes(E2M1.decode(b) * np.repeat(scales_b, 16, axis=-1), -1, -2)
    implementation = context.implementation
    accumulation = implementation.accumulation
    factors = (scales_a, scales_b) if implementation.multiplies_scales else (np.abs(rows), np.abs(cols).swapaxes(-1, -2))
    budget = accumulation_budget(
        np.abs(rows) @ np.abs(cols) + np.abs(c),
        problems.largest_term(factors[0].max(axis=-1), factors[1].max(axis=-1), accumulation),
        steps=accumulation.steps(MMA_K),
        addends=accumulation.addends,
        fraction_bits=accumulation.fraction_bits,
    )
    return rows @ cols + c, budget


@registry.case("mma", "the model gives an RTX PRO 6000's results", evidence="model")
def transcripts(context: Context) -> Result:
    from ptx_inline.isa.transcripts import document, result_hash
    from ptx_inline.isa.transcripts import transcripts as cases

    hashes = {case.name: (result_hash(case.compute()), case.hash) for case in cases()}
    wrong = [name for name, (got, expected) in hashes.items() if got != expected]
    metric = f"{len(hashes) - len(wrong)} of {len(hashes)} result hashes equal"
    if wrong:
        return Result.failed(metric, f"differ: {', '.join(wrong)}", differing=wrong)
    return Result.passed(metric, source=document()["source"], names=list(hashes))


@registry.case("mma", "the kernel's MMA gives the model's bits", evidence="implementation")
def model_bits(context: Context) -> Result:
    from nbfmha.validate.implementations import BLOCK_SCALE_MMA
    from ptx_inline.isa.arithmetic import mma_registers
    from ptx_inline.isa.fragments import fragment

    implementation = context.implementation
    if not implementation.runs_kernels:
        return Result.skipped("needs a GPU or the emulator: the model would be compared with itself")
    rng = context.rng("model_bits")
    if implementation.kernels == "blockscale":
        key, probe, (a, b, c, sfa, sfb) = BLOCK_SCALE_MMA, "blockscale", _random_tiles(rng, tiles=1024)
        scales = [fragment(key, "SFA").pack(sfa)[..., 0], fragment(key, "SFB").pack(sfb)[..., 0]]
    else:
        key, probe = "m16n8k16.f16", "f16"
        a, b = (
            (rng.standard_normal((1024, rows, 16)) * np.exp2(rng.integers(-8, 9, (1024, rows, 16)))).astype(np.float16)
            for rows in (MMA_M, MMA_N)
        )
        a, b, c = a.view(np.uint16), b.view(np.uint16), rng.standard_normal((1024, MMA_M, MMA_N)).astype(np.float32)
        scales = []
    registers = [
        fragment(key, "A").pack(a),
        fragment(key, "B").pack(b),
        fragment(key, "C").pack(c.view(np.uint32)).view(np.float32),
    ]
    unused = [np.zeros((len(a), 32), np.uint32)] * (2 - len(scales))
    got = implementation.probe(probe, *registers, *scales, *unused)
    expected = mma_registers(key, *registers, *scales, target=implementation.target)
    return Result.of(compare(got.view(np.uint32), expected.view(np.uint32)), f"bit patterns of {key}")


@registry.case("mma", "A = 0: D = 0 exactly", evidence="implementation")
def zero_a(context: Context) -> Result:
    a, b, c, sfa, sfb = _random_tiles(context.rng("zero_a"))
    got = multiply(context, 0 * a, b, 0 * c, sfa, sfb, packing=Packing.right())
    return Result.of(compare(got, np.zeros_like(got)), "elements of D")


@registry.case("mma", "D = A B + C, random codes, scales and C", evidence="implementation")
def accumulate(context: Context) -> Result:
    tiles = _random_tiles(context.rng("accumulate"))
    got = multiply(context, *tiles, packing=Packing.right())
    return Result.of(compare(got, *_expected(context, *tiles)), "elements of D")


@registry.case("mma", "every scale selector, all other scales NaN", evidence="implementation")
def scale_selectors(context: Context) -> Result:
    got, expected, budget = [], [], []
    for selectors in SELECTORS:
        tiles = _random_tiles(context.rng(f"scale_selectors {selectors}"))
        packing = Packing.right(*selectors)
        got.append(multiply(context, *tiles, packing=packing, selectors=selectors))
        values, allowed = _expected(context, *tiles)
        expected.append(values)
        budget.append(allowed)
    comparison = compare(np.stack(got), np.stack(expected), np.stack(budget))
    return Result.of(comparison, f"elements of D, {len(SELECTORS)} selectors")


@registry.case("mma", "a NaN scale reaches its row or column only", evidence="implementation")
def nan_scale(context: Context) -> Result:
    a, b, c, sfa, sfb = _random_tiles(context.rng("nan_scale"), tiles=1)
    sfa[0, 3, 1] = 0x7F
    sfb[0, 5, 2] = 0x7F
    got = np.isnan(multiply(context, a, b, c, sfa, sfb, packing=Packing.right()))
    expected = np.zeros_like(got)
    expected[0, 3, :] = expected[0, :, 5] = True
    return Result.of(compare(got, expected), "elements of D: NaN or not")


@registry.case("mma", "row-major packing: AllOnes is 64 all the same", evidence="implementation")
def wrong_packing_all_ones(context: Context) -> Result:
    got = indicator_tiles(context, Packing.row_major())["AllOnes"]
    return Result.of(compare(got, np.full_like(got, 64)), "elements of D (so this case proves little)")


@registry.case("mma", "row-major packing: ColIndicator is 112 everywhere", evidence="implementation")
def wrong_packing_col_indicator(context: Context) -> Result:
    got = indicator_tiles(context, Packing.row_major())["ColIndicator"]
    if compare(got, patterns.col_indicator(TILE)[2]).ok:
        return Result.failed("the wrong packing gives the right answer", "it must mix columns")
    return Result.of(compare(got, np.full_like(got, 112)), "elements of D wrong in the known way")


@registry.case("mma", "row-major packing: all rows of A in each row of D", evidence="implementation")
def wrong_packing_rows(context: Context) -> Result:
    # tile t has ones in row t of A alone: D[m] is not zero where the hardware's row m was fed from row t
    ones_a, ones_b, _ = patterns.all_ones(TILE)
    a = np.zeros((MMA_M, MMA_M, MMA_K), np.uint8)
    a[np.arange(MMA_M), np.arange(MMA_M)] = ones_a
    b = np.broadcast_to(ones_b, (MMA_M, *ones_b.shape))
    right = _unit_scales(context, a, b, Packing.right())
    wrong = _unit_scales(context, a, b, Packing.row_major())
    comparison = compare(right, MMA_K * np.repeat(np.eye(MMA_M)[..., None], MMA_N, axis=-1))
    if not comparison.ok:
        return Result.of(comparison, "elements of D with the right packing")
    return Result.of(compare(wrong, np.full_like(wrong, MMA_K / MMA_M)), "(source row, row, column): a sixteenth each")


def _unit_scales(context: Context, a: np.ndarray, b: np.ndarray, packing: Packing) -> np.ndarray:
    """D (T, 16, 8) of codes with C = 0 and every scale 1."""
    tiles = len(a)
    sfa, sfb = (np.full((tiles, rows, BLOCKS), problems.UE4M3_ONE, np.uint8) for rows in (MMA_M, MMA_N))
    return multiply(context, a, b, np.zeros((tiles, MMA_M, MMA_N), np.float32), sfa, sfb, packing=packing)


def indicator_tiles(context: Context, packing: Packing) -> dict[str, np.ndarray]:
    """D (16, 8) of the patterns AllOnes, RowIndicator and ColIndicator with operands packed by ``packing``."""
    made = [make(TILE) for make in (patterns.all_ones, patterns.row_indicator, patterns.col_indicator)]
    got = _unit_scales(context, np.stack([a for a, _, _ in made]), np.stack([b for _, b, _ in made]), packing)
    return dict(zip(("AllOnes", "RowIndicator", "ColIndicator"), got, strict=True))
