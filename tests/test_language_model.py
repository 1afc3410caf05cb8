"""The language model against GPT-2, GPT, Bloom, Llama and T5 of equal weights, and what holds of any."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_attention import DTYPES, randomised
from torch import nn

from companion.attention import KVCache, MultiHeadAttention, record_attention
from companion.models.language_model import (
    LanguageModel,
    LanguageModelCache,
    LanguageModelConfig,
    LanguageModelLayer,
)
from companion.position import RopeScaling

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}  # logits of the size of 10
SMALL = {"vocab_size": 29, "d_model": 24, "num_layers": 2, "num_heads": 3, "d_ff": 20, "max_length": 24}
POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "t5", "none")
GPT2 = {"activation": "gelu_tanh", "scale_embedding": False}
LLAMA = {
    "activation": "swiglu",
    "norm": "rms",
    "position": "rotary",
    "bias": False,
    "num_heads": 6,
    "num_kv_heads": 2,
    "scale_embedding": False,
}


def build(dtype: torch.dtype = torch.float32, **options) -> LanguageModel:
    return randomised(LanguageModel(LanguageModelConfig(**{**SMALL, **options}))).to(dtype).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape)


# --- The weights of one layer under the names of transformers, from ours ------------------------------------


def affine(names: dict[str, str], source, transpose: bool = False):
    """Linear layers and norms, ours to theirs; GPT-2's linear layers hold their matrices transposed."""
    found = {}
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            if (x := source(f"{ours}.{kind}", f"{ours}.gain" if kind == "weight" else None)) is not None:
                found[f"{theirs}.{kind}"] = x.T if transpose and x.dim() == 2 else x
    return found


def gpt2_layer(source, heads: int):
    def joined(kind):
        parts = [source(f"self_attention.{name}_proj.{kind}") for name in ("query", "key", "value")]
        return torch.cat([part.T if part.dim() == 2 else part for part in parts], -1)

    names = {
        "self_attention.output_proj": "attn.c_proj",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
        "attention_norm": "ln_1",
        "feed_forward_norm": "ln_2",
    }
    own = {f"attn.c_attn.{kind}": joined(kind) for kind in ("weight", "bias")}
    return own | affine(names, source, transpose=True)


def bloom_layer(source, heads: int):
    def joined(kind):  # query, key and value of one head stand together
        parts = [source(f"self_attention.{name}_proj.{kind}") for name in ("query", "key", "value")]
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)

    names = {
        "self_attention.output_proj": "self_attention.dense",
        "feed_forward.up": "mlp.dense_h_to_4h",
        "feed_forward.down": "mlp.dense_4h_to_h",
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
    }
    own = {f"self_attention.query_key_value.{kind}": joined(kind) for kind in ("weight", "bias")}
    return own | affine(names, source)


