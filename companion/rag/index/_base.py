"""What all vector indexes share: their metrics, ids, filters and files.

Inside, every metric is a score q · x − b that is larger for nearer vectors: b is 0 for the inner product and
for the cosine, whose vectors are scaled to length 1, and ½‖x‖² for the Euclidean distance, for
−½‖q − x‖² = q · x − ½‖x‖² − ½‖q‖², and the last term is the same for all x.
"""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from companion._checks import check_choice, check_positive
from companion._io import atomic_write

VERSION = 1
METRICS = ("ip", "l2", "cosine")
BLOCK = 2**22  # scores held at a time


class VectorIndex:
    """Vectors under ids, and the k nearest of them to a query.

    Args:
        dimension: d, the length of a vector.
        metric: "ip", the inner product; "cosine"; or "l2", the Euclidean distance.

    Attributes:
        distance_count: how many query–vector pairs have been compared in searches so far.
    """

    parameters: tuple[str, ...] = ()  # further arguments of a subclass, each an attribute of the same name

    def __init__(self, dimension: int, *, metric: str = "ip"):
        check_positive("dimension", dimension)
        check_choice("metric", metric, METRICS)
        self.dimension, self.metric = dimension, metric
        self.distance_count = 0
        self._ids = np.empty(0, np.int64)

    def __len__(self) -> int:
        """The number of vectors that can be found."""
        return len(self._ids)

    def add(self, vectors, ids=None) -> np.ndarray:
        """Take in vectors.

        Args:
            vectors: (n, d), finite; numpy array or tensor.
            ids: n different integers of at least 0 that are not yet in use; the next free ones where None.

        Returns: their ids, (n,) int64.
        """
        vectors = self._vectors("vectors", vectors)
        if ids is None:
            start = int(self._ids.max(initial=-1)) + 1
            ids = np.arange(start, start + len(vectors))
        ids = _ids(ids)
        if ids.shape != (len(vectors),):
            raise ValueError(f"ids must be {len(vectors)}, one for each vector, got {len(ids)}")
        if len(np.unique(ids)) < len(ids) or np.isin(ids, self._ids).any():
            raise ValueError("ids must differ from one another and from those in use")
        self._add(vectors, ids)
        return ids

    def delete(self, ids) -> None:
        """Forget vectors: all of them must be there."""
        ids = _ids(ids)
        if not np.isin(ids, self._ids).all():
            missing = ids[~np.isin(ids, self._ids)][0]
            raise ValueError(f"ids must be in use, and {missing} is not")
        self._delete(np.isin(self._ids, ids))

    def search(self, queries, k: int, *, allowed=None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest vectors of each query, the nearest first.

        Args:
            queries: (q, d), or one of them, (d,).
            k: how many; where fewer are found, the rest have id −1 and score −∞.
            allowed: ids that may be found, all others being passed over; every id where it is None.

        Returns:
            scores: (q, k) float32, the larger the nearer: inner product, cosine, or −‖query − vector‖².
            ids: (q, k) int64. Both (k,) for one query.
        """
        check_positive("k", k)
        if np.ndim(queries) == 1:
            scores, ids = self.search(np.asarray(queries)[None], k, allowed=allowed)
            return scores[0], ids[0]
        queries = self._vectors("queries", queries)
        mask = None if allowed is None else np.isin(self._ids, _ids(allowed))
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        if len(self) and (mask is None or mask.any()):
            self._search(queries, scores, rows, mask)
        if self.metric == "l2":
            scores = np.minimum(2 * scores - np.square(queries).sum(1, keepdims=True), 0)
        return scores, np.where(rows < 0, -1, self._ids[rows] if len(self._ids) else -1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; `path` holds the old index or the new one, never half of it."""
        settings = {name: getattr(self, name) for name in ("dimension", "metric", *self.parameters)}
        about = {"index": type(self).__name__, "version": VERSION, "settings": settings}
        arrays = {name: np.ascontiguousarray(array) for name, array in self._state().items()}
        atomic_write(path, save({"ids": self._ids, **arrays}, {"companion": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> "VectorIndex":
        """Open what `save` wrote.

        Raises ValueError where the file is of another kind or version, cut short, or not consistent.
        """
        index = load_index(path)
        if not isinstance(index, cls):
            raise ValueError(f"{Path(path).name} holds a {type(index).__name__}, not a {cls.__name__}")
        return index

    # What subclasses provide. Rows are places in `_ids`; masks are over rows.

    def _add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        raise TypeError(f"{type(self).__name__} must define _add")

    def _delete(self, gone: np.ndarray) -> None:
        raise TypeError(f"{type(self).__name__} must define _delete")

    def _search(self, queries, scores, rows, mask) -> None:
        """Fill scores q · x − b and rows, the best first."""
        raise TypeError(f"{type(self).__name__} must define _search")

    def _state(self) -> dict[str, np.ndarray]:
        raise TypeError(f"{type(self).__name__} must define _state")

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over the arrays of `_state`, or raise a ValueError where they do not fit together."""
        raise TypeError(f"{type(self).__name__} must define _restore")

    def _vectors(self, name: str, vectors) -> np.ndarray:
        array = np.asarray(vectors, dtype=np.float32)
        if array.ndim != 2 or array.shape[1] != self.dimension:
            raise ValueError(f"{name} must have shape (n, {self.dimension}), got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite")
        if self.metric == "cosine":
            lengths = np.linalg.norm(array, axis=1, keepdims=True)
            if not lengths.all():
                raise ValueError(f"{name} must hold no zero vector: it has no direction")
            array = array / lengths
        return np.ascontiguousarray(array)

    def _bias(self, vectors: np.ndarray) -> np.ndarray:
        """b of each vector, (n,) float32."""
        half = np.einsum("nd,nd->n", vectors, vectors) / 2
        return half if self.metric == "l2" else np.zeros_like(half)


def load_index(path: str | Path) -> VectorIndex:
    """Open an index of any kind; see `VectorIndex.load`."""
    path = Path(path)
    content = path.read_bytes()
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        about = json.loads(header["__metadata__"]["companion"])
        state = load(content)
        name, version, settings = about["index"], about["version"], about["settings"]
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is not an index that was saved whole: {error}") from error
    if version != VERSION:
        raise ValueError(f"{path.name} is of version {version!r}, and this program reads version {VERSION}")
    kinds = {kind.__name__: kind for kind in VectorIndex.__subclasses__()}
    if name not in kinds:
        raise ValueError(f"{path.name} holds an index of the unknown kind {name!r}")
    try:
        index = kinds[name](settings.pop("dimension"), **settings)
        index._ids = check_shape("ids", state.pop("ids"), (None,), np.int64)  # −1: deleted, in a graph
        index._restore(state)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path.name} is not consistent: {error}") from error
    return index


def check_shape(name: str, array: np.ndarray, shape: tuple, dtype) -> np.ndarray:
    """Refuse an array of a file that has not the shape (None: any size) and type it should have."""
    fits = array.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, array.shape, strict=False)
    )
    if not fits or array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
    return array


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """The places of the k largest of n scores, the largest first, the lower place first among equals."""
    if len(scores) > k:
        bound = np.partition(scores, len(scores) - k)[len(scores) - k]
        found = np.flatnonzero(scores >= bound)
    else:
        found = np.arange(len(scores))
    return found[np.lexsort((found, -scores[found]))][:k]


def _ids(ids) -> np.ndarray:
    array = np.atleast_1d(np.asarray(ids))
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"ids must be a flat sequence of integers, got {array.dtype} {array.shape}")
    if (array < 0).any():
        raise ValueError("ids must be at least 0")
    return array.astype(np.int64)
