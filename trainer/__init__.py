"""The trainer: one readable loop around a model, its shards and its data."""

import logging
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

# Large tensors in the host's memory on Linux's huge pages: torch reads this once, before its first tensor. In
# pages of 4 KB a step on a CPU spends a tenth of its time having them handed out, zeroed, again and again.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# On GPUs, segments that grow waste no memory on fragments when the lengths of rows vary. torch reads this
# when CUDA starts, and ignores it if PYTORCH_CUDA_ALLOC_CONF is set.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# peft imports torchao wherever it is installed, which then warns four times in every process of libraries for
# other machines and of a deprecated registration.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def _find_our_data() -> None:
    """Make `import data` mean the package beside this one, whatever the current folder holds."""
    ours = Path(__file__).resolve().parent.parent / "data" / "__init__.py"
    if loaded := sys.modules.get("data"):
        if Path(getattr(loaded, "__file__", None) or "").resolve() != ours:
            raise ImportError(
                f"another module named `data` is loaded, {loaded}; trainer needs the one of {ours}"
            )
        return
    spec = spec_from_file_location("data", ours)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["data"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["data"])


_find_our_data()
