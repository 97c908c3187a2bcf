"""How results are compared: derived error budgets, worst coordinates, poisoned memory.

Nothing in the library imports this module; ``nbfmha validate``, the tests and the notebooks do. A budget is an array of
the largest absolute error that the arithmetic can explain, element by element, so that no case needs a tolerance of
its own.
"""

from dataclasses import dataclass

import numpy as np

# A poisoned byte: not a zero, a NaN in E4M3 and in UE8M0 terms a huge scale, two codes of -6 in E2M1.
POISON_BYTE = 0xFF


@dataclass(frozen=True)
class Comparison:
    """Outcome of ``compare``: whether every element lies within its budget, and where it is worst.

    max_abs_error is the largest |got - expected| over elements where both are numbers (infinite when exactly one of
    them is NaN); max_budget_share is the largest error / budget (0 when every element is exact, infinite when a zero
    budget is exceeded); index, got, expected and budget belong to the element with that share.
    """

    ok: bool
    elements: int
    mismatches: int
    max_abs_error: float
    max_budget_share: float
    index: tuple[int, ...]
    got: float
    expected: float
    budget: float

    @property
    def exact(self) -> bool:
        return self.max_abs_error == 0

    def describe(self) -> str:
        """One line that names the worst element and both of its values."""
        if self.elements == 0:
            return "no elements"
        where = ", ".join(str(i) for i in self.index)
        return (
            f"{self.mismatches} of {self.elements} elements outside their budget; worst at [{where}]: "
            f"got {self.got!r}, expected {self.expected!r}, |error| {abs(self.got - self.expected):.6g}, "
            f"budget {self.budget:.6g}"
        )


def compare(got, expected, budget=0.0) -> Comparison:
    """Compare two arrays element by element in float64.

    got, expected: array-likes of one shape. budget: absolute error allowed, a scalar or an array that broadcasts to
    that shape; 0 asks for equality of values (so -0.0 equals 0.0). NaN equals NaN only; an infinity equals itself
    only. Raises ValueError when the shapes differ or a budget is negative or NaN.
    """
    got = np.asarray(got, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    if got.shape != expected.shape:
        raise ValueError(f"got and expected must have one shape, got {got.shape} and {expected.shape}")
    budget = np.broadcast_to(np.asarray(budget, dtype=np.float64), got.shape)
    if np.any(~(budget >= 0)):
        raise ValueError("budget must be >= 0 everywhere; a NaN or negative budget cannot be met")
    if got.size == 0:
        return Comparison(True, 0, 0, 0.0, 0.0, (), 0.0, 0.0, 0.0)
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(got - expected))
    error = np.where(np.isnan(error), np.inf, error)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(error == 0, 0.0, np.where(np.isinf(error), np.inf, error / budget))
    worst = np.unravel_index(int(np.argmax(share)), share.shape)
    outside = int(np.count_nonzero(~same & ~(error <= budget) | np.isinf(error)))
    return Comparison(
        ok=outside == 0,
        elements=got.size,
        mismatches=outside,
        max_abs_error=float(error.max()),
        max_budget_share=float(share[worst]),
        index=tuple(int(i) for i in worst),
        got=float(got[worst]),
        expected=float(expected[worst]),
        budget=float(budget[worst]),
    )


def assert_close(got, expected, budget=0.0, *, what: str = "result") -> Comparison:
    """``compare``, raising AssertionError with the worst coordinate and both values when an element leaves its budget."""
    comparison = compare(got, expected, budget)
    if not comparison.ok:
        raise AssertionError(f"{what}: {comparison.describe()}")
    return comparison


