"""BERT, an encoder pre-trained to fill gaps (Devlin et al., 2019), and sentence vectors made of its output.

Word, position and token-type vectors are added and normalised; post-LN encoder layers follow, in which every
token attends to every other. Two heads serve pre-training: masked language modelling, whose output matrix is
the word table, and next-sentence prediction, a softmax over two logits of the pooled [CLS]. Files are those
of Hugging Face: config.json and model.safetensors. A `SentenceEncoder` averages the output over a sentence's
tokens (Reimers & Gurevych, 2019); all-MiniLM-L6-v2 is one (Wang et al., 2020, is how it became small).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import (
    check_choice,
    check_features,
    check_floating,
    check_ids,
    check_index,
    check_number,
    check_positive,
    check_probability,
)
from companion._io import atomic_write
from companion.data.assets import asset_path
from companion.data.batching import pad_sequences
from companion.data.masking import NO_LABEL, PretrainingBatch, SpecialIds
from companion.feedforward import ACTIVATIONS
from companion.masks import check_mask, padding_mask
from companion.models._pretrained import _Undrawn, read_settings, refuse_settings
from companion.models.transformer import EncoderLayer
from companion.norm import LayerNorm
from companion.position import LearnedPositionalEmbedding
from companion.tokenizers.wordpiece import WordPieceTokenizer
from companion.train.checkpoint import _check_fit, _converted, _read_safetensors, _serialised
from companion.train.loss import cross_entropy


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT; the defaults are BERT-base, English, uncased.

    Args:
        vocab_size: number of tokens.
        d_model: size of the vectors between layers.
        num_layers: depth.
        num_heads: attention heads; divides d_model.
        d_ff: hidden size of the feed-forward networks.
        dropout: probability, in training, on the embeddings and on each sub-layer's output.
        attention_dropout: probability, in training, on attention weights.
        activation: of the feed-forward networks and the masked-LM head; one of
            `companion.feedforward.ACTIVATIONS`.
        max_length: rows of the position table.
        num_token_types: rows of the token-type table.
        norm_eps: eps of every LayerNorm.
        pad_id: the padding token, which nothing attends to where no mask is given.
    """

    vocab_size: int = 30522
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    d_ff: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    max_length: int = 512
    num_token_types: int = 2
    norm_eps: float = 1e-12
    pad_id: int = 0

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "max_length", "num_token_types")
        for name in sizes:
            check_positive(name, getattr(self, name))
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model must be divisible by num_heads = {self.num_heads}, got {self.d_model}")
        check_probability("dropout", self.dropout)
        check_probability("attention_dropout", self.attention_dropout)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_number("norm_eps", self.norm_eps)
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be positive and finite, got {self.norm_eps}")
        check_index("pad_id", self.pad_id, self.vocab_size)


MINILM = BertConfig(d_model=384, num_layers=6, d_ff=1536)  # all-MiniLM-L6-v2, in BERT's vocabulary


# --- The model ----------------------------------------------------------------------------------------------


class BertEmbeddings(nn.Module):
    """LayerNorm(word + position + token type), then dropout; all three tables are learned.

    Shape: ids and token_types (batch, n) → (batch, n, d_model).
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_id)
        self.token_type = nn.Embedding(config.num_token_types, config.d_model)
        self.position = LearnedPositionalEmbedding(config.max_length, config.d_model)
        self.norm = LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Token types default to 0 throughout."""
        self.check(ids, token_types)
        types = torch.zeros_like(ids) if token_types is None else token_types
        x = self.word(ids.long()) + self.token_type(types.long())
        return self.dropout(self.norm(self.position(x)))

    def check(self, ids: Tensor, token_types: Tensor | None = None) -> None:
        """Refuse what `forward` cannot use."""
        check_ids("ids", ids, self.word.num_embeddings, dims=2)
        if ids.shape[1] > (longest := self.position.weight.shape[0]):
            raise ValueError(
                f"ids must have at most {longest} tokens in a row (max_length), got {ids.shape[1]}"
            )
        if token_types is not None:
            check_ids("token_types", token_types, self.token_type.num_embeddings, dims=2)
            if token_types.shape != ids.shape:
                raise ValueError(
                    f"token_types must have the shape of ids {tuple(ids.shape)}, "
                    f"got {tuple(token_types.shape)}"
                )


