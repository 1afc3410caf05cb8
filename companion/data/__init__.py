"""Data: real texts and vectors from pinned wheels, and batches made of them."""
