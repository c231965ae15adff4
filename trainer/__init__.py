"""The trainer: one readable loop around a model, its shards and its data."""

import os

# Large tensors in the host's memory on Linux's huge pages: torch reads this once, before its first tensor. In
# pages of 4 KB a step on a CPU spends a tenth of its time having them handed out, zeroed, again and again.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
