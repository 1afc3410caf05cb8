"""What is timed. Each function returns comparisons or growths; `small` makes them quick enough to try out."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Comparison, Growth
from benchmarks.peers import TorchTransformer
from companion import autograd as ag
from companion.attention import MultiHeadAttention, scaled_dot_product_attention
from companion.feedforward import SwiGLU
from companion.generate import min_p, temperature, top_k, top_p, typical
from companion.generate.decoding import greedy_search
from companion.models.bert import SentenceEncoder
from companion.models.transformer import Transformer, TransformerConfig
from companion.norm import LayerNorm, RMSNorm
from companion.position import RotaryEmbedding
from companion.quantize.blocks import dequantise, quantise
from companion.recurrent import GRU, LSTM
from companion.tokenizers.bpe import BPETokenizer
from companion.tokenizers.unigram import UnigramTokenizer
from companion.train.loss import cross_entropy
from companion.train.optim import Adam

PAD, BOS, EOS = 0, 1, 2


def training_step(small: bool) -> Iterator[Comparison]:
    """Forward, loss, backward and update of a sequence-to-sequence model, float32 and bf16 autocast."""
    width, layers, vocab, batch, length = (32, 1, 50, 2, 6) if small else (256, 3, 8000, 16, 32)
    config = TransformerConfig(
        vocab,
        d_model=width,
        num_heads=4,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        d_ff=4 * width,
        dropout=0.0,
    )
    source, target, labels = (torch.randint(3, vocab, (batch, length)) for _ in range(3))
    source[1, length // 2 :] = PAD

    def step(
        model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable, dtype: torch.dtype | None
    ):
        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                logits = model(source, target)
            loss_fn(logits.float(), labels).backward()
            optimizer.step()

        return lambda: run

    for dtype, name in ((None, "float32"), (torch.bfloat16, "bf16 autocast")):
        torch.manual_seed(0)
        ours, theirs = Transformer(config), TorchTransformer(config)
        theirs.core.encoder.norm = theirs.core.decoder.norm = None  # the paper has no norm after the stacks
        yield Comparison(
            f"Training step, {name}",
            f"{layers} + {layers} layers of {width}, {vocab:,} tokens, batch {batch} × {length}, no dropout",
            "torch.nn.Transformer",
            step(ours, Adam(ours.parameters()), cross_entropy, dtype),
            step(theirs, torch.optim.Adam(theirs.parameters()), _torch_cross_entropy, dtype),
            at_most=1.05,
        )


def attention(small: bool) -> Iterator[Comparison]:
    """Attention without weights, plain and causal, and a multi-head layer forward and backward."""
    batch, heads, length, size = (1, 2, 8, 4) if small else (8, 8, 256, 64)
    query, key, value = (torch.randn(batch, heads, length, size) for _ in range(3))
    work = f"{batch} × {heads} heads × {length} positions × {size}, forward"
    for causal in (False, True):

        def ours(causal=causal) -> Tensor:
            return scaled_dot_product_attention(query, key, value, causal=causal)

        def theirs(causal=causal) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

        yield Comparison(
            "Causal attention" if causal else "Attention",
            work,
            "torch.nn.functional.scaled_dot_product_attention",
            lambda run=ours: run,
            lambda run=theirs: run,
            at_most=1.1,
        )
    width = heads * size
    layer, peer = MultiHeadAttention(width, heads), nn.MultiheadAttention(width, heads, batch_first=True)
    x = torch.randn(batch, length, width, requires_grad=True)
    yield Comparison(
        "Multi-head attention",
        f"{batch} × {length} positions × {width}, forward and backward",
        "torch.nn.MultiheadAttention",
        lambda: lambda: layer(x).sum().backward(),
        lambda: lambda: peer(x, x, x, need_weights=False)[0].sum().backward(),
        at_most=1.1,
    )


def layer_norm(small: bool) -> Iterator[Comparison]:
    """Forward and backward over a batch of tokens."""
    shape = (2, 4, 8) if small else (16, 256, 512)
    x = torch.randn(shape, requires_grad=True)
    ours, theirs = LayerNorm(shape[-1]), nn.LayerNorm(shape[-1])
    yield Comparison(
        "Layer normalisation",
        f"{shape[0] * shape[1]:,} vectors of {shape[2]}, forward and backward",
        "torch.nn.LayerNorm",
        lambda: lambda: ours(x).sum().backward(),
        lambda: lambda: theirs(x).sum().backward(),
        at_most=1.1,
    )


def rms_norm(small: bool) -> Iterator[Comparison]:
    """Forward and backward over a batch of tokens."""
    shape = (2, 4, 8) if small else (16, 256, 512)
    x = torch.randn(shape, requires_grad=True)
    ours, theirs = RMSNorm(shape[-1]), nn.RMSNorm(shape[-1], eps=1e-6)
    yield Comparison(
        "Root-mean-square normalisation",
        f"{shape[0] * shape[1]:,} vectors of {shape[2]}, forward and backward",
        "torch.nn.RMSNorm",
        lambda: lambda: ours(x).sum().backward(),
        lambda: lambda: theirs(x).sum().backward(),
        at_most=1.5,
    )


def swiglu(small: bool) -> Iterator[Comparison]:
    """Forward and backward of a gated feed-forward network over a batch of tokens."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    batch, length, width, hidden = (2, 4, 8, 12) if small else (4, 256, 256, 688)
    x = torch.randn(batch, length, width, requires_grad=True)
    config = LlamaConfig(hidden_size=width, intermediate_size=hidden, num_attention_heads=1)
    ours, theirs = SwiGLU(width, hidden), LlamaMLP(config)
    yield Comparison(
        "SwiGLU",
        f"{batch * length:,} vectors of {width}, {hidden} hidden units, forward and backward",
        "transformers.models.llama.modeling_llama.LlamaMLP",
        lambda: lambda: ours(x).sum().backward(),
        lambda: lambda: theirs(x).sum().backward(),
        at_most=1.5,
    )