def llama_layer(source, heads: int):
    names = {
        **{f"self_attention.{name}_proj": f"self_attn.{name[0]}_proj" for name in ("query", "key", "value")},
        "self_attention.output_proj": "self_attn.o_proj",
        **{f"feed_forward.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
    }
    return affine(names, source)


def t5_layer(source, heads: int, last: int):
    attention = "layer.0.SelfAttention"
    names = {
        **{f"self_attention.{name}_proj": f"{attention}.{name[0]}" for name in ("query", "key", "value")},
        "self_attention.output_proj": f"{attention}.o",
        "feed_forward.up": f"layer.{last}.DenseReluDense.wi",
        "feed_forward.down": f"layer.{last}.DenseReluDense.wo",
        "attention_norm": "layer.0.layer_norm",
        "feed_forward_norm": f"layer.{last}.layer_norm",
    }
    return affine(names, source)


def translated(mine: LanguageModel, tensors: dict, layer, stem: str, rest: dict, **options) -> dict:
    """Our tensors, weights or gradients, under transformers' names."""
    found = {theirs: tensors[ours] for ours, theirs in rest.items() if ours in tensors}
    for i in range(mine.config.num_layers):

        def source(*names, prefix=f"layers.{i}."):
            return next((tensors[prefix + name] for name in names if name and prefix + name in tensors), None)

        part = layer(source, mine.config.num_heads, **options)
        found |= {f"{stem}.{i}.{name}": value for name, value in part.items()}
    return found


def filled(theirs: nn.Module, state: dict) -> nn.Module:
    """The judge with these weights: every one of its parameters must be among them."""
    missing = {name for name, _ in theirs.named_parameters()} - state.keys()
    assert not missing, missing
    theirs.load_state_dict(state, strict=False)
    return theirs.eval()


def weights(module: nn.Module) -> dict:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def compare(agree, mine, theirs, names, ids, tolerance, what, inputs=None):
    """Logits without and with padding, and the gradients of all weights."""
    dtype = mine.embedding.weight.dtype
    inputs = inputs or (lambda ids: {"input_ids": ids})
    keep = torch.arange(ids.shape[1]) < (ids.shape[1] - torch.arange(len(ids)))[:, None]
    with torch.no_grad():
        padded = theirs(**inputs(ids), attention_mask=keep.long()).logits
    agree(
        mine(ids, keep[:, None, None])[keep],
        padded[keep],
        tolerance=tolerance,
        quantity=f"logits beside padding, {what}, {dtype}",
    )
    outputs = mine(ids), theirs(**inputs(ids)).logits
    agree(*outputs, tolerance=tolerance, quantity=f"logits, {what}, {dtype}")
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(upstream)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    judged = {name: x for name, x in names({n: p.grad for n, p in mine.named_parameters()}).items()}
    judged = {name: x for name, x in judged.items() if name in gradients}
    assert len(gradients) == len(judged)
    size = max(x.abs().max().item() for x in gradients.values())
    agree(
        {name: x / size for name, x in judged.items()},
        {name: x / size for name, x in gradients.items()},
        tolerance=tolerance,
        quantity=f"gradients of all weights over the largest, {what}, {dtype}",
    )


@pytest.mark.verifies("companion.models.language_model.LanguageModel", against="transformers.GPT2LMHeadModel")
@pytest.mark.verifies(
    "companion.models.language_model.LanguageModelLayer", against="transformers.GPT2LMHeadModel"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 7)])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
def test_gpt2(agree, dtype, batch, n, activation):
    from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

    mine = build(dtype, **GPT2 | {"activation": activation})
    config = GPT2Config(
        vocab_size=29,
        n_positions=24,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=20,
        activation_function="gelu_new" if activation == "gelu_tanh" else activation,
        attn_implementation="eager",
    )

    def names(tensors):
        rest = {
            "embedding.weight": "transformer.wte.weight",
            "position.weight": "transformer.wpe.weight",
            "norm.gain": "transformer.ln_f.weight",
            "norm.bias": "transformer.ln_f.bias",
        }
        return translated(mine, tensors, gpt2_layer, "transformer.h", rest)

    theirs = filled(GPT2LMHeadModel(config).to(dtype), names(weights(mine)))
    compare(agree, mine, theirs, names, random_ids(batch, n), TOLERANCE[dtype], f"GPT-2 with {activation}")


