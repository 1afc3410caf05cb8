"""Attention, multi-head attention and the cache against PyTorch's, and what must hold of any attention."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.attention import KVCache, MultiHeadAttention, record_attention, scaled_dot_product_attention
from companion.masks import causal_mask

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_mask(*shape: int) -> torch.Tensor:
    """A mask that leaves every row at least one key."""
    mask = torch.rand(shape) < 0.6
    mask[..., 0] |= ~mask.any(-1)
    return mask


def heads(batch, num_heads, n_q, n_k, d_k, d_v, dtype):
    sizes = ((n_q, d_k), (n_k, d_k), (n_k, d_v))
    return [torch.randn(batch, num_heads, *size, dtype=dtype).requires_grad_() for size in sizes]


def gradients(output, inputs):
    return torch.autograd.grad(
        output, inputs, torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    )


MASKS = {  # shapes that broadcast to (b, h, n_q, n_k)
    "none": lambda b, h, n_q, n_k: None,
    "keys": lambda b, h, n_q, n_k: random_mask(n_k),
    "pairs": lambda b, h, n_q, n_k: random_mask(n_q, n_k),
    "heads": lambda b, h, n_q, n_k: random_mask(h, n_q, n_k),
    "padding": lambda b, h, n_q, n_k: random_mask(b, 1, 1, n_k),
    "full": lambda b, h, n_q, n_k: random_mask(b, h, n_q, n_k),
}
SIZES = [
    (1, 1, 1, 1, 3, 3),
    (1, 3, 5, 7, 4, 4),
    (3, 2, 7, 5, 4, 6),
    (3, 1, 1, 9, 5, 2),
]  # b, h, n_q, n_k, d_k, d_v


@pytest.mark.verifies(
    "companion.attention.scaled_dot_product_attention",
    against="torch.nn.functional.scaled_dot_product_attention",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_and_its_gradients(agree, dtype, size, kind, scale):
    query, key, value = inputs = heads(*size, dtype)
    mask = MASKS[kind](*size[:4])
    judged = None if mask is None else mask.expand(size[0], size[1], size[2], size[3])
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=judged, scale=scale)
    expected = gradients(theirs, inputs)
    for weights in (False, True):
        mine = scaled_dot_product_attention(query, key, value, mask, scale=scale, return_weights=weights)
        how = "from weights" if weights else "fused"
        mine = mine[0] if weights else mine
        agree(mine, theirs, tolerance=TOLERANCE[dtype], quantity=f"output, {how}, {dtype}")
        for a, b in zip(gradients(mine, inputs), expected, strict=True):
            agree(a, b, tolerance=4 * TOLERANCE[dtype], quantity=f"gradients, {how}, {dtype}")


@pytest.mark.verifies(
    "companion.attention.scaled_dot_product_attention",
    against="torch.nn.functional.scaled_dot_product_attention",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (1, 6), (4, 7), (6, 6)])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_attention(agree, dtype, n_q, n_k, masked):
    query, key, value = heads(3, 2, n_q, n_k, 4, 5, dtype)
    earlier = torch.tensor([[j <= i + n_k - n_q for j in range(n_k)] for i in range(n_q)])
    mask = torch.rand(3, 1, 1, n_k) < 0.7 if masked else None
    if masked:
        mask[..., 0] = True  # every row keeps a key
    theirs = F.scaled_dot_product_attention(
        query, key, value, attn_mask=earlier & mask if masked else earlier
    )
    mine = scaled_dot_product_attention(query, key, value, mask, causal=True)
    agree(mine, theirs, tolerance=TOLERANCE[dtype], quantity=f"output, causal, {dtype}")
    mine, weights = scaled_dot_product_attention(query, key, value, mask, causal=True, return_weights=True)
    agree(mine, theirs, tolerance=TOLERANCE[dtype], quantity=f"output, causal, {dtype}")
    assert not weights[..., ~earlier].any()


@pytest.mark.verifies(
    "companion.attention.scaled_dot_product_attention",
    against="torch.nn.functional.scaled_dot_product_attention",
)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 2, 3)])
def test_any_number_of_leading_dimensions(agree, leading):
    query, key, value = torch.randn(*leading, 5, 4), torch.randn(*leading, 7, 4), torch.randn(*leading, 7, 6)
    mask = random_mask(*leading, 5, 7)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    mine = scaled_dot_product_attention(query, key, value, mask)
    agree(mine, theirs, tolerance=1e-6, quantity="output, leading dimensions")


@pytest.mark.verifies("companion.attention.scaled_dot_product_attention", against="enumeration")
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_sum_by_sum(agree, dtype):
    query, key, value = heads(2, 2, 3, 4, 5, 2, dtype)
    mask = random_mask(2, 2, 3, 4)
    _, weights = scaled_dot_product_attention(query, key, value, mask, return_weights=True)
    expected = torch.zeros(2, 2, 3, 4, dtype=dtype)
    for b, h, i, j in itertools.product(range(2), range(2), range(3), range(4)):
        if mask[b, h, i, j]:
            expected[b, h, i, j] = (
                sum(q * k for q, k in zip(query[b, h, i], key[b, h, j], strict=True)) / 5**0.5
            ).exp()
    expected /= expected.sum(-1, keepdim=True)
    agree(weights, expected, tolerance=TOLERANCE[dtype], quantity=f"weights, {dtype}")
    agree(weights.sum(-1), torch.ones(2, 2, 3), tolerance=1e-6, quantity="weights of a row sum to 1")
    assert not weights[~mask].any()


@pytest.mark.verifies(
    "companion.attention.scaled_dot_product_attention",
    against="torch.nn.functional.scaled_dot_product_attention",
)
@pytest.mark.parametrize(("n_q", "n_k", "causal"), [(5, 7, False), (9, 9, True), (3, 150, False)])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_good_as_its_inputs(agree, n_q, n_k, causal, autocast):
    inputs = [x.detach().bfloat16().requires_grad_() for x in heads(3, 2, n_q, n_k, 8, 8, torch.float64)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    theirs = F.scaled_dot_product_attention(*exact, is_causal=causal)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine = scaled_dot_product_attention(*inputs, causal=causal)
    assert mine.dtype == torch.bfloat16
    agree(
        mine, theirs, tolerance=0.016, quantity="output, bfloat16 against float64"
    )  # half a step between 2 and 4
    for a, b in zip(gradients(mine, inputs), gradients(theirs, exact), strict=True):
        agree(a, b, tolerance=0.05, quantity="gradients, bfloat16 against float64")


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_a_row_without_keys_gives_zero_and_passes_no_gradient(return_weights, causal, dtype):
    inputs = query, key, value = heads(2, 2, 4, 4, 3, 5, dtype)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, :, 2] = False  # one row of one sentence
    mask[1, :, :, 0] = False  # together with causality, the first row of the other
    dead = [(0, 2), (1, 0)] if causal else [(0, 2)]
    result = scaled_dot_product_attention(
        query, key, value, mask, causal=causal, return_weights=return_weights
    )
    output = result[0] if return_weights else result
    for b, row in dead:
        assert not output[b, :, row].any()
        assert not return_weights or not result[1][b, :, row].any()
    for gradient in torch.autograd.grad(output.sum() + (output**2).sum(), inputs, retain_graph=True):
        assert gradient.isfinite().all()
    for gradient in torch.autograd.grad(sum(output[b, :, row].sum() for b, row in dead), inputs):
        assert not gradient.any()
    alive = torch.ones(2, 4, dtype=torch.bool)
    for b, row in dead:
        alive[b, row] = False
    assert output.transpose(1, 2)[alive].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("return_weights", [False, True])
def test_everything_masked_gives_zero(return_weights):
    query, key, value = heads(1, 2, 3, 4, 3, 5, torch.float32)
    result = scaled_dot_product_attention(
        query, key, value, torch.zeros(1, dtype=torch.bool), return_weights=return_weights
    )
    output = result[0] if return_weights else result
    assert output.shape == (1, 2, 3, 5) and not output.any()


BIASES = {  # shapes that broadcast to (b, h, n_q, n_k)
    "keys": lambda b, h, n_q, n_k: (n_k,),
    "pairs": lambda b, h, n_q, n_k: (n_q, n_k),
    "heads": lambda b, h, n_q, n_k: (h, n_q, n_k),
    "full": lambda b, h, n_q, n_k: (b, h, n_q, n_k),
}


@pytest.mark.verifies(
    "companion.attention.scaled_dot_product_attention",
    against="torch.nn.functional.scaled_dot_product_attention",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 3, 3), (1, 3, 1, 7, 4, 4), (3, 2, 5, 7, 4, 6)])
@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("kind", ["none", "pairs", "padding"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_is_added_to_the_scaled_scores(agree, dtype, size, shape, kind, causal):
    b, h, n_q, n_k = size[:4]
    score_bias = (2 * torch.randn(BIASES[shape](b, h, n_q, n_k), dtype=dtype)).requires_grad_()
    query, key, value = heads(*size, dtype)
    inputs = query, key, value, score_bias
    allowed = torch.tensor([[not causal or j <= i + n_k - n_q for j in range(n_k)] for i in range(n_q)])
    mask = MASKS[kind](b, h, n_q, n_k)
    if mask is not None:
        mask[..., 0] = True  # every row keeps a key
        allowed = allowed & mask
    judged = score_bias.expand(b, h, n_q, n_k).masked_fill(~allowed, -math.inf)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=judged, scale=0.3)
    expected = gradients(theirs, inputs)
    for weights in (False, True):
        options = {"causal": causal, "scale": 0.3, "return_weights": weights}
        mine = scaled_dot_product_attention(query, key, value, mask, score_bias=score_bias, **options)
        how = "from weights" if weights else "fused"
        mine = mine[0] if weights else mine
        agree(mine, theirs, tolerance=TOLERANCE[dtype], quantity=f"output with a score bias, {how}, {dtype}")
        for x, y in zip(gradients(mine, inputs), expected, strict=True):
            agree(
                x,
                y,
                tolerance=8 * TOLERANCE[dtype],
                quantity=f"gradients with a score bias, {how}, {dtype}",
            )


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by", ["mask", "bias"])
def test_a_row_without_keys_gives_zero_beside_a_bias(return_weights, causal, by):
    query, key, value = inputs = heads(2, 2, 4, 4, 3, 5, torch.float32)
    score_bias, mask = torch.randn(2, 1, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1, :, :, 0] = False  # together with causality, the first row of the other
    options = {"causal": causal, "return_weights": return_weights}
    if by == "bias":
        score_bias = score_bias.masked_fill(~mask, -math.inf)
    score_bias.requires_grad_()
    given = mask if by == "mask" else None
    result = scaled_dot_product_attention(query, key, value, given, score_bias=score_bias, **options)
    output = result[0] if return_weights else result
    dead = [(0, 2), (1, 0)] if causal else [(0, 2)]
    for b, row in dead:
        assert not output[b, :, row].any()
        assert not return_weights or not result[1][b, :, row].any()
    alive = torch.ones(2, 4, dtype=torch.bool)
    for b, row in dead:
        alive[b, row] = False
    assert output.transpose(1, 2)[alive].abs().sum(-1).gt(0).all()
    for gradient in torch.autograd.grad(output.square().sum(), (*inputs, score_bias), retain_graph=True):
        assert gradient.isfinite().all() and gradient.any()
    lost = sum(output[b, :, row].sum() for b, row in dead)
    for gradient in torch.autograd.grad(lost, (*inputs, score_bias)):
        assert not gradient.any()


@pytest.mark.parametrize("return_weights", [False, True])
def test_minus_infinity_in_a_bias_forbids_as_a_mask_does(return_weights):
    query, key, value = heads(2, 2, 5, 7, 4, 4, torch.float64)
    mask, score_bias = random_mask(2, 1, 5, 7), torch.randn(2, 5, 7, dtype=torch.float64)
    options = {"causal": True, "return_weights": return_weights}
    outputs = [
        scaled_dot_product_attention(query, key, value, mask, score_bias=score_bias, **options),
        scaled_dot_product_attention(
            query, key, value, score_bias=score_bias.masked_fill(~mask, -math.inf), **options
        ),
    ]
    for a, b in [outputs] if not return_weights else zip(*outputs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.verifies(
    "companion.attention.scaled_dot_product_attention",
    against="torch.nn.functional.scaled_dot_product_attention",
)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_float32_bias_meets_bfloat16_queries(agree, autocast, grad):
    inputs = [x.detach().bfloat16().requires_grad_(grad) for x in heads(3, 2, 5, 7, 8, 8, torch.float64)]
    score_bias = torch.randn(2, 5, 7).bfloat16().float().requires_grad_(grad)
    exact = [x.detach().double() for x in (*inputs, score_bias)]
    theirs = F.scaled_dot_product_attention(*exact[:3], attn_mask=exact[3])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine = scaled_dot_product_attention(*inputs, score_bias=score_bias)
        _, weights = scaled_dot_product_attention(*inputs, score_bias=score_bias, return_weights=True)
    assert mine.dtype == weights.dtype == torch.bfloat16
    agree(mine, theirs, tolerance=0.016, quantity="output with a score bias, bfloat16 against float64")


@pytest.mark.verifies(
    "companion.attention.scaled_dot_product_attention",
    against="torch.nn.functional.scaled_dot_product_attention",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "h_kv"), [(1, 1), (6, 1), (6, 2), (6, 6)])
@pytest.mark.parametrize("constraint", ["none", "causal", "mask", "bias"])
def test_heads_of_queries_share_heads_of_keys(agree, dtype, h, h_kv, constraint):
    query = torch.randn(3, h, 5, 4, dtype=dtype).requires_grad_()
    key = torch.randn(3, h_kv, 7, 4, dtype=dtype).requires_grad_()
    value = torch.randn(3, h_kv, 7, 6, dtype=dtype).requires_grad_()
    options, judged = {}, None
    if constraint == "causal":
        options, judged = {"causal": True}, torch.ones(5, 7).tril(2).bool()
    elif constraint == "mask":
        judged = random_mask(3, h, 5, 7)
        options = {"mask": judged}
    elif constraint == "bias":
        judged = torch.randn(1, h, 5, 7, dtype=dtype)
        options = {"score_bias": judged[0]}
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=judged, enable_gqa=True)
    expected = gradients(theirs, (query, key, value))
    for weights in (False, True):
        mine = scaled_dot_product_attention(
            query, key, value, **options, enable_gqa=True, return_weights=weights
        )
        mine, how = (mine[0], "from weights") if weights else (mine, "fused")
        agree(mine, theirs, tolerance=TOLERANCE[dtype], quantity=f"output, shared keys, {how}, {dtype}")
        for a, b in zip(gradients(mine, (query, key, value)), expected, strict=True):
            agree(a, b, tolerance=8 * TOLERANCE[dtype], quantity=f"gradients, shared keys, {how}, {dtype}")


@pytest.mark.verifies(
    "companion.attention.scaled_dot_product_attention",
    against="torch.nn.functional.scaled_dot_product_attention",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", [None, "every head", "each head"])
def test_a_single_query_of_heads_that_share_keys(agree, dtype, batch, masked):
    query = torch.randn(batch, 6, 1, 4, dtype=dtype).requires_grad_()
    key = torch.randn(batch, 2, 7, 4, dtype=dtype).requires_grad_()
    value = torch.randn(batch, 2, 7, 5, dtype=dtype).requires_grad_()
    mask = None if masked is None else torch.rand(batch, 1 if masked == "every head" else 6, 1, 7) < 0.6
    if masked is not None:
        mask[..., 3] = True
        mask[0, :, :, :] &= batch == 1  # the first row of several sees no key
    mine = scaled_dot_product_attention(query, key, value, mask, causal=True, enable_gqa=True)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    if masked is not None and batch > 1:
        assert (mine[0] == 0).all()
        theirs = torch.cat((torch.zeros_like(theirs[:1]), theirs[1:]))
    agree(mine, theirs, tolerance=TOLERANCE[dtype], quantity=f"output, one query, shared keys, {dtype}")
    pairs = zip(gradients(mine, (query, key, value)), gradients(theirs, (query, key, value)), strict=True)
    for a, b in pairs:
        if masked is not None and batch > 1:
            a, b = a[1:], b[1:]
        agree(a, b, tolerance=8 * TOLERANCE[dtype], quantity=f"gradients, one query, shared keys, {dtype}")


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"score_bias": torch.ones(2, 5, 5)}])
def test_the_fused_kernel_is_called_once_with_a_mask_it_is_fused_for(monkeypatch, options):
    calls, kernel = [], F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        calls.append(attn_mask)
        return kernel(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    query, key, value = heads(3, 2, 5, 5, 4, 4, torch.float32)
    for mask in (None, random_mask(5, 5) | torch.eye(5).bool()):
        scaled_dot_product_attention(query, key, value, mask, **options)
    assert len(calls) == 2
    assert calls[0] is None if "score_bias" not in options else calls[0].shape == (1, 2, 5, 5)
    assert calls[1].dim() == 4  # of three dimensions PyTorch's CPU kernel would make an unfused pass


def test_attention_is_indifferent_to_the_order_of_keys_and_follows_that_of_queries():
    query, key, value = heads(2, 2, 5, 7, 4, 4, torch.float64)
    mask, p, q = random_mask(5, 7), torch.randperm(7), torch.randperm(5)
    plain = scaled_dot_product_attention(query, key, value, mask)
    moved = scaled_dot_product_attention(query[:, :, q], key[:, :, p], value[:, :, p], mask[q][:, p])
    torch.testing.assert_close(moved, plain[:, :, q], rtol=0, atol=1e-14)


@pytest.mark.parametrize("return_weights", [False, True])
def test_a_masked_key_has_no_part_in_the_output(return_weights):
    query, key, value = heads(2, 2, 5, 7, 4, 4, torch.float32)
    mask = torch.tensor([True, True, False, True, False, True, True])
    outputs = []
    for _ in range(2):
        out = scaled_dot_product_attention(query, key, value, mask, return_weights=return_weights)
        outputs.append(out[0] if return_weights else out)
        with torch.no_grad():
            key[:, :, ~mask], value[:, :, ~mask] = 50 * torch.randn(2, 2, 2, 4), 50 * torch.randn(2, 2, 2, 4)
    assert torch.equal(*outputs)


def test_dropout_zeroes_weights_and_scales_the_rest():
    query, key = torch.randn(1, 1, 40, 4), torch.randn(1, 1, 50, 4)
    _, clean = scaled_dot_product_attention(query, key, torch.eye(50)[None, None], return_weights=True)
    for return_weights in (False, True):  # with the identity as values, the output is the weights
        out = scaled_dot_product_attention(
            query, key, torch.eye(50)[None, None], dropout=0.25, return_weights=return_weights
        )
        out = out[0] if return_weights else out
        assert abs((out == 0).float().mean().item() - 0.25) < 0.03
        torch.testing.assert_close(out[out != 0], clean[out != 0] / 0.75)


Q, K, V = torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.ones(2, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (([[1.0]], K, V), {}, TypeError, "query must be a torch.Tensor, got list"),
        ((Q, K.long(), V), {}, TypeError, "key must be a floating-point tensor, got torch.int64"),
        (
            (Q, K, V.double()),
            {},
            TypeError,
            "value must have the query's dtype torch.float32, got torch.float64",
        ),
        ((Q[0, 0], K, V), {}, ValueError, r"query must be non-empty with shape \(..., n, d\), got \(4,\)"),
        ((Q[:0], K[:0], V[:0]), {}, ValueError, r"query must be non-empty .* got \(0, 3, 4\)"),
        ((Q, K[:, :0], V[:, :0]), {}, ValueError, r"key must be non-empty .* got \(2, 0, 4\)"),
        (
            (Q, K[..., :3], V),
            {},
            ValueError,
            r"key must have the query's d_k = 4 as last size, got \(2, 5, 3\)",
        ),
        (
            (Q, K, V[:, :4]),
            {},
            ValueError,
            r"value must have one row for each of the 5 keys, got \(2, 4, 6\)",
        ),
        ((Q, K[:1], V), {}, ValueError, r"key must have the query's leading sizes \(2,\), got \(1, 5, 4\)"),
        ((Q, K, V[None]), {}, ValueError, r"value must have the query's leading sizes \(2,\)"),
        ((Q, K, V, torch.zeros(3, 5)), {}, TypeError, "mask must be a bool tensor .* got torch.float32"),
        ((Q, K, V, [True]), {}, TypeError, "mask must be a torch.Tensor, got list"),
        (
            (Q, K, V, torch.ones(5, 3).bool()),
            {},
            ValueError,
            r"mask must broadcast to \(2, 3, 5\), got \(5, 3\)",
        ),
        (
            (Q, K, V, torch.ones(3, 3, 5).bool()),
            {},
            ValueError,
            r"mask must broadcast to \(2, 3, 5\), got \(3, 3, 5\)",
        ),
        (
            (Q, K, V, torch.ones(1, 2, 3, 5).bool()),
            {},
            ValueError,
            r"mask must broadcast .* got \(1, 2, 3, 5\)",
        ),
        ((Q, K, V, torch.tensor(True)), {}, ValueError, r"mask must broadcast .* got \(\)"),
        ((K, Q, Q), {"causal": True}, ValueError, "key must be at least as long as the query .* got 3 < 5"),
        ((Q, K, V), {"score_bias": 1.0}, TypeError, "score_bias must be a torch.Tensor, got float"),
        (
            (Q, K, V),
            {"score_bias": torch.ones(3, 5).bool()},
            TypeError,
            "score_bias must be a floating-point tensor, got torch.bool",
        ),
        (
            (Q, K, V),
            {"score_bias": torch.ones(2, 5, 3)},
            ValueError,
            r"score_bias must broadcast to \(2, 3, 5\), got \(2, 5, 3\)",
        ),
        ((Q, K, V), {"score_bias": torch.tensor(1.0)}, ValueError, r"score_bias must broadcast .* got \(\)"),
        (
            (Q[:, None], K[:1, None], V[:1, None]),
            {"enable_gqa": True},
            ValueError,
            r"key must have the query's leading sizes \(2,\), got \(1, 1, 5, 4\)",
        ),
        (
            (Q, torch.cat((K, K)), torch.cat((V, V))),
            {"enable_gqa": True},
            ValueError,
            r"key must have a number of heads that divides the query's \(2, 3, 4\), got \(4, 5, 4\)",
        ),
        (
            (Q[0], K[0], V[0]),
            {"enable_gqa": True},
            ValueError,
            r"key must have a number of heads that divides the query's \(3, 4\), got \(5, 4\)",
        ),
        (
            (Q, K[:1], V),
            {"enable_gqa": True},
            ValueError,
            r"value must have the key's 1 heads, got \(2, 5, 6\)",
        ),
        ((Q, K, V), {"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ((Q, K, V), {"dropout": None}, TypeError, "dropout must be a number, got NoneType"),
    ],
)
def test_bad_input_is_named(arguments, options, error, match):
    for return_weights in (False, True):
        with pytest.raises(error, match=match):
            scaled_dot_product_attention(*arguments, **options, return_weights=return_weights)


def randomised(module: nn.Module, std: float = 0.3) -> nn.Module:
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, float(name.endswith("gain")), std)
    return module


def pytorch_twin(mine: MultiHeadAttention) -> nn.MultiheadAttention:
    """PyTorch's module with the same weights."""
    d_model, dtype = mine.d_model, mine.query_proj.weight.dtype
    bias, context = mine.query_proj.bias is not None, mine.d_context
    twin = nn.MultiheadAttention(
        d_model, mine.num_heads, bias=bias, kdim=context, vdim=context, batch_first=True, dtype=dtype
    )
    projections = (mine.query_proj, mine.key_proj, mine.value_proj)
    with torch.no_grad():
        if context == d_model:
            twin.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        else:
            for name, p in zip("qkv", projections, strict=True):
                getattr(twin, f"{name}_proj_weight").copy_(p.weight)
        if bias:
            twin.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        twin.out_proj.load_state_dict(mine.output_proj.state_dict())
    return twin


