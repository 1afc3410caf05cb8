"""Llama, Qwen2 and Qwen3 from and to Hugging Face's files, and from GGUF, against transformers."""

import json
from dataclasses import replace
from random import Random

import pytest
import safetensors.torch
import torch
from test_attention import randomised
from torch import nn

from companion.data.assets import asset_path
from companion.generate import generate_text
from companion.models import llama
from companion.models.language_model import LanguageModel, LanguageModelConfig
from companion.models.llama import (
    load_gguf,
    load_pretrained,
    read_config,
    save_pretrained,
    tensor_names,
    write_config,
)
from companion.position import RopeScaling
from companion.quantize.gguf import GGUFFile
from companion.tokenizers.bpe import BPETokenizer

LOAD, SAVE = "companion.models.llama.load_pretrained", "companion.models.llama.save_pretrained"
SIZES = {
    "vocab_size": 31,
    "hidden_size": 20,
    "intermediate_size": 18,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 12,
}
VARIANTS = {
    "llama": ("llama", {"num_key_value_heads": 5, "rms_norm_eps": 1e-5}),
    "llama, shared heads, tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, heads of 6, biases": ("llama", {"head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_key_value_heads": 5, "head_dim": 6, "rms_norm_eps": 1e-3}),
}
SCALINGS = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "dynamic": {
        "rope_type": "dynamic",
        "rope_theta": 100.0,
        "factor": 2.5,
        "original_max_position_embeddings": 30,  # transformers goes by max_position_embeddings all the same
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 9.0,
        "beta_slow": 2.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 7.0,
    },
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")


def judge(kind: str, **options) -> nn.Module:
    """A model of transformers whose weights are all random, norms and biases too."""
    if kind == "llama":
        from transformers.models.llama import LlamaConfig as Config
        from transformers.models.llama import LlamaForCausalLM as Model
    elif kind == "qwen2":
        from transformers.models.qwen2 import Qwen2Config as Config
        from transformers.models.qwen2 import Qwen2ForCausalLM as Model
    else:
        from transformers.models.qwen3 import Qwen3Config as Config
        from transformers.models.qwen3 import Qwen3ForCausalLM as Model
    model = Model(Config(**{**SIZES, **options}, attn_implementation="eager"))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, float("norm" in name), 0.2)
    return model.eval()


def keep(ids: torch.Tensor) -> torch.Tensor:
    """Row i has i tokens of padding at its end."""
    return torch.arange(ids.shape[1]) < (ids.shape[1] - torch.arange(len(ids)))[:, None]


def compare(agree, mine: LanguageModel, theirs: nn.Module, ids: torch.Tensor, what: str) -> None:
    """Logits beside padding, and the gradients of all weights over the largest."""
    real = keep(ids)
    outputs = mine(ids, real[:, None, None]), theirs(ids, attention_mask=real.long()).logits
    agree(outputs[0][real], outputs[1][real], tolerance=1e-5, quantity=f"logits beside padding, {what}")
    upstream = torch.randn_like(outputs[0]) * real[..., None]
    for output in outputs:
        output.backward(upstream)
    judged = {name: p.grad for name, p in theirs.named_parameters()}
    names = tensor_names(mine.config)
    found = {names[name]: p.grad for name, p in mine.named_parameters()}
    size = max(x.abs().max().item() for x in judged.values())
    agree(
        {name: x / size for name, x in found.items()},
        {name: x / size for name, x in judged.items()},
        tolerance=1e-5,
        quantity=f"gradients of all weights over the largest, {what}",
    )


@pytest.mark.verifies(LOAD, against="transformers.PreTrainedModel.save_pretrained")
@pytest.mark.verifies("companion.models.llama.read_config", against="transformers.PreTrainedConfig")
@pytest.mark.verifies("companion.models.llama.tensor_names", against="transformers.PreTrainedModel")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 7)])
def test_their_files_are_our_model(agree, tmp_path, variant, batch, n):
    kind, options = VARIANTS[variant]
    theirs = judge(kind, **options)
    theirs.save_pretrained(tmp_path)
    mine = load_pretrained(tmp_path)
    assert not mine.training and all(p.requires_grad for p in mine.parameters())
    agree(
        sorted(tensor_names(mine.config).values()),
        sorted(name for name, _ in theirs.named_parameters()),
        tolerance=0,
        quantity="names of the tensors",
    )
    compare(agree, mine, theirs, torch.randint(0, 31, (batch, n)), variant)


