"""companion.train.optim beside torch.optim."""

import copy
import math

import pytest
import torch
from torch import nn

from companion.train.optim import SGD, Adam, AdamW

CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.05, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    ("Adam", {}),
    ("Adam", {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-9}),
    ("Adam", {"lr": 3e-3, "betas": (0.0, 0.5), "eps": 1e-3, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("AdamW", {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.3}),
]
OURS = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}


class Net(nn.Module):
    """Three layers, of which the second is used at every third step only."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.to(dtype)

    def forward(self, x, step):
        hidden = self.first(x).tanh()
        return self.last(self.second(hidden).tanh() if step % 3 == 0 else hidden)


def _run(optimizer, net, steps, start=0):
    dtype = net.first.weight.dtype
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 5, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        net(x, step).sub(x[:, :3].sin()).pow(2).mean().backward()
        optimizer.step()


def _pair(name, options, dtype=torch.float32):
    """A net with our optimizer, and its copy with torch's."""
    torch.manual_seed(0)
    mine = Net(dtype)
    theirs = copy.deepcopy(mine)
    judge = getattr(torch.optim, name)
    return mine, OURS[name](mine.parameters(), **options), theirs, judge(theirs.parameters(), **options)


def _flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def _check(agree, name, options, dtype):
    mine, ours, theirs, judge = _pair(name, {"lr": 1e-3, **options}, dtype)
    start = _flat(mine).clone()
    _run(ours, mine, 100)
    _run(judge, theirs, 100)
    assert (_flat(mine) - start).abs().max() > 1e-3
    quantity = f"weights after 100 steps, {str(dtype).removeprefix('torch.')}"
    agree(_flat(mine), _flat(theirs), tolerance=1e-6 if dtype == torch.float32 else 1e-13, quantity=quantity)


@pytest.mark.verifies("companion.train.optim.SGD", against="torch.optim.SGD")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [options for name, options in CASES if name == "SGD"])
def test_sgd(agree, options, dtype):
    _check(agree, "SGD", options, dtype)


@pytest.mark.verifies("companion.train.optim.Adam", against="torch.optim.Adam")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [options for name, options in CASES if name == "Adam"])
def test_adam(agree, options, dtype):
    _check(agree, "Adam", options, dtype)


