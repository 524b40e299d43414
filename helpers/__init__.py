"""Machinery of the book: one family of rank-one dictionaries and what is needed to study it on real models."""

import os

# Two settings that PyTorch reads when it starts. What the user has set stays.
# Large tensors in huge pages (Linux): a training step allocates some 150 MB, and touching that in 4 KB pages costs a
# tenth of the step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Threads that wait shall spin for tens of microseconds only, and then sleep. By default they spin for much longer, and
# beside another busy program a small step then takes fifty times as long (measured on two cores: 3 ms alone; beside
# another program 170 ms by default, 18 ms like this; without any spinning 5 ms, but 8 ms alone).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
