"""companion.rag.fusion beside the definitions, written out another way, and the properties that must hold."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from companion.rag.fusion import maximal_marginal_relevance, reciprocal_rank_fusion, weighted_fusion

RANKINGS = st.lists(st.lists(st.integers(0, 9), unique=True, max_size=8), max_size=5)


@pytest.mark.verifies("companion.rag.fusion.reciprocal_rank_fusion", against="the sum in exact fractions")
@pytest.mark.parametrize("k", [0, 1, 60, 1000])
def test_rank_fusion(agree, k):
    random = np.random.default_rng(0)
    rankings = [random.permutation(20)[: random.integers(1, 20)].tolist() for _ in range(5)]
    weights = [Fraction(1), Fraction(1, 2), Fraction(3), Fraction(0), Fraction(2)]
    exact = {
        document: sum(
            weight / (k + ranking.index(document) + 1)
            for ranking, weight in zip(rankings, weights, strict=True)
            if document in ranking
        )
        for document in set(itertools.chain(*rankings))
    }
    mine = reciprocal_rank_fusion(rankings, k=k, weights=[float(weight) for weight in weights])
    agree(dict(mine), {d: float(x) for d, x in exact.items()}, tolerance=1e-15, quantity="scores")
    assert [score for _, score in mine] == sorted((score for _, score in mine), reverse=True)


def test_rank_fusion_by_hand():
    fused = reciprocal_rank_fusion([["a", "b"], ["b", "c"]])
    assert fused == [("b", pytest.approx(1 / 62 + 1 / 61)), ("a", 1 / 61), ("c", 1 / 62)]
    # With a small k one first place beats two fourths; with a large one, being in both lists counts more.
    lists = [["x", "p", "q", "y"], ["r", "s", "t", "y"]]
    assert (
        reciprocal_rank_fusion(lists, k=0)[0][0] == "x" and reciprocal_rank_fusion(lists, k=60)[0][0] == "y"
    )


@given(RANKINGS)
def test_fusion_holds_every_document_once_and_one_list_as_it_is(rankings):
    fused = [document for document, _ in reciprocal_rank_fusion(rankings)]
    assert sorted(fused) == sorted(set(itertools.chain(*rankings)))
    for ranking in rankings:
        assert [document for document, _ in reciprocal_rank_fusion([ranking, ranking])] == ranking


@given(RANKINGS, st.floats(0.1, 100), st.floats(-50, 50))
def test_ranks_do_not_know_the_scale_of_scores_and_sums_do(rankings, scale, shift):
    scores = [{document: float(-rank) for rank, document in enumerate(ranking)} for ranking in rankings]
    other = [{document: x * scale + shift for document, x in system.items()} for system in scores]
    for normalise in ("minmax", "zscore"):
        mine, theirs = (dict(weighted_fusion(s, normalise=normalise)) for s in (scores, other))
        assert mine.keys() == theirs.keys()
        assert all(abs(mine[document] - theirs[document]) < 1e-6 for document in mine)


@pytest.mark.verifies("companion.rag.fusion.weighted_fusion", against="sklearn.preprocessing, summed")
@pytest.mark.parametrize("normalise", ["minmax", "zscore", "none"])
def test_weighted_fusion(agree, normalise):
    from sklearn.preprocessing import MinMaxScaler, StandardScaler

    random = np.random.default_rng(1)
    table, weights = random.normal(size=(12, 3)) * [1, 50, 0.01] + [0, 7, -3], [0.2, 1.0, 2.5]
    scaler = {"minmax": MinMaxScaler(), "zscore": StandardScaler()}.get(normalise)
    expected = (table if scaler is None else scaler.fit_transform(table)) @ weights
    systems = [dict(enumerate(column)) for column in table.T.tolist()]
    mine = weighted_fusion(systems, weights=weights, normalise=normalise)
    agree(dict(mine), dict(enumerate(expected.tolist())), tolerance=1e-12, quantity=f"scores, {normalise}")
    assert [document for document, _ in mine] == np.argsort(-expected).tolist()


def test_what_a_system_does_not_name_gets_its_lowest_score():
    fused = dict(weighted_fusion([{"a": 10.0, "b": 4.0}, {"b": 1.0, "c": 0.5}]))
    assert fused == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert dict(weighted_fusion([{"a": 3.0, "b": 3.0}])) == {"a": 0.0, "b": 0.0}


@pytest.mark.verifies(
    "companion.rag.fusion.maximal_marginal_relevance", against="the definition, one at a time"
)
@pytest.mark.parametrize("trade_off", [0.0, 0.3, 0.7, 1.0])
def test_marginal_relevance(agree, trade_off):
    random = np.random.default_rng(2)
    query, vectors = random.normal(size=5), random.normal(size=(14, 5))

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    chosen: list[int] = []
    while len(chosen) < 9:
        gains = {
            i: trade_off * cosine(query, vectors[i])
            - (1 - trade_off) * max((cosine(vectors[i], vectors[j]) for j in chosen), default=0.0)
            for i in range(14)
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.get))
    mine = maximal_marginal_relevance(query, vectors, 9, trade_off=trade_off)
    agree(mine.tolist(), chosen, tolerance=0, quantity="rows in the order of choice")


def test_a_copy_gives_way_to_something_else():
    vectors = np.array([[1.0, 0.1], [1.0, 0.1], [0.9, -0.4], [0.2, 1.0]])
    assert maximal_marginal_relevance([1, 0], vectors, 4, trade_off=1).tolist() == [0, 1, 2, 3]
    assert maximal_marginal_relevance([1, 0], vectors, 2, trade_off=0.5).tolist() == [0, 2]
    assert len(maximal_marginal_relevance([1, 0], vectors, 99)) == 4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reciprocal_rank_fusion([["a", "a"]]), r"rankings\[0\] must hold no document twice"),
        (lambda: reciprocal_rank_fusion([["a"]], k=-1), "k must be at least 0"),
        (
            lambda: reciprocal_rank_fusion([["a"]], weights=[1, 2]),
            "weights must be 1, one for each list, got 2",
        ),
        (lambda: weighted_fusion([{"a": float("nan")}]), r"scores\[0\] must be finite"),
        (lambda: weighted_fusion([{"a": 1.0}], normalise="softmax"), "normalise must be one of"),
        (lambda: maximal_marginal_relevance([1, 0], np.ones((2, 3)), 1), "must agree"),
        (lambda: maximal_marginal_relevance([1, 0], np.zeros((2, 2)), 1), "must not be zero"),
        (lambda: maximal_marginal_relevance([1, 0], np.ones((2, 2)), 1, trade_off=2), r"in \[0, 1\], got 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