def relative_rmse(got, expected) -> float:
    """sqrt(sum (got - expected)^2 / sum expected^2) in float64: the relative L2 error over all elements.

    Where everything expected is zero: 0 if everything got is zero too, else infinity.
    """
    got = np.asarray(got, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    error, size = np.sum((got - expected) ** 2), np.sum(expected**2)
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return float(np.sqrt(error / size))


def relative_rmse_standard_error(got, expected, group: int) -> float:
    """Standard error of ``relative_rmse`` over independent groups of ``group`` consecutive elements (delta method).

    With e and x the mean squared error and mean square of a group, the ratio R = E[e]/E[x] has the variance
    Var(e - R x) / (n E[x]^2) over n groups, and sqrt(R) has the standard error of R divided by 2 sqrt(R).
    Raises ValueError when the number of elements is not a multiple of ``group``.
    """
    got = np.asarray(got, dtype=np.float64).ravel()
    expected = np.asarray(expected, dtype=np.float64).ravel()
    if got.size % group:
        raise ValueError(f"group must divide the number of elements, got {group} and {got.size}")
    error = ((got - expected) ** 2).reshape(-1, group).mean(axis=1)
    square = (expected**2).reshape(-1, group).mean(axis=1)
    ratio = error.mean() / square.mean()
    spread = np.std(error - ratio * square, ddof=1) / (np.sqrt(error.size) * square.mean())
    return float(spread / (2 * np.sqrt(ratio)))


def accumulation_budget(magnitude, largest_term, *, steps: int, addends: int, fraction_bits: int) -> np.ndarray:
    """Largest absolute error of a chain of ``steps`` matrix multiply-accumulates into one f32 accumulator.

    An MMA aligns its ``addends`` (the products or group sums, and C) to the largest exponent among them, truncates each
    at ``fraction_bits`` binary places of that exponent, adds exactly and rounds once toward zero to f32 (24 significant
    bits). One step therefore errs by at most

        2^-23 * |result|  +  addends * 2^-fraction_bits * 2^e_max

    with |result| and |C| at most ``magnitude`` = sum_k |q_k| |k_k| (plus what earlier steps added, which the factor
    below covers) and 2^e_max at most max(``largest_term``, magnitude). Source of the arithmetic: arXiv 2511.10909
    (models of tensor core accumulation); instruction parameters: ``ptx_inline.isa.instructions``.

    magnitude, largest_term: arrays (..., M, N) in float64. Returns the budget, same shape.
    """
    magnitude = np.asarray(magnitude, dtype=np.float64)
    unit = 2.0**-23 * magnitude + addends * 2.0**-fraction_bits * np.maximum(magnitude, largest_term)
    # (1 + growth) covers partial sums that earlier errors carried past ``magnitude``: growth is at most steps * relative
    # error
    growth = steps * (2.0**-23 + addends * 2.0**-fraction_bits)
    return steps * unit * (1 + growth)


class Guarded:
    """A NumPy buffer between two poisoned bands, to catch writes out of bounds and reads of what was never written.

    ``body`` is the writable view handed to the code under test (poisoned too); ``check`` raises AssertionError with the
    offset of the first damaged byte of a band. size: elements; dtype: of the elements; band: bytes on either side.
    """

    def __init__(self, size: int, dtype, *, band: int = 256):
        dtype = np.dtype(dtype)
        if band % dtype.itemsize:
            raise ValueError(f"band must be a multiple of the item size {dtype.itemsize}, got {band}")
        self.band = band
        self.raw = np.full(2 * band + size * dtype.itemsize, POISON_BYTE, dtype=np.uint8)
        self.body = self.raw[band : band + size * dtype.itemsize].view(dtype)

    def check(self) -> None:
        for name, start, stop in (("before", 0, self.band), ("after", self.raw.size - self.band, self.raw.size)):
            damaged = np.flatnonzero(self.raw[start:stop] != POISON_BYTE)
            if damaged.size:
                raise AssertionError(f"guard band {name} the buffer was written at byte {int(damaged[0])} of {self.band}")


def poison(shape, dtype) -> np.ndarray:
    """An array with every byte 0xFF: NaN in f16, bf16-as-f32 and f32, code -6 in E2M1, NaN in E4M3 and UE8M0."""
    return np.full(np.prod(shape, dtype=int) * np.dtype(dtype).itemsize, POISON_BYTE, np.uint8).view(dtype).reshape(shape)


def poison_outside(matrix: np.ndarray, rows: int, cols: int, value=POISON_BYTE) -> np.ndarray:
    """A copy of ``matrix`` (..., R, C) with everything outside [:rows, :cols] set to ``value``."""
    result = np.array(matrix, copy=True)
    result[..., rows:, :] = value
    result[..., :, cols:] = value
    return result
