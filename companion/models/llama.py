"""Llama and its relatives Qwen2 and Qwen3, as language models that read and write the field's files.

Llama (Touvron et al., 2023) is a pre-norm decoder with RMSNorm, SwiGLU and rotary positions, without biases;
Llama 2 and 3 share key/value heads. Qwen2 (Yang et al., 2024) adds biases to queries, keys and values, Qwen3
(Yang et al., 2025) has a norm of each head's queries and keys instead, and heads whose size is their own.
SmolLM2, TinyLlama and Yi are Llamas.

A folder in Hugging Face's layout holds config.json and model.safetensors. A GGUF file (llama.cpp) holds both,
its names shorter and its weights perhaps quantised. Its Llamas store the rows of queries and keys for
interleaved rotary pairs, those of Qwen are half-split, as all are in Hugging Face's layout.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from companion._checks import check_choice
from companion.models._pretrained import (
    Source,
    _check_plausible,
    _check_shapes,
    blank,
    build,
    check_dtype,
    load_folder,
    read_settings,
    refuse_fields,
    refuse_settings,
    save_folder,
    setting,
)
from companion.models.language_model import LanguageModel, LanguageModelConfig
from companion.position import TURNS, RopeScaling, rotary_permutation
from companion.quantize.gguf import GGUFFile
from companion.quantize.linear import QuantizedEmbedding, QuantizedLinear

KINDS = ("llama", "qwen2", "qwen3")

# Our names and Hugging Face's and GGUF's, of a layer's modules and of the rest.
_LAYER = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "self_attention.query_proj": ("self_attn.q_proj", "attn_q"),
    "self_attention.key_proj": ("self_attn.k_proj", "attn_k"),
    "self_attention.value_proj": ("self_attn.v_proj", "attn_v"),
    "self_attention.query_norm": ("self_attn.q_norm", "attn_q_norm"),
    "self_attention.key_norm": ("self_attn.k_norm", "attn_k_norm"),
    "self_attention.output_proj": ("self_attn.o_proj", "attn_output"),
    "feed_forward_norm": ("post_attention_layernorm", "ffn_norm"),
    "feed_forward.gate": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.up": ("mlp.up_proj", "ffn_up"),
    "feed_forward.down": ("mlp.down_proj", "ffn_down"),
}
_REST = {
    "embedding": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "output": ("lm_head", "output"),
}
_PREFIX = ("model.layers", "blk")

# What of a `LanguageModelConfig` is the same in all of them.
_FIXED = {
    "activation": "swiglu",
    "norm": "rms",
    "position": "rotary",
    "causal": True,
    "norm_first": True,
    "scale_embedding": False,
}


def load_pretrained(folder, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a folder in Hugging Face's layout, in evaluation mode.

    The folder holds config.json and model.safetensors, or several files and model.safetensors.index.json.
    Dropout is 0: it belongs to training, not to the weights.

    Args:
        dtype: of the model's weights, whatever the file's is.

    Raises ValueError, before anything is allocated, where the configuration asks for what this model does not
    have, or tensors are missing, unexpected or of another shape; FileNotFoundError where there is no file.
    """
    check_dtype(dtype)
    config = read_config(read_settings(folder))

    def rename(name: str) -> str | None:  # older files keep the frequencies of the rotations
        return None if name.endswith("rotary_emb.inv_freq") else name

    twins = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_output else {}
    return load_folder(folder, config, _sources, dtype=dtype, rename=rename, twins=twins)


def save_pretrained(model: LanguageModel, folder) -> None:
    """Write the model as transformers' `from_pretrained` reads it: config.json and model.safetensors.

    A model with interleaved rotary pairs is written half-split, its queries' and keys' rows permuted. The
    tokens that begin and end a text are the tokenizer's to tell: config.json names none.

    Raises ValueError where the model is neither a Llama, nor a Qwen2, nor a Qwen3.
    """
    settings = write_config(model.config)
    save_folder(_laid_out(model, "half"), folder, settings, _sources(model.config))