@pytest.mark.verifies(
    "companion.models.language_model.LanguageModel", against="transformers.OpenAIGPTLMHeadModel"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_gpt_is_post_ln(agree, dtype):
    from transformers.models.openai import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    mine = build(dtype, **GPT2 | {"norm_first": False, "d_ff": 96})
    config = OpenAIGPTConfig(vocab_size=29, n_positions=24, n_embd=24, n_layer=2, n_head=3)

    def names(tensors):
        rest = {
            "embedding.weight": "transformer.tokens_embed.weight",
            "position.weight": "transformer.positions_embed.weight",
        }
        return translated(mine, tensors, gpt2_layer, "transformer.h", rest)

    theirs = filled(OpenAIGPTLMHeadModel(config).to(dtype), names(weights(mine)))
    assert isinstance(mine.norm, nn.Identity)
    compare(agree, mine, theirs, names, random_ids(3, 7), TOLERANCE[dtype], "GPT")


@pytest.mark.verifies(
    "companion.models.language_model.LanguageModel", against="transformers.BloomForCausalLM"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [3, 4])
def test_bloom(agree, dtype, num_heads):
    from transformers.models.bloom import BloomConfig, BloomForCausalLM

    mine = build(dtype, **GPT2 | {"position": "alibi", "d_ff": 96, "num_heads": num_heads})
    config = BloomConfig(
        vocab_size=29, hidden_size=24, n_layer=2, n_head=num_heads, attn_implementation="eager"
    )
    theirs = BloomForCausalLM(config).to(dtype)
    theirs.transformer.word_embeddings_layernorm = nn.Identity()  # Bloom's one peculiarity

    def names(tensors):
        rest = {
            "embedding.weight": "transformer.word_embeddings.weight",
            "norm.gain": "transformer.ln_f.weight",
            "norm.bias": "transformer.ln_f.bias",
        }
        return translated(mine, tensors, bloom_layer, "transformer.h", rest)

    filled(theirs, names(weights(mine)))
    # Bloom's ALiBi and its GELU have constants and slopes of single precision.
    tolerance = max(TOLERANCE[dtype], 5e-7)
    compare(agree, mine, theirs, names, random_ids(3, 7), tolerance, "Bloom")


@pytest.mark.verifies(
    "companion.models.language_model.LanguageModel", against="transformers.LlamaForCausalLM"
)
@pytest.mark.verifies(
    "companion.models.language_model.LanguageModelLayer", against="transformers.LlamaForCausalLM"
)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope_base", [10000.0, 500.0])
def test_llama(agree, num_kv_heads, tied, rope_base):
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    options = {"num_kv_heads": num_kv_heads, "rope_base": rope_base, "tie_output": tied}
    mine = build(**LLAMA | options)
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": rope_base},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )

    def names(tensors):
        rest = {
            "embedding.weight": "model.embed_tokens.weight",
            "norm.gain": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
        return translated(mine, tensors, llama_layer, "model.layers", rest)

    theirs = filled(LlamaForCausalLM(config), names(weights(mine)))
    compare(agree, mine, theirs, names, random_ids(3, 11), TOLERANCE[torch.float32], "Llama")


@pytest.mark.verifies(
    "companion.models.language_model.LanguageModel", against="transformers.models.t5.modeling_t5.T5Stack"
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 150])
def test_the_encoder_and_decoder_of_t5(agree, causal, n):
    from transformers.models.t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5Stack

    options = {"position": "t5", "activation": "relu", "norm": "rms", "bias": False, "causal": causal}
    mine = build(**options, scale_embedding=False)
    config = T5Config(
        vocab_size=29,
        d_model=24,
        d_kv=8,
        d_ff=20,
        num_layers=2,
        num_heads=3,
        is_decoder=causal,
        use_cache=False,
        attn_implementation="eager",
    )
    rest = {
        "embedding.weight": "embed_tokens.weight",
        "position_bias.weight": "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "norm.gain": "final_layer_norm.weight",
    }
    last = 2 if causal else 1  # a decoder's layer 1 is cross-attention, which without a memory is passed over
    state = translated(mine, weights(mine), t5_layer, "block", rest, last=last)
    for i in range(2):  # T5 has no 1/√d_k
        state[f"block.{i}.layer.0.SelfAttention.q.weight"] = state[
            f"block.{i}.layer.0.SelfAttention.q.weight"
        ] / (8**0.5)
    theirs = T5Stack(config)
    unused = {name: p for name, p in theirs.named_parameters() if causal and ".layer.1." in name}
    filled(theirs, unused | state)
    ids = random_ids(3, n)
    keep = torch.arange(n) < (n - torch.arange(3) * (n > 3))[:, None]
    judged = theirs(input_ids=ids, attention_mask=keep.long()).last_hidden_state
    hidden = mine.hidden(ids, keep[:, None, None])
    what = "decoder" if causal else "encoder"
    agree(hidden[keep], judged[keep], tolerance=1e-5, quantity=f"hidden states, T5's {what}")
    agree(
        mine(ids, keep[:, None, None])[keep],
        judged[keep] @ mine.embedding.weight.T,
        tolerance=TOLERANCE[torch.float32],
        quantity=f"logits, T5's {what}",
    )
    upstream = torch.randn_like(judged) * keep[..., None]
    hidden.backward(upstream)
    judged.backward(upstream)
    table = theirs.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
    scale = table.abs().max().clamp(min=1e-3)
    agree(
        mine.position_bias.weight.grad / scale,
        table / scale,
        tolerance=1e-4,
        quantity=f"gradient of the shared relative positions over its largest, T5's {what}",
    )


@pytest.mark.verifies(
    "companion.models.language_model.LanguageModelCache", against="LanguageModel without a cache"
)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("variant", [{}, LLAMA, {"norm_first": False, "activation": "geglu"}])
def test_cached_is_uncached(agree, position, variant):
    model = build(torch.float64, **variant | {"position": position})
    ids, keep = random_ids(3, 19), torch.ones(3, 1, 1, 19, dtype=torch.bool)
    keep[1, ..., :4] = False  # padding on the left
    for mask in (None, keep):
        with torch.no_grad():
            whole = model(ids, mask)
            for chunks in ((1,) * 19, (5, 1, 3, 10)):
                cache, outputs, start = model.new_cache(), [], 0
                for length in chunks:
                    end = start + length
                    part = None if mask is None else mask[..., :end]
                    outputs.append(model(ids[:, start:end], part, cache))
                    start = end
                    assert cache.length == end
                agree(
                    torch.cat(outputs, 1),
                    whole,
                    tolerance=1e-11,
                    quantity=f"logits with a cache, {position}",
                )
    kv_heads = model.config.num_kv_heads or model.config.num_heads
    assert all(layer.view()[0].shape[1] == kv_heads for layer in cache.layers)


def test_a_cache_follows_its_rows():
    model, ids, rows = build(torch.float64, **LLAMA), random_ids(3, 6), torch.tensor([2, 2, 0, 1])
    cache = model.new_cache()
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        cache.reorder(rows)
        continued = model(ids[rows, 4:], cache=cache)
        torch.testing.assert_close(continued, model(ids[rows])[:, 4:], rtol=0, atol=1e-12)


@pytest.mark.verifies(
    "companion.models.language_model.LanguageModelCache", against="LanguageModel without a cache"
)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("length", [0, 1, 9])
def test_a_truncated_cache_has_not_seen_what_it_forgot(agree, position, length):
    model, ids, other = build(torch.float64, position=position), random_ids(3, 9), random_ids(3, 5)
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, cache=cache)
        cache.truncate(length)
        assert [layer.length for layer in cache.layers] == [length] * 2
        continued, whole = model(other, cache=cache), model(torch.cat((ids[:, :length], other), 1))
    agree(continued, whole[:, length:], tolerance=1e-11, quantity="logits after a cut")


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("changed", [1, 4, 6])
def test_a_causal_model_sees_no_later_token_to_the_last_bit(position, norm_first, changed):
    model, ids = build(position=position, norm_first=norm_first), random_ids(3, 7)
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 1) % 29
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(-1).all()


