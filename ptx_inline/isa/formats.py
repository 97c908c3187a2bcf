"""The small floating-point formats of the MMA operands: the only home of their tables.

A format is described by its fields; its table of values follows from them. Sources: OCP Microscaling Formats (MX) 1.0 for
E2M1, E2M3, E3M2 and E8M0; OCP 8-bit Floating Point 1.0 for E4M3 and E5M2; PTX ISA, "Alternate floating point data formats"
and "cvt", for UE4M3, UE8M0, rounding and saturation.

=======  ====  ============================  =========================  ==============================================
format   bits  exponent, mantissa, bias      largest finite             codes that are no number
=======  ====  ============================  =========================  ==============================================
e2m1     4     2, 1, 1                       6                          none
e2m3     6     2, 3, 1                       7.5                        none
e3m2     6     3, 2, 3                       28                         none
e4m3     8     4, 3, 7                       448                        NaN 0x7F, 0xFF
e5m2     8     5, 2, 15                      57344                      Inf 0x7C, 0xFC; NaN 0x7D-0x7F, 0xFD-0xFF
ue4m3    8     4, 3, 7, no sign              448                        NaN 0x7F; bit 7 is ignored
ue8m0    8     8, 0, 127, no sign, no zero   2^127                      NaN 0xFF
=======  ====  ============================  =========================  ==============================================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Format:
    """A floating-point format of at most 8 bits; a code lies in the low bits of a uint8.

    Attributes:
        bits, exponent_bits, mantissa_bits, bias: the fields, sign excluded where ``signed`` is false.
        max_finite: the largest finite magnitude.
        nan_codes, inf_codes: codes that are no finite number.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_finite: float
    signed: bool = True
    has_zero: bool = True
    nan_codes: tuple[int, ...] = ()
    inf_codes: tuple[int, ...] = ()

    @cached_property
    def values(self) -> np.ndarray:
        """float32 value of each of the 2^bits codes."""
        codes = np.arange(1 << self.bits)
        sign = np.where((codes >> (self.bits - 1)) & self.signed, -1.0, 1.0)
        mantissa = codes & ((1 << self.mantissa_bits) - 1)
        exponent = (codes >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        normal = (exponent > 0) | (not self.has_zero)
        fraction = mantissa / (1 << self.mantissa_bits) + normal
        values = sign * fraction * np.exp2(np.where(normal, exponent, 1) - float(self.bias))
        values[list(self.nan_codes)] = np.nan
        for code in self.inf_codes:
            values[code] = np.copysign(np.inf, sign[code])
        values = values.astype(np.float32)
        values.setflags(write=False)
        return values

    @cached_property
    def max_code(self) -> int:
        """Code of ``max_finite``."""
        return int(np.flatnonzero(self.values == np.float32(self.max_finite))[0])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Values (float32) of uint8 codes of any shape; bits above the format's are ignored, as the hardware does.

        Raises ``TypeError`` for another dtype than uint8.
        """
        codes = np.asarray(codes)
        if codes.dtype != np.uint8:
            raise TypeError(f"codes must be of dtype uint8, got {codes.dtype}")
        return self.values[codes & np.uint8((1 << self.bits) - 1)]

    def encode(self, values: np.ndarray, *, rounding: str = "rn") -> np.ndarray:
        """Codes (uint8) of float16, float32 or float64 values, saturating at ``max_finite``; rounded once.

        ``rounding`` is ``"rn"`` (nearest, ties to the even code) for all but UE8M0, which takes ``"rz"`` (toward zero) or
        ``"rp"`` (up), as PTX ``cvt`` does. NaN becomes the format's NaN, or +``max_finite`` where it has none. Zeros and
        what rounds to zero keep their sign. UE8M0 has neither zero nor sign: magnitudes are encoded, 0 as 2^-127.

        Raises ``TypeError`` for another dtype and ``ValueError`` for another rounding or a negative value for UE4M3.
        """
        values = np.asarray(values)
        if values.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(f"values must be of dtype float16, float32 or float64, got {values.dtype}")
        allowed = ("rn",) if self.has_zero else ("rz", "rp")
        if rounding not in allowed:
            raise ValueError(f"rounding must be one of {', '.join(allowed)} for {self.name}, got {rounding!r}")
        if self.has_zero and not self.signed and bool(np.any(values < 0)):
            raise ValueError(f"values must not be negative for {self.name}, got {np.nanmin(values)}")
        with np.errstate(invalid="ignore"):  # widening a signalling NaN is no error here
            magnitude = np.abs(values).astype(np.float64)
        if self.has_zero:
            # exact comparisons, hence a single rounding: midpoints and widened values are numbers of float64
            codes = np.searchsorted(self._thresholds, magnitude, side="right").astype(np.uint8)
        else:
            side = "right" if rounding == "rz" else "left"
            codes = np.searchsorted(self.values[:255].astype(np.float64), magnitude, side=side) - (rounding == "rz")
            codes = np.clip(codes, 0, self.max_code).astype(np.uint8)
        if self.signed:
            codes |= np.signbit(values).astype(np.uint8) << np.uint8(self.bits - 1)
        return np.where(np.isnan(values), np.uint8(self.nan_codes[0] if self.nan_codes else self.max_code), codes)

    @cached_property
    def _thresholds(self) -> np.ndarray:
        """Midpoints between neighbouring magnitudes, moved up one float64 step where a tie goes to the lower code."""
        magnitudes = self.values[: self.max_code + 1].astype(np.float64)
        midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
        lower_is_even = np.arange(self.max_code) % 2 == 0
        return np.where(lower_is_even, np.nextafter(midpoints, np.inf), midpoints)


E2M1 = Format("e2m1", 4, 2, 1, 1, 6.0)
E2M3 = Format("e2m3", 6, 2, 3, 1, 7.5)
E3M2 = Format("e3m2", 6, 3, 2, 3, 28.0)
E4M3 = Format("e4m3", 8, 4, 3, 7, 448.0, nan_codes=(0x7F, 0xFF))
E5M2 = Format("e5m2", 8, 5, 2, 15, 57344.0, nan_codes=(0x7F, 0x7D, 0x7E, 0xFD, 0xFE, 0xFF), inf_codes=(0x7C, 0xFC))
# bit 7 is no part of the number: seven bits, so that decoding masks it
UE4M3 = Format("ue4m3", 7, 4, 3, 7, 448.0, signed=False, nan_codes=(0x7F,))
UE8M0 = Format("ue8m0", 8, 8, 0, 127, 2.0**127, signed=False, has_zero=False, nan_codes=(0xFF,))

#: Every format by its PTX name.
FORMATS = {format.name: format for format in (E2M1, E2M3, E3M2, E4M3, E5M2, UE4M3, UE8M0)}


def pack_nibbles(codes: np.ndarray, axis: int = -1) -> np.ndarray:
    """Two 4-bit codes a byte along ``axis``, the even index in the low nibble; an odd length is padded with code 0."""
    codes = np.moveaxis(np.asarray(codes, np.uint8), axis, -1)
    packed = np.zeros((*codes.shape[:-1], (codes.shape[-1] + 1) // 2), np.uint8)
    packed |= codes[..., 0::2] & np.uint8(0xF)
    packed[..., : codes.shape[-1] // 2] |= codes[..., 1::2] << np.uint8(4)
    return np.moveaxis(packed, -1, axis)


def unpack_nibbles(packed: np.ndarray, length: int | None = None, axis: int = -1) -> np.ndarray:
    """The codes of :func:`pack_nibbles`, the first ``length`` of them along ``axis`` (all if ``None``)."""
    packed = np.moveaxis(np.asarray(packed, np.uint8), axis, -1)
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2] = packed & np.uint8(0xF)
    codes[..., 1::2] = packed >> np.uint8(4)
    return np.moveaxis(codes[..., :length], -1, axis)
