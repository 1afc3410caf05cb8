"""companion.rag.clicks beside enumerated expectations: every click pattern, every ranking, every coin."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from companion.rag.clicks import (
    estimate_propensities,
    examination,
    expected_reward,
    ips_weights,
    plackett_luce_log_prob,
    ranking_loss,
    reinforce_loss,
    sample_rankings,
    simulate_clicks,
    swap_at_random,
)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------ a log of clicks


@pytest.mark.verifies("companion.rag.clicks.examination", against="exact fractions")
def test_examination(agree):
    for eta in (0, 1, 2):
        exact = [float(Fraction(1, rank**eta)) for rank in range(1, 8)]
        agree(
            examination(7, eta),
            torch.tensor(exact, dtype=torch.float64),
            tolerance=1e-15,
            quantity="propensities",
        )


@pytest.mark.verifies("companion.rag.clicks.simulate_clicks", against="the product of two chances, drawn")
def test_clicks(agree):
    """200,000 draws of a chance c have standard error √(c (1 − c) / 200,000), at most 0.0011."""
    attraction, theta = torch.tensor([0.9, 0.1, 0.5, 0.0, 1.0]), torch.tensor([1.0, 0.7, 0.4, 0.5, 0.3])
    clicks = simulate_clicks(attraction.expand(200_000, 5), theta, _generator())
    rates = clicks.double().mean(0)
    expected = torch.tensor([0.9, 0.07, 0.2, 0.0, 0.3], dtype=torch.float64)
    agree(rates, expected, tolerance=0.005, quantity="click rate, 200,000 sessions")
    both = (clicks[:, 0] & clicks[:, 2]).double().mean()  # independent of one another
    assert both.item() == pytest.approx(0.18, abs=0.005)


# -------------------------------------------------------------------------------------------- propensities


def test_swaps_are_those_of_a_fair_coin():
    rankings = torch.stack([torch.randperm(5) for _ in range(8000)])
    shown, partner = swap_at_random(rankings, _generator())
    swapped = 0
    for before, after, rank in zip(rankings.tolist(), shown.tolist(), partner.tolist(), strict=True):
        other = list(before)
        other[0], other[rank - 1] = before[rank - 1], before[0]
        assert after in (before, other)
        swapped += after == other
    assert abs(swapped - 4000) < 5 * math.sqrt(2000)
    assert (torch.bincount(partner, minlength=6)[2:] - 2000).abs().max() < 5 * math.sqrt(1500)
    assert partner.min() == 2


def _expected_log(attraction, theta):
    """A log in which each outcome of coin and readers stands as often as its chance says, of 512.

    Attraction by the ranker's order; the chances are fractions, so that nothing is rounded.
    """
    rows, partners = [], []
    for rank in range(2, len(theta) + 1):
        for is_swapped in (False, True):
            order = list(range(len(theta)))
            if is_swapped:
                order[0], order[rank - 1] = order[rank - 1], order[0]
            for pattern in itertools.product([True, False], repeat=len(theta)):
                chance = Fraction(1)
                for place, clicked in enumerate(pattern):
                    click = theta[place] * attraction[order[place]]
                    chance *= click if clicked else 1 - click
                count = chance * 8**3
                assert count.denominator == 1
                rows += [pattern] * int(count)
                partners += [rank] * int(count)
    return torch.tensor(rows), torch.tensor(partners)


@pytest.mark.verifies("companion.rag.clicks.estimate_propensities", against="enumeration of coin and readers")
@pytest.mark.parametrize("attraction", [(1, 1, 1), (1, 0, Fraction(1, 2)), (0, Fraction(1, 2), 1)])
def test_propensities(agree, attraction):
    theta = [Fraction(1), Fraction(1, 2), Fraction(1, 4)]
    clicks, partner = _expected_log([Fraction(a) for a in attraction], theta)
    mine = estimate_propensities(clicks, partner)
    exact = torch.tensor([float(t) for t in theta], dtype=torch.float64)
    agree(mine, exact, tolerance=1e-15, quantity="propensities, from the expected log")


def test_without_the_coin_click_rates_mix_position_and_worth():
    attraction, theta = torch.tensor([0.9, 0.5, 0.2]).double(), examination(3, 0.5)
    rankings = torch.arange(3).expand(100_000, 3)
    rates = simulate_clicks(attraction.expand(100_000, 3), theta, _generator()).double().mean(0)
    assert (rates / rates[0] - theta).abs().max() > 0.2
    shown, partner = swap_at_random(rankings, _generator(1))
    clicks = simulate_clicks(attraction[shown], theta, _generator(2))
    torch.testing.assert_close(estimate_propensities(clicks, partner), theta, atol=0.02, rtol=0)


# ---------------------------------------------------------------------------- inverse propensity weighting


def _expectation(chances, function):
    """E[function(clicks)] over all 2^k patterns of independent clicks."""
    total = 0.0
    for pattern in itertools.product([True, False], repeat=len(chances)):
        chance = math.prod(c if clicked else 1 - c for c, clicked in zip(chances, pattern, strict=True))
        total = total + chance * function(torch.tensor(pattern))
    return total


GAMMA = torch.tensor([0.2, 0.9, 0.0, 0.6], dtype=torch.float64)
THETA = torch.tensor([1.0, 0.5, 0.35, 0.1], dtype=torch.float64)


@pytest.mark.verifies("companion.rag.clicks.ips_weights", against="enumeration of all click patterns")
@pytest.mark.parametrize("kind", ["listwise", "pairwise"])
def test_the_corrected_loss_is_unbiased_and_the_naive_one_is_not(agree, kind):
    scores, chances = torch.randn(4).double().requires_grad_(), (GAMMA * THETA).tolist()

    def gradient(loss):
        return torch.autograd.grad(loss, scores)[0]

    supervised = ranking_loss(scores, GAMMA, kind)
    corrected = _expectation(chances, lambda clicks: ranking_loss(scores, ips_weights(clicks, THETA), kind))
    agree(corrected, supervised, tolerance=1e-12, quantity=f"expected loss, {kind}")
    agree(gradient(corrected), gradient(supervised), tolerance=1e-12, quantity=f"expected gradient, {kind}")
    naive = _expectation(chances, lambda clicks: ranking_loss(scores, clicks.double(), kind))
    agree(naive, ranking_loss(scores, GAMMA * THETA, kind), tolerance=1e-12, quantity=f"naive loss, {kind}")
    assert abs(naive - supervised) > 0.1
    clipped = _expectation(chances, lambda clicks: ips_weights(clicks, THETA, 0.4))
    bias = torch.tensor([1, 1, 0.35 / 0.4, 0.1 / 0.4], dtype=torch.float64)
    agree(clipped, GAMMA * bias, tolerance=1e-12, quantity="expected weights, clipped at 0.4")


@pytest.mark.verifies(
    "companion.rag.clicks.ranking_loss", against="torch.nn.functional.cross_entropy, soft targets"
)
@pytest.mark.parametrize("lists", [1, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_listwise(agree, lists, dtype, tolerance):
    scores, weights = torch.randn(lists, 5, dtype=dtype), torch.rand(lists, 5, dtype=dtype)
    expected = F.cross_entropy(scores, weights)
    agree(ranking_loss(scores, weights), expected, tolerance=tolerance, quantity="listwise")


@pytest.mark.verifies("companion.rag.clicks.ranking_loss", against="the definition, one pair at a time")
@pytest.mark.parametrize("lists", [1, 3])
def test_pairwise(agree, lists):
    scores, weights = 3 * torch.randn(lists, 5).double(), torch.rand(lists, 5).double()
    expected, ranks = 0.0, 0.0
    for s, w in zip(scores.tolist(), weights.tolist(), strict=True):
        for i, j in itertools.permutations(range(5), 2):
            expected += w[i] * math.log2(1 + math.exp(s[j] - s[i])) / lists
            ranks += w[i] * (s[j] > s[i]) / lists
    mine = ranking_loss(scores, weights, "pairwise")
    agree(mine, torch.tensor(expected, dtype=torch.float64), tolerance=1e-12, quantity="pairwise")
    assert mine >= ranks
    assert ranking_loss(1000 * scores, weights, "pairwise").isfinite()


def test_naive_clicks_confirm_the_ranker_and_corrected_ones_do_not():
    """The best document is shown last. 30,000 sessions, one learnt score a document."""
    gamma, theta = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7]).double(), examination(5, 1.0)
    clicks = simulate_clicks(gamma.expand(30_000, 5), theta, _generator())
    orders = {}
    for name, weights in (("naive", clicks.double()), ("corrected", ips_weights(clicks, theta))):
        scores = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([scores], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            ranking_loss(scores, weights.mean(0)).backward()  # linear in the weights: their mean will do
            optimizer.step()
        orders[name] = scores.argsort(descending=True).tolist()
    assert orders == {"naive": [0, 1, 2, 3, 4], "corrected": [4, 3, 2, 1, 0]}


# ------------------------------------------------------------------------- REINFORCE over Plackett–Luce


def _chance(scores, ranking):
    """Place by place: the chosen document's share of what is left."""
    left, chance = list(range(len(scores))), 1.0
    for document in ranking:
        chance = chance * scores[document].exp() / sum(scores[other].exp() for other in left)
        left.remove(document)
    return chance


