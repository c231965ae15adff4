"""The model in training: from its files into the ranks' shards, and from the shards into a folder.

Input: the sharded model, allocated but without values, and the plan. Output: the same model with the base's
weights and its adapters; later, a folder that transformers (or peft, for an adapter) loads.

    loaded = load_model(model, plan, config)            # every rank reads its own rows
    save_model(model, plan, loaded, folder, jobs)       # config.json, *.safetensors, tokenizer; or an adapter
"""

from pathlib import Path
from typing import Any

from trainer.adapter_folder import save_adapter
from trainer.atomic import Jobs
from trainer.config import Config
from trainer.lora import load_adapters
from trainer.prepare import Plan
from trainer.weights import LoadReport, load_weights, save_model_folder


def load_model(model: Any, plan: Plan, config: Config) -> LoadReport:
    """Fill parameters and buffers from the base and, with LoRA, set the adapters; ValueError if the base's
    tensors do not fit."""
    parts = plan.parts
    model.init_buffers()
    loaded = load_weights(model, Path(config.model_name_or_path), parts.unused, parts.names)
    if plan.adapters:
        load_adapters(model, plan.adapters, config.seed)
    return loaded


def save_model(model: Any, plan: Plan, loaded: LoadReport, folder: Path, jobs: Jobs) -> None:
    """Write the adapter, or the whole model, to the existing `folder`; every rank calls it."""
    described = (plan.model_config, plan.tokenizer)
    if plan.adapters:
        save_adapter(model, plan.adapters, *described, folder, jobs)
    else:
        save_model_folder(model, *described, plan.parts, folder, plan.save_dtype, loaded.carried, jobs)
