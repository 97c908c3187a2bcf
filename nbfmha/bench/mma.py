"""``nbfmha bench mma``: raw throughput of each ``mma.sync``, one warp an SM on a dependent chain, and saturated.

The kernel is :mod:`nbfmha.kernels.throughput`. Operands are the same random E2M1 values in every format, scales 1/2, 1 and
2, so that every sum is a number of float32: before it is timed, each kernel must give the exact product. Operations are
2 m n k an MMA. Cycles come from the SM clock that the driver reports while the kernel runs; where it reports none, they
are left out. An MMA that this GPU lacks, and every one where there is no GPU, is emulated instead and its instructions are
counted: a count, never a speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nbfmha.bench import measure
from nbfmha.kernels.throughput import MMAS_A_TURN, throughput_kernel, why_not
from ptx_inline.isa.instructions import INSTRUCTIONS, instruction

EMULATED_TARGET = "sm_120a"
SUB_PARTITIONS = 4  # of an SM, each with its tensor core, from sm_80 on
BURST_MS = 60  # long enough for the driver to report the clock of this load
_CHECK_TURNS = 2


@dataclass(frozen=True)
class Load:
    """How busy an SM is: ``warps`` on it, each with ``chains`` independent accumulators; ``turns`` of the loop a launch."""

    name: str
    warps: int
    chains: int
    turns: int

    @property
    def mmas(self) -> int:
        """MMAs of an SM in one launch."""
        return self.warps * MMAS_A_TURN * self.turns

    @property
    def busy(self) -> int:
        """Sub-partitions of an SM that have a warp."""
        return min(self.warps, SUB_PARTITIONS)


LATENCY = Load("latency: 1 warp, 1 chain", 1, 1, 4096)
SATURATED = Load("saturated: 16 warps x 4 chains", 16, 4, 4096)
LOADS = (LATENCY, SATURATED)


@dataclass(frozen=True)
class Row:
    """One MMA under one load: milliseconds a launch, and the SM clock in MHz where the driver reports it."""

    mma: str
    load: Load
    multiprocessors: int
    milliseconds: float
    clock_mhz: float | None

    @property
    def tflop_s(self) -> float:
        """Of the whole GPU."""
        return flops(self.mma) * self.load.mmas * self.multiprocessors / self.milliseconds / 1e9

    @property
    def flop_per_clock(self) -> float | None:
        """Of one SM, a cycle."""
        return None if self.clock_mhz is None else self.tflop_s * 1e6 / self.clock_mhz / self.multiprocessors

    @property
    def clocks_per_mma(self) -> float | None:
        """Cycles from one MMA of a sub-partition to its next; with one warp and one chain that is the latency."""
        return None if self.clock_mhz is None else flops(self.mma) * self.load.busy / self.flop_per_clock


@dataclass(frozen=True)
class Count:
    """What the emulator counted, in instructions of one warp: MMAs and others in a turn of the loop, and all outside it."""

    mma: str
    load: Load
    mmas: int
    others: int
    outside: int


@dataclass(frozen=True)
class Operands:
    """Register images of one warp, as the kernel takes them: uint32 a (32, 4), b (32, 2), sfa, sfb (32,), float32 c
    (chains, 32, 4). ``product``: A B in the lanes' registers, float64 (32, 4)."""

    mma: str
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    sfa: np.ndarray
    sfb: np.ndarray
    product: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """a, b, c, sfa, sfb: the kernel's arguments up to d."""
        return self.a, self.b, self.c, self.sfa, self.sfb

    def expected(self, turns: int) -> np.ndarray:
        """float32 (chains, 32, 4): c plus the product once for each MMA of a chain."""
        return (self.c + turns * (MMAS_A_TURN // len(self.c)) * self.product).astype(np.float32)


def flops(mma: str) -> int:
    """Operations of one MMA: a multiplication and an addition for each of its m n k products."""
    m, n, k = instruction(mma).shape
    return 2 * m * n * k


def make_operands(mma: str, chains: int, seed: int = 0) -> Operands:
    """Random operands of an MMA, the same E2M1 values for each; sums of a few hundred products are exact in float32."""
    from ptx_inline.isa.arithmetic import to_containers
    from ptx_inline.isa.formats import E2M1, FORMATS
    from ptx_inline.isa.fragments import fragment

    description = instruction(mma)
    m, n, k = description.shape
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 16, (rows, k), np.uint8) for rows in (m, n)]
    values = [E2M1.decode(x).astype(np.float64) for x in codes]
    if description.element_bits == 16:
        bf16 = description.a_formats == ("bf16",)
        codes = [_upper_half(x) if bf16 else x.astype(np.float16).view(np.uint16) for x in values]
    elif description.element_bits == 8:
        codes = [to_containers(x, "e2m1") for x in codes]
    a, b = (fragment(mma, name).pack(x) for name, x in zip("AB", codes, strict=True))
    scales = [np.zeros(32, np.uint32) for _ in range(2)]
    if description.sf_vec_size:
        format = FORMATS[description.sf_formats[0]]
        one = int(np.flatnonzero(format.values == 1)[0])
        octave = 1 << format.mantissa_bits
        sf = [rng.integers(-1, 2, (rows, description.scales_per_row)) * octave + one for rows in (m, n)]
        sf = [x.astype(np.uint8) for x in sf]
        factors = [np.repeat(format.decode(x), description.sf_vec_size, axis=-1) for x in sf]
        values = [x * factor for x, factor in zip(values, factors, strict=True)]
        scales = [fragment(mma, f"SF{name}").pack(x)[..., 0] for name, x in zip("AB", sf, strict=True)]
    accumulator = fragment(mma, "C")
    c = rng.integers(-8, 9, (chains, m, n)).astype(np.float32)
    c = accumulator.pack(c.view(np.uint32)).view(np.float32)
    product = (values[0] @ values[1].T).astype(np.float32)
    return Operands(mma, a, b, c, *scales, accumulator.pack(product.view(np.uint32)).view(np.float32).astype(np.float64))


