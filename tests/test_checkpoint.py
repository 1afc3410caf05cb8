"""companion.train.checkpoint: what is written is read back to the bit, and nothing by halves."""

import json
import os
import random
import signal
import struct
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from companion.train.checkpoint import (
    average_checkpoints,
    load_weights,
    random_state,
    read_checkpoint,
    restore,
    save_checkpoint,
    save_weights,
    set_random_state,
)
from companion.train.loop import train
from companion.train.loss import cross_entropy
from companion.train.optim import SGD, Adam, AdamW

CPU = torch.device("cpu")
FILES = ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]


class Net(nn.Module):
    """Parameters of two dtypes, a tied one, a buffer of integers and an empty tensor."""

    def __init__(self, width=5, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.norm = nn.Embedding(7, width), nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 7)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.randn(3).double())
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, ids):
        return self.head(self.norm(self.embedding(ids))) * self.scale.sum()


def _stepped(model, optimizer, steps=3):
    for step in range(steps):
        ids = torch.arange(4) + step
        optimizer.zero_grad()
        cross_entropy(model(ids), (ids + 1) % 7).backward()
        optimizer.step()
    return model, optimizer


def _state(model, optimizer=None):
    """Every number of both, for comparison to the bit."""
    state = {name: (t.dtype, t.tolist()) for name, t in model.state_dict().items()}
    if optimizer is not None:
        for index, entries in optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                state[index, name] = value.tolist() if torch.is_tensor(value) else value
        state["groups"] = optimizer.state_dict()["param_groups"]
    return state


forked = pytest.mark.skipif(sys.platform != "linux", reason="forks a child and kills it")


# --- weights


def test_weights_round_trip_to_the_bit(tmp_path):
    model, _ = _stepped(Net(), SGD(Net().parameters(), 0.1))
    save_weights(model, tmp_path / "w.safetensors", metadata={"recipe": "répété", "steps": "3"})
    other = Net(seed=1)
    assert load_weights(other, tmp_path / "w.safetensors") == {"recipe": "répété", "steps": "3"}
    assert _state(other) == _state(model)
    assert other.head.weight is other.embedding.weight


@pytest.mark.verifies("companion.train.checkpoint.save_weights", against="safetensors.torch.load_file")
def test_the_library_reads_the_same(agree, tmp_path):
    model = Net()
    save_weights(model, tmp_path / "w.safetensors", metadata={"b": "2", "a": "1"})
    theirs = safetensors.torch.load_file(tmp_path / "w.safetensors")
    state = model.state_dict()
    assert state.keys() - theirs.keys() == {"head.weight"}, "tied to embedding.weight, stored once"
    mine = {name: state[name] for name in theirs}
    agree(mine, theirs, tolerance=0.0, quantity="weights read back")


def test_equal_weights_give_equal_bytes(tmp_path):
    for name in "ab":
        save_weights(Net(), tmp_path / name, metadata={str(i): "x" for i in range(9)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_half_precision_for_shipping(tmp_path):
    model, other = Net(), Net(seed=1)
    save_weights(model, tmp_path / "full")
    save_weights(model, tmp_path / "half", dtype=torch.float16)
    assert (tmp_path / "half").stat().st_size < (tmp_path / "full").stat().st_size
    load_weights(other, tmp_path / "half")
    for name, tensor in other.state_dict().items():
        mine = model.state_dict()[name]
        assert torch.equal(tensor, mine.half().to(mine.dtype) if mine.is_floating_point() else mine)


def test_a_compiled_model_saves_the_names_of_the_model(tmp_path):
    save_weights(torch.compile(Net(), backend="eager"), tmp_path / "w")
    load_weights(other := Net(seed=1), tmp_path / "w")
    assert _state(other) == _state(Net())


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"dtype": "half"}, TypeError, "dtype.*half"),
        ({"dtype": torch.int8}, TypeError, "dtype.*int8"),
        ({"metadata": {"steps": 3}}, TypeError, "metadata"),
        ({"dtype": torch.float16}, ValueError, "scale overflows in torch.float16.*100000"),
    ],
)
def test_a_save_that_fails_leaves_the_old_file(tmp_path, options, kind, message):
    path = tmp_path / "w"
    save_weights(Net(), path)
    before, model = path.read_bytes(), Net(seed=1)
    nn.init.constant_(model.scale, 1e5)
    with pytest.raises(kind, match=message):
        save_weights(model, path, **options)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w"]


