"""Matrices that stay quantised: the product, the embedding, and SmolLM2 kept so."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from companion.data.assets import asset_path
from companion.embeddings import TokenEmbedding
from companion.models.llama import load_gguf
from companion.quantize import kernels, linear, uniform
from companion.quantize.linear import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "F16")


@pytest.fixture(params=[1, 1 << 18], ids=["row by row", "pieces"])
def piece(request, monkeypatch):
    """How many weights are decoded at once must not matter."""
    monkeypatch.setattr(linear, "_PIECE", request.param)


def judged(layer: QuantizedMatrix) -> torch.Tensor:
    """The weights of GGUF blocks by the `gguf` package."""
    gguf = pytest.importorskip("gguf")
    type_ = gguf.GGMLQuantizationType[layer.type]
    raw = layer.weight.numpy()
    if layer.type == "F16":  # the package asks for its bytes as halves
        raw = raw.view(np.float16)
    return torch.from_numpy(gguf.quants.dequantize(raw, type_).astype(np.float32))


@pytest.mark.verifies("companion.quantize.linear.QuantizedLinear", against="torch._weight_int8pack_mm")
@pytest.mark.parametrize("shape", [(1, 37), (3, 5, 37)])
def test_int8_product(agree, piece, shape):
    weight, bias, x = torch.randn(45, 37), torch.randn(45), torch.randn(shape)
    layer = QuantizedLinear.quantise(weight, bias=bias)
    theirs = torch._weight_int8pack_mm(x.flatten(0, -2), layer.weight, layer.scale)
    theirs = theirs.unflatten(0, shape[:-1]) + bias
    agree(layer(x), theirs, tolerance=1e-5, quantity="output, int8 a row")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.rows() - weight).abs() <= step / 2 + 1e-6).all()


@pytest.mark.verifies("companion.quantize.linear.QuantizedMatrix", against="gguf.quants.dequantize")
@pytest.mark.verifies("companion.quantize.linear.QuantizedLinear", against="gguf.quants.dequantize")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("type_", TYPES)
def test_product_with_blocks(agree, piece, type_, dtype):
    layer = QuantizedLinear.quantise(torch.randn(7, 256), type_)
    weight, x = judged(layer), torch.randn(3, 5, 256, dtype=dtype, requires_grad=True)
    agree(layer.rows(), weight, tolerance=0.0, quantity="decoded rows")
    y = layer(x)
    assert y.dtype == dtype
    agree(y, F.linear(x, weight.to(dtype)), tolerance=2e-5, quantity="output")
    dy = torch.randn_like(y)
    dx = torch.autograd.grad(y, x, dy)[0]
    agree(dx, dy @ weight.to(dtype), tolerance=2e-5, quantity="gradient of the input")


@pytest.mark.verifies("companion.quantize.kernels.multiply", against="gguf.quants.dequantize")
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_compiled_product_with_blocks(agree, type_, rows):
    columns = 512 if type_.endswith("K") else 96
    layer = QuantizedLinear.quantise(torch.randn(rows, columns), type_)
    assert type_ in linear._compiled().PRODUCTS
    weight = judged(layer).double()
    for shape in ((), (1, 1), (2, 4)):
        x = torch.randn(*shape, 2 * columns)[..., ::2]  # not contiguous
        with torch.no_grad():
            agree(layer(x), F.linear(x.double(), weight).float(), tolerance=2e-5, quantity="output")


@pytest.mark.verifies("companion.quantize.kernels.multiply", against="torch._weight_int8pack_mm")
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_compiled_product_with_int8(agree, rows):
    layer, x = QuantizedLinear.quantise(torch.randn(rows, 37)), torch.randn(8, 37)
    theirs = torch._weight_int8pack_mm(x, layer.weight, layer.scale)
    agree(layer(x), theirs, tolerance=1e-5, quantity="output, int8 a row")


def test_the_compiled_product_refuses_what_it_would_read_beyond():
    raw, x = np.zeros((3, 36), np.uint8), np.zeros((2, 64), np.float32)
    assert kernels.multiply(raw, "Q4_0", x).shape == (2, 3)
    for arguments, match in (
        ((raw, "Q2_K", x), "type must be one of 'int8', 'Q4_0'"),
        ((raw[:, :35], "Q4_0", x), r"raw must hold rows of whole blocks of Q4_0, got uint8 \(3, 35\)"),
        ((raw, "int8", x), "raw must hold rows of whole blocks of int8, got uint8"),
        ((raw, "Q4_0", x[:, :32]), r"x must be float32 with the columns of raw \(3, 36\), got .* \(2, 32\)"),
        ((raw, "Q4_0", x.astype(np.float64)), "x must be float32"),
        ((raw, "Q4_0", x, np.ones(3)), "scale must be one number a row for int8 and None for blocks"),
        ((raw.view(np.int8), "int8", x[:, :36], np.ones(2)), "scale must be one number a row"),
    ):
        with pytest.raises(ValueError, match=match):
            kernels.multiply(*arguments)


def test_an_infinite_scale_is_no_number_in_both_products(monkeypatch):
    layer = QuantizedLinear.quantise(torch.randn(5, 32), "Q4_0")
    layer.weight[2, :2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # float16's infinity
    x = torch.ones(1, 32)
    found = layer(x)
    monkeypatch.setattr(linear, "_compiled", lambda: None)
    assert torch.equal(found.isfinite(), layer(x).isfinite())
    assert found.isfinite().tolist() == [[True, True, False, True, True]]


@pytest.mark.parametrize("type_", ["int8", "Q4_1"])
def test_serves_without_numba(monkeypatch, type_):
    layer, x = QuantizedLinear.quantise(torch.randn(6, 64), type_), torch.randn(2, 64)
    compiled = layer(x)
    monkeypatch.setitem(sys.modules, "companion.quantize.kernels", None)
    monkeypatch.delattr("companion.quantize.kernels", raising=False)
    linear._compiled.cache_clear()
    try:
        assert linear._compiled() is None
        torch.testing.assert_close(layer(x), compiled, rtol=1e-5, atol=1e-5)
    finally:
        linear._compiled.cache_clear()


@pytest.mark.verifies("companion.quantize.linear.QuantizedEmbedding", against="gguf.quants.dequantize")
def test_embedding_and_tied_logits(agree, piece):
    embedding = QuantizedEmbedding.quantise(torch.randn(19, 64), "Q4_1")
    weight, ids = judged(embedding), torch.tensor([[3, 18, 0], [3, 7, 7]])
    agree(embedding.lookup(ids), weight[ids], tolerance=0.0, quantity="rows looked up")
    agree(embedding(ids), weight[ids] * 8, tolerance=1e-6, quantity="vectors")
    hidden = torch.randn(2, 3, 64)
    agree(embedding.logits(hidden), hidden @ weight.T, tolerance=1e-5, quantity="tied logits")
    plain = TokenEmbedding(19, 64)
    plain.weight.data = weight
    assert torch.equal(plain.lookup(ids), embedding.lookup(ids))
    half = QuantizedEmbedding.quantise(weight, dtype=torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16


def test_quantises_large_matrices_in_parts(monkeypatch):
    weight = torch.randn(9, 31)
    whole = uniform.quantise(weight, 8, axis=0)
    monkeypatch.setattr(linear, "_QUANTISED_AT_ONCE", 62)
    layer = QuantizedMatrix.quantise(weight)
    assert torch.equal(layer.weight, whole.values) and torch.equal(layer.scale, whole.scale)


def test_state_survives_saving():
    layer = QuantizedLinear.quantise(torch.randn(4, 32), "Q4_0", bias=torch.randn(4))
    other = QuantizedLinear.quantise(torch.randn(4, 32), "Q4_0", bias=torch.zeros(4))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 32)
    assert torch.equal(other(x), layer(x))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def bytes_of(model: torch.nn.Module) -> int:
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


@pytest.mark.verifies("companion.models.llama.load_gguf", against="the same weights in float32")
def test_smollm2_kept_quantised(agree):
    path, ids = asset_path("smollm2"), torch.arange(100, 133)[None]
    with torch.no_grad():
        plain = load_gguf(path)
        size, theirs = bytes_of(plain), plain(ids)
        del plain
        for kind, share in (("blocks", 0.2), ("int8", 0.26)):
            model = load_gguf(path, quantised=kind)
            assert bytes_of(model) <= share * size  # embedding and tied output included
            assert not any(x.is_meta for x in [*model.parameters(), *model.buffers()])
            logits = model(ids)
            if kind == "blocks":
                agree(logits, theirs, tolerance=1e-3, quantity="SmolLM2's logits, blocks kept")
                cache = model.new_cache()
                model.hidden(ids[:, :-1], cache=cache)
                step = model(ids[:, -1:], cache=cache)
                assert (step - theirs[:, -1:]).abs().max() < 1e-3
            else:  # the weights are rounded once more
                assert (logits - theirs).square().mean().sqrt() < 0.1 * theirs.std()
            del model


@pytest.mark.parametrize("kind", ["blocks", "int8"])
def test_layouts_and_biases_of_a_kept_model(tmp_path, kind):
    """A small Qwen2 and a small Llama, written by our writer: every layout, biases, an output of its own."""
    from companion.models.language_model import LanguageModel, LanguageModelConfig
    from companion.models.llama import tensor_names
    from companion.quantize.blocks import quantise
    from companion.quantize.gguf import write_gguf

    ids = torch.tensor([[1, 5, 9, 2, 40]])
    for architecture in ("llama", "qwen2"):
        config = LanguageModelConfig(
            vocab_size=43,
            d_model=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            d_ff=96,
            activation="swiglu",
            norm="rms",
            position="rotary",
            rope_layout="interleaved" if architecture == "llama" else "half",
            bias=False,
            qkv_bias=architecture == "qwen2" or None,
            tie_output=architecture == "llama",
            scale_embedding=False,
            norm_eps=1e-5,
        )
        state = LanguageModel(config).state_dict()
        state = {name: torch.randn_like(x) * 0.3 for name, x in state.items()}
        tensors = {
            theirs: (quantise(state[ours], "Q8_0").reshape(-1), "Q8_0", tuple(state[ours].shape))
            if state[ours].dim() == 2
            else state[ours]
            for ours, theirs in tensor_names(config, "gguf").items()
        }
        sizes = {"embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "context_length": 512}
        sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2}
        metadata = {f"{architecture}.{name}": value for name, value in sizes.items()}
        metadata[f"{architecture}.attention.layer_norm_rms_epsilon"] = 1e-5
        path = tmp_path / f"{architecture}.gguf"
        write_gguf(path, {"general.architecture": architecture} | metadata, tensors)
        with torch.no_grad():
            for layout in ("half", "interleaved"):
                plain = load_gguf(path, rope_layout=layout)
                kept = load_gguf(path, rope_layout=layout, quantised=kind)
                assert kept.config == plain.config and not kept.training
                expected = plain(ids)
                error = (kept(ids) - expected).abs().max() / expected.abs().max()
                assert error < (1e-5 if kind == "blocks" else 0.05)
                assert kept.embedding.weight.dtype == (torch.uint8 if kind == "blocks" else torch.int8)


CHAT = """
import sys, torch
torch.set_num_threads(1)
from companion.chat import LocalChatModel, Message
from companion.data.assets import asset_path
from companion.models.llama import load_gguf
from companion.quantize.gguf import GGUFFile
from companion.tokenizers.bpe import BPETokenizer