def check(found: np.ndarray, operands: Operands, turns: int) -> None:
    """Raises ``AssertionError`` unless every warp's accumulators are the exact ones."""
    expected = np.broadcast_to(operands.expected(turns), found.shape)
    np.testing.assert_array_equal(found, expected, err_msg=operands.mma)


def count(mma: str, load: Load) -> Count:
    """Emulate one CTA of the kernel for ``EMULATED_TARGET``, check its result, count what it executed."""
    from ptx_inline.emu import Output, emulate

    kernel, operands = throughput_kernel(mma, load.chains, EMULATED_TARGET), make_operands(mma, load.chains)
    totals = []
    for turns in (_CHECK_TURNS, 2 * _CHECK_TURNS):
        d = Output((load.warps, *operands.c.shape), np.dtype(np.float32))
        run = emulate(kernel, (1,), (32 * load.warps,), (*operands.arrays, d, turns), EMULATED_TARGET)
        check(run.outputs[5], operands, turns)
        opcodes = run.profile.opcodes()
        mmas = sum(number for opcode, number in opcodes.items() if opcode.startswith("mma."))
        totals.append((mmas, run.profile.warp_instructions))
    # two runs of different length tell the loop from what stands around it
    (mmas, every), (more_mmas, more) = totals
    divisor = load.warps * _CHECK_TURNS
    in_loop = (more - every) // divisor
    a_turn = (more_mmas - mmas) // divisor
    return Count(mma, load, a_turn, in_loop - a_turn, every // load.warps - _CHECK_TURNS * in_loop)


def main(json_path: Path | str | None = None) -> None:
    """Check, time and print; without a GPU, emulate, count and print. Raises ``AssertionError`` if a result is wrong."""
    console = measure.console()
    reasons, rows = {}, []
    machine: dict[str, str] | None = None
    try:
        torch = measure.require_gpu()
    except RuntimeError as error:
        reasons = dict.fromkeys(INSTRUCTIONS, str(error))
    else:
        from ptx_inline.toolchain.launcher import device_target

        machine, target = measure.machine(), device_target(torch.cuda.current_device())
        reasons = {mma: reason for mma in INSTRUCTIONS if (reason := why_not(mma, target))}
        rows = time_rows(torch, target, [mma for mma in INSTRUCTIONS if mma not in reasons])
        console.print(speed_table(rows, reasons, machine["gpu"]))
    counts = [count(mma, load) for mma in reasons for load in LOADS]
    if machine is None:
        console.print(f"not measured: {next(iter(reasons.values()))}", soft_wrap=True)
    if counts:
        console.print(count_table(counts))
    report = {
        "machine": machine,
        "rows": [_as_json(row) for row in rows],
        "not_measured": reasons,
        "counts": [asdict(row) for row in counts],
        "counts_target": EMULATED_TARGET,
    }
    measure.write_json(json_path, report)


def time_rows(torch, target, mmas: list[str], loads: tuple[Load, ...] = LOADS, rounds: int = 5) -> list[Row]:
    """Check each MMA under each load on this GPU, then time all of them in turn, ``rounds`` times; medians."""
    multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    launches = {}
    for mma in mmas:
        for load in loads:
            launch = _prepare(torch, target, mma, load, multiprocessors)
            launch(load.turns)  # the clock rises before anything counts
            launches[mma, load] = launch
    clock, bursts = sm_clock(torch.cuda.current_device()), {case: [] for case in launches}
    for _ in range(rounds):
        for (mma, load), launch in launches.items():
            bursts[mma, load].append(_burst(torch, lambda launch=launch, load=load: launch(load.turns), clock))
    rows = []
    for (mma, load), found in bursts.items():
        milliseconds = statistics.median(ms for ms, _ in found)
        clocks = [mhz for _, mhz in found if mhz is not None]
        rows.append(Row(mma, load, multiprocessors, milliseconds, statistics.median(clocks) if clocks else None))
    return rows


def _prepare(torch, target, mma: str, load: Load, multiprocessors: int) -> Callable[[int], None]:
    """A function that queues one launch of so many turns; its result has been checked."""
    from ptx_inline.isa.shared_memory import shared_limit

    kernel, operands = throughput_kernel(mma, load.chains, target), make_operands(mma, load.chains)
    words = [torch.from_numpy(np.ascontiguousarray(x).view(np.int32)).cuda() for x in operands.arrays]
    shape = (multiprocessors, load.warps, *operands.c.shape)
    d = torch.full(shape, float("nan"), dtype=torch.float32, device="cuda")
    # more than half of an SM's shared memory: no two CTAs share an SM
    options = {"smem_bytes": shared_limit(target.name)}

    def launch(turns: int) -> None:
        kernel.launch((multiprocessors,), (32 * load.warps,), (*words, d, turns), **options)

    launch(_CHECK_TURNS)
    check(d.cpu().numpy(), operands, _CHECK_TURNS)
    return launch


def _burst(torch, run: Callable[[], None], clock: Callable[[], float | None]) -> tuple[float, float | None]:
    """Milliseconds a launch over about ``BURST_MS`` of launches back to back, and the clock in the midst of them."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def queue(launches: int) -> None:
        events[0].record()
        for _ in range(launches):
            run()
        events[1].record()

    queue(2)
    events[1].synchronize()
    launches = max(2, round(BURST_MS / (events[0].elapsed_time(events[1]) / 2)))
    queue(launches)
    time.sleep(BURST_MS / 2000)
    mhz = clock()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / launches, mhz


def sm_clock(device: int) -> Callable[[], float | None]:
    """A function that gives the SM clock of a GPU at this moment, MHz; None where the driver's management library (NVML)
    does not tell."""
    try:
        from cuda.core import Device

        clock = Device(device).to_system_device().get_clock("sm")
        clock.get_current_mhz()
    except Exception:  # an older cuda-core, no NVML, no permission: each has errors of its own, all mean "not told"
        return lambda: None
    return lambda: float(clock.get_current_mhz())


def speed_table(rows: list[Row], reasons: dict[str, str], gpu: str):
    """What was measured; an MMA that the GPU lacks has the reason in place of figures."""
    from rich.table import Table

    table = Table(title=f"mma.sync on {gpu}, operands in registers")
    columns = ("MMA", "load of an SM", "TFLOP/s", "FLOP/clk/SM", "clk an MMA", "SM MHz")
    for heading in columns:
        table.add_column(heading, justify="left" if heading in columns[:2] else "right")
    for mma in INSTRUCTIONS:
        if mma in reasons:
            table.add_row(mma, reasons[mma])
        for row in rows:
            if row.mma == mma:
                figures = (row.flop_per_clock, row.clocks_per_mma, row.clock_mhz)
                formats = ("{:,.0f}", "{:.1f}", "{:,.0f}")
                told = ("-" if x is None else form.format(x) for x, form in zip(figures, formats, strict=True))
                table.add_row(mma, row.load.name, f"{row.tflop_s:,.1f}", *told)
    return table


def count_table(counts: list[Count]):
    """What the emulator counted."""
    from rich.table import Table

    table = Table(title=f"instructions of the same kernel, a warp, emulated for {EMULATED_TARGET} (counted, not timed)")
    columns = ("MMA", "load of an SM", "FLOP an MMA", "MMAs a turn", "others a turn", "outside the loop")
    for heading in columns:
        table.add_column(heading, justify="left" if heading in columns[:2] else "right")
    for row in counts:
        numbers = (flops(row.mma), row.mmas, row.others, row.outside)
        table.add_row(row.mma, row.load.name, *(f"{number:,}" for number in numbers))
    return table


def _as_json(row: Row) -> dict:
    derived = {name: getattr(row, name) for name in ("tflop_s", "flop_per_clock", "clocks_per_mma")}
    return asdict(row) | derived


def _upper_half(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) of values that bfloat16 holds exactly."""
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
