"""Vector indexes: exact (flat), inverted lists (IVF), compressed codes (PQ) and a graph (HNSW).

All four answer the same question, which k of N vectors are nearest, and are used alike; they differ in how
many distances they compute, what they remember, and how often they are wrong. `load_index` opens any of them.
"""

from companion.rag.index._base import VectorIndex, load_index
from companion.rag.index.flat import FlatIndex
from companion.rag.index.hnsw import HNSWIndex
from companion.rag.index.ivf import IVFIndex, kmeans
from companion.rag.index.pq import PQIndex, ProductQuantiser

__all__ = [
    "FlatIndex",
    "HNSWIndex",
    "IVFIndex",
    "PQIndex",
    "ProductQuantiser",
    "VectorIndex",
    "kmeans",
    "load_index",
]
