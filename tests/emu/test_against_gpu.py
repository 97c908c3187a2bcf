"""One body, two judges: what the emulator computes equals an independent oracle, and with ``-m gpu`` what a GPU computes.

With a GPU each instruction sees more than a million random values (an MMA, tens of thousands of tiles of 128 results) and
must agree bit for bit. Where PTX or the hardware leaves a NaN's bits open, any NaN equals any other. ``-s`` prints what was
compared, and how far the approximated functions are from the hardware's.
"""

import numpy as np
import pytest
import warp_kernels as wk
from conversion_cases import CASES as CONVERSIONS
from elementwise import Case, apply_cases, check, elementwise_kernel, emulated, grouped, inputs_of
from exact_floats import TYPES
from executors import on_gpu
from float_cases import APPROXIMATIONS, SPECIAL_VALUES
from float_cases import CASES as FLOATS
from integer_cases import CASES as INTEGERS

from ptx_inline.emu import Output
from ptx_inline.isa.arithmetic import mma_registers
from ptx_inline.toolchain.launcher import device_target

#: Values of a launch against a GPU, and launches: the emulator's shadow memory takes about 25 bytes for each of memory.
VALUES, ROUNDS = 1 << 18, 4
GROUPS = grouped((*INTEGERS, *FLOATS, *CONVERSIONS))


class Oracle:
    """Judge on a machine without GPU: few values, compared with a function in NumPy or Python."""

    rounds, values, is_gpu = 1, 2048, False

    def run(self, kernel, grid, block, arguments, expected):
        """Run a kernel; its outputs must equal those of ``expected``."""
        found = emulated(kernel, grid, block, arguments)
        for position, array in zip(expected.positions, expected.function(), strict=True):
            np.testing.assert_array_equal(found[position], array)

    def elementwise(self, cases, inputs):
        """Apply cases to inputs; their results must equal the cases' oracles."""
        inputs = [x[:256] for x in inputs]
        check(cases, inputs, apply_cases(emulated, cases, inputs))

    def report(self, what):
        """Nothing to say: figures are for the GPU."""


class Gpu:
    """Judge on a machine with one: many values, compared with the hardware's, bit for bit."""

    rounds, values, is_gpu = ROUNDS, VALUES, True

    def __init__(self, torch):
        self.executor, self.compared, self.nan_bits = on_gpu(torch), 0, 0

    def run(self, kernel, grid, block, arguments, expected):
        found = emulated(kernel, grid, block, arguments)
        judged = self.executor(kernel, grid, block, arguments)
        for position in expected.positions:
            x, y = (np.ascontiguousarray(each[position]).view(np.uint8) for each in (found, judged))
            np.testing.assert_array_equal(x, y)
            self.compared += found[position].size

    def elementwise(self, cases, inputs):
        found, judged = (apply_cases(run, cases, inputs) for run in (emulated, self.executor))
        for case, x, y in zip(cases, found, judged, strict=True):
            if not case.nan_bits:
                self.nan_bits += int(np.count_nonzero(x != y))
                x, y = (with_one_nan(bits, case.result) for bits in (x, y))
                self.nan_bits -= int(np.count_nonzero(x != y))
            at = np.flatnonzero(x != y)
            if at.size:
                operands = [hex(int(array[at[0]])) for array in inputs]
                pytest.fail(
                    f"{case.name}: {at.size} of {x.size} differ; of {operands} the emulator makes {int(x[at[0]]):#x}, "
                    f"the GPU {int(y[at[0]]):#x}"
                )
            self.compared += x.size

    def report(self, what):
        """Print the count of this test."""
        rest = f"; {self.nan_bits:,} NaN of other bits" if self.nan_bits else ""
        print(f"\n{what}: {self.compared:,} values equal{rest}", end="")


class Positions:
    """Positions of a kernel's outputs among its arguments, and a function that computes them independently."""

    def __init__(self, function, *positions):
        self.function, self.positions = function, positions


