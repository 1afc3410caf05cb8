"""Dense retrieval: texts as vectors, how near they are, and how an encoder learns which belong together.

A bi-encoder (Reimers & Gurevych, 2019; Karpukhin et al., 2020) gives the query one vector and each passage
one, so that passages are encoded once, before any query is asked. It learns by InfoNCE (van den Oord, Li &
Vinyals, 2018): among the passages of a batch, find the one that belongs to the query. The others are its
negatives; "hard" ones, which a weaker retriever took for the answer, teach more than chance neighbours.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import (
    INTEGER_DTYPES,
    check_choice,
    check_features,
    check_floating,
    check_number,
    check_positive,
    check_tensor,
    check_texts,
)
from companion.data.batching import pad_sequences
from companion.masks import check_mask
from companion.models.bert import SentenceEncoder
from companion.train.loop import History, train
from companion.train.loss import cross_entropy
from companion.train.optim import AdamW

KINDS = ("cosine", "dot", "euclidean")


def similarity(queries: Tensor, documents: Tensor, kind: str = "cosine") -> Tensor:
    """How near each document is to each query, larger is nearer.

    Where all documents have one length (the queries may have any), the three rank alike:
    ‖q − d‖² = ‖q‖² + ‖d‖² − 2 q·d falls as q·d rises, and q·d = ‖q‖ ‖d‖ cos. Where they have not, dot prefers
    long documents, Euclidean those of the query's length, and cosine does not see length.

    Args:
        kind: "cosine", in [−1, 1], 0 for a zero vector; "dot"; "euclidean", the distance with a minus sign.

    Shape: (q, d), (n, d) → (q, n).
    """
    check_choice("kind", kind, KINDS)
    check_floating("documents", documents)
    if documents.dim() != 2 or documents.numel() == 0:
        raise ValueError(f"documents must have shape (n, d), not empty, got {tuple(documents.shape)}")
    check_features("queries", queries, documents.shape[1], dims=2)
    if kind == "euclidean":
        exactly = "donot_use_mm_for_euclid_dist"  # ‖q‖² + ‖d‖² − 2 q·d loses the digits of small distances
        return -torch.cdist(queries, documents, compute_mode=exactly)
    if kind == "cosine":
        queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    return queries @ documents.T


def info_nce(
    queries: Tensor,
    documents: Tensor,
    temperature: float = 0.05,
    *,
    hard_negatives: Tensor | None = None,
    ignore: Tensor | None = None,
    symmetric: bool = False,
    kind: str = "cosine",
) -> Tensor:
    """The cross-entropy of finding document i, of all documents of the batch, by query i; the mean, in nats.

    Logits are similarity / temperature. sentence-transformers calls it MultipleNegativesRankingLoss and
    1 / temperature, by default 20, `scale`.

    Args:
        queries, documents: (b, d); row i of one belongs to row i of the other, b − 1 others are negatives.
        temperature: the smaller, the more the nearest negatives count and the far ones do not.
        hard_negatives: (m, d), further documents that belong to none of the queries.
        ignore: bool (b, b + m), True where a document is no negative of a query although its row says so
            (it answers the query too); left out of the sum. Its first diagonal must be False.
        symmetric: the mean of this loss and of that of finding query i by document i among the queries, as
            CLIP has it (Radford et al., 2021); hard negatives take no part in the second.
        kind: of `similarity`.

    Returns: ().
    """
    _check_temperature(temperature)
    check_features("documents", documents, documents.shape[-1] if isinstance(documents, Tensor) else 0, 2)
    check_features("queries", queries, documents.shape[1], dims=2)
    if queries.shape != documents.shape:
        raise ValueError(
            f"queries must be as many as documents, {len(documents)}, one of each a row, got {len(queries)}"
        )
    if hard_negatives is not None:
        check_features("hard_negatives", hard_negatives, documents.shape[1], dims=2)
        documents = torch.cat([documents, hard_negatives])
    logits = similarity(queries, documents, kind) / temperature  # (b, b + m)
    if ignore is not None:
        check_mask("ignore", ignore)
        if ignore.shape != logits.shape or ignore.diagonal().any():
            raise ValueError(
                f"ignore must have shape {tuple(logits.shape)} and a diagonal of False, "
                f"got {tuple(ignore.shape)}"
            )
        logits = logits.masked_fill(ignore, -torch.inf)
    own = torch.arange(len(queries), device=logits.device)
    loss = cross_entropy(logits, own)
    if not symmetric:
        return loss
    return (loss + cross_entropy(logits[:, : len(queries)].T, own)) / 2


class Projection(nn.Module):
    """A linear map on top of frozen vectors, the smallest thing that can be trained; x → W x at length 1.

    It begins as the identity (in the first `d_out` coordinates), so that training starts from what the
    frozen encoder knows. Cosines after it are those of a learned bilinear form, q·WᵀW d.

    Shape: (..., d_model) → (..., d_out).
    """

    def __init__(self, d_model: int, d_out: int | None = None):
        super().__init__()
        check_positive("d_model", d_model)
        d_out = d_model if d_out is None else d_out
        check_positive("d_out", d_out)
        self.weight = nn.Parameter(torch.eye(d_out, d_model))

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x, self.weight.shape[1])
        return F.normalize(F.linear(x, self.weight), dim=-1)


Inputs = Tensor | Sequence[str]


def train_encoder(
    encoder: nn.Module,
    queries: Inputs,
    passages: Inputs,
    pairs: Tensor,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    temperature: float = 0.05,
    hard_negatives: Tensor | None = None,
    exempt: Tensor | None = None,
    symmetric: bool = False,
    passage_encoder: nn.Module | None = None,
    seed: int = 0,
) -> History:
    """Fit an encoder, in place, to pairs of a query and a passage that answers it, by `info_nce` and AdamW.

    A batch is the next `batch_size` pairs of a shuffled list, which is shuffled anew when fewer are left. A
    passage that is known to answer another query of the batch is left out of that query's negatives.

    Args:
        encoder: a `SentenceEncoder`, fine-tuned on texts (learning rates near 2e-5); or any module from
            vectors to vectors, such as `Projection`.
        queries, passages: texts for a SentenceEncoder, else (Q, d) and (N, d) vectors.
        pairs: integers (P, 2), rows of queries and passages.
        steps, batch_size, learning_rate: the learning rate is constant; a batch is at most all pairs.
        temperature, symmetric: of `info_nce`.
        hard_negatives: integers (P, h), for each pair h rows of passages that do not answer its query. They
            are negatives of the whole batch.
        exempt: integers (E, 2), rows of queries and passages that are neither pairs nor negatives: a query
            that is itself a passage, for example.
        passage_encoder: None for the same encoder on both sides. With `torch.nn.Identity()` the queries
            alone are mapped, and an index of the passages stays valid.
        seed: of the order of the pairs.

    Returns: the `History`; its losses are those of the steps.
    """
    _check_temperature(temperature)
    check_positive("batch_size", batch_size)
    check_number("learning_rate", learning_rate)
    for name, inputs in (("queries", queries), ("passages", passages)):
        _check_inputs(name, inputs, encoder)
    sizes = torch.tensor([len(queries), len(passages)])
    _check_rows("pairs", pairs, 2, sizes)
    negatives = torch.empty(len(pairs), 0, dtype=torch.int64) if hard_negatives is None else hard_negatives
    if hard_negatives is not None:
        _check_rows("hard_negatives", negatives, None, sizes[1:])
        if len(negatives) != len(pairs):
            raise ValueError(f"hard_negatives must have {len(pairs)} rows, one a pair, got {len(negatives)}")
    if exempt is not None:
        _check_rows("exempt", exempt, 2, sizes)
    answers = torch.cat([rows.long().cpu() for rows in (pairs, exempt) if rows is not None])
    answers = (answers[:, 0] * len(passages) + answers[:, 1]).unique()  # a number for each, ascending
    batch_size = min(batch_size, len(pairs))
    per_epoch = len(pairs) // batch_size

    @lru_cache(maxsize=1)
    def order_of(epoch: int) -> Tensor:
        return torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))

    def batch(step: int):
        epoch, place = divmod(step, per_epoch)
        chosen = order_of(epoch)[place * batch_size : (place + 1) * batch_size]
        asked, found = pairs[chosen].T
        found = torch.cat([found, negatives[chosen].flatten()])  # (b + b·h,)
        both = asked.long().cpu()[:, None] * len(passages) + found.long().cpu()
        ignore = answers[torch.searchsorted(answers, both).clamp(max=len(answers) - 1)] == both
        ignore.fill_diagonal_(False)
        return _rows(queries, asked, encoder), _rows(passages, found, encoder), ignore

    def loss(model: nn.Module, inputs) -> tuple[Tensor, int]:
        asked, found = model(*inputs[:2])
        own, others = found[: len(asked)], found[len(asked) :]
        options = {"ignore": inputs[2], "symmetric": symmetric}
        options["hard_negatives"] = others if len(others) else None
        return info_nce(asked, own, temperature, **options) * len(asked), len(asked)

    towers = _Towers(encoder, encoder if passage_encoder is None else passage_encoder)
    modes = [(tower, tower.training) for tower in towers.children()]
    optimizer = AdamW(towers.parameters(), lr=learning_rate, weight_decay=0.0)
    try:
        return train(towers, loss, batch, optimizer, steps=steps, progress=False)
    finally:
        for tower, mode in modes:
            tower.train(mode)


class _Towers(nn.Module):
    """The two encoders behind one call, which is what a wrapper for several processes can watch."""

    def __init__(self, query: nn.Module, passage: nn.Module):
        super().__init__()
        self.query, self.passage = query, passage

    def forward(self, queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(queries), self.passage(passages)


def _rows(inputs: Inputs, rows: Tensor, encoder: nn.Module) -> Tensor:
    """Vectors of the rows, or the padded token ids of their texts."""
    if isinstance(inputs, Tensor):
        return inputs[rows]
    return pad_sequences([encoder._ids(inputs[row]) for row in rows.tolist()], encoder.special.pad)


def _check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _check_inputs(name: str, inputs: Inputs, encoder: nn.Module) -> None:
    if isinstance(encoder, SentenceEncoder):
        check_texts(name, inputs)
        return
    check_floating(name, inputs)
    if inputs.dim() != 2 or inputs.numel() == 0:
        raise ValueError(f"{name} must have shape (n, d), not empty, got {tuple(inputs.shape)}")


def _check_rows(name: str, rows: Tensor, columns: int | None, sizes: Tensor) -> None:
    """Refuse anything but integers (n, columns) from 0 to below the size of the column."""
    check_tensor(name, rows)
    if rows.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must be an integer tensor, got {rows.dtype}")
    if rows.dim() != 2 or rows.numel() == 0 or rows.shape[1] != (columns or rows.shape[1]):
        raise ValueError(f"{name} must have shape (n, {columns or 'h'}), not empty, got {tuple(rows.shape)}")
    if (rows < 0).any() or (rows >= sizes).any():
        raise ValueError(f"{name} must name rows below {sizes.tolist()}, got up to {rows.amax(0).tolist()}")
