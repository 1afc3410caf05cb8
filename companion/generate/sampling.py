"""Sampling: filters that reshape a model's next-token distribution, and the loops that draw from it.

A filter takes logits and returns logits, −inf where it excludes a token. All share one signature,
(logits, ids) → logits, where ids are the tokens so far, which only some of them read; a filter for `sample`
or `generate` is such a function with its parameter fixed, and any pure callable of that form will do:

    filters = (
        partial(repetition_penalty, penalty=1.2),
        partial(temperature, value=0.7),
        partial(top_k, k=50),
        partial(top_p, p=0.9),
    )

They are applied from left to right, each on what the last one left, renormalised, so the order matters:
top_p after temperature cuts another set than before it. transformers' `generate` always has the order
repetition_penalty, temperature, top_k, top_p, min_p, typical. No filter here separates tokens of equal
probability: those that tie with the last token kept are kept too. transformers does the same but for top_p,
where the sort chooses among equals.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from companion._checks import check_floating, check_ids, check_index, check_number, check_positive
from companion.generate.decoding import (
    Hypothesis,
    _check_evaluation,
    _check_search,
    _cut,
    _decoder,
    _extend,
)

Filter = Callable[[Tensor, Tensor], Tensor]


def temperature(logits: Tensor, ids: Tensor | None = None, *, value: float) -> Tensor:
    """Divide the logits: p becomes p^(1/value), renormalised. Below 1 sharper, above 1 flatter.

    Args:
        logits: (..., V).
        value: above 0. The limit 0 is greedy decoding, which needs no division.
    """
    _check_logits(logits)
    check_number("value", value)
    if not 0 < value < math.inf:
        raise ValueError(f"value must be positive and finite, got {value}; for the limit 0 decode greedily")
    return logits / value


def top_k(logits: Tensor, ids: Tensor | None = None, *, k: int) -> Tensor:
    """Keep the k most probable tokens (Fan, Lewis & Dauphin, 2018); all of them where k ≥ V.

    Args:
        logits: (..., V).
        k: at least 1.
    """
    _check_logits(logits)
    check_positive("k", k)
    if k >= logits.shape[-1]:
        return logits
    return _keep(logits, logits >= logits.topk(k).values[..., -1:])


def top_p(logits: Tensor, ids: Tensor | None = None, *, p: float) -> Tensor:
    """Keep the nucleus: the most probable tokens until they hold p of the mass (Holtzman et al., 2020).

    The token with which the mass reaches p is kept, so that there is always one.

    Args:
        logits: (..., V).
        p: in (0, 1]; 1 keeps every token.
    """
    _check_logits(logits)
    _check_mass(p)
    if p == 1:
        return logits
    probs = logits.softmax(-1, dtype=_precise(logits))
    return _keep(logits, logits >= _last_kept(logits, probs, p, (1 - p) / logits.shape[-1]))


def min_p(logits: Tensor, ids: Tensor | None = None, *, p: float) -> Tensor:
    """Keep the tokens at least p times as probable as the most probable one (Nguyen et al., 2024).

    Args:
        logits: (..., V).
        p: in [0, 1]; 0 keeps every token.
    """
    _check_logits(logits)
    check_number("p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    if p == 0:
        return logits
    return _keep(logits, logits >= logits.amax(-1, keepdim=True) + math.log(p))


def typical(logits: Tensor, ids: Tensor | None = None, *, p: float) -> Tensor:
    """Keep the tokens whose surprise −log p(token) is nearest the entropy, until they hold p of the mass.

    Locally typical sampling (Meister et al., 2023). The most probable token may be excluded.

    Args:
        logits: (..., V).
        p: in (0, 1]; 1 keeps every token.
    """
    _check_logits(logits)
    _check_mass(p)
    if p == 1:
        return logits
    log_probs = logits.log_softmax(-1, dtype=_precise(logits))
    probs = log_probs.exp()
    entropy = -(probs * log_probs).nansum(-1, keepdim=True)  # 0 · log 0 = 0
    nearness = (log_probs + entropy).abs().neg()
    # Tokens of surprise up to T ≥ 2 · entropy are nearer to it than all of surprise above T.
    rarest = (-2 * entropy).exp().clamp(max=(1 - p) / logits.shape[-1])
    return _keep(logits, nearness >= _last_kept(nearness, probs, p, rarest))


def repetition_penalty(logits: Tensor, ids: Tensor, *, penalty: float) -> Tensor:
    """Make every token that already occurs in ids less probable, once, however often it occurs.

    Keskar et al. (2019) divide its logit by the penalty. That would raise a negative logit, so it is
    multiplied there, as in transformers. The outcome depends on where the logits' zero lies, which softmax
    does not: logits and log-probabilities are penalised differently.

    Args:
        logits: (..., V).
        ids: (..., n), the tokens so far, with the prompt (`generate`) or ⟨bos⟩ (`sample`).
        penalty: above 0; 1 changes nothing, below 1 rewards repetition. The paper uses 1.2.
    """
    _check_logits(logits)
    check_number("penalty", penalty)
    if not 0 < penalty < math.inf:
        raise ValueError(f"penalty must be positive and finite, got {penalty}")
    check_ids("ids", ids, logits.shape[-1], dims=logits.dim())
    if ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"ids must have the logits' leading sizes {tuple(logits.shape[:-1])}, got {tuple(ids.shape)}"
        )
    ids = ids.long()
    seen = logits.gather(-1, ids)
    return logits.scatter(-1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    source_ids: Tensor,
    *,
    filters: Sequence[Filter] = (),
    generator: torch.Generator | None = None,
    num_samples: int = 1,
    bos_id: int,
    eos_id: int,
    max_length: int,
    use_cache: bool = True,
) -> list[list[Hypothesis]]:
    """Draw targets token by token (ancestral sampling), the encoder run once for each source.

    Args:
        model, source_ids, bos_id, eos_id, max_length, use_cache: as in `greedy_search`.
        filters: applied to the logits of each step, see above; none for the model's own distribution.
            They are tried once on zeros before the model runs, so that a wrong one is refused at once.
        generator: source of the random numbers; PyTorch's global one where it is None.
        num_samples: independent draws for each source.

    Returns: for each source `num_samples` hypotheses in the order drawn. `log_prob` is the model's own, as
    in the searches; `score` is the log-probability of the draw, the filters applied: their difference is the
    log of the importance weight. Without filters they are equal.
    """
    _check_search(model, source_ids, bos_id, eos_id, max_length)
    check_positive("num_samples", num_samples)
    rows = source_ids.shape[0] * num_samples
    ids = source_ids.new_full((rows, 1), bos_id, dtype=torch.long)
    _check_drawing(filters, generator, ids, model.config.target_size)
    steps: list[Tensor] = []  # (rows, 2): the token's log-probability, by the model and as drawn

    def choose(logits: Tensor, ids: Tensor) -> Tensor:
        filtered = _filter(logits, ids, filters)
        token = _draw(filtered, generator)
        both = torch.stack((logits, filtered), dim=1).double().log_softmax(-1)  # (rows, 2, V)
        steps.append(both[torch.arange(rows, device=token.device), :, token])
        return token

    next_logits = _decoder(model, source_ids, use_cache, copies=num_samples)
    drawn = _extend(ids, next_logits, choose, steps=max_length, eos_id=eos_id, use_cache=use_cache)[:, 1:]
    ends = drawn == eos_id
    frozen = (ends.cumsum(-1) > ends).unsqueeze(-1)  # the tokens after the first ⟨eos⟩
    totals = torch.stack(steps, dim=1).masked_fill(frozen, 0.0).sum(1).tolist()
    hypotheses = [
        Hypothesis(tuple(_cut(row, eos_id)), *total)
        for row, total in zip(drawn.tolist(), totals, strict=True)
    ]
    return [hypotheses[start : start + num_samples] for start in range(0, rows, num_samples)]


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    ids: Tensor,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    filters: Sequence[Filter] = (),
    greedy: bool = False,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue prompts of equal length with a decoder-only model.

    Args:
        model: a causal language model in evaluation mode (`companion.models.language_model.LanguageModel`).
        ids: (batch, n), the prompts, unpadded.
        max_new_tokens: tokens appended at most.
        eos_id: the token that ends a row; None to go on to the limit.
        filters, generator: as in `sample`. Filters act before a greedy choice as well.
        greedy: take the most probable token in place of a draw.
        use_cache: keep keys and values; False runs the whole prefix again at each step (for checking).

    Returns: (batch, n + m), m ≤ max_new_tokens, the prompts and their continuations. A row that has ended
    holds eos_id from there on; the loop stops when all have.
    """
    _check_continuation(model, ids, max_new_tokens)
    if eos_id is not None:
        check_index("eos_id", eos_id, model.config.vocab_size)
    ids = ids.long()
    _check_drawing(filters, generator, ids, model.config.vocab_size)
    cache = model.new_cache() if use_cache else None

    def next_logits(new: Tensor) -> Tensor:
        return model(new, cache=cache)[:, -1]

    def choose(logits: Tensor, ids: Tensor) -> Tensor:
        logits = _filter(logits, ids, filters)
        return logits.argmax(-1) if greedy else _draw(logits, generator)

    return _extend(ids, next_logits, choose, steps=max_new_tokens, eos_id=eos_id, use_cache=use_cache)


