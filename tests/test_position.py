"""Positions against the formulas in plain Python floats, the geometry they promise, and transformers."""

import copy
import math

import pytest
import torch
from torch import nn

from companion.position import (
    TURNS,
    ALiBi,
    LearnedPositionalEmbedding,
    RopeScaling,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
    T5RelativeBias,
    alibi_slopes,
    relative_position_bucket,
    rotary_permutation,
    sinusoidal_encoding,
)

LAYOUTS = ["half", "interleaved"]
SCALINGS = [
    None,
    RopeScaling("linear", 4.0, 64),
    RopeScaling("ntk", 4.0, 64),
    RopeScaling("dynamic", 2.0, 64),
    RopeScaling("yarn", 8.0, 64),
]
BOTH = pytest.mark.parametrize("layout", LAYOUTS)
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])


@pytest.fixture
def transformers(monkeypatch):
    """The library, offline and quiet, imported when a test asks for it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    return pytest.importorskip("transformers")


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
        (lambda: RotaryEmbedding(7), ValueError, "d_k must be even, got 7"),
        (lambda: RotaryEmbedding(8.0), TypeError, "d_k must be an int, got float"),
        (lambda: RotaryEmbedding(8, base=1.0), ValueError, "base must be above 1 and finite, got 1.0"),
        (lambda: RotaryEmbedding(8, base=math.nan), ValueError, "base must be above 1 and finite, got nan"),
        (
            lambda: RotaryEmbedding(8, layout="split"),
            ValueError,
            "layout must be one of 'half', 'interleaved'",
        ),
        (
            lambda: RotaryEmbedding(8, scaling="yarn"),
            TypeError,
            "scaling must be a RopeScaling or None, got str",
        ),
        (
            lambda: RotaryEmbedding(2, scaling=SCALINGS[2]),
            ValueError,
            "d_k must be at least 4 with scaling 'ntk', got 2",
        ),
        (lambda: RopeScaling("longer", 2.0, 64), ValueError, "kind must be one of 'linear', .* got 'longer'"),
        (lambda: RopeScaling("yarn", 0.5, 64), ValueError, "factor must be at least 1 and finite, got 0.5"),
        (lambda: RopeScaling("yarn", "2", 64), TypeError, "factor must be a number, got str"),
        (lambda: RopeScaling("yarn", 2.0, 0), ValueError, "original_length must be at least 1, got 0"),
        (
            lambda: RopeScaling("linear", 2.0, 8, (1.0, 4.0)),
            ValueError,
            "turns must be None where kind is 'linear'",
        ),
        (lambda: RopeScaling("yarn", 2.0, 8, [1, 4]), TypeError, "turns must be a pair of numbers, got"),
        (lambda: RopeScaling("yarn", 2.0, 8, (1, "4")), TypeError, "turns must be a number, got str"),
        (
            lambda: RopeScaling("llama3", 2.0, 8, (4.0, 4.0)),
            ValueError,
            "turns must be positive, finite and rising",
        ),
        (lambda: SCALINGS[3].frequencies(8, length=0), ValueError, "length must be at least 1, got 0"),
        (lambda: rotary_permutation(3), ValueError, "d_k must be even, got 3"),
        (lambda: alibi_slopes(0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: ALiBi(True), TypeError, "num_heads must be an int, got bool"),
        (lambda: ALiBi(2)(0, 3), ValueError, "num_queries must be at least 1, got 0"),
        (lambda: ALiBi(2)(3, 3.0), TypeError, "num_keys must be an int, got float"),
        (lambda: T5RelativeBias(0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: T5RelativeBias(2)(3, 0), ValueError, "num_keys must be at least 1, got 0"),
        (lambda: T5RelativeBias(2, num_buckets=1), ValueError, "num_buckets must be at least 2, got 1"),
        (
            lambda: T5RelativeBias(2, num_buckets=7, bidirectional=True),
            ValueError,
            "num_buckets must be an even number from 4 on where bidirectional, got 7",
        ),
        (
            lambda: T5RelativeBias(2, max_distance=16),
            ValueError,
            "max_distance must exceed num_buckets // 2, got",
        ),
        (lambda: T5RelativeBias(2, bidirectional=1), TypeError, "bidirectional must be a bool, got int"),
        (
            lambda: relative_position_bucket(torch.ones(3)),
            TypeError,
            "relative must be an integer tensor, got torch.float32",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    "module",
    [
        SinusoidalPositionalEncoding(4),
        LearnedPositionalEmbedding(9, 4),
        RotaryEmbedding(4),
        RotaryEmbedding(4, layout="interleaved", scaling=RopeScaling("dynamic", 2.0, 1)),
    ],
)
@pytest.mark.parametrize(
    ("x", "offset", "error", "match"),
    [
        ([[1.0] * 4], 0, TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(2, 4).long(), 0, TypeError, "x must be a floating-point tensor, got torch.int64"),
        (torch.ones(2, 5), 0, ValueError, r"x must have shape \(..., 4\), got \(2, 5\)"),
        (torch.ones(4), 0, ValueError, r"x must have shape \(..., n, d_(model|k)\), got \(4,\)"),
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


# --- Rotary positions ---------------------------------------------------------------------------------------


def turned_by_hand(x: torch.Tensor, layout: str, offset: int = 0, base: float = 10000.0) -> torch.Tensor:
    """R_m x_m, each rotation matrix written out from Python's own sines."""
    d_k = x.shape[-1]
    pairs = [(i, i + d_k // 2) if layout == "half" else (2 * i, 2 * i + 1) for i in range(d_k // 2)]
    rotations = torch.zeros(x.shape[-2], d_k, d_k, dtype=torch.float64)
    for row in range(x.shape[-2]):
        for i, (a, b) in enumerate(pairs):
            angle = (offset + row) / base ** (2 * i / d_k)
            rotations[row, a, a] = rotations[row, b, b] = math.cos(angle)
            rotations[row, b, a], rotations[row, a, b] = math.sin(angle), -math.sin(angle)
    return (rotations @ x.double().unsqueeze(-1)).squeeze(-1)


@pytest.mark.verifies("companion.position.RotaryEmbedding", against="closed form")
@BOTH
@DTYPES
@pytest.mark.parametrize(("shape", "offset"), [((5, 6), 0), ((1, 3, 1, 10), 999), ((3, 2, 7, 2), 13)])
def test_each_pair_is_turned_by_its_angle(agree, layout, dtype, tolerance, shape, offset):
    x = torch.randn(shape, dtype=dtype)
    module = RotaryEmbedding(shape[-1], base=500.0, layout=layout).to(dtype)
    out = module(x, offset)
    assert out.dtype == dtype
    expected = turned_by_hand(x, layout, offset, 500.0)
    agree(out, expected, tolerance=tolerance, quantity=f"rotated vectors, {dtype}")


@pytest.mark.verifies("companion.position.RotaryEmbedding", against="closed form")
@BOTH
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scores_depend_on_the_distance_alone(agree, layout, scaling):
    module, distance, length = RotaryEmbedding(10, layout=layout, scaling=scaling), 7, 300
    query, key = torch.randn(2, 10, dtype=torch.float64)
    queries = module(query.expand(length, 10))
    keys = module(key.expand(length, 10))
    scores = (queries[distance:] * keys[:-distance]).sum(-1)
    agree(scores, scores[:1].expand_as(scores), tolerance=2e-12, quantity="⟨R_m q, R_n k⟩, m − n fixed")
    assert (queries[0] * keys[: 2 * distance]).sum(-1).std() > 1e-3


@pytest.mark.verifies(
    "companion.position.RotaryEmbedding",
    against="transformers.models.llama.modeling_llama.apply_rotary_pos_emb",
)
@DTYPES
@pytest.mark.parametrize(("batch", "n", "offset"), [(1, 1, 40), (3, 5, 0), (3, 7, 290)])
def test_half_split_is_the_rotation_of_llama(agree, transformers, dtype, tolerance, batch, n, offset):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = [[m / 10000.0 ** (2 * i / 6) for i in (0, 1, 2, 0, 1, 2)] for m in range(offset, offset + n)]
    angles = torch.tensor(angles, dtype=torch.float64).expand(batch, n, 6)
    inputs = [
        tuple(torch.randn(batch, n, heads, 6, dtype=dtype).transpose(1, 2) for heads in (4, 2))
    ] * 2  # strided, as a layer's heads are
    inputs = [tuple(x.clone().requires_grad_() for x in pair) for pair in inputs]
    module = RotaryEmbedding(6)
    mine = tuple(module(x, offset) for x in inputs[0])
    theirs = apply_rotary_pos_emb(*inputs[1], angles.cos().to(dtype), angles.sin().to(dtype))
    for out, expected, x, y in zip(mine, theirs, *inputs, strict=True):
        agree(out, expected, tolerance=tolerance, quantity=f"queries and keys, {dtype}")
        upstream = torch.randn_like(out)
        out.backward(upstream)
        expected.backward(upstream)
        agree(x.grad, y.grad, tolerance=tolerance, quantity=f"gradient, {dtype}")


@pytest.mark.verifies(
    "companion.position.RotaryEmbedding",
    against="transformers.models.gptj.modeling_gptj.apply_rotary_pos_emb",
)
@DTYPES
def test_interleaved_is_the_rotation_of_gpt_j(agree, transformers, dtype, tolerance):
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    angles = [[m / 10000.0 ** (2 * i / 8) for i in range(4)] for m in range(11, 18)]
    angles = torch.tensor(angles, dtype=torch.float64).to(dtype).expand(3, 7, 4)
    mine = torch.randn(3, 7, 2, 8, dtype=dtype).requires_grad_()  # GPT-J turns before it transposes
    theirs = mine.detach().clone().requires_grad_()
    out = RotaryEmbedding(8, layout="interleaved")(mine.transpose(1, 2), 11).transpose(1, 2)
    expected = apply_rotary_pos_emb(theirs, angles.sin(), angles.cos())
    agree(out, expected, tolerance=tolerance, quantity=f"rotated vectors, {dtype}")
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    agree(mine.grad, theirs.grad, tolerance=tolerance, quantity=f"gradient, {dtype}")


@pytest.mark.verifies("companion.position.rotary_permutation", against="closed form")
@pytest.mark.parametrize("d_k", [2, 6, 10])
def test_the_permutation_leads_from_one_layout_to_the_other(agree, d_k):
    p, x = rotary_permutation(d_k), torch.randn(3, 9, d_k, dtype=torch.float64)
    half, interleaved = (RotaryEmbedding(d_k, layout=layout) for layout in LAYOUTS)
    agree(
        half(x[..., p], 4)[..., p.argsort()],
        turned_by_hand(x, "interleaved", 4),
        tolerance=1e-13,
        quantity="half-split RoPE of the permuted vector, permuted back",
    )
    torch.testing.assert_close(interleaved(x)[..., p], half(x[..., p]), rtol=0, atol=1e-14)


def same(mine: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a last bit: a complex product is rounded differently at the end of a vector register."""
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
@BOTH
def test_an_offset_gives_the_rows_of_one_pass(layout, scaling):
    x = torch.randn(2, 3, 600, 8)
    module = RotaryEmbedding(8, layout=layout, scaling=scaling)
    whole = module(x)
    if scaling is None or scaling.kind != "dynamic":
        parts = [module(x[..., a:b, :], a) for a, b in ((0, 1), (1, 250), (250, 599), (599, 600))]
        same(torch.cat(parts, -2), whole)
    else:  # the last call has the length of the whole, those before it are shorter
        same(module(x[..., 599:, :], 599), whole[..., 599:, :])
        same(module(x[..., :64, :]), RotaryEmbedding(8, layout=layout)(x[..., :64, :]))
        assert not torch.allclose(module(x[..., 1:65, :], 1), whole[..., 1:65, :], atol=1e-2)
    factor = 0.1 * math.log(8.0) + 1 if scaling and scaling.kind == "yarn" else 1.0
    torch.testing.assert_close(whole.norm(dim=-1), factor * x.norm(dim=-1))


@pytest.mark.verifies(
    "companion.position.RopeScaling.frequencies", against="transformers.modeling_rope_utils"
)
@pytest.mark.parametrize(("d_k", "base", "original"), [(4, 10000.0, 40), (10, 500.0, 64), (64, 5e5, 8192)])
@pytest.mark.parametrize("factor", [1.0, 2.5, 16.0])
def test_the_scaled_frequencies(agree, transformers, d_k, base, original, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def judge(
        kind: str, factor: float, length: int | None = None, turns: tuple[float, float] | None = None
    ) -> tuple[torch.Tensor, float]:
        parameters = {"rope_type": kind, "rope_theta": base, "factor": factor}
        if kind in TURNS:
            parameters["original_max_position_embeddings"] = original
            few, many = turns or TURNS[kind]
            parameters |= {"beta_slow": few, "beta_fast": many} if kind == "yarn" else {}
            parameters |= {"low_freq_factor": few, "high_freq_factor": many} if kind == "llama3" else {}
        config = LlamaConfig(
            hidden_size=2 * d_k,
            num_attention_heads=2,
            head_dim=d_k,
            max_position_embeddings=original,
            rope_parameters=parameters,
        )
        return ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)

    cases = [("linear", None), *((kind, turns) for kind in TURNS for turns in (None, (2.0, 9.0)))]
    for kind, turns in cases:
        scaling = RopeScaling(kind, factor, original, turns)
        frequencies, attention_factor = judge(kind, factor, turns=turns)
        agree(scaling.frequencies(d_k, base), frequencies, tolerance=5e-7, quantity=f"{kind}: frequencies")
        agree(
            scaling.attention_factor, attention_factor, tolerance=1e-15, quantity=f"{kind}: attention factor"
        )
    for length in (1, original, original + 1, 9 * original):
        scaling = RopeScaling("dynamic", factor, original)
        agree(
            scaling.frequencies(d_k, base, length),
            judge("dynamic", factor, length)[0],
            tolerance=5e-7,
            quantity="dynamic: frequencies, lengths to 9 times the original",
        )
    stretched = judge("dynamic", 1.0, int(factor * original))[0]  # dynamic with factor 1 stretches by n / L
    agree(
        RopeScaling("ntk", factor, original).frequencies(d_k, base),
        stretched,
        tolerance=5e-7,
        quantity="ntk: frequencies",
    )


@pytest.mark.verifies(
    "companion.position.RotaryEmbedding",
    against="transformers.models.llama.modeling_llama.LlamaRotaryEmbedding",
)
@pytest.mark.parametrize("scaling", [SCALINGS[i] for i in (0, 1, 3, 4)])  # transformers has no static NTK
def test_scaled_rotations_are_those_of_llama(agree, transformers, scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    parameters = {"rope_type": "default", "rope_theta": 500.0}
    if scaling is not None:
        parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "yarn":
        parameters["original_max_position_embeddings"] = scaling.original_length
    config = LlamaConfig(
        hidden_size=40,
        num_attention_heads=4,
        head_dim=10,
        max_position_embeddings=64,
        rope_parameters=parameters,
    )
    judge, module = LlamaRotaryEmbedding(config), RotaryEmbedding(10, base=500.0, scaling=scaling)
    for offset, n in ((0, 9), (0, 64), (0, 65), (65, 1), (66, 1), (60, 90), (0, 30)):
        x, y = torch.randn(3, 4, n, 10), torch.randn(3, 2, n, 10)
        cos, sin = judge(x, torch.arange(offset, offset + n)[None])
        theirs = apply_rotary_pos_emb(x, y, cos, sin)
        name = "plain" if scaling is None else scaling.kind
        for mine, expected in zip((module(x, offset), module(y, offset)), theirs, strict=True):
            agree(mine, expected, tolerance=5e-5, quantity=f"{name}: rotated vectors, positions to 150")


@pytest.mark.verifies("companion.position.RopeScaling.frequencies", against="closed form")
def test_what_each_scaling_promises(agree):
    d_k, base, factor, length = 64, 10000.0, 8.0, 2048
    plain = torch.tensor([base ** (-2 * i / d_k) for i in range(32)], dtype=torch.float64)
    ntk, yarn = (RopeScaling(kind, factor, length).frequencies(d_k, base) for kind in ("ntk", "yarn"))
    ends = torch.stack((ntk[0], ntk[-1] * factor))
    agree(ends, plain[[0, -1]], tolerance=1e-15, quantity="ntk: fastest kept, slowest divided by the factor")
    slowed = plain / yarn  # 1 where kept, `factor` where interpolated
    turns = length * plain / (2 * math.pi)
    agree(
        slowed[turns > 40], torch.ones(int((turns > 40).sum())), tolerance=1e-12, quantity="yarn: fast pairs"
    )
    slow = slowed[turns < 0.8]
    agree(slow, torch.full_like(slow, factor), tolerance=1e-12, quantity="yarn: slow pairs")
    assert len(slow) > 3 and (slowed.diff() >= -1e-12).all() and ((slowed > 1.1) & (slowed < 7.9)).any()
    for scaling in SCALINGS[1:]:
        one = RopeScaling(scaling.kind, 1.0, 4096)  # a factor of 1 changes nothing
        torch.testing.assert_close(one.frequencies(d_k, base, 64), plain, rtol=1e-14, atol=0)


@BOTH
def test_rotary_half_precision_is_rounded_once(layout):
    x = torch.randn(2, 300, 8).bfloat16()
    module = RotaryEmbedding(8, layout=layout)
    assert torch.equal(module(x, 5), module(x.float(), 5).bfloat16())


@BOTH
def test_the_rotary_table_is_not_saved_and_survives_copies_and_inference_mode(layout):
    module = RotaryEmbedding(4, layout=layout)
    assert not list(module.parameters()) and not module.state_dict()
    with torch.inference_mode():
        before = module(torch.ones(300, 4))
    x = torch.ones(300, 4, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    same(copy.deepcopy(module)(x), before)
    same(module(x.double()).float(), module.double()(x.double()).float())
    same(module(torch.ones(300, 4)), before)


@pytest.mark.parametrize("scaling", [None, RopeScaling("dynamic", 2.0, 4)])
@BOTH
def test_rotary_compiles_into_one_graph(layout, scaling):
    torch.compiler.reset()  # the limit on recompilations is one for all modules of a class
    module = RotaryEmbedding(6, layout=layout, scaling=scaling)
    compiled = torch.compile(copy.deepcopy(module), backend="eager", fullgraph=True)
    for n, offset in ((3, 0), (5, 2), (1, 400)):
        x = torch.randn(2, n, 6)
        same(compiled(x, offset), module(x, offset))


def test_interleaved_rotary_takes_any_strides():
    module, x = RotaryEmbedding(4, layout="interleaved"), torch.randn(3, 5, 4)
    expected = module(x)
    padded = torch.randn(3, 5, 7)
    padded[..., 1:5] = x  # an odd storage offset and odd strides
    same(module(padded[..., 1:5]), expected)
    same(module(x.permute(2, 0, 1).contiguous().permute(1, 2, 0)), expected)
    same(module(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    one = torch.cat((torch.zeros(1), x.flatten()))[1:].view(3, 5, 4)
    same(module(one), expected)


# --- Relative positions -------------------------------------------------------------------------------------


def relative_differences(bias: torch.Tensor) -> torch.Tensor:
    """A bias up to what a softmax over keys ignores: a constant in each row."""
    return bias - bias[..., :1]


@pytest.mark.verifies("companion.position.alibi_slopes", against="closed form")
@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (3, [4, 8, 2]),
        (6, [2, 4, 6, 8, 1, 3]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_slopes_are_those_of_the_paper(agree, num_heads, exponents):
    mine = alibi_slopes(num_heads, dtype=torch.float64)
    agree(mine, torch.tensor([2.0**-e for e in exponents]).double(), tolerance=3e-8, quantity="slopes")


@pytest.mark.verifies("companion.position.alibi_slopes", against="transformers.models.bloom.modeling_bloom")
@pytest.mark.verifies("companion.position.ALiBi", against="transformers.models.bloom.modeling_bloom")
@pytest.mark.parametrize("num_heads", [1, 3, 8, 12, 16, 25])
def test_alibi_is_blooms_up_to_a_constant_in_each_row(agree, transformers, num_heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    n = 37
    theirs = build_alibi_tensor(torch.ones(1, n), num_heads, torch.float32).expand(num_heads, n, n)
    seen = torch.ones(n, n).tril()
    mine = relative_differences(ALiBi(num_heads)(n, n))
    agree(
        mine * seen,
        relative_differences(theirs) * seen,
        tolerance=1e-5,
        quantity="bias on a query's past, relative to its first key",
    )


@pytest.mark.verifies("companion.position.alibi_slopes", against="transformers.models.mpt.modeling_mpt")
@pytest.mark.verifies("companion.position.ALiBi", against="transformers.models.mpt.modeling_mpt")
@pytest.mark.parametrize("num_heads", [1, 3, 8, 12, 16, 25])
def test_alibi_is_mpts_for_the_last_query(agree, transformers, num_heads):
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    theirs = build_mpt_alibi_tensor(num_heads, 300)  # (h, 1, n_k)
    agree(ALiBi(num_heads)(1, 300), theirs, tolerance=3e-5, quantity="bias of the last query")
    seen = torch.ones(9, 9).tril()
    mine, theirs = relative_differences(ALiBi(num_heads)(9, 9)), build_mpt_alibi_tensor(num_heads, 9)
    agree(mine * seen, relative_differences(theirs) * seen, tolerance=2e-6, quantity="bias on a query's past")


@pytest.mark.verifies("companion.position.ALiBi", against="closed form")
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (1, 300), (3, 7), (7, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.float64, 2e-14)])
def test_alibi_is_the_slope_times_the_distance(agree, num_queries, num_keys, dtype, tolerance):
    module = ALiBi(3).to(dtype)
    by_loop = torch.tensor(
        [
            [
                [-slope * abs(i + num_keys - num_queries - j) for j in range(num_keys)]
                for i in range(num_queries)
            ]
            for slope in (2**-4, 2**-8, 2**-2)
        ],
        dtype=torch.float64,
    )
    out = module(num_queries, num_keys)
    assert out.dtype == dtype and not module.state_dict()
    agree(out, by_loop, tolerance=tolerance, quantity=f"bias, {dtype}")


@pytest.mark.verifies(
    "companion.position.relative_position_bucket", against="transformers.models.t5.modeling_t5.T5Attention"
)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (4, 5), (10, 64), (64, 500)])
def test_buckets_are_those_of_t5(agree, transformers, bidirectional, num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(-2001, 2001).view(2, -1)
    options = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    mine = relative_position_bucket(relative, **options)
    theirs = T5Attention._relative_position_bucket(relative, **options)
    agree(mine, theirs, tolerance=0, quantity="buckets, distances to 2,000")
    assert mine.max() == num_buckets - 1 and mine.min() == 0


@pytest.mark.verifies(
    "companion.position.T5RelativeBias", against="transformers.models.t5.modeling_t5.T5Attention"
)
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (13, 13), (40, 40), (3, 41), (1, 300)])
def test_t5_bias_and_its_gradient(agree, transformers, decoder, dtype, num_queries, num_keys):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        num_heads=3,
        d_model=6,
        d_kv=2,
        is_decoder=decoder,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=33,
    )
    judge = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).to(dtype)
    module = T5RelativeBias(3, num_buckets=12, max_distance=33, bidirectional=not decoder).to(dtype)
    nn.init.normal_(module.weight)
    judge.relative_attention_bias.load_state_dict(module.state_dict())
    mine = module(num_queries, num_keys)
    theirs = judge.compute_bias(num_queries, num_keys, past_seen_tokens=num_keys - num_queries)[0]
    agree(mine, theirs, tolerance=0, quantity="bias")
    upstream = torch.randn_like(mine)
    mine.backward(upstream)
    theirs.backward(upstream)
    agree(
        module.weight.grad,
        judge.relative_attention_bias.weight.grad,
        tolerance=1e-4 if dtype == torch.float32 else 1e-12,
        quantity=f"gradient of the table, {dtype}",
    )


@pytest.mark.parametrize("make", [lambda: ALiBi(3), lambda: T5RelativeBias(3, bidirectional=True)])
def test_relative_biases_compile_and_serve_a_cache(make):
    torch.compiler.reset()
    module = make()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    whole = module(301, 301)
    assert torch.equal(compiled(301, 301), whole)
    assert torch.equal(module(2, 301), whole[:, -2:])
    assert torch.equal(module(7, 7), whole[:, :7, :7])
    assert module.bfloat16()(1, 4).dtype == torch.bfloat16


@BOTH
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_positions_of_a_range_are_those_of_an_offset(layout, scaling):
    rotary = RotaryEmbedding(6, layout=layout, scaling=scaling)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    for first in (0, 7, 300):
        turn = rotary.at(range(first, first + 5), x.dtype, x.device)
        assert torch.equal(turn(x, 0), rotary(x, first))
    for wrong in (range(0), range(-1, 4), range(0, 10, 2)):
        with pytest.raises(ValueError, match="positions must count up from 0 or later by 1"):
            rotary.at(wrong)
