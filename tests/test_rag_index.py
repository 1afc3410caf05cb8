"""companion.rag.index: exact search beside faiss and brute force, approximate search against exact search."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from companion.data.retrieval import gospel_vectors
from companion.rag.index import (
    FlatIndex,
    HNSWIndex,
    IVFIndex,
    PQIndex,
    ProductQuantiser,
    kmeans,
    load_index,
)

METRICS = ("ip", "l2", "cosine")


def _vectors(n=700, d=13, seed=0):
    """Clustered vectors of unequal length."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(9, d))
    vectors = centres[random.integers(0, 9, n)] + 0.6 * random.normal(size=(n, d))
    return (vectors * random.uniform(0.5, 2, (n, 1))).astype(np.float32)


def _score(queries, vectors, metric):
    """Every score by its definition, float64."""
    queries, vectors = queries.astype(float), vectors.astype(float)
    if metric == "l2":
        return -np.square(queries[:, None] - vectors[None]).sum(-1)
    product = queries @ vectors.T
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    return product / lengths if metric == "cosine" else product


def _indexes(d=13, metric="l2"):
    """One of each kind, small, and such that IVF and the graph find nearly everything."""
    return {
        "flat": FlatIndex(d, metric=metric),
        "ivf": IVFIndex(d, metric=metric, lists=8, probes=8),
        "pq": PQIndex(d, metric=metric, pieces=d),
        "hnsw": HNSWIndex(d, metric=metric, neighbours=8, ef_construction=40, ef_search=60),
    }


def _filled(kind, metric="l2", n=700):
    index, vectors = _indexes(metric=metric)[kind], _vectors(n)
    if hasattr(index, "train"):
        index.train(vectors)
    index.add(vectors)
    return index, vectors


def _overlap(found, true):
    return np.mean(
        [len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), true.tolist(), strict=True)]
    )


# ----------------------------------------------------------------------------------------------------- exact


@pytest.mark.verifies("companion.rag.index.flat.FlatIndex", against="faiss.IndexFlat")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries, k", [(1, 1), (3, 10), (50, 7)])
def test_flat(agree, metric, queries, k):
    import faiss

    vectors, asked = _vectors(), _vectors(queries, seed=1)
    mine = FlatIndex(13, metric=metric)
    mine.add(torch.from_numpy(vectors[:300]))
    mine.add(vectors[300:])
    judge = faiss.IndexFlatL2(13) if metric == "l2" else faiss.IndexFlatIP(13)
    scaled = [
        x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x for x in (vectors, asked)
    ]
    judge.add(scaled[0])
    theirs, their_ids = judge.search(scaled[1], k)
    scores, ids = mine.search(asked, k)
    agree(ids.ravel().tolist(), their_ids.ravel().tolist(), tolerance=0, quantity=f"ids, {metric}")
    sign = -1 if metric == "l2" else 1
    agree(scores, sign * theirs, tolerance=2e-4 if metric == "l2" else 1e-5, quantity=f"scores, {metric}")
    assert mine.distance_count == queries * 700


@pytest.mark.verifies("companion.rag.index.ivf.IVFIndex", against="all scores by their definition")
@pytest.mark.verifies("companion.rag.index.hnsw.HNSWIndex", against="all scores by their definition")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_what_is_found_has_the_right_score(agree, kind, metric):
    index, vectors = _filled(kind, metric)
    asked = _vectors(20, seed=2)
    scores, ids = index.search(asked, 9)
    expected = np.take_along_axis(_score(asked, vectors, metric), ids, 1)
    agree(scores, expected.astype(np.float32), tolerance=2e-4, quantity=f"scores, {metric}")
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_all_lists_probed_is_exact(metric):
    index, vectors = _filled("ivf", metric)
    asked = _vectors(20, seed=2)
    exact = np.argsort(-_score(asked, vectors, metric), axis=1, kind="stable")[:, :10]
    assert index.search(asked, 10)[1].tolist() == exact.tolist()
    assert index.distance_count == 20 * (700 + 8)


