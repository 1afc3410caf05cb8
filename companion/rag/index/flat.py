"""The exact index: compare the query with every vector."""

import numpy as np

from companion.rag.index._base import BLOCK, VectorIndex, best, check_shape


class FlatIndex(VectorIndex):
    """All vectors as they are, all compared, none missed: N distances of d multiplications a query.

    What faiss calls IndexFlatIP and IndexFlatL2, and what sqlite-vec does.
    """

    def __init__(self, dimension: int, *, metric: str = "ip"):
        super().__init__(dimension, metric=metric)
        self._restore({"vectors": np.empty((0, dimension), np.float32)})

    def _add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        self._ids = np.concatenate((self._ids, ids))
        self._restore({"vectors": np.concatenate((self._stored, vectors))})

    def _delete(self, gone: np.ndarray) -> None:
        self._ids = self._ids[~gone]
        self._restore({"vectors": self._stored[~gone]})

    def _search(self, queries, scores, rows, mask) -> None:
        candidates = np.arange(len(self._ids)) if mask is None else np.flatnonzero(mask)
        vectors, bias = (
            (self._stored, self._biases)
            if mask is None
            else (self._stored[candidates], self._biases[candidates])
        )
        self.distance_count += len(queries) * len(candidates)
        block = max(1, BLOCK // len(candidates))
        for start in range(0, len(queries), block):
            all_scores = queries[start : start + block] @ vectors.T - bias
            for i, row in enumerate(all_scores, start):
                chosen = best(row, scores.shape[1])
                scores[i, : len(chosen)], rows[i, : len(chosen)] = row[chosen], candidates[chosen]

    def _state(self) -> dict[str, np.ndarray]:
        return {"vectors": self._stored}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self._stored = check_shape("vectors", state["vectors"], (len(self._ids), self.dimension), np.float32)
        self._biases = self._bias(self._stored)
