"""Passages and their vectors in an embedded database: SQLite with the extension sqlite-vec, through apsw.

One file holds texts, where they come from, their metadata as JSON, and their vectors; a transaction changes
all of it or nothing. The search is exact, a scan in C: what a folder of documents needs, and what the indexes
of `companion.rag.index` must beat before they are worth their trouble.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from companion._checks import check_choice, check_positive
from companion.rag.split import Passage

VERSION = 1
METRICS = {"cosine": "cosine", "l2": "L2"}
MAX_K = 4096  # results of one search that sqlite-vec allows

SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE passages (
    row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, document TEXT NOT NULL,
    start INTEGER NOT NULL, end INTEGER NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL
) STRICT;
CREATE INDEX by_document ON passages (document);
CREATE VIRTUAL TABLE vectors USING vec0(
    row INTEGER PRIMARY KEY, vector FLOAT[{dimension}] distance_metric={metric}
);
"""


class VectorStore:
    """Passages that are found by vector.

    Args:
        path: of the file, made where it is not there; ":memory:" keeps everything in memory.
        dimension: of the vectors.
        model: name of the model that makes them. Vectors of two models cannot be compared: a store made with
            another name, dimension or metric is refused.
        metric: "cosine" or "l2".

    Raises:
        ImportError: apsw or sqlite-vec is not installed.
        ValueError: the file is not such a store, or one of another version, model, dimension or metric.
    """

    def __init__(self, path: str | Path, dimension: int, *, model: str, metric: str = "cosine"):
        check_positive("dimension", dimension)
        check_choice("metric", metric, METRICS)
        self.path, self.dimension, self.model, self.metric = str(path), dimension, model, metric
        self._apsw, extension = _libraries()
        wanted = {"version": VERSION, "dimension": dimension, "model": model, "metric": metric}
        self._database = self._apsw.Connection(self.path)
        try:
            self._database.enable_load_extension(True)
            self._database.load_extension(extension)
            self._database.enable_load_extension(False)
            self._database.set_busy_timeout(5000)
            with self._database:
                if not self._query("SELECT name FROM sqlite_schema LIMIT 1"):
                    self._database.execute(SCHEMA.format(dimension=dimension, metric=METRICS[metric]))
                    self._database.executemany(
                        "INSERT INTO about VALUES (?, ?)",
                        [(name, json.dumps(value)) for name, value in wanted.items()],
                    )
            if (damage := self._query("PRAGMA quick_check(1)")[0][0]) != "ok":
                raise ValueError(damage)
            found = {name: json.loads(value) for name, value in self._query("SELECT name, value FROM about")}
        except (self._apsw.Error, ValueError) as error:
            self.close()
            raise ValueError(f"{Path(self.path).name} is not a store of passages: {error}") from error
        for name, value in wanted.items():
            if found.get(name) != value:
                self.close()
                raise ValueError(
                    f"{Path(self.path).name} was made with {name} {found.get(name)!r}, not {value!r}: "
                    "index the documents again"
                )

    def __len__(self) -> int:
        """The number of passages."""
        ((count,),) = self._query("SELECT count(*) FROM passages")
        return count

    def __enter__(self) -> "VectorStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    def add(self, passages: Sequence[Passage], vectors) -> None:
        """Store passages with their vectors (n, dimension); one whose id is there already replaces it.

        All of them are stored or, after an error, none.
        """
        array = np.ascontiguousarray(np.asarray(vectors, dtype=np.float32))
        if array.shape != (len(passages), self.dimension):
            raise ValueError(f"vectors must have shape {(len(passages), self.dimension)}, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("vectors must be finite")
        if self.metric == "cosine" and not np.linalg.norm(array, axis=1).all():
            raise ValueError("vectors must hold no zero vector: it has no direction")
        if len({passage.id for passage in passages}) < len(passages):
            raise ValueError("passages must have different ids")
        with self._database:
            self._remove([passage.id for passage in passages])
            for passage, vector in zip(passages, array, strict=True):
                metadata = json.dumps(dict(passage.metadata), ensure_ascii=False)
                self._database.execute(
                    "INSERT INTO passages (id, document, start, end, text, metadata)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (passage.id, passage.document, passage.start, passage.end, passage.text, metadata),
                )
                row = self._database.last_insert_rowid()
                self._database.execute("INSERT INTO vectors VALUES (?, ?)", (row, vector.tobytes()))

    def delete(self, ids: Sequence[str]) -> None:
        """Remove passages, all of which must be there."""
        if missing := [id for id, found in zip(ids, self._find(ids), strict=True) if found is None]:
            raise ValueError(f"ids must be in the store, and {missing[0]!r} is not")
        with self._database:
            self._remove(ids)

    def delete_document(self, document: str) -> int:
        """Remove all passages of a document, and say how many there were."""
        ids = [id for (id,) in self._query("SELECT id FROM passages WHERE document = ?", (document,))]
        self.delete(ids)
        return len(ids)

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in this order."""
        found = self._find(ids)
        if None in found:
            raise ValueError(f"ids must be in the store, and {ids[found.index(None)]!r} is not")
        return found

    def passages(self) -> Iterator[Passage]:
        """All passages, in the order in which they were stored."""
        rows = self._query("SELECT id, text, document, start, end, metadata FROM passages ORDER BY row")
        return map(_passage, rows)

    def search(
        self, vector, k: int, *, where: Mapping[str, str | int | float | bool] | None = None
    ) -> list[tuple[Passage, float]]:
        """The k nearest passages and their scores, the nearest first.

        Args:
            vector: (dimension,).
            k: at most 4,096, or as many as there are.
            where: what their metadata, or "document", must equal; the search is then among these alone.

        The score is the cosine, or minus the squared Euclidean distance.
        """
        check_positive("k", k)
        if k > MAX_K:
            raise ValueError(f"k must be at most {MAX_K}, got {k}")
        array = np.ascontiguousarray(np.asarray(vector, dtype=np.float32))
        if array.shape != (self.dimension,) or not np.isfinite(array).all():
            raise ValueError(f"vector must be {self.dimension} finite numbers, got shape {array.shape}")
        if not array.any() and self.metric == "cosine":
            raise ValueError("vector must not be zero: it has no direction")
        condition, values = _condition(where or {})
        rows = self._query(
            "SELECT id, text, document, start, end, metadata, distance FROM vectors JOIN passages USING (row)"
            f" WHERE vector MATCH ? AND k = ? {condition} ORDER BY distance",
            (array.tobytes(), k, *values),
        )
        scores = [1 - row[-1] if self.metric == "cosine" else -(row[-1] ** 2) for row in rows]
        return [(_passage(row[:-1]), score) for row, score in zip(rows, scores, strict=True)]

    def _find(self, ids: Sequence[str]) -> list[Passage | None]:
        if isinstance(ids, str):
            raise TypeError("ids must be a sequence of strings, got one str")
        query = "SELECT id, text, document, start, end, metadata FROM passages WHERE id = ?"
        found = [self._query(query, (id,)) for id in ids]
        return [_passage(rows[0]) if rows else None for rows in found]

    def _remove(self, ids: Sequence[str]) -> None:
        rows = [row for id in ids for row in self._query("SELECT row FROM passages WHERE id = ?", (id,))]
        self._database.executemany("DELETE FROM vectors WHERE row = ?", rows)
        self._database.executemany("DELETE FROM passages WHERE row = ?", rows)

    def _query(self, sql: str, values: Sequence = ()) -> list[tuple]:
        return self._database.execute(sql, values).fetchall()


def _condition(where: Mapping[str, str | int | float | bool]) -> tuple[str, list]:
    """SQL that lets only the wanted rows be compared; every name and value travels as a parameter."""
    parts, values = [], []
    for name, value in where.items():
        if not isinstance(name, str) or not isinstance(value, (str, int, float, bool)):
            raise TypeError(f"where must map names to strings, numbers or booleans, got {name!r}: {value!r}")
        if name == "document":
            parts.append("document = ?")
            values.append(value)
        else:
            parts.append("metadata ->> ? = ?")
            path = json.dumps(name, ensure_ascii=False)
            values += [f"$.{path}", value]
    if not parts:
        return "", []
    return f"AND vectors.row IN (SELECT row FROM passages WHERE {' AND '.join(parts)})", values


def _passage(row: tuple) -> Passage:
    id, text, document, start, end, metadata = row
    return Passage(id=id, text=text, document=document, start=start, end=end, metadata=json.loads(metadata))


def _libraries():
    try:
        import apsw
        import sqlite_vec
    except ImportError as error:
        raise ImportError(
            'a VectorStore needs apsw and sqlite-vec: run `pip install "attention-to-agents[rag]"`'
        ) from error
    return apsw, sqlite_vec.loadable_path()
