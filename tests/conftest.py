"""One thread a process: tests run several ranks, and on two cores more threads only wait. And a fixture."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def published_tokenizer() -> Path:
    """The published tokenizer.model, at $XCOMPOSER2_TOKENIZER (the file or its folder)."""
    path = Path(os.environ.get("XCOMPOSER2_TOKENIZER", "/nowhere"))
    path = path / "tokenizer.model" if path.is_dir() else path
    if not path.is_file():
        pytest.skip("needs the published tokenizer.model: set XCOMPOSER2_TOKENIZER to it")
    return path