@pytest.mark.parametrize("position", POSITIONS)
def test_an_encoder_sees_both_ways_and_a_padded_text_as_the_text_alone(position):
    model, ids = build(torch.float64, position=position, causal=False), random_ids(3, 7)
    other = ids.clone()
    other[:, 6] = (ids[:, 6] + 1) % 29
    with torch.no_grad():
        whole = model(ids)
        assert (whole != model(other)).any(-1).all()
        padded, keep = torch.cat((ids, random_ids(3, 4)), 1), torch.arange(11) < 7
        torch.testing.assert_close(model(padded, keep)[:, :7], whole, rtol=0, atol=1e-12)


def test_without_positions_an_encoder_follows_a_permutation_and_a_causal_model_does_not():
    ids, p = random_ids(3, 7), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    with torch.no_grad():
        encoder = build(torch.float64, position="none", causal=False)
        torch.testing.assert_close(encoder(ids[:, p]), encoder(ids)[:, p], rtol=0, atol=1e-12)
        causal = build(torch.float64, position="none")
        assert not torch.allclose(causal(ids[:, p]), causal(ids)[:, p], atol=1e-2)


@pytest.mark.parametrize("position", ["rotary", "alibi", "t5"])
def test_relative_positions_do_not_tell_where_a_text_begins(position):
    model, ids = build(torch.float64, position=position), random_ids(3, 9)
    keep = torch.arange(9) >= 4
    with torch.no_grad():
        torch.testing.assert_close(model(ids, keep)[:, 4:], model(ids[:, 4:]), rtol=0, atol=1e-12)


