"""The trainer: one readable loop around a model, its shards and its data."""

import logging
import os

# Large tensors in the host's memory on Linux's huge pages: torch reads this once, before its first tensor. In
# pages of 4 KB a step on a CPU spends a tenth of its time having them handed out, zeroed, again and again.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# peft imports torchao wherever it is installed, which then warns four times in every process of libraries for
# other machines and of a deprecated registration.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
