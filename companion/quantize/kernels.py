"""x Wᵀ straight from the stored bytes, in loops that numba compiles for the processor at hand.

To choose one token, all weights are read once, and reading them is most of the token's time. Stored as int8
or in 4-bit blocks they are a quarter or a sixth of float32's bytes, but PyTorch's operations on a CPU would
write each decoded weight to memory and read it back. The loops here decode a block where it is multiplied, in
the processor's registers. Weights and arithmetic are float32's, the weights bit for bit those of
`companion.quantize.blocks`; only the order of the sums differs.

One stream of bytes does not keep the memory busy, so each loop reads four rows at once, far from one another,
and the processor fetches ahead in all of them. Everything runs on one thread. How the loops are written
matters as much as what they say, for the compiler must see that they can go by vectors: functions are
inlined, weights become integers of 32 bits, indices are unsigned (a negative one would count from the end),
and nothing is sliced inside.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

from companion._checks import check_choice
from companion.quantize.blocks import BLOCKS

_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)  # float16 by its bits
_FAST = {"reassoc", "contract", "nsz"}  # sums in any order; infinities and NaN stay what they are
f32, i32, u64 = np.float32, np.int32, np.uint64


def multiply(raw: np.ndarray, type: str, x: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """x Wᵀ for a matrix W as `companion.quantize.linear.QuantizedMatrix` keeps it.

    Args:
        raw: C-contiguous (rows, bytes of a row), int8 for "int8", uint8 for blocks.
        type: a name in `PRODUCTS`.
        x: float32, C-contiguous (m, columns). The weights are decoded for each of its rows anew, so that many
            rows are better served by decoding once.
        scale: float32 (rows,), with "int8" only.

    Returns: float32 (m, rows).

    Raises ValueError where these do not fit together: the loops look at no bounds.
    """
    check_choice("type", type, PRODUCTS)
    size, num_bytes = (1, 1) if type == "int8" else BLOCKS[type]
    if raw.dtype != (np.int8 if type == "int8" else np.uint8) or raw.ndim != 2 or raw.shape[1] % num_bytes:
        raise ValueError(f"raw must hold rows of whole blocks of {type}, got {raw.dtype} {raw.shape}")
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != raw.shape[1] // num_bytes * size:
        raise ValueError(f"x must be float32 with the columns of raw {raw.shape}, got {x.dtype} {x.shape}")
    if (scale is not None) != (type == "int8") or (scale is not None and scale.shape != raw.shape[:1]):
        raise ValueError(f"scale must be one number a row for int8 and None for blocks, got {scale!r}")
    y = np.empty((len(x), len(raw)), np.float32)
    if type == "int8":
        _int8(raw, scale, x, y)
    else:
        PRODUCTS[type](raw, raw.view(np.uint16), _HALF, x, y)
    return y


# What a block adds to a row's 32 sums. raw and halves: all bytes, and their pairs; at: the first byte of the
# block; c: its first column.


@njit(fastmath=_FAST, inline="always")
def _add_nibbles(raw, row, at, d, m, x, c, sums):
    for i in range(u64(16)):
        q = raw[row, at + i]
        low, high = f32(i32(q & 15)) * d + m, f32(i32(q >> 4)) * d + m
        sums[i] += low * x[c + i] + high * x[c + u64(16) + i]


@njit(fastmath=_FAST, inline="always")
def _q4_0(raw, halves, half, row, at, x, c, sums):
    d = half[halves[row, at >> u64(1)]]
    _add_nibbles(raw, row, at + u64(2), d, f32(-8) * d, x, c, sums)


@njit(fastmath=_FAST, inline="always")
def _q4_1(raw, halves, half, row, at, x, c, sums):
    d, m = half[halves[row, at >> u64(1)]], half[halves[row, (at >> u64(1)) + u64(1)]]
    _add_nibbles(raw, row, at + u64(4), d, m, x, c, sums)


@njit(fastmath=_FAST, inline="always")
def _q8_0(raw, halves, half, row, at, x, c, sums):
    d = half[halves[row, at >> u64(1)]]
    for i in range(u64(32)):
        sums[i] += f32(i32(np.int8(raw[row, at + u64(2) + i]))) * d * x[c + i]


def _over_blocks(add_block: Callable, size: int) -> Callable:
    """The product for a type whose blocks hold 32 weights in `size` bytes."""

    @njit(fastmath=_FAST, nogil=True)
    def product(raw, halves, half, x, y):
        num_rows, num_blocks = u64(raw.shape[0]), u64(raw.shape[1] // size)
        apart, last = (num_rows + u64(3)) // u64(4), num_rows - u64(1)
        rows, sums = np.empty(4, np.uint64), np.empty((4, 32), np.float32)
        for t in range(len(x)):
            inputs = x[t]
            for first in range(apart):
                sums[:] = 0
                for j in range(u64(4)):
                    rows[j] = min(first + j * apart, last)  # the last again where four do not divide
                for b in range(num_blocks):
                    for j in range(u64(4)):
                        add_block(raw, halves, half, rows[j], b * u64(size), inputs, b * u64(32), sums[j])
                for j in range(u64(4)):
                    y[t, rows[j]] = sums[j].sum()

    return product


@njit(fastmath=_FAST, nogil=True)
def _int8(raw, scale, x, y):
    num_rows, columns = raw.shape
    apart, last = (num_rows + 3) // 4, num_rows - 1
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
