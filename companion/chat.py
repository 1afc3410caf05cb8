"""Conversations: messages in, text out, whichever model answers.

`ChatModel` is what the rest of the book talks to. `LocalChatModel` is a language model on this machine, to
which a conversation is one long prompt in ChatML; `OpenAIChatModel` asks a server that speaks OpenAI's
protocol, of which there are many; `ScriptedChatModel` says what a test wants to hear. ::

    <|im_start|>user
    Who was Ada Lovelace?<|im_end|>
    <|im_start|>assistant

The two signs are single tokens outside the vocabulary of text. `ChatML` writes them by their ids and encodes
each message by itself, so that a message in which somebody typed ``<|im_end|>`` spells those ten
characters, and can neither end its turn nor begin another.
"""

import codecs
import math
import os
import re
import time
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import torch

from companion._checks import check_choice, check_index, check_number, check_positive
from companion.generate.sampling import temperature as scaled
from companion.generate.sampling import top_p as nucleus
from companion.generate.stream import StopStrings, Tokenizer, generate_stream
from companion.models.language_model import LanguageModel
from companion.models.llama import load_gguf
from companion.quantize.gguf import GGUFFile
from companion.tokenizers._common import string
from companion.tokenizers.bpe import BPETokenizer

ROLES = ("system", "user", "assistant", "tool")
MAX_RESPONSE_BYTES = 2**26  # of a server, for one answer: 64 MiB
NO_KEY = "no-key"  # what a server is sent that asks for none: the client insists on a key


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: the text, in which no sign has a meaning; of whole characters, no lone surrogate.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        check_choice("role", self.role, ROLES)
        string("content", self.content)


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """A piece of an answer.

    Attributes:
        text: to be appended to the answer.
        log_probs: of the tokens behind it, where they were asked for. All tokens of the answer are among
            those of its pieces, the one that ends it included; a piece may be all tokens and no text.
        finish: None while the answer goes on; "stop" where it is complete, "length" where it was cut off.
    """

    text: str
    log_probs: tuple[float, ...] = ()
    finish: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is drawn and where it ends.

    Args:
        max_tokens: length of the answer at most.
        temperature: 0 for the most probable token each time; above 0 tokens are drawn.
        top_p: share of the probability mass from which they are drawn, in (0, 1].
        stop: strings that end the answer and are not part of it.
        seed: makes the draws repeatable.
        log_probs: also give the tokens' log-probabilities.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None
    log_probs: bool = False

    def __post_init__(self) -> None:
        check_positive("max_tokens", self.max_tokens)
        check_number("temperature", self.temperature)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        check_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        object.__setattr__(self, "stop", StopStrings(self.stop).stop)
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed must be an int or None, got {type(self.seed).__name__}")
        if not isinstance(self.log_probs, bool):
            raise TypeError(f"log_probs must be a bool, got {type(self.log_probs).__name__}")


class ChatModel(ABC):
    """What answers a conversation. A subclass writes `answer` alone, whose arguments come checked."""

    def stream(self, messages: Sequence[Message], **options) -> Iterator[ChatPiece]:
        """The next message of the conversation, in pieces.

        Args:
            messages: the conversation so far, at least one message.
            options: the fields of `Sampling`: max_tokens, temperature, top_p, stop, seed, log_probs.
        """
        return self.answer(check_messages(messages), Sampling(**options))

    def complete(self, messages: Sequence[Message], **options) -> str:
        """The next message of the conversation as one string; options as for `stream`."""
        return "".join(piece.text for piece in self.stream(messages, **options))

    @abstractmethod
    def answer(self, messages: tuple[Message, ...], sampling: Sampling) -> Iterator[ChatPiece]:
        """The pieces of the next message; the last one, and no other, has a `finish`."""