def _changed(**changes):
    """The tensors of Net with some replaced (None: left out), as the bytes of a file."""
    tensors = {name: t for name, t in Net().state_dict().items() if name != "head.weight"}
    return safetensors.torch.save({k: v for k, v in {**tensors, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    "data, message",
    [
        (_changed(scale=None), "lacks scale"),
        (_changed(extra=torch.ones(1)), "adds extra"),
        (_changed(scale=torch.ones(4)), r"scale has shape \(4,\).*\(3,\)"),
        (_changed(scale=torch.ones(3, dtype=torch.int32)), "scale has dtype torch.int32"),
        (_changed(**{"norm.num_batches_tracked": torch.tensor(1.5)}), "num_batches_tracked has dtype"),
        (b"", "not a whole safetensors file"),
        (b"\x80\x04}.", "not a whole safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "not a whole safetensors file"),
        (struct.pack("<Q", 2**40) + b"{}", "not a whole safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a whole safetensors file"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, data, message):
    (tmp_path / "w").write_bytes(data)
    model = Net()
    before = _state(model)
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w")
    assert _state(model) == before


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_weights(Net(), "nowhere.safetensors")


def test_every_truncation_is_refused(tmp_path):
    save_weights(Net(), tmp_path / "w", metadata={"a": "b"})
    data, model = (tmp_path / "w").read_bytes(), Net(seed=1)
    before = _state(model)
    for length in range(0, len(data), 7):
        (tmp_path / "w").write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load_weights(model, tmp_path / "w")
    assert _state(model) == before


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mutation_loads_whole_or_not_at_all(tmp_path, data):
    save_weights(Net(), tmp_path / "w", metadata={"a": "b"})
    mutated = bytearray((tmp_path / "w").read_bytes())
    header = 8 + int.from_bytes(mutated[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, header + 8))] = data.draw(st.integers(0, 255))
    (tmp_path / "w").write_bytes(mutated)
    model = Net(seed=1)
    before = _state(model)
    try:
        load_weights(model, tmp_path / "w")
    except ValueError:
        assert _state(model) == before


# --- random generators


def test_random_state_round_trips():
    def draw():
        return [torch.rand(3).tolist(), random.gauss(0, 1), random.random(), *np.random.randn(3)]

    draw()  # leaves half of a pair of normal numbers in the generators of Python and numpy
    states = random_state(CPU)
    first = draw()
    set_random_state(states, CPU)
    assert draw() == first
    assert all(torch.is_tensor(state) for state in states.values())


# --- checkpoints


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, 0.1),
        lambda p: SGD(p, 0.1, momentum=0.9),
        lambda p: Adam(p, betas=(0.9, 0.98)),
        lambda p: AdamW(p),
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.SGD(p, momentum=0.9),
    ],
)
def test_checkpoint_round_trips_to_the_bit(tmp_path, make):
    model = Net()
    model, optimizer = _stepped(model, make(model.parameters()))
    optimizer.param_groups[0]["lr"] = 0.123
    save_checkpoint(tmp_path, model, optimizer, step=3, random=random_state(CPU), state={"note": [1, 2.5]})
    other = Net(seed=1)
    again = make(other.parameters())
    checkpoint = read_checkpoint(tmp_path)
    restore(checkpoint, other, again)
    assert checkpoint.step == 3 and checkpoint.state["note"] == [1, 2.5]
    assert checkpoint.random.keys() == random_state(CPU).keys()
    assert _state(other, again) == _state(model, optimizer)
    assert _state(*_stepped(other, again)) == _state(*_stepped(model, optimizer))


def _saved(folder, steps, keep=2):
    model = Net()
    optimizer = Adam(model.parameters())
    for step in steps:
        _stepped(model, optimizer, 1)
        save_checkpoint(folder, model, optimizer, step=step, random=random_state(CPU), keep=keep)
    return model, optimizer


@pytest.mark.parametrize("keep, left", [(1, [4]), (2, [3, 4]), (None, [1, 2, 3, 4])])
def test_keeps_the_newest(tmp_path, keep, left):
    _saved(tmp_path / "a" / "b", range(1, 5), keep)
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["latest", *(f"step-{step:08d}" for step in left)]


def test_nothing_is_pickled(tmp_path):
    _saved(tmp_path, [1])
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["latest", *FILES]
    for path in tmp_path.rglob("*.safetensors"):
        safetensors.torch.load_file(path)
    for path in (tmp_path / "latest", *tmp_path.rglob("*.json")):
        json.loads(path.read_text())


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert read_checkpoint(tmp_path) is None and read_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(tmp_path, name, damage):
    _saved(tmp_path, [1])
    path = tmp_path / "step-00000001" / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(ValueError, match=name):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "3", '{"checkpoint": 3, "sha256": ""}', '{"checkpoint": "../x", "sha256": ""}', "\xff"],
)
def test_a_damaged_pointer_is_refused(tmp_path, text):
    _saved(tmp_path, [1])
    (tmp_path / "latest").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="latest is damaged"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "model, make, message",
    [
        (Net(width=6), Adam, "embedding.weight has shape"),
        (Net().float(), Adam, "scale has dtype"),
        (nn.Linear(2, 2), Adam, "lacks bias, weight"),
        (Net(), AdamW, "optimizer is companion.train.optim.Adam, got companion.train.optim.AdamW"),
        (Net(), torch.optim.Adam, "optimizer is companion.train.optim.Adam, got torch.optim"),
        (Net(), lambda p: Adam(list(p)[1:]), r"\[5\] parameters by group, got \[4\]"),
    ],
)
def test_a_checkpoint_of_another_run_changes_nothing(tmp_path, model, make, message):
    _saved(tmp_path, [1])
    optimizer = make(model.parameters())
    before = _state(model, optimizer)
    with pytest.raises(ValueError, match=message):
        restore(read_checkpoint(tmp_path), model, optimizer)
    assert _state(model, optimizer) == before


