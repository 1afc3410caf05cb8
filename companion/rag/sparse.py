"""Sparse retrieval: TF-IDF (Spärck Jones, 1972) and BM25 (Robertson & Zaragoza, 2009) on an inverted index.

A text becomes a bag of terms. The index turns the collection round: for each term the documents that hold it,
with the weight the term gives them, computed once. A query adds up the weights of its own terms' documents
and never touches the others.

BM25 names a family. With tf the term's count in a document of length l, ℓ the mean length, df the documents
that hold the term, N all of them, and norm = k₁ (1 − b + b l / ℓ), a term gives idf · gain::

    variant    idf                                      gain
    robertson  ln((N − df + ½) / (df + ½))              tf / (tf + norm)            the model of 1994
    okapi      the same; a negative one is ε · mean     (k₁ + 1) tf / (tf + norm)   rank-bm25
    lucene     ln(1 + (N − df + ½) / (df + ½))          tf / (tf + norm)            Lucene 8, bm25s
    atire      ln(N / df)                               (k₁ + 1) tf / (tf + norm)   ATIRE
    bm25+      ln((N + 1) / df)                         δ + (k₁ + 1) tf / (tf + norm)

The factor k₁ + 1 scales all scores alike and changes no ranking. A negative idf, of a term that more than
half of the documents hold, makes a document worse for holding a word of the query: hence the repairs. The
lower bound δ (Lv & Zhai, 2011) is for documents that hold the term, so that even a very long one gains.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from companion._checks import check_choice, check_number, check_positive

Analyser = Callable[[str], list[str]]
VARIANTS = ("robertson", "okapi", "lucene", "atire", "bm25+")
EPSILON = 0.25  # rank-bm25's share of the mean idf that replaces a negative one

# ------------------------------------------------------------------------------------------------- analysers

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]+")
STOP_WORDS = frozenset(  # Lucene's list for English
    re.findall(
        r"\w+",
        "a an and are as at be but by for if in into is it no not of on or such that the their then there "
        "these they this to was will with",
    )
)


def analyse_words(text: str) -> list[str]:
    """The words of a text, lower-case: letters and digits of any script, with an apostrophe inside."""
    return WORD.findall(text.lower())


def analyse_english(text: str) -> list[str]:
    """The words of an English text without stop words and endings: what Lucene's English analyser keeps.

    Endings go by Porter's second algorithm (Snowball); `pip install snowballstemmer` provides it.
    """
    words = (word.replace("’", "'").removesuffix("'s") for word in analyse_words(text))
    return [_stem(word) for word in words if word not in STOP_WORDS]


def analyse_chinese(text: str) -> list[str]:
    """Chinese characters by overlapping pairs, as Lucene's CJK analyser has them; other words as they are.

    A run of one character is a term by itself. Pairs need no dictionary: 中华人民 gives 中华, 华人, 人民.
    """
    terms, place = [], 0
    for run in HAN.finditer(text):
        terms += analyse_words(text[place : run.start()])
        characters, place = run.group(), run.end()
        terms += [characters[i : i + 2] for i in range(max(1, len(characters) - 1))]
    return terms + analyse_words(text[place:])


@lru_cache(maxsize=2**17)
def _stem(word: str) -> str:
    return _stemmer().stemWord(word)


@lru_cache(maxsize=1)
def _stemmer():
    try:
        import snowballstemmer
    except ImportError as error:
        raise ImportError(
            "analyse_english needs snowballstemmer: run `pip install snowballstemmer`"
        ) from error
    return snowballstemmer.stemmer("english")


# ---------------------------------------------------------------------------------------------------- index


@dataclass(frozen=True)
class InvertedIndex:
    """For each term, the documents that hold it and how often.

    Attributes:
        terms: term → its row t in `offsets`.
        offsets: (T + 1,): the postings of term t stand in places offsets[t] … offsets[t + 1] − 1.
        documents: row of the document of each posting, ascending within a term; int32.
        counts: how often the term stands in it; int32.
        lengths: number of terms of each of the N documents, repeated ones counted.
    """

    terms: dict[str, int]
    offsets: np.ndarray
    documents: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def build(cls, texts: Sequence[str], analyse: Analyser = analyse_english) -> "InvertedIndex":
        """Count the terms of at least one text."""
        _check_texts(texts)
        terms: dict[str, int] = {}
        number = terms.setdefault
        rows = [[number(term, len(terms)) for term in analyse(text)] for text in texts]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = np.fromiter((term for row in rows for term in row), np.int64, int(lengths.sum()))
        # One sort by (term, document) brings equal pairs together and the postings into their order.
        keys = flat * len(rows) + np.repeat(np.arange(len(rows)), lengths)
        keys.sort()
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.diff(first, append=len(keys))
        term, document = np.divmod(keys[first], len(rows))
        offsets = np.searchsorted(term, np.arange(len(terms) + 1))
        return cls(terms, offsets, document.astype(np.int32), counts.astype(np.int32), lengths)

    @cached_property
    def document_counts(self) -> np.ndarray:
        """In how many documents each term stands, (T,)."""
        return np.diff(self.offsets)

    def postings(self, term: str) -> tuple[np.ndarray, np.ndarray]:
        """The documents that hold a term, and how often; both empty for a term that none holds."""
        place = self._places(term)
        return self.documents[place], self.counts[place]

    def _places(self, term: str) -> slice:
        row = self.terms.get(term)
        return slice(0, 0) if row is None else slice(self.offsets[row], self.offsets[row + 1])


class _WeightedIndex:
    """Scores by weights that are stored beside the postings. Subclasses say what a posting weighs."""

    def __init__(self, texts: Sequence[str], analyse: Analyser):
        self.analyse = analyse
        self.index = InvertedIndex.build(texts, analyse)
        self._weights = np.empty(0)

    def __len__(self) -> int:
        """The number of documents, N."""
        return len(self.index.lengths)

    def scores(self, query: str) -> np.ndarray:
        """The score of every document, (N,) float64; 0 where it shares no term with the query."""
        if not isinstance(query, str):
            raise TypeError(f"query must be a str, got {type(query).__name__}")
        total = np.zeros(len(self))
        for term, weight in self._query(self.analyse(query)).items():
            places = self.index._places(term)
            total[self.index.documents[places]] += weight * self._weights[places]
        return total

    def search(self, queries: str | Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k documents of the highest score, the best first; of equals, the lower row first.

        A document that scores 0 is no result: the places left over have row −1 and score −∞.

        Args:
            queries: one text, or q of them.

        Returns:
            scores float32 and rows int64, both (k,) for one text and (q, k) for several.
        """
        check_positive("k", k)
        if isinstance(queries, str):
            scores, rows = self.search([queries], k)
            return scores[0], rows[0]
        best = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        for i, query in enumerate(queries):
            scores = self.scores(query)
            chosen = _best(scores, k)
            best[i, : len(chosen)], rows[i, : len(chosen)] = scores[chosen], chosen
        return best, rows

    def _query(self, terms: list[str]) -> dict[str, float]:
        """What each different term of the query counts: how often it stands there."""
        counts: dict[str, float] = {}
        for term in terms:
            counts[term] = counts.get(term, 0) + 1
        return counts


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k highest scores that are not 0, the best first, the lower row first among equals."""
    found = np.flatnonzero(scores)
    if len(found) > k:
        values = scores[found]
        found = found[values >= np.partition(values, len(values) - k)[len(values) - k]]
    return found[np.lexsort((found, -scores[found]))][:k]


class BM25(_WeightedIndex):
    """A collection searched by BM25; the module's table says what the variants are.

    Args:
        texts: at least one document.
        variant: "robertson", "okapi", "lucene", "atire" or "bm25+".
        k1: how slowly repetition saturates, at least 0; at 0 a term counts once.
        b: how much long documents are held back, in [0, 1].
        delta: of bm25+, what a term gives at least to a document that holds it, at least 0.
        analyse: from a text to its terms, of documents and queries alike.

    A term that the query repeats counts as often.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        variant: str = "lucene",
        k1: float = 1.5,
        b: float = 0.75,
        delta: float = 1.0,
        analyse: Analyser = analyse_english,
    ):
        check_choice("variant", variant, VARIANTS)
        _check_at_least_zero("k1", k1)
        _check_at_least_zero("delta", delta)
        _check_at_least_zero("b", b)
        if b > 1:
            raise ValueError(f"b must lie in [0, 1], got {b}")
        super().__init__(texts, analyse)
        self.variant = variant
        index = self.index
        mean_length = max(index.lengths.mean(), 1e-12)
        norm = k1 * (1 - b + b * index.lengths / mean_length)
        gain = index.counts / (index.counts + norm[index.documents])
        if variant in ("okapi", "atire", "bm25+"):
            gain *= k1 + 1
        if variant == "bm25+":
            gain += delta
        self._weights = np.repeat(self.idf, index.document_counts) * gain

    @cached_property
    def idf(self) -> np.ndarray:
        """How much a term weighs for being rare, (T,), in the order of `index.terms`."""
        df, n = self.index.document_counts, len(self)
        if self.variant == "atire":
            return np.log(n / df)
        if self.variant == "bm25+":
            return np.log((n + 1) / df)
        odds = (n - df + 0.5) / (df + 0.5)
        if self.variant == "lucene":
            return np.log1p(odds)
        idf = np.log(odds)
        return np.where(idf < 0, EPSILON * idf.mean(), idf) if self.variant == "okapi" and len(idf) else idf


