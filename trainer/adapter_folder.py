"""Read and write the folder of an adapter in peft's format, and verify that peft loads it.

Input and output: `adapter_config.json` and `adapter_model.safetensors`, which stock peft loads in a process
without this project. Names in the model and in the file:

    model.layers.0.attention.wqkv.lora_A.default.weight          [64, 4096]
    base_model.model.model.layers.0.attention.wqkv.lora_A.weight [64, 4096]

Modules that train in full (`--fix_vit False`, `--fix_sampler False`, `--train_modules`) are in the same file
under their own names, and in the configuration as `modules_to_save`. Training does not wrap them as peft
does, which would keep two copies. Parameters that are not modules (`plora_glb_GN`) or that belong to an
adapted layer (PLoRA's A and B) cannot be `modules_to_save`: they are only in the weights file, and peft loads
them like biases.

    peft_config, shapes = read_adapter(Path("adapter"))    # r = 64; {"….lora_A.weight": [64, 4096], …}
    verify_adapter(Path("adapter"), model_config)          # "peft loads 320 tensors, 150,994,944 numbers; …"
"""

import copy
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.errors import DataError
from trainer.atomic import Jobs, write_safetensors
from trainer.job import is_main, log
from trainer.models import Parts, build_model, load_tokenizer, preprocessing_of
from trainer.trainable import is_adapter
from trainer.weights import base_checksum

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model in training, and what to write to their folder."""

    peft_config: LoraConfig
    """The configuration that will be saved."""
    base_checksum: str
    """Checksum of the base's weights, computed once and written with every save."""
    base_class: type
    """The model's class before FSDP2 derived its own from it."""
    saved: frozenset[str]
    """Names in the model of the parameters to save: adapters, and modules trained in full."""
    source: Path | None
    """Folder of the adapter that training continues, if any."""


def file_key(name: str) -> str:
    """The key in `adapter_model.safetensors` of a parameter of the adapted model."""
    name = re.sub(r"(\.lora_\w+)\.default\b", r"\1", name)
    return PREFIX + name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


# --- read ---------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, list[int]]]:
    """The configuration of the adapter in `folder`, and the names and shapes in its file.

    DataError if the folder holds no LoRA adapter in safetensors, or one that changed its base's weights.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise DataError(f"{folder}: no {CONFIG_FILE}, so this is not the folder of an adapter")
    if not (folder / WEIGHTS_FILE).is_file():
        raise DataError(f"{folder}: no {WEIGHTS_FILE}; an adapter in a pickle (.bin) is never opened here")
    try:
        peft_config = LoraConfig.from_pretrained(str(folder))
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be read as an adapter: {' '.join(str(error).split())}") from error
    if embeddings := [name for name in shapes if ".lora_embedding_" in name]:
        raise DataError(f"{folder}: {embeddings[0]} adapts embeddings, and here only linear layers can be")
    if not isinstance(peft_config, LoraConfig):
        raise DataError(f"{folder}: holds an adapter of type {peft_config.peft_type}, not LORA")
    if peft_config.init_lora_weights not in (True, False, "gaussian"):
        raise DataError(
            f"{folder}: init_lora_weights {peft_config.init_lora_weights} changed the base's weights; "
            "convert the adapter with peft to plain LoRA first"
        )
    return peft_config, shapes


def adapter_preprocessing(folder: str | Path | None) -> dict[str, Any]:
    """The image processing and conversation format that the adapter in `folder` was trained with; empty if
    they are not recorded, or if `folder` is None.

    DataError as in `read_adapter`.
    """
    if folder is None:
        return {}
    return (read_adapter(Path(folder))[0].auto_mapping or {}).get("preprocessing", {})


def own_chat_template(adapter: Path, base: PreTrainedTokenizerBase) -> Path | None:
    """The file of the chat template that an adapter was trained with; None if it is that of its base's
    tokenizer, or unknown."""
    file = adapter / "chat_template.jinja"
    is_own = file.is_file() and file.read_text(encoding="utf-8") != base.chat_template
    return file if is_own else None


def adapter_template(folder: str | Path | None, base: Path) -> Path | None:
    """The file of the chat template that training goes on with after the adapter in `folder`; None where the
    base's own is used, or the format is not a template."""
    if folder is None or "conversation_format" in adapter_preprocessing(folder):
        return None
    return own_chat_template(Path(folder), load_tokenizer(base))


