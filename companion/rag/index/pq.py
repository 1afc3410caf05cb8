"""Product quantisation: a vector as a few bytes, each a centroid's number (Jégou, Douze & Schmid, 2011)."""

import numpy as np

from companion._checks import check_positive
from companion.rag.index._base import VectorIndex, best, check_shape
from companion.rag.index.ivf import kmeans, nearest


class ProductQuantiser:
    """Cut vectors into m pieces; replace each by the nearest of 256 centroids learned for its place.

    m bytes tell 256ᵐ vectors apart: 48 of them stand for 384 float32 numbers, which are 1,536 bytes.

    Args:
        dimension: d, a multiple of `pieces`.
        pieces: m, bytes of a code.
        seed: of the clustering.
    """

    CENTROIDS = 256

    def __init__(self, dimension: int, pieces: int, *, seed: int = 0):
        check_positive("dimension", dimension)
        check_positive("pieces", pieces)
        if dimension % pieces:
            raise ValueError(f"pieces must divide dimension {dimension}, got {pieces}")
        self.dimension, self.pieces, self.seed = dimension, pieces, seed
        self.centroids = np.empty((pieces, 0, dimension // pieces), np.float32)  # (m, 256, d / m)

    @property
    def is_trained(self) -> bool:
        """Whether `train` has found the centroids."""
        return self.centroids.shape[1] > 0

    def train(self, vectors: np.ndarray) -> None:
        """Learn the centroids by k-means, from at least 256 vectors (n, d); some thousands are better."""
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ValueError(f"vectors must have shape (n, {self.dimension}), got {vectors.shape}")
        parts = self._split(np.asarray(vectors, np.float32))
        self.centroids = np.stack([kmeans(part, self.CENTROIDS, seed=self.seed) for part in parts])

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors (n, d) as codes (n, m), uint8."""
        self._check_trained()
        parts = self._split(vectors)
        columns = [nearest(part, centroids)[0] for part, centroids in zip(parts, self.centroids, strict=True)]
        return np.stack(columns, 1).astype(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The vectors that codes (n, m) stand for, (n, d) float32."""
        self._check_trained()
        return np.concatenate([self.centroids[j][codes[:, j]] for j in range(self.pieces)], 1)

    def tables(self, query: np.ndarray, *, euclidean: bool) -> np.ndarray:
        """What each centroid adds to a vector's score for one query (d,): (m, 256) float32.

        The sum of a code's m entries is q · x̂ of the vector x̂ it stands for, minus ½‖x̂‖² where `euclidean`:
        m additions instead of d multiplications. The query itself stays as it is.
        """
        self._check_trained()
        table = np.einsum("mcp,mp->mc", self.centroids, query.reshape(self.pieces, -1))
        return table - np.square(self.centroids).sum(2) / 2 if euclidean else table

    def _split(self, vectors: np.ndarray) -> list[np.ndarray]:
        return [np.ascontiguousarray(part) for part in np.split(vectors, self.pieces, axis=1)]

    def _check_trained(self) -> None:
        if not self.is_trained:
            raise ValueError("the quantiser must be trained first: call train")


class PQIndex(VectorIndex):
    """Codes of m bytes in place of vectors; every code is scored, by table look-ups.

    Args:
        dimension, metric: as in `VectorIndex`; the dimension is a multiple of `pieces`.
        pieces: m, bytes a vector. d/8 is 32 times smaller than float32.
        seed: of the clustering.

    Scores are those of the vectors that the codes stand for, which are near the ones added, not equal.
    """

    parameters = ("pieces", "seed")

    def __init__(self, dimension: int, *, metric: str = "ip", pieces: int = 8, seed: int = 0):
        super().__init__(dimension, metric=metric)
        self.quantiser = ProductQuantiser(dimension, pieces, seed=seed)
        self.pieces, self.seed = pieces, seed
        self._codes = np.empty((pieces, 0), np.uint8)  # (m, N): a piece of all vectors is a row

    def train(self, vectors) -> None:
        """Learn the centroids from at least 256 vectors."""
        if len(self):
            raise ValueError("the index holds codes already, of other centroids")
        self.quantiser.train(self._vectors("vectors", vectors))

    def _add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        codes = self.quantiser.encode(vectors)
        self._ids = np.concatenate((self._ids, ids))
        self._codes = np.concatenate((self._codes, codes.T), 1)

    def _delete(self, gone: np.ndarray) -> None:
        self._ids, self._codes = self._ids[~gone], np.ascontiguousarray(self._codes[:, ~gone])

    def _search(self, queries, scores, rows, mask) -> None:
        candidates = np.arange(len(self._ids)) if mask is None else np.flatnonzero(mask)
        codes = self._codes if mask is None else self._codes[:, candidates]
        self.distance_count += len(queries) * len(candidates)
        for i, query in enumerate(queries):
            found = np.zeros(len(candidates), np.float32)
            for entries, column in zip(
                self.quantiser.tables(query, euclidean=self.metric == "l2"), codes, strict=True
            ):
                found += entries[column]
            chosen = best(found, scores.shape[1])
            scores[i, : len(chosen)], rows[i, : len(chosen)] = found[chosen], candidates[chosen]

    def _state(self) -> dict[str, np.ndarray]:
        return {"codes": self._codes, "centroids": self.quantiser.centroids}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self._codes = check_shape("codes", state["codes"], (self.pieces, len(self._ids)), np.uint8)
        centroids = state["centroids"]
        shape = (self.pieces, None, self.dimension // self.pieces)
        check_shape("centroids", centroids, shape, np.float32)
        if centroids.shape[1] not in (0, self.quantiser.CENTROIDS) or (
            len(self._ids) and not centroids.shape[1]
        ):
            raise ValueError(
                f"centroids must be {self.quantiser.CENTROIDS} a piece, got {centroids.shape[1]}"
            )
        self.quantiser.centroids = centroids
