"""Vectors for words and tokens."""

from companion.embeddings.token import TokenEmbedding, one_hot

__all__ = ["TokenEmbedding", "one_hot"]