# ----------------------------------------------------------------------------------------------- approximate


@pytest.mark.verifies("companion.rag.index.ivf.IVFIndex", against="faiss.IndexIVFFlat")
def test_lists_are_those_of_the_library(agree):
    import faiss

    vectors, asked = gospel_vectors().numpy(), gospel_vectors().numpy()[::37] + 0.01
    mine = IVFIndex(384, metric="l2", lists=16, probes=3)
    mine.train(vectors)
    mine.add(vectors)
    quantiser = faiss.IndexFlatL2(384)
    quantiser.add(mine._centres)
    judge = faiss.IndexIVFFlat(quantiser, 384, 16, faiss.METRIC_L2)
    judge.add(vectors)
    judge.nprobe = 3
    theirs = judge.search(asked, 10)[1]
    agree(
        mine.search(asked, 10)[1].ravel().tolist(),
        theirs.ravel().tolist(),
        tolerance=0,
        quantity="ids, same centres",
    )


@pytest.mark.verifies("companion.rag.index.ivf.kmeans", against="sklearn.cluster.KMeans")
def test_kmeans(agree):
    from sklearn.cluster import KMeans

    vectors = _vectors(500, 5)
    start = vectors[np.sort(np.random.default_rng(4).choice(500, 7, replace=False))]
    judge = KMeans(7, init=start.astype(float), n_init=1, max_iter=200, tol=0, algorithm="lloyd")
    theirs = judge.fit(vectors.astype(float)).cluster_centers_
    agree(
        kmeans(vectors, 7, iterations=200, seed=4),
        theirs.astype(np.float32),
        tolerance=1e-4,
        quantity="centres",
    )


def test_kmeans_starts_an_empty_cluster_again():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 20, 0)  # three different vectors only
    for seed in range(5):
        centres = kmeans(vectors, 3, iterations=20, seed=seed)
        assert sorted(map(tuple, centres.round(5).tolist())) == sorted(map(tuple, np.eye(3).tolist()))


@pytest.mark.verifies("companion.rag.index.pq.ProductQuantiser", against="faiss.ProductQuantizer")
def test_codes_are_those_of_the_library_with_the_same_centroids(agree):
    import faiss

    vectors = gospel_vectors().numpy()
    mine = ProductQuantiser(384, 24)
    mine.train(vectors[:1500])
    judge = faiss.ProductQuantizer(384, 24, 8)
    faiss.copy_array_to_vector(mine.centroids.ravel(), judge.centroids)
    codes = mine.encode(vectors[1500:1700])
    agree(
        codes.astype(int), judge.compute_codes(vectors[1500:1700]).astype(int), tolerance=0, quantity="codes"
    )
    agree(mine.decode(codes), judge.decode(codes), tolerance=0, quantity="decoded vectors")


@pytest.mark.verifies("companion.rag.index.pq.PQIndex", against="faiss.IndexPQ")
def test_compressed_search(agree):
    import faiss

    vectors, asked = gospel_vectors().numpy(), gospel_vectors().numpy()[::37]
    mine, judge = PQIndex(384, metric="ip", pieces=48), faiss.IndexPQ(384, 48, 8, faiss.METRIC_INNER_PRODUCT)
    exact = np.argsort(-(asked @ vectors.T), axis=1)[:, :10]
    for index in (mine, judge):
        index.train(vectors[::3])
        index.add(vectors)
    ours, theirs = (_overlap(index.search(asked, 10)[1], exact) for index in (mine, judge))
    assert 0.5 < theirs < 0.95 and vectors.nbytes / mine._codes.nbytes == 32
    agree(ours, theirs, tolerance=0.02, quantity="recall@10 at 32-fold compression")
    scores, ids = mine.search(asked, 5)
    decoded = mine.quantiser.decode(mine._codes.T[ids.ravel()]).reshape(*ids.shape, 384)
    np.testing.assert_allclose(scores, np.einsum("qkd,qd->qk", decoded, asked), atol=1e-5)