def load_gguf(
    path, *, dtype: torch.dtype = torch.float32, rope_layout: str = "half", quantised: str | None = None
) -> LanguageModel:
    """The model in a GGUF file, in evaluation mode, its weights dequantised now or as they are used.

    The output layer is tied to the embedding where the file has none of its own.

    Args:
        dtype: of the model's weights.
        rope_layout: "half" as in transformers, or "interleaved"; rows of queries and keys are permuted
            where the file has the other one. The two models give equal logits.
        quantised: None for weights of `dtype`. "blocks" keeps every matrix, the embedding too, as it lies in
            the file, "int8" as a signed byte a weight with a scale for each row; both decode them anew in
            each product (`companion.quantize.linear`), so that `dtype` is that of the activations. Of
            SmolLM2's float32 memory they take 18 % and 25 %. "blocks" gives float32's logits up to the order
            of sums, "int8" rounds the weights once more.

    Raises ValueError where the file is damaged, of another architecture, or does not fit its own metadata.
    """
    check_dtype(dtype)
    check_choice("rope_layout", rope_layout, ("half", "interleaved"))
    check_choice("quantised", quantised, (None, "int8", "blocks"))
    with GGUFFile.open(path) as file:
        config = _config_of_gguf(file, Path(path).name)
        shapes = {name: tuple(info.shape) for name, info in file.tensors.items()}
        place = _RowOrder(config, rope_layout)
        if quantised is not None:
            return _kept_quantised(file, place, shapes, dtype, quantised, Path(path).name)
        ours = {theirs: ours for ours, theirs in tensor_names(config, "gguf").items()}

        def read(name: str) -> Tensor:
            return place(ours[name], file.tensor(name, dtype))

        return build(place.config, _gguf_sources, shapes, read, dtype=dtype, origin=Path(path).name)


def tensor_names(config: LanguageModelConfig, layout: str = "huggingface") -> dict[str, str]:
    """Our name of each weight and the name it has in the files of a layout, "huggingface" or "gguf"."""
    check_choice("layout", layout, ("huggingface", "gguf"))
    column = ("huggingface", "gguf").index(layout)
    qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
    names = {}

    def add(ours: str, theirs: str) -> None:
        if ours.endswith("norm"):
            names[f"{ours}.gain"] = f"{theirs}.weight"
            return
        names[f"{ours}.weight"] = f"{theirs}.weight"
        joins = ours.endswith(("query_proj", "key_proj", "value_proj"))
        if ours not in _REST and (qkv_bias if joins else config.bias):
            names[f"{ours}.bias"] = f"{theirs}.bias"

    for ours, theirs in _REST.items():
        if ours != "output" or not config.tie_output:
            add(ours, theirs[column])
    for i in range(config.num_layers):
        for ours, theirs in _LAYER.items():
            if config.qk_norm or not ours.endswith(("query_norm", "key_norm")):
                add(f"layers.{i}.{ours}", f"{_PREFIX[column]}.{i}.{theirs[column]}")
    return names


