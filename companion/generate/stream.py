"""Text from a decoder-only model and a tokenizer: several prompts in one batch, each piece as it comes.

Prefill reads all prompts in one pass and needs logits at their last position only; decoding then reads one
token a step and finds the past in the cache. Prompts of unequal length are padded on the left, so that all
of them end, and go on, in the same column. A mask hides the padding, and positions count from each prompt's
own first token: a text comes out the same, up to rounding, whatever texts stand beside it. A beginning that
all prompts share, such as a system message, is read once for all of them. A text that has ended leaves the
batch.

Two things keep a piece of text back. A character of several bytes may be spread over tokens
(`StreamDecoder`), and what looks like the beginning of a stop string may become one (`StopStrings`).
"""

import codecs
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from companion._checks import check_ids, check_index, check_positive
from companion.generate.sampling import Filter, _check_causal, _check_drawing, _draw, _filter, _precise
from companion.models.language_model import LanguageModel

CAPACITY = 1024  # new tokens for which the cache makes room at once; beyond them its buffers double
EXPLICIT = ("learned", "sinusoidal", "rotary")  # positions that a prompt can be given beside padding
SHARED = 32  # tokens that a beginning read once must spare, or the pass of its own does not pay
CONTEXT = 16  # tokens of the prompt that a decoder reads to know how the text goes on


class Tokenizer(Protocol):
    """From text to ids and back.

    Two more attributes are used where they are there: `token_bytes(id)`, the bytes that a token of a
    byte-level vocabulary stands for, and `special_ids`, from names to ids of tokens that are no text.
    """

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to one text.

    Attributes:
        prompt: index of the prompt that is continued.
        token: the id chosen.
        text: the text that is settled with it; often, not always, the token's own, and empty while it is not
            known whether a character is whole or a stop string begins.
        log_prob: log-probability of the token by the model, before any filter; None where not asked for.
        finish: None while the text goes on; "stop" after a stop id or a stop string, "length" at the limit.
    """

    prompt: int
    token: int
    text: str
    log_prob: float | None = None
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole continuation of a prompt.

    Attributes:
        text: what the pieces' texts join to; without the stop string.
        ids: every token chosen, with the stop id or the tokens of the stop string.
        finish: "stop" or "length", as in `Piece`.
        log_probs: of the ids, as in `Piece`; None where not asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    log_probs: tuple[float, ...] | None = None


class StreamDecoder:
    """Text from tokens one by one, never half a character.

    With a byte-level tokenizer the pieces join to `decode` of the ids without the special ones, to the last
    U+FFFD where the bytes are no UTF-8. Another tokenizer's `decode` is called on the growing sequence and
    may change nothing that it said before, but for U+FFFD at the end: these are held back. Special tokens
    spell nothing, and neither do ids that the tokenizer does not have (a padded embedding).

    Args:
        tokenizer: see `Tokenizer`.
        prompt: ids before the first one to come; their text is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "special_ids", {}).values())
        self._size = getattr(tokenizer, "vocab_size", None)
        self._bytes = getattr(tokenizer, "token_bytes", None)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._said = 0  # characters of the growing text that have been handed out
        for token in prompt:
            self.feed(token)

    def feed(self, token: int) -> str:
        """The characters that this token completes."""
        if token in self._special or (self._size is not None and token >= self._size):
            return ""
        if self._bytes is not None:
            return self._utf8.decode(self._bytes(token))
        self._ids.append(token)
        return self._rest(self._tokenizer.decode(self._ids).rstrip("\N{REPLACEMENT CHARACTER}"))

    def flush(self) -> str:
        """What was held back, now that no token follows: U+FFFD for the bytes of an unfinished character."""
        if self._bytes is not None:
            return self._utf8.decode(b"", final=True)
        return self._rest(self._tokenizer.decode(self._ids)) if self._ids else ""

    def _rest(self, text: str) -> str:
        rest, self._said = text[self._said :], max(self._said, len(text))
        return rest


