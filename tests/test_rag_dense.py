"""companion.rag.dense beside definitions, cross-entropy written out, and a training loop of torch's parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.data.masking import SpecialIds
from companion.models.bert import Bert, BertConfig, SentenceEncoder
from companion.rag.dense import Projection, info_nce, similarity, train_encoder
from companion.tokenizers.wordpiece import WordPieceTokenizer


def _rows(*shape, dtype=torch.float64):
    return (torch.randn(*shape, dtype=torch.float64) * torch.rand(shape[0], 1).add(0.3)).to(dtype)


# ------------------------------------------------------------------------------------------------ similarity


@pytest.mark.verifies("companion.rag.dense.similarity", against="the definitions, one pair at a time")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_similarity(agree, batch, dtype, tolerance):
    queries, documents = _rows(batch, 5, dtype=dtype), _rows(7, 5, dtype=dtype)
    for kind in ("cosine", "dot", "euclidean"):
        expected = []
        for q in queries.tolist():
            for d in documents.tolist():
                product = sum(a * b for a, b in zip(q, d, strict=True))
                lengths = (sum(a * a for a in q) * sum(b * b for b in d)) ** 0.5
                distance = sum((a - b) ** 2 for a, b in zip(q, d, strict=True)) ** 0.5
                expected.append({"cosine": product / lengths, "dot": product, "euclidean": -distance}[kind])
        expected = torch.tensor(expected, dtype=torch.float64).view(batch, 7)
        agree(similarity(queries, documents, kind), expected, tolerance=tolerance, quantity=kind)


def test_the_three_agree_on_documents_of_one_length_and_not_on_others():
    queries, documents = _rows(20, 8), _rows(50, 8)
    of_one_length = 3 * F.normalize(documents, dim=-1)

    def orders(documents):
        return [similarity(queries, documents, kind).argsort(-1) for kind in ("cosine", "dot", "euclidean")]

    cosine, dot, euclidean = orders(of_one_length)
    assert torch.equal(cosine, dot) and torch.equal(cosine, euclidean)
    cosine, dot, euclidean = orders(documents)
    assert not torch.equal(cosine, dot) and not torch.equal(dot, euclidean)
    assert not torch.equal(cosine, euclidean)


def test_small_distances_keep_their_digits():
    far = torch.full((30, 384), 100.0)
    near = far + 1e-3
    torch.testing.assert_close(similarity(far, near, "euclidean"), -(near - far).norm(dim=-1).expand(30, 30))
    assert similarity(torch.zeros(1, 3), torch.ones(2, 3)).tolist() == [[0.0, 0.0]]


# -------------------------------------------------------------------------------------------------- InfoNCE


def _multiple_negatives(queries, documents, negatives, scale, symmetric):
    """sentence-transformers' loss as documented: F.cross_entropy of scale · cosine, label i for row i."""

    def cosines(a, b):
        return a @ b.T / (a.norm(dim=1)[:, None] * b.norm(dim=1))

    candidates = documents if negatives is None else torch.cat([documents, negatives])
    labels = torch.arange(len(queries))
    loss = F.cross_entropy(scale * cosines(queries, candidates), labels)
    if symmetric:
        loss = (loss + F.cross_entropy(scale * cosines(documents, queries), labels)) / 2
    return loss


