"""How two implementations are timed: in turn, in one process, on one thread, in CPU seconds.

A ratio is our time over theirs within one pair of neighbouring samples, so that whatever slows the machine
slows both; the order within a pair alternates. The claim is the median over the pairs, with the range beside
it. CPU seconds count what the process itself computed, not what it waited for while others ran.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Prepares one run, untimed, and returns what is timed: `lambda: step`, or a tokenizer loaded afresh.
Setup = Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Comparison:
    """Our implementation beside a peer's.

    Args:
        name: the mechanism.
        work: the size of the work, in words.
        peer: what it is compared with; begins with the distribution's import name.
        ours, theirs: set-ups of the two runs.
        at_most: the ratio that must be reached, or None.
    """

    name: str
    work: str
    peer: str
    ours: Setup
    theirs: Setup
    at_most: float | None = None


@dataclass(frozen=True)
class Count:
    """Our work beside a peer's, counted instead of timed.

    Args:
        name, work, peer, at_most: as in `Comparison`.
        ratios: counts ours over theirs, at least five of them.
    """

    name: str
    work: str
    peer: str
    ratios: Callable[[], Sequence[float]]
    at_most: float | None = None


@dataclass(frozen=True)
class Growth:
    """The cost of a mechanism against a size.

    Args:
        name, work, at_most: as in `Comparison`; at_most bounds the exponent.
        sizes: the sizes tried, increasing.
        setup: from a size to the set-up of a run.
        units: how many units of work a run of a size does; the cost is that of one unit.
    """

    name: str
    work: str
    sizes: Sequence[int]
    setup: Callable[[int], Setup]
    units: Callable[[int], int] = lambda size: 1
    at_most: float | None = None


def count(case: Count) -> dict:
    """Ratio (the median), low, high and the number of pairs of a count."""
    ratios = case.ratios()
    return {
        "ratio": _rounded(statistics.median(ratios)),
        "low": _rounded(min(ratios)),
        "high": _rounded(max(ratios)),
        "pairs": len(ratios),
    }


def compare(case: Comparison, pairs: int = 9, seconds: float = 0.3) -> dict:
    """Time a comparison: `pairs` pairs of samples, each sample at least `seconds` long.

    Returns: ratio (the median), low, high and the number of pairs.
    """
    if pairs < 5:
        raise ValueError(
            f"pairs must be at least 5, for a median that one disturbance cannot move, got {pairs}"
        )
    repeats = {
        setup: _repeats(setup, seconds) for setup in (case.ours, case.theirs)
    }  # this also warms both up
    ratios = []
    for pair in range(pairs):
        order = (case.ours, case.theirs) if pair % 2 == 0 else (case.theirs, case.ours)
        spent = {setup: _sample(setup, repeats[setup]) for setup in order}
        ratios.append(spent[case.ours] / spent[case.theirs])
    return {
        "ratio": _rounded(statistics.median(ratios)),
        "low": _rounded(min(ratios)),
        "high": _rounded(max(ratios)),
        "pairs": pairs,
    }


def grow(case: Growth, rounds: int = 5, seconds: float = 0.2) -> dict:
    """Time a growth at each size, round after round, and fit cost ∝ size^exponent to the medians.

    Returns: the sizes, the cost of a unit at each relative to the first, and the exponent.
    """
    setups = {size: case.setup(size) for size in case.sizes}
    repeats = {size: _repeats(setup, seconds) for size, setup in setups.items()}
    samples: dict[int, list[float]] = {size: [] for size in case.sizes}
    for _ in range(rounds):
        for size, setup in setups.items():
            samples[size].append(_sample(setup, repeats[size]) / case.units(size))
    costs = [statistics.median(samples[size]) for size in case.sizes]
    slope = statistics.linear_regression(
        [math.log(s) for s in case.sizes], [math.log(c) for c in costs]
    ).slope
    relative = [_rounded(cost / costs[0]) for cost in costs]
    return {"sizes": list(case.sizes), "costs": relative, "exponent": _rounded(slope), "rounds": rounds}


def _repeats(setup: Setup, seconds: float) -> int:
    """How many runs make a sample of about `seconds`, judged by the second run; the first one warms up."""
    _sample(setup, 1)
    return max(1, math.ceil(seconds / max(_sample(setup, 1), 1e-6)))


def _sample(setup: Setup, repeats: int) -> float:
    """CPU seconds of a run, the mean over `repeats` of them."""
    spent = 0.0
    for _ in range(repeats):
        run = setup()
        begin = time.process_time()
        run()
        spent += time.process_time() - begin
    return spent / repeats


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