def weight_gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of either module, under our names."""
    if isinstance(module, MultiHeadAttention):
        return {name: parameter.grad for name, parameter in module.named_parameters()}
    names = ("query_proj", "key_proj", "value_proj")
    parts = (
        [getattr(module, f"{name}_proj_weight").grad for name in "qkv"]
        if module.in_proj_weight is None
        else module.in_proj_weight.grad.chunk(3)
    )
    grads = {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
    if module.in_proj_bias is not None:
        grads |= {
            f"{name}.bias": part for name, part in zip(names, module.in_proj_bias.grad.chunk(3), strict=True)
        }
    return grads | {f"output_proj.{name}": p.grad for name, p in module.out_proj.named_parameters()}


@pytest.mark.verifies("companion.attention.MultiHeadAttention", against="torch.nn.MultiheadAttention")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize(
    ("batch", "n", "n_k", "d_context", "masked"),
    [
        *(
            (*size, masked)
            for size in [(1, 1, None, 6), (3, 5, None, 6)]
            for masked in ("no", "padding", "causal")
        ),
        *((*size, masked) for size in [(3, 5, 7, 6), (3, 7, 5, 11)] for masked in ("no", "padding")),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention(agree, dtype, num_heads, batch, n, n_k, d_context, masked, bias):
    mine = randomised(MultiHeadAttention(6, num_heads, d_context=d_context, bias=bias)).to(dtype)
    theirs = pytorch_twin(mine)
    x = torch.randn(batch, n, 6, dtype=dtype)
    context = None if n_k is None else torch.randn(batch, n_k, d_context, dtype=dtype)
    keys = x if context is None else context
    mask = random_mask(batch, keys.shape[1]) if masked == "padding" else None
    forbid = {
        "key_padding_mask": None if mask is None else ~mask,
        "attn_mask": ~causal_mask(n) if masked == "causal" else None,
    }
    options = {"mask": None if mask is None else mask[:, None, None], "causal": masked == "causal"}

    output = mine(x, context, **options)
    judged, mean_weights = theirs(x, keys, keys, **forbid)
    agree(output, judged, tolerance=TOLERANCE[dtype], quantity=f"output, {dtype}")
    _, head_weights = theirs(x, keys, keys, **forbid, average_attn_weights=False)
    again, weights = mine(x, context, **options, return_weights=True)
    agree(again, judged, tolerance=TOLERANCE[dtype], quantity=f"output beside weights, {dtype}")
    agree(weights, head_weights, tolerance=TOLERANCE[dtype], quantity=f"weights of each head, {dtype}")
    agree(weights.mean(1), mean_weights, tolerance=TOLERANCE[dtype], quantity=f"mean weights, {dtype}")

    upstream = torch.randn_like(output)
    output.backward(upstream)
    judged.backward(upstream)
    agree(
        weight_gradients(mine),
        weight_gradients(theirs),
        tolerance=20 * TOLERANCE[dtype],
        quantity=f"gradients, {dtype}",
    )


@pytest.mark.verifies(
    "companion.attention.MultiHeadAttention", against="torch.nn.functional.scaled_dot_product_attention"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_heads_of_unequal_sizes_are_projections_of_their_own(agree, dtype, batch):
    d_model, h, d_k, d_v, d_context = 7, 3, 4, 5, 9  # 3 does not divide 7
    module = randomised(MultiHeadAttention(d_model, h, d_k=d_k, d_v=d_v, d_context=d_context)).to(dtype)
    x, context = torch.randn(batch, 5, d_model, dtype=dtype), torch.randn(batch, 8, d_context, dtype=dtype)
    joined = []
    for i in range(h):
        rows_k, rows_v = slice(i * d_k, (i + 1) * d_k), slice(i * d_v, (i + 1) * d_v)
        query = F.linear(x, module.query_proj.weight[rows_k], module.query_proj.bias[rows_k])
        key = F.linear(context, module.key_proj.weight[rows_k], module.key_proj.bias[rows_k])
        value = F.linear(context, module.value_proj.weight[rows_v], module.value_proj.bias[rows_v])
        joined.append(F.scaled_dot_product_attention(query, key, value))
    expected = F.linear(torch.cat(joined, -1), module.output_proj.weight, module.output_proj.bias)
    agree(module(x, context), expected, tolerance=2 * TOLERANCE[dtype], quantity=f"d_k ≠ d_v, {dtype}")


@pytest.mark.verifies("companion.attention.MultiHeadAttention", against="torch.nn.MultiheadAttention")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_score_bias_of_each_head(agree, dtype, causal):
    mine = randomised(MultiHeadAttention(6, 3)).to(dtype)
    x, score_bias = torch.randn(2, 5, 6, dtype=dtype), torch.randn(3, 5, 5, dtype=dtype)
    added = score_bias.masked_fill(~causal_mask(5), -math.inf) if causal else score_bias
    theirs, head_weights = pytorch_twin(mine)(
        x, x, x, attn_mask=added.repeat(2, 1, 1), average_attn_weights=False
    )
    output, weights = mine(x, causal=causal, score_bias=score_bias, return_weights=True)
    agree(output, theirs, tolerance=TOLERANCE[dtype], quantity=f"output beside weights, score bias, {dtype}")
    agree(weights, head_weights, tolerance=TOLERANCE[dtype], quantity=f"weights, score bias, {dtype}")
    output = mine(x, causal=causal, score_bias=score_bias)
    agree(output, theirs, tolerance=TOLERANCE[dtype], quantity=f"output, score bias, {dtype}")


def repeated_keys(shared: MultiHeadAttention) -> MultiHeadAttention:
    """Heads of their own for every query head, each a copy of the shared head's projection."""
    full, groups = copy.deepcopy(shared), shared.num_heads // shared.num_kv_heads
    for projection, size in ((full.key_proj, full.d_k), (full.value_proj, full.d_v)):
        for name, parameter in list(projection.named_parameters()):
            blocks = parameter.detach().unflatten(0, (-1, size)).repeat_interleave(groups, 0)
            setattr(projection, name, nn.Parameter(blocks.flatten(0, 1)))
    full.num_kv_heads = full.num_heads
    return full


