"""Several rankings as one, and one ranking with less repetition.

Reciprocal rank fusion (Cormack, Clarke & Büttcher, 2009) sees ranks alone, so that scores on different scales
need no calibration. Weighted fusion adds scores, which must be brought to one scale first (Fox & Shaw, 1994,
call the unweighted sum CombSUM). Maximal marginal relevance (Carbonell & Goldstein, 1998) picks results that
are near the query and not near one another.
"""

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from companion._checks import check_choice, check_number, check_positive


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[Hashable]], *, k: float = 60, weights: Sequence[float] | None = None
) -> list[tuple[Hashable, float]]:
    """Documents by Σ w / (k + rank) over the rankings that hold them, the best first.

    Args:
        rankings: each without repetition, the best first; ranks begin at 1.
        k: at least 0. The larger it is, the less the first places stand out and the more it counts to be in
            many lists; 60 is the paper's.
        weights: of the rankings; 1 where it is None.

    Equal scores keep the order in which documents are first met, list by list.
    """
    check_number("k", k)
    if not 0 <= k < math.inf:
        raise ValueError(f"k must be at least 0 and finite, got {k}")
    scores: dict[Hashable, float] = {}
    for i, (ranking, weight) in enumerate(zip(rankings, _weights(weights, len(rankings)), strict=True)):
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"rankings[{i}] must hold no document twice")
        for rank, document in enumerate(ranking, 1):
            scores[document] = scores.get(document, 0.0) + weight / (k + rank)
    return _sorted(scores)


def weighted_fusion(
    scores: Sequence[Mapping[Hashable, float]],
    *,
    weights: Sequence[float] | None = None,
    normalise: str = "minmax",
) -> list[tuple[Hashable, float]]:
    """Documents by the weighted sum of their normalised scores, the best first.

    Args:
        scores: of each system, document → score, larger is better. A document that a system does not name
            gets that system's lowest normalised score.
        weights: of the systems; 1 where it is None.
        normalise: "minmax", to [0, 1]; "zscore", to mean 0 and standard deviation 1; "none". Scores that are
            all equal become 0.
    """
    check_choice("normalise", normalise, ("minmax", "zscore", "none"))
    total: dict[Hashable, float] = dict.fromkeys((document for system in scores for document in system), 0.0)
    for i, (system, weight) in enumerate(zip(scores, _weights(weights, len(scores)), strict=True)):
        values = np.fromiter(system.values(), float, len(system))
        if not np.isfinite(values).all():
            raise ValueError(f"scores[{i}] must be finite")
        if not len(values):
            continue
        shift, scale = _scale(values, normalise)
        weighted = weight * ((values - shift) / scale)
        lowest = float(weight * ((values.min() - shift) / scale))
        share = dict(zip(system, weighted.tolist(), strict=True)).get
        total = {document: value + share(document, lowest) for document, value in total.items()}
    return _sorted(total)


def maximal_marginal_relevance(
    query: np.ndarray, vectors: np.ndarray, k: int, *, trade_off: float = 0.5
) -> np.ndarray:
    """Rows of k vectors, each the one that maximises λ cos(q, d) − (1 − λ) max cos(d, already chosen).

    Args:
        query: (d,). vectors: (n, d), the candidates: usually some dozens that a search found.
        k: how many, at most n are returned.
        trade_off: λ, from 0, difference alone, to 1, relevance alone: then the order is that of the cosines.

    Returns: (min(k, n),) int64, in the order of choice.
    """
    check_positive("k", k)
    check_number("trade_off", trade_off)
    if not 0 <= trade_off <= 1:
        raise ValueError(f"trade_off must lie in [0, 1], got {trade_off}")
    query, vectors = np.asarray(query, np.float64), np.asarray(vectors, np.float64)
    if query.ndim != 1 or vectors.ndim != 2 or vectors.shape[1] != len(query):
        need = f"query (d,) and vectors (n, d) must agree, got {query.shape} and {vectors.shape}"
        raise ValueError(need)
    query, vectors = _unit(query), _unit(vectors)
    relevance, repeated = vectors @ query, np.zeros(len(vectors))
    open_, chosen = np.ones(len(vectors), bool), []
    while open_.any() and len(chosen) < k:
        gain = trade_off * relevance - (1 - trade_off) * repeated
        best = int(np.where(open_, gain, -np.inf).argmax())
        to_best = vectors @ vectors[best]
        repeated = np.maximum(repeated, to_best) if chosen else to_best
        open_[best] = False
        chosen.append(best)
    return np.array(chosen, np.int64)


def _weights(weights: Sequence[float] | None, number: int) -> Sequence[float]:
    if weights is None:
        return [1.0] * number
    if len(weights) != number:
        raise ValueError(f"weights must be {number}, one for each list, got {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError("weights must be finite")
    return weights


def _scale(values: np.ndarray, normalise: str) -> tuple[float, float]:
    if normalise == "none":
        return 0.0, 1.0
    shift, scale = (values.min(), np.ptp(values)) if normalise == "minmax" else (values.mean(), values.std())
    return float(shift), float(scale) or 1.0


def _sorted(scores: dict[Hashable, float]) -> list[tuple[Hashable, float]]:
    return sorted(scores.items(), key=lambda item: -item[1])


def _unit(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    if not lengths.all():
        raise ValueError("vectors must not be zero: a zero vector has no direction")
    return x / lengths
