"""What is timed of retrieval. Each function returns comparisons or growths, as in `benchmarks.cases`."""

import itertools
from collections.abc import Iterator

import bm25s
from rank_bm25 import BM25Okapi

from benchmarks.harness import Comparison
from companion.data.translation import read_verses
from companion.rag.sparse import BM25, analyse_english


def sparse_search(small: bool) -> Iterator[Comparison]:
    """BM25 over the verses of the Bible: the index, and the ten best of each query."""
    verses = [english for english, _ in itertools.islice(read_verses().values(), 300 if small else 30_000)]
    terms = [analyse_english(verse) for verse in verses]
    texts, queries = [" ".join(row) for row in terms], terms[:: len(terms) // (10 if small else 100)]
    asked = [" ".join(query) for query in queries]
    mean = sum(map(len, queries)) / len(queries)
    work = f"{len(texts):,} documents, {len(queries)} queries of {mean:.0f} terms on average"
    mine = BM25(texts, analyse=str.split)
    rank = BM25Okapi(terms)
    sparse = bm25s.BM25()
    sparse.index(terms, show_progress=False)
    yield Comparison(
        "BM25 search",
        work + ", 10 results",
        "rank_bm25.BM25Okapi",
        lambda: lambda: mine.search(asked[:5], 10),
        lambda: lambda: [rank.get_scores(query).argsort()[::-1][:10] for query in queries[:5]],
        at_most=0.02,
    )
    yield Comparison(
        "BM25 search",
        work + ", 10 results",
        "bm25s",
        lambda: lambda: mine.search(asked, 10),
        lambda: lambda: sparse.retrieve(queries, k=10, show_progress=False, n_threads=0),
        at_most=1.2,
    )
    yield Comparison(
        "BM25 index",
        f"{len(texts):,} documents, {sum(map(len, terms)):,} terms, split at spaces",
        "bm25s",
        lambda: lambda: BM25(texts, analyse=str.split),
        lambda: lambda: bm25s.BM25().index([text.split() for text in texts], show_progress=False),
        at_most=1.5,
    )


ALL = (sparse_search,)
