"""4-bit NormalFloat with double quantisation (Dettmers, Pagnoni, Holtzman & Zettlemoyer, 2023: QLoRA).

A block of 64 weights is divided by its largest magnitude and each weight replaced by the nearest of 16
numbers in [−1, 1]: quantiles of the normal distribution, dense where weights are. The float32 scale of each
block costs 0.5 bits a weight. Double quantisation stores it in 8 bits, less the mean of all scales, with one
float32 for 256 of them: 0.127 bits. Values, thresholds and order of the packed integers are those of
bitsandbytes, whose 8-bit type for the scales is the dynamic tree of Dettmers (2016).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from companion._checks import check_floating, check_positive
from companion.quantize.uniform import pack_int4, unpack_int4

# Appendix E of the paper, in full float32 precision as bitsandbytes prints it.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
SCALES_PER_BLOCK = 256


def normal_float(bits: int = 4) -> Tensor:
    """The values of NormalFloat from their definition: quantiles of N(0, 1), scaled to [−1, 1].

    2^(bits−1) probabilities from 1 − δ down to ½ give the positive values, 2^(bits−1) − 1 the negative ones,
    evenly spaced, ½ itself left out; zero is added. δ keeps the outermost quantiles finite: the mean of
    1 / (2·16) and 1 / (2·15) for 4 bits.

    Returns: float64 (2^bits), ascending. For 4 bits these are `NF4_VALUES` up to their rounding.
    """
    check_positive("bits", bits)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie in 2 … 8, got {bits}")
    half = 2 ** (bits - 1)
    outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    positive, negative = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, n + 1, dtype=torch.float64)[:-1])
        for n in (half, half - 1)
    )
    return torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)]) / positive[0]


def dynamic_values() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type: float32, ascending, to the bit those of bitsandbytes.

    Zero, one, and with both signs seven decades of evenly spaced numbers: 1 in (10⁻⁷, 10⁻⁶), 2 in the next,
    … 64 in (0.1, 1).
    """
    borders = [torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32) for i in range(7)]
    decades = [10.0 ** (i - 6) * ((b[:-1] + b[1:]) / 2) for i, b in enumerate(borders)]
    positive = torch.cat(decades)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


@dataclass(frozen=True)
class NF4Tensor:
    """A tensor in NF4.

    Attributes:
        packed: uint8, two weights in a byte, the first in its high half.
        scale: the largest magnitude of each block, float32 (blocks); with double quantisation the index of
            a dynamic value, uint8 (blocks).
        outer_scale: float32 (blocks / 256), rounded up: the factor of those dynamic values; or None.
        offset: float32 (): the mean of the scales, subtracted before they were quantised; or None.
        shape: of the original.
        block: weights that share a scale.
        dtype: of the original.
    """

    packed: Tensor
    scale: Tensor
    outer_scale: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    block: int
    dtype: torch.dtype

    def dequantise(self) -> Tensor:
        """The weights, in the shape and dtype of the original."""
        values = torch.tensor(NF4_VALUES, device=self.packed.device)
        q = unpack_int4(self.packed, signed=False).view(-1, self.block)
        x = values[q.int()] * self.scales().unsqueeze(1)
        return x.flatten()[: self.shape.numel()].view(self.shape).to(self.dtype)

    def scales(self) -> Tensor:
        """The scale of each block as it is used. Shape: float32 (blocks)."""
        if self.outer_scale is None:
            return self.scale
        values = dynamic_values().to(self.scale.device)[self.scale.int()]
        return values * self.outer_scale.repeat_interleave(SCALES_PER_BLOCK)[: len(values)] + self.offset

    @property
    def bits_per_weight(self) -> float:
        """All that is stored, in bits, over the weights of the original."""
        stored = [t for t in (self.packed, self.scale, self.outer_scale, self.offset) if t is not None]
        return 8 * sum(t.numel() * t.element_size() for t in stored) / self.shape.numel()


def quantise(x: Tensor, *, block: int = 64, double: bool = True) -> NF4Tensor:
    """Quantise x to NF4, its weights in the order in which they lie, row after row.

    Args:
        x: finite, floating, not empty; any shape. The last block is filled up with zeros.
        block: an even number of weights with one scale.
        double: whether the scales are quantised too.
    """
    check_floating("x", x)
    check_positive("block", block)
    if block % 2:
        raise ValueError(f"block must be even, got {block}")
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x must be finite, got infinities or NaN")
    flat = x.detach().float().flatten()
    scale, q = _nearest(flat, block, torch.tensor(NF4_VALUES, device=x.device))
    packed = pack_int4(q.flatten())
    if not double:
        return NF4Tensor(packed, scale, None, None, x.shape, block, x.dtype)
    offset = scale.mean()
    outer, q = _nearest(scale - offset, SCALES_PER_BLOCK, dynamic_values().to(x.device))
    return NF4Tensor(packed, q.flatten()[: len(scale)], outer, offset, x.shape, block, x.dtype)


def _nearest(x: Tensor, block: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each block, and the index of the value nearest to each x over it.

    Shape: x (n), values ascending → (blocks), uint8 (blocks, block); the last block filled up with zeros.
    """
    blocks = F.pad(x, (0, -len(x) % block)).view(-1, block)
    scale = blocks.abs().amax(1)
    inverse = 1 / scale
    inverse = torch.where(inverse.isfinite(), inverse, 0)  # a block of zeros
    midpoints = (values[1:] + values[:-1]) / 2
    return scale, torch.bucketize(blocks * inverse.unsqueeze(1), midpoints).to(torch.uint8)
