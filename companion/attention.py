"""Scaled dot-product attention, multi-head attention and the key/value cache (Vaswani et al., 2017, §3.2).

Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V, and MultiHead = Concat(head_1 … head_h) W^O with
head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V). The h projections stand side by side in one matrix.
In grouped-query attention (Ainslie et al., 2023) several heads of queries share one head of keys and
values; with a single one it is multi-query attention (Shazeer, 2019).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import (
    check_broadcast,
    check_features,
    check_floating,
    check_ids,
    check_index,
    check_positive,
    check_probability,
)
from companion.masks import causal_mask, check_mask, combine_masks
from companion.norm import RMSNorm

_KERNEL_SHARES_HEADS = torch.__version__ >= "2.5"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    score_bias: Tensor | None = None,
    enable_gqa: bool = False,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(Q Kᵀ · scale + score_bias) V, each query's weighted mean of the values.

    A query that may attend to no key gets weights 0 and output 0, and no gradient flows through it.
    Without `return_weights` PyTorch's fused kernel does the work and the (n_q, n_k) weights are never
    stored; with it they are computed and returned, after dropout.

    Args:
        query: (..., n_q, d_k).
        key: (..., n_k, d_k).
        value: (..., n_k, d_v).
        mask: bool, broadcastable to (..., n_q, n_k), True where a query may attend to a key.
        causal: also forbid the keys after each query, the two sequences aligned at their ends
            (PyTorch's `is_causal` aligns them at their beginnings).
        scale: factor on the scores; 1/√d_k where it is None.
        score_bias: floating point, broadcastable to (..., n_q, n_k), added to the scaled scores: relative
            positions, for instance. An entry of −∞ forbids, as False does in the mask.
        enable_gqa: let query (..., h, n_q, d_k) share the fewer heads of key and value (..., h_kv, n_k, ·):
            query head i attends with key head ⌊i · h_kv / h⌋, h_kv divides h.
        dropout: probability with which a weight is zeroed. The caller sets 0 outside training.
        return_weights: also return the weights (..., n_q, n_k).

    Returns: output (..., n_q, d_v), or the pair (output, weights).
    """
    _check_attention(query, key, value, mask, causal, score_bias, enable_gqa, dropout)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if num_queries == 1:  # one query at the end sees every key
        causal = False
    constrained = mask is not None or score_bias is not None or return_weights
    if causal and (constrained or num_queries < num_keys):
        mask = combine_masks(causal_mask(num_queries, num_keys, device=query.device), mask)
        causal = False
    if score_bias is not None and not _known_true(finite := score_bias != -math.inf):
        mask = combine_masks(mask, finite)
    alive = None  # (..., n_q, 1), whether a row has a key; None where every row has one
    if mask is not None:
        mask = torch.atleast_2d(mask)
        alive = mask.any(-1, keepdim=True)
        if _known_true(alive):
            alive = None
        else:
            mask = mask | ~alive  # a row without keys is opened to all of them, then zeroed
    if score_bias is not None:
        mask = _additive(score_bias, mask, alive)
    if enable_gqa and (return_weights or not _KERNEL_SHARES_HEADS):
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        enable_gqa = False
    if return_weights:
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if score_bias is not None:
            scores = scores + mask
        elif mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1).to(value.dtype)
        if alive is not None:
            weights = weights.masked_fill(~alive, 0.0)
        weights = F.dropout(weights, dropout)
        return weights @ value, weights
    if mask is not None:
        mask = mask.reshape((1,) * (query.dim() - mask.dim()) + mask.shape)  # a shape the kernel is fused for
    options = {"is_causal": causal, "scale": scale, "dropout_p": dropout}
    shape = (*query.shape[:-1], value.shape[-1])
    if enable_gqa and num_queries == 1 and (mask is None or mask.shape[-3] == 1):
        query = query.reshape(*key.shape[:-2], -1, query.shape[-1])  # heads that share keys become rows
    elif enable_gqa:
        options["enable_gqa"] = True
    kernel, inputs = partial(F.scaled_dot_product_attention, **options), [query, key, value]
    if _backward_is_slow(query, num_keys):
        with torch.autocast("cpu", enabled=False):
            output = kernel(*(x.float() for x in inputs), attn_mask=_as(torch.float32, mask)).to(query.dtype)
    else:
        output = kernel(*inputs, attn_mask=_as(query.dtype, mask))
    output = output.reshape(shape)
    return output if alive is None else output.masked_fill(~alive, 0.0)


