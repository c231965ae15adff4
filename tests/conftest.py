"""One thread a process: tests run several ranks, and on two cores more threads only wait. And what all tests
of a session share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """All tests but those of tests/test_gpu.py run on the CPU, also where there is a GPU."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a test's code sets in the environment ends with the test: the MASTER_ADDR of a process group
    would tell the launchers of later tests where to meet."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def published_tokenizer() -> Path:
    """The published tokenizer.model, at $XCOMPOSER2_TOKENIZER (the file or its folder)."""
    path = Path(os.environ.get("XCOMPOSER2_TOKENIZER", "/nowhere"))
    path = path / "tokenizer.model" if path.is_dir() else path
    if not path.is_file():
        pytest.skip("needs the published tokenizer.model: set XCOMPOSER2_TOKENIZER to it")
    return path


@pytest.fixture(scope="session")
def same_world(tmp_path_factory) -> Path:
    """A tiny model, data, and `reference`: what the runs of tests/same_training.py are compared with."""
    from tests.same_training import train
    from tests.tiny import tiny_world

    folder = tiny_world(tmp_path_factory.mktemp("same"))
    train(folder, "reference", ranks=1)
    return folder


@pytest.fixture(scope="session")
def fault_world(tmp_path_factory) -> Path:
    """A tiny model, data, and `straight`: the run of tests/fault_cases.py that nothing happens to."""
    from tests.fault_cases import fault_flags
    from tests.tiny import run_ranks, tiny_world
    from trainer.main import main

    folder = tiny_world(tmp_path_factory.mktemp("faults"), samples=24)
    # The rehearsal, which the runs that are compared with this one leave out, changes no bit.
    run_ranks(2, main, fault_flags(folder, "straight", rehearse=True))
    return folder
