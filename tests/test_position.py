"""Positions against the formula in plain Python floats, and the geometry that the formula promises."""

import copy
import math

import pytest
import torch
from torch import nn

from companion.position import LearnedPositionalEmbedding, SinusoidalPositionalEncoding, sinusoidal_encoding


def by_hand(length: int, d_model: int, base: float = 10000.0) -> torch.Tensor:
    rows = [
        [
            (math.sin if column % 2 == 0 else math.cos)(pos / base ** ((column - column % 2) / d_model))
            for column in range(d_model)
        ]
        for pos in range(length)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.verifies("companion.position.sinusoidal_encoding", against="closed form")
@pytest.mark.parametrize(("length", "d_model", "base"), [(1, 2, 10000.0), (37, 6, 10000.0), (700, 10, 50.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 6e-8), (torch.float64, 1e-12)])
def test_every_entry_is_the_formula(agree, length, d_model, base, dtype, tolerance):
    mine = sinusoidal_encoding(length, d_model, base=base, dtype=dtype)
    assert mine.dtype == dtype
    agree(mine, by_hand(length, d_model, base), tolerance=tolerance, quantity=f"entries, {dtype}")


@pytest.mark.verifies("companion.position.sinusoidal_encoding", against="closed form")
def test_rows_lie_on_a_sphere_and_turn_with_the_offset(agree):
    d_model, k = 16, 5
    table = sinusoidal_encoding(400, d_model, dtype=torch.float64)
    agree(table.norm(dim=-1) ** 2, torch.full((400,), d_model / 2), tolerance=1e-12, quantity="‖PE‖² = d/2")
    products = torch.stack([table[k + start] @ table[start] for start in range(395)])
    agree(
        products,
        products[:1].expand(395),
        tolerance=1e-12,
        quantity="PE(p + k) · PE(p) is the same for every p",
    )
    angles = k * 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    turn = torch.block_diag(
        *(
            torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]).double()
            for a in angles.tolist()
        )
    )
    agree(table[k:], table[:-k] @ turn.T, tolerance=1e-6, quantity="PE(p + k) = R_k PE(p)")


@pytest.mark.verifies("companion.position.SinusoidalPositionalEncoding", against="closed form")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("batch", "n", "offset"), [(1, 1, 0), (3, 5, 0), (3, 5, 11), (1, 300, 3)])
def test_the_module_adds_the_rows_from_the_offset(agree, dtype, tolerance, batch, n, offset):
    module = SinusoidalPositionalEncoding(6).to(dtype)
    x = torch.randn(batch, n, 6, dtype=dtype)
    expected = x.double() + by_hand(offset + n, 6)[offset:]
    agree(module(x, offset), expected, tolerance=tolerance, quantity=f"sum, {dtype}")


def test_the_table_grows_follows_the_dtype_and_is_not_saved():
    module = SinusoidalPositionalEncoding(4)
    assert not list(module.parameters()) and not module.state_dict()
    before = module(torch.zeros(1, 250, 4))
    assert torch.equal(module(torch.zeros(1, 1000, 4))[:, :250], before)
    assert module(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(module(torch.zeros(1, 1000, 4))[:, :250], before)
    assert torch.equal(copy.deepcopy(module)(torch.zeros(250, 4)), before[0])


@pytest.mark.verifies("companion.position.LearnedPositionalEmbedding", against="torch.nn.Embedding")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "n", "offset"), [(1, 1, 8), (3, 5, 0), (3, 4, 5)])
def test_learned_positions_are_an_embedding_of_the_positions(agree, dtype, batch, n, offset):
    module, judge = LearnedPositionalEmbedding(9, 5).to(dtype), nn.Embedding(9, 5, dtype=dtype)
    judge.load_state_dict(module.state_dict())
    x = torch.randn(batch, n, 5, dtype=dtype)
    mine, theirs = module(x, offset), x + judge(torch.arange(offset, offset + n))
    agree(mine, theirs, tolerance=0, quantity="sum")
    weight = torch.randn_like(mine)
    (mine * weight).sum().backward()
    (theirs * weight).sum().backward()
    agree(module.weight.grad, judge.weight.grad, tolerance=1e-6, quantity="gradient")


@pytest.mark.parametrize(
    "make", [lambda p: SinusoidalPositionalEncoding(6, p), lambda p: LearnedPositionalEmbedding(40, 6, p)]
)
def test_dropout_acts_on_the_sum_in_training_only(make):
    torch.manual_seed(0)
    module, x = make(0.4), torch.full((50, 40, 6), 5.0)
    out = module(x)
    kept = out != 0
    assert abs(kept.float().mean().item() - 0.6) < 0.02
    clean = module.eval()(x)
    torch.testing.assert_close(out[kept], clean[kept] / 0.6)
    assert not (clean == 0).any()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: sinusoidal_encoding(0, 4), ValueError, "length must be at least 1, got 0"),
        (lambda: sinusoidal_encoding(4.0, 4), TypeError, "length must be an int, got float"),
        (lambda: sinusoidal_encoding(4, 5), ValueError, "d_model must be even, got 5"),
        (lambda: sinusoidal_encoding(4, 0), ValueError, "d_model must be at least 1, got 0"),
        (lambda: sinusoidal_encoding(4, 4, base=0.0), ValueError, "base must be positive, got 0.0"),
        (lambda: sinusoidal_encoding(4, 4, base=math.nan), ValueError, "base must be positive, got nan"),
        (lambda: sinusoidal_encoding(4, 4, base="big"), TypeError, "base must be a number, got str"),
        (lambda: SinusoidalPositionalEncoding(3), ValueError, "d_model must be even, got 3"),
        (lambda: SinusoidalPositionalEncoding(4, 1.0), ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: SinusoidalPositionalEncoding(4, "0.1"), TypeError, "dropout must be a number, got str"),
        (lambda: LearnedPositionalEmbedding(0, 4), ValueError, "max_length must be at least 1, got 0"),
        (lambda: LearnedPositionalEmbedding(4, -4), ValueError, "d_model must be at least 1, got -4"),
        (lambda: LearnedPositionalEmbedding(4, 4, -0.1), ValueError, "dropout must lie in"),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("module", [SinusoidalPositionalEncoding(4), LearnedPositionalEmbedding(9, 4)])
@pytest.mark.parametrize(
    ("x", "offset", "error", "match"),
    [
        ([[1.0] * 4], 0, TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(2, 4).long(), 0, TypeError, "x must be a floating-point tensor, got torch.int64"),
        (torch.ones(2, 5), 0, ValueError, r"x must have shape \(..., 4\), got \(2, 5\)"),
        (torch.ones(4), 0, ValueError, r"x must have shape \(..., n, d_model\), got \(4,\)"),
        (torch.ones(0, 3, 4), 0, ValueError, r"x must not be empty, got shape \(0, 3, 4\)"),
        (torch.ones(2, 4), -1, ValueError, "offset must not be negative, got -1"),
        (torch.ones(2, 4), 1.0, TypeError, "offset must be an int, got float"),
    ],
)
def test_bad_input_is_named(module, x, offset, error, match):
    with pytest.raises(error, match=match):
        module(x, offset)


@pytest.mark.parametrize(("n", "offset"), [(10, 0), (1, 9), (5, 5)])
def test_a_learned_table_refuses_positions_it_does_not_have(n, offset):
    with pytest.raises(ValueError, match=f"x must end at position 9 at most .* got {n + offset}"):
        LearnedPositionalEmbedding(9, 4)(torch.ones(1, n, 4), offset)
