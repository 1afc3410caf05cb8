"""BERT, its heads, files, data and sentence vectors against transformers and tokenizers, and closed forms."""

import dataclasses
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from companion.data.assets import asset_path
from companion.data.masking import (
    NO_LABEL,
    PretrainingBatch,
    SegmentPair,
    SpecialIds,
    join_segments,
    mask_tokens,
    next_sentence_pairs,
    pretraining_batches,
)
from companion.models.bert import (
    MINILM,
    Bert,
    BertConfig,
    BertEmbeddings,
    BertForPreTraining,
    MaskedLMHead,
    NextSentenceHead,
    Pooler,
    SentenceEncoder,
    _names,
    load_pretrained,
    mean_pool,
    pretraining_loss,
    save_pretrained,
)
from companion.train.loop import train
from companion.train.optim import AdamW

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
DTYPES = list(TOLERANCE)
SMALL = BertConfig(
    vocab_size=37, d_model=15, num_layers=2, num_heads=3, d_ff=22, max_length=17, num_token_types=3, pad_id=2
)
VARIANTS = {
    "small": SMALL,
    "tanh": dataclasses.replace(SMALL, activation="gelu_tanh", num_heads=5, norm_eps=1e-3, pad_id=0),
    "relu": dataclasses.replace(SMALL, activation="relu", num_layers=1, num_token_types=2),
}
SIZES = [(1, 1), (1, 7), (3, 11), (3, 17)]
SPECIAL = SpecialIds(pad=2, cls=5, sep=8, mask=3)
CLASSES = {  # transformers' class → the options of ours
    "BertForPreTraining": {},
    "BertForMaskedLM": {"next_sentence": False},
    "BertForNextSentencePrediction": {"masked_lm": False},
}


@pytest.fixture(scope="module")
def judge():
    from transformers.models.bert import modeling_bert
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return modeling_bert


def theirs_of(judge, name: str, config: BertConfig, dtype: torch.dtype) -> nn.Module:
    """The model of transformers with that configuration, every weight drawn anew."""
    activations = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
    settings = judge.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.d_ff,
        hidden_act=activations[config.activation],
        max_position_embeddings=config.max_length,
        type_vocab_size=config.num_token_types,
        layer_norm_eps=config.norm_eps,
        pad_token_id=config.pad_id,
    )
    return randomised(getattr(judge, name)(settings)).to(dtype).eval()


