"""The same models from PyTorch's own parts, to compare with."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from companion.models.transformer import Transformer, TransformerConfig
from companion.position import sinusoidal_encoding


class TorchTransformer(nn.Module):
    """`torch.nn.Transformer` between a shared embedding and its transpose, sized by our configuration.

    As a user of the library would build it: its two final norms are there, and dropout also acts on
    attention weights and inside the feed-forward networks.

    Shape: source_ids (batch, n), target_ids (batch, m) → logits (batch, m, vocab_size).
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_id)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        with torch.no_grad():
            self.embedding.weight[config.pad_id].zero_()
        self.dropout = nn.Dropout(config.dropout)
        self.core = nn.Transformer(
            config.d_model,
            config.num_heads,
            config.num_encoder_layers,
            config.num_decoder_layers,
            config.d_ff,
            config.dropout,
            config.activation,
            batch_first=True,
            norm_first=config.norm_first,
        )
        self.register_buffer("positions", sinusoidal_encoding(512, config.d_model), persistent=False)

    def forward(self, source_ids: Tensor, target_ids: Tensor) -> Tensor:
        memory = self.encode(source_ids)
        return self.decode(target_ids, memory, self.source_mask(source_ids))

    def source_mask(self, source_ids: Tensor) -> Tensor:
        """True where PyTorch must not attend: the opposite of our convention."""
        return source_ids == self.config.pad_id

    def encode(self, source_ids: Tensor) -> Tensor:
        """(batch, n) → (batch, n, d_model)."""
        return self.core.encoder(self._embed(source_ids), src_key_padding_mask=self.source_mask(source_ids))

    def decode(self, target_ids: Tensor, memory: Tensor, memory_mask: Tensor, cache=None) -> Tensor:
        """Logits for all positions; PyTorch keeps no cache, so each call runs the whole prefix."""
        length = target_ids.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=target_ids.device)
        hidden = self.core.decoder(
            self._embed(target_ids),
            memory,
            tgt_mask=causal,
            tgt_is_causal=True,
            memory_key_padding_mask=memory_mask,
        )
        return hidden @ self.embedding.weight.T

    def _embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * math.sqrt(self.config.d_model)
        return self.dropout(x + self.positions[: ids.shape[1]])

    @torch.no_grad()
    def to_companion(self) -> Transformer:
        """The same function in the companion's modules, whose decoder has a cache.

        Our model with `final_norm=True` computes what PyTorch's computes; only dropout differs, in training.
        """
        ours = Transformer(replace(self.config, final_norm=True)).to(self.embedding.weight.device)
        state = {"source_embedding.weight": self.embedding.weight}
        for stack in ("encoder", "decoder"):
            state |= {f"{stack}.norm.gain": getattr(self.core, stack).norm.weight}
            state |= {f"{stack}.norm.bias": getattr(self.core, stack).norm.bias}
            for number, layer in enumerate(getattr(self.core, stack).layers):
                state |= {f"{stack}.layers.{number}.{name}": t for name, t in _layer_state(layer).items()}
        ours.load_state_dict({**ours.state_dict(), **state})
        return ours.train(self.training)


def _layer_state(layer: nn.Module) -> dict[str, Tensor]:
    """The weights of an encoder or decoder layer of PyTorch's under our names."""
    state = {}
    attentions = {"self_attention": layer.self_attn}
    norms = ["attention_norm", "feed_forward_norm"]
    if hasattr(layer, "multihead_attn"):
        attentions["cross_attention"] = layer.multihead_attn
        norms = ["self_attention_norm", "cross_attention_norm", "feed_forward_norm"]
    for name, attention in attentions.items():
        for kind in ("weight", "bias"):
            projections = getattr(attention, f"in_proj_{kind}").chunk(3)
            for projection, t in zip(("query", "key", "value"), projections, strict=True):
                state[f"{name}.{projection}_proj.{kind}"] = t
            state[f"{name}.output_proj.{kind}"] = getattr(attention.out_proj, kind)
    for number, norm in enumerate(norms, 1):
        state[f"{norm}.gain"] = getattr(layer, f"norm{number}").weight
        state[f"{norm}.bias"] = getattr(layer, f"norm{number}").bias
    for own, theirs in (("up", layer.linear1), ("down", layer.linear2)):
        state[f"feed_forward.{own}.weight"], state[f"feed_forward.{own}.bias"] = theirs.weight, theirs.bias
    return state
