"""The unigram language model of word pieces (Kudo, 2018), as in SentencePiece (Kudo & Richardson, 2018).

Every piece has a probability, and a segmentation of a word has the product of its pieces' probabilities. The
best segmentation is found by Viterbi's algorithm; others can be drawn, which regularises a model trained on
them. A space is written "▁" at the head of the word that follows it, so decoding is exact.

Training starts from the frequent substrings of the corpus and takes turns: expectation maximisation of the
probabilities, every segmentation counted by its posterior probability, and pruning of the pieces without
which the likelihood falls least.
"""

import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from companion._checks import check_number, check_positive
from companion._io import atomic_write
from companion.tokenizers._common import read_json, sealed, string, strings, token_ids, unsealed

SPACE = "▁"
UNK = "<unk>"
UNKNOWN_PENALTY = 10.0  # SentencePiece's: an unknown character scores this much less than the rarest piece

MAX_VOCAB_SIZE = 2**20
MAX_PIECE_LENGTH = 64
END, BORDER = "\0", 0x110000  # between words: any character, and a code point beyond Unicode's in its place

_FORMAT, _VERSION = "companion.tokenizers.unigram", 1


class UnigramTokenizer:
    """Pieces with log-probabilities: id 0 is <unk>, then the pieces in the order given.

    A text is cut at white space, which is lost but for one space between words; each word is written with
    "▁" before it and segmented alone. SentencePiece with normalization_rule_name="identity" does the same.

    Args:
        scores: piece → its log-probability, a finite number; "▁" may stand only at the head of a piece.

    Raises ValueError or TypeError where that does not hold.
    """

    def __init__(self, scores: Mapping[str, float]):
        if not isinstance(scores, Mapping):
            raise TypeError(f"scores must be a mapping, got {type(scores).__name__}")
        _check_scores(scores)
        self._pieces = (UNK, *strings("scores", list(scores)))
        self._scores = {piece: float(score) for piece, score in scores.items()}
        self._ids = {piece: index for index, piece in enumerate(self._pieces) if index}
        self._longest = max(map(len, self._scores))
        self._unknown_score = min(self._scores.values()) - UNKNOWN_PENALTY
        self._cache = {}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        max_piece_length: int = 16,
        num_iterations: int = 2,
        keep: float = 0.75,
        seed_size: int = 100_000,
    ) -> "UnigramTokenizer":
        """Learn a vocabulary of `vocab_size` pieces, <unk> among them, from an iterable of strings.

        The seed is every character and the `seed_size` substrings of words with the highest count times
        length. Then, until few enough are left: `num_iterations` of EM, and all but the share `keep` of the
        pieces are pruned, those whose loss lowers the likelihood least; characters stay. The vocabulary is
        smaller where the texts have too few substrings.

        Raises ValueError also where the characters alone are more than `vocab_size`.
        """
        for name, value in (
            ("vocab_size", vocab_size),
            ("num_iterations", num_iterations),
            ("max_piece_length", max_piece_length),
            ("seed_size", seed_size),
        ):
            check_positive(name, value)
        check_number("keep", keep)
        if not 0 < keep < 1:
            raise ValueError(f"keep must lie in (0, 1), got {keep}")
        if not 2 <= max_piece_length <= MAX_PIECE_LENGTH:
            raise ValueError(f"max_piece_length must lie in 2 … {MAX_PIECE_LENGTH}, got {max_piece_length}")
        words = Counter()
        for text in strings("texts", texts):
            words.update(_words(text))
        characters = set(chain.from_iterable(words))
        if not max(2, len(characters) + 1) <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must lie in {max(2, len(characters) + 1)} (<unk> and characters) … "
                f"{MAX_VOCAB_SIZE}, got {vocab_size}"
            )
        if not words:
            raise ValueError("texts must hold a word, got none")
        pieces = _seed(words, max_piece_length, seed_size)
        model = _Model(words, pieces)
        while True:
            for _ in range(num_iterations):
                model.improve()
            if model.size <= vocab_size - 1:
                return cls(model.scores())
            model.prune(max(vocab_size - 1, int(keep * model.size)))

    @property
    def vocab_size(self) -> int:
        """Number of pieces, <unk> among them."""
        return len(self._pieces)

    @property
    def pieces(self) -> tuple[str, ...]:
        """The pieces in the order of their ids."""
        return self._pieces

    @property
    def scores(self) -> dict[str, float]:
        """Piece → its log-probability, in a new dict, without <unk>."""
        return dict(self._scores)

    @property
    def unknown_id(self) -> int:
        """The id of <unk>."""
        return 0

    def encode(self, text: str) -> list[int]:
        """Ids of the most probable segmentation, a list of int; ties to the longer last piece.

        A run of characters that no piece spells is one <unk>. Raises ValueError if the string holds a lone
        surrogate.
        """
        words = _words(string("text", text))
        return self._to_ids(chain.from_iterable(map(self._best, words)))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each of an iterable of strings, a list of lists."""
        return [self.encode(text) for text in strings("texts", texts)]

    def sample(self, text: str, *, alpha: float = 1.0, generator: random.Random | None = None) -> list[int]:
        """Ids of a segmentation drawn with a probability proportional to P(segmentation)^alpha.

        At alpha 0 all segmentations are as likely; towards infinity only the best is left. The draw is exact:
        probabilities summed forward through the word, then pieces drawn from its end to its head.

        Args:
            generator: of random numbers, for a repeatable draw; None: the module `random`'s own.
        """
        string("text", text)
        check_number("alpha", alpha)
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be finite and at least 0, got {alpha}")
        if not isinstance(generator, (random.Random, type(None))):
            raise TypeError(f"generator must be a random.Random, got {type(generator).__name__}")
        draw = (generator or random).random
        return self._to_ids(chain.from_iterable(self._drawn(word, alpha, draw) for word in _words(text)))

    def score(self, ids: Sequence[int]) -> float:
        """Log-probability of a segmentation: the sum over its pieces, <unk> at its penalty."""
        ids = token_ids(ids, self.vocab_size)
        return math.fsum(self._scores[self._pieces[i]] if i else self._unknown_score for i in ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text that the ids spell, <unk> by name or left out; one space between words."""
        ids = token_ids(ids, self.vocab_size)
        if skip_special:
            ids = [index for index in ids if index]
        text = "".join(self._pieces[index] for index in ids)
        return text.removeprefix(SPACE).replace(SPACE, " ")

    def save(self, path: str | os.PathLike) -> None:
        """Write the vocabulary as JSON with a checksum; a save cut short leaves the old file whole."""
        content = {"format": _FORMAT, "version": _VERSION, "scores": list(self._scores.items())}
        atomic_write(path, sealed(content, "scores"))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "UnigramTokenizer":
        """Read a vocabulary that `save` wrote.

        Raises OSError if the file cannot be read, and ValueError, naming the file and the fault, if it is
        not whole, not consistent, or not of this format and version.
        """
        path = Path(path)
        try:
            scores = unsealed(read_json(path), _FORMAT, {_VERSION: ("scores",)})["scores"]
            if not isinstance(scores, list):
                raise ValueError("scores must be a list of pairs")
            found = dict(scores)
            if len(found) < len(scores):
                raise ValueError("scores must be distinct")
            return cls(found)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a whole UnigramTokenizer file: {error}") from None

    def __repr__(self):
        return f"UnigramTokenizer(vocab_size={self.vocab_size})"

    def _best(self, word, limit=100_000):
        """The pieces of the most probable segmentation; remembered, for at most `limit` words."""
        found = self._cache.get(word)
        if found is None:
            if len(self._cache) >= limit:
                self._cache.clear()
            found = self._cache[word] = _viterbi(word, self._arcs(word))
        return found

    def _drawn(self, word, alpha, draw):
        """Pieces of a segmentation drawn from its end: an arc by the mass of all paths that end with it."""
        arcs = self._arcs(word)
        forward = _forward(len(word), arcs, alpha)
        pieces, end = [], len(word)
        while end:
            starts, logs = zip(
                *((start, forward[start] + alpha * score) for start, score in arcs[end]), strict=True
            )
            start = starts[_draw(logs, draw)]
            pieces.append(word[start:end])
            end = start
        return pieces[::-1]

    def _arcs(self, word):
        return _arcs(word, self._scores, self._longest, self._unknown_score)

    def _to_ids(self, pieces):
        ids = []
        for piece in pieces:
            index = self._ids.get(piece, 0)
            if index or not ids or ids[-1]:
                ids.append(index)
        return ids


