"""Token embeddings, scaled by √d_model and shared with the output layer (Vaswani et al., 2017, §3.4)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import check_features, check_ids, check_index, check_positive


def one_hot(ids: Tensor, vocab_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A vector of zeros with a single 1 at index id, for each id.

    Args:
        ids: integers (...) in 0 … vocab_size − 1.

    Returns: (..., vocab_size). `one_hot(ids, V) @ E` selects the rows `E[ids]`, at V times the memory.
    """
    check_positive("vocab_size", vocab_size)
    check_ids("ids", ids, vocab_size)
    hot = torch.zeros(*ids.shape, vocab_size, dtype=dtype, device=ids.device)
    return hot.scatter_(-1, ids.long().unsqueeze(-1), 1)


class TokenEmbedding(nn.Module):
    """Row `id` of a learned matrix E, times √d_model; its transpose gives the logits where it is tied.

    E starts as N(0, 1/d_model), so that the scaled vectors have unit variance, like the positions
    added to them, and the tied logits do not start out large.

    Args:
        vocab_size: number of tokens V.
        d_model: size of a token's vector.
        pad_id: a token whose vector starts at zero and gets no gradient from the lookup.

    Shape: ids (...) → (..., d_model).
    """

    def __init__(self, vocab_size: int, d_model: int, pad_id: int | None = None):
        super().__init__()
        check_positive("vocab_size", vocab_size)
        check_positive("d_model", d_model)
        if pad_id is not None:
            check_index("pad_id", pad_id, vocab_size)
        self.vocab_size, self.d_model, self.pad_id = vocab_size, d_model, pad_id
        self.weight = nn.Parameter(torch.randn(vocab_size, d_model) / math.sqrt(d_model))
        if pad_id is not None:
            with torch.no_grad():
                self.weight[pad_id].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        check_ids("ids", ids, self.vocab_size)
        return self.lookup(ids) * math.sqrt(self.d_model)

    def lookup(self, ids: Tensor) -> Tensor:
        """The rows themselves, not scaled: (...) → (..., d_model)."""
        return F.embedding(ids.long(), self.weight, padding_idx=self.pad_id)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden · Eᵀ: (..., d_model) → (..., vocab_size), the tied output layer."""
        check_features("hidden", hidden, self.d_model)
        return F.linear(hidden, self.weight)
