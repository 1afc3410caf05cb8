"""Greedy and beam search for sequence-to-sequence models; what draws is in `companion.generate.sampling`.

The encoder runs once for each source, and the decoder keeps its keys and values, so that a step costs one
token whatever the length of the prefix. Beam search divides log-probabilities by the length penalty of
Wu et al. (2016), with which the Transformer paper decoded (beam 4, α = 0.6), and stops a sentence when no
unfinished hypothesis can overtake the best finished one, which it proves from the bound below.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from companion._checks import check_ids, check_index, check_number, check_positive


@dataclass(frozen=True)
class Hypothesis:
    """A candidate: its ids without ⟨bos⟩ and ⟨eos⟩, its log-probability given the source, its score.

    The log-probability includes that of ⟨eos⟩, unless max_length cut the sequence off before it. The score
    is what a beam ranks by; of a sample, the log-probability under the filtered distribution it came from.
    """

    ids: tuple[int, ...]
    log_prob: float
    score: float


def length_penalty(length: int, alpha: float) -> float:
    """((5 + length) / 6)^alpha, by which Wu et al. (2016, eq. 14) divide a log-probability.

    Args:
        length: generated tokens, ⟨eos⟩ included.
        alpha: 0 for the plain log-probability; the larger, the longer the outputs preferred.
    """
    check_positive("length", length)
    _check_alpha(alpha)
    return ((5.0 + length) / 6.0) ** alpha


@torch.no_grad()
def greedy_search(
    model: torch.nn.Module,
    source_ids: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    max_length: int,
    use_cache: bool = True,
) -> list[list[int]]:
    """Take the most probable token at each step, until every sentence has ended.

    Args:
        model: a sequence-to-sequence model in evaluation mode (`companion.models.transformer.Transformer`).
        source_ids: (batch, n), padded.
        bos_id, eos_id: the tokens that begin and end a target.
        max_length: generated tokens at most, ⟨eos⟩ included.
        use_cache: keep keys and values; False runs the whole prefix again at each step (for checking).

    Returns: for each source the generated ids, without ⟨bos⟩ and ⟨eos⟩.
    """
    _check_search(model, source_ids, bos_id, eos_id, max_length)
    ids = source_ids.new_full((source_ids.shape[0], 1), bos_id, dtype=torch.long)
    ids = _extend(
        ids,
        _decoder(model, source_ids, use_cache),
        lambda logits, _: logits.argmax(-1),
        steps=max_length,
        eos_id=eos_id,
        use_cache=use_cache,
    )
    return [_cut(row, eos_id) for row in ids[:, 1:].tolist()]


@torch.no_grad()
def beam_search(
    model: torch.nn.Module,
    source_ids: Tensor,
    *,
    beam_size: int,
    bos_id: int,
    eos_id: int,
    max_length: int,
    alpha: float = 0.6,
    return_all: bool = False,
) -> list[Hypothesis] | list[list[Hypothesis]]:
    """Keep the `beam_size` best prefixes at each step; return the finished sequence with the best score.

    A sequence that has not ended after `max_length` tokens competes as it stands. The score of a sequence
    is its log-probability over `length_penalty(length, alpha)`. An unfinished prefix can only lose
    probability, so log p / length_penalty(max_length, alpha) bounds whatever may still grow from it.

    Args:
        model, source_ids, bos_id, eos_id, max_length: as in `greedy_search`.
        beam_size: prefixes kept for each sentence.
        alpha: exponent of the length penalty, at least 0.
        return_all: return the `beam_size` best sequences of each sentence, best first.

    Returns: one `Hypothesis` for each source, or a list of them where `return_all`.
    """
    _check_search(model, source_ids, bos_id, eos_id, max_length)
    check_positive("beam_size", beam_size)
    _check_alpha(alpha)
    sentences, k, device = source_ids.shape[0], beam_size, source_ids.device
    finished: list[list[Hypothesis]] = [[] for _ in range(sentences)]
    active = list(range(sentences))  # sentences still searched; the rows of the tensors below
    memory = model.encode(source_ids).repeat_interleave(k, dim=0)
    memory_mask = model.source_mask(source_ids).repeat_interleave(k, dim=0)
    cache = model.new_cache()
    ids = torch.full((sentences, k, 1), bos_id, dtype=torch.long, device=device)
    log_probs = torch.full((sentences, k), float("-inf"), device=device)
    log_probs[:, 0] = 0.0  # the k prefixes are equal at first: only one may grow

    for step in range(1, max_length + 1):
        logits = model.decode(ids.flatten(0, 1)[:, -1:], memory, memory_mask, cache)[:, -1]
        totals = log_probs.unsqueeze(-1) + logits.float().log_softmax(-1).unflatten(0, (-1, k))  # (s, k, V)
        vocab = totals.shape[-1]
        # Each prefix has one ⟨eos⟩ among its continuations, so 2k candidates hold k that go on. Only an
        # ⟨eos⟩ among the best k ends a sequence: a beam of one is greedy search.
        best, flat = totals.flatten(1).topk(min(2 * k, k * vocab))  # (s, 2k)
        beam, token = flat // vocab, flat % vocab
        ends = token == eos_id
        penalty = length_penalty(step, alpha)
        for row, column in (ends & best.isfinite())[:, :k].nonzero().tolist():
            prefix = ids[row, beam[row, column], 1:].tolist()
            log_prob = best[row, column].item()
            finished[active[row]].append(Hypothesis(tuple(prefix), log_prob, log_prob / penalty))
        log_probs, kept = best.masked_fill(ends, float("-inf")).topk(k)  # (s, k)
        beam, token = beam.gather(1, kept), token.gather(1, kept)
        rows = beam + torch.arange(len(active), device=device)[:, None] * k

        bounds = (log_probs[:, 0] / length_penalty(max_length, alpha)).tolist()
        for sentence in active:
            finished[sentence] = sorted(finished[sentence], key=lambda h: -h.score)[:k]
        going = [
            row
            for row, sentence in enumerate(active)
            if not _is_settled(finished[sentence], bounds[row], k if return_all else 1)
        ]
        if shrinks := len(going) < len(active):
            active = [active[row] for row in going]
            if not active:
                break
            index = torch.tensor(going, dtype=torch.long, device=device)
            rows, token, log_probs = rows[index], token[index], log_probs[index]
            memory, memory_mask = memory[rows.flatten()], memory_mask[rows.flatten()]
        ids = torch.cat((ids.flatten(0, 1)[rows], token.unsqueeze(-1)), dim=-1)
        cache.reorder(rows.flatten(), memory=shrinks)

    for row, sentence in enumerate(active):  # cut off at max_length
        for prefix, log_prob in zip(ids[row, :, 1:].tolist(), log_probs[row].tolist(), strict=True):
            if log_prob > float("-inf"):
                score = log_prob / length_penalty(max_length, alpha)
                finished[sentence].append(Hypothesis(tuple(prefix), log_prob, score))
        finished[sentence] = sorted(finished[sentence], key=lambda h: -h.score)[:k]
    return finished if return_all else [hypotheses[0] for hypotheses in finished]


def _is_settled(finished: list[Hypothesis], bound: float, wanted: int) -> bool:
    """Whether no unfinished prefix can still enter the `wanted` best."""
    return len(finished) >= wanted and finished[wanted - 1].score >= bound or bound == float("-inf")


def _decoder(
    model: torch.nn.Module, source_ids: Tensor, use_cache: bool, copies: int = 1
) -> Callable[[Tensor], Tensor]:
    """Encode the sources once; then new target ids (batch · copies, m) give the next logits (…, V)."""
    memory = model.encode(source_ids).repeat_interleave(copies, dim=0)
    memory_mask = model.source_mask(source_ids).repeat_interleave(copies, dim=0)
    cache = model.new_cache() if use_cache else None
    return lambda new: model.decode(new, memory, memory_mask, cache)[:, -1]


def _extend(
    ids: Tensor,
    next_logits: Callable[[Tensor], Tensor],
    choose: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    eos_id: int | None,
    use_cache: bool,
) -> Tensor:
    """Append a token to each row of ids, up to `steps` times, until every row has ended.

    Args:
        ids: (b, n), the prompts.
        next_logits: from the ids (b, m) not read yet, or all of them without a cache, to logits (b, V).
        choose: from logits (b, V) and all ids so far to tokens (b,).
        eos_id: ends a row, and fills it from there on; None where nothing ends one.
    """
    read = 0
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for _ in range(steps):
        token = choose(next_logits(ids[:, read:]), ids)
        if eos_id is not None:
            token = token.masked_fill(ended, eos_id)
            ended |= token == eos_id
        read = ids.shape[1] if use_cache else 0
        ids = torch.cat((ids, token[:, None]), dim=1)
        if ended.all():
            break
    return ids


def _cut(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _check_evaluation(model: torch.nn.Module) -> None:
    if model.training:
        raise ValueError(
            "model must be in evaluation mode, call model.eval(): dropout would make the search random"
        )


def _check_search(
    model: torch.nn.Module, source_ids: Tensor, bos_id: int, eos_id: int, max_length: int
) -> None:
    _check_evaluation(model)
    check_ids("source_ids", source_ids, model.config.vocab_size, dims=2)
    check_positive("max_length", max_length)
    if model.config.position == "learned" and max_length > model.config.max_length:
        raise ValueError(
            f"max_length must be at most the model's {model.config.max_length}, got {max_length}"
        )
    check_index("bos_id", bos_id, model.config.target_size)
    check_index("eos_id", eos_id, model.config.target_size)


def _check_alpha(alpha: float) -> None:
    check_number("alpha", alpha)
    if not alpha >= 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