def rotary(small: bool) -> Iterator[Comparison]:
    """Rotary positions on the queries and keys of a layer, cos and sin at hand, forward and backward."""
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as turn_neighbours
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn_halves

    batch, heads, length, size = (1, 2, 5, 4) if small else (4, 8, 256, 64)
    leaves = [torch.randn(batch, length, heads, size, requires_grad=True) for _ in range(2)]
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    angles = angles.expand(batch, length, size // 2)
    cos, sin = angles.cos(), angles.sin()
    doubled = (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))

    def ours(layout: str) -> Callable:
        module = RotaryEmbedding(size, layout=layout)

        def run() -> None:
            query, key = (module(x.transpose(1, 2)) for x in leaves)
            (query.sum() + key.sum()).backward()

        return lambda: run

    def half() -> None:
        query, key = turn_halves(*(x.transpose(1, 2) for x in leaves), *doubled)
        (query.sum() + key.sum()).backward()

    def interleaved() -> None:
        query, key = (turn_neighbours(x, sin, cos).transpose(1, 2) for x in leaves)
        (query.sum() + key.sum()).backward()

    for layout, model, theirs in (("half", "llama", half), ("interleaved", "gptj", interleaved)):
        yield Comparison(
            f"Rotary positions, {layout}",
            f"queries and keys, {batch} × {heads} heads × {length} positions × {size}, forward and backward",
            f"transformers.models.{model}.modeling_{model}.apply_rotary_pos_emb",
            ours(layout),
            lambda run=theirs: run,
            at_most=1.5,
        )


def loss(small: bool) -> Iterator[Comparison]:
    """Cross-entropy with label smoothing over a vocabulary, forward and backward."""
    tokens, vocab = (6, 11) if small else (512, 8000)
    logits = torch.randn(tokens, vocab, requires_grad=True)
    targets = torch.randint(3, vocab, (tokens,))
    targets[::5] = PAD
    options = dict(ignore_index=PAD, label_smoothing=0.1)
    yield Comparison(
        "Cross-entropy",
        f"{tokens:,} tokens, vocabulary {vocab:,}, label smoothing, forward and backward",
        "torch.nn.functional.cross_entropy",
        lambda: lambda: cross_entropy(logits, targets, **options).backward(),
        lambda: lambda: F.cross_entropy(logits, targets, **options).backward(),
        at_most=1.1,
    )