class ChatML:
    """Conversations as token ids: ``<|im_start|>role⏎content<|im_end|>⏎`` for each message.

    Args:
        tokenizer: its `special_ids` hold the two control tokens, and its `encode` yields no special token
            from plain text: if it ever does, the message is refused.
        start, end: names of the control tokens.
        default_system: content of a system message put before a conversation that begins without one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        start: str = "<|im_start|>",
        end: str = "<|im_end|>",
        default_system: str | None = None,
    ):
        special_ids = getattr(tokenizer, "special_ids", {})
        for name, value in (("start", start), ("end", end)):
            if value not in special_ids:
                raise ValueError(
                    f"{name} must be a special token of the tokenizer, got {value!r}; it has "
                    f"{', '.join(map(repr, special_ids)) or 'none'}"
                )
        self.tokenizer, self.start_id, self.end_id = tokenizer, special_ids[start], special_ids[end]
        self.control_ids = frozenset(special_ids.values())
        self.default = None if default_system is None else Message("system", default_system)

    def encode(self, messages: Sequence[Message], *, answer: bool = True) -> list[int]:
        """The ids of a conversation.

        Args:
            messages: at least one.
            answer: whether the beginning of an assistant's message follows, which the model goes on with.
        """
        messages = check_messages(messages)
        if self.default is not None and messages[0].role != "system":
            messages = (self.default, *messages)
        newline, ids = self._text("the newline", "\n"), []
        for number, message in enumerate(messages):
            text = self._text(f"messages[{number}]", f"{message.role}\n{message.content}")
            ids += [self.start_id, *text, self.end_id, *newline]
        if answer:
            ids += [self.start_id, *self._text("the answer's beginning", "assistant\n")]
        return ids

    def _text(self, name: str, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if control := sorted(self.control_ids.intersection(ids)):
            raise ValueError(
                f"{name} must hold no control token, but the tokenizer's encode made {control} of its text"
            )
        return ids


class LocalChatModel(ChatModel):
    """A language model on this machine that was tuned on ChatML.

    Args:
        model: causal and in evaluation mode.
        tokenizer: its special tokens include those of the template.
        template: how a conversation is written; ChatML where it is None.
        stop_ids: tokens that end an answer beside the template's own.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        template: ChatML | None = None,
        stop_ids: Sequence[int] = (),
    ):
        self.model, self.tokenizer = model, tokenizer
        self.template = ChatML(tokenizer) if template is None else template
        for token in stop_ids:
            check_index("stop_ids", token, model.config.vocab_size)
        self.stop_ids = (self.template.end_id, *stop_ids)

    @classmethod
    def from_gguf(cls, path, quantised: str | None = None) -> "LocalChatModel":
        """Model, tokenizer and default system message of a GGUF file that was tuned on ChatML (SmolLM2).

        Args:
            quantised: how the weights are kept, as in `companion.models.llama.load_gguf`.

        Raises ValueError for a malformed file, or for one of another architecture, tokenizer or template.
        """
        with GGUFFile.open(path) as file:
            metadata = file.metadata
        end = metadata.get("tokenizer.ggml.eos_token_id")
        try:
            tokenizer = BPETokenizer.from_gguf(metadata)
            template = ChatML(tokenizer, default_system=_default_system(metadata))
            model = load_gguf(path, quantised=quantised)
            return cls(model, tokenizer, template, () if end is None else (end,))
        except TypeError as error:  # a value of the file has the wrong type
            raise ValueError(f"{path} holds no model to chat with: {error}") from None

    def answer(self, messages: tuple[Message, ...], sampling: Sampling) -> Iterator[ChatPiece]:
        """A piece for each token."""
        filters = []
        if sampling.temperature not in (0, 1):
            filters.append(partial(scaled, value=sampling.temperature))
        if sampling.top_p < 1:
            filters.append(partial(nucleus, p=sampling.top_p))
        generator = None
        if sampling.seed is not None:
            generator = torch.Generator(self.model.embedding.weight.device).manual_seed(sampling.seed)
        pieces = generate_stream(
            self.model,
            self.tokenizer,
            [self.template.encode(messages)],
            max_new_tokens=sampling.max_tokens,
            stop=sampling.stop,
            stop_ids=self.stop_ids,
            filters=filters if sampling.temperature else (),
            greedy=sampling.temperature == 0,
            generator=generator,
            log_probs=sampling.log_probs,
        )
        return (
            ChatPiece(piece.text, () if piece.log_prob is None else (piece.log_prob,), piece.finish)
            for piece in pieces
        )


