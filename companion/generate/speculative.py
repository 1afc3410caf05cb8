"""Speculative decoding: several tokens for one pass of the model, and exactly its distribution.

A pass over one token reads all weights, and a pass over five reads them once too. So a drafter proposes the
next tokens by cheap means, the model reads them together, and a rule keeps as many as it may (Leviathan,
Kalman & Matias, 2023; Chen et al., 2023). A proposal x, drawn from the drafter's distribution q, is kept with
probability min(1, p(x) / q(x)), where p is the model's; in place of the first that is not kept, a token is
drawn from max(p − q, 0), renormalised; after the last, if all are kept, one from p. Then every token follows
p, whatever q is: a bad drafter costs time, never quality.

Two drafters are here, a smaller model and the text itself (`PromptLookup`); drafts that are trees are not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from companion._checks import check_floating, check_ids, check_positive, check_tensor
from companion.generate.sampling import (
    Filter,
    _check_causal,
    _check_continuation,
    _check_drawing,
    _filter,
    _precise,
)
from companion.generate.stream import CAPACITY, _check_stop_ids
from companion.models.language_model import LanguageModel

#: From the logits (1, V) after ids (1, n) to a token (1,), and the probabilities (1, V) it was drawn with, or
#: None where nothing was drawn.
Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class Drafter(Protocol):
    """What proposes tokens.

    Attributes:
        vocab_size: how many tokens it knows, which must be as many as the model knows; None where it only
            repeats those of the text.
    """

    vocab_size: int | None

    def propose(
        self, ids: Tensor, count: int, choose: Choose, stop_ids: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Guess how a text goes on.

        Args:
            ids: (n,), the text so far.
            count: tokens wanted, at least 1.
            choose: how a token is chosen from logits: by the filters and the generator of the one who asks.
            stop_ids: tokens after which a text has ended. What is proposed after one is dropped, and `choose`
                is not to be asked for it.

        Returns: tokens (k,), k ≤ count, 0 where there is nothing to propose; and the probabilities (k, V)
        that each was drawn with, or None where none was drawn.
        """
        ...