def optimizer(small: bool) -> Iterator[Comparison]:
    """An update of the parameters of a small Transformer."""
    width, vocab = (8, 20) if small else (256, 8000)
    config = TransformerConfig(
        vocab, d_model=width, num_heads=2, num_encoder_layers=3, num_decoder_layers=3, d_ff=4 * width
    )
    updates = []
    for make in (Adam, torch.optim.Adam):
        model = Transformer(config)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        updates.append(make(model.parameters(), lr=1e-4).step)
    count = sum(parameter.numel() for parameter in model.parameters())
    yield Comparison(
        "Adam step",
        f"{count / 1e6:.1f} M parameters in {len(list(model.parameters()))} tensors",
        "torch.optim.Adam",
        lambda: updates[0],
        lambda: updates[1],
        at_most=1.1,
    )


def decoding(small: bool) -> Iterator[Comparison | Growth]:
    """Greedy decoding with keys and values cached, and with the whole prefix run again at each step."""
    width, vocab, longest = (16, 30, 8) if small else (256, 1000, 256)
    config = TransformerConfig(
        vocab, d_model=width, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, d_ff=4 * width
    )
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        model.target_embedding.weight[EOS] = (
            0  # a logit of 0 is never the largest: decoding runs to its limit
        )
    source = torch.randint(3, vocab, (4, 16))

    def search(length: int, use_cache: bool) -> Callable:
        def run() -> None:
            ids = greedy_search(model, source, bos_id=BOS, eos_id=EOS, max_length=length, use_cache=use_cache)
            if min(map(len, ids)) < length:
                raise RuntimeError("decoding stopped before the length that was to be timed")

        return lambda: run

    yield Comparison(
        "Cached greedy decoding",
        f"{longest} tokens for 4 sources, 2 + 2 layers of {width}",
        "the same model, running the prefix again",
        search(longest, True),
        search(longest, False),
        at_most=1.0,
    )
    sizes = [longest >> shift for shift in (3, 2, 1, 0)]
    yield Growth(
        "Cached greedy decoding",
        "cost of a token against the tokens decoded",
        sizes,
        lambda length: search(length, True),
        units=lambda length: length,
        at_most=0.25,
    )
    yield Growth(
        "Decoding without a cache",
        "cost of a token against the tokens decoded",
        sizes,
        lambda length: search(length, False),
        units=lambda length: length,
    )


def sampling_filters(small: bool) -> Iterator[Comparison]:
    """Logits of a large vocabulary filtered: the usual chain, and each filter that must look at all."""
    from transformers.generation import logits_process as peer

    rows, vocab = (2, 40) if small else (16, 50_000)
    ids, peaked, flat = torch.zeros(rows, 1, dtype=torch.long), *torch.randn(2, rows, vocab)
    peaked = 3 * peaked
    nucleus = partial(top_p, p=0.9), peer.TopPLogitsWarper(0.9)
    chain = (
        (partial(temperature, value=0.7), peer.TemperatureLogitsWarper(0.7)),
        (partial(top_k, k=50), peer.TopKLogitsWarper(50)),
        nucleus,
    )
    cases = {
        "temperature, top-k and top-p": (peaked, chain),
        "top-p": (peaked, (nucleus,)),
        "top-p of a flat distribution": (flat, (nucleus,)),
        "min-p": (peaked, ((partial(min_p, p=0.1), peer.MinPLogitsWarper(0.1)),)),
        "typical": (peaked, ((partial(typical, p=0.9), peer.TypicalLogitsWarper(0.9)),)),
    }
    for name, (logits, pairs) in cases.items():

        def ours(logits=logits, pairs=pairs) -> None:
            for mine, _ in pairs:
                logits = mine(logits, ids)

        def theirs(logits=logits, pairs=pairs) -> None:
            for _, other in pairs:
                logits = other(ids, logits)

        yield Comparison(
            f"Sampling filters: {name}",
            f"{rows} × {vocab:,} logits",
            "transformers.generation.logits_process",
            lambda run=ours: run,
            lambda run=theirs: run,
            at_most=1.2,
        )


