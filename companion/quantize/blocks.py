"""The block formats of GGUF: weights as small integers, with scales shared by 32 or 256 of them.

The legacy types cut a row into blocks of 32 weights with a float16 scale d each: w = d·q, or w = d·q + m with
a minimum m. The K types cut it into super-blocks of 256, whose sub-blocks of 16 or 32 have scales s (and
minima m) that are small integers themselves: w = d·s·q, or w = d·s·q − dmin·m, with d and dmin in float16.
The layouts are those of ggml (ggml-org/llama.cpp; the K types by Kawrakow, pull request 1684, 2023). All
numbers are little-endian; small integers share a byte as `_unpack` says.

Decoding gives the bits that ggml's own decoder gives. Encoding does so for Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0;
for Q4_K and Q6_K the format leaves open how scales are found, and here a search finds them that makes the
squared error small.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from companion._checks import check_choice, check_floating

BLOCKS: dict[str, tuple[int, int]] = {}  # type → (weights in a block, bytes of a block)
_LAYOUTS: dict[str, np.dtype] = {}
_DECODERS: dict[str, Callable] = {}
_ENCODERS: dict[str, Callable] = {}
_CHUNK = 1 << 16  # weights worked on at a time, few enough for the cache
_HALF = "(1,)<f2"  # a float16 for each block, as a column


def dequantise(raw: np.ndarray, type: str, shape: Sequence[int]) -> Tensor:
    """The weights that the bytes of a GGUF tensor stand for.

    Args:
        raw: the tensor's bytes, uint8, in an array of any shape; a read-only memory map will do.
        type: a name in `BLOCKS`, such as "Q4_K".
        shape: the shape of the result, in the order of torch; a row is a whole number of blocks.

    Returns: float32 tensor of that shape, which shares no memory with raw.

    Raises:
        ValueError: an unknown type, a row that is no whole number of blocks, or a number of bytes that is
            not the one that type and shape need.
        TypeError: raw is not an array of uint8, or shape no sequence of integers.
    """
    if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8:
        found = getattr(raw, "dtype", raw.__class__.__name__)
        raise TypeError(f"raw must be a numpy array of uint8, got {found}")
    shape = _check_shape(type, shape)
    size, num_bytes = BLOCKS[type]
    needed = math.prod(shape) // size * num_bytes
    if raw.size != needed:
        raise ValueError(f"raw must have {needed} bytes for {type} of shape {shape}, got {raw.size}")
    blocks = raw.reshape(-1).view(_LAYOUTS[type])
    weights, step = np.empty((len(blocks), size), np.float32), _CHUNK // size
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite or NaN
        for start in range(0, len(blocks), step):
            weights[start : start + step] = _DECODERS[type](blocks[start : start + step])
    return torch.from_numpy(weights.reshape(shape))


def quantise(tensor: Tensor, type: str, importance: Tensor | None = None) -> np.ndarray:
    """The bytes that stand for the weights, each block by itself.

    Q4_0, Q5_0 and Q8_0 put the largest magnitude of a block on the end of the range, Q4_1 and Q5_1 the
    smallest and the largest weight on its two ends. Q4_K and Q6_K search the scales (and minima) of least
    squared error, round them to their 6 or 8 bits and then round the weights; ggml's own search weighs the
    errors by functions of w as well, so its bytes differ.

    Args:
        tensor: finite weights, floating; any dtype is taken to float32 first.
        type: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K or Q6_K.
        importance: for Q4_K and Q6_K, how much the squared error of each column counts, at least 0, shape
            (n); llama.cpp's importance matrix has the mean square of the input that the column multiplies.

    Shape: (..., n) → uint8 (..., bytes of a row), n a multiple of the type's block size.

    Raises:
        ValueError: another type, rows that are no whole number of blocks, or weights that are not finite or
            so large that a scale overflows float16.
    """
    check_floating("tensor", tensor)
    check_choice("type", type, _ENCODERS)
    shape = _check_shape(type, tensor.shape)
    if not tensor.isfinite().all():
        raise ValueError("tensor must be finite, got infinities or NaN")
    size, num_bytes = BLOCKS[type]
    inputs = [tensor.detach().to("cpu", torch.float32)]
    if importance is not None:
        inputs += [_check_importance(importance, type, shape).expand(shape)]
    inputs = [x.reshape(-1, size).numpy() for x in inputs]
    blocks, step = np.zeros(len(inputs[0]), _LAYOUTS[type]), _CHUNK // size
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # blocks of zeros have no scale
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            _ENCODERS[type](*(x[part] for x in inputs), block=blocks[part])
    for name in {"w", "d", "m", "dmin"} & set(blocks.dtype.names):
        numbers = _bf16(blocks) if type == "BF16" else blocks[name]
        if not np.isfinite(numbers).all():
            raise ValueError(f"tensor must fit {type}, got magnitudes up to {tensor.abs().max().item():.4g}")
    return blocks.view(np.uint8).reshape(*shape[:-1], math.prod(shape[-1:]) // size * num_bytes)


def _check_shape(type: str, shape: Sequence[int]) -> tuple[int, ...]:
    check_choice("type", type, BLOCKS)
    if not isinstance(shape, Sequence) or not all(isinstance(n, int) for n in shape):
        raise TypeError(f"shape must be a sequence of integers, got {shape!r}")
    shape, size = tuple(shape), BLOCKS[type][0]
    if min(shape, default=0) < 0:
        raise ValueError(f"shape must have no negative size, got {shape}")
    if math.prod(shape[-1:]) % size:
        raise ValueError(f"shape must end in a multiple of {size} for {type}, got {shape}")
    return shape


def _check_importance(importance: Tensor, type: str, shape: tuple[int, ...]) -> Tensor:
    check_floating("importance", importance)
    if type not in ("Q4_K", "Q6_K"):
        raise ValueError(f"importance must be None for {type}, whose scales are not searched")
    if importance.shape != shape[-1:]:
        raise ValueError(f"importance must have shape {shape[-1:]}, got {tuple(importance.shape)}")
    if not ((importance >= 0) & importance.isfinite()).all():
        raise ValueError("importance must be finite and at least 0")
    return importance.detach().to("cpu", torch.float32)


def _layout(type: str, size: int, **fields: str) -> Callable:
    """Register a decoder: the fields of a block of `size` weights, in the order in which they lie."""

    def register(decode: Callable) -> Callable:
        _LAYOUTS[type] = np.dtype(list(fields.items()))
        BLOCKS[type] = size, _LAYOUTS[type].itemsize
        _DECODERS[type] = decode
        return decode

    return register


def _unpack(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Integers of 1, 2 or 4 bits, `run` bytes at a time: first the lowest bits of those bytes, then the next.

    With run = 16 and bits = 4, byte i holds number i in its low half and number 16 + i in its high half.

    Shape: uint8 (n, bytes) → uint8 (n, bytes · 8 / bits).
    """
    groups = packed.reshape(len(packed), -1, run)
    numbers = np.empty((len(packed), groups.shape[1], 8 // bits, run), np.uint8)
    for i in range(8 // bits):
        np.right_shift(groups, bits * i, out=numbers[:, :, i])
    numbers &= (1 << bits) - 1
    return numbers.reshape(len(packed), -1)


def _pack(numbers: np.ndarray, bits: int, run: int) -> np.ndarray:
    """The inverse of `_unpack`, from the lowest `bits` of each number. Shape: (n, numbers) → (n, bytes)."""
    groups = numbers.reshape(len(numbers), -1, 8 // bits, run) & (1 << bits) - 1
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(groups << shifts, axis=2).reshape(len(numbers), -1)


def _affine(q: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    """q · scale + offset, each column of scale and offset (n, groups) for its share of q (n, weights)."""
    weights = q.astype(np.float32).reshape(*scale.shape, -1)
    weights *= scale.astype(np.float32)[..., None]
    if offset is not None:
        weights += offset.astype(np.float32)[..., None]
    return weights.reshape(q.shape)


@_layout("F32", 1, w="(1,)<f4")
def _f32(block):
    return block["w"]


@_layout("F16", 1, w=_HALF)
def _f16(block):
    return torch.from_numpy(block["w"].copy()).float().numpy()  # faster than numpy's conversion


@_layout("BF16", 1, w="(1,)<u2")
def _bf16(block):
    """The upper half of a float32."""
    return (block["w"].astype(np.uint32) << 16).view(np.float32)


@_layout("Q4_0", 32, d=_HALF, q="16u1")
def _q4_0(block):
    """w = d·(q − 8), q of 4 bits."""
    q = _unpack(block["q"], bits=4, run=16).view(np.int8) - np.int8(8)
    return _affine(q, block["d"])


@_layout("Q4_1", 32, d=_HALF, m=_HALF, q="16u1")
def _q4_1(block):
    """w = d·q + m, q of 4 bits."""
    return _affine(_unpack(block["q"], bits=4, run=16), block["d"], block["m"])


@_layout("Q5_0", 32, d=_HALF, high="4u1", low="16u1")
def _q5_0(block):
    """w = d·(q − 16), q of 5 bits: four as in Q4_0, the fifth in a row of bits."""
    q = _unpack(block["low"], bits=4, run=16) | _unpack(block["high"], bits=1, run=1) << 4
    return _affine(q.view(np.int8) - np.int8(16), block["d"])


@_layout("Q5_1", 32, d=_HALF, m=_HALF, high="4u1", low="16u1")
def _q5_1(block):
    """w = d·q + m, q of 5 bits as in Q5_0."""
    q = _unpack(block["low"], bits=4, run=16) | _unpack(block["high"], bits=1, run=1) << 4
    return _affine(q, block["d"], block["m"])


@_layout("Q8_0", 32, d=_HALF, q="32i1")
def _q8_0(block):
    """w = d·q, q a signed byte."""
    return _affine(block["q"], block["d"])


@_layout("Q2_K", 256, scales="16u1", q="64u1", d=_HALF, dmin=_HALF)
def _q2_k(block):
    """16 sub-blocks of 16: w = d·s·q − dmin·m, q of 2 bits, s and m the low and high half of a byte."""
    scale = block["d"].astype(np.float32) * (block["scales"] & 15)
    minimum = block["dmin"].astype(np.float32) * (block["scales"] >> 4)
    return _affine(_unpack(block["q"], bits=2, run=32), scale, -minimum)


@_layout("Q3_K", 256, high="32u1", low="64u1", scales_low="8u1", scales_high="4u1", d=_HALF)
def _q3_k(block):
    """16 sub-blocks of 16: w = d·(s − 32)·(q − 4), q of 2 + 1 bits, s of 4 + 2 bits."""
    s = _unpack(block["scales_low"], bits=4, run=8) | _unpack(block["scales_high"], bits=2, run=4) << 4
    q = _unpack(block["low"], bits=2, run=32) | _unpack(block["high"], bits=1, run=32) << 2
    scale = block["d"].astype(np.float32) * (s.view(np.int8) - np.int8(32))
    return _affine(q.view(np.int8) - np.int8(4), scale)


def _scales_and_minima(block) -> tuple[np.ndarray, np.ndarray]:
    """d·s and dmin·m of the 8 sub-blocks of Q4_K and Q5_K, s and m of 6 bits in 12 bytes.

    The low 6 bits of bytes 0–3 are s of the first four, those of bytes 4–7 their m. Of the last four, bytes
    8–11 hold the low 4 bits of s and of m, and the 2 bits left over in bytes 0–3 and 4–7 the high ones.
    """
    first, second, last = block["scales"].reshape(-1, 3, 4).swapaxes(0, 1)
    s = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    m = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    return block["d"].astype(np.float32) * s, block["dmin"].astype(np.float32) * m


@_layout("Q4_K", 256, d=_HALF, dmin=_HALF, scales="12u1", q="128u1")
def _q4_k(block):
    """8 sub-blocks of 32: w = d·s·q − dmin·m, q of 4 bits."""
    scale, minimum = _scales_and_minima(block)
    return _affine(_unpack(block["q"], bits=4, run=32), scale, -minimum)


@_layout("Q5_K", 256, d=_HALF, dmin=_HALF, scales="12u1", high="32u1", low="128u1")
def _q5_k(block):
    """8 sub-blocks of 32: w = d·s·q − dmin·m, q of 4 + 1 bits."""
    scale, minimum = _scales_and_minima(block)
    q = _unpack(block["low"], bits=4, run=32) | _unpack(block["high"], bits=1, run=32) << 4
    return _affine(q, scale, -minimum)


@_layout("Q6_K", 256, low="128u1", high="64u1", scales="16i1", d=_HALF)
def _q6_k(block):
    """16 sub-blocks of 16: w = d·s·(q − 32), q of 4 + 2 bits, s a signed byte."""
    q = _unpack(block["low"], bits=4, run=64) | _unpack(block["high"], bits=2, run=32) << 4
    return _affine(q.view(np.int8) - np.int8(32), block["d"].astype(np.float32) * block["scales"])


def _encodes(type: str) -> Callable:
    """Register an encoder: from float32 (n, size) it fills the fields of n blocks."""

    def register(encode: Callable) -> Callable:
        _ENCODERS[type] = encode
        return encode

    return register


def _inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 where that is no number: there every weight is 0, or too small for float16."""
    inverse = 1 / x
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _from_zero(x: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """d and q in 0 … 2·half − 1 of x ≈ d·(q − half): the largest magnitude, of either sign, becomes q = 0."""
    largest = np.take_along_axis(x, abs(x).argmax(1, keepdims=True), 1)
    d = largest / np.float32(-half)
    q = (x * _inverse(d) + np.float32(half + 0.5)).astype(np.uint8)
    return d, np.minimum(q, 2 * half - 1)


def _from_minimum(x: np.ndarray, highest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d, m and q in 0 … highest of x ≈ d·q + m: the minimum becomes 0, the maximum the highest."""
    m = x.min(1, keepdims=True)
    d = (x.max(1, keepdims=True) - m) / np.float32(highest)
    q = ((x - m) * _inverse(d) + np.float32(0.5)).astype(np.uint8)
    return d, m, np.minimum(q, highest)


@_encodes("F32")
@_encodes("F16")
def _encode_float(x, block):
    block["w"] = x


@_encodes("BF16")
def _encode_bf16(x, block):
    block["w"] = torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()


@_encodes("Q4_0")
def _encode_q4_0(x, block):
    block["d"], q = _from_zero(x, 8)
    block["q"] = _pack(q, bits=4, run=16)


@_encodes("Q4_1")
def _encode_q4_1(x, block):
    block["d"], block["m"], q = _from_minimum(x, 15)
    block["q"] = _pack(q, bits=4, run=16)


@_encodes("Q5_0")
def _encode_q5_0(x, block):
    block["d"], q = _from_zero(x, 16)
    block["low"], block["high"] = _pack(q, bits=4, run=16), _pack(q >> 4, bits=1, run=1)


@_encodes("Q5_1")
def _encode_q5_1(x, block):
    block["d"], block["m"], q = _from_minimum(x, 31)
    block["low"], block["high"] = _pack(q, bits=4, run=16), _pack(q >> 4, bits=1, run=1)


@_encodes("Q8_0")
def _encode_q8_0(x, block):
    block["d"] = d = abs(x).max(1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    whole = np.trunc(scaled)
    block["q"] = whole + np.trunc(2 * (scaled - whole))  # halves away from zero


@_encodes("Q4_K")
def _encode_q4_k(x, importance=None, *, block):
    x = x.reshape(-1, 8, 32)
    scale, minimum = _search_affine(x, 15, _mean_over(x, importance))
    block["d"], s = _six_bits(scale)
    block["dmin"], m = _six_bits(minimum)
    block["scales"] = np.concatenate(
        [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | m[:, 4:] << 4], axis=1
    )
    scale, minimum = (parts[..., None] for parts in _scales_and_minima(block))
    q = np.rint((x + minimum) * _inverse(scale)).clip(0, 15).astype(np.uint8)
    block["q"] = _pack(q.reshape(-1, 256), bits=4, run=32)


@_encodes("Q6_K")
def _encode_q6_k(x, importance=None, *, block):
    x = x.reshape(-1, 16, 16)
    scale = _search_symmetric(x, 32, _mean_over(x, importance))
    largest = np.take_along_axis(scale, abs(scale).argmax(1, keepdims=True), 1)
    block["d"] = largest / np.float32(-128)
    d = block["d"].astype(np.float32)
    block["scales"] = np.rint(scale * _inverse(d)).clip(-128, 127)
    scale = (d * block["scales"])[..., None]
    q = (np.rint(x * _inverse(scale)).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 256)
    block["low"], block["high"] = _pack(q, bits=4, run=64), _pack(q >> 4, bits=2, run=32)


def _six_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d (n, 1) in float16 and integers of 6 bits (n, 8) of x ≈ d·integer, for x of at least 0."""
    d = (x.max(1, keepdims=True) / np.float32(63)).astype(np.float16)
    return d, np.rint(x * _inverse(d.astype(np.float32))).clip(0, 63).astype(np.uint8)


def _mean_over(x: np.ndarray, importance: np.ndarray | None) -> Callable[..., np.ndarray]:
    """`mean(a, b, …)` of a product over a sub-block, weighted by importance: (..., n) → (...)."""
    if importance is None:
        share = np.float32(1 / x.shape[-1])
        return lambda *factors: share * np.einsum(",".join(["...i"] * len(factors)) + "->...", *factors)
    counts = importance.reshape(x.shape)
    total = counts.sum(-1, keepdims=True)
    shares = np.where(total > 0, counts * _inverse(total), np.float32(1 / x.shape[-1]))
    return lambda *factors: np.einsum(",".join(["...i"] * (len(factors) + 1)) + "->...", shares, *factors)


def _search_affine(x: np.ndarray, highest: int, mean: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum, both at least 0, of small squared error in x ≈ scale·q − minimum, q in 0 … highest.

    Each step cuts the span of x into a few more or fewer parts than `highest`, which fixes every q; scale and
    minimum then follow by least squares, and the best of all steps is kept.

    Shape: (..., n) → (...), (...).
    """
    low = np.minimum(x.min(-1), 0)
    best_scale, best_minimum = np.zeros_like(low), np.zeros_like(low)
    best_error = np.full_like(low, np.inf)
    above, per_part, mean_x = x - low[..., None], _inverse(x.max(-1) - low), mean(x)
    q, rest = np.empty_like(x), np.empty_like(x)
    for parts in np.linspace(highest - 1, highest + 1, 21, dtype=np.float32):
        np.multiply(above, (per_part * parts)[..., None], out=q)
        np.minimum(np.rint(q, out=q), np.float32(highest), out=q)
        qq, qx, mean_q = mean(q, q), mean(q, x), mean(q)
        scale = (qx - mean_q * mean_x) * _inverse(qq - mean_q * mean_q)
        minimum = scale * mean_q - mean_x
        at_zero = minimum < 0  # the format has no positive offset: then a line through the origin
        scale = np.where(at_zero, qx * _inverse(qq), scale).clip(0)
        minimum = np.where(at_zero, np.float32(0), minimum)
        np.multiply(q, scale[..., None], out=rest)
        rest -= minimum[..., None]
        rest -= x
        error = mean(rest, rest)
        better = ~(error > best_error)  # also where it overflows: quantise refuses such scales
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_minimum = np.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _search_symmetric(x: np.ndarray, half: int, mean: Callable) -> np.ndarray:
    """The scale of small squared error in x ≈ scale·q, q in −half … half − 1, by the same search.

    Shape: (..., n) → (...).
    """
    largest = np.take_along_axis(x, abs(x).argmax(-1)[..., None], -1)
    best_scale, best_error = np.zeros_like(x[..., 0]), np.full_like(x[..., 0], np.inf)
    per_part, q, rest = -_inverse(largest), np.empty_like(x), np.empty_like(x)
    for parts in np.linspace(half - 1, half + 1, 21, dtype=np.float32):
        np.multiply(x, per_part * parts, out=q)
        np.clip(np.rint(q, out=q), -half, half - 1, out=q)
        scale = mean(q, x) * _inverse(mean(q, q))
        np.multiply(q, scale[..., None], out=rest)
        rest -= x
        error = mean(rest, rest)
        better = ~(error > best_error)
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
    return best_scale