def randomised(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        is_gain = name.endswith("gain") or "LayerNorm.weight" in name
        nn.init.normal_(parameter, float(is_gain), 0.3)
    return model


def inputs(config: BertConfig, batch: int, length: int):
    """Ids with rows padded to different lengths, token types, and what is not padding, (batch, n)."""
    ids = torch.randint(0, config.vocab_size, (batch, length))
    ids[ids == config.pad_id] = 1
    keep = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    keep[0] = True
    return ids.masked_fill(~keep, config.pad_id), torch.randint(0, config.num_token_types, ids.shape), keep


def compared_gradients(mine: nn.Module, theirs: nn.Module, my_output, their_output):
    """The gradients of one random linear function of the outputs, both under transformers' names."""
    weights = torch.randn_like(my_output)
    (my_output * weights).sum().backward()
    (their_output * weights).sum().backward()
    prefix = "" if any(name.startswith("bert.") for name, _ in theirs.named_parameters()) else "bert."
    found = {prefix + name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    names = _names(mine)
    own = {names[name]: p.grad for name, p in mine.named_parameters() if p.grad is not None}
    return own, found


def carried(judge, name: str, config: BertConfig, dtype: torch.dtype, folder):
    """The judge's model, and ours read from the files that it saves."""
    theirs = theirs_of(judge, name, config, dtype)
    theirs.save_pretrained(folder)
    return load_pretrained(folder, dtype=None), theirs


# --- The model and its heads --------------------------------------------------------------------------------


@pytest.mark.verifies("companion.models.bert.Bert", against="transformers.BertModel")
@pytest.mark.verifies("companion.models.bert.Pooler", against="transformers.BertModel")
@pytest.mark.verifies("companion.models.bert.load_pretrained", against="transformers.BertModel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bert_is_transformers(judge, agree, tmp_path, variant, dtype):
    config = VARIANTS[variant]
    mine, theirs = carried(judge, "BertModel", config, dtype, tmp_path)
    assert isinstance(mine, Bert)
    assert not mine.training
    assert mine.config == config
    assert mine.embeddings.word.weight.dtype == dtype
    for batch, length in SIZES:
        ids, types, keep = inputs(config, batch, length)
        expected = theirs(ids, attention_mask=keep.long(), token_type_ids=types)
        hidden = mine(ids, types)
        agree(hidden, expected.last_hidden_state, tolerance=TOLERANCE[dtype], quantity="output, padded rows")
        agree(
            mine.pooler(hidden), expected.pooler_output, tolerance=TOLERANCE[dtype], quantity="pooled output"
        )
    torch.testing.assert_close(mine(ids, types, keep[:, None, None]), hidden, rtol=0, atol=0)
    closeness = {"rtol": 0, "atol": TOLERANCE[dtype]}
    pooled = mine.pooler(mine(ids, types, first_only=True))
    torch.testing.assert_close(pooled, expected.pooler_output, **closeness)
    square = keep[:, None, None].expand(-1, 1, ids.shape[1], -1)
    for mask in (square, torch.ones(1, 1, dtype=torch.bool)):
        alone = mine(ids, types, mask, first_only=True)
        torch.testing.assert_close(alone, mine(ids, types, mask)[:, :1], **closeness)
    no_types = theirs(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    agree(
        mine(ids, mask=torch.ones(1, 1, dtype=torch.bool)),
        no_types,
        tolerance=TOLERANCE[dtype],
        quantity="output, no padding mask, default token types",
    )
    together = torch.cat([hidden.flatten(), mine.pooler(hidden).flatten()])
    their_together = torch.cat([expected.last_hidden_state.flatten(), expected.pooler_output.flatten()])
    own, found = compared_gradients(mine, theirs, together, their_together)
    assert len(own) == len(list(mine.parameters()))
    agree(own, found, tolerance=GRADIENT_TOLERANCE[dtype], quantity="gradients of all weights")


@pytest.mark.verifies("companion.models.bert.MaskedLMHead", against="transformers.BertForMaskedLM")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["small", "tanh"])
def test_masked_lm_is_transformers(judge, agree, tmp_path, variant, dtype):
    config = VARIANTS[variant]
    mine, theirs = carried(judge, "BertForMaskedLM", config, dtype, tmp_path)
    assert mine.next_sentence is None
    assert mine.bert.pooler is None
    ids, types, keep = inputs(config, 3, 13)
    expected = theirs(ids, attention_mask=keep.long(), token_type_ids=types).logits
    words, pairs = mine(ids, types)
    assert pairs is None
    agree(words, expected, tolerance=TOLERANCE[dtype], quantity="logits")
    chosen = keep & (torch.rand(keep.shape) < 0.4)
    agree(
        mine(ids, types, positions=chosen)[0],
        expected[chosen],
        tolerance=TOLERANCE[dtype],
        quantity="logits at chosen positions",
    )
    own, found = compared_gradients(mine, theirs, words, expected)
    agree(
        own,
        found,
        tolerance=GRADIENT_TOLERANCE[dtype],
        quantity="gradients of all weights, the tied table among them",
    )


@pytest.mark.verifies(
    "companion.models.bert.NextSentenceHead", against="transformers.BertForNextSentencePrediction"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_next_sentence_is_transformers(judge, agree, tmp_path, dtype):
    mine, theirs = carried(judge, "BertForNextSentencePrediction", SMALL, dtype, tmp_path)
    ids, types, keep = inputs(SMALL, 3, 9)
    expected = theirs(ids, attention_mask=keep.long(), token_type_ids=types).logits
    words, pairs = mine(ids, types)
    assert words is None
    agree(pairs, expected, tolerance=TOLERANCE[dtype], quantity="logits")
    own, found = compared_gradients(mine, theirs, pairs, expected)
    agree(own, found, tolerance=GRADIENT_TOLERANCE[dtype], quantity="gradients of all weights")


@pytest.mark.verifies("companion.models.bert.BertForPreTraining", against="transformers.BertForPreTraining")
@pytest.mark.verifies("companion.models.bert.pretraining_loss", against="transformers.BertForPreTraining")
@pytest.mark.parametrize("dtype", DTYPES)
def test_pretraining_is_transformers(judge, agree, tmp_path, dtype):
    mine, theirs = carried(judge, "BertForPreTraining", SMALL, dtype, tmp_path)
    ids, types, keep = inputs(SMALL, 3, 13)
    labels = torch.where(keep & (torch.rand(ids.shape) < 0.3), ids, NO_LABEL)
    follows = torch.tensor([0, 1, 1])
    expected = theirs(
        ids,
        attention_mask=keep.long(),
        token_type_ids=types,
        labels=labels,
        next_sentence_label=follows,
    )
    words, pairs = mine(ids, types)
    agree(words, expected.prediction_logits, tolerance=TOLERANCE[dtype], quantity="masked-LM logits")
    agree(
        pairs, expected.seq_relationship_logits, tolerance=TOLERANCE[dtype], quantity="next-sentence logits"
    )
    total, count = pretraining_loss(mine, PretrainingBatch(ids, keep[:, None, None], types, labels, follows))
    assert count == 3
    agree(total / count, expected.loss, tolerance=TOLERANCE[dtype], quantity="loss")
    own, found = compared_gradients(mine, theirs, total / count, expected.loss)
    assert len(own) == len(list(mine.parameters()))
    agree(own, found, tolerance=GRADIENT_TOLERANCE[dtype], quantity="gradients of all weights")


@pytest.mark.verifies("companion.models.bert.BertEmbeddings", against="transformers.BertEmbeddings")
@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_are_transformers(judge, agree, dtype):
    theirs = theirs_of(judge, "BertModel", SMALL, dtype).embeddings
    mine = BertEmbeddings(SMALL).to(dtype).eval()
    with torch.no_grad():
        mine.word.weight.copy_(theirs.word_embeddings.weight)
        mine.position.weight.copy_(theirs.position_embeddings.weight)
        mine.token_type.weight.copy_(theirs.token_type_embeddings.weight)
        mine.norm.gain.copy_(theirs.LayerNorm.weight)
        mine.norm.bias.copy_(theirs.LayerNorm.bias)
    ids, types, _ = inputs(SMALL, 3, 17)
    tolerance = TOLERANCE[dtype]
    agree(mine(ids, types), theirs(ids, types), tolerance=tolerance, quantity="output")
    agree(mine(ids), theirs(ids), tolerance=tolerance, quantity="output, default token types")


def test_padding_changes_nothing():
    model = randomised(Bert(SMALL)).double().eval()
    ids, types, _ = inputs(SMALL, 1, 9)
    padded = torch.cat([ids, torch.full((1, 5), SMALL.pad_id)], 1)
    padded_types = torch.cat([types, torch.ones(1, 5, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded, padded_types)[:, :9], model(ids, types), rtol=0, atol=1e-13)


def test_every_token_sees_every_other():
    """Unlike in a causal model the last token has an influence on the first, and the first on the last."""
    model = randomised(Bert(SMALL)).eval()
    ids, _, _ = inputs(SMALL, 1, 6)
    output = model(ids)
    for place in (0, 5):
        changed = ids.clone()
        changed[0, place] = 36 if ids[0, place] != 36 else 35
        assert (model(changed) - output).abs().amax(-1).min() > 1e-4


def test_dropout_is_where_bert_has_it():
    """On embeddings, sub-layers' outputs and attention weights; not inside the feed-forward network."""
    model = Bert(dataclasses.replace(SMALL, dropout=0.25, attention_dropout=0.5))
    layer = model.layers[0]
    assert model.embeddings.dropout.p == layer.dropout.p == 0.25
    assert layer.self_attention.dropout == 0.5
    assert layer.feed_forward.dropout.p == 0.0
    assert model.embeddings.position.dropout.p == 0.0
    ids, _, _ = inputs(SMALL, 1, 6)
    assert not torch.equal(model(ids), model(ids))


def test_initialisation():
    model = BertForPreTraining(dataclasses.replace(SMALL, d_model=120, vocab_size=500))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert 0.016 < float(parameter.detach().std()) < 0.024, name
        else:
            assert (parameter == float(name.endswith("gain"))).all(), name
    assert (model.bert.embeddings.word.weight[SMALL.pad_id] == 0).all()


# --- Files --------------------------------------------------------------------------------------------------


@pytest.mark.verifies("companion.models.bert.save_pretrained", against="transformers.BertForPreTraining")
@pytest.mark.parametrize("name", ["BertModel", *CLASSES])
def test_saved_files_load_in_transformers(judge, agree, tmp_path, name):
    config = dataclasses.replace(SMALL, activation="gelu_tanh", dropout=0.2, attention_dropout=0.3)
    mine = Bert(config) if name == "BertModel" else BertForPreTraining(config, **CLASSES[name])
    randomised(mine).eval()
    save_pretrained(mine, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == [name]
    theirs, report = getattr(judge, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (theirs.config.hidden_dropout_prob, theirs.config.attention_probs_dropout_prob) == (0.2, 0.3)
    ids, types, keep = inputs(config, 3, 11)
    expected = theirs.eval()(ids, attention_mask=keep.long(), token_type_ids=types).to_tuple()
    outputs = [x for x in mine(ids, types) if x is not None] if name != "BertModel" else [mine(ids, types)]
    for output, other in zip(outputs, expected, strict=False):
        agree(output, other, tolerance=1e-5, quantity="outputs of a saved model")
    again = load_pretrained(tmp_path)
    assert again.config == config
    assert again.state_dict().keys() == mine.state_dict().keys()
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in mine.state_dict().items())
    assert all(p.requires_grad for p in again.parameters())


def saved(folder, **options):
    model = randomised(BertForPreTraining(SMALL, **options)).eval()
    save_pretrained(model, folder)
    return model, safetensors.torch.load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    safetensors.torch.save_file({k: t.clone() for k, t in tensors.items()}, folder / "model.safetensors")


def test_older_names_are_read(tmp_path):
    """As in the files of BERT's authors: gamma and beta, buffers, and the output layer once more."""
    model, tensors = saved(tmp_path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(17)[None]
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    rewrite(tmp_path, old)
    ids, types, _ = inputs(SMALL, 3, 7)
    for mine, again in zip(model(ids, types), load_pretrained(tmp_path)(ids, types), strict=True):
        assert torch.equal(mine, again)


def test_precision_of_files(tmp_path):
    model = randomised(Bert(SMALL))
    save_pretrained(model, tmp_path, dtype=torch.float16)
    word = model.embeddings.word.weight
    assert load_pretrained(tmp_path, dtype=None).embeddings.word.weight.dtype == torch.float16
    read = load_pretrained(tmp_path).embeddings.word.weight
    assert torch.equal(read, word.half().float())
    assert load_pretrained(tmp_path / "model.safetensors", SMALL).config == SMALL


FAULTS = {
    "untied": (lambda t: t | {"cls.predictions.decoder.weight": t[WORDS] + 1}, "does not tie"),
    "other head": (lambda t: t | {"classifier.weight": torch.ones(2, 15)}, "adds classifier.weight"),
    "missing": (
        lambda t: {k: v for k, v in t.items() if k != "bert.encoder.layer.1.output.dense.bias"},
        "lacks bert.layers.1.feed_forward.down.bias",
    ),
    "fewer layers": (
        lambda t: {k: v for k, v in t.items() if ".layer.1." not in k},
        "it has 1 layers, not 2",
    ),
    "shape": (
        lambda t: t | {"cls.seq_relationship.bias": torch.ones(3)},
        "next_sentence.dense.bias has shape",
    ),
    "table": (lambda t: t | {WORDS: torch.ones(36, 15)}, "vocab_size is 37"),
    "vector": (lambda t: t | {WORDS: torch.ones(37)}, "must be a matrix"),
    "integers": (lambda t: t | {WORDS: torch.ones(37, 15, dtype=torch.long)}, "dtype"),
    "no pooler": (lambda t: {k: v for k, v in t.items() if "pooler" not in k}, "without a pooler"),
    "twice": (
        lambda t: t | {"bert.embeddings.LayerNorm.gamma": t["bert.embeddings.LayerNorm.weight"]},
        "twice",
    ),
    "nothing": (lambda t: {"x": torch.ones(1)}, "0 layers"),
}
WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_refused(tmp_path, fault):
    _, tensors = saved(tmp_path)
    change, message = FAULTS[fault]
    rewrite(tmp_path, change(tensors))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"hidden_size": 16}, "d_model"),
        ({"hidden_size": "15"}, "d_model"),
        ({"hidden_size": 10**30}, "d_model"),
        ({"num_hidden_layers": 10**12}, "layers"),
        ({"intermediate_size": 10**15}, "d_ff"),
        ({"vocab_size": True}, "vocab_size"),
        ({"layer_norm_eps": -1}, "norm_eps"),
        ({"layer_norm_eps": math.nan}, "norm_eps"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, changes, message):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_damaged_and_missing_files_are_refused(tmp_path):
    saved(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_pretrained(tmp_path)
    for text in (b"{", b"[1]", b"[" * 100_000, b"\xff"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match="config.json"):
            load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="model"):
        save_pretrained(nn.Linear(2, 2), tmp_path)


# --- Sentence vectors ---------------------------------------------------------------------------------------

SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply on Tuesday, after three days of gains.",
    "Rain.",
    "In the beginning God created the heaven and the earth.",
    "Attention weighs the values by how well their keys match a query.",
    "She didn't like the café, though its coffee cost only $3.50!",
    "The quick brown fox jumps over the lazy dog.",
    "Two dogs are running through the snow towards a frozen lake in the north of Norway.",
    "What is the capital of France?",
    "Paris is the capital of France.",
    "E = mc² is a formula that everybody knows and few can derive; unbelievably few, in fact.",
]


@pytest.fixture(scope="module")
def minilm():
    return SentenceEncoder.minilm()


@pytest.mark.verifies("companion.models.bert.SentenceEncoder", against="transformers.BertModel")
@pytest.mark.verifies("companion.models.bert.load_pretrained", against="transformers.BertModel")
def test_minilm_is_transformers(judge, agree, minilm):
    from tokenizers.implementations import BertWordPieceTokenizer

    folder = asset_path("minilm").parent
    theirs = judge.BertModel.from_pretrained(folder).eval()
    assert load_pretrained(folder).config == MINILM
    tokenizer = BertWordPieceTokenizer(str(asset_path("minilm-vocabulary")), lowercase=True)
    own = [[101, *minilm.tokenizer.encode(text), 102] for text in SENTENCES]
    rows = [tokenizer.encode(text).ids for text in SENTENCES]
    agree([i for row in own for i in row], [i for row in rows for i in row], tolerance=0, quantity="ids")
    with torch.no_grad():
        pooled = [theirs(torch.tensor([row])).last_hidden_state[0].double().numpy().mean(0) for row in rows]
        hidden = [theirs(torch.tensor([row])).last_hidden_state[0] for row in rows[:3]]
    vectors = [vector / math.sqrt(sum(x * x for x in vector)) for vector in pooled]
    found = minilm.encode(SENTENCES, batch_size=5)
    agree(found, vectors, tolerance=1e-5, quantity="sentence vectors of all-MiniLM-L6-v2")
    for row, expected in zip(rows, hidden, strict=False):
        agree(
            minilm.bert(torch.tensor([row]))[0].detach(),
            expected,
            tolerance=1e-5,
            quantity="token vectors of all-MiniLM-L6-v2",
        )
    similarity = found @ found.T
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]  # food and a meal; food and the stock market
    assert similarity[9, 10] > 0.7  # a question and its answer


@pytest.mark.verifies(
    "companion.models.bert.SentenceEncoder", against="sentence_transformers.SentenceTransformer"
)
def test_minilm_is_sentence_transformers(judge, agree, minilm):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(asset_path("minilm").parent), device="cpu")
    expected = theirs.encode(SENTENCES, batch_size=4, show_progress_bar=False)
    agree(minilm.encode(SENTENCES), expected, tolerance=1e-5, quantity="sentence vectors of all-MiniLM-L6-v2")


@pytest.mark.verifies("companion.models.bert.mean_pool", against="enumeration of the tokens")
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_pool(agree, dtype):
    hidden = torch.randn(3, 5, 4, dtype=dtype)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    hidden[~keep] = 1e9 if dtype == torch.float64 else 1e4  # what padding holds must not matter
    expected = [
        [math.fsum(x) / len(x) for x in zip(*(v for v, k in zip(row, kept, strict=True) if k), strict=True)]
        for row, kept in zip(hidden.tolist(), keep.tolist(), strict=True)
    ]
    agree(mean_pool(hidden, keep), torch.tensor(expected).double(), tolerance=1e-6, quantity="mean vectors")
    assert (mean_pool(hidden, torch.zeros(3, 5, dtype=torch.bool)) == 0).all()


def test_sentence_encoder_properties(minilm):
    texts = ["", "Rain.", "word " * 400]
    alone = torch.cat([minilm.encode([text]) for text in texts])
    torch.testing.assert_close(minilm.encode(texts), alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(3))
    cut = minilm.encode(["word " * 254])  # with [CLS] and [SEP], 256 tokens
    torch.testing.assert_close(cut[0], alone[2], rtol=0, atol=1e-6)
    minilm.train()
    torch.testing.assert_close(minilm.encode(texts[1:2]), alone[1:2], rtol=0, atol=1e-6)
    assert minilm.training
    assert minilm.bert.layers[0].dropout.training
    minilm.eval()
    plain = SentenceEncoder(minilm.bert, minilm.tokenizer, normalise=False)
    raw = plain.encode(texts[1:2])
    assert abs(float(raw.norm()) - 1) > 0.1
    torch.testing.assert_close(nn.functional.normalize(raw), alone[1:2])
    ids = torch.tensor([[101, 4542, 1012, 102]])
    ids = torch.cat([ids, torch.zeros(1, 2, dtype=torch.long)], 1)
    torch.testing.assert_close(minilm(ids).detach(), alone[1:2], rtol=0, atol=1e-6)
    assert minilm(ids).requires_grad


# --- Masked tokens ------------------------------------------------------------------------------------------


@pytest.mark.verifies(
    "companion.data.masking.mask_tokens", against="transformers.DataCollatorForLanguageModeling"
)
@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_masking_draws_what_transformers_draws(agree, probability):
    from transformers.data.data_collator import DataCollatorForLanguageModeling

    class Vocabulary(SimpleNamespace):
        def __len__(self):
            return 37

        def convert_tokens_to_ids(self, token):
            return SPECIAL.mask

    vocabulary = Vocabulary(mask_token="[MASK]", padding_side="right", pad_token="[PAD]")
    collator = DataCollatorForLanguageModeling(vocabulary, mlm_probability=probability)
    for shape in ((1, 1), (3, 11), (40, 33)):
        ids = torch.randint(0, 37, shape)
        special = torch.isin(ids, torch.tensor(SPECIAL.all))
        collator.generator = torch.Generator().manual_seed(5)
        expected = collator.torch_mask_tokens(ids.clone(), special)
        generator = torch.Generator().manual_seed(5)
        found = mask_tokens(ids, special=SPECIAL, vocab_size=37, probability=probability, generator=generator)
        for mine, theirs, name in zip(found, expected, ("corrupted ids", "labels"), strict=True):
            agree(mine, theirs, tolerance=0, quantity=name)


def within(count: int, total: int, p: float, sigmas: float = 5.0) -> bool:
    """Whether a binomial count is near its mean."""
    return abs(count - total * p) <= sigmas * math.sqrt(total * p * (1 - p))


@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_masking_statistics(probability):
    vocab_size = 11
    ids = torch.randint(0, vocab_size, (500, 401))
    before = ids.clone()
    corrupted, labels = mask_tokens(ids, special=SPECIAL, vocab_size=vocab_size, probability=probability)
    assert torch.equal(ids, before)
    special = torch.isin(ids, torch.tensor(SPECIAL.all))
    chosen = labels != NO_LABEL
    assert not (chosen & special).any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    total = int(chosen.sum())
    assert within(total, int((~special).sum()), probability)
    new, old = corrupted[chosen], ids[chosen]
    assert within(int((new == SPECIAL.mask).sum()), total, 0.8 + 0.1 / vocab_size)
    assert within(int((new == old).sum()), total, 0.1 + 0.1 / vocab_size)
    for other in range(vocab_size):  # the random tokens are uniform, special ones and the right one included
        if other != SPECIAL.mask:
            differs = old != other
            assert within(int((new[differs] == other).sum()), int(differs.sum()), 0.1 / vocab_size)
    rows = chosen.sum(1).double()  # independent places: the count of a row is binomial
    places = (~special).sum(1).double()
    deviation = (rows - places * probability) / (places * probability * (1 - probability)).sqrt()
    assert abs(float(deviation.var()) - 1) < 5 * math.sqrt(2 / len(rows))


def test_whole_words_are_masked_together():
    ids = torch.randint(9, 37, (300, 60))
    ids[:, 0], ids[:, -1] = SPECIAL.cls, SPECIAL.sep
    words = (torch.rand(300, 60) < 0.6).cumsum(1).clamp(max=59)
    _, labels = mask_tokens(ids, special=SPECIAL, vocab_size=37, words=words)
    chosen = labels != NO_LABEL
    inner = torch.arange(1, 59)
    same = words[:, inner[1:]] == words[:, inner[:-1]]
    assert torch.equal(chosen[:, inner[1:]][same], chosen[:, inner[:-1]][same])
    differ = chosen[:, inner[1:]][~same] != chosen[:, inner[:-1]][~same]
    assert within(int(differ.sum()), differ.numel(), 2 * 0.15 * 0.85, sigmas=8)  # neighbouring words
    assert not chosen[:, 0].any()
    assert not chosen[:, -1].any()


def test_masking_is_reproducible_and_may_choose_nothing():
    ids = torch.randint(9, 37, (3, 50), dtype=torch.int32)
    first, again = (
        mask_tokens(ids, special=SPECIAL, vocab_size=37, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0].dtype == first[1].dtype == torch.int64
    corrupted, labels = mask_tokens(ids, special=SPECIAL, vocab_size=37, probability=0)
    assert torch.equal(corrupted, ids.long())
    assert (labels == NO_LABEL).all()


# --- Pairs of segments --------------------------------------------------------------------------------------


def numbered_documents(count: int, sentences: int = 12) -> list[list[list[int]]]:
    """Documents in which the id tells the document and the place: 1000 d + 10, 11, 12, …"""
    documents = []
    for d in range(count):
        lengths = torch.randint(1, 9, (sentences,)).tolist()
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        documents.append(
            [
                [1000 * d + 10 + i for i in range(start, start + n)]
                for start, n in zip(starts, lengths, strict=False)
            ]
        )
    return documents


@pytest.mark.parametrize("max_tokens", [2, 7, 30])
def test_pairs_are_what_they_say(max_tokens):
    documents = numbered_documents(40)
    pairs = next_sentence_pairs(documents, max_tokens)
    assert pairs == next_sentence_pairs(documents, max_tokens)
    assert pairs != next_sentence_pairs(documents, max_tokens, seed=1)
    ends = {sentence[-1] for document in documents for sentence in document}
    for pair in pairs:
        assert 2 <= len(pair.first) + len(pair.second) <= max_tokens
        for segment in (pair.first, pair.second):
            assert segment == list(range(segment[0], segment[0] + len(segment)))  # contiguous text
        together = len(pair.first) + len(pair.second) < max_tokens
        if pair.follows:
            assert pair.first[0] // 1000 == pair.second[0] // 1000
            assert pair.second[0] > pair.first[-1]
            if together and max_tokens == 30:  # nothing was cut
                assert pair.second[0] == pair.first[-1] + 1
                assert pair.first[-1] in ends
        else:
            assert pair.first[0] // 1000 != pair.second[0] // 1000


def test_half_of_the_pairs_follow():
    count = 2000
    documents = numbered_documents(count)
    pairs = next_sentence_pairs(documents, 24, short_probability=0.0)
    assert len(pairs) > 5000
    assert within(sum(pair.follows for pair in pairs), len(pairs), 0.5, sigmas=4)
    unrelated = [pair for pair in pairs if not pair.follows]
    steps = Counter((pair.second[0] // 1000 - pair.first[0] // 1000) % count for pair in unrelated)
    assert 0 not in steps
    mean = len(unrelated) / (count - 1)
    chi_squared = sum((steps[d] - mean) ** 2 / mean for d in range(1, count))
    assert abs(chi_squared - (count - 2)) < 5 * math.sqrt(2 * (count - 2))  # uniform over other documents
    shorter = next_sentence_pairs(documents, 24, short_probability=0.5)
    sizes = [[len(pair.first) + len(pair.second) for pair in some] for some in (shorter, pairs)]
    assert sum(sizes[0]) / len(sizes[0]) < 0.9 * sum(sizes[1]) / len(sizes[1])


@pytest.mark.verifies("companion.data.masking.join_segments", against="tokenizers.processors.BertProcessing")
def test_joined_segments_are_tokenizers(agree):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import BertProcessing

    vocabulary = {str(i): i for i in range(37)}
    judge = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    judge.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    judge.post_processor = BertProcessing(("8", 8), ("5", 5))
    for first, second in (([9], [10]), ([9, 10, 11], [12]), ([30, 31], [12, 13, 14, 15]), ([9, 36], None)):
        texts = [" ".join(map(str, segment)) for segment in (first, second) if segment]
        expected = judge.encode(*texts)
        ids, types = join_segments(first, second, special=SPECIAL)
        agree(ids, expected.ids, tolerance=0, quantity="ids")
        agree(types, expected.type_ids, tolerance=0, quantity="token types")


def test_batches():
    pairs = [SegmentPair([9 + i], [20, 21 + i][: 1 + i % 2], follows=i % 3 == 0) for i in range(11)]
    options = {"special": SPECIAL, "vocab_size": 37}
    batches = list(pretraining_batches(pairs, 4, **options))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    seen = []
    for batch in batches:
        original = torch.where(batch.labels == NO_LABEL, batch.ids, batch.labels)
        assert torch.equal(batch.mask[:, 0, 0], original != SPECIAL.pad)
        for row, types, label in zip(original, batch.token_types, batch.next_sentence, strict=True):
            kept = row[row != SPECIAL.pad].tolist()
            pair = pairs[kept[1] - 9]
            assert (kept, types[: len(kept)].tolist()) == join_segments(
                pair.first, pair.second, special=SPECIAL
            )
            assert (types[len(kept) :] == 0).all()
            assert int(label) == (0 if pair.follows else 1)
            seen.append(kept[1] - 9)
    assert sorted(seen) == list(range(11))
    assert seen != sorted(seen)
    again = list(pretraining_batches(pairs, 4, **options))
    other = list(pretraining_batches(pairs, 4, epoch=1, **options))
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) for a, b in zip(batches, again))  # noqa: B905
    assert any(a.ids.shape != b.ids.shape or not torch.equal(a.ids, b.ids) for a, b in zip(batches, other))  # noqa: B905
    assert batches[0].to("cpu").ids.dtype == torch.int64


def test_a_small_bert_learns():
    """Sentences count upwards: what is masked can be told from its neighbours, and so can what follows."""
    documents = [
        [[9 + (start + s + i) % 28 for i in range(3)] for s in range(0, 24, 3)] for start in range(28)
    ]
    pairs = next_sentence_pairs(documents, 12, short_probability=0.0)
    batches = [
        b
        for epoch in range(4)
        for b in pretraining_batches(pairs, 32, special=SPECIAL, vocab_size=37, epoch=epoch)
    ]
    config = dataclasses.replace(
        SMALL, d_model=24, d_ff=48, dropout=0.0, attention_dropout=0.0, norm_eps=1e-5
    )
    model = BertForPreTraining(config)
    history = train(
        model, pretraining_loss, batches, AdamW(model.parameters(), lr=1e-2), steps=120, progress=False
    )
    first, last = history.losses[0], sum(history.losses[-10:]) / 10
    assert abs(first - (math.log(37) + math.log(2))) < 0.3  # at first every answer is as likely as another
    assert last < 0.6 * first


def test_a_batch_without_chosen_tokens_has_a_loss():
    model = BertForPreTraining(SMALL)
    pairs = [SegmentPair([9], [10], True), SegmentPair([11], [12], False)]
    batch = next(pretraining_batches(pairs, 2, special=SPECIAL, vocab_size=37, probability=0))
    total, count = pretraining_loss(model, batch)
    total.backward()
    assert count == 2
    assert abs(float(total.detach()) / 2 - math.log(2)) < 0.1
    assert (model.bert.embeddings.token_type.weight.grad != 0).any()


# --- Bad input ----------------------------------------------------------------------------------------------

IDS = torch.randint(3, 37, (2, 5))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size"),
        ({"num_token_types": 1.0}, TypeError, "num_token_types"),
        ({"num_heads": 7}, ValueError, "d_model"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"attention_dropout": -0.1}, ValueError, "attention_dropout"),
        ({"activation": "swiglu"}, ValueError, "activation"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps"),
        ({"pad_id": 30522}, ValueError, "pad_id"),
    ],
)
def test_bad_configurations_are_refused(options, error, name):
    with pytest.raises(error, match=name):
        BertConfig(**options)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: Bert(SMALL)(IDS.float()), TypeError, "ids"),
        (lambda: Bert(SMALL)(IDS[0]), ValueError, "ids"),
        (lambda: Bert(SMALL)(IDS + 30), ValueError, "ids"),
        (lambda: Bert(SMALL)(torch.ones(1, 18, dtype=torch.long)), ValueError, "max_length"),
        (lambda: Bert(SMALL)(IDS, IDS[:, 1:] * 0), ValueError, "token_types"),
        (lambda: Bert(SMALL)(IDS, IDS * 0 + 3), ValueError, "token_types"),
        (lambda: Bert(SMALL)(IDS, mask=torch.ones(2, 5)), TypeError, "mask"),
        (lambda: Bert(SMALL)(IDS, mask=torch.ones(2, 5).bool()), ValueError, "mask"),
        (lambda: Pooler(15)(torch.ones(2, 15)), ValueError, "hidden"),
        (lambda: MaskedLMHead(SMALL)(torch.ones(2, 14), torch.ones(37, 15)), ValueError, "hidden"),
        (lambda: MaskedLMHead(SMALL)(torch.ones(2, 15), torch.ones(36, 15)), ValueError, "word_table"),
        (lambda: NextSentenceHead(SMALL)(torch.ones(2, 3, 15)), ValueError, "pooled"),
        (lambda: BertForPreTraining(SMALL, masked_lm=False, next_sentence=False), ValueError, "masked_lm"),
        (lambda: BertForPreTraining(SMALL, pooler=False), ValueError, "pooler"),
        (lambda: BertForPreTraining(SMALL)(IDS, positions=IDS), TypeError, "positions"),
        (lambda: BertForPreTraining(SMALL)(IDS, positions=IDS[:1] > 3), ValueError, "positions"),
        (lambda: mean_pool(torch.ones(2, 3, 4), torch.ones(2, 3)), TypeError, "keep"),
        (lambda: mean_pool(torch.ones(2, 3, 4), torch.ones(2, 1).bool()), ValueError, "keep"),
        (lambda: mean_pool([1.0], torch.ones(2, 3).bool()), TypeError, "hidden"),
        (lambda: SentenceEncoder(nn.Linear(2, 2), None), TypeError, "bert"),
        (
            lambda: SentenceEncoder(Bert(SMALL), None, special=SPECIAL, max_tokens=18),
            ValueError,
            "max_tokens",
        ),
        (lambda: SentenceEncoder(Bert(SMALL), None, max_tokens=17), ValueError, "special.pad"),
        (lambda: SpecialIds(pad=101), ValueError, "differ"),
        (lambda: SpecialIds(cls=-1), ValueError, "cls"),
        (lambda: SpecialIds(mask="[MASK]"), TypeError, "mask"),
        (lambda: mask_tokens(IDS, special=SPECIAL, vocab_size=3), ValueError, "special.mask"),
        (
            lambda: mask_tokens(IDS, special=SPECIAL, vocab_size=37, probability=1.5),
            ValueError,
            "probability",
        ),
        (lambda: mask_tokens(IDS, special=SPECIAL, vocab_size=37, words=IDS[:1] * 0), ValueError, "words"),
        (lambda: mask_tokens(IDS, special=SPECIAL, vocab_size=37, words=IDS * 0 + 5), ValueError, "words"),
        (lambda: next_sentence_pairs([[[9]], [[9]]], 1), ValueError, "max_tokens"),
        (lambda: next_sentence_pairs([[[9], [10]]], 8), ValueError, "documents"),
        (lambda: next_sentence_pairs([[[9]], []], 8), ValueError, r"documents\[1\]"),
        (lambda: next_sentence_pairs([[[9]], [[9], []]], 8), ValueError, r"documents\[1\]\[1\]"),
        (lambda: next_sentence_pairs([["abc"], [[9]]], 8), TypeError, r"documents\[0\]\[0\]"),
        (lambda: join_segments([], special=SPECIAL), ValueError, "first"),
        (lambda: join_segments([9], [8], special=SPECIAL), ValueError, "special.sep"),
        (lambda: pretraining_batches([], 2, special=SPECIAL, vocab_size=37), ValueError, "pairs"),
        (lambda: pretraining_batches([1], 0, special=SPECIAL, vocab_size=37), ValueError, "batch_size"),
    ],
)
def test_bad_input_is_refused(call, error, name):
    with pytest.raises(error, match=name):
        call()


@pytest.mark.parametrize(
    ("texts", "options", "error", "name"),
    [
        ("Rain.", {}, TypeError, "texts"),
        ([], {}, ValueError, "texts"),
        (["Rain.", 3], {}, TypeError, r"texts\[1\]"),
        (["Rain."], {"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_bad_texts_are_refused(minilm, texts, options, error, name):
    with pytest.raises(error, match=name):
        minilm.encode(texts, **options)
    with pytest.raises(ValueError, match="mask"):
        minilm(torch.tensor([[101, 102]]), torch.ones(1, 3, dtype=torch.bool))
