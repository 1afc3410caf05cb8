"""Absolute positions: the sinusoidal encoding (Vaswani et al., 2017, §3.5) and a learned table."""

import torch
from torch import Tensor, nn

from companion._checks import check_features, check_number, check_positive, check_probability


def sinusoidal_encoding(
    length: int,
    d_model: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """PE(pos, 2i) = sin(pos / base^(2i/d_model)), PE(pos, 2i+1) = cos(the same), i = 0 … d_model/2 − 1.

    i counts pairs of dimensions: each pair is a point on the unit circle that turns with its own
    wavelength, from 2π to base · 2π. Angles are computed in float64 on the CPU and rounded once, so
    that every device gets the same numbers.

    Returns: (length, d_model), one row for each position.
    """
    check_positive("length", length)
    check_positive("d_model", d_model)
    if d_model % 2:
        raise ValueError(f"d_model must be even, got {d_model}: dimensions come in pairs of sine and cosine")
    check_number("base", base)
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    positions = torch.arange(length, dtype=torch.float64)
    frequencies = base ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angles = positions[:, None] * frequencies  # (length, d_model / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(device, dtype)


class SinusoidalPositionalEncoding(nn.Module):
    """Add the sinusoidal encoding to embeddings, then apply dropout. Nothing is learned, any length will do.

    Args:
        d_model: size of the vectors; even.
        dropout: probability of zeroing an entry of the sum in training.

    Shape: (..., n, d_model) → (..., n, d_model). `offset` is the first row's position (with a cache).
    """

    def __init__(self, d_model: int, dropout: float = 0.0):
        super().__init__()
        check_probability("dropout", dropout)
        self.d_model = d_model
        self.dropout = nn.Dropout(dropout)
        self.table = sinusoidal_encoding(256, d_model)  # no buffer: a model cast to float64 gets exact rows

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        check_features("x", x, self.d_model)
        end = _end(x, offset)
        rows = self.table.shape[0]
        if end > rows or self.table.dtype != x.dtype or self.table.device != x.device:
            rows = rows if end <= rows else 2 * end
            self.table = sinusoidal_encoding(rows, self.d_model, dtype=x.dtype, device=x.device)
        return self.dropout(x + self.table[offset:end])


class LearnedPositionalEmbedding(nn.Module):
    """Add a learned vector for each position, then apply dropout (BERT, GPT-2).

    Args:
        max_length: number of positions; a longer input is refused.
        d_model: size of the vectors.
        dropout: probability of zeroing an entry of the sum in training.

    Shape: (..., n, d_model) → (..., n, d_model), offset + n ≤ max_length.
    """

    def __init__(self, max_length: int, d_model: int, dropout: float = 0.0):
        super().__init__()
        check_positive("max_length", max_length)
        check_positive("d_model", d_model)
        check_probability("dropout", dropout)
        self.weight = nn.Parameter(torch.empty(max_length, d_model))
        nn.init.normal_(self.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        check_features("x", x, self.weight.shape[1])
        end = _end(x, offset)
        if end > self.weight.shape[0]:
            raise ValueError(f"x must end at position {self.weight.shape[0]} at most (max_length), got {end}")
        return self.dropout(x + self.weight[offset:end])


def _end(x: Tensor, offset: int) -> int:
    """The position after the last row of x."""
    if x.dim() < 2:
        raise ValueError(f"x must have shape (..., n, d_model), got {tuple(x.shape)}")
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}")
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
    return offset + x.shape[-2]
