"""companion.train.schedule beside torch's schedulers and the curve's own properties."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from companion.train.schedule import noam


def _rates(scheduler_of, lr, steps):
    """The rates of a torch scheduler at its first `steps` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, rates = scheduler_of(optimizer), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.verifies("companion.train.schedule.noam", against="torch.optim.lr_scheduler.LinearLR")
@pytest.mark.parametrize("d_model, warmup", [(512, 40), (33, 7)])
def test_rise_is_linear(agree, d_model, warmup):
    peak = 1 / math.sqrt(d_model * warmup)
    linear = _rates(lambda o: LinearLR(o, 1 / warmup, total_iters=warmup - 1), peak, warmup)
    mine = [noam(step, d_model, warmup) for step in range(1, warmup + 1)]
    agree(mine, linear, tolerance=1e-15, quantity="learning rate, warm-up")


@pytest.mark.verifies("companion.train.schedule.noam", against="closed form")
def test_known_values(agree):
    fall = [1 / math.sqrt(512 * step) for step in (4000, 16000, 100_000)]
    agree([noam(s, 512, 4000) for s in (4000, 16000, 100_000)], fall, tolerance=1e-15, quantity="decay")
    agree(noam(4000, 512, 4000), 6.9877e-4, tolerance=1e-8, quantity="peak at d_model 512, warmup 4000")
    agree(noam(1, 64, 1, factor=2.0), 0.25, tolerance=1e-15, quantity="first step without warm-up")


def test_peak_is_at_warmup():
    assert max(range(1, 2000), key=lambda step: noam(step, 128, 400)) == 400


def test_works_in_lambda_lr():
    rates = _rates(lambda o: LambdaLR(o, lambda done: noam(done + 1, 64, 10)), 1.0, 30)
    assert rates == [noam(step, 64, 10) for step in range(1, 31)]


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"step": 0}, ValueError, "step.*0"),
        ({"step": -3}, ValueError, "step.*-3"),
        ({"step": 1.0}, TypeError, "step"),
        ({"d_model": 0}, ValueError, "d_model"),
        ({"warmup": 0}, ValueError, "warmup"),
        ({"factor": 0.0}, ValueError, "factor"),
        ({"factor": math.inf}, ValueError, "factor"),
        ({"factor": math.nan}, ValueError, "factor"),
    ],
)
def test_bad_input(arguments, kind, message):
    with pytest.raises(kind, match=message):
        noam(**{"step": 1, "d_model": 64, "warmup": 10, **arguments})