def read_config(settings: Mapping) -> LanguageModelConfig:
    """The configuration that the entries of a config.json mean.

    Sizes must be there, and as many key/value heads as heads are meant where their number is not; where
    another entry is missing, transformers' default stands for it.

    Raises ValueError for another kind of model, and for entries this model has no counterpart of: a sliding
    window, quantised weights, heads that turn in part only.
    """
    kind = setting(settings, "model_type", str)
    check_choice("config.json's model_type", kind, KINDS)
    refused = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1, 1.0)}
    refuse_settings(settings, {**refused, "use_sliding_window": (False,), "quantization_config": ()})
    bias = kind != "qwen2" and setting(settings, "attention_bias", bool, False)
    if setting(settings, "mlp_bias", bool, False) != bias:
        raise ValueError(f"config.json must have mlp_bias equal to attention_bias = {bias}")
    heads = setting(settings, "num_attention_heads", int)
    max_length = setting(settings, "max_position_embeddings", int, 2048 if kind == "llama" else 32768)
    head_dim = setting(settings, "head_dim", int, 128 if kind == "qwen3" else None)
    d_model = setting(settings, "hidden_size", int)
    rope_base, rope_scaling = _read_rope(settings, max_length)
    return LanguageModelConfig(
        vocab_size=setting(settings, "vocab_size", int),
        d_model=d_model,
        num_layers=setting(settings, "num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=setting(settings, "num_key_value_heads", int, heads),
        d_ff=setting(settings, "intermediate_size", int),
        max_length=max_length,
        bias=bias,
        qkv_bias=True if kind == "qwen2" else None,
        qk_norm=kind == "qwen3",
        head_dim=head_dim if heads < 1 or head_dim != d_model / heads else None,
        norm_eps=setting(settings, "rms_norm_eps", float, 1e-6),
        tie_output=setting(settings, "tie_word_embeddings", bool, False),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        **_FIXED,
    )


def write_config(config: LanguageModelConfig) -> dict:
    """The entries of config.json with which transformers builds this model.

    Raises ValueError that names the field where it cannot.
    """
    qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
    kind = "qwen3" if config.qk_norm else "qwen2" if qkv_bias and not config.bias else "llama"
    refuse_fields(config, kind, {name: (value,) for name, value in _FIXED.items()})
    refuse_fields(config, kind, {"bias": (False,)} if kind == "qwen3" else {})
    refuse_fields(config, kind, {"qkv_bias": (True,) if kind == "qwen2" else (None, config.bias)})
    if kind == "llama" and config.d_model % config.num_heads:
        raise ValueError(
            f"d_model must be divisible by num_heads = {config.num_heads} in a llama model, "
            f"got {config.d_model}"
        )
    classes = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    settings = {
        "architectures": [f"{classes[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.d_k,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": 1e-6 if config.norm_eps is None else config.norm_eps,
        "tie_word_embeddings": config.tie_output,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "llama":
        settings |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    return settings | _write_rope(config)


# --- The parts ----------------------------------------------------------------------------------------------


def _sources(config: LanguageModelConfig) -> dict[str, Source]:
    return {theirs: Source((ours,)) for ours, theirs in tensor_names(config).items()}


def _gguf_sources(config: LanguageModelConfig) -> dict[str, Source]:
    return {theirs: Source((ours,)) for ours, theirs in tensor_names(config, "gguf").items()}


def _read_rope(settings: Mapping, max_length: int) -> tuple[float, RopeScaling | None]:
    """The base and the scaling of rotary positions, from rope_parameters or, until transformers 4, from
    rope_theta and rope_scaling."""
    number = (int, float)
    entries = setting(settings, "rope_scaling", dict, None) or setting(settings, "rope_parameters", dict, {})
    base = setting(entries, "rope_theta", number, setting(settings, "rope_theta", number, 10000.0))
    kind = entries.get("rope_type", entries.get("type", "default"))
    check_choice("config.json's rope_type", kind, ("default", "linear", "dynamic", *TURNS))
    known = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings"}
    turns = {"yarn": ("beta_slow", "beta_fast"), "llama3": ("low_freq_factor", "high_freq_factor")}.get(kind)
    refuse_settings(entries, {"partial_rotary_factor": (1, 1.0)})
    more = {name for name, value in entries.items() if value is not None}
    if more := more - known - set(turns or ()) - {"partial_rotary_factor"}:
        raise ValueError(f"config.json's rope_parameters must not have {', '.join(sorted(more))}")
    if kind == "default":
        return base, None
    # transformers' dynamic scaling knows one length: max_position_embeddings.
    original = setting(entries, "original_max_position_embeddings", int, max_length)
    pair = None
    if turns is not None:
        pair = tuple(setting(entries, name, number, TURNS[kind][i]) for i, name in enumerate(turns))
    return base, RopeScaling(
        kind,
        setting(entries, "factor", number),
        max_length if kind == "dynamic" else original,
        None if pair is None or pair == TURNS[kind] else pair,
    )


def _write_rope(config: LanguageModelConfig) -> dict:
    scaling, parameters = config.rope_scaling, {"rope_type": "default", "rope_theta": config.rope_base}
    if scaling is None:
        return {"rope_parameters": parameters}
    if scaling.kind == "ntk":
        raise ValueError("rope_scaling must not be of kind 'ntk', which transformers has only as 'dynamic'")
    parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "dynamic":
        return {"rope_parameters": parameters, "max_position_embeddings": scaling.original_length}
    if scaling.kind in TURNS:
        parameters["original_max_position_embeddings"] = scaling.original_length
        few, many = scaling.turns or TURNS[scaling.kind]
        yarn = scaling.kind == "yarn"
        parameters["beta_slow" if yarn else "low_freq_factor"] = few
        parameters["beta_fast" if yarn else "high_freq_factor"] = many
    return {"rope_parameters": parameters}


def _config_of_gguf(file: GGUFFile, origin: str) -> LanguageModelConfig:
    """The configuration in the metadata, rotary pairs as they are stored."""
    kind = file.metadata.get("general.architecture")
    if kind not in KINDS:
        raise ValueError(f"{origin} must be of architecture {', '.join(KINDS)}, got {kind!r}")

    def entry(name: str, types: type | tuple, default=...):
        value = file.metadata.get(f"{kind}.{name}", default)
        if value is ...:
            raise ValueError(f"{origin} must have {kind}.{name}")
        if value is not default and (not isinstance(value, types) or isinstance(value, bool)):
            raise ValueError(f"{origin} must have {kind}.{name} as a number, got {type(value).__name__}")
        return value

    number = (int, float)
    heads, d_model = entry("attention.head_count", int), entry("embedding_length", int)
    head_dim = entry("attention.key_length", int, None)
    max_length = entry("context_length", int)
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{origin} must have a tensor token_embd.weight")
    config = LanguageModelConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        d_model=d_model,
        num_layers=entry("block_count", int),
        num_heads=heads,
        num_kv_heads=entry("attention.head_count_kv", int, heads),
        d_ff=entry("feed_forward_length", int),
        max_length=max_length,
        bias=False,
        qkv_bias=True if kind == "qwen2" else None,
        qk_norm=kind == "qwen3",
        head_dim=head_dim if heads < 1 or head_dim != d_model / heads else None,
        norm_eps=entry("attention.layer_norm_rms_epsilon", number),
        tie_output="output.weight" not in file.tensors,
        rope_base=entry("rope.freq_base", number, 10000.0),
        rope_scaling=_scaling_of_gguf(entry, max_length),
        rope_layout="interleaved" if kind == "llama" else "half",
        **_FIXED,
    )
    for name in ("rope.dimension_count", "attention.value_length"):
        if entry(name, int, config.d_k) != config.d_k:
            raise ValueError(f"{origin} must have {kind}.{name} equal to the heads' size {config.d_k}")
    return config


def _scaling_of_gguf(entry, max_length: int) -> RopeScaling | None:
    kind = entry("rope.scaling.type", str, "none")
    check_choice("rope.scaling.type", kind, ("none", "linear", "yarn"))
    if kind == "none":
        return None
    original = entry("rope.scaling.original_context_length", int, max_length)
    return RopeScaling(kind, entry("rope.scaling.factor", (int, float)), original)


class _RowOrder:
    """Rows of queries and keys for another layout of rotary pairs; every other tensor as it is.

    Args:
        config: with the layout that the tensors have.
        layout: the one they shall have.

    Attributes:
        config: with that layout.
    """

    def __init__(self, config: LanguageModelConfig, layout: str):
        order = rotary_permutation(config.d_k)
        self._order = order if layout == "half" else order.argsort()
        self._is_other = config.rope_layout != layout
        self.config = replace(config, rope_layout=layout)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if not self._is_other or not name.endswith((*_TURNED, *_TURNED_NORMS)):
            return x
        return x.unflatten(0, (-1, self.config.d_k))[:, self._order].flatten(0, 1)


@torch.no_grad()
def _laid_out(model: LanguageModel, layout: str) -> LanguageModel:
    """The model itself where its rotary pairs are laid out so, else one with its rows permuted."""
    if model.config.rope_layout == layout:
        return model
    place = _RowOrder(model.config, layout)
    other = blank(place.config)
    other.load_state_dict({name: place(name, x) for name, x in model.state_dict().items()}, assign=True)
    return other.train(model.training)


@torch.no_grad()
def _kept_quantised(
    file: GGUFFile,
    place: _RowOrder,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    quantised: str,
    origin: str,
) -> LanguageModel:
    """The model with each matrix in its quantised form, one after the other, and all else in `dtype`."""
    _check_plausible(place.config, shapes, origin)
    model, names = blank(place.config), tensor_names(place.config, "gguf")
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _check_shapes({theirs: own[ours] for ours, theirs in names.items()}, shapes, origin)
    vectors = {
        ours: place(ours, file.tensor(theirs, dtype))
        for ours, theirs in names.items()
        if len(shapes[theirs]) == 1
    }
    for ours in (name for name in names if name not in vectors):
        info, owner = file.tensors[names[ours]], ours.removesuffix(".weight")
        if owner == "embedding":
            kind, options = QuantizedEmbedding, {"dtype": dtype}
        else:
            kind, options = QuantizedLinear, {"bias": vectors.get(f"{owner}.bias")}
        if quantised == "blocks":
            raw = torch.tensor(file.raw(info.name).reshape(info.shape[0], -1))
            matrix = kind(place(ours, raw), info.type, **options)
        else:
            matrix = kind.quantise(place(ours, file.tensor(info.name)), **options)
        model.set_submodule(owner, matrix)
    model.load_state_dict(vectors, strict=False, assign=True)
    return model.eval()


_TURNED = tuple(f"{name}_proj.{part}" for name in ("query", "key") for part in ("weight", "bias"))
_TURNED_NORMS = ("query_norm.gain", "key_norm.gain")