@pytest.mark.verifies(
    "companion.rag.dense.info_nce", against="torch.nn.functional.cross_entropy of 20 · cosine"
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard", [0, 1, 4])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_info_nce(agree, batch, hard, symmetric):
    inputs = [_rows(batch, 6), _rows(batch, 6), _rows(hard, 6) if hard else None]
    results = []
    for loss in (
        lambda q, d, n: info_nce(q, d, hard_negatives=n, symmetric=symmetric),
        lambda q, d, n: _multiple_negatives(q, d, n, 20.0, symmetric),
    ):
        leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
        value = loss(*leaves)
        value.backward()
        results.append((value, *[x.grad for x in leaves if x is not None]))
    names = ("loss", "gradient, queries", "gradient, documents", "gradient, hard negatives")
    for name, mine, theirs in zip(names, *results, strict=False):
        agree(mine, theirs, tolerance=1e-13, quantity=name)


@pytest.mark.verifies(
    "companion.rag.dense.info_nce", against="sentence_transformers.losses.MultipleNegativesRankingLoss"
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard", [0, 5])
def test_info_nce_is_sentence_transformers(agree, hard, symmetric):
    """Their class embeds texts; here its model hands out vectors that we choose."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    judge = MultipleNegativesRankingLoss(
        lambda features: {"sentence_embedding": features["vectors"]}, **(both if symmetric else {})
    )
    columns = [_rows(5, 6), _rows(5, 6), *([_rows(hard, 6)] if hard else [])]
    mine, theirs = ([x.clone().requires_grad_() for x in columns] for _ in range(2))
    loss = info_nce(mine[0], mine[1], hard_negatives=mine[2] if hard else None, symmetric=symmetric)
    expected = judge([{"vectors": x} for x in theirs], None)
    agree(loss, expected, tolerance=1e-13, quantity="loss")
    for x, own, other in zip(
        ("queries", "documents", "hard negatives"),
        torch.autograd.grad(loss, mine),
        torch.autograd.grad(expected, theirs),
        strict=False,
    ):
        agree(own, other, tolerance=1e-13, quantity=f"gradient, {x}")


def test_info_nce_by_hand():
    """Two orthogonal pairs: −log(e^(1/t) / (e^(1/t) + 1)); a document twice in the batch costs log 2."""
    x = torch.eye(2, dtype=torch.float64)
    assert info_nce(x, x, 0.5).item() == pytest.approx(torch.tensor(1 + 2.718281828459045**-2).log().item())
    twice = torch.tensor([[1.0, 0], [1, 0]])
    assert info_nce(twice, twice, 0.1).item() == pytest.approx(torch.tensor(2.0).log().item())
    other = ~torch.eye(2, dtype=torch.bool)
    assert info_nce(twice, twice, 0.1, ignore=other).item() == pytest.approx(0, abs=1e-6)


def test_what_is_ignored_gets_no_gradient_and_the_order_of_negatives_is_nothing():
    queries, documents, negatives = _rows(4, 5), _rows(4, 5), _rows(3, 5).requires_grad_()
    ignore = torch.zeros(4, 7, dtype=torch.bool)
    ignore[:, 5] = True
    info_nce(queries, documents, hard_negatives=negatives, ignore=ignore).backward()
    assert negatives.grad[1].abs().max() == 0 and negatives.grad[0].abs().max() > 0
    losses = [info_nce(queries, documents, hard_negatives=n) for n in (negatives, negatives.flip(0))]
    torch.testing.assert_close(*losses)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(info_nce(queries[order], documents[order]), info_nce(queries, documents))


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.verifies("companion.rag.dense.train_encoder", against="a loop of torch.optim.AdamW")
@pytest.mark.parametrize("symmetric", [False, True])
def test_training(agree, symmetric):
    """Whole batches, so that order is nothing; pairs that share queries and passages; hard negatives."""
    queries, passages = _rows(4, 6), _rows(9, 6)
    pairs = torch.tensor([[0, 0], [0, 1], [1, 2], [2, 2], [3, 3]])
    hard, exempt = torch.tensor([[4], [5], [0], [6], [7]]), torch.tensor([[1, 3]])
    encoder = Projection(6, 4).double()
    history = train_encoder(
        encoder,
        queries,
        passages,
        pairs,
        steps=7,
        learning_rate=0.01,
        hard_negatives=hard,
        exempt=exempt,
        symmetric=symmetric,
    )

    weight = torch.eye(4, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0)
    known, losses = {*map(tuple, pairs.tolist()), (1, 3)}, []
    candidates = [*pairs[:, 1].tolist(), *hard.flatten().tolist()]
    for _ in range(7):
        rows = []
        for i, (q, p) in enumerate(pairs.tolist()):
            kept = [c for j, c in enumerate(candidates) if j != i and (q, c) not in known]
            asked, found = weight @ queries[q], passages[[p, *kept]] @ weight.T
            logits = 20 * F.cosine_similarity(asked[None], found)
            rows.append(logits.logsumexp(0) - logits[0])
        loss = torch.stack(rows).mean()
        if symmetric:
            back = []
            for i, (q, p) in enumerate(pairs.tolist()):
                kept = [x for j, x in enumerate(pairs[:, 0].tolist()) if j != i and (x, p) not in known]
                asked, found = queries[[q, *kept]] @ weight.T, weight @ passages[p]
                logits = 20 * F.cosine_similarity(asked, found[None])
                back.append(logits.logsumexp(0) - logits[0])
            loss = (loss + torch.stack(back).mean()) / 2
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    agree(
        history.losses,
        losses,
        tolerance=1e-10,
        quantity="losses",
    )
    agree(encoder.weight, weight, tolerance=1e-12, quantity="weights after 7 steps")


@pytest.mark.verifies("companion.rag.dense.Projection", against="torch.nn.Linear, normalised")
@pytest.mark.parametrize("d_out", [None, 3])
def test_projection(agree, d_out):
    projection, x = Projection(6, d_out).double(), _rows(5, 6)
    assert torch.equal(projection(x), F.normalize(x[:, :d_out], dim=-1))
    nn.init.normal_(projection.weight)
    linear = nn.Linear(6, d_out or 6, bias=False, dtype=torch.float64)
    linear.load_state_dict(projection.state_dict())
    expected = linear(x)
    agree(projection(x), expected / expected.norm(dim=-1, keepdim=True), tolerance=1e-14, quantity="vectors")


def test_a_hidden_rotation_is_learnt_and_holds_for_new_queries():
    documents = F.normalize(torch.randn(400, 16), dim=-1)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    queries = documents @ rotation + 0.1 * torch.randn(400, 16)
    pairs = torch.arange(300)[:, None].repeat(1, 2)
    encoder = Projection(16)

    def found(encoder):
        with torch.no_grad():
            best = similarity(encoder(queries[300:]), documents).argmax(-1)
        return (best == torch.arange(300, 400)).float().mean().item()

    assert found(encoder) < 0.1
    history = train_encoder(
        encoder, queries, documents, pairs, steps=200, learning_rate=1e-2, passage_encoder=nn.Identity()
    )
    assert found(encoder) > 0.9 and history.losses[-1] < history.losses[0] / 4


class Recorder(Projection):
    """What it is given, call by call: the queries of a step, then its passages."""

    def forward(self, x):
        self.seen = [*getattr(self, "seen", []), x[:, 0].tolist()]
        return super().forward(x)


def test_each_pair_comes_once_before_any_comes_again():
    encoder, numbers = Recorder(2), torch.arange(1.0, 11)
    queries = torch.stack([numbers, torch.ones(10)], 1)
    passages, pairs = queries.flip(0) * 100, torch.stack([torch.arange(10), 9 - torch.arange(10)], 1)
    train_encoder(encoder, queries, passages, pairs, steps=6, batch_size=3)
    asked, found = encoder.seen[::2], encoder.seen[1::2]
    assert [[x * 100 for x in row] for row in asked] == found
    epochs = [sum(asked[:3], []), sum(asked[3:], [])]
    assert [len(set(epoch)) for epoch in epochs] == [9, 9] and epochs[0] != epochs[1]


def _tiny_encoder():
    torch.manual_seed(1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "round", "flat"]
    words += ["rot", "vert", "bleu", "rond", "plat"]
    config = BertConfig(len(words), d_model=16, num_layers=1, num_heads=2, d_ff=32, max_length=16)
    tokenizer = WordPieceTokenizer(words)
    return SentenceEncoder(
        Bert(config, pooler=False), tokenizer, special=SpecialIds(0, 2, 3, 4), max_tokens=8
    )


def test_a_sentence_encoder_learns_from_texts_and_the_seed_decides():
    english = [f"{c} {s}" for c in ("red", "green", "blue") for s in ("round", "flat")]
    french = [f"{s} {c}" for c in ("rot", "vert", "bleu") for s in ("rond", "plat")]
    pairs, weights = torch.arange(6)[:, None].repeat(1, 2), []
    for seed in (0, 0, 1):
        encoder = _tiny_encoder().eval()
        torch.manual_seed(0)
        options = {"steps": 80, "batch_size": 4, "learning_rate": 5e-3, "seed": seed}
        train_encoder(encoder, english, french, pairs, **options)
        assert not encoder.training
        best = similarity(encoder.encode(english), encoder.encode(french)).argmax(-1)
        assert best.tolist() == list(range(6))
        weights.append(encoder.bert.embeddings.word.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ------------------------------------------------------------------------------------------------ bad input

X = torch.eye(3)
PAIRS = torch.tensor([[0, 0], [1, 1]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: similarity(X, X, "manhattan"), ValueError, "kind must be one of 'cosine'"),
        (lambda: similarity(X, X[:, :2]), ValueError, r"queries must have shape \(..., 2\)"),
        (lambda: similarity(X, X[:0]), ValueError, "documents must have shape"),
        (lambda: similarity(X.long(), X), TypeError, "queries must be a floating-point tensor"),
        (lambda: info_nce(X, X[:2]), ValueError, "queries must be as many as documents, 2"),
        (lambda: info_nce(X, X, 0), ValueError, "temperature must be positive and finite, got 0"),
        (lambda: info_nce(X, None), TypeError, "documents must be a torch.Tensor, got NoneType"),
        (lambda: info_nce(X, X, hard_negatives=X[:, :2]), ValueError, "hard_negatives must have shape"),
        (lambda: info_nce(X, X, ignore=X.bool()), ValueError, "ignore must have shape .* diagonal of False"),
        (lambda: info_nce(X, X, ignore=X), TypeError, "ignore must be a bool tensor"),
        (lambda: Projection(0), ValueError, "d_model must be at least 1"),
        (lambda: train_encoder(Projection(3), X, X, PAIRS + 2, steps=1), ValueError, "pairs must name rows"),
        (
            lambda: train_encoder(Projection(3), X, X, PAIRS[0], steps=1),
            ValueError,
            r"pairs must .* \(n, 2\)",
        ),
        (
            lambda: train_encoder(Projection(3), X, X, X[:, :2], steps=1),
            TypeError,
            "pairs must be an integer",
        ),
        (
            lambda: train_encoder(Projection(3), ["a"], X, PAIRS, steps=1),
            TypeError,
            "queries must be a torch",
        ),
        (
            lambda: train_encoder(_tiny_encoder(), X, X, PAIRS, steps=1),
            TypeError,
            "queries must be a sequence",
        ),
        (
            lambda: train_encoder(Projection(3), X, X, PAIRS, steps=1, hard_negatives=PAIRS[:1]),
            ValueError,
            "hard_negatives must have 2 rows, one a pair, got 1",
        ),
        (lambda: train_encoder(Projection(3), X, X, PAIRS, steps=0), ValueError, "steps must be at least 1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
