"""Word vectors of GloVe (Pennington, Socher & Manning, 2014): 400,000 words × 50, from 6 billion tokens.

The vectors stay in the file: it is mapped into memory, and a page is read when a word on it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion._checks import check_floating, check_positive
from companion.data.assets import asset_path


@dataclass(frozen=True)
class GloVe:
    """A table of words and their vectors.

    Attributes:
        words: the V words, lower-case, the most frequent first.
        vectors: (V, d), float32; row i belongs to `words[i]`.
        index: word → row.

    Every method raises ValueError for a word that is not in the table.
    """

    words: Sequence[str]
    vectors: Tensor
    index: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self):
        check_floating("vectors", self.vectors)
        if self.vectors.dim() != 2:
            raise ValueError(f"vectors must have shape (words, d), got {tuple(self.vectors.shape)}")
        if len(self.words) != len(self.vectors):
            need = f"vectors must have a row for each of {len(self.words)} words"
            raise ValueError(f"{need}, got {len(self.vectors)}")
        object.__setattr__(self, "index", {word: i for i, word in enumerate(self.words)})
        if len(self.index) != len(self.words):
            raise ValueError(f"words must differ, got {len(self.words) - len(self.index)} of them twice")

    def __len__(self) -> int:
        """The number of words, V."""
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.index

    def vector(self, word: str) -> Tensor:
        """The vector of a word, (d,): a copy."""
        return self.vectors[self._row("word", word)].clone()

    def similarity(self, a: str, b: str) -> float:
        """The cosine of the angle between the vectors of two words, in [−1, 1]."""
        rows = [self._row("a", a), self._row("b", b)]
        first, second = self.vectors[rows].double()
        return float((first @ second) / (first.norm() * second.norm()))

    def nearest(self, word: str, k: int = 10) -> list[tuple[str, float]]:
        """The k other words of the largest cosine with `word`, the nearest first."""
        row = self._row("word", word)
        return self._nearest(self.vectors[row], k, [row])

    def analogy(self, a: str, b: str, c: str, k: int = 1) -> list[tuple[str, float]]:
        """What is to c as b is to a: the k words nearest to b − a + c, with the cosine.

        The three vectors are scaled to length 1 first and the three words are no answers, as in Mikolov et
        al. (2013); without the second rule the answer is often c itself.
        """
        rows = [self._row(name, word) for name, word in (("a", a), ("b", b), ("c", c))]
        unit_a, unit_b, unit_c = self.vectors[rows] / self._norms[rows, None]
        return self._nearest(unit_b - unit_a + unit_c, k, rows)

    @cached_property
    def _norms(self) -> Tensor:
        """The length of every vector, (V,)."""
        return self.vectors.norm(dim=1)

    def _nearest(self, query: Tensor, k: int, excluded: list[int]) -> list[tuple[str, float]]:
        check_positive("k", k)
        others = len(self) - len(set(excluded))
        if k > others:
            raise ValueError(f"k must be at most {others} (the other words), got {k}")
        cosines = self.vectors @ query / (self._norms * query.norm()).clamp_min(1e-12)
        cosines[excluded] = -torch.inf
        best = cosines.topk(k).indices.tolist()
        return [(self.words[i], float(cosines[i])) for i in best]

    def _row(self, name: str, word: str) -> int:
        if not isinstance(word, str):
            raise TypeError(f"{name} must be a str, got {type(word).__name__}")
        if word not in self.index:
            hint = "; the words are lower-case" if word.lower() in self.index else ""
            raise ValueError(f"{name} must be one of the {len(self)} words, got {word!r}{hint}")
        return self.index[word]


@cache
def load_glove() -> GloVe:
    """The 50-dimensional vectors of GloVe 6B (public domain), read once per process.

    Raises:
        FileNotFoundError: the vectors are not installed (says the command that installs them).
        ImportError: pyarrow, which reads the list of words, is not installed.
        ValueError: a file is not the pinned one.
    """
    return _load(asset_path("glove-words"), asset_path("glove-vectors"))


def _load(words: Path, vectors: Path) -> GloVe:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("load_glove needs pyarrow: run `pip install pyarrow`") from error
    try:
        column = pyarrow.parquet.read_table(words).column("index").to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        raise ValueError(f"{words.name} is not a readable table of words: {error}") from error
    try:  # copy-on-write: whoever writes to the tensor changes neither the file nor another process
        table = np.load(vectors, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{vectors.name} is not a readable array of vectors: {error}") from error
    return GloVe(column, torch.from_numpy(table))
