"""Where a token stands: absolute, rotary and relative positions.

Absolute positions are added to the embeddings: the sinusoidal encoding (Vaswani et al., 2017, §3.5) and a
learned table. Rotary positions turn queries and keys (RoPE: Su et al., 2021), with four ways to reach beyond
the length of training. Relative positions are a bias on the scores: ALiBi (Press et al., 2022) and the
learned buckets of T5 (Raffel et al., 2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import (
    INTEGER_DTYPES,
    check_choice,
    check_features,
    check_ids,
    check_number,
    check_positive,
    check_probability,
    check_tensor,
)

# --- Absolute positions -------------------------------------------------------------------------------------


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
    _check_even("d_model", d_model)
    check_number("base", base)
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = positions[:, None] * _frequencies(d_model, base)  # (length, d_model / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(device, dtype)


class SinusoidalPositionalEncoding(nn.Module):
    """Add the sinusoidal encoding to embeddings, then apply dropout. Nothing is learned, any length will do.

    Args:
        d_model: size of the vectors; even.
        dropout: probability of zeroing an entry of the sum in training.

    Shape: (..., n, d_model) → (..., n, d_model). `offset` is the first row's position (with a cache), or the
    positions of all rows, integers (batch, n).
    """

    def __init__(self, d_model: int, dropout: float = 0.0):
        super().__init__()
        check_probability("dropout", dropout)
        self.d_model = d_model
        self.dropout = nn.Dropout(dropout)
        self.table = sinusoidal_encoding(256, d_model)  # no buffer: a model cast to float64 gets exact rows

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        check_features("x", x, self.d_model)
        end = _end(x, offset)
        rows = self.table.shape[0]
        if end > rows or self.table.dtype != x.dtype or self.table.device != x.device:
            rows = rows if end <= rows else 2 * end
            self.table = sinusoidal_encoding(rows, self.d_model, dtype=x.dtype, device=x.device)
        return self.dropout(x + self.table[_index(offset, end)])


class LearnedPositionalEmbedding(nn.Module):
    """Add a learned vector for each position, then apply dropout (BERT, GPT-2).

    Args:
        max_length: number of positions; a longer input is refused.
        d_model: size of the vectors.
        dropout: probability of zeroing an entry of the sum in training.

    Shape: (..., n, d_model) → (..., n, d_model), offset + n ≤ max_length. `offset` is the first row's
    position (with a cache), or the positions of all rows, integers (batch, n) below max_length.
    """

    def __init__(self, max_length: int, d_model: int, dropout: float = 0.0):
        super().__init__()
        check_positive("max_length", max_length)
        check_positive("d_model", d_model)
        check_probability("dropout", dropout)
        self.weight = nn.Parameter(torch.empty(max_length, d_model))
        nn.init.normal_(self.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        check_features("x", x, self.weight.shape[1])
        end = _end(x, offset)
        if end > self.weight.shape[0]:
            raise ValueError(f"x must end at position {self.weight.shape[0]} at most (max_length), got {end}")
        return self.dropout(x + self.weight[_index(offset, end)])


# --- Rotary positions ---------------------------------------------------------------------------------------

TURNS = {"yarn": (1.0, 32.0), "llama3": (1.0, 4.0)}  # the ramp's ends, in turns over the original length


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies θ_i = base^(−2i/d_k) are slowed for texts longer than those of training::

        linear   θ_i / factor: positions squeezed into the old range (Chen et al., 2023).
        ntk      base · factor^(d_k / (d_k − 2)) for the base: the slowest pair is slowed by the factor, the
                 fastest not at all, those between by degrees (bloc97, 2023).
        dynamic  ntk with factor · n / original_length − (factor − 1) for the factor, n the current length;
                 up to the original length nothing changes (transformers' "dynamic").
        yarn     pairs that turn more than 32 times over the original length are kept, those that turn less
                 than once are slowed by the factor, with a ramp between; cos and sin grow by attention_factor
                 (Peng et al., 2023). The paper's ramp is linear in the number of turns; here it is linear in
                 the pair's index, as in the authors' code and in transformers.
        llama3   as yarn, with the ramp from 4 turns to 1 and linear in the number of turns; cos and sin stay
                 as they are (Llama 3.1; Grattafiori et al., 2024).

    Args:
        kind: "linear", "ntk", "dynamic", "yarn" or "llama3".
        factor: how many times longer the texts are to be; at least 1.
        original_length: the length of training in tokens; linear and ntk make no use of it.
        turns: of yarn and llama3, the numbers of turns below which a pair is slowed and above which it is
            kept; (1, 32) and (1, 4) where it is None. transformers calls them beta_slow and beta_fast in
            yarn, low_freq_factor and high_freq_factor in llama3.
    """

    kind: str
    factor: float
    original_length: int
    turns: tuple[float, float] | None = None

    def __post_init__(self):
        check_choice("kind", self.kind, ("linear", "ntk", "dynamic", *TURNS))
        check_number("factor", self.factor)
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be at least 1 and finite, got {self.factor}")
        check_positive("original_length", self.original_length)
        if self.turns is not None:
            if self.kind not in TURNS:
                raise ValueError(f"turns must be None where kind is {self.kind!r}, got {self.turns}")
            if not isinstance(self.turns, tuple) or len(self.turns) != 2:
                raise TypeError(f"turns must be a pair of numbers, got {self.turns!r}")
            for turns in self.turns:
                check_number("turns", turns)
            if not 0 < self.turns[0] < self.turns[1] < math.inf:
                raise ValueError(f"turns must be positive, finite and rising, got {self.turns}")

    @property
    def attention_factor(self) -> float:
        """The factor on cos and sin: 0.1 · ln(factor) + 1 for yarn, else 1. Scores grow by its square."""
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0

    def frequencies(self, d_k: int, base: float = 10000.0, length: int | None = None) -> Tensor:
        """The slowed θ_i in radians a position: (d_k / 2,), float64.

        Args:
            length: the current length in tokens, for "dynamic"; the original one where it is None.
        """
        _check_rotary(d_k, base, self)
        if length is not None:
            check_positive("length", length)
        plain, factor = _frequencies(d_k, base), self.factor
        if self.kind == "linear":
            return plain / factor
        if self.kind in TURNS:
            ramp = self._ramp(d_k, base)
            return plain * (1 - ramp) + plain / factor * ramp
        if self.kind == "dynamic":
            factor = factor * max(length or 0, self.original_length) / self.original_length - (factor - 1)
        return _frequencies(d_k, base * factor ** (d_k / (d_k - 2)))

    def _ramp(self, d_k: int, base: float) -> Tensor:
        """From 0 for pairs that turn often to 1 for pairs that turn seldom: (d_k / 2,)."""
        few, many = self.turns or TURNS[self.kind]
        if self.kind == "llama3":
            turns = self.original_length * _frequencies(d_k, base) / (2 * math.pi)
            return ((many - turns) / (many - few)).clamp(0, 1)

        def pair_that_turns(times: float) -> float:  # the i with original_length · θ_i = 2π · times
            return d_k * math.log(self.original_length / (2 * math.pi * times)) / (2 * math.log(base))

        low = max(math.floor(pair_that_turns(many)), 0)
        high = min(math.ceil(pair_that_turns(few)), d_k - 1)
        pairs = torch.arange(d_k // 2, dtype=torch.float64, device="cpu")
        return ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)