@pytest.mark.verifies("companion.train.optim.AdamW", against="torch.optim.AdamW")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [options for name, options in CASES if name == "AdamW"])
def test_adamw(agree, options, dtype):
    _check(agree, "AdamW", options, dtype)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_pieces_of_a_large_tensor_make_the_whole(name, monkeypatch):
    options = {"lr": 1e-2, "weight_decay": 0.1}
    whole, ours, pieces, _ = _pair(name, options)
    other = OURS[name](pieces.parameters(), **options)
    pieces.last.weight.data = pieces.last.weight.data.T.contiguous().T  # stays in one piece
    _run(ours, whole, 5)
    monkeypatch.setattr("companion.train.optim.PIECE", 4)
    monkeypatch.setattr("companion.train.optim.SMALL", 4)
    _run(other, pieces, 5)
    torch.testing.assert_close(_flat(whole), _flat(pieces), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, options", CASES)
def test_one_list_of_many_tensors_equals_one_tensor_at_a_time(name, options, monkeypatch):
    """The path of accelerators, run on the CPU: tensors of equal age are updated together."""
    one, ours, many, _ = _pair(name, {"lr": 1e-3, **options})
    together = OURS[name](many.parameters(), **{"lr": 1e-3, **options})

    def buckets(params):
        ages = {}
        for p in (p for p in params if p.grad is not None):
            state = together.state.get(p, {})
            ages.setdefault((len(state), state.get("step", 0)), []).append(p)
        return ages.values()

    monkeypatch.setattr(together, "_buckets", buckets)
    _run(ours, one, 20)
    _run(together, many, 20)
    assert torch.equal(_flat(one), _flat(many))


@pytest.mark.parametrize("name, options", CASES)
@pytest.mark.parametrize("there", [True, False], ids=["from torch.optim", "to torch.optim"])
def test_state_dict_is_interchangeable_with_torch(name, options, there):
    mine, ours, theirs, judge = _pair(name, {"lr": 1e-3, **options})
    net, first, second = (theirs, judge, OURS[name]) if there else (mine, ours, getattr(torch.optim, name))
    whole, optimizer, _, _ = _pair(name, {"lr": 1e-3, **options})
    _run(optimizer, whole, 20)

    _run(first, net, 10)
    continued = second(net.parameters(), **{"lr": 1e-3, **options})
    entries = copy.deepcopy(first.state_dict())
    for group, own in zip(entries["param_groups"], continued.state_dict()["param_groups"], strict=True):
        group.update({key: value for key, value in own.items() if key not in group})
    continued.load_state_dict(entries)
    _run(continued, net, 10, start=10)
    torch.testing.assert_close(_flat(net), _flat(whole), rtol=0, atol=1e-6)


def test_first_adam_step_has_the_length_of_the_learning_rate():
    weight = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    weight.grad = torch.tensor([1e-3, 5.0, -300.0])
    before = weight.detach().clone()
    Adam([weight], lr=0.1, eps=1e-12).step()
    torch.testing.assert_close(weight.detach() - before, torch.tensor([-0.1, -0.1, 0.1]))


def test_decay_without_gradient_signal():
    """With zero gradients AdamW shrinks the weights by lr·λ a step; Adam's penalty acts through m and v."""
    weight = torch.tensor([1.0], requires_grad=True)
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        weight.grad = torch.zeros(1)
        optimizer.step()
    assert weight.item() == pytest.approx(0.95**3)


def test_groups_closure_and_missing_gradients():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    optimizer = SGD([{"params": [a]}, {"params": [b], "lr": 0.5}, {"params": [c]}], lr=0.1)

    def closure():
        loss = (a + b).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    for p, expected in ((a, 0.9), (b, 0.5), (c, 1.0)):
        torch.testing.assert_close(p.detach(), torch.full((2,), expected))
    assert not optimizer.state


def test_state_is_none_one_or_two_times_the_parameters():
    net = Net()
    size = sum(p.numel() for p in net.parameters())
    plain, momentum = SGD(net.parameters(), 0.1), SGD(net.parameters(), 0.1, momentum=0.9)
    for optimizer, ratio in ((plain, 0), (momentum, 1), (Adam(net.parameters()), 2)):
        _run(optimizer, net, 1)
        held = sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
        assert held == ratio * size


@pytest.mark.parametrize("grad", [torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.complex64)])
def test_sparse_or_complex_gradient_changes_nothing(grad):
    good = torch.ones(3, requires_grad=True)
    bad = torch.ones(3, dtype=grad.dtype, requires_grad=True)
    good.grad, bad.grad = torch.ones(3), grad
    with pytest.raises(TypeError, match="dense and real"):
        SGD([good, bad], lr=0.1).step()
    assert good.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "name, options, kind, message",
    [
        ("SGD", {"lr": -0.1}, ValueError, "lr.*-0.1"),
        ("SGD", {"lr": math.nan}, ValueError, "lr.*nan"),
        ("SGD", {"lr": "0.1"}, TypeError, "lr.*str"),
        ("SGD", {"lr": 0.1, "momentum": -1.0}, ValueError, "momentum"),
        ("SGD", {"lr": 0.1, "nesterov": True}, ValueError, "nesterov needs momentum"),
        ("Adam", {"eps": -1e-8}, ValueError, "eps"),
        ("Adam", {"betas": (0.9, 1.0)}, ValueError, "betas.*1.0"),
        ("Adam", {"betas": (-0.1, 0.9)}, ValueError, "betas"),
        ("Adam", {"betas": (0.9,)}, ValueError, "betas"),
        ("AdamW", {"weight_decay": math.inf}, ValueError, "weight_decay.*inf"),
    ],
)
def test_bad_input(name, options, kind, message):
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(kind, match=message):
        OURS[name]([weight], **options)


def test_bad_group_is_not_added():
    optimizer = Adam([torch.ones(1, requires_grad=True)])
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="empty"):
        Adam([])