class OpenAIChatModel(ChatModel):
    """A model behind OpenAI's chat completions, at OpenAI or any server that speaks the same.

    Needs the package `openai`, of the extra `app`. A server's answer is foreign bytes: it is read up to
    `MAX_RESPONSE_BYTES` and for `deadline` seconds, and every chunk of it is checked. What goes wrong is a
    `ChatServerError`, and none of its messages holds the key.

    Args:
        base_url: where the server's paths begin, such as "http://localhost:8080/v1".
        model: its name at the server.
        api_key: where it is None, the environment's OPENAI_API_KEY, which then goes to this server. A server
            that asks for none is sent the word "no-key".
        timeout: seconds for which the server may be silent.
        deadline: seconds that an answer may take from its first byte to its last.
        retries: how often a request is sent again, later and later, before its answer has begun: if the
            connection fails, or the server is silent, busy (429) or broken (5xx).
        limit: the field that carries `max_tokens`; OpenAI's own newer models want "max_completion_tokens".

    The server may have its own limits: OpenAI takes four stop strings. It gets the first four, and the
    answer is cut here at any of them. A seed is a request that a server may ignore.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        deadline: float = 600.0,
        retries: int = 2,
        limit: str = "max_tokens",
    ):
        self.address = _check_address(base_url)
        if not string("model", model):
            raise ValueError("model must be the name of a model at the server, got ''")
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
        if not isinstance(key, str) or not key or not all("!" <= sign <= "~" for sign in key):
            raise ValueError("api_key must be printable ASCII without spaces")  # and is not repeated here
        for name, seconds in (("timeout", timeout), ("deadline", deadline)):
            check_number(name, seconds)
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {seconds}")
        if type(retries) is not int or not 0 <= retries <= 10:
            raise ValueError(f"retries must be an int in 0 … 10, got {retries!r:.80}")
        check_choice("limit", limit, ("max_tokens", "max_completion_tokens"))
        self.model, self.timeout, self.deadline, self.limit = model, timeout, deadline, limit
        openai, _ = _client_library()
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=key,
            timeout=timeout,
            max_retries=retries,
            default_headers={"Accept-Encoding": "identity"},  # compressed bytes could not be counted
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [self._bound]}),
        )

    def __repr__(self) -> str:
        return f"OpenAIChatModel({self.address!r}, {self.model!r})"

    def answer(self, messages: tuple[Message, ...], sampling: Sampling) -> Iterator[ChatPiece]:
        """A piece for each chunk that says something, in most servers a token. The request is sent when the
        first piece is asked for; to close the iterator ends the answer at the server too."""
        request = {
            "model": self.model,
            "messages": [{"role": each.role, "content": each.content} for each in messages],
            "temperature": sampling.temperature,
            "stream": True,
            self.limit: sampling.max_tokens,
        }
        if sampling.top_p < 1:
            request["top_p"] = sampling.top_p
        if sampling.stop:
            request["stop"] = list(sampling.stop[:4])
        if sampling.seed is not None:
            request["seed"] = sampling.seed
        if sampling.log_probs:
            request["logprobs"] = True
        return self._pieces(request, StopStrings(sampling.stop))

    def _pieces(self, request: dict, stops: StopStrings) -> Iterator[ChatPiece]:
        openai, httpx = _client_library()
        utf16 = codecs.getincrementaldecoder("utf-16-le")("replace")  # JSON may escape half a character
        wanted, said, scored = "logprobs" in request, False, False
        try:
            with self._client.chat.completions.create(**request) as chunks:
                for text, log_probs, finish in map(_read_chunk, chunks):
                    said, scored = said or bool(text), scored or bool(log_probs)
                    text = utf16.decode(text.encode("utf-16-le", "surrogatepass"), finish is not None)
                    text = stops.feed(text)
                    if stops.found is not None:
                        finish = "stop"
                    if finish == "content_filter":
                        raise ChatServerError(f"{self.address} withheld the answer (content_filter)")
                    if finish is not None:
                        finish = "length" if finish == "length" else "stop"
                        text += stops.flush()
                    if wanted and finish is not None and said and not scored:
                        raise ChatServerError(f"{self.address} gives no log-probabilities")
                    if text or log_probs or finish is not None:
                        yield ChatPiece(text, log_probs if wanted else (), finish)
                    if finish is not None:
                        return
        except (openai.OpenAIError, httpx.HTTPError, ValueError, RecursionError) as error:
            raise self._clear(error) from None
        raise ChatServerError(f"{self.address} broke off its answer")

    def _bound(self, response) -> None:
        """Let a response end in an error where it grows beyond what an answer may take."""
        _, httpx = _client_library()
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ChatServerError(f"{self.address} compresses its answers, which it was asked not to")
        response.stream = _bounded(httpx.SyncByteStream, response.stream, self.address, self.deadline)

    def _clear(self, error: Exception) -> "ChatServerError":
        """The error of the client or of the bytes as one that says what happened, without the key."""
        openai, _ = _client_library()
        status, detail = getattr(error, "status_code", None), str(error)
        if isinstance(error, openai.APITimeoutError):
            what, detail = f"was silent for {self.timeout:g} s", ""
        elif isinstance(error, openai.APIConnectionError):
            what, detail = "cannot be reached, or broke off", str(error.__cause__ or error)
        elif status is not None:
            kind = "failed" if status >= 500 else "does not accept the request"
            what, body = f"{_STATUS.get(status, kind)} (HTTP {status})", error.body
            if isinstance(body, Mapping):
                body = body.get("message") or body.get("detail")
            detail = "" if body is None else str(body)
        elif isinstance(error, openai.APIError):
            what = "reports an error"
        else:
            what = "sends what is no stream of chat completions"
        detail = detail.replace(self._client.api_key, "[key]")[:1000]
        detail = "".join(" " if unicodedata.category(sign)[0] in "CZ" else sign for sign in detail)
        detail = " ".join(detail.split())
        detail = detail if len(detail) <= 300 else detail[:299] + "…"
        return ChatServerError(f"{self.address} {what}{': ' if detail else ''}{detail}", status)


class ChatServerError(OSError):
    """A server gave no answer, or not a whole one.

    Attributes:
        status: of HTTP, where the server answered with one that is an error; else None.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