def test_the_same_step_twice_is_refused(tmp_path):
    model, optimizer = _saved(tmp_path, [1])
    with pytest.raises(ValueError, match="step 1 is already"):
        save_checkpoint(tmp_path, model, optimizer, step=1, random={})
    assert read_checkpoint(tmp_path).step == 1


@pytest.mark.verifies(
    "companion.train.checkpoint.average_checkpoints", against="torch.optim.swa_utils.AveragedModel"
)
def test_average_of_the_last_checkpoints(agree, tmp_path):
    model = Net()
    optimizer = SGD(model.parameters(), 0.5)
    judge = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for step in range(1, 6):
        _stepped(model, optimizer, 1)
        save_checkpoint(tmp_path, model, optimizer, step=step, random={}, keep=4)
        if step > 2:
            judge.update_parameters(model)
    other = Net(seed=1)
    assert average_checkpoints(other, tmp_path, 3) == [3, 4, 5]
    mine, theirs = dict(other.named_parameters()), dict(judge.module.named_parameters())
    agree(mine, theirs, tolerance=1e-6, quantity="mean of 3 checkpoints")
    torch.testing.assert_close(other.norm.running_mean, judge.module.norm.running_mean)
    assert other.norm.num_batches_tracked == 5


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", None])
def test_average_of_damaged_or_too_few_checkpoints_changes_nothing(tmp_path, damage):
    _saved(tmp_path, [1, 2])
    other = Net(seed=1)
    before = _state(other)
    path = tmp_path / "step-00000001" / ("model.safetensors" if damage is None else "state.json")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data if damage is None else damage)
    with pytest.raises(ValueError, match="damaged"):
        average_checkpoints(other, tmp_path, 2)
    with pytest.raises(ValueError, match="at least 3 checkpoints, got 2"):
        average_checkpoints(other, tmp_path, 3)
    assert _state(other) == before


@forked
def test_killed_at_any_file_operation_the_last_checkpoint_is_whole(tmp_path):
    """A child is killed at its n-th file operation while it saves step 2 over step 1, for every n."""
    outcomes = []
    for n in range(1, 200):
        folder = tmp_path / str(n)
        model, optimizer = _saved(folder, [1], keep=1)
        before = _state(model, optimizer)
        _stepped(model, optimizer, 1)
        after = _state(model, optimizer)
        pid = os.fork()
        if pid == 0:
            _kill_at(n)
            save_checkpoint(folder, model, optimizer, step=2, random={}, keep=1)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])

        other = Net(seed=1)
        again = Adam(other.parameters())
        checkpoint = read_checkpoint(folder)
        restore(checkpoint, other, again)
        assert _state(other, again) == (before if checkpoint.step == 1 else after)
        outcomes.append(checkpoint.step)
        save_checkpoint(folder, model, optimizer, step=3, random={}, keep=1)  # debris is no hindrance
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000003"]
        if not killed:
            break
    assert not killed and outcomes == sorted(outcomes) and {1, 2} == set(outcomes) and n > 15


def _kill_at(n):
    """Kill this process with SIGKILL at its n-th file operation from now on."""
    seen = [0]

    def hook(event, arguments):
        if event == "open" or event.startswith(("os.", "shutil.")) and event != "os.kill":
            seen[0] += 1
            if seen[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _toy_run(folder, steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 16), nn.Dropout(0.2), nn.Linear(16, 7))

    def loss_fn(model, ids):
        return cross_entropy(model(ids), (ids + 1) % 7, reduction="sum"), ids.numel()

    def batches(index):
        return torch.randint(7, (4,), generator=torch.Generator().manual_seed(index))

    options = {"steps": steps, "checkpoint": folder, "checkpoint_every": 1, "progress": False}
    return model, train(model, loss_fn, batches, Adam(model.parameters()), **options)


@forked
@pytest.mark.parametrize("pause", [0.0, 0.03])
def test_a_killed_run_continues_to_the_bit(tmp_path, pause):
    """A run that is killed three times, wherever it happens to be, ends as one that never was."""
    folder, reached = tmp_path / "killed", [0]
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            _toy_run(folder, steps=100_000)
        deadline = time.monotonic() + 60
        while _step(folder) <= reached[-1] and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(pause)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reached.append(_step(folder))
    assert reached[0] < reached[1] < reached[2] < reached[3]
    model, history = _toy_run(folder, steps=reached[-1] + 3)
    whole, expected = _toy_run(tmp_path / "whole", steps=reached[-1] + 3)
    assert history == expected
    assert _state(model) == _state(whole)


def _step(folder):
    latest = folder / "latest"
    return int(json.loads(latest.read_text())["checkpoint"].removeprefix("step-")) if latest.exists() else 0
