"""Passages, queries and judgments of relevance: the Gospels and their cross-references.

Each of the 3,779 verses of the four Gospels is a document. 820 of them have cross-references to other verses
of the Gospels, 2,024 in all: these verses are the queries, what they refer to is relevant. People chose the
references, for parallel accounts, quotations and shared themes; nobody judged the verses that are not
referred to, so a system can be better than it looks. The source of the references is not stated, which is
why they are read where they are installed and are no part of this package.

`gospel_vectors` are the documents as all-MiniLM-L6-v2 sees them, computed once and shipped, because on a
laptop they take a minute.
"""

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from safetensors.torch import load
from torch import Tensor

from companion._checks import check_choice, check_positive
from companion.data.assets import asset_path
from companion.data.translation import read_verses

GOSPELS = {40: "Matthew", 41: "Mark", 42: "Luke", 43: "John"}
LANGUAGES = ("en", "fr")
HELD_OUT = 0.5  # share of the queries that test; the others train

REFERENCES = """
    SELECT bNumberFrom, cNumberFrom, vNumberFrom, bNumberTo, cNumberTo, vNumberTo FROM bibleCrossRef
    WHERE bNumberFrom BETWEEN 40 AND 43 AND bNumberTo BETWEEN 40 AND 43
"""


@dataclass(frozen=True)
class RetrievalTask:
    """A collection with queries whose answers are known.

    Attributes:
        ids: names of the N documents ("John 3:16"), in order.
        documents: their texts.
        queries: text of each query by name. A query is itself a document, and no answer to itself.
        relevance: query → document → grade (1).
    """

    ids: tuple[str, ...]
    documents: tuple[str, ...]
    queries: dict[str, str]
    relevance: dict[str, dict[str, int]]

    def rankings(
        self, search: Callable[[list[str], int], Sequence[Sequence[int]]], k: int
    ) -> dict[str, list[str]]:
        """The k best documents of each query by a search, without the query itself.

        Args:
            search: from the texts of all queries and a number of results to the rows of the results, the
                best first, one sequence for each query (negative rows are no result).
        """
        check_positive("k", k)
        found = search(list(self.queries.values()), k + 1)
        return {
            query: [self.ids[row] for row in rows if row >= 0 and self.ids[row] != query][:k]
            for query, rows in zip(self.queries, found, strict=True)
        }

    def split(self, part: str) -> "RetrievalTask":
        """The same collection with the queries that "train", or that "test": a hash of the name decides."""
        check_choice("part", part, ("train", "test"))
        chosen = [query for query in self.queries if _is_test(query) == (part == "test")]
        return RetrievalTask(
            self.ids,
            self.documents,
            {query: self.queries[query] for query in chosen},
            {query: self.relevance[query] for query in chosen},
        )


@cache
def load_gospels(language: str = "en", queries: str | None = None) -> RetrievalTask:
    """The Gospels in English (World English Bible) or in French (Louis Segond, 1910), both public domain.

    Args:
        language: "en" or "fr", of the documents.
        queries: of the queries, where it is another one: retrieval across languages.

    Raises:
        FileNotFoundError: the texts are not installed (says the command that installs them).
        ValueError: a language that is not there; or the database is not the pinned one.
    """
    check_choice("language", language, LANGUAGES)
    queries = language if queries is None else queries
    check_choice("queries", queries, LANGUAGES)
    verses = read_verses(range(min(GOSPELS), max(GOSPELS) + 1))
    relevance: dict[str, dict[str, int]] = {}
    for verse, other in _references():
        if verse != other and verse in verses and other in verses:
            relevance.setdefault(_name(verse), {})[_name(other)] = 1
    asked = {_name(verse): texts[LANGUAGES.index(queries)] for verse, texts in verses.items()}
    return RetrievalTask(
        tuple(asked),
        tuple(texts[LANGUAGES.index(language)] for texts in verses.values()),
        {query: text for query, text in asked.items() if query in relevance},
        {query: relevance[query] for query in asked if query in relevance},
    )


@cache
def gospel_vectors(language: str = "en") -> Tensor:
    """What all-MiniLM-L6-v2 makes of the documents: (3,779, 384), float32, rows of length 1.

    Stored in float16. MiniLM was trained on English: its vectors of French are there to be looked at.
    """
    check_choice("language", language, LANGUAGES)
    stored = load(files("companion").joinpath("weights/gospels-minilm.safetensors").read_bytes())
    return torch.nn.functional.normalize(stored[language].float(), dim=-1)


def _references() -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    path = asset_path("bible")
    try:
        address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True)) as database:
            return [(row[:3], row[3:]) for row in sorted(database.execute(REFERENCES))]
    except sqlite3.Error as error:
        raise ValueError(f"{path.name} is not a readable database of references: {error}") from error


def _name(verse: tuple[int, int, int]) -> str:
    book, chapter, number = verse
    return f"{GOSPELS[book]} {chapter}:{number}"


def _is_test(query: str) -> bool:
    return int.from_bytes(hashlib.sha256(query.encode()).digest()[:8]) / 2**64 < HELD_OUT


def _embed() -> dict[str, Tensor]:
    """The vectors that are shipped: `python -c "from companion.data import retrieval as r; r._write()"`."""
    from companion.models.bert import SentenceEncoder

    encoder = SentenceEncoder.minilm()
    return {language: encoder.encode(list(load_gospels(language).documents)).half() for language in LANGUAGES}


def _write() -> None:
    from safetensors.torch import save

    from companion._io import atomic_write

    path = files("companion").joinpath("weights/gospels-minilm.safetensors")
    atomic_write(path, save({name: x.contiguous() for name, x in _embed().items()}))