@pytest.mark.verifies("companion.rag.clicks.plackett_luce_log_prob", against="place by place")
def test_plackett_luce(agree):
    scores = torch.randn(4).double().requires_grad_()
    rankings = torch.tensor(list(itertools.permutations(range(4))))
    mine = plackett_luce_log_prob(scores, rankings)
    chances = torch.stack([_chance(scores, ranking) for ranking in rankings.tolist()])
    agree(mine.exp(), chances, tolerance=1e-14, quantity="probabilities of all rankings")
    assert mine.exp().sum().item() == pytest.approx(1, abs=1e-14)
    weights = torch.randn(24).double()
    gradients = [torch.autograd.grad(weights @ logs, scores)[0] for logs in (mine, chances.log())]
    agree(*gradients, tolerance=1e-13, quantity="gradient")
    batched = plackett_luce_log_prob(torch.stack([scores, scores + 7]), rankings[:, None].expand(24, 2, 4))
    torch.testing.assert_close(batched, mine[:, None].expand(24, 2))


@pytest.mark.verifies("companion.rag.clicks.sample_rankings", against="enumeration of all rankings")
def test_samples(agree):
    """Of 100,000 draws a share has standard error at most 0.0016."""
    scores = torch.tensor([[1.0, 0.0, -0.5], [0.0, 0.0, 2.0]]).double()
    drawn = sample_rankings(scores, 100_000, _generator())
    for row in range(2):
        for ranking in itertools.permutations(range(3)):
            share = (drawn[:, row] == torch.tensor(ranking)).all(-1).double().mean()
            agree(share, _chance(scores[row], ranking), tolerance=0.008, quantity="share of 100,000 draws")