@pytest.mark.verifies("companion.rag.index.hnsw.HNSWIndex", against="faiss.IndexHNSWFlat")
def test_the_graph_finds_what_the_librarys_graph_finds(agree):
    import faiss

    vectors = gospel_vectors().numpy()[:2500]
    asked = gospel_vectors().numpy()[2500::9]
    exact = np.argsort(-(asked @ vectors.T), axis=1)[:, :10]
    mine = HNSWIndex(384, ef_construction=60)
    judge = faiss.IndexHNSWFlat(384, 16, faiss.METRIC_INNER_PRODUCT)
    judge.hnsw.efConstruction = 60
    mine.add(vectors)
    judge.add(vectors)
    for ef, floor in ((10, 0.85), (64, 0.97)):
        mine.ef_search = judge.hnsw.efSearch = ef
        mine.distance_count = 0
        ours, theirs = (_overlap(index.search(asked, 10)[1], exact) for index in (mine, judge))
        assert ours > floor and mine.distance_count < 0.4 * asked.shape[0] * 2500
        agree(max(theirs - ours, 0.0), 0.0, tolerance=0.03, quantity="recall@10 below the library's")


def test_a_longer_search_finds_more_and_costs_more():
    index, vectors = _filled("hnsw", "l2", 3000)
    asked = _vectors(100, seed=5)
    exact = np.argsort(-_score(asked, vectors, "l2"), axis=1)[:, :10]
    recalls, counts = [], []
    for ef in (10, 40, 160):
        index.ef_search, index.distance_count = ef, 0
        recalls.append(_overlap(index.search(asked, 10)[1], exact))
        counts.append(index.distance_count)
    assert recalls[0] < recalls[1] <= recalls[2] > 0.97 and counts[0] < counts[1] < counts[2]


def test_one_query_at_a_time_or_all_together_is_the_same():
    for kind in _indexes():
        index, _ = _filled(kind)
        asked = _vectors(12, seed=3)
        scores, ids = index.search(asked, 6)
        for i, query in enumerate(asked):
            one_scores, one_ids = index.search(query, 6)
            assert one_ids.tolist() == ids[i].tolist()
            np.testing.assert_allclose(one_scores, scores[i], atol=1e-4)


def test_links_are_within_their_bounds_and_lead_back_and_forth():
    index, _ = _filled("hnsw", n=1500)
    for layer, links in enumerate(index._links):
        nodes = np.flatnonzero(index._levels >= layer)
        for node, row in zip(nodes, links, strict=True):
            own = row[row >= 0]
            assert len(own) == len(set(own)) and node not in own and (index._levels[own] >= layer).all()
    assert len(index._links) >= 3 and index._links[0].shape == (1500, 16) and index._links[1].shape[1] == 8


# ------------------------------------------------------------------------------------- ids, filters, deletion


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_filter_is_a_search_among_the_allowed(kind, metric):
    index, vectors = _filled(kind, metric)
    asked = _vectors(15, seed=6)
    for allowed in (np.arange(0, 700, 3), np.array([5, 17, 400]), np.arange(30)):
        scores = _score(asked, vectors, metric)
        hidden = np.setdiff1d(np.arange(700), allowed)
        scores[:, hidden] = -np.inf
        exact = np.argsort(-scores, axis=1, kind="stable")[:, : min(10, len(allowed))]
        found = index.search(asked, 10, allowed=allowed)[1]
        assert np.isin(found[found >= 0], allowed).all()
        assert _overlap(found[:, : exact.shape[1]], exact) >= (0.93 if kind == "hnsw" else 1)
        assert (found[:, len(allowed) :] == -1).all()


