"""Trainings of adapters: how they are started, and what is in the folder that they leave.

folder, output = train_adapter(world, "run", "--use_dora", "True", ranks=2)
config, tensors = adapter(folder)
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import flags, run_ranks
from trainer.main import main

FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_flags(
    world: Path, name: str, *more: str, ranks: int = 1, model: str = "model", data: str = "data.txt", steps=4
) -> list[str]:
    options = {"model_name_or_path": world / model, "data_path": world / "data" / data, "max_steps": steps}
    options |= {"use_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "learning_rate": 5e-3}
    options |= {"per_device_train_batch_size": 4 // ranks, "gradient_checkpointing": False}
    return flags(world, name, *more, **options)


def train_adapter(world: Path, name: str, *more: str, ranks: int = 1, **options: Any) -> tuple[Path, str]:
    """Train on `ranks` ranks; returns the folder and what the first rank printed."""
    output = run_ranks(ranks, main, adapter_flags(world, name, *more, ranks=ranks, **options))[0]
    return world / name, output


def adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / FILES[0]).read_text()), load_file(folder / FILES[1])