def _exact_gradient(scores, rewards):
    expectation = sum(reward * _chance(scores, ranking) for ranking, reward in rewards.items())
    return expectation, torch.autograd.grad(expectation, scores)[0]


@pytest.mark.verifies("companion.rag.clicks.reinforce_loss", against="enumeration of all tuples of rankings")
@pytest.mark.parametrize("samples", [2, 3])
def test_reinforce_is_unbiased(agree, samples):
    scores = torch.randn(3).double().requires_grad_()
    rewards = {ranking: torch.randn(()).double() for ranking in itertools.permutations(range(3))}
    estimate = torch.zeros(3).double()
    for drawn in itertools.product(rewards, repeat=samples):
        chance = math.prod(_chance(scores.detach(), ranking) for ranking in drawn)
        loss = reinforce_loss(scores, torch.tensor(drawn), torch.stack([rewards[r] for r in drawn]))
        estimate -= chance * torch.autograd.grad(loss, scores)[0]
    exact = _exact_gradient(scores, rewards)[1]
    agree(estimate, exact, tolerance=1e-12, quantity="expected gradient")
    assert exact.abs().max() > 1e-3


@pytest.mark.verifies("companion.rag.clicks.expected_reward", against="enumeration of all rankings")
@pytest.mark.parametrize("k", [1, 2, 4])
def test_expected_reward(agree, k):
    scores, discount = torch.randn(k).double().requires_grad_(), examination(k)
    mine = expected_reward(scores, lambda rankings: (GAMMA[:k][rankings] * discount).sum(-1))
    rewards = {
        ranking: sum(float(GAMMA[document]) / rank for rank, document in enumerate(ranking, 1))
        for ranking in itertools.permutations(range(k))
    }
    value, gradient = _exact_gradient(scores, rewards)
    agree(mine, value, tolerance=1e-13, quantity="value")
    agree(torch.autograd.grad(mine, scores)[0], gradient, tolerance=1e-13, quantity="gradient")


