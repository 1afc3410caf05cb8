"""LayerNorm against PyTorch's and against the formula."""

import pytest
import torch
from torch import nn

from companion.norm import LayerNorm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SHAPES = [(1, 7), (3, 5, 7), (3, 1, 1, 7)]


def randomised(dtype: torch.dtype, eps: float = 1e-5) -> LayerNorm:
    module = LayerNorm(7, eps).to(dtype)
    nn.init.normal_(module.gain, 1.0, 0.5)
    nn.init.normal_(module.bias)
    return module


@pytest.mark.verifies("companion.norm.LayerNorm", against="torch.nn.LayerNorm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_output_and_gradients(agree, dtype, shape, eps):
    mine, theirs = randomised(dtype, eps), nn.LayerNorm(7, eps=eps, dtype=dtype)
    theirs.load_state_dict({"weight": mine.gain, "bias": mine.bias})
    x, upstream = torch.randn(shape, dtype=dtype) * 3 + 2, torch.randn(shape, dtype=dtype)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = mine(inputs[0]), theirs(inputs[1])
    agree(*outputs, tolerance=0, quantity="output")
    for output in outputs:
        output.backward(upstream)
    agree(inputs[0].grad, inputs[1].grad, tolerance=0, quantity="gradient of the input")
    agree(mine.gain.grad, theirs.weight.grad, tolerance=0, quantity="gradient of the gain")
    agree(mine.bias.grad, theirs.bias.grad, tolerance=0, quantity="gradient of the bias")


@pytest.mark.verifies("companion.norm.LayerNorm", against="closed form")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula(agree, dtype, tolerance, shape):
    module, x = randomised(dtype, 1e-3), torch.randn(shape, dtype=dtype) * 3 + 2
    mean = sum(x.unbind(-1)) / 7
    variance = sum((column - mean) ** 2 for column in x.unbind(-1)) / 7
    normalised = (x - mean.unsqueeze(-1)) / (variance.unsqueeze(-1) + 1e-3) ** 0.5
    agree(module(x), normalised * module.gain + module.bias, tolerance=tolerance, quantity=f"output, {dtype}")


def test_each_token_is_normalised_alone():
    module, x = randomised(torch.float32), torch.randn(3, 5, 7)
    together, changed = module(x), x.clone()
    changed[1, 2] = 100.0 * torch.randn(7)
    others = torch.ones(3, 5, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(module(changed)[others], together[others])


def test_scale_and_shift_of_the_input_cancel():
    module, x = randomised(torch.float64, 1e-12), torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(module(5 * x - 3), module(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: LayerNorm(0), ValueError, "d_model must be at least 1, got 0"),
        (lambda: LayerNorm((7,)), TypeError, "d_model must be an int, got tuple"),
        (lambda: LayerNorm(7, 0.0), ValueError, "eps must be positive, got 0.0"),
        (lambda: LayerNorm(7, "small"), TypeError, "eps must be a number, got str"),
        (lambda: LayerNorm(7)(torch.ones(2, 6)), ValueError, r"x must have shape \(..., 7\), got \(2, 6\)"),
        (lambda: LayerNorm(7)(torch.tensor(1.0)), ValueError, r"x must have shape \(..., 7\), got \(\)"),
        (lambda: LayerNorm(7)(torch.ones(0, 7)), ValueError, r"x must not be empty, got shape \(0, 7\)"),
        (
            lambda: LayerNorm(7)(torch.ones(2, 7).int()),
            TypeError,
            "x must be a floating-point tensor, got torch.int32",
        ),
        (lambda: LayerNorm(7)([1.0] * 7), TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