def with_one_nan(bits, kind):
    """The bits with every NaN replaced by the same one."""
    if kind.endswith("x2"):
        return with_one_nan(np.ascontiguousarray(bits).view(np.uint16), kind[:-2]).view(np.uint32)
    ty = TYPES[kind]
    magnitude = bits & bits.dtype.type(ty.sign - 1)
    return np.where(magnitude > bits.dtype.type(ty.infinity), bits.dtype.type(ty.nan), bits)


@pytest.fixture(params=["oracle", pytest.param("gpu", marks=pytest.mark.gpu)])
def judge(request):
    if request.param == "oracle":
        return Oracle()
    torch = request.getfixturevalue("gpu")
    target = device_target(torch.cuda.current_device()).name
    if target != "sm_90a":
        pytest.skip(f"these kernels are assembled for sm_90a, this GPU is {target}")
    return Gpu(torch)


def words(rng, *shape, dtype=np.uint32):
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("cases", GROUPS, ids=lambda cases: f"{cases[0].name}..{cases[-1].name}")
def test_elementwise(judge, cases):
    if judge.is_gpu and cases[0].target != "sm_90a":
        pytest.skip(f"{cases[0].name} is an instruction of {cases[0].target}; its oracle test runs everywhere")
    rng = np.random.default_rng(len(GROUPS) + GROUPS.index(cases))
    for _ in range(judge.rounds):
        judge.elementwise(cases, inputs_of(cases[0].sources, rng, judge.values))
    judge.report(", ".join(case.name for case in cases))