def tokenizer(small: bool) -> Iterator[Comparison]:
    """Training and encoding with byte-level BPE on the English–French pairs, caches empty at the start."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    merges, size = (50, 5_000) if small else (8_000, 2_000_000)
    texts = _texts(size)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def peer() -> Tokenizer:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = byte_level, decoders.ByteLevel()
        return made

    def train_peer() -> Callable:
        made = peer()
        trainer = trainers.BpeTrainer(
            vocab_size=256 + merges, initial_alphabet=byte_level.alphabet(), show_progress=False
        )

        def run() -> Tokenizer:
            made.train_from_iterator(texts, trainer)
            return made

        return run

    yield Comparison(
        "BPE training",
        f"{merges:,} merges on {megabytes:.1f} MB",
        "tokenizers.trainers.BpeTrainer",
        lambda: lambda: BPETokenizer.train(texts, vocab_size=256 + merges),
        train_peer,
        at_most=2.0,
    )
    ours, theirs = BPETokenizer.train(texts, vocab_size=256 + merges), train_peer()()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bpe.json"
        ours.save(path)
        serialised = theirs.to_str()

        def encode_ours() -> Callable:
            loaded = BPETokenizer.load(path)
            return lambda: loaded.encode_batch(texts)

        def encode_theirs() -> Callable:
            loaded = Tokenizer.from_str(serialised)
            return lambda: [encoding.ids for encoding in loaded.encode_batch(texts)]

        yield Comparison(
            "BPE encoding",
            f"{megabytes:.1f} MB in {len(texts):,} lines, {merges:,} merges",
            "tokenizers.Tokenizer.encode_batch",
            encode_ours,
            encode_theirs,
        )


def unigram(small: bool) -> Iterator[Comparison]:
    """Training of a unigram vocabulary on the English–French pairs, one thread."""
    import io

    import sentencepiece

    pieces, size = (300, 20_000) if small else (6_000, 1_000_000)
    texts = _texts(size)

    def train_peer() -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=pieces,
            model_type="unigram",
            normalization_rule_name="identity",
            num_threads=1,
            minloglevel=2,
        )
        return model.getvalue()

    yield Comparison(
        "Unigram training",
        f"{pieces:,} pieces on {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB",
        "sentencepiece.SentencePieceTrainer",
        lambda: lambda: UnigramTokenizer.train(texts, pieces),
        lambda: train_peer,
        at_most=4.5,
    )


def autograd(small: bool) -> Iterator[Comparison]:
    """A training step of a small language model over numpy arrays, beside the same model in PyTorch."""
    vocab, width, layers, heads, batch, length = (11, 8, 1, 2, 2, 5) if small else (65, 64, 2, 4, 16, 32)
    torch.manual_seed(0)
    peer = TorchLanguageModel(vocab, width, layers, heads, length)
    parameters = {
        name: ag.Tensor(weight.detach().numpy(), requires_grad=True)
        for name, weight in peer.named_parameters()
    }
    ids = torch.randint(vocab, (batch, length + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def ours() -> None:
        logits = autograd_language_model(parameters, inputs.numpy(), heads)
        ag.cross_entropy(logits, targets.numpy()).backward()
        for parameter in parameters.values():
            parameter.data, parameter.grad = parameter.data - 1e-4 * parameter.grad, None

    descent = torch.optim.SGD(peer.parameters(), lr=1e-4)

    def theirs() -> None:
        descent.zero_grad()
        _torch_cross_entropy(peer(inputs), targets).backward()
        descent.step()

    yield Comparison(
        "Automatic differentiation over numpy",
        f"training step, {layers} layers of {width}, {vocab} tokens, batch {batch} × {length}, float32",
        "torch.autograd",
        lambda: ours,
        lambda: theirs,
        at_most=3.0,
    )


def autograd_language_model(
    parameters: Mapping[str, ag.Tensor], ids: np.ndarray, num_heads: int
) -> ag.Tensor:
    """A pre-norm Transformer language model as a function of its parameters, under PyTorch's names.

    Shape: ids (batch, n) → logits (batch, n, vocab).
    """
    batch, length = ids.shape
    x = ag.embedding(parameters["embedding.weight"], ids) + parameters["position.weight"][:length]
    future = np.triu(np.ones((length, length), bool), 1)
    layers = sum(name.endswith("in_proj_weight") for name in parameters)
    for layer in range(layers):
        begin = f"encoder.layers.{layer}."
        p = {name.removeprefix(begin): t for name, t in parameters.items() if name.startswith(begin)}
        h = ag.layer_norm(x, p["norm1.weight"], p["norm1.bias"])
        h = h @ p["self_attn.in_proj_weight"].T + p["self_attn.in_proj_bias"]
        query, key, value = h.reshape(batch, length, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
        scores = query @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
        heads = ag.softmax(ag.masked_fill(scores, future, -np.inf)) @ value  # (batch, heads, n, d_k)
        h = heads.swapaxes(1, 2).reshape(batch, length, -1)
        x = x + h @ p["self_attn.out_proj.weight"].T + p["self_attn.out_proj.bias"]
        h = ag.layer_norm(x, p["norm2.weight"], p["norm2.bias"])
        h = ag.gelu(h @ p["linear1.weight"].T + p["linear1.bias"])
        x = x + h @ p["linear2.weight"].T + p["linear2.bias"]
    x = ag.layer_norm(x, parameters["encoder.norm.weight"], parameters["encoder.norm.bias"])
    return x @ parameters["output.weight"].T


class TorchLanguageModel(nn.Module):
    """The same model from PyTorch's encoder and a causal mask. Shape: ids (batch, n) → (batch, n, vocab)."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, length: int):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
        gelu = partial(F.gelu, approximate="tanh")
        options = dict(activation=gelu, dropout=0.0, batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.output = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        length, dtype = ids.shape[1], self.output.weight.dtype
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)
        x = self.embedding(ids) + self.position.weight[:length]
        return self.output(self.encoder(x, mask, is_causal=True))