def expected_counts(words: Mapping[str, int], scores: Mapping[str, float]) -> dict[str, float]:
    """How often each piece occurs, expected over all segmentations of the words: the E-step.

    Args:
        words: word → its count in the corpus.
        scores: piece → log-probability, with every character of the words.
    """
    for name, value in (("words", words), ("scores", scores)):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping, got {type(value).__name__}")
    if missing := set(chain.from_iterable(words)) - scores.keys():
        raise ValueError(f"scores must have every character of the words, got none for {min(missing)!r}")
    if not any(words):
        return dict.fromkeys(scores, 0.0)
    names = list(scores)
    counts = np.array([words[word] for word in words], dtype=np.float64)
    log_p = np.array([scores[piece] for piece in names], dtype=np.float64)
    return dict(zip(names, _Lattice(words, names).expected_counts(log_p, counts).tolist(), strict=True))


class _Lattice:
    """Every place in which a piece fits into a word: arcs between the gaps of its characters, as flat arrays.

    Gaps are numbered by their distance from the head of their word, arcs ordered by the gap they end at. So
    the arcs that end at one distance are one slice, and every path to their starts is known before it.
    """

    def __init__(self, words, pieces):
        codes, tails = _codes(words)
        lengths = np.diff(tails, prepend=-1) - 1
        distance = np.arange(len(codes)) - np.repeat(tails - lengths, lengths + 1)
        places = np.argsort(distance, kind="stable")
        gaps = np.empty(len(codes), np.int32)
        gaps[places] = np.arange(len(codes))
        self.borders = np.cumsum(np.bincount(distance))
        self.tails = gaps[tails]
        starts, ends, found = _occurrences(codes, places[codes[places] < BORDER], pieces)
        order = np.argsort(gaps[ends], kind="stable")
        self._keep(gaps[starts[order]], gaps[ends[order]], found[order])

    def drop_whole_words(self):
        """Drop the arcs from the head to the tail of a word."""
        is_tail = np.zeros(self.borders[-1], bool)
        is_tail[self.tails] = True
        self._restrict((self.starts >= self.borders[0]) | ~is_tail[self.ends])

    def restrict(self, alive):
        """Drop the arcs of pieces that are not alive (bool, one for each piece)."""
        self._restrict(alive[self.pieces])

    def expected_counts(self, log_p, counts):
        """Posterior number of uses of each piece, each word `counts` times.

        Forward: the log of the sum over all paths to each gap, and the share of its last arc in that sum.
        Backward: the expected number of paths through each gap, split among the arcs that end there.
        """
        forward, shares = np.zeros(self.borders[-1]), np.empty(len(self.pieces))
        forward[self.borders[0] :] = -np.inf
        for arcs, firsts, sizes, gaps in self.levels:
            sums = forward[self.starts[arcs]] + log_p[self.pieces[arcs]]
            top = np.maximum(np.maximum.reduceat(sums, firsts), np.finfo(float).min)
            weights = np.exp(sums - np.repeat(top, sizes))
            total = np.add.reduceat(weights, firsts)  # at least 1, but 0 where no path has a probability
            shares[arcs] = weights / np.repeat(np.maximum(total, 1.0), sizes)
            with np.errstate(divide="ignore"):
                forward[gaps] = top + np.log(total)
        passing = np.zeros(self.borders[-1])
        passing[self.tails] = counts
        for arcs, _, sizes, gaps in reversed(self.levels):
            shares[arcs] *= np.repeat(passing[gaps], sizes)
            np.add.at(passing, self.starts[arcs], shares[arcs])
        return np.bincount(self.pieces, shares, len(log_p))

    def best(self, log_p):
        """Score of the best segmentation of each word; -inf where there is none."""
        best = np.zeros(self.borders[-1])
        best[self.borders[0] :] = -np.inf
        for arcs, firsts, _, gaps in self.levels:
            best[gaps] = np.maximum.reduceat(best[self.starts[arcs]] + log_p[self.pieces[arcs]], firsts)
        return best[self.tails]

    def _restrict(self, kept):
        kept = np.flatnonzero(kept)
        self._keep(self.starts[kept], self.ends[kept], self.pieces[kept])

    def _keep(self, starts, ends, pieces):
        """Hold these arcs. A level: its arcs; of each gap at its distance the first arc, and their number."""
        self.starts, self.ends, self.pieces = starts, ends, pieces
        firsts = np.flatnonzero(np.diff(ends, prepend=-1))
        gaps, firsts = ends[firsts], np.append(firsts, len(ends))
        self.levels = []
        for low, high in pairwise(np.searchsorted(gaps, self.borders).tolist()):
            if low < high:
                first, last = firsts[low], firsts[high]
                sizes = np.diff(firsts[low : high + 1])
                self.levels.append((slice(first, last), firsts[low:high] - first, sizes, gaps[low:high]))


