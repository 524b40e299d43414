"""Machinery of the book: one family of rank-one dictionaries and what is needed to study it on real models."""

import os

# Large tensors in huge pages: a training step allocates some 150 MB, and touching that in 4 KB pages costs a tenth of
# the step. PyTorch reads this at its first allocation; it has no effect outside Linux.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
