"""The Transformer, an encoder and a decoder (Vaswani et al., 2017).

Post-LN, the layer of the paper, is LayerNorm(x + Sublayer(x)); pre-LN (Xiong et al., 2020) is
x + Sublayer(LayerNorm(x)), with one more LayerNorm after each stack. `torch.nn.Transformer` puts that
final LayerNorm after post-LN stacks as well; the paper does not. Dropout acts where the paper has it, on
each sub-layer's output and on the sums of embeddings and positions, and by `inner_dropout` where PyTorch and
the authors' own code have it too: on attention weights and on the feed-forward networks' hidden units.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from companion._checks import (
    check_choice,
    check_features,
    check_ids,
    check_index,
    check_positive,
    check_probability,
)
from companion.attention import KVCache, MultiHeadAttention
from companion.embeddings import TokenEmbedding
from companion.feedforward import ACTIVATIONS, FeedForward
from companion.masks import check_mask, padding_mask
from companion.norm import LayerNorm
from companion.position import LearnedPositionalEmbedding, SinusoidalPositionalEncoding


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and variants of a Transformer; the defaults are the paper's base model.

    Args:
        vocab_size: tokens of the source, and of the target where `target_vocab_size` is None.
        target_vocab_size: tokens of the target; None for one shared vocabulary with one shared embedding.
        d_model: size of the vectors between layers.
        num_heads: attention heads; divides d_model.
        num_encoder_layers, num_decoder_layers: depth of the two stacks.
        d_ff: hidden size of the feed-forward networks.
        dropout: probability, in training, on sub-layers' outputs and on embeddings.
        inner_dropout: probability, in training, on attention weights and on feed-forward hidden units.
        activation: one of `companion.feedforward.ACTIVATIONS`.
        norm_first: False for post-LN, True for pre-LN.
        final_norm: LayerNorm after each stack; None for "only with pre-LN".
        position: "sinusoidal", "learned" or "none".
        max_length: positions of the learned table.
        pad_id: the padding token, which no query attends to in the encoder's output.
        tie_output: whether the logits are the hidden states times the target embedding, transposed.
    """

    vocab_size: int
    target_vocab_size: int | None = None
    d_model: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    d_ff: int = 2048
    dropout: float = 0.1
    inner_dropout: float = 0.0
    activation: str = "relu"
    norm_first: bool = False
    final_norm: bool | None = None
    position: str = "sinusoidal"
    max_length: int = 512
    pad_id: int = 0
    tie_output: bool = True

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "d_model",
            "num_heads",
            "num_encoder_layers",
            "num_decoder_layers",
            "d_ff",
            "max_length",
        )
        for name in sizes:
            check_positive(name, getattr(self, name))
        if self.target_vocab_size is not None:
            check_positive("target_vocab_size", self.target_vocab_size)
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model must be divisible by num_heads = {self.num_heads}, got {self.d_model}")
        check_probability("dropout", self.dropout)
        check_probability("inner_dropout", self.inner_dropout)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("position", self.position, ("sinusoidal", "learned", "none"))
        if self.position == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model must be even with sinusoidal positions, got {self.d_model}")
        check_index("pad_id", self.pad_id, min(self.vocab_size, self.target_size))

    @property
    def target_size(self) -> int:
        """Tokens of the target vocabulary."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    @property
    def has_final_norm(self) -> bool:
        """Whether a LayerNorm follows each stack."""
        return self.norm_first if self.final_norm is None else self.final_norm


class _Layer(nn.Module):
    """What encoder and decoder layers share: a sub-layer inside its residual connection and norm."""

    def __init__(self, d_model: int, dropout: float, norm_first: bool):
        super().__init__()
        check_probability("dropout", dropout)
        self.d_model, self.norm_first = d_model, norm_first
        self.dropout = nn.Dropout(dropout)

    def _residual(self, x: Tensor, norm: LayerNorm, sublayer) -> Tensor:
        if self.norm_first:
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))


class EncoderLayer(_Layer):
    """Multi-head self-attention, then the feed-forward network, each with residual connection and LayerNorm.

    Args:
        d_model, num_heads, d_ff, dropout, activation, norm_first, inner_dropout: as in `TransformerConfig`.
        attention_dropout: inner_dropout for the attention weights alone; inner_dropout where it is None.
        norm_eps: eps of the two norms; BERT has 1e-12.

    Shape: (batch, n, d_model) → (batch, n, d_model).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
        inner_dropout: float = 0.0,
        attention_dropout: float | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__(d_model, dropout, norm_first)
        if attention_dropout is None:
            attention_dropout = inner_dropout
        self.self_attention = MultiHeadAttention(d_model, num_heads, dropout=attention_dropout)
        self.feed_forward = FeedForward(d_model, d_ff, activation, inner_dropout)
        self.attention_norm = LayerNorm(d_model, norm_eps)
        self.feed_forward_norm = LayerNorm(d_model, norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Apply the layer; mask as in `MultiHeadAttention`."""
        check_features("x", x, self.d_model, dims=3)
        x = self._residual(x, self.attention_norm, lambda y: self.self_attention(y, mask=mask, causal=causal))
        return self._residual(x, self.feed_forward_norm, self.feed_forward)

    def first(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `forward` gives at the first position, computed for no other: → (batch, 1, d_model).

        The others are attended to, as keys and values: a sixth of the layer's products where d_ff is
        4 · d_model. For the last layer before a [CLS] pooler. The mask is broadcastable to
        (batch, num_heads, 1, n).
        """
        check_features("x", x, self.d_model, dims=3)
        context = self.attention_norm(x) if self.norm_first else x
        x = self._residual(
            x[:, :1], self.attention_norm, lambda y: self.self_attention(y, context, mask=mask)
        )
        return self._residual(x, self.feed_forward_norm, self.feed_forward)


@dataclass
class LayerCache:
    """What one decoder layer keeps between steps: its own keys and values, and those of the memory."""

    self_attention: KVCache
    cross_attention: KVCache


class DecoderCache:
    """One `LayerCache` for each decoder layer."""

    def __init__(self, num_layers: int):
        self.layers = [LayerCache(KVCache(), KVCache()) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Number of target positions already decoded."""
        return self.layers[0].self_attention.length

    def reorder(self, indices: Tensor, memory: bool = True) -> None:
        """Replace batch row i by row indices[i] in every layer.

        `memory=False` leaves the memory's keys and values as they are: enough where rows move among the
        hypotheses of one source.
        """
        for layer in self.layers:
            layer.self_attention.reorder(indices)
            if memory:
                layer.cross_attention.reorder(indices)


class DecoderLayer(_Layer):
    """Causal self-attention, cross-attention to the encoder's output, then the feed-forward network.

    Args:
        d_model, num_heads, d_ff, dropout, activation, norm_first, inner_dropout: as in `TransformerConfig`.

    Shape: x (batch, m, d_model), memory (batch, n, d_model) → (batch, m, d_model).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
        inner_dropout: float = 0.0,
    ):
        super().__init__(d_model, dropout, norm_first)
        self.self_attention = MultiHeadAttention(d_model, num_heads, dropout=inner_dropout)
        self.cross_attention = MultiHeadAttention(d_model, num_heads, dropout=inner_dropout)
        self.feed_forward = FeedForward(d_model, d_ff, activation, inner_dropout)
        self.self_attention_norm = LayerNorm(d_model)
        self.cross_attention_norm = LayerNorm(d_model)
        self.feed_forward_norm = LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Apply the layer. Self-attention is causal always; `mask` restricts it further.

        Args:
            mask: bool, broadcastable to (batch, heads, m, m).
            memory_mask: bool, broadcastable to (batch, heads, m, n).
            cache: keys and values of earlier positions; x then holds the new positions only.
        """
        own, cross = (None, None) if cache is None else (cache.self_attention, cache.cross_attention)
        check_features("memory", memory, self.d_model, dims=3)
        self.self_attention.check(x, None, mask, own)
        self.cross_attention.check(x, memory, memory_mask, cross, names=("memory", "memory_mask"))
        x = self._residual(
            x, self.self_attention_norm, lambda y: self.self_attention(y, mask=mask, causal=True, cache=own)
        )
        x = self._residual(
            x,
            self.cross_attention_norm,
            lambda y: self.cross_attention(y, memory, mask=memory_mask, cache=cross),
        )
        return self._residual(x, self.feed_forward_norm, self.feed_forward)


class Encoder(nn.Module):
    """A stack of encoder layers, and a final LayerNorm where the configuration has one."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(*_layer_args(config)) for _ in range(config.num_encoder_layers)
        )
        self.norm = LayerNorm(config.d_model) if config.has_final_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, n, d_model) → (batch, n, d_model)."""
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers, and a final LayerNorm where the configuration has one."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(*_layer_args(config)) for _ in range(config.num_decoder_layers)
        )
        self.norm = LayerNorm(config.d_model) if config.has_final_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """x (batch, m, d_model), memory (batch, n, d_model) → (batch, m, d_model)."""
        for i, layer in enumerate(self.layers):
            x = layer(x, memory, mask, memory_mask, None if cache is None else cache.layers[i])
        return self.norm(x)


def _layer_args(config: TransformerConfig) -> tuple:
    return (
        config.d_model,
        config.num_heads,
        config.d_ff,
        config.dropout,
        config.activation,
        config.norm_first,
        config.inner_dropout,
    )


class Transformer(nn.Module):
    """From source ids and shifted target ids to the logits of every next target token.

    The target is not masked for padding: padding stands at the end, where causality already hides it
    from every real token; the loss ignores the padded positions themselves.

    Shape: source_ids (batch, n), target_ids (batch, m) → logits (batch, m, target vocabulary).
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.source_embedding = TokenEmbedding(config.vocab_size, config.d_model, config.pad_id)
        shared = config.target_vocab_size is None
        self.target_embedding = (
            self.source_embedding
            if shared
            else TokenEmbedding(config.target_size, config.d_model, config.pad_id)
        )
        self.source_position, self.target_position = _position(config), _position(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.output = None if config.tie_output else nn.Linear(config.d_model, config.target_size, bias=False)
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=1 / math.sqrt(config.d_model))

    def forward(self, source_ids: Tensor, target_ids: Tensor) -> Tensor:
        self._check_source(source_ids)
        self._check_target(target_ids, source_ids.shape[0])
        memory = self.encode(source_ids)
        return self.decode(target_ids, memory, self.source_mask(source_ids))

    def source_mask(self, source_ids: Tensor) -> Tensor:
        """True at the source tokens that are not padding: bool (batch, 1, 1, n)."""
        return padding_mask(source_ids, self.config.pad_id)

    def encode(self, source_ids: Tensor) -> Tensor:
        """The encoder's output, computed once for each source: (batch, n) → (batch, n, d_model)."""
        self._check_source(source_ids)
        x = self.source_position(self.source_embedding(source_ids))
        return self.encoder(x, self.source_mask(source_ids))

    def decode(
        self,
        target_ids: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Logits of the token after each target id: (batch, m) → (batch, m, target vocabulary).

        With a cache, target_ids are the new tokens only, and their positions continue the cached ones.
        """
        return self.logits(self.decode_hidden(target_ids, memory, memory_mask, cache))

    def decode_hidden(
        self,
        target_ids: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """The decoder's output before the output layer: (batch, m) → (batch, m, d_model)."""
        check_features("memory", memory, self.config.d_model, dims=3)
        offset = 0 if cache is None else cache.length
        self._check_target(target_ids, memory.shape[0], offset)
        if memory_mask is not None:
            check_mask("memory_mask", memory_mask)
        x = self.target_embedding(target_ids)
        x = self.target_position(x) if self.config.position == "none" else self.target_position(x, offset)
        return self.decoder(x, memory, memory_mask=memory_mask, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: (..., d_model) → (..., target vocabulary)."""
        return self.target_embedding.logits(hidden) if self.output is None else self.output(hidden)

    def new_cache(self) -> DecoderCache:
        """An empty cache for `decode`."""
        return DecoderCache(self.config.num_decoder_layers)

    def _check_source(self, source_ids: Tensor) -> None:
        check_ids("source_ids", source_ids, self.config.vocab_size, dims=2)
        self._check_length("source_ids", source_ids.shape[1])

    def _check_target(self, target_ids: Tensor, batch: int, offset: int = 0) -> None:
        check_ids("target_ids", target_ids, self.config.target_size, dims=2)
        if target_ids.shape[0] != batch:
            raise ValueError(
                f"target_ids must have the source's batch size {batch}, got {tuple(target_ids.shape)}"
            )
        self._check_length("target_ids", offset + target_ids.shape[1])

    def _check_length(self, name: str, length: int) -> None:
        if self.config.position == "learned" and length > self.config.max_length:
            raise ValueError(
                f"{name} must have at most max_length = {self.config.max_length} tokens, got {length}"
            )


def _position(config: TransformerConfig) -> nn.Module:
    if config.position == "sinusoidal":
        return SinusoidalPositionalEncoding(config.d_model, config.dropout)
    if config.position == "learned":
        return LearnedPositionalEmbedding(config.max_length, config.d_model, config.dropout)
    return nn.Dropout(config.dropout)
