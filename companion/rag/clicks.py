"""Learning to rank from clicks, which say what was seen as much as what was good.

Under the position-based model (Craswell et al., 2008; Joachims, Swaminathan & Schnabel, 2017) a document at
rank r is clicked with probability θ_r · γ: its rank's chance of being examined, times its own of being
clicked when it is. Swapping results at random measures θ up to a factor; dividing each click by θ makes any
loss that is linear in the clicks what it would be with γ in their place, in expectation. REINFORCE (Williams,
1992) learns online instead, from the rewards of rankings that a Plackett–Luce policy draws.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from companion._checks import (
    INTEGER_DTYPES,
    check_choice,
    check_floating,
    check_number,
    check_positive,
    check_tensor,
)
from companion.masks import check_mask

# ------------------------------------------------------------------------------------------ a log of clicks


def examination(k: int, eta: float = 1.0) -> Tensor:
    """θ_r = (1 / r)^η for the ranks r = 1 … k, the decay of Joachims et al.'s simulations: (k,), float64.

    Args:
        eta: how strong the bias is; 0 for a reader who examines every rank.
    """
    check_positive("k", k)
    check_number("eta", eta)
    if eta < 0:
        raise ValueError(f"eta must be at least 0, got {eta}")
    return torch.arange(1, k + 1, dtype=torch.float64) ** -eta


def simulate_clicks(attraction: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Clicks of readers who follow the position-based model, each result on its own.

    Args:
        attraction: γ in [0, 1] of the documents in the order shown, (..., k).
        theta: chance of examination at each rank, (k,).

    Returns: bool (..., k).
    """
    _check_chances("theta", theta)
    _check_chances("attraction", attraction)
    if theta.dim() != 1 or attraction.dim() == 0 or attraction.shape[-1] != len(theta):
        raise ValueError(
            f"theta must have shape ({attraction.shape[-1] if attraction.dim() else 'k'},), "
            f"got {tuple(theta.shape)}"
        )
    chance = attraction * theta.to(attraction)
    drawn = torch.rand(chance.shape, dtype=torch.float64, generator=generator)
    return drawn.to(chance.device) < chance


# ---------------------------------------------------------------------------- propensities, and their use