def test_both_rotary_layouts_are_one_model_with_its_rows_permuted():
    from companion.position import rotary_permutation

    half, ids = build(torch.float64, **LLAMA), random_ids(3, 9)
    interleaved = build(torch.float64, **LLAMA | {"rope_layout": "interleaved"})
    state, p = half.state_dict(), rotary_permutation(4).argsort()
    for name, weight in state.items():
        if "query_proj" in name or "key_proj" in name:
            state[name] = weight.unflatten(0, (-1, 4))[:, p].flatten(0, 1)
    interleaved.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(interleaved(ids), half(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn"])
def test_rotary_scaling_reaches_the_layers(kind):
    ids = random_ids(1, 20)
    plain, scaled = (
        build(torch.float64, **LLAMA | {"rope_scaling": scaling})
        for scaling in (None, RopeScaling(kind, factor=4.0, original_length=8))
    )
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert (plain(ids) - scaled(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["alibi", "t5"])
def test_a_bias_is_computed_once_a_pass_and_shared_by_all_layers(position):
    model, calls = build(position=position, num_layers=3), []
    model.position_bias.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    for layer in model.layers:
        layer.self_attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["score_bias"]), with_kwargs=True
        )
    model(random_ids(2, 5))
    assert len(calls) == 1 and len(seen) == 3
    assert all(bias is seen[0] for bias in seen)
    assert sum("position_bias" in name for name, _ in model.named_parameters()) == (position == "t5")


def test_recorded_weights_sum_to_one_over_the_past():
    model = build(**LLAMA)
    with record_attention(*(layer.self_attention for layer in model.layers)) as recorded:
        model(random_ids(2, 5))
    assert len(recorded) == 2
    for found in recorded:
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 6, 5))
        assert not found.triu(1).any()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_every_weight_gets_a_gradient(position, activation, norm):
    first = POSITIONS.index(position) % 2 == 0
    options = {"position": position, "activation": activation, "norm": norm, "norm_first": first}
    model = build(**options, tie_output=not first, num_heads=6, num_kv_heads=3)
    ids = random_ids(2, 24)
    loss = F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all(), name
        if not name.endswith("key_proj.bias"):  # it shifts all scores of a row alike
            assert gradient.any(), name


def test_a_text_without_keys_gives_numbers():
    model, ids = build(position="alibi"), random_ids(2, 5)
    logits = model(ids, torch.zeros(2, 1, 1, 5, dtype=torch.bool))
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_configuration_decides_what_is_built():
    config = LanguageModelConfig(**SMALL | LLAMA)
    model = LanguageModel(config)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert model.output is None and len(model.layers) == 2
    assert isinstance(model.layers[0].self_attention, MultiHeadAttention)
    assert isinstance(model.layers[0], LanguageModelLayer)
    untied = LanguageModel(dataclasses.replace(config, tie_output=False))
    assert untied.output.weight.shape == (29, 24) and untied.output.bias is None
    tied, scaled = build(), build(scale_embedding=True)
    scaled.load_state_dict(tied.state_dict())
    unscaled = build(scale_embedding=False)
    unscaled.load_state_dict(tied.state_dict())
    unscaled.embedding.weight.data *= 24**0.5
    ids = random_ids(1, 5)
    torch.testing.assert_close(unscaled.hidden(ids), scaled.hidden(ids), rtol=1e-4, atol=1e-5)


def test_a_fresh_untied_model_predicts_almost_uniformly():
    ids = random_ids(8, 20)
    for position in POSITIONS:
        config = LanguageModelConfig(vocab_size=29, d_model=64, position=position, tie_output=False)
        model = LanguageModel(config)
        with torch.no_grad():
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert 3.0 < loss < 4.6, (position, loss)  # log 29 = 3.37, and half a nat for random logits


