"""companion.rag.sparse beside rank-bm25, bm25s and scikit-learn, and beside a scan of every document."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from companion.data.retrieval import load_gospels
from companion.rag.sparse import (
    BM25,
    STOP_WORDS,
    TFIDF,
    VARIANTS,
    InvertedIndex,
    analyse_chinese,
    analyse_english,
    analyse_words,
)

WORDS = "light darkness word beginning god grace truth law moses john witness world flesh glory".split()  # noqa: SIM905


def _texts(number=23, seed=0):
    random = np.random.default_rng(seed)
    share = 1 / np.arange(1, len(WORDS) + 1)
    texts = [" ".join(random.choice(WORDS, n, p=share / share.sum())) for n in random.integers(1, 30, number)]
    return [*texts, "", "light " * 40]  # an empty document, and one that repeats itself


QUERIES = ["light", "grace grace truth", "moses unknown world", "glory " * 3, "god " + " ".join(WORDS)]


# ------------------------------------------------------------------------------------------------- analysers


@pytest.mark.verifies("companion.rag.sparse.analyse_english", against="Lucene's English analyser, by hand")
def test_english(agree):
    mine = analyse_english("The disciples' nets were breaking; they're FISHERS of men, and it's John's boat.")
    theirs = ["discipl", "net", "were", "break", "they'r", "fisher", "men", "john", "boat"]
    agree(mine, theirs, tolerance=0, quantity="terms")


@pytest.mark.verifies("companion.rag.sparse.analyse_chinese", against="Lucene's CJK analyser, by hand")
def test_chinese(agree):
    mine = analyse_chinese("起初神创造天地。In 1919, 我 said: 太初有道!")
    theirs = [
        "起初",
        "初神",
        "神创",
        "创造",
        "造天",
        "天地",
        "in",
        "1919",
        "我",
        "said",
        "太初",
        "初有",
        "有道",
    ]
    agree(mine, theirs, tolerance=0, quantity="terms")


@pytest.mark.verifies("companion.rag.sparse.analyse_words", against="sklearn's token pattern")
def test_words(agree):
    from sklearn.feature_extraction.text import CountVectorizer

    judge = CountVectorizer(token_pattern=r"(?u)\b\w+\b").build_analyzer()
    texts = [text.replace("'", " ") for text in load_gospels("fr").documents[:300]]
    agree(
        [analyse_words(text) for text in texts],
        [judge(text) for text in texts],
        tolerance=0,
        quantity="terms",
    )


@given(st.text())
def test_any_text_has_terms_without_spaces(text):
    for analyse in (analyse_words, analyse_english, analyse_chinese):
        assert all(term and not term.isspace() for term in analyse(text))
    assert not set(analyse_english(text)) & (STOP_WORDS - {"a", "no", "in", "it", "on"})


# ----------------------------------------------------------------------------------------------------- index


@given(st.lists(st.lists(st.sampled_from(WORDS[:6]), max_size=8), min_size=1, max_size=9))
def test_postings_are_the_counts(rows):
    index = InvertedIndex.build([" ".join(row) for row in rows], str.split)
    assert index.lengths.tolist() == [len(row) for row in rows]
    for term in WORDS[:6]:
        documents, counts = index.postings(term)
        expected = {i: row.count(term) for i, row in enumerate(rows) if term in row}
        assert dict(zip(documents.tolist(), counts.tolist(), strict=True)) == expected
        assert documents.tolist() == sorted(expected)


@pytest.mark.verifies("companion.rag.sparse.InvertedIndex", against="sklearn CountVectorizer")
def test_index_of_real_text(agree):
    from sklearn.feature_extraction.text import CountVectorizer

    texts = load_gospels().documents[:700]
    judge = CountVectorizer(analyzer=analyse_words)
    theirs = judge.fit_transform(texts).tocsc()
    index = InvertedIndex.build(texts, analyse_words)
    assert set(index.terms) == set(judge.vocabulary_)
    mine = np.zeros(theirs.shape)
    for term, column in judge.vocabulary_.items():
        documents, counts = index.postings(term)
        mine[documents, column] = counts
    agree(mine, theirs.toarray().astype(float), tolerance=0, quantity="counts")


# ------------------------------------------------------------------------------------------------------ BM25


def _scan(texts, query, idf, gain):
    """BM25 by its definition, a document at a time: what the index must equal."""
    bags = [Counter(text.split()) for text in texts]
    df = Counter(term for bag in bags for term in bag)
    mean = sum(bag.total() for bag in bags) / len(bags)
    return np.array(
        [
            sum(
                idf(df[term], len(texts)) * gain(bag[term], bag.total() / mean)
                for term in query.split()
                if bag[term]
            )
            for bag in bags
        ]
    )


@pytest.mark.verifies("companion.rag.sparse.BM25", against="the published formulas, document by document")
@pytest.mark.parametrize("k1, b", [(1.5, 0.75), (0.9, 0.4), (0.0, 0.5), (2.0, 0.0), (1.2, 1.0)])
@pytest.mark.parametrize(
    "variant, idf, scaled, lower",
    [
        ("robertson", lambda df, n: math.log((n - df + 0.5) / (df + 0.5)), False, 0),
        ("lucene", lambda df, n: math.log(1 + (n - df + 0.5) / (df + 0.5)), False, 0),
        ("atire", lambda df, n: math.log(n / df), True, 0),
        ("bm25+", lambda df, n: math.log((n + 1) / df), True, 0.7),
    ],
)
def test_variants(agree, variant, idf, scaled, lower, k1, b):
    texts = _texts()
    index = BM25(texts, variant=variant, k1=k1, b=b, delta=0.7, analyse=str.split)

    def gain(tf, length):
        return lower + tf * (k1 + 1 if scaled else 1) / (tf + k1 * (1 - b + b * length))

    for query in QUERIES:
        agree(index.scores(query), _scan(texts, query, idf, gain), tolerance=1e-12, quantity="scores")


@pytest.mark.verifies("companion.rag.sparse.BM25", against="rank_bm25.BM25Okapi")
def test_okapi(agree):
    from rank_bm25 import BM25Okapi

    for texts in (_texts(), [*_texts(), *["light"] * 60]):  # in the second, one term has a negative idf
        judge = BM25Okapi([text.split() for text in texts], k1=1.3, b=0.6)
        mine = BM25(texts, variant="okapi", k1=1.3, b=0.6, analyse=str.split)
        for query in QUERIES:
            agree(
                mine.scores(query), judge.get_scores(query.split()), tolerance=1e-12, quantity="scores, okapi"
            )


@pytest.mark.verifies("companion.rag.sparse.BM25", against="rank_bm25.BM25Plus")
def test_plus_where_every_document_holds_the_term(agree):
    """rank-bm25 gives δ to documents without the term too, which takes the lower bound's effect away."""
    from rank_bm25 import BM25Plus

    texts = [f"light {text}" for text in _texts()]
    judge = BM25Plus([text.split() for text in texts], k1=1.5, b=0.75, delta=1)
    mine = BM25(texts, variant="bm25+", analyse=str.split)
    agree(mine.scores("light"), judge.get_scores(["light"]), tolerance=1e-12, quantity="scores, bm25+")
    gap = judge.get_scores(["moses"]) - mine.scores("moses")
    without = np.array(["moses" not in text for text in texts])
    assert np.ptp(gap[without]) < 1e-12 < gap[without].min() and np.abs(gap[~without]).max() < 1e-12