class Pooler(nn.Module):
    """tanh(W h + b) of the first token, [CLS]: (batch, n, d_model) → (batch, d_model)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.dense = nn.Linear(d_model, d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        check_features("hidden", hidden, self.dense.in_features, dims=3)
        return torch.tanh(self.dense(hidden[:, 0]))


class Bert(nn.Module):
    """The encoder: embeddings and post-LN layers, and the pooler for what needs one vector a sequence.

    Args:
        config: sizes.
        pooler: whether there is one. Models trained on masked tokens alone have none.

    Shape: ids (batch, n) → (batch, n, d_model).
    """

    def __init__(self, config: BertConfig, *, pooler: bool = True):
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(
            EncoderLayer(
                config.d_model,
                config.num_heads,
                config.d_ff,
                config.dropout,
                config.activation,
                attention_dropout=config.attention_dropout,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.num_layers)
        )
        self.pooler = Pooler(config.d_model) if pooler else None
        self.apply(_initialise)

    def forward(
        self,
        ids: Tensor,
        token_types: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        first_only: bool = False,
    ) -> Tensor:
        """The vectors of all tokens, before the pooler.

        Args:
            ids: integers (batch, n); row i of [CLS] A [SEP] B [SEP] and padding.
            token_types: integers (batch, n), 0 in A and 1 in B; 0 throughout where it is None.
            mask: bool, broadcastable to (batch, num_heads, n, n), True where a token may attend; where it is
                None, every id but pad_id is attended to. transformers has no such default: there a missing
                attention_mask lets padding be attended to.
            first_only: give the vector of [CLS] alone, (batch, 1, d_model): the last layer computes no other.
        """
        self.embeddings.check(ids, token_types)
        if mask is None:
            mask = padding_mask(ids, self.config.pad_id)
        else:
            check_mask("mask", mask, (ids.shape[0], self.config.num_heads, ids.shape[1], ids.shape[1]))
        x = self.embeddings(ids, token_types)
        *before, last = self.layers
        for layer in before:
            x = layer(x, mask)
        if not first_only:
            return last(x, mask)
        return last.first(x, mask[..., :1, :] if mask.dim() > 1 else mask)


class MaskedLMHead(nn.Module):
    """From a token's vector to logits over the vocabulary: LayerNorm(activation(W h + b)) · Eᵀ + c.

    E is the word table, handed in at each call: the head owns W, b, the norm and the bias c.

    Shape: hidden (..., d_model), word_table (vocab_size, d_model) → (..., vocab_size).
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = LayerNorm(config.d_model, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(_initialise)

    def forward(self, hidden: Tensor, word_table: Tensor) -> Tensor:
        check_features("word_table", word_table, self.dense.in_features, dims=2)
        if word_table.shape[0] != self.bias.shape[0]:
            raise ValueError(
                f"word_table must have {self.bias.shape[0]} rows, one a token, got {tuple(word_table.shape)}"
            )
        if isinstance(hidden, Tensor) and hidden.dim() == 2 and hidden.shape[0] == 0:
            return hidden @ word_table.T  # no token was chosen in the batch
        check_features("hidden", hidden, self.dense.in_features)
        return F.linear(self.norm(self.activation(self.dense(hidden))), word_table, self.bias)


class NextSentenceHead(nn.Module):
    """Two logits of the pooled [CLS]: index 0 "B follows A", index 1 "it does not".

    Their softmax is the sigmoid of their difference; BERT's files hold the two logits.

    Shape: (batch, d_model) → (batch, 2).
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.d_model, 2)
        self.apply(_initialise)

    def forward(self, pooled: Tensor) -> Tensor:
        check_features("pooled", pooled, self.dense.in_features, dims=2)
        return self.dense(pooled)


class BertForPreTraining(nn.Module):
    """BERT with one or both of its heads.

    transformers calls it BertForPreTraining, with one head alone BertForMaskedLM (which has no pooler) or
    BertForNextSentencePrediction.

    Args:
        config: sizes.
        masked_lm, next_sentence: which heads there are, at least one.
        pooler: whether there is a pooler; None for "where there is the next-sentence head", which needs it.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        masked_lm: bool = True,
        next_sentence: bool = True,
        pooler: bool | None = None,
    ):
        super().__init__()
        if not (masked_lm or next_sentence):
            raise ValueError("masked_lm or next_sentence must be True, got False for both")
        if next_sentence and pooler is False:
            raise ValueError("pooler must not be False with the next-sentence head")
        self.config = config
        self.bert = Bert(config, pooler=next_sentence if pooler is None else pooler)
        self.masked_lm = MaskedLMHead(config) if masked_lm else None
        self.next_sentence = NextSentenceHead(config) if next_sentence else None

    def forward(
        self,
        ids: Tensor,
        token_types: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The logits of both heads; None for a head that is missing.

        Args:
            ids, token_types, mask: as in `Bert.forward`.
            positions: bool (batch, n), where masked-LM logits are wanted. In training that is 15 % of them,
                and the vocabulary is the larger part of a small model's work.

        Returns: masked-LM logits (batch, n, vocab_size), or (k, vocab_size) for the k chosen positions in
            row-major order; next-sentence logits (batch, 2).
        """
        self.bert.embeddings.check(ids, token_types)
        if positions is not None:
            check_mask("positions", positions)
            if positions.shape != ids.shape:
                raise ValueError(
                    f"positions must have the shape of ids {tuple(ids.shape)}, got {tuple(positions.shape)}"
                )
        hidden = self.bert(ids, token_types, mask)
        words = pairs = None
        if self.masked_lm is not None:
            chosen = hidden if positions is None else hidden[positions]
            words = self.masked_lm(chosen, self.bert.embeddings.word.weight)
        if self.next_sentence is not None:
            pairs = self.next_sentence(self.bert.pooler(hidden))
        return words, pairs


def pretraining_loss(model: nn.Module, batch: PretrainingBatch) -> tuple[Tensor, int]:
    """The sum of BERT's two losses, in nats, for `companion.train.loop.train`.

    Per batch: the mean over its predicted tokens plus the mean over its pairs, each where the model has the
    head.

    Returns: (loss · number of pairs, number of pairs).
    """
    predicted = batch.labels != NO_LABEL
    words, pairs = model(batch.ids, batch.token_types, batch.mask, positions=predicted)
    loss = 0.0
    if words is not None:
        targets = batch.labels[predicted]
        loss = cross_entropy(words, targets) if len(targets) else words.sum()
    if pairs is not None:
        loss = loss + cross_entropy(pairs, batch.next_sentence)
    return loss * len(batch), len(batch)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Matrices from N(0, 0.02²), biases and the padding token 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()


# --- Files in Hugging Face's layout -------------------------------------------------------------------------

_CONFIG = {  # ours → theirs
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation": "hidden_act",
    "max_length": "max_position_embeddings",
    "num_token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "pad_id": "pad_token_id",
}
_ACTIVATIONS = {  # theirs → ours; of two names for one, the last is written
    "relu": "relu",
    "gelu": "gelu",
    "swish": "silu",
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_NEEDED = {  # what other settings would make another model of it
    "model_type": ("bert",),
    "hidden_act": tuple(_ACTIVATIONS),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_ENCODER = {  # modules of `Bert` outside the layers
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "pooler.dense": "pooler.dense",
}
_LAYER = {  # modules of an `EncoderLayer`
    "self_attention.query_proj": "attention.self.query",
    "self_attention.key_proj": "attention.self.key",
    "self_attention.value_proj": "attention.self.value",
    "self_attention.output_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
_HEADS = {  # modules of the heads
    "masked_lm": "cls.predictions",
    "masked_lm.dense": "cls.predictions.transform.dense",
    "masked_lm.norm": "cls.predictions.transform.LayerNorm",
    "next_sentence.dense": "cls.seq_relationship",
}
_TIED = {  # what some files repeat
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # 0, 1, 2, … and zeros in older files
_SIZES = (  # what a table's shape says of the configuration: tensor, dimension, field
    ("embeddings.word_embeddings.weight", 0, "vocab_size"),
    ("embeddings.word_embeddings.weight", 1, "d_model"),
    ("embeddings.position_embeddings.weight", 0, "max_length"),
    ("embeddings.token_type_embeddings.weight", 0, "num_token_types"),
    ("encoder.layer.0.intermediate.dense.weight", 0, "d_ff"),
)


def load_pretrained(
    path, config: BertConfig | None = None, *, dtype: torch.dtype | None = torch.float32
) -> Bert | BertForPreTraining:
    """A model from files as transformers writes them, in evaluation mode.

    A file of BertModel gives a `Bert`; one with a masked-LM or next-sentence head a `BertForPreTraining` with
    the heads that it holds.

    Args:
        path: a folder with config.json and model.safetensors, or a safetensors file.
        config: None for the config.json beside the weights.
        dtype: of the weights; None for the file's own.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, is not of a BERT encoder, holds an untied output matrix or a head that
            is not one of the two, or does not fit the configuration.
    """
    path = Path(path)
    weights = path / "model.safetensors" if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist")
    if config is None:
        config = _read_config(weights.parent)
    tensors, _ = _read_safetensors(weights)
    tensors = _normalised(tensors, weights)
    _check_sizes(tensors, config, weights)
    heads = {name: _HEADS[f"{name}.dense"] + ".weight" in tensors for name in ("masked_lm", "next_sentence")}
    pooler = "bert.pooler.dense.weight" in tensors
    if heads["next_sentence"] and not pooler:
        raise ValueError(f"{weights} has a next-sentence head without a pooler")
    with torch.device("meta"), _Undrawn():  # nothing is allocated or drawn
        model = BertForPreTraining(config, pooler=pooler, **heads) if any(heads.values()) else None
        model = Bert(config, pooler=pooler) if model is None else model
    for ours, theirs in _names(model).items():
        if theirs in tensors:
            tensors[ours] = tensors.pop(theirs)
    _check_fit(model, tensors, weights)
    tensors = {name: t.to(dtype) if t.is_floating_point() and dtype else t for name, t in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def save_pretrained(model: Bert | BertForPreTraining, folder, *, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, for transformers' from_pretrained and for `load_pretrained`.

    The word table is written once: the tied output matrix is not repeated.

    Args:
        folder: made where it is missing.
        dtype: of the weights in the file; None for the model's own.
    """
    if not isinstance(model, (Bert, BertForPreTraining)):
        raise TypeError(f"model must be a Bert or a BertForPreTraining, got {type(model).__name__}")
    names, state = _names(model), model.state_dict()
    if isinstance(model, Bert):  # a file of the encoder alone has no prefix
        names = {ours: theirs.removeprefix("bert.") for ours, theirs in names.items()}
    tensors = {theirs: _converted(ours, state[ours], dtype) for ours, theirs in names.items()}
    config = {theirs: getattr(model.config, ours) for ours, theirs in _CONFIG.items()}
    config["hidden_act"] = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[model.config.activation]
    config |= {"model_type": "bert", "architectures": [_architecture(model)]}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "model.safetensors", _serialised(tensors, {"format": "pt"}))
    atomic_write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _names(model: nn.Module) -> dict[str, str]:
    """The model's own names → those in a file with heads, which begin with "bert." or "cls."."""
    own = "" if isinstance(model, Bert) else "bert."
    modules = {own + ours: f"bert.{theirs}" for ours, theirs in _ENCODER.items()} | _HEADS
    for i in range(model.config.num_layers):
        for ours, theirs in _LAYER.items():
            modules[f"{own}layers.{i}.{ours}"] = f"bert.encoder.layer.{i}.{theirs}"
    names = {}
    for name in model.state_dict():
        module, kind = name.rsplit(".", 1)
        names[name] = f"{modules[module]}.{'weight' if kind == 'gain' else kind}"
    return names


