"""Machinery of the book: one family of rank-one dictionaries and what is needed to study it on real models."""

import os

# Two settings that PyTorch reads when it starts. What the user has set stays.
# Large tensors in huge pages (Linux): a training step allocates some 150 MB, and touching that in 4 KB pages costs a
# tenth of the step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Threads that wait shall sleep. By default they spin, and beside another busy program a small step then takes fifty
# times as long (measured: 3 ms against 170 ms, two threads on two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