def swap_at_random(rankings: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Rank 1 against another, drawn evenly for each session, swapped by a fair coin.

    Args:
        rankings: documents in the order of the ranker, (sessions, k), k ≥ 2.

    Returns: the rankings to show, and which rank (2 … k) each session's coin was about: (sessions,).
    """
    check_tensor("rankings", rankings)
    if rankings.dim() != 2 or rankings.shape[1] < 2 or len(rankings) == 0:
        raise ValueError(f"rankings must have shape (sessions, k ≥ 2), got {tuple(rankings.shape)}")
    sessions, k = rankings.shape
    partner = torch.randint(2, k + 1, (sessions,), generator=generator)
    coin = torch.rand(sessions, generator=generator) < 0.5
    shown, rows, ranks = rankings.clone(), torch.arange(sessions)[coin], partner[coin] - 1
    shown[rows, 0], shown[rows, ranks] = rankings[rows, ranks], rankings[rows, 0]
    return shown, partner


def estimate_propensities(clicks: Tensor, partner: Tensor) -> Tensor:
    """θ_r / θ_1 from sessions of `swap_at_random`: clicks at r over clicks at 1, where the coin was about r.

    The coin puts each of the two documents at each of the two ranks as often, so what they are worth
    cancels in the ratio of the two expectations; the ratio of two counts is consistent, not unbiased. A
    factor common to all propensities changes no optimum.

    Args:
        clicks: bool (sessions, k), by rank shown. partner: integers (sessions,) in 2 … k.

    Returns: (k,), float64, 1 at rank 1.
    Raises: ValueError where the sessions of a rank have no click at rank 1: there are too few of them.
    """
    check_mask("clicks", clicks)
    check_tensor("partner", partner)
    if clicks.dim() != 2 or partner.shape != clicks.shape[:1]:
        raise ValueError(f"partner must have shape {tuple(clicks.shape[:1])}, got {tuple(partner.shape)}")
    if ((partner < 2) | (partner > clicks.shape[1])).any():
        raise ValueError(f"partner must lie in 2 … {clicks.shape[1]}")
    ratios = [1.0]
    for rank in range(2, clicks.shape[1] + 1):
        about = clicks[partner == rank]
        first, here = int(about[:, 0].sum()), int(about[:, rank - 1].sum())
        if first == 0:
            raise ValueError(f"clicks must have one at rank 1 where rank {rank} was swapped, got none")
        ratios.append(here / first)
    return torch.tensor(ratios, dtype=torch.float64)


def ips_weights(clicks: Tensor, propensities: Tensor, clip: float = 0.0) -> Tensor:
    """Inverse propensity scores: 1 / θ for a click, 0 for none. E[weight] = γ where nothing is clipped.

    Args:
        clicks: bool (..., k). propensities: positive, broadcastable to clicks; that of the rank at which
            each document was shown.
        clip: smaller propensities count as this: less variance for some bias (0 clips nothing).

    Returns: the shape of clicks, the dtype of propensities.
    """
    check_mask("clicks", clicks)
    check_floating("propensities", propensities)
    if not (propensities > 0).all():
        raise ValueError("propensities must be positive: what is never examined cannot be corrected for")
    check_number("clip", clip)
    if clip < 0:
        raise ValueError(f"clip must be at least 0, got {clip}")
    return clicks / propensities.clamp(min=clip)


def ranking_loss(scores: Tensor, weights: Tensor, kind: str = "listwise") -> Tensor:
    """A loss that is linear in the weights of the documents; the mean over the lists.

    With relevance as weights it is the supervised loss, with clicks the naive one, with `ips_weights` the
    corrected one, whose expectation is the supervised one of γ.

    Args:
        scores: (..., k) of the ranker that learns, for the documents of each list, in any order.
        weights: (..., k), in that order, not negative.
        kind: "listwise", −Σ w_i log softmax(s)_i; "pairwise", Σ w_i Σ_(j ≠ i) log₂(1 + e^(s_j − s_i)), which
            is at least Σ w_i (rank of i − 1), the quantity of Joachims et al. (who bound it by a hinge).

    Returns: ().
    """
    check_choice("kind", kind, ("listwise", "pairwise"))
    check_floating("scores", scores)
    check_tensor("weights", weights)
    if scores.dim() == 0 or scores.numel() == 0 or weights.shape != scores.shape:
        raise ValueError(
            f"weights must have the shape of scores, not empty, {tuple(scores.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if (weights < 0).any():
        raise ValueError("weights must not be negative")
    if kind == "listwise":
        losses = -scores.log_softmax(-1)
    else:
        margins = scores.unsqueeze(-2) - scores.unsqueeze(-1)  # (..., i, j): s_j − s_i
        bits = F.softplus(margins) / torch.log(scores.new_tensor(2.0))
        losses = bits.sum(-1) - 1  # without j = i, which is log₂ 2
    return (weights * losses).sum(-1).mean()


# ------------------------------------------------------------------------- REINFORCE over Plackett–Luce


def sample_rankings(scores: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
    """Rankings drawn from Plackett–Luce: place by place, softmax over the documents not yet placed.

    Sorting the scores with Gumbel noise added draws exactly so (Yellott, 1977).

    Shape: scores (..., k) → int64 (samples, ..., k), rows of scores in ranked order.
    """
    check_floating("scores", scores)
    check_positive("samples", samples)
    drawn = torch.rand((samples, *scores.shape), dtype=torch.float64, generator=generator).to(scores.device)
    return (scores.detach().double() - (-drawn.log()).log()).argsort(-1, descending=True)


def plackett_luce_log_prob(scores: Tensor, rankings: Tensor) -> Tensor:
    """log Π_r exp(s at rank r) / Σ_(r' ≥ r) exp(s at rank r').

    Shape: scores (..., k), rankings (samples, ..., k), permutations of 0 … k − 1 → (samples, ...).
    """
    check_floating("scores", scores)
    check_tensor("rankings", rankings)
    if rankings.dtype not in INTEGER_DTYPES:
        raise TypeError(f"rankings must be an integer tensor, got {rankings.dtype}")
    if scores.dim() == 0 or rankings.dim() != scores.dim() + 1 or rankings.shape[1:] != scores.shape:
        raise ValueError(
            f"rankings must have shape (samples, *{tuple(scores.shape)}), got {tuple(rankings.shape)}"
        )
    if (rankings.sort(-1).values != torch.arange(scores.shape[-1], device=rankings.device)).any():
        raise ValueError(f"rankings must be permutations of 0 … {scores.shape[-1] - 1}")
    ranked = scores.expand(rankings.shape).gather(-1, rankings.long())
    remaining = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    return (ranked - remaining).sum(-1)


def reinforce_loss(scores: Tensor, rankings: Tensor, rewards: Tensor) -> Tensor:
    """A surrogate whose gradient estimates that of −E[reward] without bias; its value means nothing.

    Each sample's reward is compared with the mean of the others (the leave-one-out baseline: Kool, van Hoof
    & Welling, 2019), which is independent of it and takes out the variance that all samples share.

    Args:
        scores: (..., k), of which the rankings (samples, ..., k) were drawn.
        rewards: (samples, ...), of each ranking: its clicks, say, or its nDCG. At least 2 samples.

    Returns: (), the mean over samples and lists.
    """
    log_probs = plackett_luce_log_prob(scores, rankings)
    check_tensor("rewards", rewards)
    if rewards.shape != log_probs.shape or len(rewards) < 2:
        raise ValueError(
            f"rewards must have shape {tuple(log_probs.shape)} with at least 2 samples, "
            f"got {tuple(rewards.shape)}"
        )
    rewards = rewards.detach().to(scores.dtype)
    baseline = (rewards.sum(0) - rewards) / (len(rewards) - 1)
    return -((rewards - baseline) * log_probs).mean()


def expected_reward(scores: Tensor, reward: Callable[[Tensor], Tensor]) -> Tensor:
    """E[reward] under Plackett–Luce by a sum over all k! rankings: exact and differentiable, for k ≤ 8.

    Args:
        scores: (k,).
        reward: from rankings (k!, k) to their rewards (k!,).

    Returns: ().
    """
    check_floating("scores", scores)
    if scores.dim() != 1 or not 1 <= len(scores) <= 8:
        raise ValueError(f"scores must have shape (k,) with k from 1 to 8, got {tuple(scores.shape)}")
    rankings = torch.tensor(list(itertools.permutations(range(len(scores)))), device=scores.device)
    return (plackett_luce_log_prob(scores, rankings).exp() * reward(rankings).to(scores)).sum()


def _check_chances(name: str, x: Tensor) -> None:
    check_floating(name, x)
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"{name} must lie in [0, 1]")