def _architecture(model: nn.Module) -> str:
    if isinstance(model, Bert):
        return "BertModel"
    if model.masked_lm is None:
        return "BertForNextSentencePrediction"
    return "BertForMaskedLM" if model.next_sentence is None else "BertForPreTraining"


def _read_config(folder: Path) -> BertConfig:
    settings = read_settings(folder)
    refuse_settings(settings, _NEEDED)
    options = {ours: settings[theirs] for ours, theirs in _CONFIG.items() if settings.get(theirs) is not None}
    if "activation" in options:
        options["activation"] = _ACTIVATIONS[options["activation"]]
    try:
        return BertConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is not the configuration of a BERT: {error}") from None


def _normalised(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors under today's names: with "bert." before the encoder's, LayerNorm's gamma as weight, and
    without what repeats others."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"bert.{name}"
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            name = name.replace(old, new)  # TensorFlow's names, in the files of BERT's authors
        if name in found:
            raise ValueError(f"{source} holds {name} twice, under an old and a new name")
        found[name] = tensor
    for buffer in _BUFFERS:
        found.pop(f"bert.{buffer}", None)
    for copy, original in _TIED.items():
        if copy in found and original in found and not torch.equal(found[copy], found[original]):
            raise ValueError(f"{source} does not tie its output layer: {copy} differs from {original}")
        if original in found:
            found.pop(copy, None)
    return found


def _check_sizes(tensors: dict[str, Tensor], config: BertConfig, source: Path) -> None:
    """Refuse a configuration whose sizes are not those of the file's tables, before a model is built."""
    prefix = "bert.encoder.layer."
    layers = len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})
    if layers != config.num_layers:
        raise ValueError(f"{source} does not fit the model: it has {layers} layers, not {config.num_layers}")
    for name, dimension, field in _SIZES:
        shape = tuple(tensors[f"bert.{name}"].shape) if f"bert.{name}" in tensors else None
        if shape is None or len(shape) != 2:
            raise ValueError(f"{source} is not a BERT: {name} must be a matrix, got {shape or 'none'}")
        if shape[dimension] != getattr(config, field):
            raise ValueError(
                f"{source} does not fit the model: {name} has shape {shape}, "
                f"{field} is {getattr(config, field)}"
            )