_STATUS = {
    401: "refuses the key",
    403: "does not allow it to this key",
    404: "knows no such model or path",
    429: "is busy, or the quota is used up",
}


def _client_library():
    """`openai` and the HTTP library below it."""
    try:
        import httpx2
        import openai
    except ImportError:
        raise ImportError(
            "OpenAIChatModel needs the package openai: install the extra `app` (pip install '.[app]')"
        ) from None
    return openai, httpx2


def _bounded(base: type, stream, address: str, deadline: float):
    """The byte stream `stream`, which ends in an error where it is too long or takes too long."""

    class Bounded(base):
        def __iter__(self) -> Iterator[bytes]:
            size, end = 0, time.monotonic() + deadline
            for data in stream:
                size += len(data)
                if size > MAX_RESPONSE_BYTES:
                    raise ChatServerError(f"{address} sends more than {MAX_RESPONSE_BYTES} bytes")
                if time.monotonic() > end:
                    raise ChatServerError(f"{address} takes more than {deadline:g} s for an answer")
                yield data

        def close(self) -> None:
            stream.close()

    return Bounded()


def _read_chunk(chunk: object) -> tuple[str, tuple[float, ...], str | None]:
    """Text, log-probabilities and finish reason of a chunk, which the client hands on unchecked."""
    choices = getattr(chunk, "choices", None)
    if not isinstance(choices, list):
        raise ValueError("a chunk has no choices")
    if not choices:  # the chunk that counts the tokens
        return "", (), None
    text = getattr(getattr(choices[0], "delta", None), "content", None)
    finish = getattr(choices[0], "finish_reason", None)
    tokens = getattr(getattr(choices[0], "logprobs", None), "content", None) or []
    for name, value in (("content", text), ("finish_reason", finish)):
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"a chunk's {name} is of type {type(value).__name__}, not a string")
    log_probs = [getattr(each, "logprob", None) for each in tokens] if isinstance(tokens, list) else [None]
    if not all(type(each) in (int, float) and not math.isnan(each) for each in log_probs):
        raise ValueError("a chunk's log-probabilities are not all numbers")
    return text or "", tuple(map(float, log_probs)), finish or None