path = asset_path("smollm2")
with GGUFFile.open(path) as file:
    tokenizer = BPETokenizer.from_gguf(file.metadata)
kind = None if sys.argv[1] == "None" else sys.argv[1]
chat = LocalChatModel(load_gguf(path, quantised=kind), tokenizer)
words = chat.complete([Message("user", "Name a colour.")], max_tokens=4)
assert words, "the model said nothing"
print(open("/proc/self/status").read())  # resource's maximum would count the process that started this one
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("kind", "megabytes"), [("None", 900), ("blocks", 560)])
def test_a_chat_stays_within_its_memory(kind, megabytes):
    """The peak of a whole process, Python, PyTorch and the mapped file included."""
    run = subprocess.run([sys.executable, "-c", CHAT, kind], capture_output=True, text=True, check=True)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", run.stdout)[1]) / 1000
    assert peak <= megabytes


def test_bad_input():
    rows = torch.zeros(3, 18, dtype=torch.uint8)
    with pytest.raises(ValueError, match="type must be one of 'int8', 'F32'"):
        QuantizedMatrix(rows, "Q9_0")
    with pytest.raises(TypeError, match=r"weight must be torch.int8 for int8, got torch.uint8"):
        QuantizedMatrix(rows, "int8")
    with pytest.raises(TypeError, match=r"weight must be torch.uint8 for Q4_0, got torch.float32"):
        QuantizedMatrix(torch.zeros(3, 18), "Q4_0")
    with pytest.raises(ValueError, match=r"rows of whole blocks of 20 bytes for Q4_1, got shape \(3, 18\)"):
        QuantizedMatrix(rows, "Q4_1")
    with pytest.raises(ValueError, match="scale must be given for int8"):
        QuantizedMatrix(rows.view(torch.int8), "int8")
    with pytest.raises(ValueError, match="scale must be None for Q4_0"):
        QuantizedMatrix(rows, "Q4_0", torch.ones(3))
    with pytest.raises(ValueError, match=r"scale must have shape \(3,\), got \(2,\)"):
        QuantizedMatrix(rows.view(torch.int8), "int8", torch.ones(2))
    with pytest.raises(ValueError, match=r"bias must have shape \(..., 3\), got \(4,\)"):
        QuantizedLinear(rows, "Q4_0", bias=torch.ones(4))
    with pytest.raises(ValueError, match=r"weight must be a matrix that is not empty, got shape \(4,\)"):
        QuantizedLinear.quantise(torch.ones(4))
    with pytest.raises(ValueError, match=r"x must have shape \(..., 32\), got \(2, 31\)"):
        QuantizedLinear(rows, "Q4_0")(torch.ones(2, 31))
    with pytest.raises(ValueError, match="ids must lie in 0 … 2"):
        QuantizedEmbedding(rows, "Q4_0")(torch.tensor([3]))
    with pytest.raises(ValueError, match="quantised must be one of None, 'int8', 'blocks', got 'int4'"):
        load_gguf("nowhere.gguf", quantised="int4")