class TFIDF(_WeightedIndex):
    """A collection searched by the cosine between TF-IDF vectors.

    A term's weight in a text is its count times its idf; vectors have length 1, so scores lie in [0, 1]. ::

        textbook    idf = ln(N / df), 0 for a term that stands everywhere
        sklearn     idf = ln((1 + N) / (1 + df)) + 1, as scikit-learn's TfidfVectorizer has it

    Args:
        texts: at least one document.
        variant: "textbook" or "sklearn".
        analyse: from a text to its terms.
    """

    def __init__(
        self, texts: Sequence[str], *, variant: str = "sklearn", analyse: Analyser = analyse_english
    ):
        check_choice("variant", variant, ("textbook", "sklearn"))
        super().__init__(texts, analyse)
        self.variant = variant
        index = self.index
        weights = np.repeat(self.idf, index.document_counts) * index.counts
        lengths = np.sqrt(np.bincount(index.documents, weights**2, minlength=len(self)))
        self._weights = weights / np.where(lengths, lengths, 1)[index.documents]

    @cached_property
    def idf(self) -> np.ndarray:
        """How much a term weighs for being rare, (T,), in the order of `index.terms`."""
        df, n = self.index.document_counts, len(self)
        return np.log(n / df) if self.variant == "textbook" else np.log((1 + n) / (1 + df)) + 1

    def _query(self, terms: list[str]) -> dict[str, float]:
        """The query's own vector, of length 1: terms that no document holds have no idf and no part in it."""
        known = {term: count for term, count in super()._query(terms).items() if term in self.index.terms}
        weights = {term: count * float(self.idf[self.index.terms[term]]) for term, count in known.items()}
        length = math.sqrt(sum(weight**2 for weight in weights.values()))
        return {term: weight / length for term, weight in weights.items()} if length else {}


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"texts must be a sequence of str, got {type(texts).__name__}")
    if not texts:
        raise ValueError("texts must hold at least one text, got none")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] must be a str, got {type(text).__name__}")


def _check_at_least_zero(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