class _Model:
    """The pieces in training: their log-probabilities, and the lattices of the corpus and of themselves."""

    def __init__(self, words, counts):
        self.pieces = list(counts)
        self.word_counts = np.array(list(words.values()), dtype=np.float64)
        self.corpus, self.themselves = _Lattice(words, self.pieces), _Lattice(self.pieces, self.pieces)
        self.themselves.drop_whole_words()
        self.is_character = np.array([len(piece) == 1 for piece in self.pieces])
        self.alive = np.ones(len(self.pieces), bool)
        self._normalise(np.array(list(counts.values()), dtype=np.float64))

    @property
    def size(self):
        return int(self.alive.sum())

    def improve(self):
        """One step of EM. A piece that is never used keeps a thousandth of a use."""
        self.counts = self.corpus.expected_counts(self.log_p, self.word_counts)
        self._normalise(np.maximum(self.counts, 1e-3))

    def prune(self, size):
        """Keep the characters and, `size` in all, the pieces without which the likelihood falls most.

        Without a piece, each of its uses becomes the best segmentation of the piece into others, whose
        probabilities are taken to stay: it loses count · (score of the piece − score of these).
        """
        others = self.themselves.best(self.log_p)
        loss = np.where(self.is_character, np.inf, -np.inf)
        judged = self.alive & ~self.is_character
        loss[judged] = self.counts[judged] * (self.log_p - others)[judged]
        self.alive[:] = False
        self.alive[np.argsort(-loss, kind="stable")[:size]] = True
        for lattice in (self.corpus, self.themselves):
            lattice.restrict(self.alive)
        self._normalise(np.exp(self.log_p))

    def scores(self):
        """Piece → log-probability, the most probable first."""
        found = {self.pieces[index]: float(self.log_p[index]) for index in np.flatnonzero(self.alive)}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def _normalise(self, weights):
        with np.errstate(divide="ignore"):
            self.log_p = np.log(np.where(self.alive, weights, 0.0)) - np.log(weights[self.alive].sum())


