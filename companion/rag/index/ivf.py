"""Inverted lists: cluster the vectors, and look into the clusters near the query (Jégou et al., 2011)."""

import numpy as np

from companion._checks import check_positive
from companion.rag.index._base import VectorIndex, best, check_shape

CACHED = 2**17  # scores of vectors and centres held at a time: they stay in the cache


def kmeans(vectors: np.ndarray, clusters: int, *, iterations: int = 20, seed: int = 0) -> np.ndarray:
    """Centres by Lloyd's algorithm: assign every vector to the nearest, move each to its mean, repeat.

    Args:
        vectors: (n, d) float32.
        clusters: number of centres, at most n.
        iterations: rounds at most; it ends earlier when no assignment changes.
        seed: draws the vectors that are the first centres.

    Returns: (clusters, d) float32. A cluster that runs empty starts again at the vector farthest from its own
    centre.
    """
    check_positive("clusters", clusters)
    check_positive("iterations", iterations)
    if clusters > len(vectors):
        raise ValueError(f"clusters must be at most {len(vectors)}, the number of vectors, got {clusters}")
    centres = vectors[np.sort(np.random.default_rng(seed).choice(len(vectors), clusters, replace=False))]
    assigned = np.full(len(vectors), -1)
    for _ in range(iterations):
        before, (assigned, scores) = assigned, nearest(vectors, centres)
        if (before == assigned).all():
            break
        order = np.argsort(assigned, kind="stable")
        sizes = np.bincount(assigned, minlength=clusters)
        sums = np.zeros_like(centres, dtype=np.float64)
        filled = np.flatnonzero(sizes)
        starts = (np.cumsum(sizes) - sizes)[filled]
        sums[filled] = np.add.reduceat(vectors[order].astype(np.float64), starts)
        centres = (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
        if empty := clusters - len(filled):
            distance = np.square(vectors).sum(1) / 2 - scores
            centres[sizes == 0] = vectors[np.argsort(-distance, kind="stable")[:empty]]
    return centres


def nearest(vectors: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Euclidean-nearest centre of each vector and its score v · c − ½‖c‖²: (n,) and (n,)."""
    bias = np.square(centres).sum(1) / 2
    assigned, scores = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    block = max(1, CACHED // len(centres))
    for start in range(0, len(vectors), block):
        part = vectors[start : start + block] @ centres.T
        part -= bias
        best_here = part.argmax(1)
        assigned[start : start + block] = best_here
        scores[start : start + block] = part[np.arange(len(part)), best_here]
    return assigned, scores


class IVFIndex(VectorIndex):
    """Vectors in lists by their nearest centre, of which a query looks into the `probes` nearest.

    Args:
        dimension, metric: as in `VectorIndex`.
        lists: number of clusters; √N to 4√N is usual.
        probes: how many lists a query reads; with all of them the search is exact. May be set later.
        seed: of the clustering.

    `train` needs a sample of the vectors before any are added. The query is compared with all centres first.
    """

    parameters = ("lists", "probes", "seed")

    def __init__(
        self, dimension: int, *, metric: str = "ip", lists: int = 64, probes: int = 4, seed: int = 0
    ):
        super().__init__(dimension, metric=metric)
        check_positive("lists", lists)
        check_positive("probes", probes)
        self.lists, self.probes, self.seed = lists, probes, seed
        self._centres = np.empty((0, dimension), np.float32)
        self._set(np.empty((0, dimension), np.float32), np.empty(0, np.int64))

    def train(self, vectors) -> None:
        """Find the centres, from at least as many vectors as there are lists."""
        if len(self):
            raise ValueError("the index holds vectors already, assigned to other centres")
        self._centres = kmeans(self._vectors("vectors", vectors), self.lists, seed=self.seed)

    def _add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        if not len(self._centres):
            raise ValueError("the index must be trained before vectors are added: call train")
        self._ids = np.concatenate((self._ids, ids))
        assigned = np.concatenate((self._assigned, nearest(vectors, self._centres)[0]))
        self._set(np.concatenate((self._stored, vectors)), assigned)

    def _delete(self, gone: np.ndarray) -> None:
        self._ids = self._ids[~gone]
        self._set(self._stored[~gone], self._assigned[~gone])

    def _set(self, stored: np.ndarray, assigned: np.ndarray) -> None:
        """Keep the vectors list by list, so that a list is a slice."""
        order = np.argsort(assigned, kind="stable")
        self._stored, self._assigned, self._ids = stored[order], assigned[order], self._ids[order]
        self._offsets = np.searchsorted(self._assigned, np.arange(self.lists + 1))
        self._biases = self._bias(self._stored)

    def _search(self, queries, scores, rows, mask) -> None:
        to_centres = queries @ self._centres.T - np.square(self._centres).sum(1) / 2
        self.distance_count += to_centres.size
        for i, (query, near) in enumerate(zip(queries, to_centres, strict=True)):
            found, places = [], []
            for chosen in best(near, self.probes):
                place = slice(self._offsets[chosen], self._offsets[chosen + 1])
                inside = np.arange(place.start, place.stop)
                if mask is not None:
                    inside = inside[mask[place]]
                    place = inside
                found.append(self._stored[place] @ query - self._biases[place])
                places.append(inside)
            found, places = np.concatenate(found), np.concatenate(places)
            self.distance_count += len(found)
            chosen = best(found, scores.shape[1])
            scores[i, : len(chosen)], rows[i, : len(chosen)] = found[chosen], places[chosen]

    def _state(self) -> dict[str, np.ndarray]:
        return {"vectors": self._stored, "assigned": self._assigned, "centres": self._centres}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        vectors = check_shape("vectors", state["vectors"], (len(self._ids), self.dimension), np.float32)
        assigned = check_shape("assigned", state["assigned"], (len(vectors),), np.int64)
        self._centres = check_shape("centres", state["centres"], (None, self.dimension), np.float32)
        if len(self._centres) not in (0, self.lists) or (len(vectors) and not len(self._centres)):
            raise ValueError(f"centres must be {self.lists}, got {len(self._centres)}")
        if len(assigned) and not 0 <= assigned.min() <= assigned.max() < self.lists:
            raise ValueError(f"assigned must lie in 0 … {self.lists - 1}")
        self._set(vectors, assigned)