@pytest.mark.verifies("companion.attention.MultiHeadAttention", against="torch.nn.MultiheadAttention")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_queries_are_heads_with_equal_projections(agree, dtype, num_kv_heads, causal, bias):
    mine = randomised(MultiHeadAttention(12, 4, num_kv_heads=num_kv_heads, bias=bias)).to(dtype)
    assert mine.key_proj.weight.shape == mine.value_proj.weight.shape == (3 * num_kv_heads, 12)
    twin = pytorch_twin(repeated_keys(mine))
    x = torch.randn(3, 7, 12, dtype=dtype)
    theirs, head_weights = twin(
        x, x, x, attn_mask=~causal_mask(7) if causal else None, average_attn_weights=False
    )
    output = mine(x, causal=causal)
    agree(output, theirs, tolerance=2 * TOLERANCE[dtype], quantity=f"output, grouped queries, {dtype}")
    beside, weights = mine(x, causal=causal, return_weights=True)
    agree(beside, theirs, tolerance=2 * TOLERANCE[dtype], quantity=f"output, grouped queries, {dtype}")
    agree(weights, head_weights, tolerance=TOLERANCE[dtype], quantity=f"weights, grouped queries, {dtype}")
    upstream = torch.randn_like(output)
    output.backward(upstream)
    theirs.backward(upstream)
    judged = weight_gradients(twin)
    for name in ("key_proj.weight", "value_proj.weight", "key_proj.bias", "value_proj.bias"):
        if name in judged:  # a shared row gets the sum of its copies' gradients
            judged[name] = judged[name].unflatten(0, (num_kv_heads, -1, 3)).sum(1).flatten(0, 1)
    agree(
        weight_gradients(mine),
        judged,
        tolerance=40 * TOLERANCE[dtype],
        quantity=f"gradients, grouped queries, {dtype}",
    )


