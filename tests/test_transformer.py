"""Layers and the whole model against PyTorch's, and what must hold of an encoder with a causal decoder."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_attention import DTYPES, TOLERANCE, pytorch_twin, randomised, weight_gradients
from torch import nn

from companion.attention import KVCache, MultiHeadAttention
from companion.models.transformer import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    LayerCache,
    Transformer,
    TransformerConfig,
)

ENCODER_NAMES = {
    "self_attention": "self_attn",
    "attention_norm": "norm1",
    "feed_forward.up": "linear1",
    "feed_forward.down": "linear2",
    "feed_forward_norm": "norm2",
}
DECODER_NAMES = {
    "self_attention": "self_attn",
    "self_attention_norm": "norm1",
    "cross_attention": "multihead_attn",
    "cross_attention_norm": "norm2",
    "feed_forward.up": "linear1",
    "feed_forward.down": "linear2",
    "feed_forward_norm": "norm3",
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layer_twin(mine: EncoderLayer | DecoderLayer, activation: str) -> nn.Module:
    """PyTorch's layer with the same weights, without dropout."""
    encoder = isinstance(mine, EncoderLayer)
    kind = nn.TransformerEncoderLayer if encoder else nn.TransformerDecoderLayer
    up = mine.feed_forward.up
    heads = mine.self_attention.num_heads
    options = {"activation": activation, "norm_first": mine.norm_first, "batch_first": True, "dropout": 0.0}
    twin = kind(mine.d_model, heads, up.out_features, dtype=up.weight.dtype, **options)
    for ours, theirs in (ENCODER_NAMES if encoder else DECODER_NAMES).items():
        module = mine.get_submodule(ours)
        if isinstance(module, MultiHeadAttention):
            setattr(twin, theirs, pytorch_twin(module))
        else:
            weights = {name.replace("gain", "weight"): value for name, value in module.state_dict().items()}
            twin.get_submodule(theirs).load_state_dict(weights)
    return twin.train(mine.training)