def test_dropout_acts_in_training_only():
    for position in POSITIONS:
        model, ids = build(position=position, dropout=0.3), random_ids(2, 5)
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"d_model": 24.0}, TypeError, "d_model must be an int, got float"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"num_heads": 5}, ValueError, "d_model must be divisible by num_heads = 5, got 24"),
        ({"num_kv_heads": 2}, ValueError, "num_kv_heads must divide num_heads = 3, got 2"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"d_ff": -1}, ValueError, "d_ff must be at least 1, got -1"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        (
            {"activation": "tanh"},
            ValueError,
            "activation must be one of 'relu'.*'swiglu', 'geglu', got 'tanh'",
        ),
        ({"norm": "batch"}, ValueError, "norm must be one of 'layer', 'rms', got 'batch'"),
        ({"position": "relative"}, ValueError, "position must be one of 'learned', .* got 'relative'"),
        (
            {"position": "sinusoidal", "d_model": 9},
            ValueError,
            "d_model must be even with sinusoidal positions, got 9",
        ),
        (
            {"position": "rotary", "d_model": 9},
            ValueError,
            "d_model / num_heads must be even with rotary positions, got 3",
        ),
        ({"rope_base": 1.0}, ValueError, "rope_base must be above 1, got 1.0"),
        ({"rope_base": None}, TypeError, "rope_base must be a number, got NoneType"),
        (
            {"rope_layout": "split"},
            ValueError,
            "rope_layout must be one of 'half', 'interleaved', got 'split'",
        ),
        ({"rope_scaling": "yarn"}, TypeError, "rope_scaling must be a RopeScaling, got str"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"head_dim": 7, "position": "rotary"}, ValueError, "head_dim must be even with rotary positions"),
        ({"norm_eps": "1e-5"}, TypeError, "norm_eps must be a number, got str"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps must be positive and finite, got 0.0"),
    ],
)
def test_bad_configurations_are_named(options, error, match):
    with pytest.raises(error, match=match):
        LanguageModelConfig(**{**SMALL, **options})


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, c: m([[1]], cache=c), TypeError, "ids must be a torch.Tensor, got list"),
        (lambda m, c: m(IDS.float(), cache=c), TypeError, "ids must be an integer tensor, got torch.float32"),
        (lambda m, c: m(IDS[0], cache=c), ValueError, r"ids must have 2 dimensions, got shape \(3,\)"),
        (lambda m, c: m(IDS[:, :0], cache=c), ValueError, r"ids must not be empty, got shape \(2, 0\)"),
        (lambda m, c: m(29 * IDS, cache=c), ValueError, "ids must lie in 0 … 28, got values from 29 to 29"),
        (
            lambda m, c: m(IDS[:1], cache=c),
            ValueError,
            r"ids must have the cache's batch size 2, got \(1, 3\)",
        ),
        (
            lambda m, c: m(torch.ones(2, 21).long(), cache=c),
            ValueError,
            r"ids must end at position 24 at most \(max_length\), got 25",
        ),
        (lambda m, c: m(IDS, torch.ones(3, 7), c), TypeError, "mask must be a bool tensor"),
        (
            lambda m, c: m(IDS, torch.ones(3, 3).bool(), c),
            ValueError,
            r"mask must broadcast to \(2, 3, 3, 7\), got \(3, 3\)",
        ),
        (lambda m, c: m(IDS, cache=KVCache()), TypeError, "cache must be a LanguageModelCache, got KVCache"),
        (lambda m, c: m(IDS, cache=LanguageModelCache(3)), ValueError, "cache must have 2 layers, got 3"),
        (lambda m, c: c.truncate(5), ValueError, "length must lie in 0 … 4, got 5"),
        (lambda m, c: c.truncate(None), TypeError, "length must be an int, got NoneType"),
        (lambda m, c: m.logits(torch.ones(2, 23)), ValueError, r"hidden must have shape \(..., 24\)"),
    ],
)
def test_bad_calls_are_named_and_leave_the_cache_alone(call, error, match):
    model = build()
    cache = model.new_cache()
    with torch.no_grad():
        model(torch.ones(2, 4).long(), cache=cache)
        with pytest.raises(error, match=match):
            call(model, cache)
    assert [layer.length for layer in cache.layers] == [4, 4]


def test_an_encoder_refuses_a_cache():
    model = build(causal=False)
    with pytest.raises(ValueError, match="cache must be None where causal is False"):
        model(IDS, cache=model.new_cache())
