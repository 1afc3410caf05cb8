"""Retrieval-augmented generation: from a folder of documents to an answer that cites them."""