def layer_gradients(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of either layer, under our names."""
    ours = isinstance(layer, (EncoderLayer, DecoderLayer))
    names = ENCODER_NAMES if isinstance(layer, (EncoderLayer, nn.TransformerEncoderLayer)) else DECODER_NAMES
    found = {}
    for mine, theirs in names.items():
        module = layer.get_submodule(mine if ours else theirs)
        if isinstance(module, (MultiHeadAttention, nn.MultiheadAttention)):
            part = weight_gradients(module)
        else:
            part = {name.replace("gain", "weight"): p.grad for name, p in module.named_parameters()}
        found |= {f"{mine}.{name}": gradient for name, gradient in part.items()}
    return found


def keep_mask(batch: int, n: int) -> torch.Tensor:
    """Padding at the end, of a different length in each row; the first row has none."""
    return torch.arange(n) < (n - torch.arange(batch) % n)[:, None]


@pytest.mark.verifies("companion.models.transformer.EncoderLayer", against="torch.nn.TransformerEncoderLayer")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_encoder_layer(agree, dtype, norm_first, activation, batch, n, causal):
    mine = randomised(EncoderLayer(12, 3, 17, 0.0, activation, norm_first)).to(dtype)
    theirs = layer_twin(mine, activation)
    x, keep = torch.randn(batch, n, 12, dtype=dtype), keep_mask(batch, n)
    later = torch.ones(n, n).triu(1).bool() if causal else None
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = mine(inputs[0], keep[:, None, None], causal), theirs(inputs[1], later, ~keep)
    agree(*outputs, tolerance=5 * TOLERANCE[dtype], quantity=f"output in training, {dtype}")
    upstream = torch.randn_like(x)
    for output in outputs:
        output.backward(upstream)
    agree(
        inputs[0].grad, inputs[1].grad, tolerance=50 * TOLERANCE[dtype], quantity=f"input gradient, {dtype}"
    )
    agree(
        layer_gradients(mine),
        layer_gradients(theirs),
        tolerance=50 * TOLERANCE[dtype],
        quantity=f"gradients, {dtype}",
    )
    if not causal:
        alone = mine.first(x, keep[:, None, None])
        torch.testing.assert_close(alone, outputs[1][:, :1], rtol=0, atol=5 * TOLERANCE[dtype])
    with torch.no_grad():  # in evaluation PyTorch runs another, fused implementation
        fused = theirs.eval()(x, later, ~keep)
        agree(
            mine.eval()(x, keep[:, None, None], causal)[keep],
            fused[keep],
            tolerance=5 * TOLERANCE[dtype],
            quantity=f"output in evaluation, {dtype}",
        )


@pytest.mark.verifies("companion.models.transformer.DecoderLayer", against="torch.nn.TransformerDecoderLayer")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("batch", "m", "n"), [(1, 1, 4), (3, 7, 5), (3, 2, 9)])
def test_decoder_layer(agree, dtype, norm_first, activation, batch, m, n):
    mine = randomised(DecoderLayer(12, 3, 17, 0.0, activation, norm_first)).to(dtype)
    theirs = layer_twin(mine, activation)
    x, memory = torch.randn(batch, m, 12, dtype=dtype), torch.randn(batch, n, 12, dtype=dtype)
    own, keep = keep_mask(batch, m), keep_mask(batch, n)
    later = torch.ones(m, m).triu(1).bool()
    inputs = [(x.clone().requires_grad_(), memory.clone().requires_grad_()) for _ in range(2)]
    outputs = (
        mine(*inputs[0], own[:, None, None], keep[:, None, None]),
        theirs(*inputs[1], later, tgt_key_padding_mask=~own, memory_key_padding_mask=~keep),
    )
    agree(*outputs, tolerance=5 * TOLERANCE[dtype], quantity=f"output in training, {dtype}")
    upstream = torch.randn_like(x)
    for output in outputs:
        output.backward(upstream)
    for a, b in zip(*inputs, strict=True):
        agree(a.grad, b.grad, tolerance=50 * TOLERANCE[dtype], quantity=f"input gradients, {dtype}")
    agree(
        layer_gradients(mine),
        layer_gradients(theirs),
        tolerance=50 * TOLERANCE[dtype],
        quantity=f"gradients, {dtype}",
    )
    with torch.no_grad():
        judged = theirs.eval()(x, memory, later, tgt_key_padding_mask=~own, memory_key_padding_mask=~keep)
        agree(
            mine.eval()(x, memory, own[:, None, None], keep[:, None, None]),
            judged,
            tolerance=5 * TOLERANCE[dtype],
            quantity=f"output in evaluation, {dtype}",
        )


def stack_twin(mine: Encoder | Decoder, c: TransformerConfig) -> nn.Module:
    """PyTorch's stack with the same weights."""
    layers = [layer_twin(layer, c.activation) for layer in mine.layers]
    norm = None
    if c.has_final_norm:
        norm = nn.LayerNorm(c.d_model, dtype=mine.norm.gain.dtype)
        norm.load_state_dict({"weight": mine.norm.gain, "bias": mine.norm.bias})
    if isinstance(mine, Encoder):
        twin = nn.TransformerEncoder(layers[0], len(layers), norm, enable_nested_tensor=False)
    else:
        twin = nn.TransformerDecoder(layers[0], len(layers), norm)
    twin.layers = nn.ModuleList(layers)
    return twin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
class TestStacks:
    @pytest.mark.verifies("companion.models.transformer.Encoder", against="torch.nn.TransformerEncoder")
    def test_encoder(self, agree, dtype, norm_first, final_norm):
        c = config(norm_first=norm_first, final_norm=final_norm)
        mine, keep = randomised(Encoder(c)).to(dtype), keep_mask(3, 7)
        x = torch.randn(3, 7, 12, dtype=dtype)
        theirs = stack_twin(mine, c)(x, src_key_padding_mask=~keep)
        agree(
            mine(x, keep[:, None, None]), theirs, tolerance=10 * TOLERANCE[dtype], quantity=f"output, {dtype}"
        )

    @pytest.mark.verifies("companion.models.transformer.Decoder", against="torch.nn.TransformerDecoder")
    def test_decoder(self, agree, dtype, norm_first, final_norm):
        c = config(norm_first=norm_first, final_norm=final_norm)
        mine, keep = randomised(Decoder(c)).to(dtype), keep_mask(3, 7)
        x, memory = torch.randn(3, 5, 12, dtype=dtype), torch.randn(3, 7, 12, dtype=dtype)
        later = torch.ones(5, 5).triu(1).bool()
        theirs = stack_twin(mine, c)(x, memory, later, memory_key_padding_mask=~keep)
        output = mine(x, memory, memory_mask=keep[:, None, None])
        agree(output, theirs, tolerance=10 * TOLERANCE[dtype], quantity=f"output, {dtype}")


def config(**changes) -> TransformerConfig:
    sizes = {
        "vocab_size": 23,
        "d_model": 12,
        "num_heads": 3,
        "num_encoder_layers": 2,
        "num_decoder_layers": 3,
        "d_ff": 17,
    }
    return TransformerConfig(**{**sizes, "dropout": 0.0, "max_length": 16, **changes})


class Judge(nn.Module):
    """nn.Transformer between nn.Embeddings, with the weights of one of ours."""

    def __init__(self, ours: Transformer):
        super().__init__()
        c, dtype = ours.config, ours.source_embedding.weight.dtype
        self.c = c
        self.source = self._embedding(ours.source_embedding.weight)
        self.target = (
            self.source if c.target_vocab_size is None else self._embedding(ours.target_embedding.weight)
        )
        if c.position == "learned":
            self.source_position = nn.Parameter(ours.source_position.weight.detach().clone())
            self.target_position = nn.Parameter(ours.target_position.weight.detach().clone())
        else:
            angles = [
                [p / 10000 ** (2 * (i // 2) / c.d_model) for i in range(c.d_model)]
                for p in range(c.max_length)
            ]
            table = [
                [(math.cos if i % 2 else math.sin)(angle) for i, angle in enumerate(row)] for row in angles
            ]
            self.source_position = self.target_position = torch.tensor(table, dtype=dtype) * (
                c.position != "none"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch tells that it will not use nested tensors
            self.transformer = nn.Transformer(
                c.d_model,
                c.num_heads,
                c.num_encoder_layers,
                c.num_decoder_layers,
                c.d_ff,
                0.0,
                c.activation,
                norm_first=c.norm_first,
                batch_first=True,
                dtype=dtype,
            )
        for mine, theirs in (
            (ours.encoder, self.transformer.encoder),
            (ours.decoder, self.transformer.decoder),
        ):
            theirs.layers = nn.ModuleList(layer_twin(layer, c.activation) for layer in mine.layers)
            if c.has_final_norm:
                theirs.norm.load_state_dict({"weight": mine.norm.gain, "bias": mine.norm.bias})
            else:
                theirs.norm = nn.Identity()
        self.output = None if ours.output is None else nn.Parameter(ours.output.weight.detach().clone())
        self.train(ours.training)

    def _embedding(self, weight):
        return nn.Embedding.from_pretrained(weight.detach().clone(), freeze=False, padding_idx=self.c.pad_id)

    def forward(self, source, target):
        padding, (n, m) = source == self.c.pad_id, (source.shape[1], target.shape[1])
        x = self.source(source) * math.sqrt(self.c.d_model) + self.source_position[:n]
        y = self.target(target) * math.sqrt(self.c.d_model) + self.target_position[:m]
        hidden = self.transformer(
            x,
            y,
            tgt_mask=torch.ones(m, m).triu(1).bool(),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return F.linear(hidden, self.target.weight if self.output is None else self.output)


def model(dtype=torch.float32, **changes) -> Transformer:
    return randomised(Transformer(config(**changes))).to(dtype)


def ids(batch, n, vocab_size=23, pad_id=0, padded=True):
    tokens = torch.randint(vocab_size - 1, (batch, n))
    tokens += tokens >= pad_id  # never the padding token
    return tokens.masked_fill(~keep_mask(batch, n), pad_id) if padded else tokens


VARIANTS = [
    {},
    {"norm_first": True, "activation": "gelu"},
    {"final_norm": True, "position": "learned"},
    {"norm_first": True, "final_norm": False, "position": "none"},
    {"target_vocab_size": 19, "pad_id": 3},
    {"tie_output": False, "norm_first": True, "position": "learned", "target_vocab_size": 31},
]


@pytest.mark.verifies("companion.models.transformer.Transformer", against="torch.nn.Transformer")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("batch", "n", "m"), [(1, 1, 1), (3, 7, 5), (3, 4, 9)])
def test_transformer(agree, dtype, variant, batch, n, m):
    mine = model(dtype, **variant)
    theirs, c = Judge(mine), mine.config
    source = ids(batch, n, pad_id=c.pad_id)
    target = ids(batch, m, c.target_size, c.pad_id)
    outputs = mine(source, target), theirs(source, target)
    agree(*outputs, tolerance=20 * TOLERANCE[dtype], quantity=f"logits in training, {dtype}")
    labels = torch.randint(c.target_size, (batch, m))
    for output in outputs:
        F.cross_entropy(output.flatten(0, 1), labels.flatten()).backward()
    gradients = {"source": mine.source_embedding.weight.grad, "target": mine.target_embedding.weight.grad}
    judged = {"source": theirs.source.weight.grad, "target": theirs.target.weight.grad}
    if mine.output is not None:
        gradients["output"], judged["output"] = mine.output.weight.grad, theirs.output.grad
    if c.position == "learned":
        for side in ("source_position", "target_position"):
            gradients[side], judged[side] = getattr(mine, side).weight.grad, getattr(theirs, side).grad
    for stack in ("encoder", "decoder"):
        a, b = getattr(mine, stack), getattr(theirs.transformer, stack)
        for i, pair in enumerate(zip(a.layers, b.layers, strict=True)):
            gradients[f"{stack}{i}"], judged[f"{stack}{i}"] = map(layer_gradients, pair)
        if c.has_final_norm:
            gradients[stack] = {"gain": a.norm.gain.grad, "bias": a.norm.bias.grad}
            judged[stack] = {"gain": b.norm.weight.grad, "bias": b.norm.bias.grad}
    agree(gradients, judged, tolerance=20 * TOLERANCE[dtype], quantity=f"gradients of every weight, {dtype}")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        agree(
            mine.eval()(source, target),
            theirs.eval()(source, target),
            tolerance=20 * TOLERANCE[dtype],
            quantity=f"logits in evaluation, {dtype}",
        )


@pytest.mark.verifies("companion.models.transformer.Transformer", against="torch.nn.Transformer")
def test_the_base_configuration_has_65_million_parameters(agree):
    with torch.device("meta"):  # sizes without memory
        mine = Transformer(TransformerConfig(vocab_size=37000))
        judge = nn.Transformer(512, 8, 6, 6, 2048, batch_first=True)
    count = sum(p.numel() for p in mine.parameters())
    norms = sum(p.numel() for stack in (judge.encoder, judge.decoder) for p in stack.norm.parameters())
    expected = 37000 * 512 + sum(p.numel() for p in judge.parameters()) - norms
    agree([count], [expected], tolerance=0, quantity="number of parameters, base configuration")
    assert 62e6 < count < 66e6


def test_sharing_and_tying_decide_how_many_vocabulary_matrices_there_are():
    def count(**changes):
        return sum(p.numel() for p in Transformer(config(**changes)).parameters())

    shared = count()
    assert count(target_vocab_size=23) - shared == 23 * 12
    assert count(tie_output=False) - shared == 23 * 12
    assert count(target_vocab_size=19, tie_output=False) - shared == 2 * 19 * 12
    assert count(norm_first=True) - shared == count(final_norm=True) - shared == 2 * 2 * 12
    assert count(norm_first=True, final_norm=False) == shared


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("changed", [1, 4, 6])
def test_no_logit_depends_on_a_later_token_to_the_last_bit(variant, changed):
    mine = model(**variant)
    c = mine.config
    source, target = ids(3, 5, pad_id=c.pad_id), ids(3, 7, c.target_size, c.pad_id, padded=False)
    other = target.clone()
    other[:, changed] = (target[:, changed] + 1 + (target[:, changed] + 1 == c.pad_id)) % c.target_size
    before, after = mine(source, target), mine(source, other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_padding_and_the_other_sentences_of_a_batch_change_nothing(dtype, variant):
    mine = model(dtype, **variant).eval()
    c = mine.config
    source, target = ids(3, 7, pad_id=c.pad_id), ids(3, 6, c.target_size, c.pad_id)
    together = mine(source, target)
    for row in range(3):
        alone = mine(source[row : row + 1, : 7 - row], target[row : row + 1, : 6 - row])
        torch.testing.assert_close(
            together[row : row + 1, : 6 - row], alone, rtol=0, atol=20 * TOLERANCE[dtype]
        )


def test_without_positions_the_encoder_follows_a_permutation():
    mine, source, p = model(torch.float64, position="none"), ids(3, 7, padded=False), torch.randperm(7)
    torch.testing.assert_close(mine.encode(source[:, p]), mine.encode(source)[:, p], rtol=0, atol=1e-13)
    target = ids(3, 4)
    torch.testing.assert_close(mine(source[:, p], target), mine(source, target), rtol=0, atol=1e-13)
    ordered = model(torch.float64)
    assert not torch.allclose(ordered(source[:, p], target), ordered(source, target), atol=1e-3)


@pytest.mark.verifies("companion.models.transformer.Transformer", against="torch.nn.Transformer")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 1, 3, 1)])
def test_cached_decoding(agree, dtype, variant, chunks):
    mine = model(dtype, **variant).eval()
    c = mine.config
    source, target = ids(3, 7, pad_id=c.pad_id), ids(3, 9, c.target_size, c.pad_id)
    cache, parts, start = mine.new_cache(), [], 0
    with torch.no_grad():
        memory, mask = mine.encode(source), mine.source_mask(source)
        for length in chunks:
            parts.append(mine.decode(target[:, start : start + length], memory, mask, cache))
            start += length
            assert cache.length == start
        judged = Judge(mine).train()(source, target)
    agree(
        torch.cat(parts, 1), judged, tolerance=20 * TOLERANCE[dtype], quantity=f"logits with a cache, {dtype}"
    )


def test_reordering_the_cache_moves_the_sentences():
    mine, source, target = model(torch.float64).eval(), ids(3, 7), ids(3, 6)
    rows = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        memory, mask, cache = mine.encode(source), mine.source_mask(source), mine.new_cache()
        mine.decode(target[:, :5], memory, mask, cache)
        cache.reorder(rows)
        moved = mine.decode(target[rows, 5:], memory[rows], mask[rows], cache)
        torch.testing.assert_close(moved, mine(source, target)[rows, 5:], rtol=0, atol=1e-13)
        same = torch.tensor([1, 1, 1])  # three hypotheses of one source: the memory's rows may stay
        memory, mask, cache = memory[same], mask[same], mine.new_cache()
        mine.decode(target[:, :5], memory, mask, cache)
        cache.reorder(rows[:3], memory=False)
        moved = mine.decode(target[rows[:3], 5:], memory, mask, cache)
        torch.testing.assert_close(moved, mine(source[same], target[rows[:3]])[:, 5:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_source_of_padding_alone_gives_finite_logits_and_gradients(norm_first):
    mine, source, target = model(norm_first=norm_first), ids(3, 5), ids(3, 4)
    source[1] = 0
    together = mine(source, target)
    together.sum().backward()
    assert together.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mine.parameters())
    alone = mine(source[1:2, :2], target[1:2])  # what stands in the masked memory does not matter
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=2e-5)


def test_dropout_acts_where_the_paper_has_it_and_in_training_only():
    mine, places = model(dropout=0.4), []
    for module in mine.modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.register_forward_hook(lambda _, x, y: places.append((y == 0).float().mean().item()))
    source, target = ids(3, 7), ids(3, 6)
    noisy = mine(source, target)
    assert len(places) == 2 + 2 * 2 + 3 * 3  # the two sums with positions, and every sub-layer
    assert all(0.25 < share < 0.55 for share in places)
    assert not any(m.dropout for m in mine.modules() if isinstance(m, MultiHeadAttention))
    clean = mine.eval()(source, target)
    assert torch.equal(clean, mine(source, target)) and not torch.allclose(clean, noisy)


@pytest.mark.parametrize("norm_first", [False, True])
def test_bfloat16_autocast_trains_float32_weights(norm_first):
    mine, source, target = model(norm_first=norm_first, final_norm=True), ids(3, 7), ids(3, 6)
    exact = mine(source, target)
    with torch.autocast("cpu", torch.bfloat16):
        logits = mine(source, target)
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert ((logits - exact).norm() / exact.norm()).item() < 0.02
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mine.parameters())


def test_forward_traces_as_one_graph_of_any_length():
    mine = model(norm_first=True, num_encoder_layers=1, num_decoder_layers=1)
    compiled = torch.compile(mine, backend="eager", fullgraph=True)
    for n, m in ((5, 4), (7, 9), (3, 6)):
        source, target = ids(3, n), ids(3, m)
        torch.testing.assert_close(compiled(source, target), mine(source, target))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"vocab_size": "23"}, TypeError, "vocab_size must be an int, got str"),
        ({"target_vocab_size": 0}, ValueError, "target_vocab_size must be at least 1, got 0"),
        ({"d_model": 13}, ValueError, "d_model must be divisible by num_heads = 3, got 13"),
        ({"d_model": 15}, ValueError, "d_model must be even with sinusoidal positions, got 15"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"num_encoder_layers": 0}, ValueError, "num_encoder_layers must be at least 1, got 0"),
        ({"num_decoder_layers": 2.0}, TypeError, "num_decoder_layers must be an int, got float"),
        ({"d_ff": -1}, ValueError, "d_ff must be at least 1, got -1"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"inner_dropout": -0.1}, ValueError, r"inner_dropout must lie in \[0, 1\), got -0.1"),
        ({"activation": "swish"}, ValueError, "activation must be one of 'relu', .*'silu', got 'swish'"),
        ({"position": "rotary"}, ValueError, "position must be one of .* got 'rotary'"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"pad_id": 23}, ValueError, "pad_id must lie in 0 … 22, got 23"),
        ({"pad_id": 20, "target_vocab_size": 19}, ValueError, "pad_id must lie in 0 … 18, got 20"),
        ({"pad_id": None}, TypeError, "pad_id must be an int, got NoneType"),
    ],
)
def test_a_bad_configuration_is_named(changes, error, match):
    with pytest.raises(error, match=match):
        config(**changes)


