"""companion.rag.evaluate beside ir_measures and scikit-learn, and beside enumeration."""

import itertools

import numpy as np
import pytest

from companion.rag.evaluate import (
    average_precision,
    bootstrap,
    compare,
    contains_answer,
    exact_match,
    ndcg,
    normalise,
    precision,
    recall,
    reciprocal_rank,
    score_rankings,
    token_f1,
)


def _random_task(queries=40, documents=60, seed=0):
    """Graded judgments, and rankings of unequal length that miss some relevant documents."""
    random = np.random.default_rng(seed)
    judgments, rankings = {}, {}
    for query in range(queries):
        names = [f"d{i}" for i in range(documents)]
        chosen = random.choice(names, random.integers(1, 12), replace=False)
        judgments[f"q{query}"] = {name: int(random.integers(0, 4)) for name in chosen}
        judgments[f"q{query}"][names[query]] = 1 + query % 3
        rankings[f"q{query}"] = list(random.permutation(names)[: random.integers(1, documents)])
    return rankings, judgments


JUDGED = {
    "recall": (recall, "R@7", {"k": 7}),
    "precision": (precision, "P@7", {"k": 7}),
    "reciprocal_rank": (reciprocal_rank, "RR", {}),
    "reciprocal_rank, cut": (reciprocal_rank, "RR@5", {"k": 5}),
    "average_precision": (average_precision, "AP", {}),
    "average_precision, cut": (average_precision, "AP@9", {"k": 9}),
    "ndcg": (ndcg, "nDCG", {}),
    "ndcg, cut": (ndcg, "nDCG@10", {"k": 10}),
}


@pytest.mark.verifies("companion.rag.evaluate.recall", against="ir_measures")
@pytest.mark.verifies("companion.rag.evaluate.precision", against="ir_measures")
@pytest.mark.verifies("companion.rag.evaluate.reciprocal_rank", against="ir_measures")
@pytest.mark.verifies("companion.rag.evaluate.average_precision", against="ir_measures")
@pytest.mark.verifies("companion.rag.evaluate.ndcg", against="ir_measures")
@pytest.mark.parametrize("name", JUDGED)
def test_metrics(agree, name):
    import ir_measures

    metric, judge, options = JUDGED[name]
    rankings, judgments = _random_task()
    run = {
        query: {document: -float(rank) for rank, document in enumerate(ranking)}
        for query, ranking in rankings.items()
    }
    theirs = {
        each.query_id: each.value
        for each in ir_measures.iter_calc([ir_measures.parse_measure(judge)], judgments, run)
    }
    mine = dict(zip(judgments, score_rankings(rankings, judgments, metric, **options), strict=True))
    assert len({round(value, 6) for value in mine.values()}) > 3
    agree(mine, theirs, tolerance=1e-12, quantity=name)


@pytest.mark.verifies("companion.rag.evaluate.ndcg", against="sklearn.metrics.ndcg_score")
def test_exponential_gain(agree):
    from sklearn.metrics import ndcg_score

    rankings, judgments = _random_task(seed=1)
    for query, relevance in judgments.items():
        documents = sorted(set(rankings[query]) | set(relevance))
        places = {document: rank for rank, document in enumerate(rankings[query])}
        scores = [-places.get(document, 1000 + i) for i, document in enumerate(documents)]
        gains = [2.0 ** relevance.get(document, 0) - 1 for document in documents]
        found = len(set(rankings[query]))
        k = min(10, found)
        theirs = ndcg_score([gains], [scores], k=k)
        agree(
            ndcg(rankings[query], relevance, k, gain="exponential"), theirs, tolerance=1e-12, quantity="gain"
        )


def test_by_hand():
    relevance = {"a": 1, "b": 1, "z": 0}
    ranking = ["x", "a", "z", "b"]
    assert recall(ranking, relevance, 2) == 0.5 and precision(ranking, relevance, 2) == 0.5
    assert precision(["a"], relevance, 4) == 0.25
    assert reciprocal_rank(ranking, relevance) == 0.5 and reciprocal_rank(ranking, relevance, 1) == 0
    assert average_precision(ranking, relevance) == pytest.approx((1 / 2 + 2 / 4) / 2)
    best = 1 + 1 / np.log2(3)
    assert ndcg(ranking, relevance) == pytest.approx((1 / np.log2(3) + 1 / np.log2(5)) / best)


