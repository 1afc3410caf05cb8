"""companion.train.loop beside a loop written with torch alone, in one process and in two."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from companion.train.checkpoint import load_weights, save_weights
from companion.train.loop import History, local_device, train
from companion.train.loss import cross_entropy
from companion.train.optim import Adam
from companion.train.schedule import noam

VOCAB = 11


def _net(dropout=0.0):
    torch.manual_seed(0)
    hidden = nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout)
    return nn.Sequential(nn.Embedding(VOCAB, 8), *hidden, nn.Linear(8, VOCAB))


def _batch(index):
    """Micro-batch `index`: two rows whose numbers of targets (5 to 9) differ from batch to batch."""
    generator = torch.Generator().manual_seed(index)
    source = torch.randint(VOCAB, (2, 9), generator=generator)
    targets = (source * 3 + 1) % VOCAB
    targets[1, int(torch.randint(1, 5, (), generator=generator)) :] = -100
    return source, targets


def _loss(model, batch):
    source, targets = batch
    return cross_entropy(model(source), targets, reduction="sum"), int((targets != -100).sum())


def _lr(step):
    return noam(step, 8, 5, factor=0.05)


def _flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _train(model=None, **options):
    model = model or _net()
    options = {"steps": 12, "progress": False, **options}
    return model, train(model, options.pop("loss_fn", _loss), _batch, Adam(model.parameters()), **options)


def _reference(steps, accumulate, clip_norm=None):
    """The same training in plain torch: one big batch a step, the mean over its tokens."""
    model, losses, norms = _net(), [], []
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(1, steps + 1):
        parts = [_batch((step - 1) * accumulate + k) for k in range(accumulate)]
        source, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        optimizer.param_groups[0]["lr"] = _lr(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(source).flatten(0, 1), targets.flatten())
        loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        if clip_norm is not None and norms[-1] > clip_norm:
            for p in model.parameters():
                p.grad *= clip_norm / norms[-1]
        optimizer.step()
        losses.append(loss.item())
    return model, losses, norms


@pytest.mark.verifies("companion.train.loop.train", against="torch.optim.Adam, one big batch")
@pytest.mark.parametrize("accumulate, clip_norm", [(1, None), (4, None), (3, 0.1)])
def test_equals_one_big_batch_in_plain_torch(agree, accumulate, clip_norm):
    theirs, losses, norms = _reference(30, accumulate, clip_norm)
    mine, history = _train(steps=30, accumulate=accumulate, clip_norm=clip_norm, schedule=_lr)
    agree(history.losses, losses, tolerance=1e-6, quantity="loss of 30 steps")
    agree(history.grad_norms, norms, tolerance=1e-6, quantity="gradient norm of 30 steps")
    agree(_flat(mine), _flat(theirs), tolerance=1e-5, quantity="weights after 30 steps")
    assert history.losses[-1] < history.losses[0] - 0.1
    assert history.learning_rates == [_lr(step) for step in range(1, 31)]
    assert history.steps == list(range(1, 31))
    counts = torch.tensor([int((_batch(i)[1] >= 0).sum()) for i in range(30 * accumulate)])
    assert history.tokens == counts.view(30, accumulate).sum(1).tolist()


@pytest.mark.verifies("companion.train.loop.train", against="torch.distributed.run, 2 gloo processes")
def test_two_processes_equal_one_and_resume_to_the_bit(agree, tmp_path):
    one, history = _train(steps=8, accumulate=4, clip_norm=0.5, schedule=_lr)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 240}
    result = subprocess.run([*command, __file__, str(tmp_path)], **options)
    assert result.returncode == 0, result.stderr

    two = _net()
    load_weights(two, tmp_path / "two.safetensors")
    shared = History.load(tmp_path / "two.jsonl")
    agree(shared.losses, history.losses, tolerance=1e-6, quantity="loss of 8 steps")
    agree(shared.grad_norms, history.grad_norms, tolerance=1e-6, quantity="gradient norm of 8 steps")
    agree(_flat(two), _flat(one), tolerance=1e-5, quantity="weights after 8 steps")
    assert shared.tokens == history.tokens and shared.evaluations == [{"step": 8, "value": 1.0}]

    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1], "every process ends with the same weights and history"
    assert ranks[0]["whole"] == ranks[0]["resumed"] != ranks[0]["two"]


def _worker(folder):
    """One of the two processes: train without dropout, with it, and with it in two parts."""
    rank, folder = int(os.environ["RANK"]), Path(folder)
    options = {"accumulate": 4, "clip_norm": 0.5, "schedule": _lr, "evaluate": lambda model: 1.0}
    two, history = _train(steps=8, **options)
    if rank == 0:
        save_weights(two, folder / "two.safetensors")
        history.save(folder / "two.jsonl")
    results = {"two": [_flat(two).tolist(), history.losses]}
    for name, stops in (("whole", (8,)), ("resumed", (4, 8))):
        for start, stop in enumerate(stops):
            model = _net(dropout=0.3)
            torch.manual_seed(10 * start + rank)  # dropout of its own in each process
            model, history = _train(model, steps=stop, checkpoint=folder / name, **options)
            dist.barrier()  # process 0 may still be writing
        results[name] = [_flat(model).tolist(), history.losses]
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumes_to_the_bit(tmp_path, accumulate):
    """Dropout, numpy and Python randomness, optimizer, schedule and data position all continue."""

    def noisy(model, batch):
        loss, count = _loss(model, batch)
        return loss * (1 + 0.1 * random.gauss(0, 1) + 0.1 * np.random.randn()), count

    def run(folder, *stops):
        for start, stop in enumerate(stops):
            model = _net(dropout=0.3)
            for seed in (torch.manual_seed, random.seed, np.random.seed):
                seed(7 + start)  # a new process starts with other states; the checkpoint's must win
            options = {"accumulate": accumulate, "schedule": _lr, "checkpoint": folder, "checkpoint_every": 5}
            model, history = _train(model, steps=stop, loss_fn=noisy, **options)
        return model, history

    whole, expected = run(tmp_path / "whole", 17)
    resumed, history = run(tmp_path / "parts", 7, 11, 17)
    assert torch.equal(_flat(whole), _flat(resumed))
    assert history == expected
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == ["latest", "step-00000015", "step-00000017"]

    again, history = run(tmp_path / "parts", 17)  # nothing left to do
    assert torch.equal(_flat(whole), _flat(again)) and history == expected


def test_autocast_runs_the_forward_pass_in_bfloat16():
    seen = []

    def loss(model, batch):
        seen.append(model(batch[0]).dtype)
        return _loss(model, batch)

    model, history = _train(steps=30, loss_fn=loss, autocast=torch.bfloat16, schedule=_lr)
    assert set(seen) == {torch.bfloat16} and _flat(model).dtype == torch.float32
    _, plain = _train(steps=30, schedule=_lr)
    assert history.losses == pytest.approx(plain.losses, abs=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_cuda_equals_cpu_and_resumes(tmp_path, autocast):
    _, expected = _train(steps=9, schedule=_lr, accumulate=2, autocast=autocast)
    _, history = _train(_net().to(local_device()), steps=9, schedule=_lr, accumulate=2, autocast=autocast)
    assert history.losses == pytest.approx(expected.losses, abs=1e-5 if autocast is None else 0.02)
    options = {"accumulate": 2, "autocast": autocast, "schedule": _lr}
    whole, _ = _train(_net(0.3).to(local_device()), steps=9, checkpoint=tmp_path / "whole", **options)
    for steps in (4, 9):
        parts, _ = _train(_net(0.3).to(local_device()), steps=steps, checkpoint=tmp_path / "parts", **options)
    assert torch.equal(_flat(whole), _flat(parts))


def test_evaluates_without_gradients_in_evaluation_mode(capsys):
    calls = []

    def evaluate(model):
        calls.append((model.training, torch.is_grad_enabled()))
        return {"bleu": len(calls), "chrf": torch.tensor(0.5)}

    model = _net().eval()
    _, history = _train(model, steps=7, evaluate=evaluate, evaluate_every=3, progress=True)
    assert [entry["step"] for entry in history.evaluations] == [3, 6, 7]
    assert history.evaluations[1] == {"step": 6, "bleu": 2.0, "chrf": 0.5}
    assert set(calls) == {(False, False)}
    assert not model.training, "the model is left in the mode it came in"
    assert "loss" in capsys.readouterr().err


def test_batches_may_be_a_sequence_and_any_nest():
    seen = []

    def loss(model, batch):
        seen.append(batch["pair"][0])
        return _loss(model, batch["pair"])

    model = _net()
    batches = [{"pair": _batch(i), "name": f"batch {i}"} for i in range(3)]
    train(model, loss, batches, Adam(model.parameters()), steps=4, accumulate=2, progress=False)
    assert all(torch.equal(s, _batch(i)[0]) for s, i in zip(seen, [0, 1, 2, 0, 1, 2, 0, 1], strict=True))


def test_loss_that_is_not_finite_stops_before_the_weights_change():
    model = _net()
    before = _flat(model).clone()

    def loss(model, batch):
        loss_sum, count = _loss(model, batch)
        return loss_sum * float("nan"), count

    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        _train(model, loss_fn=loss)
    assert torch.equal(_flat(model), before)


@pytest.mark.parametrize(
    "result, kind, message",
    [
        (lambda loss, count: loss, TypeError, r"loss_fn must return \(loss_sum, count\)"),
        (lambda loss, count: (loss.detach(), count), TypeError, "loss_sum"),
        (lambda loss, count: (loss.item(), count), TypeError, "loss_sum"),
        (lambda loss, count: (loss.expand(2), count), TypeError, "loss_sum"),
        (lambda loss, count: (loss, -1), ValueError, "count.*-1"),
        (lambda loss, count: (loss, 0), ValueError, "no target token"),
    ],
)
def test_bad_loss_function(result, kind, message):
    model = _net()
    before = _flat(model).clone()
    with pytest.raises(kind, match=message):
        _train(model, loss_fn=lambda model, batch: result(*_loss(model, batch)))
    assert torch.equal(_flat(model), before)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"model": 3}, TypeError, "model.*int"),
        ({"loss_fn": None}, TypeError, "loss_fn.*NoneType"),
        ({"batches": iter([])}, TypeError, "batches.*iterator"),
        ({"batches": []}, ValueError, "batches.*empty"),
        ({"optimizer": "adam"}, TypeError, "optimizer.*str"),
        ({"optimizer": Adam([torch.ones(1, requires_grad=True)])}, ValueError, "optimizer"),
        ({"steps": 0}, ValueError, "steps.*0"),
        ({"steps": 2.0}, TypeError, "steps.*float"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every"),
        ({"keep_checkpoints": 0}, ValueError, "keep_checkpoints"),
        ({"evaluate_every": 0}, ValueError, "evaluate_every"),
        ({"evaluate": 1.0}, TypeError, "evaluate.*float"),
        ({"schedule": 1e-3}, TypeError, "schedule.*float"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm.*0"),
        ({"autocast": torch.float16}, ValueError, "autocast.*float16"),
    ],
)
def test_bad_arguments_change_nothing(tmp_path, change, kind, message):
    model = _net()
    before = _flat(model).clone()
    arguments = {
        "model": model,
        "loss_fn": _loss,
        "batches": _batch,
        "optimizer": Adam(model.parameters()),
        "steps": 2,
        "checkpoint": tmp_path / "checkpoint",
        "progress": False,
        **change,
    }
    with pytest.raises(kind, match=message):
        train(**arguments)
    assert torch.equal(_flat(model), before) and not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    "change, message", [({"accumulate": 2}, "accumulate = 1, got 2"), ({"steps": 3}, "at least 12")]
)
def test_a_checkpoint_of_another_setting_is_refused(tmp_path, change, message):
    _train(checkpoint=tmp_path)
    model = _net()
    before = _flat(model).clone()
    with pytest.raises(ValueError, match=message):
        _train(model, checkpoint=tmp_path, **change)
    assert torch.equal(_flat(model), before)


def test_history_round_trips(tmp_path):
    _, history = _train(steps=5, evaluate=lambda model: {"bleu": 0.1 + 0.2}, evaluate_every=2)
    history.save(tmp_path / "history.jsonl")
    assert History.load(tmp_path / "history.jsonl") == history
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[2] == {"evaluation": {"step": 2, "bleu": 0.1 + 0.2}} and lines[3]["step"] == 3


@pytest.mark.parametrize("line", ["", "{", "3", '"evaluation"', '{"step": 1}', '{"evaluation": 3}', "\0"])
def test_damaged_history_is_refused(tmp_path, line):
    (tmp_path / "history.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match="line 1"):
        History.load(tmp_path / "history.jsonl")


if __name__ == "__main__":
    _worker(*sys.argv[1:])