def _words(text):
    return [SPACE + word for word in text.replace(SPACE, " ").split()]


def _arcs(word, scores, longest, unknown_score):
    """For each end, the (start, score) of every piece that ends there; a character no piece spells is one."""
    arcs = [[] for _ in range(len(word) + 1)]
    for end in range(1, len(word) + 1):
        for start in range(max(0, end - longest), end):
            if (score := scores.get(word[start:end])) is not None:
                arcs[end].append((start, score))
        if word[end - 1] not in scores:
            arcs[end].append((end - 1, unknown_score))
    return arcs


def _viterbi(word, arcs):
    """The pieces of the path with the highest sum of scores."""
    best, back = [0.0], [0]
    for end in range(1, len(word) + 1):
        score, start = max(((best[start] + score, -start) for start, score in arcs[end]))
        best.append(score)
        back.append(-start)
    pieces, end = [], len(word)
    while end:
        pieces.append(word[back[end] : end])
        end = back[end]
    return pieces[::-1]


def _forward(length, arcs, alpha):
    """log of the sum of P^alpha over all paths to each position."""
    forward = [0.0]
    for end in range(1, length + 1):
        forward.append(_log_sum([forward[start] + alpha * score for start, score in arcs[end]]))
    return forward


def _log_sum(logs):
    top = max(logs)
    return top + math.log(math.fsum(math.exp(log - top) for log in logs))