def _additive(score_bias: Tensor, mask: Tensor | None, alive: Tensor | None) -> Tensor:
    """The bias where the mask allows and −∞ where it forbids; 0 throughout a row that has no key."""
    score_bias = torch.atleast_2d(score_bias)
    if alive is not None:
        score_bias = torch.where(alive, score_bias, 0.0)
    return score_bias if mask is None else torch.where(mask, score_bias, -math.inf)


def _as(dtype: torch.dtype, mask: Tensor | None) -> Tensor | None:
    """A mask that is added must have the queries' type; one of bool stays as it is."""
    return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)


def _known_true(flags: Tensor) -> bool:
    """Whether all are true, read only where reading costs nothing: on the CPU, outside torch.compile."""
    return flags.device.type == "cpu" and not torch.compiler.is_compiling() and bool(flags.all())


def _backward_is_slow(query: Tensor, num_keys: int) -> bool:
    """Whether float32 is the quicker type: over short sequences PyTorch 2.13's CPU kernel takes up to six
    times as long to differentiate attention in bfloat16."""
    bfloat16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return bfloat16 and query.requires_grad and num_keys <= 128


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    score_bias: Tensor | None,
    enable_gqa: bool,
    dropout: float,
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(name, x)
        if x.dim() < 2 or 0 in x.shape:
            raise ValueError(f"{name} must be non-empty with shape (..., n, d), got {tuple(x.shape)}")
        if x.dtype != query.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {x.dtype}")
        leading = -3 if enable_gqa else -2
        if x.dim() != query.dim() or x.shape[:leading] != query.shape[:leading]:
            raise ValueError(
                f"{name} must have the query's leading sizes {tuple(query.shape[:leading])}, "
                f"got {tuple(x.shape)}"
            )
    if enable_gqa:
        if query.dim() < 3 or query.shape[-3] % key.shape[-3]:
            raise ValueError(
                f"key must have a number of heads that divides the query's {tuple(query.shape)}, "
                f"got {tuple(key.shape)}"
            )
        if value.shape[-3] != key.shape[-3]:
            raise ValueError(f"value must have the key's {key.shape[-3]} heads, got {tuple(value.shape)}")
    n_q, n_k = query.shape[-2], key.shape[-2]
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"key must have the query's d_k = {query.shape[-1]} as last size, got {tuple(key.shape)}"
        )
    if value.shape[-2] != n_k:
        raise ValueError(f"value must have one row for each of the {n_k} keys, got {tuple(value.shape)}")
    if causal and n_k < n_q:
        raise ValueError(f"key must be at least as long as the query where causal, got {n_k} < {n_q}")
    if mask is not None:
        check_mask("mask", mask, (*query.shape[:-1], n_k))
    if score_bias is not None:
        check_floating("score_bias", score_bias)
        check_broadcast("score_bias", score_bias, (*query.shape[:-1], n_k))
    check_probability("dropout", dropout)


class KVCache:
    """Keys and values of the positions already seen, in buffers that double when they are full.

    Doubling makes the cost of appending one position constant on average, where concatenating a new
    tensor at each step would copy the whole past each time. With enough capacity from the beginning nothing
    is ever copied. For inference: nothing is detached.

    Args:
        capacity: positions for which the first call makes room; 16 where it is None.

    Shape: keys (batch, heads, length, d_k), values (batch, heads, length, d_v), where heads are those of
    the keys: fewer than the queries' in grouped-query attention, and that is what it saves.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None:
            check_positive("capacity", capacity)
        self.length, self.capacity = 0, capacity or 16
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new positions; return views of all positions so far."""
        for name, new, held in (("keys", keys, self._keys), ("values", values, self._values)):
            check_floating(name, new)
            if new.dim() != 4:
                raise ValueError(f"{name} must have shape (batch, heads, n, d), got {tuple(new.shape)}")
            if held is not None and (new.shape[:2], new.shape[3]) != (held.shape[:2], held.shape[3]):
                raise ValueError(
                    f"{name} must fit the cache's {tuple(held.shape)} but for length, got {tuple(new.shape)}"
                )
            if held is not None and new.dtype != held.dtype:
                raise TypeError(f"{name} must have the cache's dtype {held.dtype}, got {new.dtype}")
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"values must agree with keys in (batch, heads, n), got {tuple(values.shape)}")
        end = self.length + keys.shape[-2]
        if self._keys is None or end > self._keys.shape[-2]:
            self._keys = self._grown(self._keys, keys, end)
            self._values = self._grown(self._values, values, end)
        self._keys.narrow(2, self.length, end - self.length).copy_(keys)
        self._values.narrow(2, self.length, end - self.length).copy_(values)
        self.length = end
        return self.view()

    def view(self) -> tuple[Tensor, Tensor]:
        """The keys and values of all positions so far."""
        if self._keys is None:
            raise ValueError("the cache is empty: append keys and values first")
        return self._keys.narrow(2, 0, self.length), self._values.narrow(2, 0, self.length)

    def reorder(self, indices: Tensor) -> None:
        """Replace batch row i by row indices[i]: beam search keeps the caches of the beams that survive."""
        if self._keys is not None:
            check_ids("indices", indices, self._keys.shape[0], dims=1)
            self._keys, self._values = self._keys[indices], self._values[indices]

    def truncate(self, length: int) -> None:
        """Forget all positions but the first `length`: speculative decoding takes back what it read in vain.

        The buffers stay, so that views taken before show what is appended next.
        """
        check_index("length", length, self.length + 1)
        self.length = length

    def _grown(self, buffer: Tensor | None, new: Tensor, needed: int) -> Tensor:
        capacity = max(needed, self.capacity if buffer is None else 2 * buffer.shape[-2])
        grown = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
        if buffer is not None:
            grown[..., : self.length, :] = buffer[..., : self.length, :]
        return grown