@pytest.mark.parametrize("kind", ["flat", "ivf", "pq", "hnsw"])
def test_deleted_vectors_are_gone_and_their_ids_free(kind):
    index, vectors = _filled(kind)
    gone = np.arange(0, 700, 2)
    index.delete(gone)
    assert len(index) == 350
    found = index.search(_vectors(30, seed=7), 20)[1]
    assert (found % 2 == 1).all()
    with pytest.raises(ValueError, match="ids must be in use, and 0 is not"):
        index.delete([1, 0])
    assert len(index) == 350
    index.add(vectors[gone], ids=gone)
    assert len(index) == 700
    index.delete(np.arange(1, 700, 2))  # more than half: the graph is built anew
    index.delete(np.arange(0, 690, 2))
    assert len(index) == 5 and set(index.search(vectors[0], 9)[1].tolist()) == {690, 692, 694, 696, 698, -1}
    index.delete(np.arange(690, 700, 2))
    assert len(index) == 0 and index.search(vectors[0], 2)[1].tolist() == [-1, -1]


@pytest.mark.parametrize("kind", ["flat", "ivf", "pq", "hnsw"])
def test_ids_of_ones_own(kind):
    index, vectors = _indexes()[kind], _vectors(600)
    if hasattr(index, "train"):
        index.train(vectors)
    own = np.random.default_rng(0).permutation(10**9 + np.arange(600))
    assert index.add(vectors[:400], ids=own[:400]).tolist() == own[:400].tolist()
    index.add(vectors[400:], ids=torch.from_numpy(own[400:]))
    if kind != "pq":
        assert index.search(vectors[::50], 1)[1].ravel().tolist() == own[::50].tolist()
    assert index.add(vectors[:1]).tolist() == [own.max() + 1]
    for wrong, message in (([own[3]], "ids must differ"), ([5, 5], "ids must be 1"), ([-1], "at least 0")):
        with pytest.raises(ValueError, match=message):
            index.add(vectors[:1], ids=wrong)
    assert len(index) == 601


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_sequence_of_changes_leaves_exactly_what_is_there(data):
    kind = data.draw(st.sampled_from(["flat", "ivf", "hnsw"]))
    vectors, index, there = _vectors(60, 4), _indexes(4)[kind], set()
    if hasattr(index, "train"):
        index.train(vectors)
    for _ in range(data.draw(st.integers(1, 6))):
        ids = sorted(data.draw(st.sets(st.integers(0, 59), min_size=1)))
        new, old = [i for i in ids if i not in there], [i for i in ids if i in there]
        index.add(vectors[new], ids=np.array(new, dtype=int))
        index.delete(np.array(old, dtype=int))
        there = there | set(new) - set(old) if not old else (there | set(new)) - set(old)
        assert len(index) == len(there)
        found = index.search(vectors[0], 60)[1]
        assert set(found[found >= 0].tolist()) == there


# ----------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["flat", "ivf", "pq", "hnsw"])
def test_saved_and_opened_it_is_the_same(kind, tmp_path):
    index, vectors = _filled(kind, "cosine")
    index.delete([3, 4, 5])
    index.save(tmp_path / "index")
    again = type(index).load(tmp_path / "index")
    asked = _vectors(10, seed=8)
    for mine, other in zip(index.search(asked, 8), again.search(asked, 8), strict=True):
        assert mine.tolist() == other.tolist()
    assert again.add(vectors[3:6]).tolist() == index.add(vectors[3:6]).tolist()
    assert len(again) == 700 and type(load_index(tmp_path / "index")) is type(index)


@pytest.mark.parametrize("kind", ["flat", "ivf", "pq", "hnsw"])
def test_a_file_cut_short_anywhere_is_refused(kind, tmp_path):
    index, _ = _filled(kind, n=300)
    path = tmp_path / "index"
    index.save(path)
    content = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 50, 200, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="index is not an index that was saved whole"):
            load_index(path)


