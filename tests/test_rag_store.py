"""companion.rag.store: a database of passages, beside exact search in numpy and faiss."""

import sqlite3

import numpy as np
import pytest

from companion.rag.split import Passage
from companion.rag.store import VectorStore


def _passages(n=200, seed=0):
    texts = [f"passage {i} says “{i * i}” — 第{i}段" for i in range(n)]
    return [
        Passage(
            id=f"d{i % 7}.md#{i}-{i + len(text)}",
            text=text,
            document=f"d{i % 7}.md",
            start=i,
            end=i + len(text),
            metadata={"page": i % 5, "kind": "text" if i % 2 else "pdf", 'a"b.c': True},
        )
        for i, text in enumerate(texts)
    ]


def _vectors(n=200, d=24, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    with VectorStore(tmp_path / "store.db", 24, model="random") as store:
        store.add(_passages(), _vectors())
        yield store


@pytest.mark.verifies("companion.rag.store.VectorStore", against="faiss.IndexFlat")
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_search_is_exact(agree, metric):
    import faiss

    passages, vectors, asked = _passages(), _vectors(), _vectors(9, seed=1)
    judge = faiss.IndexFlatIP(24) if metric == "cosine" else faiss.IndexFlatL2(24)
    scaled = [
        x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x for x in (vectors, asked)
    ]
    judge.add(scaled[0])
    scores, rows = judge.search(scaled[1], 8)
    with VectorStore(":memory:", 24, model="random", metric=metric) as store:
        store.add(passages, vectors)
        for query, their_scores, their_rows in zip(asked, scores, rows, strict=True):
            found = store.search(query, 8)
            agree([p.id for p, _ in found], [passages[i].id for i in their_rows], tolerance=0, quantity="ids")
            sign = 1 if metric == "cosine" else -1
            mine = np.array([score for _, score in found])
            agree(mine, sign * their_scores.astype(float), tolerance=1e-4, quantity=f"scores, {metric}")


def test_passages_come_back_as_they_were(store):
    assert list(store.passages()) == _passages() and len(store) == 200
    ids = [p.id for p in _passages()[::-9]]
    assert store.get(ids) == _passages()[::-9]


@pytest.mark.parametrize(
    "where, keeps",
    [
        ({"page": 3}, lambda p: p.metadata["page"] == 3),
        ({"kind": "pdf", "page": 0}, lambda p: p.metadata["kind"] == "pdf" and p.metadata["page"] == 0),
        ({"document": "d2.md"}, lambda p: p.document == "d2.md"),
        ({'a"b.c': True}, lambda p: True),
        ({"kind": "' OR 1=1 --"}, lambda p: False),
        ({"absent": 1}, lambda p: False),
        ({"') OR 1=1 --": 1}, lambda p: False),
    ],
)
def test_a_filter_is_a_search_among_those_it_lets_through(store, where, keeps):
    passages, vectors, query = _passages(), _vectors(), _vectors(1, seed=2)[0]
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1)
    expected = sorted((i for i in range(200) if keeps(passages[i])), key=lambda i: -cosines[i])[:12]
    assert [p.id for p, _ in store.search(query, 12, where=where)] == [passages[i].id for i in expected]


def test_what_was_written_stays(tmp_path):
    path = tmp_path / "store.db"
    with VectorStore(path, 24, model="random") as store:
        store.add(_passages(), _vectors())
        found = store.search(_vectors()[5], 3)
    with VectorStore(path, 24, model="random") as store:
        assert store.search(_vectors()[5], 3) == found and found[0][0] == _passages()[5]


def test_a_passage_that_is_there_already_is_replaced(store):
    new = _passages()[:3]
    store.add(new, _vectors(3, seed=9))
    assert len(store) == 200
    assert store.search(_vectors(3, seed=9)[1], 1)[0][0] == new[1]


def test_deletion(store):
    ids = [p.id for p in _passages()]
    store.delete(ids[:50])
    assert len(store) == 150 and store.search(_vectors()[3], 1)[0][0].id not in ids[:50]
    count = sum(p.document == "d1.md" for p in _passages()[50:])
    assert store.delete_document("d1.md") == count and len(store) == 150 - count
    assert store.delete_document("d1.md") == 0
    with pytest.raises(ValueError, match="is not"):
        store.delete([ids[60], "absent"])
    assert len(store) == 150 - count
    with pytest.raises(ValueError, match="'absent' is not"):
        store.get(["absent"])


def test_an_error_halfway_changes_nothing(store):
    before = list(store.passages())
    bad = _passages(203)[200:]
    broken = Passage(bad[2].id, bad[2].text, bad[2].document, bad[2].start, bad[2].end, {"x": object()})
    with pytest.raises(TypeError):
        store.add([bad[0], bad[1], broken], _vectors(3))
    assert list(store.passages()) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dimension": 25}, "made with dimension 24, not 25"),
        ({"model": "other"}, "made with model 'random', not 'other': index the documents again"),
        ({"metric": "l2"}, "made with metric 'cosine', not 'l2'"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    settings = {"dimension": 24, "model": "random", "metric": "cosine"}
    VectorStore(tmp_path / "store.db", **settings).close()
    with pytest.raises(ValueError, match=message):
        VectorStore(tmp_path / "store.db", **{**settings, **change})


def test_another_version_is_refused(tmp_path):
    VectorStore(tmp_path / "store.db", 24, model="random").close()
    with sqlite3.connect(tmp_path / "store.db") as database:
        database.execute("UPDATE about SET value = '99' WHERE name = 'version'")
    with pytest.raises(ValueError, match="made with version 99, not 1"):
        VectorStore(tmp_path / "store.db", 24, model="random")


def test_a_file_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "noise").write_bytes(b"no database at all" * 500)
    with pytest.raises(ValueError, match="noise is not a store of passages"):
        VectorStore(tmp_path / "noise", 24, model="random")
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE notes (text TEXT)")
    with pytest.raises(ValueError, match="other.db is not a store of passages"):
        VectorStore(tmp_path / "other.db", 24, model="random")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused_or_says_so(tmp_path, share):
    path = tmp_path / "store.db"
    with VectorStore(path, 24, model="random") as store:
        store.add(_passages(), _vectors())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="store.db is not a store of passages"):
        VectorStore(path, 24, model="random")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.add(_passages(2), _vectors(2, 23)), r"vectors must have shape \(2, 24\), got \(2, 23\)"),
        (lambda s: s.add(_passages(1), [[np.nan] * 24]), "vectors must be finite"),
        (lambda s: s.add(_passages(1), np.zeros((1, 24))), "no zero vector"),
        (lambda s: s.add(_passages(1) * 2, _vectors(2)), "different ids"),
        (lambda s: s.search(np.ones(23), 1), "vector must be 24 finite numbers"),
        (lambda s: s.search(np.zeros(24), 1), "must not be zero"),
        (lambda s: s.search(np.ones(24), 0), "k must be at least 1"),
        (lambda s: s.search(np.ones(24), 4097), "k must be at most 4096"),
    ],
)
def test_bad_values(store, call, message):
    with pytest.raises(ValueError, match=message):
        call(store)


def test_bad_types(store):
    with pytest.raises(TypeError, match="where must map names"):
        store.search(np.ones(24), 1, where={"page": [1]})
    with pytest.raises(TypeError, match="ids must be a sequence"):
        store.get("d0.md#0-1")
