"""A Transformer of one stack: the decoder-only language model, and with `causal=False` an encoder.

One configuration spans the models of the field. GPT (Radford et al., 2018) is post-LN with learned
positions; GPT-2 (Radford et al., 2019) the same in pre-LN with tanh-GELU; Bloom has ALiBi (Press et al.,
2022) instead; Llama (Touvron et al., 2023) has RMSNorm, SwiGLU, rotary positions and no biases, and from its
second version on grouped-query attention; Qwen2 adds biases to its queries, keys and values, Qwen3 a norm of
queries and keys in their stead; T5's encoder has RMSNorm and relative positions (Raffel et al.,
2020). Positions that act on attention are computed once a forward pass and shared by all layers.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from companion._checks import (
    check_choice,
    check_ids,
    check_index,
    check_number,
    check_positive,
    check_probability,
)
from companion.attention import KVCache, MultiHeadAttention
from companion.embeddings import TokenEmbedding
from companion.feedforward import ACTIVATIONS, FeedForward, GeGLU, SwiGLU
from companion.masks import check_mask
from companion.models.transformer import _Layer, _position
from companion.norm import LayerNorm, RMSNorm
from companion.position import ALiBi, RopeScaling, RotaryEmbedding, T5RelativeBias

GATED = {"swiglu": SwiGLU, "geglu": GeGLU}
NORMS = {"layer": LayerNorm, "rms": RMSNorm}
POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "t5", "none")


@dataclass(frozen=True)
class LanguageModelConfig:
    """Sizes and variants of a language model; the defaults are a small GPT-2 with exact GELU.

    Args:
        vocab_size: number of tokens V.
        d_model: size of the vectors between layers.
        num_layers: depth.
        num_heads: attention heads; divides d_model where head_dim is None.
        num_kv_heads: heads of keys and values; divides num_heads, which it is where it is None.
        d_ff: hidden size of the feed-forward networks.
        dropout: probability, in training, on embeddings and on each sub-layer's output.
        activation: "relu", "gelu" (exact), "gelu_tanh" (GPT-2), "silu", "swiglu" (Llama) or "geglu".
        norm: "layer" for LayerNorm, "rms" for RMSNorm (Llama, T5).
        norm_first: True for pre-LN with a norm after the last layer, False for post-LN without one.
        position: "learned", "sinusoidal", "rotary", "alibi", "t5" or "none".
        rope_base: base of the rotary frequencies; above 1.
        rope_layout: "half" (Llama in transformers) or "interleaved" (the paper's).
        rope_scaling: how rotary positions reach beyond the trained length; None for not at all.
        max_length: positions of the learned table; the other positions have no limit.
        bias: whether the linear layers have biases.
        causal: whether a token sees none after it. False for an encoder.
        tie_output: whether the logits are the hidden states times the token embedding, transposed.
        scale_embedding: whether token vectors are multiplied by √d_model (Vaswani et al., 2017); GPT-2,
            Llama and T5 do not.
        head_dim: size d_k of a head's queries, keys and values; d_model / num_heads where it is None.
        qkv_bias: whether the projections of queries, keys and values have biases; as `bias` says where it is
            None (Qwen2: True beside bias False).
        qk_norm: whether each head's queries and keys pass an RMSNorm before they are turned (Qwen3).
        norm_eps: of every norm; the norm's own default, 1e-5 in LayerNorm and 1e-6 in RMSNorm, where None.
    """

    vocab_size: int
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    d_ff: int = 1024
    dropout: float = 0.0
    activation: str = "gelu"
    norm: str = "layer"
    norm_first: bool = True
    position: str = "learned"
    rope_base: float = 10000.0
    rope_layout: str = "half"
    rope_scaling: RopeScaling | None = None
    max_length: int = 512
    bias: bool = True
    causal: bool = True
    tie_output: bool = True
    scale_embedding: bool = True
    head_dim: int | None = None
    qkv_bias: bool | None = None
    qk_norm: bool = False
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "max_length"):
            check_positive(name, getattr(self, name))
        if self.head_dim is not None:
            check_positive("head_dim", self.head_dim)
        elif self.d_model % self.num_heads:
            raise ValueError(f"d_model must be divisible by num_heads = {self.num_heads}, got {self.d_model}")
        if self.num_kv_heads is not None:
            check_positive("num_kv_heads", self.num_kv_heads)
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}"
                )
        check_probability("dropout", self.dropout)
        check_choice("activation", self.activation, (*ACTIVATIONS, *GATED))
        check_choice("norm", self.norm, NORMS)
        check_choice("position", self.position, POSITIONS)
        if self.position == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model must be even with sinusoidal positions, got {self.d_model}")
        if self.position == "rotary" and self.d_k % 2:
            name = "d_model / num_heads" if self.head_dim is None else "head_dim"
            raise ValueError(f"{name} must be even with rotary positions, got {self.d_k}")
        check_number("rope_base", self.rope_base)
        if not self.rope_base > 1:
            raise ValueError(f"rope_base must be above 1, got {self.rope_base}")
        check_choice("rope_layout", self.rope_layout, ("half", "interleaved"))
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise TypeError(f"rope_scaling must be a RopeScaling, got {type(self.rope_scaling).__name__}")
        if self.norm_eps is not None:
            check_number("norm_eps", self.norm_eps)
            if not 0 < self.norm_eps < math.inf:
                raise ValueError(f"norm_eps must be positive and finite, got {self.norm_eps}")

    @property
    def d_k(self) -> int:
        """Size of a head's queries, keys and values."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    def new_norm(self, size: int) -> nn.Module:
        """A norm of vectors of this size."""
        return NORMS[self.norm](size, *(() if self.norm_eps is None else (self.norm_eps,)))


class LanguageModelCache:
    """One `KVCache` for each layer, with room for `capacity` positions from the beginning."""

    def __init__(self, num_layers: int, capacity: int | None = None):
        self.layers = [KVCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Number of positions already seen."""
        return self.layers[0].length

    def reorder(self, indices: Tensor) -> None:
        """Replace batch row i by row indices[i] in every layer."""
        for layer in self.layers:
            layer.reorder(indices)

    def truncate(self, length: int) -> None:
        """Forget all positions but the first `length` in every layer; the buffers stay."""
        check_index("length", length, self.length + 1)
        for layer in self.layers:
            layer.truncate(length)


class LanguageModelLayer(_Layer):
    """Multi-head self-attention, then the feed-forward network, each with residual connection and norm.

    Shape: (batch, n, d_model) → (batch, n, d_model).
    """

    def __init__(self, config: LanguageModelConfig):
        super().__init__(config.d_model, config.dropout, config.norm_first)
        self.causal = config.causal
        self.self_attention = MultiHeadAttention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            d_k=config.d_k,
            d_v=config.d_k,
            bias=config.bias,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            norm_eps=1e-6 if config.norm_eps is None else config.norm_eps,
        )
        if config.activation in GATED:
            self.feed_forward = GATED[config.activation](config.d_model, config.d_ff, bias=config.bias)
        else:
            self.feed_forward = FeedForward(config.d_model, config.d_ff, config.activation, bias=config.bias)
        self.attention_norm = config.new_norm(config.d_model)
        self.feed_forward_norm = config.new_norm(config.d_model)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        score_bias: Tensor | None = None,
        rotary: RotaryEmbedding | None = None,
    ) -> Tensor:
        """Apply the layer; the arguments are those of `MultiHeadAttention`."""

        def attend(y: Tensor) -> Tensor:
            options = {"score_bias": score_bias, "rotary": rotary, "cache": cache}
            return self.self_attention(y, mask=mask, causal=self.causal, **options)

        return self._residual(
            self._residual(x, self.attention_norm, attend), self.feed_forward_norm, self.feed_forward
        )


class LanguageModel(nn.Module):
    """From token ids to the logits of the token after each: tokens, positions, layers, norm, output layer.

    Shape: ids (batch, n) → logits (batch, n, vocab_size).
    """

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        self.position = _position(config)  # what is added to the embeddings, and their dropout
        self.rotary = self.position_bias = None  # what acts on attention, shared by all layers
        if config.position == "rotary":
            self.rotary = RotaryEmbedding(
                config.d_k, base=config.rope_base, layout=config.rope_layout, scaling=config.rope_scaling
            )
        elif config.position == "alibi":
            self.position_bias = ALiBi(config.num_heads)
        elif config.position == "t5":
            self.position_bias = T5RelativeBias(config.num_heads, bidirectional=not config.causal)
        self.layers = nn.ModuleList(LanguageModelLayer(config) for _ in range(config.num_layers))
        self.norm = config.new_norm(config.d_model) if config.norm_first else nn.Identity()
        self.output = None if config.tie_output else nn.Linear(config.d_model, config.vocab_size, bias=False)
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=1 / math.sqrt(config.d_model))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cache: LanguageModelCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each id: (batch, n) → (batch, n, vocab_size).

        Args:
            mask: bool, broadcastable to (batch, num_heads, n, n_k), True where a token may attend; it
                restricts causal attention further. n_k counts the cached positions and the new ones.
            cache: keys and values of earlier positions; ids are then the new tokens only.
            positions: integers (batch, n), each id's position where they do not count up from the cache's
                length: with padding on the left. For learned, sinusoidal and rotary positions; relative
                biases read distances alone, which such padding leaves as they are.
        """
        return self.logits(self.hidden(ids, mask, cache, positions))

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cache: LanguageModelCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What the output layer sees: (batch, n) → (batch, n, d_model). Arguments as in `forward`."""
        self._check(ids, mask, cache, positions)
        config, offset = self.config, 0 if cache is None else cache.length
        x = self.embedding(ids) if config.scale_embedding else self.embedding.lookup(ids)
        if config.position in ("learned", "sinusoidal"):
            x = self.position(x, offset if positions is None else positions)
        else:
            x = self.position(x)
        rotary = self.rotary
        if rotary is not None:
            along = range(offset, offset + ids.shape[1]) if positions is None else positions
            rotary = rotary.at(along, x.dtype, x.device)
        score_bias = None
        if self.position_bias is not None:
            score_bias = self.position_bias(ids.shape[1], offset + ids.shape[1])  # (h, n, n_k)
        caches = [None] * config.num_layers if cache is None else cache.layers
        for layer, own in zip(self.layers, caches, strict=True):
            x = layer(x, mask, own, score_bias=score_bias, rotary=rotary)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: (..., d_model) → (..., vocab_size)."""
        return self.embedding.logits(hidden) if self.output is None else self.output(hidden)

    def new_cache(self, capacity: int | None = None) -> LanguageModelCache:
        """An empty cache for `forward`, with room for `capacity` positions before its buffers must grow."""
        return LanguageModelCache(self.config.num_layers, capacity)

    def _check(
        self,
        ids: Tensor,
        mask: Tensor | None,
        cache: LanguageModelCache | None,
        positions: Tensor | None = None,
    ) -> None:
        config = self.config
        check_ids("ids", ids, config.vocab_size, dims=2)
        batch, length = ids.shape
        if cache is not None:
            if not isinstance(cache, LanguageModelCache):
                raise TypeError(f"cache must be a LanguageModelCache, got {type(cache).__name__}")
            if len(cache.layers) != config.num_layers:
                raise ValueError(f"cache must have {config.num_layers} layers, got {len(cache.layers)}")
            if not config.causal:
                raise ValueError("cache must be None where causal is False: new tokens change the old ones")
            if cache.length and (rows := cache.layers[0].view()[0].shape[0]) != batch:
                raise ValueError(f"ids must have the cache's batch size {rows}, got {tuple(ids.shape)}")
            length += cache.length
        if positions is not None:
            if config.position not in ("learned", "sinusoidal", "rotary"):
                raise ValueError(
                    f"positions must be None with {config.position!r} positions, which read none"
                )
            limit = config.max_length if config.position == "learned" else 2**31
            check_ids("positions", positions, limit, dims=2)
            if positions.shape != ids.shape:
                raise ValueError(
                    f"positions must have the ids' shape {tuple(ids.shape)}, got {tuple(positions.shape)}"
                )
        elif config.position == "learned" and length > config.max_length:
            raise ValueError(
                f"ids must end at position {config.max_length} at most (max_length), got {length}"
            )
        if mask is not None:
            check_mask("mask", mask, (batch, config.num_heads, ids.shape[1], length))