@pytest.mark.verifies(SAVE, against="transformers.PreTrainedModel.from_pretrained")
@pytest.mark.verifies("companion.models.llama.write_config", against="transformers.PreTrainedConfig")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_our_files_are_their_model(agree, tmp_path, variant, layout):
    kind, options = VARIANTS[variant]
    drawn = judge(kind, **options)
    drawn.save_pretrained(tmp_path / "theirs")
    half = load_pretrained(tmp_path / "theirs")
    mine = llama._laid_out(half, layout)
    assert mine.config.rope_layout == layout
    save_pretrained(mine, tmp_path / "ours")
    theirs, report = type(drawn).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    agree(theirs.state_dict(), drawn.state_dict(), tolerance=0, quantity="weights, there and back")
    ids = torch.randint(0, 31, (3, 7))
    with torch.no_grad():
        agree(mine(ids), theirs(ids).logits, tolerance=1e-5, quantity="logits of the saved model")
    assert load_pretrained(tmp_path / "ours").config == half.config


@pytest.mark.verifies(LOAD, against="transformers.PreTrainedModel.save_pretrained")
@pytest.mark.verifies(SAVE, against="transformers.PreTrainedModel.from_pretrained")
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_scaling_comes_from_the_configuration(agree, tmp_path, scaling):
    theirs = judge("llama", hidden_size=60, head_dim=12, rope_parameters=dict(SCALINGS[scaling]))
    theirs.save_pretrained(tmp_path / "theirs")
    mine = load_pretrained(tmp_path / "theirs")
    assert (mine.config.rope_scaling is None) == (scaling == "theta")
    save_pretrained(mine, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert load_pretrained(tmp_path / "ours").config == mine.config
    ids = torch.randint(0, 31, (3, 40))  # beyond the 12 positions of training
    with torch.no_grad():
        logits = mine(ids)
        agree(logits, theirs(ids).logits, tolerance=5e-5, quantity=f"logits, {scaling} of RoPE")
        agree(logits, again(ids).logits, tolerance=5e-5, quantity=f"logits of the saved model, {scaling}")


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_configurations_of_older_versions(spelling):
    old = {**SIZES, "model_type": "llama", "rope_theta": 500.0}
    assert read_config(old).rope_base == 500.0 and read_config(old).rope_scaling is None
    old["rope_scaling"] = {spelling: "linear", "factor": 2}
    assert read_config(old).rope_scaling == RopeScaling("linear", 2, 12)
    assert read_config(old | {"rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shards_old_buffers_twins_and_other_types(tmp_path, dtype):
    theirs = judge("llama", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    mine, sharded = load_pretrained(tmp_path / "whole"), load_pretrained(tmp_path / "shards", dtype=dtype)
    for name, x in mine.state_dict().items():
        assert torch.equal(x.to(dtype), sharded.state_dict()[name])
    path = tmp_path / "whole" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, path)
    assert torch.equal(load_pretrained(tmp_path / "whole").embedding.weight, mine.embedding.weight)
    tensors["lm_head.weight"][0, 0] += 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="lm_head.weight equal to model.embed_tokens.weight"):
        load_pretrained(tmp_path / "whole")


# --- GGUF ---------------------------------------------------------------------------------------------------


def write_gguf_of(theirs: nn.Module, path, kind: str, *, more: dict | None = None, rope=True) -> None:
    """The judge's weights as llama.cpp's converter writes them, by the `gguf` package."""
    gguf = pytest.importorskip("gguf")
    config = theirs.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind == "qwen3":
        writer.add_key_length(config.head_dim)
    for key, value in (more or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, x in theirs.named_parameters():
        x = x.detach()
        if kind == "llama" and (n := heads.get(name.split(".")[-2])):
            x = x.reshape(n, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)  # the converter's permute
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), x.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.verifies("companion.models.llama.load_gguf", against="gguf.GGUFWriter")
@pytest.mark.parametrize("variant", ["llama", "llama, shared heads, tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_gguf_holds_the_same_model(agree, tmp_path, variant, layout):
    kind, options = VARIANTS[variant]
    theirs = judge(kind, **options, rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    write_gguf_of(theirs, tmp_path / "model.gguf", kind)
    mine = load_gguf(tmp_path / "model.gguf", rope_layout=layout)
    assert mine.config.rope_layout == layout and not mine.training
    assert mine.config.tie_output == options.get("tie_word_embeddings", False)
    ids = torch.randint(0, 31, (3, 11))
    with torch.no_grad():
        agree(mine(ids), theirs(ids).logits, tolerance=1e-5, quantity=f"logits, {variant}, {layout}")


def test_gguf_scaling_and_what_does_not_fit(tmp_path):
    theirs, path = judge("llama"), tmp_path / "model.gguf"
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf_of(theirs, path, "llama", more=linear)
    assert load_gguf(path).config.rope_scaling == RopeScaling("linear", 4.0, 12)
    write_gguf_of(theirs, path, "llama", more=linear | {"llama.rope.scaling.type": "longrope"})
    with pytest.raises(ValueError, match="rope.scaling.type must be one of 'none', 'linear', 'yarn'"):
        load_gguf(path)
    write_gguf_of(judge("qwen2", num_key_value_heads=1), path, "qwen2")
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"llama"))
    with pytest.raises(ValueError, match=r"model.gguf does not fit .* unexpected: blk.0.attn_k.bias"):
        load_gguf(path)
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma"))
    with pytest.raises(ValueError, match="must be of architecture llama, qwen2, qwen3, got 'gemma'"):
        load_gguf(path)


def test_a_damaged_gguf_gives_a_model_or_a_clear_error(tmp_path):
    path, random = tmp_path / "model.gguf", Random(0)
    write_gguf_of(judge("llama", num_key_value_heads=1), path, "llama")
    whole = path.read_bytes()
    header = whole.index(b"output_norm")
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(random.choice((1, 1, 3))):
            data[random.randrange(header)] = random.choice((0, 1, 255, random.randrange(256)))
        path.write_bytes(data)
        try:
            load_gguf(path)
        except (ValueError, TypeError) as error:
            assert str(error)


@pytest.mark.verifies("companion.models.llama.load_gguf", against="transformers.LlamaForCausalLM")
def test_smollm2(agree):
    """The numbers are those of transformers 5.23.0 on the same file, in float32."""
    model = load_gguf(asset_path("smollm2"))
    ids = torch.tensor([[504, 3575, 282, 4649, 314], [9, 45, 1000, 40000, 3]])  # "The capital of France is"
    with torch.no_grad():
        logits = model(ids)
    theirs = [
        [1.6136466264724731, 17.37126922607422, 14.888603210449219, -7.993887901306152],
        [25.756237030029297, 21.650054931640625, 26.4596004486084, 23.310983657836914],
    ]
    agree(
        logits[:, -1, [0, 7042, 260, 49151]], torch.tensor(theirs), tolerance=1e-3, quantity="logits, SmolLM2"
    )
    best = [[29, 282, 260, 314, 7042], [29, 4245, 198, 45, 198]]
    agree(
        logits.argmax(-1).flatten().tolist(), sum(best, []), tolerance=0, quantity="likeliest tokens, SmolLM2"
    )
    assert logits[0, -1].softmax(-1)[7042].item() == pytest.approx(0.7725, abs=1e-4)  # " Paris"


BEGINNINGS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def factorial(n):\n    ",
    "The opposite of hot is",
    "My advice to a young scientist is",
    "Dear Sir, I am writing to you because",
    "The history of bread begins",
    "import numpy as np\n\n",
    "To be, or not to be,",
    "La tour Eiffel se trouve à",
    "In 1969, the first man",
    "Photosynthesis is the process by which",
    "A list of five animals:\n1.",
    "The recipe needs two eggs,",
    "Q: What is the largest planet?\nA:",
    "Shall I compare thee to a summer's day?",
    "The mitochondria are",
    "SELECT name FROM",
    "Good morning! How",
]


@pytest.mark.verifies("companion.models.llama.load_gguf", against="transformers.LlamaForCausalLM")
@pytest.mark.verifies("companion.generate.stream.generate_text", against="transformers.LlamaForCausalLM")
@torch.no_grad()
def test_smollm2_says_what_transformers_says(agree, tmp_path):
    """Where each of our tokens is the likeliest there after those before it, greedy decoding says it there.

    The weights go over in our file: transformers takes a quarter of a minute to read GGUF.
    """
    from transformers.models.llama import LlamaForCausalLM

    path = asset_path("smollm2")
    with GGUFFile.open(path) as file:
        tokenizer = BPETokenizer.from_gguf(file.metadata)
    mine = load_gguf(path)
    save_pretrained(mine, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    prompts = [tokenizer.encode(text) for text in BEGINNINGS]
    texts = generate_text(mine, tokenizer, prompts, max_new_tokens=64, greedy=True)
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text.ids) == 64
        ids = torch.tensor([[*prompt, *text.ids]])[:, :-1]
        expected = theirs(ids).logits
        chosen = expected[0, len(prompt) - 1 :].argmax(-1)
        agree(list(text.ids), chosen.tolist(), tolerance=0, quantity="64 greedy tokens, SmolLM2, 20 prompts")
        agree(mine(ids), expected, tolerance=1e-3, quantity="logits, SmolLM2, 20 prompts")


# --- What cannot be -----------------------------------------------------------------------------------------

CONFIG = LanguageModelConfig(
    *(31, 20, 2, 5, 1, 18),
    **{"activation": "swiglu", "norm": "rms", "position": "rotary", "bias": False, "scale_embedding": False},
)


@pytest.fixture
def saved(tmp_path):
    save_pretrained(randomised(LanguageModel(CONFIG)), tmp_path)
    return tmp_path


def change(folder, **entries) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_everything_that_does_not_fit_is_named_at_once(saved):
    path = saved / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(20)
    tensors["model.norm.weight"] = torch.ones(21)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_pretrained(saved)
    assert str(error.value).endswith(
        "does not fit its configuration; missing: model.layers.1.mlp.up_proj.weight; "
        "unexpected: model.layers.0.self_attn.q_proj.bias; "
        "misshapen: model.norm.weight has shape (21,), not (20,)"
    )


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"num_hidden_layers": 10**12}, "holds 20 tensors, too few for 1000000000000 layers"),
        ({"intermediate_size": 10**12}, "holds no dimension above 31, which d_ff = 1000000000000"),
        ({"head_dim": 10**12}, "which num_heads · d_k = 5000000000000 would need"),
        ({"model_type": "mamba"}, "model_type must be one of 'llama', 'qwen2', 'qwen3', got 'mamba'"),
        ({"hidden_size": None}, "config.json must have hidden_size"),
        ({"hidden_size": "20"}, "config.json has hidden_size of type str: '20'"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of 'silu', 'swish', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be one of"),
        ({"mlp_bias": True}, "mlp_bias equal to attention_bias = False"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be one of 'default'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": 1}}, "must not have mscale"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json must have factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be one of 1, 1.0, got 0.5"),
        ({"vocab_size": 32}, r"embed_tokens.weight has shape \(31, 20\), not \(32, 20\)"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight$"),
    ],
)
def test_what_the_configuration_may_not_say(saved, entries, match):
    change(saved, **entries)
    with pytest.raises(ValueError, match=match):
        load_pretrained(saved)


