"""Settings that torch, cuBLAS and NCCL read when a GPU is first used: they must be made before that."""

import os
import subprocess
import sys

import pytest
import torch

from tests.tiny import ROOT, flags, run_ranks, tiny_world
from trainer.main import main


@pytest.mark.parametrize("imported", ["import trainer, torch", "import torch, trainer"])
@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_the_cuda_allocator_grow_unless_the_user_has_set_it(imported, name):
    environment = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")}
    own = "max_split_size_mb:64"
    code = f"{imported}; print(torch._C._accelerator_getAllocatorSettings())"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **({name: own} if name else {})},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == (own if name else "expandable_segments:True")


def main_and_settings(argv):
    status = main(argv)
    print(
        "deterministic", torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]
    )
    print("fills", torch.utils.deterministic.fill_uninitialized_memory)
    return status


def test_the_flag_makes_kernels_deterministic_without_filling_memory(tmp_path):
    argv = flags(tiny_world(tmp_path), "run", max_steps=1, deterministic=True)
    (output,) = run_ranks(1, main_and_settings, argv)
    assert "deterministic True :4096:8\nfills False\n" in output
