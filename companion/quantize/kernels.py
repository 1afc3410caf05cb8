"""x Wᵀ straight from the stored bytes, in loops that numba compiles for the processor at hand.

To choose one token, all weights are read once, and reading them is most of the token's time. Stored as int8
or in 4-bit blocks they are a quarter or a sixth of float32's bytes, but PyTorch's operations on a CPU would
write each decoded weight to memory and read it back. The loops here decode a block where it is multiplied, in
the processor's registers. Weights and arithmetic are float32's, the weights bit for bit those of
`companion.quantize.blocks`; only the order of the sums differs.

One stream of bytes does not keep the memory busy, so each loop reads `_STREAMS` rows at once, far from one
another, and the processor fetches ahead in all of them. Everything runs on one thread. How the loops are
written matters as much as what they say, for the compiler must see that they can go by vectors: functions are
inlined, integers have 32 bits, and sums go to an array.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

_STREAMS = 4
_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)  # float16 by its bits
_FAST = {"reassoc", "contract", "nsz"}  # sums in any order; infinities and NaN stay what they are
f32, i32 = np.float32, np.int32


def multiply(raw: np.ndarray, type: str, x: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """x Wᵀ for a matrix W as `companion.quantize.linear.QuantizedMatrix` keeps it.

    Args:
        raw: C-contiguous (rows, bytes of a row), int8 for "int8", uint8 for blocks.
        type: a name in `PRODUCTS`.
        x: float32, C-contiguous (m, columns). The weights are decoded for each of its rows anew, so that many
            rows are better served by decoding once.
        scale: float32 (rows,), with "int8" only.

    Returns: float32 (m, rows).
    """
    y = np.empty((len(x), len(raw)), np.float32)
    if type == "int8":
        _int8(raw, scale, x, y)
    else:
        PRODUCTS[type](raw, raw.view(np.uint16), _HALF, x, y)
    return y


@njit(fastmath=_FAST, inline="always")
def _q4_0(bytes_, halves, half, x, acc):
    d = half[halves[0]]
    m = f32(-8) * d
    low, high = x[:16], x[16:]
    for i in range(16):
        q = bytes_[2 + i]
        acc[i] += (f32(i32(q & 15)) * d + m) * low[i] + (f32(i32(q >> 4)) * d + m) * high[i]


@njit(fastmath=_FAST, inline="always")
def _q4_1(bytes_, halves, half, x, acc):
    d, m = half[halves[0]], half[halves[1]]
    low, high = x[:16], x[16:]
    for i in range(16):
        q = bytes_[4 + i]
        acc[i] += (f32(i32(q & 15)) * d + m) * low[i] + (f32(i32(q >> 4)) * d + m) * high[i]


@njit(fastmath=_FAST, inline="always")
def _q8_0(bytes_, halves, half, x, acc):
    d = half[halves[0]]
    for i in range(32):
        acc[i] += f32(i32(np.int8(bytes_[2 + i]))) * d * x[i]


def _over_blocks(accumulate: Callable, size: int) -> Callable:
    """The product for a type whose blocks hold 32 weights in `size` bytes.

    accumulate(bytes, their pairs as uint16, float16 by its bits, 32 numbers of x, acc) adds the 32 terms of a
    block to the 32 sums of acc.
    """

    @njit(fastmath=_FAST, nogil=True)
    def product(raw, halves, half, x, y):
        rows, blocks = raw.shape[0], raw.shape[1] // size
        apart = (rows + _STREAMS - 1) // _STREAMS
        acc = np.empty((_STREAMS, 32), np.float32)
        for t in range(len(x)):
            for first in range(apart):
                acc[:] = 0
                for b in range(blocks):
                    part = x[t, 32 * b : 32 * b + 32]
                    for j in range(_STREAMS):
                        row = min(first + j * apart, rows - 1)  # the last row again where they do not divide
                        start = size * b
                        accumulate(
                            raw[row, start : start + size],
                            halves[row, start // 2 : (start + size) // 2],
                            half,
                            part,
                            acc[j],
                        )
                for j in range(_STREAMS):
                    y[t, min(first + j * apart, rows - 1)] = acc[j].sum()

    return product


@njit(fastmath=_FAST, nogil=True)
def _int8(raw, scale, x, y):
    rows, columns = raw.shape
    apart, last = (rows + 3) // 4, rows - 1
    for t in range(len(x)):
        inputs = x[t]
        for i in range(apart):
            j, k, m = min(i + apart, last), min(i + 2 * apart, last), min(i + 3 * apart, last)
            w0, w1, w2, w3 = raw[i], raw[j], raw[k], raw[m]
            s0, s1, s2, s3 = f32(0), f32(0), f32(0), f32(0)
            for c in range(columns):
                s0 += f32(i32(w0[c])) * inputs[c]
                s1 += f32(i32(w1[c])) * inputs[c]
                s2 += f32(i32(w2[c])) * inputs[c]
                s3 += f32(i32(w3[c])) * inputs[c]
            y[t, i], y[t, j] = s0 * scale[i], s1 * scale[j]
            y[t, k], y[t, m] = s2 * scale[k], s3 * scale[m]


PRODUCTS = {
    "int8": _int8,
    "Q4_0": _over_blocks(_q4_0, 18),
    "Q4_1": _over_blocks(_q4_1, 20),
    "Q8_0": _over_blocks(_q8_0, 34),
}