@pytest.mark.parametrize("layer", [EncoderLayer, DecoderLayer])
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((12, 5, 8), ValueError, "d_model must be divisible by num_heads = 5, got 12"),
        ((12, 3, 0), ValueError, "d_ff must be at least 1, got 0"),
        ((12, 3, 8, 1.0), ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ((12, 3, 8, 0.1, "swish"), ValueError, "activation must be one of"),
    ],
)
def test_bad_sizes_of_a_layer_are_named(layer, arguments, error, match):
    with pytest.raises(error, match=match):
        layer(*arguments)


X, MEMORY = torch.ones(2, 3, 12), torch.ones(2, 5, 12)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X[0],), ValueError, "x must have 3 dimensions"),
        ((X.long(),), TypeError, "x must be a floating-point tensor"),
        ((X[..., :8],), ValueError, r"x must have shape \(..., 12\), got \(2, 3, 8\)"),
        ((X, torch.ones(3, 4).bool()), ValueError, r"mask must broadcast to \(2, 3, 3, 3\), got \(3, 4\)"),
    ],
)
def test_bad_input_of_an_encoder_layer_is_named(arguments, error, match):
    with pytest.raises(error, match=match):
        EncoderLayer(12, 3, 8)(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X[..., :8], MEMORY), ValueError, r"x must have shape \(..., 12\), got \(2, 3, 8\)"),
        ((X, MEMORY[..., :8]), ValueError, r"memory must have shape \(..., 12\), got \(2, 5, 8\)"),
        ((X, MEMORY[:1]), ValueError, r"memory must have x's batch size 2, got \(1, 5, 12\)"),
        ((X, None), TypeError, "memory must be a torch.Tensor, got NoneType"),
        (
            (X, MEMORY, torch.ones(4, 3).bool()),
            ValueError,
            r"mask must broadcast to \(2, 3, 3, 3\), got \(4, 3\)",
        ),
        (
            (X, MEMORY, None, torch.ones(3, 3).bool()),
            ValueError,
            r"memory_mask must broadcast to \(2, 3, 3, 5\)",
        ),
        ((X, MEMORY, None, torch.ones(3, 5)), TypeError, "memory_mask must be a bool tensor"),
    ],
)
def test_bad_input_of_a_decoder_layer_is_named_and_leaves_the_cache_alone(arguments, error, match):
    cache = LayerCache(KVCache(), KVCache())
    with pytest.raises(error, match=match):
        DecoderLayer(12, 3, 8)(*arguments, cache=cache)
    assert cache.self_attention.length == cache.cross_attention.length == 0


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("source", "target", "error", "match"),
    [
        (IDS.tolist(), IDS, TypeError, "source_ids must be a torch.Tensor, got list"),
        (IDS.float(), IDS, TypeError, "source_ids must be an integer tensor, got torch.float32"),
        (IDS[0], IDS, ValueError, r"source_ids must have 2 dimensions, got shape \(3,\)"),
        (IDS[:0], IDS, ValueError, r"source_ids must not be empty, got shape \(0, 3\)"),
        (IDS * 23, IDS, ValueError, "source_ids must lie in 0 … 22, got values from 23 to 23"),
        (IDS, IDS * -1, ValueError, "target_ids must lie in 0 … 18, got values from -1 to -1"),
        (IDS, IDS * 19, ValueError, "target_ids must lie in 0 … 18, got values from 19 to 19"),
        (IDS, IDS[:1], ValueError, r"target_ids must have the source's batch size 2, got \(1, 3\)"),
        (IDS, IDS.bool(), TypeError, "target_ids must be an integer tensor, got torch.bool"),
        (IDS.repeat(1, 6), IDS, ValueError, "source_ids must have at most max_length = 16 tokens, got 18"),
        (IDS, IDS.repeat(1, 6), ValueError, "target_ids must have at most max_length = 16 tokens, got 18"),
    ],
)
def test_bad_ids_are_named_before_the_encoder_runs(source, target, error, match):
    mine, calls = model(target_vocab_size=19, position="learned"), []
    mine.encoder.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=match):
        mine(source, target)
    assert not calls


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda m, memory, c: m.decode(IDS * 23, memory, None, c),
            ValueError,
            "target_ids must lie in 0 … 22",
        ),
        (
            lambda m, memory, c: m.decode(IDS[:1], memory, None, c),
            ValueError,
            "target_ids must have the source's batch size 2",
        ),
        (
            lambda m, memory, c: m.decode(IDS, memory[..., :4], None, c),
            ValueError,
            r"memory must have shape \(..., 12\)",
        ),
        (
            lambda m, memory, c: m.decode(IDS, memory[:, :2], None, c),
            ValueError,
            "memory must have the 5 vectors .* got 2",
        ),
        (
            lambda m, memory, c: m.decode(IDS, memory, torch.ones(2, 1, 1, 4).bool(), c),
            ValueError,
            "memory_mask must broadcast",
        ),
        (
            lambda m, memory, c: m.decode(IDS, memory, torch.ones(2, 1, 1, 5), c),
            TypeError,
            "memory_mask must be a bool tensor",
        ),
        (
            lambda m, memory, c: m.decode(IDS.repeat(1, 5), memory, None, c),
            ValueError,
            "target_ids must have at most max_length = 16 tokens, got 18",
        ),
        (lambda m, memory, c: c.reorder(torch.tensor([2])), ValueError, "indices must lie in 0 … 1"),
    ],
)
def test_a_refused_step_leaves_the_cache_as_it_was(call, error, match):
    mine = model(position="learned").eval()
    with torch.no_grad():
        memory, cache = mine.encode(torch.ones(2, 5, dtype=torch.long)), mine.new_cache()
        mine.decode(IDS, memory, None, cache)
        with pytest.raises(error, match=match):
            call(mine, memory, cache)
        assert cache.length == 3
        after = mine.decode(IDS[:, :1], memory, None, cache)
        torch.testing.assert_close(
            after[:, 0], mine.decode(torch.ones(2, 4).long(), memory)[:, -1], rtol=0, atol=2e-5
        )
