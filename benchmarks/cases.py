"""What is timed. Each function returns comparisons or growths; `small` makes them quick enough to try out."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Comparison, Growth
from benchmarks.peers import TorchTransformer
from companion.attention import MultiHeadAttention, scaled_dot_product_attention
from companion.generate.decoding import greedy_search
from companion.models.transformer import Transformer, TransformerConfig
from companion.norm import LayerNorm
from companion.tokenizers.bpe import BPETokenizer
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


ALL = (training_step, attention, layer_norm, loss, optimizer, decoding, tokenizer)