def _draw(logs, draw):
    """An index drawn with a probability proportional to exp(log)."""
    top = max(logs)
    weights = [math.exp(log - top) for log in logs]
    left = draw() * sum(weights)
    for index, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return index
    return max(range(len(logs)), key=logs.__getitem__)


def _seed(words, max_piece_length, seed_size):
    """Characters with their counts, and the substrings with the highest count times length that recur.

    Substrings of n characters are numbered by those of n − 1 and the next character, where these recur.
    """
    text, (codes, tails) = END.join(words), _codes(words)
    word_counts = np.repeat(list(words.values()), np.diff(tails, prepend=-1))
    at = np.flatnonzero(codes < BORDER)
    number = np.zeros_like(at)
    characters, longer = {}, {}
    for length in range(1, max_piece_length + 1):
        inside = codes[at + length - 1] < BORDER
        at, number = at[inside], number[inside]
        keys = number * (BORDER + 1) + codes[at + length - 1]
        _, first, number = np.unique(keys, return_index=True, return_inverse=True)
        counts = np.bincount(number, word_counts[at]).astype(np.int64)
        recurs = counts > 1
        found = slice(None) if length == 1 else recurs
        (characters if length == 1 else longer).update(
            (text[start : start + length], length * count)
            for start, count in zip(at[first[found]].tolist(), counts[found].tolist(), strict=True)
        )
        at, number = at[recurs[number]], number[recurs[number]]
    best = sorted(sorted(longer), key=longer.get, reverse=True)[:seed_size]
    return characters | {piece: longer[piece] for piece in best}


def _codes(words):
    """The code points of all words, BORDER after each, and where these stand."""
    codes = np.frombuffer((END.join(words) + END).encode("utf-32-le"), np.uint32).astype(np.int64)
    tails = np.cumsum([len(word) + 1 for word in words]) - 1
    codes[tails] = BORDER
    return codes, tails


def _occurrences(codes, at, pieces):
    """Every place where a piece stands: its start, one of `at`, its end and the number of the piece.

    All starts walk down the pieces' tree together: `branches` are the pairs of a branch and a next character.
    """
    letters, ends = _codes(pieces)
    lengths = np.diff(ends, prepend=-1) - 1
    heads, alive = ends - lengths, np.flatnonzero(lengths)
    branch = np.zeros_like(alive)
    state, occurrences = np.zeros_like(at), []
    for length in range(1, int(lengths.max()) + 1):
        branches, branch = np.unique(
            branch * (BORDER + 1) + letters[heads[alive] + length - 1], return_inverse=True
        )
        keys = state * (BORDER + 1) + codes[at + length - 1]
        place = np.minimum(np.searchsorted(branches, keys), len(branches) - 1)
        fits = branches[place] == keys
        at, state = at[fits], place[fits]
        whole = lengths[alive] == length
        piece = np.full(len(branches), -1, np.int32)
        piece[branch[whole]] = alive[whole]
        here = piece[state] >= 0
        occurrences.append((at[here], at[here] + length, piece[state[here]]))
        alive, branch = alive[~whole], branch[~whole]
    return map(np.concatenate, zip(*occurrences, strict=True))


def _check_scores(scores):
    if not 0 < len(scores) < MAX_VOCAB_SIZE:
        raise ValueError(f"scores must have 1 to {MAX_VOCAB_SIZE - 1} pieces, got {len(scores)}")
    for piece, score in scores.items():
        string("scores", piece)
        if not 0 < len(piece) <= MAX_PIECE_LENGTH or SPACE in piece[1:] or piece == UNK:
            raise ValueError(
                f"scores must have pieces of 1 to {MAX_PIECE_LENGTH} characters, {SPACE} at the head only, "
                f"and no {UNK}, got {piece!r:.80}"
            )
        check_number(f"scores[{piece!r}]", score)
        if not math.isfinite(score):
            raise ValueError(f"scores[{piece!r}] must be finite, got {score}")