def turn(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A stand-in for rotary positions: neighbouring pairs turn by one radian and a half for each position."""
    angles = 1.5 * torch.arange(offset, offset + x.shape[-2], dtype=torch.float64)[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x)


@pytest.mark.verifies(
    "companion.attention.MultiHeadAttention", against="torch.nn.functional.scaled_dot_product_attention"
)
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_queries_and_keys_are_turned_and_values_are_not(agree, num_kv_heads):
    module = randomised(MultiHeadAttention(12, 3, num_kv_heads=num_kv_heads, bias=False)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    query, key, value = (
        F.linear(x, projection.weight).view(2, 5, -1, 4).transpose(1, 2)
        for projection in (module.query_proj, module.key_proj, module.value_proj)
    )
    attended = F.scaled_dot_product_attention(
        turn(query, 0), turn(key, 0), value, is_causal=True, enable_gqa=True
    )
    expected = F.linear(attended.transpose(1, 2).reshape(2, 5, 12), module.output_proj.weight)
    agree(module(x, causal=True, rotary=turn), expected, tolerance=1e-13, quantity="output, rotary")
    assert not torch.allclose(module(x, causal=True), expected, atol=1e-2)
    beside, _ = module(x, causal=True, rotary=turn, return_weights=True)
    agree(beside, expected, tolerance=1e-13, quantity="output, rotary")


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunks", [(1,) * 19, (4, 1, 3, 11)])
def test_a_cache_of_turned_and_shared_keys_is_the_uncached_one(num_kv_heads, chunks):
    module = randomised(MultiHeadAttention(16, 4, num_kv_heads=num_kv_heads)).double()
    x, score_bias = torch.randn(3, 19, 16).double(), torch.randn(4, 19, 19).double()
    whole = module(x, causal=True, rotary=turn, score_bias=score_bias)
    cache, outputs, start = KVCache(), [], 0
    for length in chunks:
        end = start + length
        outputs.append(
            module(
                x[:, start:end],
                causal=True,
                rotary=turn,
                score_bias=score_bias[:, start:end, :end],
                cache=cache,
            )
        )
        start = end
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-13)
    assert cache.view()[0].shape == cache.view()[1].shape == (3, num_kv_heads, 19, 4)
    cache.reorder(torch.tensor([2, 0]))
    assert cache.view()[0].shape == (2, num_kv_heads, 19, 4)


def test_self_attention_follows_a_permutation():
    module = randomised(MultiHeadAttention(6, 2)).double()
    x, p = torch.randn(3, 7, 6, dtype=torch.float64), torch.randperm(7)
    torch.testing.assert_close(module(x[:, p]), module(x)[:, p], rtol=0, atol=1e-14)


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("changed", [1, 4, 6])
def test_causal_attention_sees_no_later_token_to_the_last_bit(return_weights, changed):
    module, x = randomised(MultiHeadAttention(6, 2)), torch.randn(3, 7, 6)
    y = x.clone()
    y[:, changed] += 10 * torch.randn(3, 6)
    before, after = (module(z, causal=True, return_weights=return_weights) for z in (x, y))
    if return_weights:
        before, after = before[0], after[0]
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_changes_nothing_for_the_real_tokens(dtype):
    module, x = randomised(MultiHeadAttention(6, 2)).to(dtype), torch.randn(3, 5, 6, dtype=dtype)
    padded = torch.cat((x, torch.full((3, 4, 6), 1e3, dtype=dtype)), dim=1)
    mask = torch.arange(9) < 5
    torch.testing.assert_close(module(padded, mask=mask)[:, :5], module(x), rtol=0, atol=TOLERANCE[dtype])


def test_dropout_acts_on_weights_in_training_only():
    module, x = randomised(MultiHeadAttention(6, 2, dropout=0.5)), torch.randn(3, 20, 6)
    _, weights = module(x, return_weights=True)
    assert 0.4 < (weights == 0).float().mean() < 0.6
    module.eval()
    _, weights = module(x, return_weights=True)
    assert (weights > 0).all()
    assert torch.equal(module(x), module(x))


@pytest.mark.verifies("companion.attention.KVCache", against="torch.cat")
def test_the_cache_is_a_concatenation_of_what_was_appended(agree):
    cache = KVCache()
    chunks = [(torch.randn(3, 2, n, 4), torch.randn(3, 2, n, 5)) for n in (3, 1, 1, 20, 1, 40)]
    views = []
    for i, (keys, values) in enumerate(chunks, start=1):
        views.append(cache.append(keys, values))
        expected = [torch.cat(part, dim=2) for part in zip(*chunks[:i], strict=True)]
        assert cache.length == expected[0].shape[2]
        for view, whole in zip(cache.view(), expected, strict=True):
            agree(view, whole, tolerance=0, quantity="contents")
    for (keys, values), count in zip(views, itertools.accumulate(c[0].shape[2] for c in chunks), strict=True):
        assert keys.shape[2] == values.shape[2] == count  # an earlier view still shows what it showed
        assert torch.equal(keys, expected[0][:, :, :count]) and torch.equal(values, expected[1][:, :, :count])
    rows = torch.tensor([2, 2, 0, 1])
    cache.reorder(rows)
    for view, whole in zip(cache.view(), expected, strict=True):
        agree(view, whole[rows], tolerance=0, quantity="contents reordered")


@pytest.mark.verifies("companion.attention.KVCache", against="torch.cat")
@pytest.mark.parametrize("length", [0, 1, 16, 22])
def test_a_truncated_cache_goes_on_from_where_it_was_cut(agree, length):
    cache, parts = KVCache(), [(torch.randn(3, 2, n, 4), torch.randn(3, 2, n, 5)) for n in (9, 13, 8)]
    for keys, values in parts[:2]:
        cache.append(keys, values)
    buffer = cache.view()[0].data_ptr()
    cache.truncate(length)
    assert cache.length == length and cache.view()[1].shape == (3, 2, length, 5)
    cache.append(*parts[2])
    for view, *held in zip(cache.view(), *parts, strict=True):
        expected = torch.cat((torch.cat(held[:2], 2)[:, :, :length], held[2]), 2)
        agree(view, expected, tolerance=0, quantity="contents truncated")
    assert cache.view()[0].data_ptr() == buffer  # room for 32 positions, and never moved


def test_the_cache_is_moved_a_logarithmic_number_of_times():
    cache, moves, address = KVCache(), 0, None
    for _ in range(1000):
        keys, _ = cache.append(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        moves += keys.data_ptr() != address
        address = keys.data_ptr()
    assert moves <= 7  # 16, 32 … 1024


@pytest.mark.verifies("companion.attention.MultiHeadAttention", against="torch.nn.MultiheadAttention")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [(1,) * 19, (4, 1, 3, 11), (19,)])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_self_attention_is_the_uncached_one(agree, dtype, chunks, padded):
    module = randomised(MultiHeadAttention(6, 2, bias=not padded)).to(dtype)
    x = torch.randn(3, 19, 6, dtype=dtype)
    keep = torch.ones(3, 19, dtype=torch.bool)
    keep[1, 2:4] = not padded
    cache, outputs, start = KVCache(), [], 0
    with torch.no_grad():
        for length in chunks:
            mask = keep[:, None, None, : start + length] if padded else None
            outputs.append(module(x[:, start : start + length], mask=mask, causal=True, cache=cache))
            start += length
        judged, _ = pytorch_twin(module)(x, x, x, attn_mask=~causal_mask(19), key_padding_mask=~keep)
    agree(
        torch.cat(outputs, 1),
        judged,
        tolerance=2 * TOLERANCE[dtype],
        quantity=f"output with a cache, {dtype}",
    )


def test_cached_cross_attention_projects_its_context_once():
    module = randomised(MultiHeadAttention(6, 2, d_context=4)).double()
    x, context = torch.randn(3, 5, 6).double(), torch.randn(3, 7, 4).double()
    mask, cache, calls = random_mask(3, 1, 1, 7), KVCache(), []
    for projection in (module.key_proj, module.value_proj):
        projection.register_forward_hook(lambda *_: calls.append(1))
    steps = [module(x[:, i : i + 1], context, mask=mask, cache=cache) for i in range(5)]
    assert len(calls) == 2
    torch.testing.assert_close(torch.cat(steps, 1), module(x, context, mask=mask), rtol=0, atol=1e-14)


@pytest.mark.verifies("companion.attention.record_attention", against="torch.nn.MultiheadAttention")
def test_recorded_weights_are_those_the_modules_used(agree):
    modules = [randomised(MultiHeadAttention(6, 2)).eval() for _ in range(2)]
    x = torch.randn(3, 5, 6)
    with record_attention(*modules) as recorded:
        plain = modules[1](modules[0](x, causal=True))
    first, second = map(pytorch_twin, modules)
    y, weights = first(x, x, x, attn_mask=~causal_mask(5), average_attn_weights=False)
    agree(recorded[0], weights, tolerance=2e-6, quantity="weights, causal")
    z, weights = second(y, y, y, average_attn_weights=False)
    agree(recorded[1], weights, tolerance=2e-6, quantity="weights")
    agree(plain, z, tolerance=2e-6, quantity="output while recording")
    assert len(recorded) == 2
    shared, score_bias = randomised(MultiHeadAttention(6, 2, num_kv_heads=1)).eval(), torch.randn(2, 5, 5)
    with record_attention(shared) as grouped:
        shared(x, score_bias=score_bias)
    _, weights = pytorch_twin(repeated_keys(shared))(
        x, x, x, attn_mask=score_bias.repeat(3, 1, 1), average_attn_weights=False
    )
    agree(grouped[0], weights, tolerance=2e-6, quantity="weights, grouped queries, score bias")
    assert not any(module._forward_hooks for module in modules)
    with pytest.raises(ValueError, match="cache must be None"), record_attention(modules[0]):
        modules[0](x, cache=KVCache())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"d_model": 0}, ValueError, "d_model must be at least 1, got 0"),
        ({"d_model": 6.0}, TypeError, "d_model must be an int, got float"),
        ({"num_heads": 4}, ValueError, "d_model must be divisible by num_heads = 4, got 6"),
        ({"num_heads": 4, "d_k": 3}, ValueError, "d_model must be divisible by num_heads = 4, got 6"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"num_kv_heads": 1.0}, TypeError, "num_kv_heads must be an int, got float"),
        ({"num_kv_heads": 4}, ValueError, "num_kv_heads must divide num_heads = 2, got 4"),
        (
            {"d_model": 12, "num_heads": 6, "num_kv_heads": 4},
            ValueError,
            "num_kv_heads must divide num_heads = 6, got 4",
        ),
        ({"d_k": 0, "d_v": 3}, ValueError, "d_k must be at least 1, got 0"),
        ({"d_v": -1}, ValueError, "d_v must be at least 1, got -1"),
        ({"d_context": 1.5}, TypeError, "d_context must be an int, got float"),
        ({"dropout": 1.0}, ValueError, "dropout must lie in"),
    ],
)
def test_bad_sizes_are_named(options, error, match):
    with pytest.raises(error, match=match):
        MultiHeadAttention(**{"d_model": 6, "num_heads": 2, **options})


X = torch.ones(2, 3, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((X.tolist(),), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((X.long(),), {}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ((X[0],), {}, ValueError, r"x must have 3 dimensions, got shape \(3, 6\)"),
        ((X[..., :5],), {}, ValueError, r"x must have shape \(..., 6\), got \(2, 3, 5\)"),
        ((X[:, :0],), {}, ValueError, r"x must not be empty, got shape \(2, 0, 6\)"),
        ((X, X[..., :5]), {}, ValueError, r"context must have shape \(..., 6\), got \(2, 3, 5\)"),
        ((X, X[:1]), {}, ValueError, r"context must have x's batch size 2, got \(1, 3, 6\)"),
        ((X, X[:, :0]), {}, ValueError, "context must not be empty"),
        ((X,), {"mask": torch.ones(3, 3)}, TypeError, "mask must be a bool tensor"),
        (
            (X,),
            {"mask": torch.ones(3, 2).bool()},
            ValueError,
            r"mask must broadcast to \(2, 2, 3, 3\), got \(3, 2\)",
        ),
        ((X,), {"mask": torch.ones(3, 1, 1, 3).bool()}, ValueError, "mask must broadcast to"),
        (
            (X,),
            {"score_bias": torch.ones(3, 3).long()},
            TypeError,
            "score_bias must be a floating-point tensor",
        ),
        (
            (X,),
            {"score_bias": torch.ones(3, 3, 3)},
            ValueError,
            r"score_bias must broadcast to \(2, 2, 3, 3\), got \(3, 3, 3\)",
        ),
        ((X,), {"rotary": 10000.0}, TypeError, r"rotary must be callable as rotary\(x, offset\), got float"),
        ((X, X), {"rotary": turn}, ValueError, "rotary must be None with a context"),
    ],
)
def test_bad_calls_are_named_and_leave_the_cache_alone(arguments, options, error, match):
    module = MultiHeadAttention(6, 2)
    for cache in (None, KVCache()):
        with pytest.raises(error, match=match):
            module(*arguments, cache=cache, **options)
    assert cache.length == 0
    with pytest.raises(ValueError, match="the cache is empty"):
        cache.view()


def test_a_context_must_be_given_where_its_size_differs():
    with pytest.raises(ValueError, match="context must be given: keys are projected from d_context = 4"):
        MultiHeadAttention(6, 2, d_context=4)(X)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda m, c: m(X, mask=torch.ones(3, 3).bool(), cache=c),
            ValueError,
            r"mask must broadcast to \(2, 2, 3, 7\)",
        ),
        (lambda m, c: m(torch.ones(3, 1, 6), cache=c), ValueError, r"keys must fit the cache's"),
        (
            lambda m, c: m(X, torch.ones(2, 5, 6), cache=c),
            ValueError,
            "context must have the 4 vectors .* got 5",
        ),
        (
            lambda m, c: c.append(torch.ones(2, 2, 1, 3), torch.ones(2, 2, 2, 3)),
            ValueError,
            "values must agree with keys",
        ),
        (
            lambda m, c: c.append(torch.ones(2, 2, 1, 3), torch.ones(2, 2, 1, 4)),
            ValueError,
            "values must fit the cache's",
        ),
        (
            lambda m, c: c.append(torch.ones(2, 1, 3), torch.ones(2, 1, 3)),
            ValueError,
            r"keys must have shape \(batch, heads",
        ),
        (
            lambda m, c: c.append(torch.ones(2, 2, 1, 3).long(), torch.ones(2, 2, 1, 3)),
            TypeError,
            "keys must be a floating",
        ),
        (
            lambda m, c: c.append(torch.ones(2, 2, 1, 3).double(), torch.ones(2, 2, 1, 3)),
            TypeError,
            "keys must have the cache's dtype",
        ),
        (
            lambda m, c: c.append(torch.ones(2, 2, 1, 3), None),
            TypeError,
            "values must be a torch.Tensor, got NoneType",
        ),
        (lambda m, c: c.reorder([0, 1]), TypeError, "indices must be a torch.Tensor, got list"),
        (lambda m, c: c.reorder(torch.tensor([0.0])), TypeError, "indices must be an integer tensor"),
        (
            lambda m, c: c.reorder(torch.tensor([0, 2])),
            ValueError,
            "indices must lie in 0 … 1, got values from 0 to 2",
        ),
        (lambda m, c: c.truncate(5), ValueError, "length must lie in 0 … 4, got 5"),
        (lambda m, c: c.truncate(-1), ValueError, "length must lie in 0 … 4, got -1"),
        (lambda m, c: c.truncate(2.0), TypeError, "length must be an int, got float"),
    ],
)
def test_a_filled_cache_refuses_what_does_not_fit_and_keeps_what_it_holds(call, error, match):
    module, cache = MultiHeadAttention(6, 2), KVCache()
    with torch.no_grad():
        module(torch.randn(2, 4, 6), cache=cache)
        before = [x.clone() for x in cache.view()]
        with pytest.raises(error, match=match):
            call(module, cache)
    assert cache.length == 4
    assert all(torch.equal(a, b) for a, b in zip(cache.view(), before, strict=True))