class MultiHeadAttention(nn.Module):
    """h attentions side by side, each on its own d_k-dimensional projections, joined by W^O.

    Self-attention where `context` is None; cross-attention where it is another sequence, from which keys
    and values are then projected. `torch.nn.MultiheadAttention` holds the same weights: its in_proj_weight
    is query_proj, key_proj and value_proj stacked.

    Args:
        d_model: size of the input and output vectors.
        num_heads: number of heads h; must divide d_model unless d_k and d_v are given.
        num_kv_heads: heads of keys and values, each shared by h / num_kv_heads neighbouring heads of
            queries; must divide h. h where it is None; 1 is multi-query attention.
        d_k: size of a head's queries and keys; d_model / h where it is None.
        d_v: size of a head's values; d_k's default where it is None.
        d_context: size of the context's vectors; d_model where it is None.
        bias: whether the four projections add a bias (the paper's formulas have none, PyTorch's have).
        qkv_bias: whether those of queries, keys and values do; as `bias` says where it is None. Qwen2 has
            True beside bias False.
        qk_norm: whether each head's queries and keys pass an RMSNorm of their own d_k numbers, whose gain
            all heads share, before they are turned (Qwen3; after Henry et al., 2020).
        norm_eps: of those norms.
        dropout: probability of zeroing an attention weight in training.

    Shape: x (batch, n, d_model), context (batch, n_k, d_context) → (batch, n, d_model), and the weights
    (batch, num_heads, n, n_k) where they are asked for.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        d_k: int | None = None,
        d_v: int | None = None,
        d_context: int | None = None,
        bias: bool = True,
        qkv_bias: bool | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_positive("d_model", d_model)
        check_positive("num_heads", num_heads)
        check_probability("dropout", dropout)
        if (d_k is None or d_v is None) and d_model % num_heads:
            raise ValueError(f"d_model must be divisible by num_heads = {num_heads}, got {d_model}")
        self.d_model, self.num_heads, self.dropout = d_model, num_heads, dropout
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive("num_kv_heads", self.num_kv_heads)
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
        self.d_k = d_model // num_heads if d_k is None else d_k
        self.d_v = d_model // num_heads if d_v is None else d_v
        self.d_context = d_model if d_context is None else d_context
        for name in ("d_k", "d_v", "d_context"):
            check_positive(name, getattr(self, name))
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.query_proj = nn.Linear(d_model, num_heads * self.d_k, bias=qkv_bias)
        self.key_proj = nn.Linear(self.d_context, self.num_kv_heads * self.d_k, bias=qkv_bias)
        self.value_proj = nn.Linear(self.d_context, self.num_kv_heads * self.d_v, bias=qkv_bias)
        self.output_proj = nn.Linear(num_heads * self.d_v, d_model, bias=bias)
        for projection in (self.query_proj, self.key_proj, self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        self.query_norm = RMSNorm(self.d_k, norm_eps) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.d_k, norm_eps) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        score_bias: Tensor | None = None,
        rotary: Callable[[Tensor, int], Tensor] | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from x to the context, or to x itself.

        Args:
            mask: bool, broadcastable to (batch, num_heads, n, n_k), True where a query may attend.
            causal: forbid the keys after each query.
            score_bias: floating point, broadcastable to (batch, num_heads, n, n_k), added to the scaled
                scores (ALiBi, T5's relative positions).
            rotary: called as rotary(x, offset), turns the queries and the new keys (batch, heads, n, d_k) by
                their positions offset … offset + n − 1, where offset is the cache's length; keys enter
                the cache turned. Self-attention only.
            cache: for decoding. In self-attention the keys and values of x are appended to it, and x
                attends to all it holds. In cross-attention it is filled once from the context and then
                reused: the context is not projected again.
        """
        self.check(x, context, mask, cache, score_bias=score_bias, rotary=rotary)
        offset = 0 if cache is None else cache.length
        query = self.query_norm(self._split(self.query_proj(x), self.num_heads))  # (b, h, n, d_k)
        if context is not None and cache is not None and cache.length:
            key, value = cache.view()
        else:
            source = x if context is None else context
            key = self.key_norm(self._split(self.key_proj(source), self.num_kv_heads))  # (b, h_kv, n_k, d_k)
            value = self._split(self.value_proj(source), self.num_kv_heads)  # (b, h_kv, n_k, d_v)
            if rotary is not None:
                query, key = rotary(query, offset), rotary(key, offset)
            if cache is not None:
                key, value = cache.append(key, value)
        attended = scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            causal=causal,
            score_bias=score_bias,
            enable_gqa=self.num_kv_heads < self.num_heads,
            dropout=self.dropout if self.training else 0.0,
            return_weights=return_weights,
        )
        if not return_weights:
            return self.output_proj(attended.transpose(1, 2).flatten(2))
        heads, weights = attended
        return self.output_proj(heads.transpose(1, 2).flatten(2)), weights

    def check(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        score_bias: Tensor | None = None,
        rotary: Callable[[Tensor, int], Tensor] | None = None,
        names: tuple[str, str] = ("context", "mask"),
    ) -> None:
        """Refuse what `forward` cannot use, before any work and before the cache is touched.

        Args:
            names: what the caller calls context and mask, for the error's text.
        """
        context_name, mask_name = names
        check_features("x", x, self.d_model, dims=3)
        past = 0 if cache is None else cache.length
        if context is None:
            if self.d_context != self.d_model:
                raise ValueError(
                    f"{context_name} must be given: keys are projected from d_context = {self.d_context}"
                )
            num_keys = past + x.shape[1]
        else:
            check_features(context_name, context, self.d_context, dims=3)
            num_keys = context.shape[1]
            if context.shape[0] != x.shape[0]:
                raise ValueError(
                    f"{context_name} must have x's batch size {x.shape[0]}, got {tuple(context.shape)}"
                )
            if past not in (0, num_keys):
                raise ValueError(
                    f"{context_name} must have the {past} vectors the cache was filled from, got {num_keys}"
                )
        if rotary is not None and not callable(rotary):
            raise TypeError(f"rotary must be callable as rotary(x, offset), got {type(rotary).__name__}")
        if rotary is not None and context is not None:
            raise ValueError(
                f"rotary must be None with a {context_name}: its keys have no position among the queries"
            )
        shape = (x.shape[0], self.num_heads, x.shape[1], num_keys)
        if mask is not None:
            check_mask(mask_name, mask, shape)
        if score_bias is not None:
            check_floating("score_bias", score_bias)
            check_broadcast("score_bias", score_bias, shape)

    def _split(self, x: Tensor, num_heads: int) -> Tensor:
        """(batch, n, h · d) → (batch, h, n, d): head i owns columns i·d … (i+1)·d − 1."""
        return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


@contextmanager
def record_attention(*modules: MultiHeadAttention) -> Iterator[list[Tensor]]:
    """Collect the weights (batch, num_heads, n, n_k) of each call of the given modules inside the block.

    The modules compute as before; each call is repeated with `return_weights=True`, so this is for looking
    at a model without a cache, not for training it.
    """
    recorded: list[Tensor] = []

    def record(module, args, kwargs, _output):
        if kwargs.get("cache") is not None:
            raise ValueError("cache must be None while attention is recorded: the call is made twice")
        recorded.append(module.forward(*args, **{**kwargs, "return_weights": True})[1].detach())

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