class ModelDrafter:
    """A smaller model proposes, token by token.

    Its cache is cut back to what the text and the tokens it has read have in common, so that it may be used
    for one text after another.

    Args:
        model: causal, in evaluation mode, with the tokens of the model it drafts for. Where it has learned
            positions, it proposes nothing beyond them.
    """

    def __init__(self, model: LanguageModel):
        _check_causal(model)
        self.model, self.vocab_size = model, model.config.vocab_size
        self._cache = model.new_cache()
        self._read = torch.empty(0, dtype=torch.long)  # the tokens whose keys and values are in the cache

    @torch.no_grad()
    def propose(
        self, ids: Tensor, count: int, choose: Choose, stop_ids: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """See `Drafter`: a pass of the model for each token, of which the first reads what is new."""
        config, device, text = self.model.config, self.model.embedding.weight.device, ids
        if config.position == "learned":
            count = min(count, config.max_length + 1 - len(ids))
        size = min(len(self._read), len(ids) - 1)  # the last token is read, again or not, for its logits
        shared = int((self._read[:size].to(ids.device) == ids[:size]).cumprod(0).sum())
        self._cache.truncate(shared)
        self._read = ids[:shared]
        drawn: list[Tensor] = []
        for _ in range(count):
            hidden = self.model.hidden(text[None, self._cache.length :].to(device), cache=self._cache)
            self._read = text
            token, probs = choose(self.model.logits(hidden[:, -1]).to(ids.device), text[None])
            text = torch.cat((text, token))
            if probs is not None:
                drawn.append(probs)
            if stop_ids and int(token) in stop_ids:
                break
        return text[len(ids) :], torch.cat(drawn) if drawn else None


class PromptLookup:
    """Propose what followed the last time that the text said what it says now (Saxena, 2023).

    The longest n-gram that ends the text and occurs earlier in it decides, by the last of its occurrences.
    Where the text ends before the proposal does, that goes on with its own beginning, as in LZ77. It costs
    no pass of any model, and pays where text is copied: in quotations, corrections, code.

    transformers' `prompt_lookup_num_tokens` takes the first occurrence, and stops at the end of the text.

    Args:
        ngram: length of the longest n-gram that is looked for.
    """

    vocab_size = None

    def __init__(self, ngram: int = 3):
        check_positive("ngram", ngram)
        self.ngram = ngram

    def propose(
        self, ids: Tensor, count: int, choose: Choose | None = None, stop_ids: Sequence[int] = ()
    ) -> tuple[Tensor, None]:
        """See `Drafter`; always `count` tokens, or none."""
        places = torch.arange(len(ids) - 1, device=ids.device)
        equal = torch.ones_like(places, dtype=torch.bool)
        length = torch.zeros_like(places)  # of the n-gram that ends at each place and also ends the text
        for back in range(min(self.ngram, len(places))):
            equal &= (places >= back) & (ids[:-1].roll(back) == ids[-1 - back])
            length += equal
        if not length.any():
            return ids[:0], None
        start = (length * len(ids) + places).argmax() + 1
        return ids[start + torch.arange(count, device=ids.device) % (len(ids) - start)], None


@dataclass(frozen=True, slots=True)
class Round:
    """What one pass of the model gave.

    Attributes:
        tokens: the tokens chosen, at least one.
        proposed: tokens that the drafter proposed.
        accepted: the proposals among the tokens.
    """

    tokens: tuple[int, ...]
    proposed: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Speculation:
    """A continuation and what it took.

    Attributes:
        ids: (1, n + m), the prompt and its continuation.
        passes: passes of the model, that over the prompt included.
        proposed: tokens that the drafter proposed.
        accepted: proposals that are in the continuation.
    """

    ids: Tensor
    passes: int
    proposed: int
    accepted: int


def speculative_verify(
    target: Tensor, draft: Tensor | None, tokens: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """How many proposals are kept, and the token after them.

    Where tokens[i] was drawn from draft[i], tokens[:accepted] and the next one follow the target exactly
    (Leviathan et al., 2023, appendix A.1).

    Args:
        target: (..., k + 1, V), the model's probabilities of the token at each proposal's place, and after
            the last one, the proposals before it given; k may be 0.
        draft: (..., k, V), the probabilities with which the proposals were drawn. None takes each as certain,
            which is exact wherever it came from, but keeps fewer of those that were drawn.
        tokens: (..., k), the proposals.
        generator: source of the random numbers; PyTorch's global one where it is None.

    Returns: accepted (...), in 0 … k, and next (...), token ids.
    """
    _check_verification(target, draft, tokens)
    target = target.to(_precise(target))
    uniform = torch.rand(tokens.shape, dtype=target.dtype, device=target.device, generator=generator)
    accepted, rest = _accept(target, draft, tokens, uniform)
    token = torch.multinomial(rest.flatten(0, -2) if rest.dim() > 1 else rest, 1, generator=generator)
    return accepted, token.reshape(accepted.shape)


def _accept(target: Tensor, draft: Tensor | None, tokens: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """From uniform numbers (..., k) to accepted (...) and the weights (..., V) of the next token."""
    tokens = tokens.long()
    if draft is None:
        draft = F.one_hot(tokens, target.shape[-1])
    draft = F.pad(draft.to(target.dtype), (0, 0, 0, 1))  # after the last proposal nothing was proposed
    p, q = (x[..., :-1, :].gather(-1, tokens[..., None]).squeeze(-1) for x in (target, draft))
    accepted = (uniform * q < p).cumprod(-1).sum(-1)
    place = accepted[..., None, None].expand(*accepted.shape, 1, target.shape[-1])
    p, q = (x.gather(-2, place).squeeze(-2) for x in (target, draft))
    rest = (p - q).clamp(min=0)
    is_empty = rest.sum(-1, keepdim=True) == 0  # where p = q up to rounding
    return accepted, torch.where(is_empty, p, rest)


def speculative_stream(
    model: LanguageModel,
    drafter: Drafter,
    ids: Tensor,
    *,
    max_new_tokens: int,
    num_draft: int = 4,
    filters: Sequence[Filter] = (),
    greedy: bool = False,
    generator: torch.Generator | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[Round]:
    """Continue a prompt, and yield what each pass of the model gives.

    Drawn texts have the distribution of `companion.generate.generate` with the same filters, though not the
    same text for the same generator; greedy texts are the same, up to near ties, since a pass over several
    tokens rounds otherwise than one over each.

    Args:
        model: causal and in evaluation mode.
        drafter: `ModelDrafter`, `PromptLookup`, or what else proposes tokens.
        ids: (1, n), the prompt.
        max_new_tokens: tokens chosen at most.
        num_draft: tokens proposed for each pass at most.
        filters, greedy, generator: as in `companion.generate.generate`. A drafter that draws does so under
            the filters too; at each place they see the tokens before it.
        stop_ids: tokens that end the text, and are its last.

    Arguments are checked at the call. With dynamic rotary scaling the text may not grow beyond the original
    length: the angles would follow from proposals that are not kept.
    """
    if not callable(getattr(drafter, "propose", None)):
        raise TypeError(f"drafter must have a method propose, got {type(drafter).__name__}")
    _check_continuation(model, ids, max_new_tokens)
    config = model.config
    if ids.shape[0] != 1:
        raise ValueError(f"ids must hold one prompt, (1, n), got {tuple(ids.shape)}")
    if (size := getattr(drafter, "vocab_size", None)) not in (None, config.vocab_size):
        raise ValueError(f"drafter must have the model's {config.vocab_size} tokens, got {size}")
    scaling = config.rope_scaling if config.position == "rotary" else None
    is_dynamic = scaling is not None and scaling.kind == "dynamic"
    if is_dynamic and (read := ids.shape[1] + max_new_tokens - 1) > scaling.original_length:
        raise ValueError(
            f"max_new_tokens must not lead beyond the {scaling.original_length} tokens where dynamic rotary "
            f"scaling begins, got {max_new_tokens}, which has {read} tokens read"
        )
    check_positive("num_draft", num_draft)
    stop_ids = _check_stop_ids(stop_ids, config.vocab_size)
    ids = ids.long()
    _check_drawing(filters, generator, ids, config.vocab_size)
    options = {"filters": filters, "greedy": greedy, "generator": generator}
    return _speculate(model, drafter, ids[0], max_new_tokens, num_draft, stop_ids, **options)


def speculative_generate(model: LanguageModel, drafter: Drafter, ids: Tensor, **options) -> Speculation:
    """The whole continuation of a prompt; arguments as in `speculative_stream`."""
    rounds = list(speculative_stream(model, drafter, ids, **options))
    chosen = ids.new_tensor([[token for each in rounds for token in each.tokens]], dtype=torch.long)
    proposed, accepted = sum(each.proposed for each in rounds), sum(each.accepted for each in rounds)
    return Speculation(torch.cat((ids.long(), chosen), 1), len(rounds), proposed, accepted)


@torch.no_grad()
def _speculate(
    model: LanguageModel,
    drafter: Drafter,
    ids: Tensor,
    max_new_tokens: int,
    num_draft: int,
    stop_ids: tuple[int, ...],
    *,
    filters: Sequence[Filter],
    greedy: bool,
    generator: torch.Generator | None,
) -> Iterator[Round]:
    choose = partial(_choose, filters=filters, greedy=greedy, generator=generator)
    cache = model.new_cache(len(ids) + min(max_new_tokens, CAPACITY))
    end = len(ids) + max_new_tokens
    while len(ids) < end:
        count = min(num_draft, end - len(ids) - 1)  # a pass chooses one token more than are proposed
        tokens, draft = drafter.propose(ids, count, choose, stop_ids) if count else (ids[:0], None)
        if len(tokens) > count:
            raise ValueError(f"drafter must propose at most {count} tokens, got {len(tokens)}")
        proposed = tokens.tolist()
        stop = next((i for i, token in enumerate(proposed, 1) if token in stop_ids), None)
        tokens, draft = tokens[:stop], None if draft is None else draft[:stop]
        text = torch.cat((ids, tokens))
        hidden = model.hidden(text[None, cache.length :], cache=cache)
        logits = model.logits(hidden[0, -1 - len(tokens) :])  # (k + 1, V)
        logits = _filter_each(logits, text, tokens, filters, has_ended=stop is not None)
        if greedy:
            best = logits.argmax(-1)
            accepted = (best[:-1] == tokens).cumprod(0).sum()
            token = best[accepted]
        else:
            accepted, token = speculative_verify(logits.softmax(-1), draft, tokens, generator)
        accepted, token = torch.stack((accepted, token)).tolist()
        ends = accepted == stop or token in stop_ids
        chosen = proposed[:accepted] if accepted == stop else [*proposed[:accepted], token]
        yield Round(tuple(chosen), len(tokens), accepted)
        if ends:
            return
        cache.truncate(len(ids) + accepted)  # all but the last token chosen are read
        ids = torch.cat((ids, ids.new_tensor(chosen)))


def _filter_each(
    logits: Tensor, text: Tensor, tokens: Tensor, filters: Sequence[Filter], has_ended: bool
) -> Tensor:
    """The filters on each of the logits (k + 1, V), by the text before it, whose last k tokens are proposals.

    A filter never sees a text that it forbids, or one that has ended: the rows after such a proposal, which
    nobody will use, repeat the row before.
    """
    if not filters:
        return _filter(logits, text, filters)
    k, rows = len(tokens), []
    for i, row in enumerate(logits.split(1)[: k if has_ended else k + 1]):
        rows.append(_filter(row, text[None, : len(text) - k + i], filters))
        if i < k and rows[-1][0, tokens[i]] == -torch.inf:
            break
    return torch.cat(rows + rows[-1:] * (k + 1 - len(rows)))


def _choose(
    logits: Tensor, ids: Tensor, *, filters: Sequence[Filter], greedy: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """What a drafter is given, see `Choose`."""
    logits = _filter(logits, ids, filters)
    if greedy:
        return logits.argmax(-1), None
    probs = logits.softmax(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1), probs


def _check_verification(target: Tensor, draft: Tensor | None, tokens: Tensor) -> None:
    check_floating("target", target)
    if target.dim() < 2 or 0 in target.shape:
        raise ValueError(f"target must be non-empty with shape (..., k + 1, V), got {tuple(target.shape)}")
    *leading, rows, vocab_size = target.shape
    check_tensor("tokens", tokens)
    if tokens.shape != (shape := (*leading, rows - 1)):
        raise ValueError(
            f"tokens must have shape {shape}, one less than the target, got {tuple(tokens.shape)}"
        )
    if tokens.numel():
        check_ids("tokens", tokens, vocab_size)
    for name, probs in (("target", target), ("draft", draft)):
        if probs is None:
            continue
        check_floating(name, probs)
        if name == "draft" and probs.shape != (*shape, vocab_size):
            raise ValueError(f"draft must have shape {(*shape, vocab_size)}, got {tuple(probs.shape)}")
        if probs.numel() and not torch.compiler.is_compiling():
            least, furthest = torch.stack((probs.min(), (probs.sum(-1) - 1).abs().max())).tolist()
            if not (least >= 0 and furthest < 0.01):
                raise ValueError(
                    f"{name} must hold probabilities that sum to 1, got a smallest one of {least:.3g} and "
                    f"a sum that is {furthest:.3g} away"
                )