def _filter(logits: Tensor, ids: Tensor, filters: Sequence[Filter]) -> Tensor:
    """The filters in turn, in float32 at least."""
    logits = logits.to(_precise(logits))
    for each in filters:
        logits = each(logits, ids)
    if filters and not logits.amax(-1).isfinite().all():
        raise ValueError("filters must leave each row finite logits, at least one, got all −inf, +inf or NaN")
    return logits


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits: (b, V) → (b,)."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _last_kept(keys: Tensor, probs: Tensor, mass: float, rarest: Tensor | float) -> Tensor:
    """The key at which the tokens of largest key first hold `mass` together: (..., V) → (..., 1).

    Args:
        rarest: a probability such that the tokens above it hold the mass and have the largest keys: no
            others are sorted. Those below (1 − mass) / V hold less than 1 − mass, so it may be that for keys
            which order tokens by probability.
    """
    size = max(1, int((probs >= rarest).sum(-1).max()))
    largest, index = keys.topk(size)
    held = probs.gather(-1, index).cumsum(-1)
    return largest.gather(-1, (held < mass).sum(-1, keepdim=True).clamp(max=size - 1))


def _keep(logits: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, logits, -math.inf)


def _precise(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check_logits(logits: Tensor) -> None:
    check_floating("logits", logits)
    if logits.dim() == 0 or logits.numel() == 0:
        raise ValueError(f"logits must be non-empty with shape (..., V), got {tuple(logits.shape)}")


def _check_mass(p: float) -> None:
    check_number("p", p)
    if not 0 < p <= 1:
        raise ValueError(f"p must lie in (0, 1], got {p}")


def _check_causal(model: torch.nn.Module) -> None:
    _check_evaluation(model)
    if not model.config.causal:
        raise ValueError("model must be causal: with later tokens in view there is no next one to predict")


def _check_continuation(model: torch.nn.Module, ids: Tensor, max_new_tokens: int) -> None:
    """Refuse a model that cannot continue the prompts (batch, n) by so many tokens."""
    _check_causal(model)
    config = model.config
    check_ids("ids", ids, config.vocab_size, dims=2)
    check_positive("max_new_tokens", max_new_tokens)
    read = ids.shape[1] + max_new_tokens - 1  # the last token is not read
    if config.position == "learned" and read > config.max_length:
        raise ValueError(
            f"max_new_tokens must be at most {config.max_length + 1 - ids.shape[1]} after a prompt of "
            f"{ids.shape[1]} tokens, for the model's {config.max_length} positions, got {max_new_tokens}"
        )


def _check_drawing(
    filters: Sequence[Filter], generator: torch.Generator | None, ids: Tensor, vocab_size: int
) -> None:
    """Refuse what is no filter or generator; a filter proves itself on logits of zero."""
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if generator.device.type != ids.device.type:
            raise ValueError(f"generator must be on the ids' device {ids.device}, got {generator.device}")
    if not isinstance(filters, Sequence):
        raise TypeError(f"filters must be a sequence of callables, got {type(filters).__name__}")
    for each in filters:
        if not callable(each):
            raise TypeError(f"filters must hold callables (logits, ids) -> logits, got {type(each).__name__}")
        zeros = torch.zeros(ids.shape[0], vocab_size, device=ids.device)
        result = each(zeros, ids)
        if not isinstance(result, Tensor) or result.shape != zeros.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"filters must return logits of shape {tuple(zeros.shape)}, got {got}")
