"""How good a ranking is, how good an answer is, and how sure one can be of the difference.

Rankings are judged against a relevance: document → grade, in which a document that is not there, or has grade
0, is not relevant. Answers are judged by their words, after the normalisation of SQuAD (Rajpurkar et al.,
2016). Both kinds give one number a query; `bootstrap` and `compare` say what the queries' mean is worth
(Efron, 1979; Sakai, 2006).
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from companion._checks import check_choice, check_positive, check_probability

Relevance = Mapping[Hashable, int]

# ------------------------------------------------------------------------------------------------- rankings


def precision(ranking: Sequence[Hashable], relevance: Relevance, k: int) -> float:
    """The share of the first k places that hold a relevant document; an empty place holds none."""
    return sum(_gains(ranking, relevance, k)) / k


def recall(ranking: Sequence[Hashable], relevance: Relevance, k: int) -> float:
    """The share of the relevant documents that stand among the first k."""
    return sum(_gains(ranking, relevance, k)) / _count(relevance)


def reciprocal_rank(ranking: Sequence[Hashable], relevance: Relevance, k: int | None = None) -> float:
    """1 / the rank of the first relevant document; 0 where none is among the first k (all by default)."""
    _count(relevance)
    gains = _gains(ranking, relevance, k)
    return next((1 / rank for rank, gain in enumerate(gains, 1) if gain), 0.0)


def average_precision(ranking: Sequence[Hashable], relevance: Relevance, k: int | None = None) -> float:
    """The mean, over all relevant documents, of the precision at the rank of each; 0 for those not found."""
    gains = _gains(ranking, relevance, k)
    found = np.cumsum(gains)
    return sum(found[i] / (i + 1) for i, gain in enumerate(gains) if gain) / _count(relevance)


def ndcg(
    ranking: Sequence[Hashable], relevance: Relevance, k: int | None = None, *, gain: str = "linear"
) -> float:
    """Discounted cumulative gain over that of the best possible ranking (Järvelin & Kekäläinen, 2002).

    The document at rank r gives its gain / log₂(r + 1).

    Args:
        gain: "linear", the grade itself, as trec_eval has it; or "exponential", 2^grade − 1 (Burges et al.,
            2005), as web search and scikit-learn's users often have it. The same for grades 0 and 1.
    """
    check_choice("gain", gain, ("linear", "exponential"))
    _count(relevance)
    value = (lambda grade: 2**grade - 1) if gain == "exponential" else float
    grades = [max(relevance.get(document, 0), 0) for document in _first(ranking, k)]
    best = sorted((grade for grade in relevance.values() if grade > 0), reverse=True)[:k]
    return _discounted(map(value, grades)) / _discounted(map(value, best))


def score_rankings(
    rankings: Mapping[Hashable, Sequence[Hashable]],
    judgments: Mapping[Hashable, Relevance],
    metric: Callable[..., float],
    **options,
) -> np.ndarray:
    """A metric for each query of the judgments, in their order: (number of queries,).

    A query without a ranking has an empty one: what was not answered counts.
    """
    if unknown := [query for query in rankings if query not in judgments]:
        raise ValueError(f"rankings must be of queries that are judged, got {unknown[0]!r}")
    return np.array([metric(rankings.get(query, ()), judgments[query], **options) for query in judgments])


def _first(ranking: Sequence[Hashable], k: int | None) -> Sequence[Hashable]:
    if k is not None:
        check_positive("k", k)
    if len(set(ranking)) < len(ranking):
        raise ValueError("ranking must hold no document twice")
    return ranking[:k]


def _gains(ranking: Sequence[Hashable], relevance: Relevance, k: int | None) -> list[bool]:
    return [relevance.get(document, 0) > 0 for document in _first(ranking, k)]


def _count(relevance: Relevance) -> int:
    count = sum(grade > 0 for grade in relevance.values())
    if not count:
        raise ValueError("relevance must hold at least one relevant document, got none")
    return count


def _discounted(gains: Iterable[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


# -------------------------------------------------------------------------------------------------- answers

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower-case, without punctuation and the articles a, an, the, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 where the normalised answer equals one of the normalised truths, else 0."""
    return float(normalise(answer) in map(normalise, _truths(truths)))


def contains_answer(answer: str, truths: Sequence[str]) -> float:
    """1 where the words of a truth stand, in a row, in the answer, else 0: what chat models are judged by."""
    padded = f" {normalise(answer)} "
    return float(any(f" {normalise(truth)} " in padded for truth in _truths(truths)))


def token_f1(answer: str, truths: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the answer's words, for the truth that gives most."""
    return max(_overlap(normalise(answer).split(), normalise(truth).split()) for truth in _truths(truths))


def _truths(truths: Sequence[str]) -> Sequence[str]:
    if isinstance(truths, str):
        raise TypeError("truths must be a sequence of strings, got one str")
    if not truths:
        raise ValueError("truths must hold at least one accepted answer, got none")
    return truths


def _overlap(answer: list[str], truth: list[str]) -> float:
    if not answer or not truth:
        return float(answer == truth)
    common = sum((Counter(answer) & Counter(truth)).values())
    return 2 * common / (len(answer) + len(truth))


# -------------------------------------------------------------------------------------------------- certainty


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: of the queries.
        low, high: bounds of the interval.
        p: of a difference, how probable one so far from 0 is if there is none; None for a single mean.
    """

    mean: float
    low: float
    high: float
    p: float | None = None

    def __str__(self) -> str:
        p = "" if self.p is None else f", p = {self.p:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]{p}"


def bootstrap(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """The mean of one number a query, and the interval of the means of resampled queries (percentiles).

    Args:
        values: one for each query, at least two.
        level: share of the resampled means inside the interval, in (0, 1).
        resamples: how often as many queries are drawn, with replacement.
    """
    values = _values("values", values)
    means = _resample(values, resamples, seed)
    low, high = _percentiles(means, level)
    return Estimate(float(values.mean()), low, high)


def compare(
    first: Sequence[float],
    second: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """The mean of first − second over the same queries, its interval, and the p-value of no difference.

    The interval resamples the queries' differences; the p-value flips their signs at random (a paired
    randomisation test, two-sided), and is never below 1 / (resamples + 1).
    """
    first, second = _values("first", first), _values("second", second)
    if first.shape != second.shape:
        raise ValueError(f"second must have as many values as first, {len(first)}, got {len(second)}")
    difference = first - second
    low, high = _percentiles(_resample(difference, resamples, seed), level)
    random = np.random.default_rng([seed, 1])
    size = max(1, 2**22 // len(difference))
    flipped = np.concatenate(
        [
            (random.integers(0, 2, (min(size, resamples - start), len(difference))) * 2 - 1) @ difference
            for start in range(0, resamples, size)
        ]
    )
    extreme = np.count_nonzero(np.abs(flipped) >= abs(difference.sum()) - 1e-9)
    return Estimate(float(difference.mean()), low, high, (extreme + 1) / (resamples + 1))


def _values(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{name} must be a sequence of at least two numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    return array


def _resample(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    check_positive("resamples", resamples)
    random, n = np.random.default_rng(seed), len(values)
    size = max(1, 2**22 // n)  # no more than 32 MiB of indices at a time
    return np.concatenate(
        [
            values[random.integers(0, n, (min(size, resamples - start), n))].mean(1)
            for start in range(0, resamples, size)
        ]
    )


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    check_probability("level", level)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