def test_a_configuration_of_anything_gives_a_model_or_a_clear_error(saved):
    settings = json.loads((saved / "config.json").read_text())
    for name in settings:
        for value in (None, True, -1, 0, 3, 10**18, 2.5, 1e300, "x", [], [7], {}, {"rope_type": []}):
            (saved / "config.json").write_text(json.dumps(settings | {name: value}))
            try:
                load_pretrained(saved)
            except (ValueError, TypeError) as error:
                assert str(error), (name, value)


def test_damaged_and_absent_files(saved):
    data = (saved / "model.safetensors").read_bytes()
    for bad in (b"", data[:7], data[:100], data[:-1], b"\xff" * 8 + data[8:], b"\x80\x02}q\0."):
        (saved / "model.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
            load_pretrained(saved)
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(data)  # a pickle is not looked for
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_pretrained(saved)
    index = saved / "model.safetensors.index.json"
    for bad in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(bad)
        with pytest.raises(ValueError, match="its weight_map must name files of its folder"):
            load_pretrained(saved)
    for bad in ("", "[]", "{", "[" * 10**5):
        (saved / "config.json").write_text(bad)
        with pytest.raises(ValueError, match="config.json is damaged"):
            load_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_pretrained(saved)


def test_integers_are_no_weights(saved):
    path = saved / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"] = torch.ones(20, dtype=torch.int32)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="F64, F32, F16, BF16, not so model.norm.weight"):
        load_pretrained(saved)
    with pytest.raises(TypeError, match="dtype must be a floating-point torch.dtype, got torch.int8"):
        load_pretrained(saved, dtype=torch.int8)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"position": "learned"}, "position must be 'rotary' in a llama model, got 'learned'"),
        ({"scale_embedding": True}, "scale_embedding must be False in a llama model, got True"),
        ({"norm": "layer"}, "norm must be 'rms' in a llama model, got 'layer'"),
        ({"bias": True, "qkv_bias": False}, "qkv_bias must be None or True in a llama model, got False"),
        ({"bias": True, "qk_norm": True}, "bias must be False in a qwen3 model, got True"),
        ({"d_model": 21, "head_dim": 4}, "d_model must be divisible by num_heads = 5 in a llama model"),
        ({"rope_scaling": RopeScaling("ntk", 2.0, 64)}, "rope_scaling must not be of kind 'ntk'"),
    ],
)
def test_models_that_transformers_does_not_have_are_not_saved(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        save_pretrained(LanguageModel(replace(CONFIG, **options)), tmp_path)
    assert not list(tmp_path.iterdir())
    assert write_config(CONFIG)["model_type"] == "llama"


def test_cached_is_uncached_with_every_option(tmp_path):
    options = {"head_dim": 6, "qk_norm": True, "qkv_bias": True, "norm_eps": 1e-2}
    model, ids = randomised(LanguageModel(replace(CONFIG, **options))).double(), torch.randint(0, 31, (3, 9))
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split([4, 1, 4], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-12)
    for name in ("query_norm", "key_norm"):
        assert getattr(model.layers[1].self_attention, name).gain.shape == (6,)
    assert model.norm.eps == model.layers[0].self_attention.key_norm.eps == 1e-2
