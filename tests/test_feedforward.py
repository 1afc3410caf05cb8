"""The feed-forward network and its activations against PyTorch's, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.feedforward import FeedForward, gelu, relu


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
DTYPES = list(TOLERANCE)


def value_and_gradient(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=x.dtype).view_as(y))
    return y, x.grad


def grid(dtype):
    return torch.cat(
        (torch.linspace(-9, 9, 1001, dtype=dtype), torch.tensor([0.0, -0.0, 60.0, -60.0], dtype=dtype))
    )


@pytest.mark.verifies("companion.feedforward.relu", against="torch.nn.functional.relu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu(agree, dtype):
    mine, theirs = value_and_gradient(relu, grid(dtype)), value_and_gradient(F.relu, grid(dtype))
    agree(mine[0], theirs[0], tolerance=0, quantity="value")
    agree(mine[1], theirs[1], tolerance=0, quantity="gradient, also at 0")


def test_relu_keeps_nan_and_infinity():
    x = torch.tensor([float("nan"), float("inf"), float("-inf")])
    torch.testing.assert_close(relu(x), F.relu(x), equal_nan=True)


@pytest.mark.verifies("companion.feedforward.gelu", against="torch.nn.functional.gelu")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(agree, approximate, dtype):
    mine = value_and_gradient(lambda x: gelu(x, approximate), grid(dtype))
    theirs = value_and_gradient(lambda x: F.gelu(x, approximate=approximate), grid(dtype))
    agree(mine[0], theirs[0], tolerance=2 * TOLERANCE[dtype], quantity=f"value, {approximate}, {dtype}")
    agree(mine[1], theirs[1], tolerance=5 * TOLERANCE[dtype], quantity=f"gradient, {approximate}, {dtype}")


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


@pytest.mark.verifies("companion.feedforward.FeedForward", against="torch.nn.Sequential")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", [(1, 5), (1, 7, 5), (3, 2, 5)])
def test_network(agree, dtype, activation, shape):
    mine = randomised(FeedForward(5, 11, activation)).to(dtype)
    middle = nn.ReLU() if activation == "relu" else nn.GELU()
    theirs = nn.Sequential(nn.Linear(5, 11), middle, nn.Linear(11, 5)).to(dtype)
    theirs.load_state_dict(
        {name.replace("up", "0").replace("down", "2"): p for name, p in mine.state_dict().items()}
    )
    x = torch.randn(shape, dtype=dtype)
    for a, b, what in zip(
        value_and_gradient(mine, x), value_and_gradient(theirs, x), ("output", "gradient"), strict=True
    ):
        agree(a, b, tolerance=TOLERANCE[dtype], quantity=f"{what}, {dtype}")
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        agree(a.grad, b.grad, tolerance=5 * TOLERANCE[dtype], quantity=f"gradients of the weights, {dtype}")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_network_runs_the_activation_that_is_written_out(activation):
    module, x = randomised(FeedForward(5, 11, activation)), torch.randn(3, 4, 5)
    torch.testing.assert_close(module(x), module.down({"relu": relu, "gelu": gelu}[activation](module.up(x))))


def test_each_position_is_transformed_alone():
    module, x = randomised(FeedForward(5, 11)), torch.randn(2, 6, 5)
    order = torch.randperm(6)
    assert torch.equal(module(x[:, order]), module(x)[:, order])


def test_dropout_acts_on_hidden_units_in_training_only():
    module, x = randomised(FeedForward(5, 11, dropout=0.5)), torch.randn(4, 5)
    hidden = []
    module.down.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    module(x)
    assert torch.equal(module.eval()(x), module(x))
    dropped, clean, _ = hidden
    kept = dropped != 0
    assert 0 < kept.sum() < (clean != 0).sum()
    torch.testing.assert_close(dropped[kept], 2 * clean[kept])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: relu([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: relu(torch.ones(2).int()), TypeError, "x must be a floating-point tensor, got torch.int32"),
        (lambda: gelu(torch.ones(2).int()), TypeError, "x must be a floating-point tensor, got torch.int32"),
        (
            lambda: gelu(torch.ones(2), "sigmoid"),
            ValueError,
            "approximate must be one of 'none', 'tanh', got 'sigmoid'",
        ),
        (lambda: FeedForward(0, 4), ValueError, "d_model must be at least 1, got 0"),
        (lambda: FeedForward(4, 4.0), TypeError, "d_ff must be an int, got float"),
        (
            lambda: FeedForward(4, 8, "swish"),
            ValueError,
            "activation must be one of 'relu', 'gelu', got 'swish'",
        ),
        (lambda: FeedForward(4, 8, dropout=1.5), ValueError, r"dropout must lie in \[0, 1\), got 1.5"),
        (
            lambda: FeedForward(4, 8)(torch.ones(2, 5)),
            ValueError,
            r"x must have shape \(..., 4\), got \(2, 5\)",
        ),
        (lambda: FeedForward(4, 8)(torch.ones(0, 4)), ValueError, "x must not be empty"),
        (lambda: FeedForward(4, 8)(torch.ones(2, 4).long()), TypeError, "x must be a floating-point tensor"),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