def _check_address(base_url: object) -> str:
    """The URL without what a message should not repeat."""
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except (ValueError, TypeError, AttributeError):
        usable = False
    if not usable or not isinstance(base_url, str):
        raise ValueError(f"base_url must be an http:// or https:// URL, got one {type(base_url).__name__}")
    if "@" in parts.netloc:
        raise ValueError("base_url must hold no user and no password: give the key as api_key")
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


class ScriptedChatModel(ChatModel):
    """Answers from a script, one after another, in pieces of a few characters: for tests.

    Stop strings and `max_tokens` act as in any model, a piece counting as a token; as the script is certain,
    each has log-probability 0.

    Args:
        script: the answers in order, or a function from the messages to an answer.
        piece: characters in a piece.

    Attributes:
        calls: the messages of each conversation that was to be answered.
    """

    def __init__(self, script: Sequence[str] | Callable[[tuple[Message, ...]], str], piece: int = 4):
        check_positive("piece", piece)
        if not callable(script):
            if isinstance(script, str) or not isinstance(script, Sequence):
                raise TypeError(
                    f"script must be a sequence of answers or a function, got one {type(script).__name__}"
                )
            for answer in script:
                if not isinstance(answer, str):
                    raise TypeError(f"script must hold strings, got {type(answer).__name__}")
        self.script, self.piece = script, piece
        self.calls: list[tuple[Message, ...]] = []

    def answer(self, messages: tuple[Message, ...], sampling: Sampling) -> Iterator[ChatPiece]:
        """The answer is chosen at the call; a script at its end is a LookupError."""
        if callable(self.script):
            answer = self.script(messages)
        elif len(self.calls) < len(self.script):
            answer = self.script[len(self.calls)]
        else:
            raise LookupError(f"script has {len(self.script)} answers, and another one was asked for")
        self.calls.append(messages)
        return self._pieces(answer, sampling)

    def _pieces(self, answer: str, sampling: Sampling) -> Iterator[ChatPiece]:
        stops, log_probs = StopStrings(sampling.stop), (0.0,) if sampling.log_probs else ()
        parts = [answer[start : start + self.piece] for start in range(0, len(answer), self.piece)] or [""]
        for count, part in enumerate(parts, 1):
            text = stops.feed(part)
            finish = "stop" if stops.found is not None or count == len(parts) else None
            if finish is None and count == sampling.max_tokens:
                finish = "length"
            yield ChatPiece(text + stops.flush() if finish else text, log_probs, finish)
            if finish:
                return


def _default_system(metadata: Mapping[str, object]) -> str | None:
    """The system message that the file's Jinja template writes where a conversation has none."""
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        return None
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<]+)<\|im_end\|>", template)
    return found and found[1]


def check_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Refuse anything but a sequence of at least one message."""
    if not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a sequence of Message, got {type(messages).__name__}")
    for number, message in enumerate(messages):
        if not isinstance(message, Message):
            raise TypeError(f"messages[{number}] must be a Message, got {type(message).__name__}")
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    return tuple(messages)
