"""companion.rag.rerank beside transformers, brute force, and training loops of torch's own parts."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from companion.data.masking import SpecialIds
from companion.models.bert import Bert, BertConfig, SentenceEncoder, save_pretrained
from companion.rag.rerank import CrossEncoder, LateInteraction, max_sim, rerank, train_cross_encoder
from companion.tokenizers.wordpiece import WordPieceTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "round", "flat", "##ter", "a"]
SPECIAL = SpecialIds(0, 2, 3, 4)


def _bert(dtype=torch.float64, dropout=0.0, pooler=True):
    sizes = {"d_model": 12, "num_layers": 2, "num_heads": 3, "d_ff": 20, "max_length": 24}
    bert = Bert(BertConfig(len(WORDS), **sizes, dropout=dropout, attention_dropout=dropout), pooler=pooler)
    for p in bert.parameters():
        nn.init.normal_(p, std=0.5)
    return bert.to(dtype).eval()


def _cross_encoder(dtype=torch.float64, max_tokens=14, dropout=0.0):
    model = CrossEncoder(
        _bert(dtype, dropout), WordPieceTokenizer(WORDS), special=SPECIAL, max_tokens=max_tokens
    )
    for p in model.head.parameters():
        nn.init.normal_(p)
    return model.to(dtype)


MODEL = _cross_encoder()
TEXTS = ["red", "a flatter, redter blue", "green " * 30, "a", "roundter round", "blue a blue", "unknown !"]


# -------------------------------------------------------------------------------------------- cross-encoder


@pytest.mark.verifies(
    "companion.rag.rerank.CrossEncoder",
    against="transformers.models.bert.modeling_bert.BertForSequenceClassification",
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_cross_encoder(agree, tmp_path, dtype, tolerance):
    from tokenizers import BertWordPieceTokenizer
    from transformers.models.bert.modeling_bert import BertForSequenceClassification

    mine = _cross_encoder(dtype)
    save_pretrained(mine.bert, tmp_path)
    theirs = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=1).to(dtype).eval()
    theirs.classifier.load_state_dict(mine.head.state_dict())
    tokenizer = BertWordPieceTokenizer({word: i for i, word in enumerate(WORDS)}, lowercase=True)
    tokenizer.enable_truncation(14, strategy="only_second")
    tokenizer.enable_padding()
    for query, passages in (("a red round", TEXTS), ("flatter", TEXTS[1:2])):
        pairs = tokenizer.encode_batch([(query, passage) for passage in passages])
        names = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        inputs = {theirs: torch.tensor([getattr(pair, x) for pair in pairs]) for theirs, x in names.items()}
        expected = theirs(**inputs).logits.squeeze(-1)
        scores = mine.score(query, passages, batch_size=3)
        agree(scores, expected, tolerance=tolerance, quantity="scores, from texts")
    mine(inputs["input_ids"], inputs["token_type_ids"]).sum().backward()
    theirs(**inputs).logits.sum().backward()
    judged = theirs.bert.embeddings.word_embeddings.weight.grad
    assert judged.abs().max() > 1e-3
    agree(mine.bert.embeddings.word.weight.grad, judged, tolerance=10 * tolerance, quantity="gradient")


def test_a_long_query_leaves_the_passage_room():
    model = _cross_encoder()
    ids, types = model._row("red " * 30, "blue " * 30)
    assert len(ids) == 14 and ids.count(WORDS.index("red")) == 7 and ids.count(WORDS.index("blue")) == 4
    assert types == [0] * 9 + [1] * 5
    assert model.score("", ["", "a"]).isfinite().all()


@given(st.text(), st.text())
def test_any_two_strings_are_a_pair(query, passage):
    ids, types = MODEL._row(query, passage)
    assert len(ids) == len(types) <= 14 and ids.count(3) == 2 and ids[0] == 2 and types == sorted(types)
    assert MODEL.score(query, [passage]).isfinite().all()


def test_scores_do_not_depend_on_the_batch_nor_on_training_mode():
    model = _cross_encoder(dropout=0.5).train()
    scores = model.score("a red round", TEXTS, batch_size=2)
    assert model.training
    torch.testing.assert_close(scores, model.score("a red round", TEXTS[::-1], batch_size=7).flip(0))
    assert len(set(scores.tolist())) == len(TEXTS)


def test_first_layers_of_minilm():
    model, whole = CrossEncoder.minilm(2), SentenceEncoder.minilm().bert
    ids = torch.randint(1000, 30000, (2, 9))
    with torch.no_grad():
        x = whole.embeddings(ids)
        for layer in whole.layers[:2]:
            x = layer(x)
        assert torch.equal(model.bert(ids), x)
    assert model.bert.config.num_layers == len(model.bert.layers) == 2
    assert model.score("Who wept?", ["Jesus wept.", "In the beginning was the Word."]).shape == (2,)


@pytest.mark.verifies("companion.rag.rerank.train_cross_encoder", against="a loop of torch.optim.AdamW")
def test_training(agree):
    groups = torch.tensor([[0, 0, 1, 3], [1, 4, 5, 2], [2, 5, 0, 1]])
    model, judge = _cross_encoder(), _cross_encoder()
    judge.load_state_dict(model.state_dict())
    queries = ["red", "a round", "blue"]
    history = train_cross_encoder(model, queries, TEXTS, groups, steps=4, learning_rate=1e-3)
    optimizer, losses = torch.optim.AdamW(judge.parameters(), lr=1e-3), []
    for _ in range(4):
        loss = 0.0
        for query, *rows in groups.tolist():
            scores = []
            for row in rows:  # one pair at a time, without padding
                ids, types = judge._row(queries[query], TEXTS[row])
                scores.append(judge(torch.tensor([ids]), torch.tensor([types])))
            loss = loss + F.cross_entropy(torch.cat(scores)[None], torch.tensor([0])) / len(groups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    agree(
        history.losses,
        losses,
        tolerance=1e-10,
        quantity="losses",
    )
    mine, theirs = dict(model.named_parameters()), dict(judge.named_parameters())
    agree(mine, theirs, tolerance=1e-8, quantity="weights after 4 steps")


def test_each_group_comes_once_before_any_comes_again(monkeypatch):
    model, seen, queries = _cross_encoder(), [], ["red", "green", "blue", "round", "flat"]
    row = model._row
    monkeypatch.setattr(model, "_row", lambda query, passage: seen.append(query) or row(query, passage))
    groups = torch.stack([torch.arange(5), torch.arange(5), torch.arange(1, 6)], 1)
    train_cross_encoder(model, queries, TEXTS, groups, steps=4, batch_size=2)
    asked = seen[::2]
    assert len(asked) == 8 and len(set(asked[:4])) == len(set(asked[4:])) == 4 and asked[:4] != asked[4:]


def test_it_learns_that_query_and_passage_share_a_colour():
    colours, shapes = ["red", "green", "blue"], ["round", "flat", "a"]
    passages = [f"{shape} {colour}" for colour in colours for shape in shapes]
    groups = [
        [q, 3 * q + s, *(3 * c + t for c in range(3) if c != q for t in range(2))]
        for q, s in itertools.product(range(3), range(2))
    ]
    torch.manual_seed(3)
    sizes = {"d_model": 24, "num_layers": 2, "num_heads": 2, "d_ff": 48, "max_length": 16}
    config = BertConfig(len(WORDS), **sizes, dropout=0.0, attention_dropout=0.0)
    model = CrossEncoder(Bert(config), WordPieceTokenizer(WORDS), special=SPECIAL, max_tokens=12)
    history = train_cross_encoder(
        model, colours, passages, torch.tensor(groups), steps=150, batch_size=6, learning_rate=5e-3
    )
    assert history.losses[0] > 1.2 and history.losses[-1] < 0.3
    for q, colour in enumerate(colours):  # "a red" was in no group
        unseen = [passages[3 * c + 2] for c in range(3)]
        assert rerank(colour, unseen, model.score, 1)[0][0] == f"a {colours[q]}"


# ----------------------------------------------------------------------------------------- late interaction


@pytest.mark.verifies("companion.rag.rerank.max_sim", against="brute force, one pair of tokens at a time")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("q, p", [(1, 1), (3, 5)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_max_sim(agree, q, p, masked, dtype, tolerance):
    queries, documents = torch.randn(q, 4, 6, dtype=dtype), torch.randn(p, 7, 6, dtype=dtype)
    keep_q = torch.arange(4) < torch.randint(1, 5, (q, 1)) if masked else torch.ones(q, 4, dtype=torch.bool)
    keep_d = torch.rand(p, 7) < 0.5 if masked else torch.ones(p, 7, dtype=torch.bool)
    keep_d[:, 3] = True
    expected = torch.zeros(q, p, dtype=torch.float64)
    for i, j in itertools.product(range(q), range(p)):
        for t in range(4):
            if keep_q[i, t]:
                matches = [
                    queries[i, t].double() @ documents[j, u].double() for u in range(7) if keep_d[j, u]
                ]
                expected[i, j] += max(matches)
    mine = max_sim(queries, documents, *((keep_q, keep_d) if masked else ()))
    agree(mine, expected, tolerance=tolerance, quantity="masked" if masked else "unmasked")


def test_gradients_reach_the_best_matches_alone():
    queries, documents = torch.randn(2, 3, 5).double(), torch.randn(2, 4, 5).double()
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    documents.requires_grad_(), queries.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, d: max_sim(q, d, None, mask), (queries, documents))
    max_sim(queries[:1, :1], documents[:1]).backward()
    assert (documents.grad[0].abs().sum(-1) > 0).sum() == 1 and documents.grad[1].abs().max() == 0


@pytest.mark.verifies(
    "companion.rag.rerank.LateInteraction", against="transformers.models.bert.modeling_bert.BertModel"
)
def test_late_interaction(agree, tmp_path):
    from transformers.models.bert.modeling_bert import BertModel

    bert, tokenizer = _bert(pooler=False), WordPieceTokenizer(WORDS)
    encoder = SentenceEncoder(bert, tokenizer, special=SPECIAL, max_tokens=10)
    save_pretrained(bert, tmp_path)
    theirs = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).double().eval()

    def vectors(text):
        ids = [2, *tokenizer.encode(text)[:8], 3]
        return F.normalize(theirs(torch.tensor([ids])).last_hidden_state[0], dim=-1)

    asked = vectors("a flatter red")
    expected = torch.stack([(asked @ vectors(text).T).max(1).values.sum() for text in TEXTS])
    mine = LateInteraction(encoder.train()).score("a flatter red", TEXTS)
    assert encoder.training
    agree(mine, expected, tolerance=1e-12, quantity="scores")


# ------------------------------------------------------------------------------------------------ reranking


@dataclass(frozen=True)
class Found:
    text: str


@pytest.mark.verifies("companion.rag.rerank.rerank", against="every order, tried")
@pytest.mark.parametrize("k", [None, 1, 3, 9])
def test_rerank(agree, k):
    values = {"p": 0.5, "q": 2.0, "r": -1.0, "s": 0.5, "t": 2.0}
    mine = rerank("?", list(values), lambda query, texts: [values[text] for text in texts], k)

    def is_right(order):
        keys = [(-values[text], "pqrst".index(text)) for text in order]
        return all(a < b for a, b in itertools.pairwise(keys))

    (expected,) = [order for order in itertools.permutations(values) if is_right(order)]
    agree([text for text, _ in mine], list(expected[:k]), tolerance=0, quantity="order, ties included")
    assert [score for _, score in mine] == [values[text] for text, _ in mine]


def test_rerank_takes_passages_and_tensors_and_calls_no_scorer_for_none():
    passages, calls = [Found("a"), Found("a b c"), Found("a b")], []

    def scorer(query, texts):
        calls.append((query, texts))
        return torch.tensor([float(len(text)) for text in texts])

    assert [passage.text for passage, _ in rerank("?", passages, scorer, 2)] == ["a b c", "a b"]
    assert rerank("?", [], scorer) == [] and calls == [("?", ["a", "a b c", "a b"])]


# ------------------------------------------------------------------------------------------------ bad input

X = torch.ones(2, 3, 4)
GROUPS = torch.tensor([[0, 0, 1]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: rerank("?", ["a"], lambda q, t: [1, 2]), ValueError, "scorer must return 1 scores"),
        (lambda: rerank("?", ["a"], lambda q, t: [float("nan")]), ValueError, "got NaN"),
        (lambda: rerank("?", ["a"], lambda q, t: [1], 0), ValueError, "k must be at least 1"),
        (lambda: rerank(None, ["a"], lambda q, t: [1]), TypeError, "query must be a str, got NoneType"),
        (lambda: max_sim(X, X[:, :, :2]), ValueError, r"queries must have shape \(..., 2\)"),
        (lambda: max_sim(X[0], X), ValueError, "queries must have 3 dimensions"),
        (lambda: max_sim(X, X[0]), ValueError, r"documents must have shape \(p, m, d\)"),
        (
            lambda: max_sim(X, X, X[0].bool()),
            ValueError,
            r"query_mask must have shape \(2, 3\), got \(3, 4\)",
        ),
        (lambda: max_sim(X, X, None, X[..., 0] < 0), ValueError, "document_mask must keep a token"),
        (lambda: CrossEncoder(_bert(pooler=False), None), ValueError, "bert must have a pooler"),
        (lambda: CrossEncoder(None, None), TypeError, "bert must be a Bert, got NoneType"),
        (lambda: CrossEncoder(_bert(), None, max_tokens=25), ValueError, "max_tokens must lie in 8 … 24"),
        (lambda: CrossEncoder.minilm(7), ValueError, "layers must be at most 6, got 7"),
        (lambda: _cross_encoder().score("a", "b"), TypeError, "passages must be a sequence of str, got str"),
        (lambda: _cross_encoder().score("a", []), ValueError, "passages must hold at least one text"),
        (lambda: _cross_encoder().score("a", ["a", 1]), TypeError, r"passages\[1\] must be a str, got int"),
        (lambda: LateInteraction(_bert()), TypeError, "encoder must be a SentenceEncoder, got Bert"),
        (
            lambda: train_cross_encoder(_cross_encoder(), ["a"], TEXTS, GROUPS[:, :2], steps=1),
            ValueError,
            r"groups must have shape \(G, 2 \+ m\)",
        ),
        (
            lambda: train_cross_encoder(_cross_encoder(), ["a"], TEXTS, GROUPS + 1, steps=1),
            ValueError,
            "groups must name rows below 1 and 7",
        ),
        (
            lambda: train_cross_encoder(_bert(), ["a"], TEXTS, GROUPS, steps=1),
            TypeError,
            "model must be a CrossEncoder, got Bert",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