class StopStrings:
    """Cut a text that comes in pieces at the first stop string, wherever the pieces have their borders.

    The first is the one complete first; of two that end together, the longer. What may still become the
    beginning of a stop string is held back, and nothing else is.

    Args:
        stop: strings, none of them empty.

    Attributes:
        found: the stop string that ended the text; None while there was none.
    """

    def __init__(self, stop: Sequence[str] = ()):
        if isinstance(stop, str) or not isinstance(stop, Sequence):
            raise TypeError(f"stop must be a sequence of strings, got one {type(stop).__name__}")
        for each in stop:
            if not isinstance(each, str):
                raise TypeError(f"stop must hold strings, got {type(each).__name__}")
            if not each:
                raise ValueError("stop must hold no empty string: it would end every text at once")
        self.stop, self.found, self._held = tuple(stop), None, ""

    def feed(self, text: str) -> str:
        """What is settled by this piece; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(text.find(stop), stop) for stop in self.stop]
        if ends := [(start + len(stop), start, stop) for start, stop in places if start >= 0]:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        settled = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[settled:]
        return text[:settled]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def generate_stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int] | Tensor],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    filters: Sequence[Filter] = (),
    greedy: bool = False,
    generator: torch.Generator | None = None,
    log_probs: bool = False,
    use_cache: bool = True,
) -> Iterator[Piece]:
    """Continue the prompts together, and yield a piece for each text and token as it is chosen.

    Args:
        model: causal and in evaluation mode.
        prompts: texts, or ids where control tokens are needed: a text never yields any. At least one
            token each.
        max_new_tokens: tokens chosen for each prompt at most.
        stop: strings that end a text and are not part of it, in whatever tokens they come.
        stop_ids: tokens that end a text and spell nothing.
        filters, greedy, generator: as in `companion.generate.generate`. A filter sees a prompt's own ids,
            without padding.
        log_probs: also give each token's log-probability.
        use_cache: False runs the whole sequence again at each step (for checking).

    Arguments are checked at the call, before the first piece is asked for. Draws of one text depend on the
    texts beside it, which share the generator; a greedy choice does not. With dynamic rotary scaling beyond
    the original length, the angles follow from the longest prompt: prompts must then be of one length.
    """
    ids = _check_prompts(model, tokenizer, prompts, max_new_tokens)
    stop_ids = _check_stop_ids(stop_ids, model.config.vocab_size)
    writers = [_Writer(tokenizer, prompt, stop, stop_ids) for prompt in ids]
    device = model.embedding.weight.device
    _check_drawing(filters, generator, torch.tensor(ids[:1], device=device), model.config.vocab_size)
    choose = partial(_choose, filters=filters, greedy=greedy, generator=generator)
    return _decode(model, ids, writers, choose, max_new_tokens, log_probs, use_cache)


def generate_text(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int] | Tensor], **options
) -> list[Completion]:
    """The continuations of the prompts, whole and in their order; arguments as in `generate_stream`."""
    stream = generate_stream(model, tokenizer, prompts, **options)
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for piece in stream:
        pieces[piece.prompt].append(piece)
    return [
        Completion(
            "".join(piece.text for piece in own),
            tuple(piece.token for piece in own),
            own[-1].finish,
            tuple(piece.log_prob for piece in own) if options.get("log_probs") else None,
        )
        for own in pieces
    ]


class _Writer:
    """From the tokens of one text to its pieces."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str], stop_ids: tuple):
        self.stops, self.stop_ids = StopStrings(stop), stop_ids
        self.decoder = StreamDecoder(tokenizer, prompt[-CONTEXT:])

    def write(self, token: int, is_last: bool) -> tuple[str, str | None]:
        """The text settled by the token, and why it is the last one, if it is."""
        finish = "stop" if token in self.stop_ids else "length" if is_last else None
        spelled = "" if finish == "stop" else self.decoder.feed(token)
        if finish is not None:
            spelled += self.decoder.flush()
        text = self.stops.feed(spelled)
        if self.stops.found is not None:
            return text, "stop"
        return (text if finish is None else text + self.stops.flush()), finish