def parameters_in(model: nn.Module, folder: Path, base: Path) -> set[str]:
    """Names of the parameters of `model`, an adapted `base`, that the file in `folder` contains.

    DataError if the adapter is for another base: names or shapes that do not fit, or other weights.
    """
    peft_config, shapes = read_adapter(folder)
    complaint = f"{folder}: an adapter for another base ({peft_config.base_model_name_or_path})"
    by_key = {file_key(name): (name, list(p.shape)) for name, p in model.named_parameters()}
    for key, (name, shape) in by_key.items():
        if key not in shapes and is_adapter(name):
            raise DataError(f"{complaint}: it has no {key}")
        if key in shapes and shapes[key] != shape:
            raise DataError(f"{complaint}: {key} is {shapes[key]}, {base} needs {shape}")
    if unknown := sorted(shapes.keys() - by_key.keys()):
        raise DataError(f"{complaint}: {base} has no parameter for {unknown[0]}")
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        checksum = (file.metadata() or {}).get("base_checksum")  # stock peft writes none
    if checksum and checksum != base_checksum(base):
        raise DataError(f"{complaint}: its weights are not those of {base}")
    return {by_key[key][0] for key in shapes}


# --- write and verify ---------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    adapters: Adapters,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    jobs: Jobs,
) -> None:
    """Write the adapter to the existing `folder`, load it with peft, and log the result; every rank calls it.

    Tensors are gathered one at a time and kept only on rank 0: 4 bytes per trained parameter. The files'
    bytes do not depend on the number of ranks.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in adapters.saved:
            whole = parameter.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            if is_main():
                tensors[file_key(name)] = whole.cpu().contiguous()

    def write() -> None:
        metadata = {"base_checksum": adapters.base_checksum, "format": "pt"}
        write_safetensors(tensors, folder / WEIGHTS_FILE, metadata)
        _sort_metadata(folder / WEIGHTS_FILE)
        written = copy.copy(adapters.peft_config)
        # peft keeps a set, whose order differs from run to run.
        written.target_modules = sorted(written.target_modules or ())  # type: ignore[assignment]
        base_class = {
            "base_model_class": adapters.base_class.__name__,
            "parent_library": adapters.base_class.__module__,
            "preprocessing": preprocessing_of(model_config),
        }
        written.save_pretrained(str(folder), auto_mapping_dict=base_class)
        tokenizer.save_pretrained(folder)
        log(f"adapter: {verify_adapter(folder, model_config)}")

    if is_main():
        jobs.now(write)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, because the order that safetensors writes differs by run."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length, "the same entries in another order"
        file.seek(8)
        file.write(text)


def verify_adapter(folder: Path, model_config: PreTrainedConfig) -> str:
    """Load `folder` with stock peft on a base on the meta device; returns a line about the tensors found.

    Raises if a tensor of the file has no parameter in the model, has another shape or is not finite, or if
    the model has an adapter that the file lacks.
    """
    with torch.device("meta"):
        base = build_model(model_config)
    loaded = _load_with_peft(base, folder, low_cpu_mem_usage=True)  # without initialising the adapter
    with warnings.catch_warnings(action="ignore"):  # about values lost on the meta device
        result = loaded.load_adapter(str(folder), "default", torch_device="cpu", low_cpu_mem_usage=True)
    tensors = load_file(folder / WEIGHTS_FILE)
    norms = {name: tensor.norm() for name, tensor in tensors.items()}
    broken = [name for name, norm in norms.items() if not norm.isfinite()]
    if result.unexpected_keys or broken:
        raise RuntimeError(f"{folder}: peft cannot use {broken or result.unexpected_keys}")
    up = [name for name in tensors if ".lora_B." in name and name.endswith("weight")]
    moved = sum(bool(norms[name] > 0) for name in up)
    return (
        f"peft loads {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers; "
        f"{moved} of {len(up)} B matrices are not zero" + ("" if moved else ": it changes nothing yet")
    )


def _load_with_peft(base: PreTrainedModel, folder: Path, low_cpu_mem_usage: bool = False) -> PeftModel:
    with warnings.catch_warnings(action="ignore"):
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(
            base, str(folder), torch_device="cpu", low_cpu_mem_usage=low_cpu_mem_usage
        )


def loads_by_itself(base: Path, parts: Parts) -> bool:
    """Whether transformers can load `base` without this project, with `trust_remote_code`."""
    return all((base / path.name).is_file() for path in parts.files)
