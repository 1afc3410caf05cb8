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


@njit(fastmath=_FAST, inline="always")
def _q4_k(raw, halves, half, row, at, x, c, sums):
    d, dmin = half[halves[row, at >> u64(1)]], half[halves[row, (at >> u64(1)) + u64(1)]]
    packed, numbers = at + u64(4), at + u64(16)
    for j in range(u64(4)):  # two sub-blocks of 32: the low halves of 32 bytes, and the high ones
        p = packed + (j & u64(1)) * u64(2)
        if j < u64(2):
            s0, s1 = raw[row, p] & 63, raw[row, p + u64(1)] & 63
            m0, m1 = raw[row, p + u64(4)] & 63, raw[row, p + u64(5)] & 63
        else:
            q0, q1 = raw[row, p + u64(8)], raw[row, p + u64(9)]
            s0, s1 = q0 & 15 | raw[row, p] >> 6 << 4, q1 & 15 | raw[row, p + u64(1)] >> 6 << 4
            m0, m1 = q0 >> 4 | raw[row, p + u64(4)] >> 6 << 4, q1 >> 4 | raw[row, p + u64(5)] >> 6 << 4
        d0, d1, n0, n1 = d * f32(i32(s0)), d * f32(i32(s1)), dmin * f32(i32(m0)), dmin * f32(i32(m1))
        for i in range(u64(32)):
            q = raw[row, numbers + j * u64(32) + i]
            low, high = f32(i32(q & 15)) * d0 - n0, f32(i32(q >> 4)) * d1 - n1
            sums[i] += low * x[c + j * u64(64) + i] + high * x[c + j * u64(64) + u64(32) + i]


@njit(fastmath=_FAST, inline="always")
def _q6_k(raw, halves, half, row, at, x, c, sums):
    d = half[halves[row, (at >> u64(1)) + u64(104)]]
    for n in range(u64(4)):  # for each half of 128 weights, two runs of 16 bytes
        run, k = n >> u64(1), (n & u64(1)) * u64(16)
        low, high = at + run * u64(64) + k, at + u64(128) + run * u64(32) + k
        scale = at + u64(192) + run * u64(8) + (n & u64(1))
        d0 = d * f32(i32(np.int8(raw[row, scale])))
        d1 = d * f32(i32(np.int8(raw[row, scale + u64(2)])))
        d2 = d * f32(i32(np.int8(raw[row, scale + u64(4)])))
        d3 = d * f32(i32(np.int8(raw[row, scale + u64(6)])))
        column = c + run * u64(128) + k
        for i in range(u64(16)):
            a, b, h = raw[row, low + i], raw[row, low + u64(32) + i], raw[row, high + i]
            w0 = f32(i32(a & 15 | (h & 3) << 4) - i32(32)) * d0
            w1 = f32(i32(b & 15 | (h >> 2 & 3) << 4) - i32(32)) * d1
            w2 = f32(i32(a >> 4 | (h >> 4 & 3) << 4) - i32(32)) * d2
            w3 = f32(i32(b >> 4 | h >> 6 << 4) - i32(32)) * d3
            sums[i] += w0 * x[column + i] + w1 * x[column + u64(32) + i]
            sums[i] += w2 * x[column + u64(64) + i] + w3 * x[column + u64(96) + i]


def _over_blocks(add_block: Callable, type: str) -> Callable:
    """The product for a type, of what one of its blocks adds."""
    size, num_bytes = (u64(n) for n in BLOCKS[type])

    @njit(fastmath=_FAST, nogil=True)
    def product(raw, halves, half, x, y):
        num_rows, num_blocks = u64(raw.shape[0]), u64(raw.shape[1]) // num_bytes
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
                        add_block(raw, halves, half, rows[j], b * num_bytes, inputs, b * size, sums[j])
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


_ADD_BLOCK = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}
PRODUCTS = {"int8": _int8} | {type: _over_blocks(add, type) for type, add in _ADD_BLOCK.items()}