def test_a_reward_that_all_rankings_share_teaches_nothing():
    scores = torch.randn(2, 5).double().requires_grad_()
    rankings, rewards = sample_rankings(scores, 8, _generator()), torch.rand(8, 2).double()
    first, second = (
        torch.autograd.grad(reinforce_loss(scores, rankings, rewards + shift), scores)[0] for shift in (0, 50)
    )
    torch.testing.assert_close(first, second)


def test_clicks_alone_teach_a_policy_the_best_order():
    """The reward is the number of clicks, E = Σ θ γ: no propensity is known, the expected reward judges."""
    gamma, theta = torch.tensor([0.1, 0.3, 0.5, 0.9]).double(), examination(4, 1.0)
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer, generator = torch.optim.Adam([scores], lr=0.05), _generator()

    def value():
        return expected_reward(scores.detach(), lambda rankings: (gamma[rankings] * theta).sum(-1)).item()

    best, at_first = (gamma.flip(0) * theta).sum().item(), value()
    for _ in range(200):
        rankings = sample_rankings(scores, 64, generator)
        clicks = simulate_clicks(gamma[rankings], theta, generator)
        optimizer.zero_grad()
        reinforce_loss(scores, rankings, clicks.sum(-1).double()).backward()
        optimizer.step()
    assert scores.argsort(descending=True).tolist() == [3, 2, 1, 0]
    assert best - value() < 0.1 * (best - at_first)


# ------------------------------------------------------------------------------------------------ bad input

HALF = torch.full((2, 3), 0.5)
RANKINGS = torch.tensor([[0, 1, 2], [2, 1, 0]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: examination(0), ValueError, "k must be at least 1"),
        (lambda: examination(3, -1), ValueError, "eta must be at least 0, got -1"),
        (lambda: simulate_clicks(HALF * 3, HALF[0]), ValueError, r"attraction must lie in \[0, 1\]"),
        (lambda: simulate_clicks(HALF, HALF), ValueError, r"theta must have shape \(3,\), got \(2, 3\)"),
        (lambda: simulate_clicks(HALF, HALF[0] * float("nan")), ValueError, "theta must lie in"),
        (lambda: swap_at_random(RANKINGS[:, :1]), ValueError, "rankings must have shape"),
        (lambda: estimate_propensities(HALF, RANKINGS[0]), TypeError, "clicks must be a bool tensor"),
        (
            lambda: estimate_propensities(HALF > 1, torch.tensor([2, 3])),
            ValueError,
            "clicks must have one at rank 1 where rank 2 was swapped, got none",
        ),
        (
            lambda: estimate_propensities(HALF > 0, torch.tensor([1, 4])),
            ValueError,
            "partner must lie in 2 … 3",
        ),
        (lambda: estimate_propensities(HALF > 0, RANKINGS), ValueError, r"partner must have shape \(2,\)"),
        (lambda: ips_weights(HALF > 0, HALF * 0), ValueError, "propensities must be positive"),
        (lambda: ips_weights(HALF > 0, HALF, -1), ValueError, "clip must be at least 0, got -1"),
        (lambda: ips_weights(HALF, HALF), TypeError, "clicks must be a bool tensor"),
        (lambda: ranking_loss(HALF, HALF[0]), ValueError, "weights must have the shape of scores"),
        (lambda: ranking_loss(HALF, -HALF), ValueError, "weights must not be negative"),
        (lambda: ranking_loss(HALF, HALF, "point"), ValueError, "kind must be one of 'listwise', 'pairwise'"),
        (lambda: sample_rankings(HALF, 0), ValueError, "samples must be at least 1"),
        (lambda: plackett_luce_log_prob(HALF[0], RANKINGS + 1), ValueError, "must be permutations of 0 … 2"),
        (lambda: plackett_luce_log_prob(HALF, RANKINGS), ValueError, "rankings must have shape"),
        (lambda: plackett_luce_log_prob(HALF[0], HALF), TypeError, "rankings must be an integer tensor"),
        (
            lambda: reinforce_loss(HALF[0], RANKINGS[:1], HALF[0, :1]),
            ValueError,
            "rewards must have shape .* with at least 2 samples",
        ),
        (
            lambda: expected_reward(torch.zeros(9), None),
            ValueError,
            "scores must have shape .k,. with k from",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