class RotaryEmbedding(nn.Module):
    """Turn each pair of features of the vector at position m by its own angle m · θ_i, θ_i = base^(−2i/d_k).

    (a, b) → (a cos mθ − b sin mθ, b cos mθ + a sin mθ). On queries and keys it makes the score depend on the
    distance of the two positions alone: ⟨R_m q, R_n k⟩ = ⟨R_(m−n) q, k⟩.

    A pair is (x_i, x_(i + d_k/2)) in the layout "half" (GPT-NeoX, Llama in transformers) and (x_2i, x_(2i+1))
    in the layout "interleaved" (the paper, GPT-J, Llama as published); `rotary_permutation` leads from one to
    the other. Angles are computed in float64 and their cosines rounded once; half-precision vectors are
    turned in float32.

    With "dynamic" scaling the frequencies follow from the length of the call, offset + n. Keys that are
    cached keep the frequencies of the call that turned them, in transformers too: beyond the original length
    a text decoded token by token gives other scores than one pass over it.

    Args:
        d_k: size of a head's queries and keys; even.
        base: sets how slow the slowest pair is; above 1.
        layout: "half" or "interleaved".
        scaling: how to reach beyond the length of training; None leaves the frequencies as they are.

    Shape: x (..., n, d_k) → (..., n, d_k). `offset` is the first row's position (with a cache).
    """

    def __init__(
        self,
        d_k: int,
        *,
        base: float = 10000.0,
        layout: str = "half",
        scaling: RopeScaling | None = None,
    ):
        super().__init__()
        _check_rotary(d_k, base, scaling)
        check_choice("layout", layout, ("half", "interleaved"))
        self.d_k, self.base, self.layout, self.scaling = d_k, base, layout, scaling
        self.key = (torch.float32, torch.device("cpu"), 0, None)
        self.table = self._turns(256, *self.key)  # no buffer: a model cast to float64 gets exact turns

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        check_features("x", x, self.d_k)
        end = _end(x, offset, "d_k")
        return self._turned(x, self._rows(offset, end, _at_least_single(x.dtype), x.device))

    def at(
        self,
        positions: Tensor | range,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Callable[[Tensor, int], Tensor]:
        """The same for positions known beforehand: a function of x (batch, h, n, d_k) and of an offset that
        it ignores, which `MultiHeadAttention` takes as its `rotary`. All layers of a model can share it.

        Args:
            positions: a range of n positions in steps of 1, or integers (batch, n), with left padding for
                instance.
            dtype: of the x to come.
            device: of the x to come where positions are a range.
        """
        if isinstance(positions, range):
            if not positions or positions.start < 0 or positions.step != 1:
                raise ValueError(f"positions must count up from 0 or later by 1, got {positions}")
            turns = self._rows(positions.start, positions.stop, _at_least_single(dtype), torch.device(device))
        else:
            rows = self._rows(0, _last("positions", positions) + 1, _at_least_single(dtype), positions.device)
            turns = rows[..., positions.long(), :].unsqueeze(-3)  # (…, batch, 1, n, ·)
        if self.layout == "half":
            turns = turns.unbind()
        return lambda x, offset=0: self._turned(x, turns)

    def _turned(self, x: Tensor, turns: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        vectors = x.to(_at_least_single(x.dtype))
        if self.layout == "interleaved":  # a pair is a complex number; to turn it is to multiply by e^(i mθ)
            return torch.view_as_real(_as_complex(vectors) * turns).flatten(-2).to(x.dtype)
        cos, sin = turns
        return torch.addcmul(vectors * cos, vectors.roll(self.d_k // 2, -1), sin).to(x.dtype)

    def _rows(self, offset: int, end: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The turns of positions offset … end − 1, from a table that is kept and grows when it must."""
        scaling = self.scaling
        stretched = scaling is not None and scaling.kind == "dynamic" and end > scaling.original_length
        first, length = (offset, end) if stretched else (0, None)
        key, rows = (dtype, device, first, length), self.table.shape[-2]
        if key != self.key or end - first > rows:
            rows = end - first if stretched else _room_for(end)
            with torch.inference_mode(False):  # a table made in inference mode could not serve in training
                self.table = self._turns(rows, *key)
            self.key = key
        return self.table[..., offset - first : end - first, :]

    def _turns(
        self, rows: int, dtype: torch.dtype, device: torch.device, first: int, length: int | None
    ) -> Tensor:
        """half: cos and signed sin, (2, rows, d_k); interleaved: cos + i sin, (rows, d_k / 2) complex."""
        frequencies, factor = _frequencies(self.d_k, self.base), 1.0
        if self.scaling is not None:
            frequencies = self.scaling.frequencies(self.d_k, self.base, length)
            factor = self.scaling.attention_factor
        positions = torch.arange(first, first + rows, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * frequencies
        cos, sin = factor * angles.cos(), factor * angles.sin()
        if self.layout == "interleaved":
            return torch.view_as_complex(torch.stack((cos, sin), -1).to(device, dtype))
        return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(device, dtype)


def rotary_permutation(d_k: int) -> Tensor:
    """The index with which interleaved features become half-split ones: 0, 2, 4, …, 1, 3, 5, …

    With p = rotary_permutation(d_k), interleaved RoPE of x is half-split RoPE of x[..., p], permuted back by
    p.argsort(). Permute the rows of each head's query and key projections by p, and a model trained in the
    interleaved layout runs in the half-split one: the scores do not change.

    Returns: (d_k,), int64.
    """
    _check_even("d_k", d_k)
    return torch.arange(d_k).view(-1, 2).T.flatten()


# --- Relative positions -------------------------------------------------------------------------------------


def alibi_slopes(
    num_heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The slope of each head's ALiBi: 2^(−8/h), 2^(−16/h), … 2^(−8) where the head count h is a power of two.

    For other counts, the slopes of the power of two below, then every other one of the power above.

    Returns: (num_heads,).
    """
    check_positive("num_heads", num_heads)
    below = 1 << (num_heads.bit_length() - 1)
    exponents = torch.arange(1, below + 1, dtype=torch.float64) * (8 / below)
    between = torch.arange(1, 2 * below, 2, dtype=torch.float64) * (4 / below)
    return (2.0 ** -torch.cat((exponents, between))[:num_heads]).to(device, dtype)


class ALiBi(nn.Module):
    """Attention with linear biases: the score falls by slope · distance (Press et al., 2022).

    Nothing is learned, and any length will do.
    A key at distance t before its query loses slope · t, and so does a key after it, which the paper's causal
    models never see. Bloom and MPT add slope · (the key's position) instead: in each row the two differ by a
    constant, which the softmax ignores.

    Args:
        num_heads: number of heads, each with its slope of `alibi_slopes`.

    Returns: bias (num_heads, num_queries, num_keys), the two sequences aligned at their ends (with a cache),
    of the dtype and on the device to which the module was moved.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.register_buffer("slopes", alibi_slopes(num_heads), persistent=False)
        self.penalties = self._penalties(256)  # no buffer: a model cast to float64 gets exact penalties

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        distances = _relative_positions(num_queries, num_keys, self.slopes.device).abs()
        needed, held = max(num_queries, num_keys), self.penalties
        if needed > held.shape[1] or (held.dtype, held.device) != (self.slopes.dtype, self.slopes.device):
            self.penalties = self._penalties(_room_for(needed))
        return _by_relative_position(self.penalties[:, distances], num_queries)

    def _penalties(self, distances: int) -> Tensor:
        """−slope · distance for each head and each distance from 0 on: (num_heads, distances)."""
        slopes = alibi_slopes(self.slopes.shape[0], dtype=torch.float64)
        penalties = -slopes[:, None] * torch.arange(distances, dtype=torch.float64)
        return penalties.to(self.slopes.device, self.slopes.dtype)


def relative_position_bucket(
    relative: Tensor, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
) -> Tensor:
    """T5's bucket of each relative position, the key's minus the query's.

    Half of the buckets hold one distance each, the others grow geometrically up to max_distance; the last
    holds all beyond. Where bidirectional, half of all buckets serve the keys after the query; elsewhere those
    keys share bucket 0 with the query itself. The logarithm is taken in float32, as in transformers.

    Args:
        relative: integers of any shape.
        num_buckets: at least 2; where bidirectional, an even number from 4 on.
        max_distance: the distance from which on the last bucket holds all.

    Returns: int64, of relative's shape.
    """
    _check_buckets(num_buckets, max_distance, bidirectional)
    check_tensor("relative", relative)
    if relative.dtype not in INTEGER_DTYPES:
        raise TypeError(f"relative must be an integer tensor, got {relative.dtype}")
    relative = relative.long()
    if bidirectional:
        num_buckets //= 2
        first, distance = (relative > 0) * num_buckets, relative.abs()
    else:
        first, distance = torch.zeros_like(relative), (-relative).clamp(min=0)
    exact = num_buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class T5RelativeBias(nn.Module):
    """A learned bias on the scores for each head and each bucket of distances (Raffel et al., 2020, §2.1).

    T5 shares one such table among the layers of a stack, and does not scale its scores by 1/√d_k.

    Args:
        num_heads: number of heads.
        num_buckets, max_distance, bidirectional: as in `relative_position_bucket`; T5's encoder is
            bidirectional, its decoder is not.

    Returns: bias (num_heads, num_queries, num_keys), the two sequences aligned at their ends (with a cache).
    """

    def __init__(
        self, num_heads: int, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
    ):
        super().__init__()
        check_positive("num_heads", num_heads)
        _check_buckets(num_buckets, max_distance, bidirectional)
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        buckets = relative_position_bucket(
            _relative_positions(num_queries, num_keys, self.weight.device),
            num_buckets=self.weight.shape[0],
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return _by_relative_position(F.embedding(buckets, self.weight).T, num_queries)


# --- Shared parts -------------------------------------------------------------------------------------------


def _frequencies(width: int, base: float) -> Tensor:
    """base^(−2i/width) for each pair i, in float64: (width / 2,)."""
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)


def _as_complex(x: Tensor) -> Tensor:
    """Neighbours as real and imaginary part, (..., d) → (..., d / 2); a copy where strides allow no view.

    While torch.compile traces, strides and offsets are not to be read, and the copy is always made.
    """
    if (
        torch.compiler.is_compiling()
        or x.stride(-1) != 1
        or x.storage_offset() % 2
        or any(stride % 2 for stride in x.stride()[:-1])
    ):
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _relative_positions(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """All that occur, the key's minus the query's, aligned at the ends: 1 − n_k … n_q − 1."""
    check_positive("num_queries", num_queries)
    check_positive("num_keys", num_keys)
    return torch.arange(1 - num_keys, num_queries, device=device)


def _by_relative_position(values: Tensor, num_queries: int) -> Tensor:
    """Spread the value of each relative position over the matrix: (h, n_q + n_k − 1) → (h, n_q, n_k).

    The last query's row is the first n_k values; each query before it reads one place further on.
    """
    return values.unfold(-1, values.shape[-1] - num_queries + 1, 1).flip(-2)


def _room_for(positions: int) -> int:
    """The size of a table that grows seldom: the next power of two, 256 at least."""
    return max(256, 1 << (positions - 1).bit_length())


def _check_even(name: str, width: int) -> None:
    check_positive(name, width)
    if width % 2:
        raise ValueError(f"{name} must be even, got {width}: dimensions come in pairs of sine and cosine")


def _check_rotary(d_k: int, base: float, scaling: RopeScaling | None) -> None:
    _check_even("d_k", d_k)
    check_number("base", base)
    if not 1 < base < math.inf:
        raise ValueError(f"base must be above 1 and finite, got {base}")
    if scaling is not None and not isinstance(scaling, RopeScaling):
        raise TypeError(f"scaling must be a RopeScaling or None, got {type(scaling).__name__}")
    if scaling is not None and scaling.kind in ("ntk", "dynamic") and d_k == 2:
        raise ValueError(f"d_k must be at least 4 with scaling {scaling.kind!r}, got 2")


def _check_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    check_positive("num_buckets", num_buckets)
    check_positive("max_distance", max_distance)
    if not isinstance(bidirectional, bool):
        raise TypeError(f"bidirectional must be a bool, got {type(bidirectional).__name__}")
    least = 4 if bidirectional else 2
    if num_buckets < least or (bidirectional and num_buckets % 2):
        needed = "an even number from 4 on where bidirectional" if bidirectional else "at least 2"
        raise ValueError(f"num_buckets must be {needed}, got {num_buckets}")
    if max_distance <= num_buckets // least:
        raise ValueError(f"max_distance must exceed num_buckets // {least}, got {max_distance}")


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _index(offset: int | Tensor, end: int) -> slice | Tensor:
    return offset.long() if isinstance(offset, Tensor) else slice(offset, end)


def _last(name: str, positions: Tensor) -> int:
    """The largest of the positions, integers (batch, n)."""
    check_ids(name, positions, 2**31, dims=2)
    return int(positions.max())


def _end(x: Tensor, offset: int | Tensor, width: str = "d_model") -> int:
    """The position after the last row of x."""
    if x.dim() < 2:
        raise ValueError(f"x must have shape (..., n, {width}), got {tuple(x.shape)}")
    if isinstance(offset, Tensor):
        if x.dim() != 3 or offset.shape != x.shape[:2]:
            raise ValueError(
                f"offset must have x's batch and n, got {tuple(offset.shape)} for {tuple(x.shape)}"
            )
        return _last("offset", offset) + 1
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}")
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
    return offset + x.shape[-2]