@torch.no_grad()
def _decode(
    model: LanguageModel,
    prompts: list[list[int]],
    writers: list[_Writer],
    choose,
    max_new_tokens: int,
    log_probs: bool,
    use_cache: bool,
) -> Iterator[Piece]:
    device = model.embedding.weight.device
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    cache = model.new_cache(longest + min(max_new_tokens, CAPACITY)) if use_cache else None
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    read = shared = _shared(model, prompts) if use_cache else 0
    if shared:  # its keys take the first columns, where only the longest prompt's own ids stand
        model.hidden(torch.tensor([prompts[0][:shared]], device=device), None, cache)
        cache.reorder(torch.zeros(len(prompts), dtype=torch.long, device=device))
    for step in range(1, max_new_tokens + 1):
        mask = positions = None
        if padding.any():
            columns = torch.arange(ids.shape[1], device=device)
            places = columns - padding[:, None]  # (b, n)
            mask = ((places >= shared) | (columns < shared))[:, None, None]
            if model.config.position in EXPLICIT:
                positions = places[:, read:].clamp(min=0)
        hidden = model.hidden(ids[:, read:], mask, cache, positions)
        logits = model.logits(hidden[:, -1])
        token = choose(logits, ids, padding)
        chosen, scores = token.tolist(), [None] * len(rows)
        if log_probs:
            all_scores = logits.log_softmax(-1, dtype=_precise(logits))
            scores = all_scores.gather(-1, token[:, None]).squeeze(-1).tolist()
        read = ids.shape[1] if use_cache else 0
        ids = torch.cat((ids, token[:, None]), 1)
        going = []
        for i, (row, own, score) in enumerate(zip(rows, chosen, scores, strict=True)):
            text, finish = writers[row].write(own, step == max_new_tokens)
            if finish is None:
                going.append(i)
            yield Piece(row, own, text, score, finish)
        if not going:
            return
        if len(going) < len(rows):
            index = torch.tensor(going, device=device)
            rows, ids, padding = [rows[i] for i in going], ids[index], padding[index]
            if cache is not None:
                cache.reorder(index)


def _shared(model: LanguageModel, prompts: list[list[int]]) -> int:
    """How many ids at the beginning of all prompts are read once; 0 where that would spare little.

    Padding then stands between that beginning and the rest, so that positions must be given one by one.
    Dynamic rotary scaling turns what is read by how much of it there is.
    """
    config, shortest = model.config, min(map(len, prompts))
    scaling = config.rope_scaling
    if shortest < max(map(len, prompts)) and config.position not in EXPLICIT:
        return 0
    if scaling is not None and scaling.kind == "dynamic":
        return 0
    same = next((i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1), shortest)
    same = min(same, shortest - 1)  # the last id is read by its own row: its logits are needed
    return same if same * (len(prompts) - 1) >= SHARED else 0


def _choose(logits: Tensor, ids: Tensor, padding: Tensor, *, filters, greedy, generator) -> Tensor:
    """A token for each row: (b, V) → (b,)."""
    if filters and padding.any():
        own = zip(logits.split(1), ids.split(1), padding.tolist(), strict=True)
        logits = torch.cat([_filter(row, seen[:, start:], filters) for row, seen, start in own])
    else:
        logits = _filter(logits, ids, filters)
    return logits.argmax(-1) if greedy else _draw(logits, generator)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a beginning of the stop string, not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _check_prompts(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence, max_new_tokens: int
) -> list[list[int]]:
    """The prompts' ids, where the model can continue them."""
    _check_causal(model)
    config = model.config
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a sequence of prompts, got one {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    check_positive("max_new_tokens", max_new_tokens)
    ids = [_ids_of(f"prompts[{i}]", prompt, tokenizer, config.vocab_size) for i, prompt in enumerate(prompts)]
    longest, shortest = max(map(len, ids)), min(map(len, ids))
    read = longest + max_new_tokens - 1  # the last token is not read
    if config.position == "learned" and read > config.max_length:
        raise ValueError(
            f"max_new_tokens must be at most {config.max_length + 1 - longest} after a prompt of {longest} "
            f"tokens, for the model's {config.max_length} positions, got {max_new_tokens}"
        )
    scaling = config.rope_scaling if config.position == "rotary" else None
    is_dynamic = scaling is not None and scaling.kind == "dynamic" and read > scaling.original_length
    if is_dynamic and shortest < longest:
        raise ValueError(
            f"prompts must be of one length with dynamic rotary scaling beyond {scaling.original_length} "
            f"tokens, got {shortest} … {longest}"
        )
    return ids


def _check_stop_ids(stop_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if isinstance(stop_ids, int):
        raise TypeError("stop_ids must be a sequence of ints, got one int")
    for token in (stop_ids := tuple(stop_ids)):
        check_index("stop_ids", token, vocab_size)
    return stop_ids


def _ids_of(name: str, prompt: object, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt)
    if isinstance(prompt, Tensor):
        check_ids(name, prompt, vocab_size, dims=1)
        return prompt.tolist()
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError as error:
        raise TypeError(f"{name} must be a str or a flat sequence of ids: {error}") from None
    check_ids(name, torch.tensor(ids, dtype=torch.long), vocab_size)
    return ids