def test_a_write_that_fails_leaves_the_old_index(tmp_path, monkeypatch):
    index, vectors = _filled("flat", n=20)
    index.save(tmp_path / "index")
    before = (tmp_path / "index").read_bytes()
    index.add(vectors)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        index.save(tmp_path / "index")
    assert (tmp_path / "index").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def _rewritten(path, change_about=None, **arrays):
    """The file with another description or other arrays, well-formed as safetensors."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["companion"])
    (change_about or (lambda _: None))(about)
    path.write_bytes(save({**load(content), **arrays}, {"companion": json.dumps(about)}))


@pytest.mark.parametrize(
    "kind, about, arrays, message",
    [
        ("flat", {"version": 2}, {}, "is of version 2, and this program reads version 1"),
        ("flat", {"index": "TreeIndex"}, {}, "unknown kind 'TreeIndex'"),
        ("flat", {"settings": {"dimension": 13, "metric": "l3"}}, {}, "not consistent: metric"),
        ("flat", {"settings": {"dimension": 12, "metric": "l2"}}, {}, "not consistent: vectors"),
        ("flat", {"settings": {"dimension": 13, "colour": 1}}, {}, "not consistent"),
        ("flat", {}, {"ids": np.arange(3)}, "not consistent: vectors"),
        ("ivf", {}, {"assigned": np.full(300, 8)}, r"assigned must lie in 0 … 7"),
        ("ivf", {}, {"centres": np.zeros((3, 13), np.float32)}, "centres must be 8, got 3"),
        ("pq", {}, {"codes": np.zeros((12, 300), np.uint8)}, "codes must be uint8"),
        ("pq", {}, {"centroids": np.zeros((13, 4, 1), np.float32)}, "centroids must be 256"),
        ("hnsw", {}, {"links.0": np.full((300, 16), 300, np.int32)}, r"links.0 must lie in −1 … 299"),
        ("hnsw", {}, {"links.0": np.zeros((300, 4), np.int32)}, "links.0 must be int32"),
        ("hnsw", {}, {"entry": np.array([300])}, "the entry point in 0 … 299"),
        ("hnsw", {}, {"levels": np.full(300, 2**40)}, r"levels must lie in 0 … 24"),
    ],
)
def test_a_file_that_does_not_fit_together_is_refused(kind, about, arrays, message, tmp_path):
    index, _ = _filled(kind, n=300)
    index.save(tmp_path / "index")
    _rewritten(tmp_path / "index", lambda old: old.update(about), **arrays)
    with pytest.raises(ValueError, match=message):
        load_index(tmp_path / "index")


def test_another_kind_is_refused(tmp_path):
    _filled("flat", n=20)[0].save(tmp_path / "index")
    with pytest.raises(ValueError, match="index holds a FlatIndex, not a HNSWIndex"):
        HNSWIndex.load(tmp_path / "index")


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FlatIndex(0), "dimension must be at least 1"),
        (lambda: FlatIndex(3, metric="l1"), "metric must be one of"),
        (lambda: FlatIndex(3).add(np.zeros((2, 4))), r"vectors must have shape \(n, 3\), got \(2, 4\)"),
        (lambda: FlatIndex(3).add([[1, np.nan, 0]]), "vectors must be finite"),
        (lambda: FlatIndex(3, metric="cosine").add(np.zeros((1, 3))), "no zero vector"),
        (lambda: FlatIndex(3).search(np.ones(3), 0), "k must be at least 1"),
        (lambda: IVFIndex(3).add(np.ones((1, 3))), "must be trained before"),
        (lambda: IVFIndex(3, lists=4).train(np.ones((3, 3))), "clusters must be at most 3"),
        (lambda: PQIndex(7, pieces=3), "pieces must divide dimension 7, got 3"),
        (lambda: PQIndex(3, pieces=3).add(np.ones((1, 3))), "must be trained first"),
        (lambda: HNSWIndex(3, neighbours=1), "neighbours must be at least 2"),
        (lambda: HNSWIndex(3, ef_construction=3), "ef_construction must be at least neighbours"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ids_must_be_integers():
    with pytest.raises(TypeError, match="ids must be a flat sequence of integers"):
        FlatIndex(2).add(np.ones((1, 2)), ids=[0.5])


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_an_empty_index_finds_nothing(kind):
    scores, ids = _indexes()[kind].search(np.ones((2, 13)), 3)
    assert (ids == -1).all() and (scores == -np.inf).all()