@pytest.mark.verifies("companion.rag.sparse.BM25", against="bm25s")
@pytest.mark.parametrize("variant", ["lucene", "atire"])
def test_real_text(agree, variant):
    import bm25s

    texts = load_gospels().documents
    texts = [" ".join(analyse_english(text)) for text in texts]
    judge = bm25s.BM25(method=variant, k1=1.2, b=0.75)
    judge.index([text.split() for text in texts], show_progress=False)
    mine = BM25(texts, variant=variant, k1=1.2, b=0.75, analyse=str.split)
    for query in texts[::200]:
        terms = sorted(set(query.split()))
        theirs = judge.get_scores(terms)
        agree(
            mine.scores(" ".join(terms)), theirs.astype(float), tolerance=2e-5, quantity=f"scores, {variant}"
        )


# ---------------------------------------------------------------------------------------------------- TF-IDF


@pytest.mark.verifies("companion.rag.sparse.TFIDF", against="sklearn TfidfVectorizer")
def test_tfidf(agree):
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = load_gospels().documents[:900]
    judge = TfidfVectorizer(analyzer=analyse_words)
    theirs = judge.fit_transform(texts)
    mine = TFIDF(texts, analyse=analyse_words)
    for query in [*list(load_gospels().queries.values())[::60], "unknownword", "the the unknownword light"]:
        expected = (theirs @ judge.transform([query]).T).toarray()[:, 0]
        agree(mine.scores(query), expected, tolerance=1e-12, quantity="cosines")