# --- Sentence vectors ---------------------------------------------------------------------------------------


def mean_pool(hidden: Tensor, keep: Tensor) -> Tensor:
    """The mean vector of each row's kept tokens; 0 for a row that keeps none.

    Args:
        hidden: (batch, n, d).
        keep: bool (batch, n), False at padding.

    Returns: (batch, d).
    """
    check_floating("hidden", hidden)
    check_mask("keep", keep)
    if hidden.dim() != 3 or hidden.shape[:2] != keep.shape:
        raise ValueError(
            f"keep must have the (batch, n) of hidden {tuple(hidden.shape)}, got {tuple(keep.shape)}"
        )
    keep = keep.unsqueeze(-1)
    return hidden.masked_fill(~keep, 0.0).sum(1) / keep.sum(1).clamp(min=1)


class SentenceEncoder(nn.Module):
    """A text's vector: the mean of BERT's output over its tokens, [CLS] and [SEP] included, at length 1.

    Args:
        bert: the encoder; a pooler is not used.
        tokenizer: its `encode(text)` gives the ids of a text without special tokens.
        special: ids of the special tokens.
        max_tokens: longer texts are cut to this number of tokens, [CLS] and [SEP] included.
        normalise: scale each vector to Euclidean length 1, so that dot products are cosines.
    """

    def __init__(
        self,
        bert: Bert,
        tokenizer,
        *,
        special: SpecialIds = SpecialIds(),  # noqa: B008 (frozen)
        max_tokens: int = 256,
        normalise: bool = True,
    ):
        super().__init__()
        if not isinstance(bert, Bert):
            raise TypeError(f"bert must be a Bert, got {type(bert).__name__}")
        check_positive("max_tokens", max_tokens)
        if not 3 <= max_tokens <= bert.config.max_length:
            raise ValueError(
                f"max_tokens must lie in 3 … {bert.config.max_length} (max_length), got {max_tokens}"
            )
        if special.pad != bert.config.pad_id:
            raise ValueError(
                f"special.pad must be the model's pad_id {bert.config.pad_id}, got {special.pad}"
            )
        self.bert, self.tokenizer, self.special = bert, tokenizer, special
        self.max_tokens, self.normalise = max_tokens, normalise
        self.train(bert.training)

    @classmethod
    def minilm(cls, tokenizer=None, *, dtype: torch.dtype = torch.float32) -> "SentenceEncoder":
        """all-MiniLM-L6-v2: 6 layers, vectors of 384 numbers, texts of up to 256 tokens; English.

        Args:
            tokenizer: WordPiece with the model's own vocabulary, lower-cased, where it is None.
        """
        if tokenizer is None:
            tokenizer = WordPieceTokenizer.from_vocabulary(asset_path("minilm-vocabulary"), lowercase=True)
        return cls(load_pretrained(asset_path("minilm"), MINILM, dtype=dtype), tokenizer)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The vectors of token ids that are already in [CLS] … [SEP]: (batch, n) → (batch, d_model).

        Args:
            mask: bool (batch, n), False at padding; where it is None, at pad_id.
        """
        keep = padding_mask(ids, self.special.pad)[:, 0, 0] if mask is None else mask
        check_mask("mask", keep)
        if keep.shape != ids.shape:
            raise ValueError(f"mask must have the shape of ids {tuple(ids.shape)}, got {tuple(keep.shape)}")
        pooled = mean_pool(self.bert(ids, mask=keep[:, None, None]), keep)
        return F.normalize(pooled, dim=-1) if self.normalise else pooled

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """The vectors of texts, in their order, computed without dropout: (number of texts, d_model).

        Texts of similar length share a batch, so that little of the work is padding.
        """
        check_positive("batch_size", batch_size)
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"texts must be a sequence of str, got {type(texts).__name__}")
        if len(texts) == 0:
            raise ValueError("texts must hold at least one text, got none")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] must be a str, got {type(text).__name__}")
        rows = [self._ids(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        table = self.bert.embeddings.word.weight
        vectors = table.new_empty(len(rows), table.shape[1])
        was_training = self.training
        self.eval()
        try:
            for start in range(0, len(rows), batch_size):
                chosen = order[start : start + batch_size]
                ids = pad_sequences([rows[i] for i in chosen], self.special.pad).to(table.device)
                vectors[chosen] = self(ids)
        finally:
            self.train(was_training)
        return vectors

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer.encode(text))[: self.max_tokens - 2]
        return [self.special.cls, *ids, self.special.sep]