def test_a_query_without_an_answer_counts():
    scores = score_rankings({"q": ["a"]}, {"q": {"a": 1}, "r": {"a": 1}}, recall, k=1)
    assert scores.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="rankings must be of queries that are judged, got 's'"):
        score_rankings({"s": []}, {"q": {"a": 1}}, recall, k=1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: recall(["a"], {"a": 0}, 1), "at least one relevant document"),
        (lambda: recall(["a", "a"], {"a": 1}, 1), "no document twice"),
        (lambda: recall(["a"], {"a": 1}, 0), "k must be at least 1"),
        (lambda: ndcg(["a"], {"a": 1}, gain="log"), "gain must be one of"),
        (lambda: exact_match("a", []), "at least one accepted answer"),
        (lambda: bootstrap([1.0]), "at least two numbers"),
        (lambda: bootstrap([1.0, float("nan")]), "values must be finite"),
        (lambda: compare([1.0, 2.0], [1.0, 2.0, 3.0]), "second must have as many values"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_truths_must_be_a_list():
    with pytest.raises(TypeError, match="truths must be a sequence of strings"):
        exact_match("a", "a")


def test_answers():
    assert normalise("The  Cat's hat, a dog!") == "cats hat dog"
    assert exact_match("the Eiffel Tower.", ["Louvre", "Eiffel tower"]) == 1
    assert exact_match("Eiffel", ["Eiffel tower"]) == 0
    assert contains_answer("It is the Eiffel Tower in Paris.", ["Eiffel tower"]) == 1
    assert contains_answer("It cost 1000 francs.", ["100"]) == 0  # words, not characters
    assert token_f1("the tower in Paris", ["Eiffel Tower"]) == pytest.approx(2 * 1 / (3 + 2))
    assert token_f1("tower tower", ["tower"]) == pytest.approx(2 * 1 / (2 + 1))
    assert token_f1("", ["x"]) == 0 and token_f1("the", ["a"]) == 1


BY_HAND = [  # answer, truth; normalised answer; exact match; F1 as (words in common, words of both)
    ("The Tower.", "tower", "tower", 1, (1, 2)),
    ("an A-bomb", "a bomb", "abomb", 0, (0, 2)),
    ("in   PARIS, in 1889", "Paris in 1889", "in paris in 1889", 0, (3, 7)),
    ("it's the 'Theory'", "its theory", "its theory", 1, (2, 4)),
    ("athens", "thens", "athens", 0, (0, 2)),
    ("one two two", "two two three", "one two two", 0, (2, 6)),
    ("the", "paris", "", 0, (0, 1)),
]


@pytest.mark.verifies("companion.rag.evaluate.exact_match", against="SQuAD's rules, by hand")
@pytest.mark.verifies("companion.rag.evaluate.token_f1", against="SQuAD's rules, by hand")
@pytest.mark.verifies("companion.rag.evaluate.normalise", against="SQuAD's rules, by hand")
@pytest.mark.parametrize("answer, truth, normalised, match, words", BY_HAND)
def test_answers_as_squad_scores_them(agree, answer, truth, normalised, match, words):
    agree([normalise(answer)], [normalised], tolerance=0, quantity="normalised text")
    agree(exact_match(answer, [truth]), float(match), tolerance=0, quantity="exact match")
    common, both = words
    agree(token_f1(answer, [truth]), 2 * common / both, tolerance=1e-12, quantity="F1")


@pytest.mark.verifies("companion.rag.evaluate.contains_answer", against="by hand")
def test_an_answer_in_a_sentence(agree):
    found = [
        contains_answer(answer, ["New York"])
        for answer in ("It is in new york.", "It is York, New", "newyork", "New York-based", "york new york")
    ]
    agree(found, [1.0, 0.0, 0.0, 0.0, 1.0], tolerance=0, quantity="found or not")


@pytest.mark.verifies("companion.rag.evaluate.bootstrap", against="scipy.stats.bootstrap")
def test_the_interval_is_that_of_the_library(agree):
    from scipy import stats

    values = np.random.default_rng(3).exponential(size=57)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    mine = bootstrap(values, resamples=20_000)
    assert mine.mean == values.mean()
    agree(
        np.array([mine.low, mine.high]),
        np.array(theirs),
        tolerance=0.02,
        quantity="bounds, other random draws",
    )


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = sum(
        estimate.low <= 1 <= estimate.high
        for _ in range(300)
        for estimate in [bootstrap(random.exponential(size=60), level=0.9, resamples=400)]
    )
    assert 0.82 < hits / 300 < 0.95


@pytest.mark.verifies("companion.rag.evaluate.compare", against="all 2^n sign flips, enumerated")
def test_the_p_value_is_that_of_all_sign_flips(agree):
    random = np.random.default_rng(5)
    first, second = random.normal(0.4, 1, 11), random.normal(0, 1, 11)
    difference = first - second
    sums = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=11)]
    exact = np.mean([total >= abs(difference.sum()) - 1e-9 for total in sums])
    estimate = compare(first, second, resamples=100_000)
    assert 0.01 < exact < 0.9
    agree(estimate.p, float(exact), tolerance=0.01, quantity="p-value")
    assert estimate.low < estimate.mean < estimate.high
    assert compare(first, first).p == 1