def _texts(size: int) -> list[str]:
    """Lines of the training pairs, English and French in turn, of `size` bytes together."""
    from companion.data.translation import load_pairs

    texts, total = [], 0
    for pair in load_pairs().train:
        for text in (pair.source, pair.target):
            if total >= size:
                return texts
            texts.append(text)
            total += len(text.encode())
    return texts


def _torch_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def recurrent(small: bool) -> Iterator[Comparison]:
    """A recurrent layer forward and backward. PyTorch's LSTM calls oneDNN's kernel where the CPU has one."""
    batch, length, size = (2, 5, 4) if small else (32, 64, 256)
    x = torch.randn(batch, length, size, requires_grad=True)
    for ours, theirs, at_most in (
        (LSTM(size, size), nn.LSTM(size, size, batch_first=True), 1.5),
        (GRU(size, size), nn.GRU(size, size, batch_first=True), 1.1),
    ):
        yield Comparison(
            type(ours).__name__,
            f"{batch} × {length} steps of {size}, forward and backward",
            f"torch.nn.{type(theirs).__name__}",
            lambda net=ours: lambda: net(x)[0].sum().backward(),
            lambda net=theirs: lambda: net(x)[0].sum().backward(),
            at_most=at_most,
        )


def gguf_header(small: bool) -> Iterator[Comparison]:
    """A model file opened: metadata and each tensor's place. The judge leaves the metadata as raw bytes."""
    from companion.data.assets import asset_path
    from companion.quantize.gguf import GGUFFile, write_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.gguf" if small else asset_path("smollm2")
        if small:
            write_gguf(path, {"words": ["a", "b"]}, {"weight": torch.zeros(3, 5)})

        def theirs() -> Callable:
            from gguf import GGUFReader

            return lambda: GGUFReader(path)

        yield Comparison(
            "Opening a GGUF file",
            f"the header of a file of {path.stat().st_size:,} bytes",
            "gguf.GGUFReader",
            lambda: lambda: GGUFFile.open(path),
            theirs,
            at_most=0.1,
        )


def gguf_decoding(small: bool) -> Iterator[Comparison]:
    """The blocks of a GGUF file back to float32."""
    from gguf import GGMLQuantizationType, quants

    shape = (4, 512) if small else (2048, 2048)
    weights = torch.randn(shape)
    for type in ("Q4_1", "Q8_0", "Q4_K", "Q6_K"):
        raw, peer_type = quantise(weights, type), GGMLQuantizationType[type]
        yield Comparison(
            f"GGUF decoding, {type}",
            f"{weights.numel():,} weights, {raw.size:,} bytes",
            "gguf.quants.dequantize",
            lambda raw=raw, type=type: lambda: dequantise(raw, type, shape),
            lambda raw=raw, type=peer_type: lambda: quants.dequantize(raw, type),
            at_most=1.0,
        )


