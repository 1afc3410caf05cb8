"""Byte-level byte-pair encoding (Sennrich, Haddow & Birch, 2016; bytes as in GPT-2, Radford et al., 2019).

Text is cut into words by a regular expression, each word into its UTF-8 bytes, and the bytes are joined by
merges learned from a corpus: at each step the most frequent adjacent pair becomes a new token. Because every
string is a string of bytes, there is no unknown token. No merge crosses the border of a word.

Training counts each pair once and then only what a merge changes: an inverted index names the words that hold
the pair, and a heap with lazily corrected counts yields the next one. Ties go to the pair with the smaller
ids, as in the `tokenizers` library, so both learn the same merges.
"""

import hashlib
import json
import operator
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path

import regex

from companion._io import atomic_write

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's word: a contraction, letters, digits or other signs with one space before them, or white space.

What counts as a letter is up to the Unicode version of the `regex` package: on characters newer than Unicode
16 it and `tokenizers` 0.23 may cut differently.
"""

BYTE_ORDER = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100),
              *range(0x21), *range(0x7F, 0xA1), 0xAD)  # fmt: skip
"""The 256 bytes in the order in which GPT-2 numbers them: those that print in Latin-1, then the rest."""

MAX_VOCAB_SIZE = 2**19
MAX_TOKEN_BYTES = 1024  # a dozen merges could double a token to any size
MAX_FILE_BYTES = 2**24
MAX_PATTERN_LENGTH = 10_000

_FORMAT, _VERSION = "companion.tokenizers.bpe", 1


class BPETokenizer:
    """A byte-level BPE vocabulary: the special tokens, the 256 bytes, then one token for each merge.

    With k special tokens, ids 0 … k-1 are theirs in the order given, ids k … k+255 are the bytes in GPT-2's
    order, and merge number r makes the token with id k+256+r. `encode` never yields a special token, whatever
    the text says: "<pad>" in a text is five characters; the token is written by its id.

    Args:
        merges: pairs of ids, in the order learned; each id is smaller than that of the token the pair makes.
        special_tokens: names of the special tokens, distinct and not empty.
        pattern: regular expression (of the `regex` package, without capturing groups) that matches a word.
            What it leaves unmatched between two words is a word too, so no text is lost.

    Raises ValueError or TypeError where one of these does not hold, where two tokens would spell the same
    bytes, where a token would be longer than MAX_TOKEN_BYTES, or the vocabulary larger than MAX_VOCAB_SIZE.
    """

    def __init__(
        self,
        merges: Iterable[tuple[int, int]],
        special_tokens: Iterable[str] = (),
        pattern: str = GPT2_PATTERN,
    ):
        if not isinstance(merges, Iterable):
            raise TypeError(f"merges must be an iterable of pairs, got {type(merges).__name__}")
        specials = _checked_specials(special_tokens)
        self._split = _Splitter(pattern)
        self._merges = tuple(_checked_pair(number, pair) for number, pair in enumerate(merges))
        self._special_ids = {name: index for index, name in enumerate(specials)}
        self._bytes = _spell(self._merges, specials)
        self._cache = _WordCache(self._merges, len(specials))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Iterable[str] = (),
        pattern: str = GPT2_PATTERN,
    ) -> "BPETokenizer":
        """Learn a vocabulary of `vocab_size` tokens from an iterable of strings.

        The vocabulary is smaller when the texts run out of pairs. Each text is cut by itself: no merge spans
        two of them. Special tokens count towards `vocab_size`; their names in the texts are ordinary text.
        """
        specials = _checked_specials(special_tokens)
        vocab_size = _integer("vocab_size", vocab_size)
        smallest = len(specials) + 256
        if not smallest <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must lie in {smallest} (special tokens and bytes) … {MAX_VOCAB_SIZE}, "
                f"got {vocab_size}"
            )
        split = _Splitter(pattern)
        word_counts = Counter()
        for text in _strings("texts", texts):
            word_counts.update(split(text))
        return cls(_learn_merges(word_counts, vocab_size - smallest, len(specials)), specials, pattern)

    @property
    def vocab_size(self) -> int:
        """Number of tokens: special ones, bytes and merges."""
        return len(self._bytes)

    @property
    def special_ids(self) -> dict[str, int]:
        """Name of each special token → its id, in a new dict."""
        return dict(self._special_ids)

    @property
    def merges(self) -> tuple[tuple[int, int], ...]:
        """Pairs (left id, right id), in the order learned."""
        return self._merges

    @property
    def pattern(self) -> str:
        """The regular expression that matches a word."""
        return self._split.pattern

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (of a special token, its name in UTF-8)."""
        return self._bytes[self._checked_ids([token_id])[0]]

    def encode(self, text: str) -> list[int]:
        """Token ids of a string, a list of int. Raises ValueError if the string holds a lone surrogate."""
        return list(chain.from_iterable(map(self._cache.__getitem__, self._split(_string("text", text)))))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each of an iterable of strings, a list of lists."""
        return [self.encode(text) for text in _strings("texts", texts)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The string that the ids (an iterable or 1-D tensor of integers) spell.

        `decode(encode(text)) == text`. A sequence cut inside a character is no valid UTF-8: such bytes become
        U+FFFD, the replacement character. Special tokens are written by name, or left out on request.
        """
        ids = self._checked_ids(ids)
        if skip_special:
            ids = (index for index in ids if index >= len(self._special_ids))
        return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        """Write the vocabulary as JSON with a checksum; a save cut short leaves the old file whole."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "pattern": self.pattern,
            "special_tokens": list(self._special_ids),
            "merges": self._merges,
        }
        data = _canonical(content | {"sha256": _checksum(content)})
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(
                f"special_tokens must fit a file of {MAX_FILE_BYTES} bytes, which would take {len(data)}"
            )
        atomic_write(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPETokenizer":
        """Read a vocabulary that `save` wrote.

        Raises OSError if the file cannot be read, and ValueError, naming the file and the fault, if it is
        not whole, not consistent, not of this format and version, or larger than MAX_FILE_BYTES.
        """
        path = Path(path)
        try:
            return cls._from_content(_read_json(path))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a whole BPETokenizer file: {error}") from None

    @classmethod
    def _from_content(cls, content):
        fields = ("format", "version", "pattern", "special_tokens", "merges", "sha256")
        if not isinstance(content, dict) or set(content) != set(fields):
            raise ValueError(f"it must hold one JSON object with the fields {', '.join(fields)}")
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"its format must be {_FORMAT!r} version {_VERSION}")
        if content.pop("sha256") != _checksum(content):
            raise ValueError("its sha256 does not match its content")
        if not isinstance(content["special_tokens"], list) or not isinstance(content["merges"], list):
            raise ValueError("special_tokens and merges must be lists")
        return cls(content["merges"], content["special_tokens"], content["pattern"])

    def __repr__(self):
        return f"BPETokenizer(vocab_size={self.vocab_size}, special_tokens={list(self._special_ids)})"

    def _checked_ids(self, ids):
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        try:
            ids = list(map(operator.index, ids))
        except TypeError as error:
            raise TypeError(f"ids must be a flat sequence of integers: {error}") from None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(index for index in ids if not 0 <= index < self.vocab_size)
            raise ValueError(f"ids must lie in 0 … {self.vocab_size - 1}, got {wrong}")
        return ids


class _Splitter:
    """Cuts a string into words; their concatenation is the string."""

    def __init__(self, pattern):
        if not isinstance(pattern, str):
            raise TypeError(f"pattern must be a str, got {type(pattern).__name__}")
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise ValueError(f"pattern must have at most {MAX_PATTERN_LENGTH} characters, got {len(pattern)}")
        try:
            self._regex = regex.compile(pattern)
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from None
        if self._regex.groups:
            raise ValueError(f"pattern must have no capturing group, got {pattern!r}")
        self.pattern = pattern

    def __call__(self, text):
        words = self._regex.findall(text)
        return words if "".join(words) == text else self._cut_at_matches(text)

    def _cut_at_matches(self, text):
        """Both the matches and what lies between them, for a pattern that leaves something out."""
        cuts = {0, len(text)}.union(*(match.span() for match in self._regex.finditer(text)))
        return [text[start:end] for start, end in pairwise(sorted(cuts))]


class _WordCache(dict):
    """word → its token ids, worked out at first sight; holds at most `limit` words, none of them long.

    A miss costs O(n log n) in the bytes of the word: the pairs wait in a heap by rank, then position, and the
    tokens stand in a doubly linked list, so that one merge touches its two neighbours only.
    """

    def __init__(self, merges, num_special, limit=100_000, longest=64):
        super().__init__()
        self.limit, self.longest = limit, longest
        self.byte_ids = _byte_ids(num_special)
        self.merged = {pair: num_special + 256 + rank for rank, pair in enumerate(merges)}

    def __missing__(self, word):
        ids = tuple(self._merge([self.byte_ids[byte] for byte in word.encode("utf-8")]))
        if len(word) <= self.longest:
            if len(self) >= self.limit:
                self.clear()
            self[word] = ids
        return ids

    def _merge(self, ids):
        merged = self.merged.get
        end = len(ids)
        after = list(range(1, end + 1))
        before = list(range(-1, end - 1))
        waiting = [(new, i) for i, pair in enumerate(pairwise(ids)) if (new := merged(pair)) is not None]
        heapify(waiting)
        while waiting:
            new, i = heappop(waiting)
            j = after[i]
            if j == end or merged((ids[i], ids[j])) != new:  # a neighbour has been merged meanwhile
                continue
            ids[i], ids[j] = new, None
            after[i] = k = after[j]
            if k < end:
                before[k] = i
                if (right := merged((new, ids[k]))) is not None:
                    heappush(waiting, (right, i))
            if (h := before[i]) >= 0 and (left := merged((ids[h], new))) is not None:
                heappush(waiting, (left, h))
        return [index for index in ids if index is not None]


def _learn_merges(word_counts, num_merges, num_special):
    """The most frequent pairs, merged one after another: list of at most `num_merges` pairs of ids."""
    byte_ids = _byte_ids(num_special)
    words = [[byte_ids[byte] for byte in word.encode("utf-8")] for word in word_counts]
    counts = list(word_counts.values())
    length = [1] * (num_special + 256)  # bytes of each token

    pair_counts, where = defaultdict(int), defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[index]
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)

    merges = []
    while heap and len(merges) < num_merges:
        count, pair = heappop(heap)
        if pair_counts[pair] != -count:  # it was pushed before a merge took some of its occurrences
            if pair_counts[pair]:
                heappush(heap, (-pair_counts[pair], pair))
            continue
        new = len(length)
        merges.append(pair)
        length.append(length[pair[0]] + length[pair[1]])
        born = set()
        for index in where.pop(pair):
            for neighbours in _merge_in_word(words[index], pair, new, counts[index], pair_counts):
                where[neighbours].add(index)
                born.add(neighbours)
        for neighbours in born:
            left, right = neighbours
            if pair_counts[neighbours] and length[left] + length[right] <= MAX_TOKEN_BYTES:
                heappush(heap, (-pair_counts[neighbours], neighbours))
        del pair_counts[pair]
    return merges


def _merge_in_word(word, pair, new, count, pair_counts):
    """Replace `pair` by `new` in a word from left to right, in place; returns the pairs this makes."""
    first, second = pair
    born = []
    i = 0
    while True:
        try:
            i = word.index(first, i, -1)
        except ValueError:
            return born
        if word[i + 1] != second:
            i += 1
            continue
        word[i : i + 2] = (new,)
        if i:
            left = word[i - 1]
            pair_counts[left, first] -= count
            pair_counts[left, new] += count
            born.append((left, new))
        i += 1
        if i < len(word):
            right = word[i]
            pair_counts[second, right] -= count
            pair_counts[new, right] += count
            born.append((new, right))


def _byte_ids(num_special):
    """list whose entry b is the id of byte b."""
    ids = [0] * 256
    for index, byte in enumerate(BYTE_ORDER):
        ids[byte] = num_special + index
    return ids


def _spell(merges, specials):
    """The bytes of every token, in the order of the ids."""
    size = len(specials) + 256 + len(merges)
    if size > MAX_VOCAB_SIZE:
        raise ValueError(f"merges and special_tokens must give at most {MAX_VOCAB_SIZE} tokens, got {size}")
    spelled = [name.encode("utf-8") for name in specials] + [bytes([byte]) for byte in BYTE_ORDER]
    known = set(spelled[len(specials) :])
    for number, (left, right) in enumerate(merges):
        if not (len(specials) <= left < len(spelled) and len(specials) <= right < len(spelled)):
            raise ValueError(
                f"merges[{number}] must join two of the ids {len(specials)} … {len(spelled) - 1}, "
                f"got ({left}, {right})"
            )
        token = spelled[left] + spelled[right]
        if len(token) > MAX_TOKEN_BYTES:
            raise ValueError(
                f"merges[{number}] must make a token of at most {MAX_TOKEN_BYTES} bytes, got {len(token)}"
            )
        if token in known:
            raise ValueError(f"merges[{number}] must make a new token, got {token!r} a second time")
        known.add(token)
        spelled.append(token)
    return spelled


def _checked_pair(number, pair):
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(type(index) is not int for index in pair):
        raise TypeError(f"merges[{number}] must be a pair of ints, got {pair!r:.100}")
    return tuple(pair)


def _checked_specials(special_tokens):
    names = tuple(_strings("special_tokens", special_tokens))
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"special_tokens must be distinct and not empty, got {list(names)}")
    if any(len(name.encode("utf-8")) > MAX_TOKEN_BYTES for name in names):
        raise ValueError(f"special_tokens must have at most {MAX_TOKEN_BYTES} bytes each, got a longer one")
    return names


def _strings(name, values):
    """The strings of an iterable, each checked as it comes."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be an iterable of strings, got one {type(values).__name__}")
    for number, value in enumerate(values):
        yield _string(f"{name}[{number}]", value)


def _string(name, value):
    """`value`, if it is text: a lone surrogate is half a character and has no UTF-8 bytes."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be Unicode text, got the lone surrogate U+{ord(value[error.start]):04X} "
            f"at index {error.start}"
        ) from None
    return value


def _integer(name, value):
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def _canonical(content):
    return json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode("ascii")


def _checksum(content):
    return hashlib.sha256(_canonical(content)).hexdigest()


def _read_json(path):
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
    return json.loads(data.decode("utf-8"))
