"""Numbers of few bits as arrays of float32: tables, and unpacking of bits."""

from __future__ import annotations

import numpy as np


def _float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of a small float without infinities: sign, exponent, mantissa."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


E2M1 = np.array([_float(code, 2, 1, 1) for code in range(16)], np.float32)
E4M3 = np.array([np.nan if code & 127 == 127 else _float(code, 4, 3, 7) for code in range(256)], np.float32)
E8M0 = np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan], np.float32)
# The two numbers in a byte, the first in the low half, as one element: numpy takes those several times faster.
_PAIRS = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=1).view(np.uint64).reshape(-1)


def fp4(data: np.ndarray) -> np.ndarray:
    """[rows, width / 2] uint8 -> [rows, width] float32."""
    return np.take(_PAIRS, data).view(np.float32)


def integers(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Signed integers of 1 to 8 bits, packed without gaps into 32-bit words from the lowest bit up.

    Args:
        words: [rows, words] uint32.
        bits: of each integer; the lowest value is stored as 0.
        count: integers in a row.

    Returns:
        [rows, count] float32.
    """
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        values = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    else:
        raw = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
        values = (raw.reshape(len(words), count, bits) << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    return values.reshape(len(words), -1)[:, :count].astype(np.float32) - np.float32(1 << (bits - 1))
