"""The contract of nbfmha.nvfp4 a second time: block by block, conversions by ml_dtypes, nothing of the package."""

import math

import ml_dtypes
import numpy as np

F32 = np.float32
ONE = F32(1)
BLOCK_SIZE = {"nvfp4": 16, "mxfp4": 32}


def e2m1_value(code) -> np.ndarray:
    return np.asarray(code, np.uint8).view(ml_dtypes.float4_e2m1fn).astype(F32)


def scale_value(byte: int, format: str, g: F32 = ONE) -> F32:
    dtype = ml_dtypes.float8_e4m3fn if format == "nvfp4" else ml_dtypes.float8_e8m0fnu
    return F32(np.array([byte], np.uint8).view(dtype).astype(F32)[0] * g)


def _e4m3_byte(value: F32) -> int:
    return int(np.array([min(value, F32(448))]).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)[0])


def _codes(x: np.ndarray, s: F32) -> list[int]:
    limit = F32(7) * s
    codes = []
    for element in x:
        clamped = min(max(element, -limit), limit)
        ratio = F32(clamped / s)
        magnitude = min(abs(ratio), F32(6))
        code = int(np.array([magnitude]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)[0])
        codes.append(code | (8 if math.copysign(1, element) < 0 else 0))
    return codes


def _squared_error(x: np.ndarray, codes: list[int], s: F32) -> F32:
    squares = []
    for element, code in zip(x, codes, strict=True):
        difference = F32(element - F32(e2m1_value([code])[0] * s))
        squares.append(F32(difference * difference))
    while len(squares) > 1:
        half = len(squares) // 2
        squares = [F32(squares[i] + squares[i + half]) for i in range(half)]
    return squares[0]


def quantize_block(x: np.ndarray, format: str = "nvfp4", scale: str = "amax", g: F32 = ONE) -> tuple[list[int], int]:
    """Codes and scale byte of one float32 block."""
    zeros = [0] * len(x)
    with np.errstate(all="ignore"):
        if not np.isfinite(x).all():
            return zeros, 0x7F if format == "nvfp4" else 0xFF
        amax = np.abs(x).max()
        if amax == 0:
            return zeros, 0
        if format == "mxfp4":
            exponent = math.frexp(float(amax))[1] - 1
            byte = min(max(exponent - 2, -127), 127) + 127
            return _codes(x, scale_value(byte, format)), byte
        best = None
        for divisor in (6,) if scale == "amax" else (6, 5, 4):
            byte = _e4m3_byte(F32(amax / F32(F32(divisor) * g)))
            s = scale_value(byte, format, g)
            codes = zeros if byte == 0 else _codes(x, s)
            error = _squared_error(x, codes, s)
            if best is None or error < best[0]:
                best = error, codes, byte
        return best[1], best[2]


def quantize_rows(x: np.ndarray, format: str = "nvfp4", scale: str = "amax", g: F32 = ONE):
    """Codes (rows, padded length) and scale bytes (rows, blocks) of a float32 matrix with blocks along the last axis."""
    size = BLOCK_SIZE[format]
    blocks = -(-x.shape[1] // size)
    padded = np.zeros((len(x), blocks * size), F32)
    padded[:, : x.shape[1]] = x
    codes, scales = np.zeros(padded.shape, np.uint8), np.zeros((len(x), blocks), np.uint8)
    for row in range(len(x)):
        for block in range(blocks):
            part = slice(block * size, (block + 1) * size)
            codes[row, part], scales[row, block] = quantize_block(padded[row, part], format, scale, g)
    return codes, scales


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Codes of packed bytes, low nibble first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def dequantize_rows(codes: np.ndarray, scales: np.ndarray, format: str = "nvfp4", g: F32 = ONE) -> np.ndarray:
    size = BLOCK_SIZE[format]
    values = np.empty(codes.shape, F32)
    with np.errstate(all="ignore"):
        for row, block in np.ndindex(scales.shape):
            part = slice(block * size, (block + 1) * size)
            values[row, part] = e2m1_value(codes[row, part]) * scale_value(scales[row, block], format, g)
    return values
