"""Token embeddings against one-hot products and PyTorch's embedding; one-hot against PyTorch's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.embeddings import TokenEmbedding, one_hot

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


@pytest.mark.verifies("companion.embeddings.one_hot", against="torch.nn.functional.one_hot")
@pytest.mark.parametrize("integer", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (5,), (3, 1), (1, 2, 3)])
def test_one_hot(agree, integer, dtype, shape):
    ids = torch.randint(7, shape).to(integer)
    mine = one_hot(ids, 7, dtype=dtype)
    assert mine.dtype == dtype
    agree(mine.double(), F.one_hot(ids.long(), 7).double(), tolerance=0, quantity="entries")


@pytest.mark.verifies("companion.embeddings.TokenEmbedding", against="torch.nn.Embedding")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pad_id", [None, 0, 10])
@pytest.mark.parametrize("shape", [(7,), (1, 4), (3, 5)])
def test_lookup_times_root_d_and_its_gradient(agree, dtype, pad_id, shape):
    module = TokenEmbedding(11, 6, pad_id).to(dtype)
    judge = nn.Embedding(11, 6, padding_idx=pad_id, dtype=dtype)
    with torch.no_grad():
        judge.weight.copy_(module.weight.normal_())
    ids = torch.randint(11, shape)
    ids.view(-1)[0] = pad_id or 0
    mine, theirs = module(ids), judge(ids) * math.sqrt(6)
    agree(mine, theirs, tolerance=0, quantity="output")
    weight = torch.randn_like(mine)
    (mine * weight).sum().backward()
    (theirs * weight).sum().backward()
    agree(module.weight.grad, judge.weight.grad, tolerance=1e-6, quantity="gradient")
    if pad_id is not None:
        assert not module.weight.grad[pad_id].any()


@pytest.mark.verifies("companion.embeddings.TokenEmbedding", against="torch.nn.functional.one_hot")
@pytest.mark.parametrize("integer", INTEGERS)
def test_a_lookup_is_a_one_hot_product_to_the_last_bit(agree, integer):
    module, ids = TokenEmbedding(9, 5), torch.randint(9, (3, 7)).to(integer)
    theirs = F.one_hot(ids.long(), 9).float() @ module.weight * math.sqrt(5)
    agree(module(ids), theirs, tolerance=0, quantity="lookup = one-hot · E")


@pytest.mark.verifies("companion.embeddings.TokenEmbedding", against="torch.nn.Linear")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 5, 6)])
def test_tied_logits(agree, dtype, shape):
    module, judge = TokenEmbedding(11, 6).to(dtype), nn.Linear(6, 11, bias=False, dtype=dtype)
    judge.load_state_dict(module.state_dict())
    hidden = torch.randn(shape, dtype=dtype)
    agree(module.logits(hidden), judge(hidden), tolerance=0, quantity="tied logits")


def test_initial_vectors_have_unit_variance_and_padding_is_zero():
    torch.manual_seed(0)
    module = TokenEmbedding(2000, 64, pad_id=3)
    assert not module.weight[3].any()
    assert abs(module(torch.arange(4, 2000)).std().item() - 1) < 0.01


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: TokenEmbedding(0, 4), ValueError, "vocab_size must be at least 1, got 0"),
        (lambda: TokenEmbedding(4, 4.0), TypeError, "d_model must be an int, got float"),
        (lambda: TokenEmbedding(4, 4, pad_id=4), ValueError, "pad_id must lie in 0 … 3, got 4"),
        (lambda: TokenEmbedding(4, 4, pad_id=-1), ValueError, "pad_id must lie in 0 … 3, got -1"),
        (lambda: TokenEmbedding(4, 4, pad_id=1.0), TypeError, "pad_id must be an int, got float"),
        (
            lambda: TokenEmbedding(4, 6).logits(torch.ones(2, 4)),
            ValueError,
            r"hidden must have shape \(..., 6\)",
        ),
        (
            lambda: TokenEmbedding(4, 6).logits(torch.ones(6).int()),
            TypeError,
            "hidden must be a floating-point",
        ),
        (lambda: one_hot(torch.tensor([0]), 0), ValueError, "vocab_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("function", [TokenEmbedding(4, 6), lambda ids: one_hot(ids, 4)])
@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ([0, 1], TypeError, "ids must be a torch.Tensor, got list"),
        (torch.tensor([0.0]), TypeError, "ids must be an integer tensor, got torch.float32"),
        (torch.tensor([True]), TypeError, "ids must be an integer tensor, got torch.bool"),
        (torch.tensor([[0, 4]]), ValueError, "ids must lie in 0 … 3, got values from 0 to 4"),
        (torch.tensor([[-1, 2]]), ValueError, "ids must lie in 0 … 3, got values from -1 to 2"),
        (torch.empty(0, 3, dtype=torch.long), ValueError, r"ids must not be empty, got shape \(0, 3\)"),
    ],
)
def test_bad_ids_are_named(function, ids, error, match):
    with pytest.raises(error, match=match):
        function(ids)
