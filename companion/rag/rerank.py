"""Reranking: a slower, better scorer reads again what a fast search found.

A cross-encoder reads query and passage as one text, so that every word of one attends to every word of the
other (Nogueira & Cho, 2019); nothing can be computed before the query is known. Late interaction keeps one
vector a token and lets each query token find its best match in the passage (ColBERT: Khattab & Zaharia,
2020), so that passages are still encoded once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import (
    INTEGER_DTYPES,
    check_features,
    check_floating,
    check_positive,
    check_tensor,
    check_texts,
)
from companion.data.assets import asset_path
from companion.data.batching import pad_sequences
from companion.data.masking import SpecialIds
from companion.masks import check_mask
from companion.models.bert import MINILM, Bert, SentenceEncoder, load_pretrained
from companion.tokenizers.wordpiece import WordPieceTokenizer
from companion.train.loop import History, train
from companion.train.loss import cross_entropy
from companion.train.optim import AdamW

Scorer = Callable[[str, list[str]], Sequence[float] | Tensor]


def rerank(query: str, passages: Sequence, scorer: Scorer, k: int | None = None) -> list[tuple]:
    """The k best of the passages by the scorer, with their scores, the best first.

    Args:
        passages: texts, or objects that have a `text`. What the search left out cannot come back.
        scorer: (query, texts) → one score a text, larger is better: `CrossEncoder.score`,
            `LateInteraction.score`, or a function. It is not called where there is no passage.
        k: all where it is None.

    Returns: [(passage, score)]; equal scores keep the order of the passages.
    """
    if k is not None:
        check_positive("k", k)
    _check_text("query", query)
    texts = [passage if isinstance(passage, str) else passage.text for passage in passages]
    scores = [float(score) for score in scorer(query, texts)] if texts else []
    if len(scores) != len(texts):
        raise ValueError(f"scorer must return {len(texts)} scores, one a passage, got {len(scores)}")
    if any(score != score for score in scores):
        raise ValueError("scorer must return numbers, got NaN")
    return sorted(zip(passages, scores, strict=True), key=lambda item: -item[1])[:k]


# ------------------------------------------------------------------------------------------- cross-encoder


class CrossEncoder(nn.Module):
    """BERT's [CLS] of "[CLS] query [SEP] passage [SEP]", through the pooler, to one number.

    transformers calls it BertForSequenceClassification with num_labels=1.

    Args:
        bert: with a pooler.
        tokenizer: its `encode(text)` gives the ids of a text without special tokens.
        special: ids of the special tokens.
        max_tokens: of query, passage and special tokens together. The passage is cut first; a query longer
            than half of it is cut to half.
    """

    def __init__(
        self,
        bert: Bert,
        tokenizer,
        *,
        special: SpecialIds = SpecialIds(),  # noqa: B008 (frozen)
        max_tokens: int = 256,
    ):
        super().__init__()
        if not isinstance(bert, Bert):
            raise TypeError(f"bert must be a Bert, got {type(bert).__name__}")
        if bert.pooler is None:
            raise ValueError("bert must have a pooler, got one without")
        check_positive("max_tokens", max_tokens)
        if not 8 <= max_tokens <= bert.config.max_length:
            raise ValueError(f"max_tokens must lie in 8 … {bert.config.max_length}, got {max_tokens}")
        self.bert, self.tokenizer, self.special, self.max_tokens = bert, tokenizer, special, max_tokens
        self.dropout = nn.Dropout(bert.config.dropout)
        self.head = nn.Linear(bert.config.d_model, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.train(bert.training)

    @classmethod
    def minilm(cls, layers: int = 2) -> "CrossEncoder":
        """The first layers of all-MiniLM-L6-v2 and a score head that is still to be trained.

        MiniLM was trained to give sentences vectors, one at a time: it never saw a pair in one text.
        """
        check_positive("layers", layers)
        if layers > MINILM.num_layers:
            raise ValueError(f"layers must be at most {MINILM.num_layers}, got {layers}")
        bert = load_pretrained(asset_path("minilm"), MINILM)
        bert.layers = bert.layers[:layers]
        bert.config = replace(MINILM, num_layers=layers)
        return cls(bert, WordPieceTokenizer.from_vocabulary(asset_path("minilm-vocabulary"), lowercase=True))

    def forward(self, ids: Tensor, token_types: Tensor, mask: Tensor | None = None) -> Tensor:
        """The score of each row: ids and token_types (batch, n) → (batch,). The mask is that of `Bert`."""
        hidden = self.bert(ids, token_types, mask, first_only=True)
        return self.head(self.dropout(self.bert.pooler(hidden))).squeeze(-1)

    @torch.no_grad()
    def score(self, query: str, passages: Sequence[str], batch_size: int = 32) -> Tensor:
        """How well each passage answers the query, larger is better: (number of passages,). No dropout."""
        check_positive("batch_size", batch_size)
        _check_text("query", query)
        check_texts("passages", passages)
        rows = [self._row(query, passage) for passage in passages]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        scores = self.head.weight.new_empty(len(rows))
        was_training = self.training
        self.eval()
        try:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                scores[chosen] = self(*(x.to(scores.device) for x in self._batch([rows[i] for i in chosen])))
        finally:
            self.train(was_training)
        return scores

    def _row(self, query: str, passage: str) -> tuple[list[int], list[int]]:
        """(ids, token types) of a pair."""
        first = list(self.tokenizer.encode(query))[: self.max_tokens // 2]
        second = list(self.tokenizer.encode(passage))[: self.max_tokens - 3 - len(first)]
        ids = [self.special.cls, *first, self.special.sep, *second, self.special.sep]
        return ids, [0] * (len(first) + 2) + [1] * (len(second) + 1)

    def _batch(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        ids = pad_sequences([row for row, _ in rows], self.special.pad)
        types = torch.tensor([[*types, *[0] * (ids.shape[1] - len(types))] for _, types in rows])
        return ids, types


def train_cross_encoder(
    model: CrossEncoder,
    queries: Sequence[str],
    passages: Sequence[str],
    groups: Tensor,
    *,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> History:
    """Fit a cross-encoder, in place: find the passage that answers the query among those that do not.

    The loss of a group is −log softmax(scores)[0], InfoNCE with each query's own negatives alone, since a
    cross-encoder cannot use the batch's for nothing (Gao, Dai & Callan, 2021). Optimiser: AdamW.

    Args:
        groups: integers (G, 2 + m): the row of a query, of a passage that answers it, and of m ≥ 1 that do
            not, best taken from the search that is to be reranked.
        steps, batch_size, learning_rate: groups a step, drawn as a shuffled list again and again.
        seed: of their order.

    Returns: the `History`; its losses are those of the steps, in nats.
    """
    if not isinstance(model, CrossEncoder):
        raise TypeError(f"model must be a CrossEncoder, got {type(model).__name__}")
    check_texts("queries", queries)
    check_texts("passages", passages)
    check_positive("batch_size", batch_size)
    check_tensor("groups", groups)
    if groups.dtype not in INTEGER_DTYPES:
        raise TypeError(f"groups must be an integer tensor, got {groups.dtype}")
    if groups.dim() != 2 or groups.shape[1] < 3 or len(groups) == 0:
        raise ValueError(f"groups must have shape (G, 2 + m), m at least 1, got {tuple(groups.shape)}")
    sizes = torch.tensor([len(queries)] + [len(passages)] * (groups.shape[1] - 1))
    if (groups < 0).any() or (groups >= sizes).any():
        raise ValueError(f"groups must name rows below {len(queries)} and {len(passages)}")
    batch_size = min(batch_size, len(groups))
    per_epoch = len(groups) // batch_size

    def batch(step: int):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen = groups[order[place * batch_size : (place + 1) * batch_size]].tolist()
        return model._batch([model._row(queries[q], passages[p]) for q, *others in chosen for p in others])

    def loss(model: nn.Module, inputs) -> tuple[Tensor, int]:
        scores = model(*inputs).view(batch_size, -1)
        return cross_entropy(scores, scores.new_zeros(batch_size).long()) * batch_size, batch_size

    optimizer = AdamW(model.parameters(), lr=learning_rate)
    return train(model, loss, batch, optimizer, steps=steps, progress=False)


# ---------------------------------------------------------------------------------------- late interaction


def max_sim(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
) -> Tensor:
    """For each token of a query its largest dot product with a token of the document; their sum.

    Args:
        queries: (q, n, d), token vectors, usually of length 1. documents: (p, m, d).
        query_mask: bool (q, n), False at padding, which adds nothing. document_mask: bool (p, m), False at
            padding, which nothing matches. Each document must keep a token.

    Returns: (q, p). All products are held at once: q·n·p·m numbers.
    """
    check_floating("documents", documents)
    if documents.dim() != 3 or documents.numel() == 0:
        raise ValueError(f"documents must have shape (p, m, d), not empty, got {tuple(documents.shape)}")
    check_features("queries", queries, documents.shape[2], dims=3)
    for name, mask, x in (
        ("query_mask", query_mask, queries),
        ("document_mask", document_mask, documents),
    ):
        if mask is not None:
            check_mask(name, mask)
            if mask.shape != x.shape[:2]:
                raise ValueError(f"{name} must have shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    if document_mask is not None and not document_mask.any(1).all():
        raise ValueError("document_mask must keep a token of each document")
    products = torch.einsum("qnd,pmd->qpnm", queries, documents)
    if document_mask is not None:
        products = products.masked_fill(~document_mask[None, :, None], -torch.inf)
    best = products.amax(-1)  # (q, p, n)
    if query_mask is not None:
        best = best.masked_fill(~query_mask[:, None], 0.0)
    return best.sum(-1)


class LateInteraction:
    """MaxSim over the token vectors of an encoder, each scaled to length 1.

    ColBERT is trained for it and projects to 128 dimensions; an encoder trained for mean pooling, such as
    MiniLM, works as it is, and how well is a matter of measurement.

    Args:
        encoder: a `SentenceEncoder`; its pooling is not used.
    """

    def __init__(self, encoder: SentenceEncoder):
        if not isinstance(encoder, SentenceEncoder):
            raise TypeError(f"encoder must be a SentenceEncoder, got {type(encoder).__name__}")
        self.encoder = encoder

    @torch.no_grad()
    def token_vectors(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The vectors (t, n, d) of the tokens of t texts, and which are no padding: bool (t, n).

        [CLS] and [SEP] count as tokens, as in ColBERT. All texts are one batch.
        """
        check_texts("texts", texts)
        pad, device = self.encoder.special.pad, self.encoder.bert.embeddings.word.weight.device
        ids = pad_sequences([self.encoder._ids(text) for text in texts], pad).to(device)
        was_training = self.encoder.training
        self.encoder.eval()
        try:
            return F.normalize(self.encoder.bert(ids), dim=-1), ids != pad
        finally:
            self.encoder.train(was_training)

    def score(self, query: str, passages: Sequence[str]) -> Tensor:
        """MaxSim of the query and each passage: (number of passages,). A page keeps the passages' vectors."""
        _check_text("query", query)
        (asked, asked_mask), (found, found_mask) = map(self.token_vectors, ([query], passages))
        return max_sim(asked, found, asked_mask, found_mask)[0]


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, got {type(text).__name__}")