@pytest.mark.parametrize("ty", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_division_by_zero(judge, ty):
    """PTX leaves it open; the emulator says that it does as the hardware: all ones, the remainder too."""
    kind = f"u{ty[1:]}"
    ones = (1 << int(ty[1:])) - 1
    cases = [
        Case(f"{name}.{ty}", f"{name}.{ty} %d, %a, %b;", (kind, kind), kind, oracle)
        for name, oracle in (("div", lambda x, y: ones), ("rem", lambda x, y: ones))
    ]
    (x,) = inputs_of((kind,), np.random.default_rng(1), 4096)
    judge.elementwise(cases, [x, np.zeros_like(x)])
    judge.report(f"division by zero {ty}")


def test_flushing_just_below_the_smallest_normal_number(judge):
    """Whether a result counts as subnormal before or after rounding: products and sums around 2^-126."""
    names = [f"{op}.{rounding}.ftz.f32" for op in ("mul", "fma") for rounding in ("rn", "rz", "rm", "rp")]
    rng = np.random.default_rng(5)
    n = judge.values
    x = np.float32(1) + rng.integers(0, 1 << 23, n).astype(np.float32) * np.float32(2.0**-23)
    y = (1 / x.astype(np.float64)).astype(np.float32).view(np.int32) + rng.integers(-2, 3, n).astype(np.int32)
    a, b = (x * np.float32(2.0**-63)).view(np.uint32), (y.view(np.float32) * np.float32(2.0**-63)).view(np.uint32)
    c = np.where(rng.random(n) < 0.5, np.float32(0), np.float32(2.0**-126)).view(np.uint32)
    for name in names:
        case = next(case for case in FLOATS if case.name == name)
        judge.elementwise([case], [a, b, c][: len(case.sources)])
    judge.report("results around the smallest normal number")


@pytest.mark.parametrize("access", wk.ACCESSES)
def test_memory(judge, access):
    size, ctas = wk.ACCESSES[access], judge.values // wk.THREADS
    n, rng = ctas * wk.THREADS, np.random.default_rng(size)
    kernel = wk.permute_kernel(access)
    for _ in range(judge.rounds):
        x = rng.integers(0, 256, (n, size), dtype=np.uint8)
        a = rng.permutation(n).astype(np.uint32)
        b, c = (
            rng.permuted(np.tile(np.arange(wk.THREADS, dtype=np.uint32), (ctas, 1)), axis=1).reshape(-1) for _ in range(2)
        )
        arguments = (x, Output((n, size), np.uint8), a, b, c)
        expected = Positions(lambda x=x, a=a, b=b, c=c: [wk.permuted(x, a, b, c)], 1)
        judge.run(kernel, (ctas,), (wk.THREADS,), arguments, expected)
    judge.report(f"bytes through shared memory by {access}")


@pytest.mark.parametrize("mode", wk.SHUFFLES)
def test_shuffles(judge, mode):
    n, rng = judge.values, np.random.default_rng(wk.SHUFFLES.index(mode))
    kernel = wk.shuffle_kernel(mode)
    for _ in range(judge.rounds):
        x, a = words(rng, n), words(rng, n) & np.uint32(63)
        segments = rng.choice(np.array([0, 16, 24, 28, 30, 31], np.uint32), n // 32)
        c = np.repeat(segments << np.uint32(8) | rng.choice(np.array([0, 31, 7, 15], np.uint32), n // 32), 32)
        arguments = (x, a, c, Output((n,), np.uint32), Output((n,), np.uint32))
        expected = Positions(lambda x=x, a=a, c=c: wk.shuffled(mode, x, a, c), 3, 4)
        judge.run(kernel, (n // wk.THREADS,), (wk.THREADS,), arguments, expected)
    judge.report(f"shfl.sync.{mode}")


def test_reductions_votes_and_matches(judge):
    n, rng = judge.values, np.random.default_rng(9)
    for _ in range(judge.rounds):
        x = words(rng, n)
        arguments = (x, Output((len(wk.REDUCTIONS), n), np.uint32))
        expected = Positions(lambda x=x: [wk.reduced(x)], 1)
        judge.run(wk.reduction_kernel(), (n // wk.THREADS,), (wk.THREADS,), arguments, expected)
    judge.report("redux, vote, match")


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_ldmatrix(judge, number, trans):
    n, rng = judge.values // 8, np.random.default_rng(number)
    kernel = wk.ldmatrix_kernel(number, trans)
    for _ in range(judge.rounds * 2):
        x, a = rng.integers(0, 256, (n, 128), dtype=np.uint8), rng.integers(0, 256, n, dtype=np.uint32) * np.uint32(16)
        y = np.full((n, 4), 0x55555555, np.uint32)
        expected_y = y.copy()
        expected_y[:, :number] = wk.matrices_loaded(number, trans, x, a)
        judge.run(kernel, (n // wk.THREADS,), (wk.THREADS,), (x, a, y), Positions(lambda e=expected_y: [e], 2))
    judge.report(f"ldmatrix x{number}{' trans' if trans else ''}")


def test_movmatrix(judge):
    n, rng = judge.values, np.random.default_rng(12)
    kernel = wk.movmatrix_kernel()
    for _ in range(judge.rounds):
        x = words(rng, n)
        expected = Positions(lambda x=x: [wk.matrices_transposed(x)], 1)
        judge.run(kernel, (n // wk.THREADS,), (wk.THREADS,), (x, Output((n,), np.uint32)), expected)
    judge.report("movmatrix")


@pytest.mark.parametrize("inputs", ["any", "ordinary", "cancelling"])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_mma(judge, name, inputs):
    """On a GPU 8 launches of 2048 tiles, 128 results each."""
    tiles = 2048 if judge.is_gpu else 64
    rng = np.random.default_rng(len(inputs))
    kernel = wk.mma_kernel(name)
    for _ in range(8 if judge.is_gpu else 1):
        a, b, c = words(rng, tiles, 32, 4), words(rng, tiles, 32, 2), words(rng, tiles, 32, 4)
        if inputs != "any":
            keep, near_one = (0x8FFF8FFF, 0x30003000) if name == "f16" else (0x83FF83FF, 0x3C003C00)
            a, b = (x & np.uint32(keep) | np.uint32(near_one) for x in (a, b))
            exponents = rng.integers(100, 140, c.shape, dtype=np.uint32) << np.uint32(23)
            c = c & np.uint32(0x807FFFFF) | exponents
        if inputs == "cancelling":  # the upper half of k repeats the lower one with the other sign, not quite everywhere
            flip = np.where(rng.random(a[..., 2:].shape) < 0.9, 0x80008000, 0x80008001).astype(np.uint32)
            a[..., 2:], b[..., 1:] = a[..., :2] ^ flip, b[..., :1]
        c = c.view(np.float32)
        expected = Positions(lambda a=a, b=b, c=c: [mma_registers(f"m16n8k16.{name}", a, b, c)], 3)
        judge.run(kernel, (tiles // 8,), (wk.THREADS,), (a, b, c, Output((tiles, 32, 4), np.float32)), expected)
    judge.report(f"mma m16n8k16 {name}, {inputs} inputs")


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_120a"])
def test_mma_goes_by_the_target_of_the_program(target):
    rng = np.random.default_rng(7)
    a, b = (rng.standard_normal((64, 32, 2 * count)).astype(np.float16).view(np.uint32) for count in (4, 2))
    c = rng.standard_normal((64, 32, 4)).astype(np.float32)
    text = wk.mma_kernel("f16").text.replace("sm_90a", target)
    found = emulated(text, (8,), (wk.THREADS,), (a, b, c, Output(c.shape, np.float32)))[3]
    np.testing.assert_array_equal(found, mma_registers("m16n8k16.f16", a, b, c, target=target))
    assert np.any(found != mma_registers("m16n8k16.f16", a, b, c)) == (target != "sm_120a")


@pytest.mark.parametrize("operation", wk.SHARED_ATOMICS)
def test_atomics_of_many_threads(judge, operation):
    dtype, function = wk.SHARED_ATOMICS[operation]
    n, rng = judge.values, np.random.default_rng(3)
    kernel = wk.red_kernel(operation)
    for _ in range(judge.rounds):
        if dtype is np.float32:  # sums of these are exact, whatever their order
            x, y = (rng.integers(-8, 8, size).astype(np.float32) for size in (n, 1024))
        else:
            x, y = (words(rng, size, dtype=np.uint64).astype(dtype) for size in (n, 1024))
        a = rng.integers(0, y.size, n, dtype=np.uint32)

        def final(x=x, y=y, a=a):
            result = y.copy()
            function.at(result, a, x)
            return [result]

        judge.run(kernel, (n // wk.THREADS,), (wk.THREADS,), (x, a, y), Positions(final, 2))
    judge.report(f"red.{operation}, {judge.rounds * n:,} operations on addresses")


def test_atomics_of_one_thread(judge):
    n, rng = judge.values, np.random.default_rng(4)
    for _ in range(judge.rounds):
        x, y = (np.where(rng.random(n) < 0.5, words(rng, n) & np.uint32(7), words(rng, n)) for _ in range(2))
        arguments = (x, y, Output((7, n), np.uint32))
        expected = Positions(lambda x=x, y=y: wk.own_atomics(x, y), 1, 2)
        judge.run(wk.own_atomics_kernel(), (n // wk.THREADS,), (wk.THREADS,), arguments, expected)
    judge.report("atom inc, dec, cas, exch, add")


@pytest.mark.parametrize("ptx", SPECIAL_VALUES)
def test_special_values_of_approximations(judge, ptx):
    x, y = (np.array(values, np.float32).view(np.uint32) for values in zip(*SPECIAL_VALUES[ptx], strict=True))
    table = {
        int(a): 0x7FFFFFFF if np.isnan(b.view(np.float32)) else int(b) for a, b in zip(x, y, strict=True)
    }
    case = Case(ptx, f"{ptx} %d, %a;", ("f32",), "f32", table.__getitem__, nan_bits=False)
    judge.elementwise([case], [x])
    judge.report(f"special values of {ptx}")


def test_nans_are_told_from_numbers():
    """What the comparison with a GPU rests on where NaN bits are open."""
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7F800000, 0x3F800000, 0], np.uint32)
    assert with_one_nan(bits, "f32").tolist() == [0x7FFFFFFF, 0x7FFFFFFF, 0x7F800000, 0x3F800000, 0]
    pairs = np.array([0x7C01FC00, 0x3C00FE00], np.uint32)
    assert with_one_nan(pairs, "f16x2").tolist() == [0x7FFFFC00, 0x3C007FFF]
    assert with_one_nan(np.array([0xFF81, 0x7F80], np.uint16), "bf16").tolist() == [0x7FFF, 0x7F80]


def test_a_gpu_that_differs_is_reported():
    """The judge with another emulator run in the GPU's place, whose results are changed."""
    judge = Gpu.__new__(Gpu)
    judge.compared = judge.nan_bits = 0

    def wrong(*arguments):
        found = emulated(*arguments)
        found[-1][3] ^= 1
        return found

    judge.executor = emulated
    cases = [case for case in INTEGERS if case.name == "add.u32"]
    inputs = [np.arange(8, dtype=np.uint32), np.full(8, 5, np.uint32)]
    judge.elementwise(cases, inputs)
    assert judge.compared == 8
    judge.executor = wrong
    with pytest.raises(pytest.fail.Exception, match=r"add.u32: 1 of 8 differ; of \['0x3', '0x5'\] .* 0x8, the GPU 0x9"):
        judge.elementwise(cases, inputs)
    x = np.arange(64, dtype=np.uint32)
    arguments = (x, x.copy(), Output((7, 64), np.uint32))
    with pytest.raises(AssertionError, match="Mismatched elements"):
        judge.run(wk.own_atomics_kernel(), (1,), (64,), arguments, Positions(None, 2))


@pytest.mark.gpu
def test_approximations_are_near_the_hardware(gpu):
    """Prints the table: error of the GPU and of the emulator as a share of PTX's bound, and units between the two."""
    print(f"\n{'instruction':24} {'arguments':>21} {'GPU/bound':>10} {'emu/bound':>10} {'ulp apart':>10} {'same bits':>10}")
    for found in APPROXIMATIONS:
        arguments = found.arguments(np.random.default_rng(2), 1 << 20)
        ours, theirs = (apply_cases(run, [found.case], arguments)[0] for run in (emulated, on_gpu(gpu)))
        shares = [found.errors(arguments, result)["share"] for result in (theirs, ours)]
        finite = np.isfinite(ours.view(np.float32)) & np.isfinite(theirs.view(np.float32))
        apart = np.abs(ours.astype(np.int64) - theirs.astype(np.int64))[finite & (ours >> 31 == theirs >> 31)].max()
        same = np.mean(ours == theirs)
        span = f"{found.low:.3g} to {found.high:.3g}"
        print(f"{found.ptx:24} {span:>21} {shares[0]:10.3f} {shares[1]:10.3f} {apart:10} {same:10.1%}")
        assert max(shares) <= 1, (found.ptx, shares)


def test_every_kernel_assembles(cache_directory):
    """Without a GPU: what would run there at least is PTX that the assembler takes."""
    kernels = [elementwise_kernel(cases) for cases in (*GROUPS, *([found.case] for found in APPROXIMATIONS))]
    kernels += [*map(wk.permute_kernel, wk.ACCESSES), *map(wk.shuffle_kernel, wk.SHUFFLES), wk.reduction_kernel()]
    kernels += [wk.ldmatrix_kernel(number, trans) for number in (1, 2, 4) for trans in (False, True)]
    kernels += [*map(wk.mma_kernel, ("f16", "bf16")), *map(wk.red_kernel, wk.SHARED_ATOMICS), wk.own_atomics_kernel()]
    kernels.append(wk.movmatrix_kernel())
    for kernel in kernels:
        assert kernel.resources("sm_120a" if "sm_120a" in kernel.text else "sm_90a").registers > 0
