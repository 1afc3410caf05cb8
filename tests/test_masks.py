"""Masks against their definitions, entry by entry."""

import itertools

import pytest
import torch
from torch import nn

from companion.masks import causal_mask, check_mask, combine_masks, padding_mask


@pytest.mark.verifies(
    "companion.masks.causal_mask", against="torch.nn.Transformer.generate_square_subsequent_mask"
)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_causal_mask_allows_what_pytorch_does_not_forbid(agree, n):
    forbidden = nn.Transformer.generate_square_subsequent_mask(n).isinf()
    agree(causal_mask(n).float(), (~forbidden).float(), tolerance=0, quantity="square mask")


@pytest.mark.verifies("companion.masks.causal_mask", against="enumeration")
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 6), (3, 5), (4, 4)])
def test_causal_mask_is_aligned_at_the_end(agree, num_queries, num_keys):
    past = num_keys - num_queries
    expected = [[key <= past + query for key in range(num_keys)] for query in range(num_queries)]
    mask = causal_mask(num_queries, num_keys, device="cpu")
    assert mask.dtype == torch.bool
    agree(mask.float(), torch.tensor(expected).float(), tolerance=0, quantity="mask with a past")


@pytest.mark.verifies("companion.masks.padding_mask", against="enumeration")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_padding_mask_hides_padding_wherever_it_stands(agree, dtype):
    ids = torch.tensor([[5, 9, 7, 7], [7, 1, 7, 2], [7, 7, 7, 7]], dtype=dtype)
    mask = padding_mask(ids, 7)
    assert mask.shape == (3, 1, 1, 4) and mask.dtype == torch.bool
    expected = [[token != 7 for token in row] for row in ids.tolist()]
    agree(mask[:, 0, 0].float(), torch.tensor(expected).float(), tolerance=0, quantity="mask")


@pytest.mark.verifies("companion.masks.combine_masks", against="enumeration")
def test_combined_masks_allow_what_every_mask_allows(agree):
    causal, padding = causal_mask(3, 4), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool()[:, None, None]
    heads = torch.tensor([True, False, True])[:, None, None]
    mine = combine_masks(None, causal, padding, None, heads)
    theirs = torch.zeros(2, 3, 3, 4)
    for b, h, i, j in itertools.product(range(2), range(3), range(3), range(4)):
        theirs[b, h, i, j] = bool(causal[i, j] and padding[b, 0, 0, j] and heads[h, 0, 0])
    agree(mine.float(), theirs, tolerance=0, quantity="conjunction")


def test_no_mask_allows_everything():
    assert combine_masks() is None
    assert combine_masks(None, None) is None
    mask = causal_mask(2)
    assert combine_masks(None, mask) is mask


def test_combining_leaves_the_masks_as_they_were():
    causal, padding = causal_mask(3), torch.tensor([[True, False, True]])
    before = causal.clone(), padding.clone()
    combine_masks(causal, padding)
    assert torch.equal(causal, before[0]) and torch.equal(padding, before[1])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: causal_mask(0), ValueError, "num_queries must be at least 1, got 0"),
        (lambda: causal_mask(2.0), TypeError, "num_queries must be an int, got float"),
        (lambda: causal_mask(True), TypeError, "num_queries must be an int, got bool"),
        (lambda: causal_mask(2, -1), ValueError, "num_keys must be at least 1"),
        (lambda: causal_mask(3, 2), ValueError, "num_keys must be at least num_queries = 3, got 2"),
        (lambda: padding_mask([[1, 2]], 0), TypeError, "ids must be a torch.Tensor, got list"),
        (
            lambda: padding_mask(torch.ones(1, 2), 0),
            TypeError,
            "ids must be an integer tensor, got torch.float32",
        ),
        (lambda: padding_mask(torch.ones(2).long(), 0), ValueError, r"ids .* got \(2,\)"),
        (
            lambda: padding_mask(torch.ones(0, 2).long(), 0),
            ValueError,
            r"ids must be non-empty .* got \(0, 2\)",
        ),
        (
            lambda: padding_mask(torch.ones(1, 2).long(), None),
            TypeError,
            "pad_id must be an int, got NoneType",
        ),
        (
            lambda: combine_masks(torch.ones(2, 2)),
            TypeError,
            r"masks\[0\] must be a bool tensor .* torch.float32",
        ),
        (lambda: combine_masks(None, [True]), TypeError, r"masks\[1\] must be a torch.Tensor"),
        (
            lambda: combine_masks(causal_mask(2), causal_mask(3)),
            ValueError,
            r"masks\[1\] .* \(2, 2\), got \(3, 3\)",
        ),
        (
            lambda: check_mask("m", torch.tensor(True), (2, 3)),
            ValueError,
            r"m must broadcast to \(2, 3\), got \(\)",
        ),
        (
            lambda: check_mask("m", causal_mask(3)[None], (3, 3)),
            ValueError,
            r"m must broadcast .* \(1, 3, 3\)",
        ),
        (
            lambda: check_mask("m", causal_mask(2), (3, 3)),
            ValueError,
            r"m must broadcast to \(3, 3\), got \(2, 2\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