def sentence_encoder(small: bool) -> Iterator[Comparison]:
    """all-MiniLM-L6-v2 without gradients, from ids to tokens' vectors; every second row is half padding."""
    from transformers.models.bert.modeling_bert import BertModel

    from companion.data.assets import asset_path

    rows, length = (4, 32) if small else (16, 64)
    mine = SentenceEncoder.minilm().bert
    theirs = BertModel.from_pretrained(asset_path("minilm").parent).eval()
    ids = torch.randint(1000, 30000, (rows, length))
    ids[::2, length // 2 :] = mine.config.pad_id
    attended = (ids != mine.config.pad_id).long()
    yield Comparison(
        "Sentence encoder",
        f"MiniLM, 6 layers of d_model 384, {rows} rows of {length} tokens",
        "transformers.models.bert.modeling_bert.BertModel",
        lambda: torch.no_grad()(lambda: mine(ids)),
        lambda: torch.no_grad()(lambda: theirs(ids, attention_mask=attended)),
        at_most=1.05,
    )


def language_model(small: bool) -> Iterator[Comparison]:
    """SmolLM2 from its GGUF file: loading, prefill, decoding, and decoding with weights kept quantised.

    Reading half a gigabyte of float32 weights takes most of a token's time, and both libraries read them.
    """
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    from companion.data.assets import asset_path
    from companion.models.llama import load_gguf

    logging.disable_progress_bar()
    tokens, prompts = (3, (4, 9)) if small else (16, (32, 2048))
    with tempfile.TemporaryDirectory() as folder:
        path = _small_gguf(Path(folder)) if small else asset_path("smollm2")

        def load_theirs() -> nn.Module:  # their loader asks for accelerate, and uses it for devices alone
            with mock.patch("transformers.modeling_utils.is_accelerate_available", lambda: True):
                return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()

        first = torch.arange(5)[None]
        yield Comparison(
            "From a GGUF file to the first token",
            f"a file of {path.stat().st_size:,} bytes, 5 tokens of prompt, float32",
            "transformers.AutoModelForCausalLM",
            lambda: torch.no_grad()(lambda: load_gguf(path)(first)),
            lambda: torch.no_grad()(lambda: load_theirs()(first)),
            at_most=0.25,
        )
        mine, theirs = load_gguf(path), load_theirs()
        kept = {kind: load_gguf(path, quantised=kind) for kind in ("int8", "blocks")}
    size = sum(parameter.nbytes for parameter in mine.parameters())
    weights = f"{size / 1e6:,.0f} MB of weights" if not small else f"{size:,} bytes of weights"

    def decode(model: nn.Module, ids: Tensor) -> Callable:
        """Greedy decoding of the tokens after ids, whose keys and values are cached, all but the last's."""
        cache = model.new_cache(ids.shape[1] + tokens)
        with torch.no_grad():
            model.hidden(ids[:, :-1], cache=cache)

        def setup() -> Callable:
            own = copy.deepcopy(cache)

            @torch.no_grad()
            def run() -> None:
                token = ids[:, -1:]
                for _ in range(tokens):
                    token = model(token, cache=own).argmax(-1)

            return run

        return setup

    def decode_theirs(ids: Tensor) -> Callable:
        cache = DynamicCache(config=theirs.config)
        with torch.no_grad():
            theirs(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return lambda: partial(
            theirs.generate,
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(cache),
            **options,
        )

    for length, bounds in zip(prompts, ((1.05, 0.6), (0.9, None)), strict=True):
        ids = torch.arange(length)[None] % 29 + 1
        ways = (mine, "", weights), (kept["blocks"], ", blocks kept", f"{weights} held in the file's blocks")
        for (model, how, held), at_most in zip(ways, bounds, strict=True):
            yield Comparison(
                f"SmolLM2 decoding after {length:,} tokens{how}",
                f"{tokens} tokens, batch 1, float32, {held}",
                "transformers.LlamaForCausalLM",
                decode(model, ids),
                decode_theirs(ids),
                at_most=at_most,
            )
    ids = torch.arange(prompts[0])[None] % 29 + 1
    flat = torch.ones(size // 4)
    target = torch.empty_like(flat)
    yield Comparison(
        "SmolLM2 decoding beside a copy",
        f"{tokens} tokens, and as many copies of {weights}: at 1.67 a token reads 60 % of a copy's bandwidth",
        "torch.Tensor.copy_",
        decode(mine, ids),
        lambda: lambda: [target.copy_(flat) for _ in range(tokens)],
        at_most=1 / 0.6,
    )
    for kind, model in kept.items():
        share = sum(x.nbytes for x in [*model.parameters(), *model.buffers()]) / size
        yield Comparison(
            f"SmolLM2 decoding, {kind} kept",
            f"{tokens} tokens after {prompts[0]}; its weights take {share:.0%} of float32's memory",
            "the same model, its weights in float32",
            decode(model, ids),
            decode(mine, ids),
        )
    ids = torch.arange(8 if small else 512)[None] % 29 + 1

    def prefill() -> Tensor:
        return mine.logits(mine.hidden(ids, cache=mine.new_cache(ids.shape[1]))[:, -1])

    yield Comparison(
        "SmolLM2 prefill",
        f"{ids.shape[1]} tokens into an empty cache, logits of the last one, float32",
        "transformers.LlamaForCausalLM",
        lambda: torch.no_grad()(prefill),
        lambda: torch.no_grad()(lambda: theirs(ids, use_cache=True, logits_to_keep=1)),
        at_most=1.1,
    )


def speculative_decoding(small: bool) -> Iterator[Comparison]:
    """SmolLM2 decoding greedily with proposals looked up in its prompt: where they pay, and where not."""
    from companion.chat import ChatML, Message
    from companion.data.assets import asset_path
    from companion.generate import PromptLookup, generate, speculative_generate
    from companion.models.llama import load_gguf
    from companion.quantize.gguf import GGUFFile

    passage = (  # Abraham Lincoln, 1863
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived "
        "in Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in "
        "a great civil war, testing whether that nation, or any nation so conceived and so dedicated, can "
        "long endure."
    )
    requests = {"repeating a passage": f"Repeat this text word for word:\n\n{passage}"}
    requests["answering a question"] = "Why is the sky blue?"
    with tempfile.TemporaryDirectory() as folder:
        path = _small_gguf(Path(folder)) if small else asset_path("smollm2")
        model = load_gguf(path)
        if small:
            prompts = [torch.arange(n)[None] % 5 for n in (9, 3)]
        else:
            with GGUFFile.open(path) as file:
                template = ChatML(BPETokenizer.from_gguf(file.metadata))
            prompts = [torch.tensor([template.encode([Message("user", text)])]) for text in requests.values()]
    tokens = 5 if small else 60
    options = {"max_new_tokens": tokens, "greedy": True}
    for task, ids, at_most in zip(requests, prompts, (0.8, None), strict=True):
        lookup = partial(speculative_generate, model, PromptLookup(), ids, num_draft=8, **options)
        plain = partial(generate, model, ids, **options)
        result = lookup()
        assert torch.equal(result.ids, plain())
        yield Comparison(
            f"SmolLM2 {task}, prompt lookup",
            f"{tokens} tokens in {result.passes} passes, after {ids.shape[1]}, float32",
            "the same model, a token a pass",
            lambda run=lookup: run,
            lambda run=plain: run,
            at_most=at_most,
        )


def _small_gguf(folder: Path) -> Path:
    """A Llama of two layers with random weights, its matrices in Q8_0."""
    from companion.models.language_model import LanguageModel, LanguageModelConfig
    from companion.models.llama import tensor_names
    from companion.quantize.gguf import write_gguf

    config = LanguageModelConfig(
        vocab_size=40,
        d_model=32,
        num_layers=2,
        num_heads=2,
        d_ff=64,
        activation="swiglu",
        norm="rms",
        position="rotary",
        bias=False,
        scale_embedding=False,
    )
    state, tensors = LanguageModel(config).state_dict(), {}
    for ours, theirs in tensor_names(config, "gguf").items():
        tensors[theirs] = weight = state[ours]
        if weight.dim() == 2:
            tensors[theirs] = quantise(weight, "Q8_0").reshape(-1), "Q8_0", tuple(weight.shape)
    entries = {
        "vocab_size": 40,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 64,
        "context_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    metadata = {"general.architecture": "llama", "general.name": "small"}
    path = folder / "small.gguf"
    write_gguf(path, metadata | {f"llama.{name}": value for name, value in entries.items()}, tensors)
    return path


ALL = (
    training_step,
    attention,
    layer_norm,
    recurrent,
    rms_norm,
    swiglu,
    rotary,
    loss,
    optimizer,
    decoding,
    sampling_filters,
    tokenizer,
    unigram,
    autograd,
    gguf_header,
    gguf_decoding,
    language_model,
    speculative_decoding,
    sentence_encoder,
)