@pytest.mark.verifies("companion.rag.sparse.TFIDF", against="cosines of tf · ln(N/df), document by document")
def test_textbook(agree):
    texts = _texts()
    bags = [Counter(text.split()) for text in texts]
    df = Counter(term for bag in bags for term in bag)
    idf = np.array([math.log(len(texts) / df[word]) if df[word] else 0 for word in WORDS])
    table = np.array([[bag[word] for word in WORDS] for bag in bags]) * idf
    mine = TFIDF(texts, variant="textbook", analyse=str.split)
    for query in QUERIES:
        bag = Counter(query.split())
        vector = np.array([bag[word] for word in WORDS]) * idf
        norms = np.linalg.norm(table, axis=1) * np.linalg.norm(vector)
        expected = np.divide(table @ vector, norms, out=np.zeros(len(texts)), where=norms > 0)
        agree(mine.scores(query), expected, tolerance=1e-12, quantity="cosines")


def test_a_term_that_stands_everywhere_says_nothing_in_the_textbook():
    index = TFIDF(["light of", "light is", "light"], variant="textbook", analyse=str.split)
    assert not index.scores("light").any() and index.search("light", 2)[1].tolist() == [-1, -1]


# ---------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("k", [1, 3, 10, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_search_is_the_sorted_scores(variant, k):
    index = BM25([*_texts(), *_texts()], variant=variant, analyse=str.split)  # every score stands there twice
    scores, rows = index.search(QUERIES, k)
    for query, row_scores, row in zip(QUERIES, scores, rows, strict=True):
        full = index.scores(query)
        expected = [i for i in sorted(range(len(full)), key=lambda i: (-full[i], i)) if full[i]][:k]
        assert row[row >= 0].tolist() == expected
        np.testing.assert_allclose(row_scores[: len(expected)], full[expected], rtol=1e-6)
        assert (row_scores[len(expected) :] == -np.inf).all() and (row[len(expected) :] == -1).all()


def test_one_query_is_a_row_of_several():
    index = BM25(_texts(), analyse=str.split)
    scores, rows = index.search(QUERIES, 5)
    one_scores, one_rows = index.search(QUERIES[1], 5)
    assert one_scores.tolist() == scores[1].tolist() and one_rows.tolist() == rows[1].tolist()


def test_a_megabyte_without_a_space_and_an_empty_collection_of_terms():
    index = BM25(["x" * 1_000_000, "light", "…"])
    assert index.search("light", 3)[1].tolist() == [1, -1, -1]
    assert BM25(["…"]).search("light", 1)[1].tolist() == [-1]


def test_a_longer_document_with_the_same_words_scores_less_and_repetition_saturates():
    index = BM25(["light word", "light word word word word", "light light word", "grace"], analyse=str.split)
    scores = index.scores("light")
    assert scores[0] > scores[1] and scores[3] == 0
    gains = np.diff(
        [BM25(["a " * n + "b " * (9 - n), "b"], analyse=str.split).scores("a")[0] for n in range(10)]
    )
    assert (gains > 0).all() and (np.diff(gains[1:]) < 0).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: BM25([]), "texts must hold at least one text"),
        (lambda: BM25(["a"], variant="bm26"), "variant must be one of 'robertson'.*got 'bm26'"),
        (lambda: BM25(["a"], k1=-1), "k1 must be at least 0"),
        (lambda: BM25(["a"], b=1.5), r"b must lie in \[0, 1\], got 1.5"),
        (lambda: BM25(["a"], delta=math.inf), "delta must be at least 0 and finite"),
        (lambda: TFIDF(["a"], variant="lucene"), "variant must be one of"),
        (lambda: BM25(["a"]).search("a", 0), "k must be at least 1"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call", [lambda: BM25("text"), lambda: BM25(["a", 1]), lambda: BM25(["a"]).scores(3)]
)
def test_bad_types(call):
    with pytest.raises(TypeError, match="must be a"):
        call()
