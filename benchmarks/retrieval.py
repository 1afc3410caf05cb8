"""What is timed of retrieval. Each function returns comparisons or growths, as in `benchmarks.cases`."""

import itertools
from collections.abc import Iterator

import bm25s
import faiss
import numpy as np
from rank_bm25 import BM25Okapi

from benchmarks.harness import Comparison, Count
from companion.data.assets import asset_path
from companion.data.glove import load_glove
from companion.data.translation import read_verses
from companion.models.bert import SentenceEncoder
from companion.rag.index import FlatIndex, HNSWIndex
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


def text_embedding(small: bool) -> Iterator[Comparison]:
    """Verses from text to unit vectors: tokenized, sorted by length, in batches of 32 without gradients."""
    from sentence_transformers import SentenceTransformer

    verses = [english for english, _ in itertools.islice(read_verses().values(), 0, 30_000, 150)]
    verses = verses[:8] if small else verses
    mine = SentenceEncoder.minilm()
    theirs = SentenceTransformer(str(asset_path("minilm").parent), device="cpu")
    yield Comparison(
        "Text to sentence vectors",
        f"MiniLM, {len(verses)} verses of {sum(map(len, verses)) / len(verses):.0f} characters on average",
        "sentence_transformers.SentenceTransformer",
        lambda: lambda: mine.encode(verses),
        lambda: lambda: theirs.encode(verses, batch_size=32, show_progress_bar=False),
        at_most=1.05,
    )


def graph(small: bool) -> Iterator[Comparison | Count]:
    """HNSW over words of GloVe's list as MiniLM sees them: what it compares, and its time beside faiss."""
    number, asked = (2_000 if small else 100_000), 500
    words = list(load_glove().words[: number + asked])
    vectors = SentenceEncoder.minilm().encode(words, 256).numpy()
    queries, vectors = vectors[number:], vectors[:number]
    exact, ours = FlatIndex(384), HNSWIndex(384)
    theirs = faiss.IndexHNSWFlat(384, ours.neighbours, faiss.METRIC_INNER_PRODUCT)
    theirs.hnsw.efConstruction = ours.ef_construction
    exact.add(vectors)
    ours.add(vectors)
    theirs.add(vectors)
    true = exact.search(queries, 10)[1]

    def recall(ef: int) -> float:
        ours.ef_search = ef
        found = ours.search(queries, 10)[1]
        return np.mean(
            [len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), true.tolist(), strict=True)]
        )

    ours.ef_search = next(ef for ef in range(16, 2048, 16) if recall(ef) >= 0.95)
    theirs.hnsw.efSearch = ours.ef_search

    def share() -> list[float]:
        shares = []
        for start in range(0, asked, 100):
            ours.distance_count = 0
            ours.search(queries[start : start + 100], 10)
            shares.append(ours.distance_count / (100 * number))
        return shares

    work = f"{number:,} × 384, M = 16, ef = {ours.ef_search}, recall@10 {recall(ours.ef_search):.2f}"
    yield Count("HNSW, vectors compared", work, "all of them", share, at_most=0.03)
    yield Comparison(
        "HNSW search",
        work + ", 100 queries",
        "faiss.IndexHNSWFlat",
        lambda: lambda: ours.search(queries[:100], 10),
        lambda: lambda: theirs.search(queries[:100], 10),
    )


ALL = (sparse_search, text_embedding, graph)
