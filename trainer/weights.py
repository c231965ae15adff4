"""Loading and saving a sharded model as a Hugging Face folder: no rank ever holds the whole model.

Reading. Input: a model whose parameters are DTensors with allocated but unset shards, and a folder with
*.safetensors. Every rank reads only the rows of its own shards from the memory-mapped files:

    model.to_empty(device="cpu")
    report = load_weights(model, Path("internlm-xcomposer2-vl-7b"))
    report.carried           # {"extra.weight": Path(".../model-00002-of-00002.safetensors")}: unknown keys

A [6144, 4096] matrix over 2 ranks: rank 1 reads rows 3072 to 6143, 25 MB of bfloat16.

Writing. Output: `model-00001-of-0000N.safetensors` and their index, or one `model.safetensors`. Tensors are
gathered one at a time, and file i is collected and written by rank i modulo N. A parameter that is stored in
another form than the model's, such as experts one by one, is converted when it is read and when it is
written (`trainer.models.family.Conversion`). Keys of the base checkpoint that the model does not know are
copied unchanged. `save_model_folder` adds config.json, the tokenizer and the
model's own code, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads the
folder in a process that has transformers and torch but not this project.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from trainer.atomic import Jobs, write_json, write_safetensors
from trainer.job import is_main
from trainer.models import Parts
from trainer.models.family import SAME_NAMES, Conversion, Names
from trainer.trainable import checkpoint_name, is_adapter

INDEX = "model.safetensors.index.json"
BYTES_BETWEEN_CLOSES = 64 << 20
"""How much is read from mapped files before their pages are freed."""
SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class LoadReport:
    """Differences between the tensors of a folder and those of the model."""

    missing: list[str]
    """Parameters that the folder lacks; they have their initial values."""
    carried: dict[str, Path]
    """Keys that the model does not know → their file; `save_model_folder` copies them."""


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name → the safetensors file of `folder` it is in; ValueError if there is no usable file."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "is this the folder of a model?"
        if pickled:
            hint = (
                "its weights are pickles, which are never opened here: convert them once, "
                "see 'Weights that come as .bin' in the README"
            )
        raise ValueError(f"{folder}: no *.safetensors file; {hint}")
    files: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read as safetensors: {error}") from None
    return files


class OpenFiles:
    """Slices of the tensors of several files, each of which is opened when it is first read from.

    Opening parses the header of all tensors of a file. `close` frees the pages that were read of the mapped
    files; the next read opens them again.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        """files: tensor name → its file."""
        self._files, self._opened = files, dict[Path, Any]()

    def __call__(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt")
        return self._opened[path].get_slice(name)

    def shapes(self) -> dict[str, list[int]]:
        """Tensor name → its shape, from the headers of the files."""
        return {name: self(name).get_shape() for name in self._files}

    def close(self) -> None:
        self._opened.clear()


def base_checksum(base: Path) -> str:
    """A hash that tells models of one architecture apart: of every vector and of every matrix's first row.

    Taken in bfloat16, so that a copy of the base in another dtype, or split into other files, is the same
    base.
    """
    digest = hashlib.sha256()
    files = tensor_files(base)
    with ExitStack() as stack, torch.device("cpu"):  # callers build models on the meta device
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted(set(files.values()))
        }
        for name, path in sorted(files.items()):
            tensor = opened[path].get_slice(name)
            shape = tensor.get_shape()
            values = opened[path].get_tensor(name) if len(shape) < 2 else tensor[:1]
            digest.update(f"{name} {shape}".encode())
            digest.update(values.bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def weights_dtype(folder: Path) -> torch.dtype:
    """The dtype of the folder's largest tensor, which is that of its matrices."""
    largest, dtype = -1, torch.float32
    for path in sorted(set(tensor_files(folder).values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                entry = file.get_slice(name)
                size = math.prod(entry.get_shape())
                if size > largest and entry.get_dtype() in SAFETENSORS_DTYPES:
                    largest, dtype = size, SAFETENSORS_DTYPES[entry.get_dtype()]
    return dtype


def local_rows(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's shard of a parameter, and its slices of the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    return parameter.to_local(), _local_slices(parameter.shape, parameter.device_mesh, parameter.placements)


@cache  # a call takes 80 microseconds; a model has thousands of parameters and moments, of few shapes
def _local_slices(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[slice, ...]:
    local_shape, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, local_shape, strict=True))


@torch.no_grad()
def load_weights(
    model: nn.Module, folder: Path, optional: tuple[str, ...] = (), names: Names = SAME_NAMES
) -> LoadReport:
    """Fill the model's parameters from `folder`, each rank its own shards, in the parameters' dtype; and the
    persistent buffers that it holds.

    `optional`: substrings of the names of parameters that a checkpoint may lack; they get their initial
    values. `names`: what the folder calls them. A tensor of another shape goes through
    `model.resize_for_load`. ValueError names the first tensors that are missing or do not fit.
    """
    files = tensor_files(folder)
    read, bytes_read = OpenFiles(files), 0
    conversions = names.loaded(read.shapes())
    origin = {name: conversion for conversion in conversions for name in conversion.results}
    parameters = {checkpoint_name(n): p for n, p in model.named_parameters() if not is_adapter(n)}
    buffers = {checkpoint_name(name): buffer for name, buffer in persistent_buffers(model).items()}
    missing = [name for name in parameters if name not in origin]
    needed = [name for name in missing if not any(substring in name for substring in optional)]
    if needed:
        raise ValueError(
            f"{folder}: {len(needed)} of the model's {len(parameters)} tensors are missing from its "
            f"safetensors files, first {', '.join(needed[:3])}; is config.json that of these weights?"
        )
    for name, parameter in (parameters | buffers).items():
        if name not in origin:
            continue
        conversion = origin[name]
        target, where = local_rows(parameter)
        bytes_read += target.nbytes
        if bytes_read > BYTES_BETWEEN_CLOSES:
            read.close()
            bytes_read = target.nbytes
        if conversion.results[name] == tuple(parameter.shape):
            if target.numel():
                target.copy_(conversion.convert(read, where)[name])
            continue
        whole = cast(Any, model).resize_for_load(name, conversion.convert(read)[name])
        if whole.shape != parameter.shape:
            raise ValueError(
                f"{files[conversion.sources[0]]}: {name} has shape {list(whole.shape)}, "
                f"the model needs {list(parameter.shape)}"
            )
        target.copy_(whole[where])
    for name in missing:
        # Only the vectors of a norm may be missing; their initial values need no random numbers.
        target, _ = local_rows(parameters[name])
        target.fill_(1.0 if name.endswith("weight") else 0.0)
    known = parameters.keys() | buffers.keys()
    unknown = [name for name in origin if name not in known and not names.is_tied(name)]
    return LoadReport(missing, {key: files[key] for name in unknown for key in origin[name].sources})


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's weights, such as the biases of some routers of experts."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def split_into_files(sizes: Mapping[str, int], max_file_bytes: int = 10**9) -> dict[str, list[str]]:
    """File name → its tensors, from sizes: tensor, or first of several that stay together → bytes. A file has
    at most `max_file_bytes`, unless a single entry is larger."""
    files: list[list[str]] = [[]]
    file_bytes = 0
    for name, size in sizes.items():
        if file_bytes and file_bytes + size > max_file_bytes:
            files.append([])
            file_bytes = 0
        files[-1].append(name)
        file_bytes += size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files)}


def write_index(folder: Path, files: Mapping[str, list[str]], total_bytes: int) -> None:
    """Write the index that transformers reads for several files; a single file needs none."""
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def save_model_folder(
    model: nn.Module,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    parts: Parts,
    folder: Path,
    dtype: torch.dtype,
    carried: Mapping[str, Path],
    jobs: Jobs,
    max_file_bytes: int = 10**9,
) -> None:
    """Write a complete model to the existing `folder`; every rank must call it.

    dtype: of the saved weights; carried: `LoadReport.carried` of the base; jobs: does the writing. Files
    contain whole tensors in the model's order and are byte for byte the same for any number of ranks.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    dtypes = dict.fromkeys(tensors, dtype)
    for name, buffer in persistent_buffers(model).items():
        tensors[name], dtypes[name] = buffer, buffer.dtype
    groups: dict[str, Conversion] = {}  # by the first of their tensors in the folder; of one file each
    sizes: dict[str, int] = {}
    for group in parts.names.saved({name: tensor.shape for name, tensor in tensors.items()}):
        first = next(iter(group.results))
        groups[first] = group
        sizes[first] = sum(map(math.prod, group.results.values())) * dtypes[group.sources[0]].itemsize
    for name, path in carried.items():
        with safe_open(path, framework="pt") as file:
            sizes[name] = file.get_tensor(name).nbytes
    files = split_into_files(sizes, max_file_bytes)
    for i, (file_name, firsts) in enumerate(files.items()):
        mine = i % dist.get_world_size() == dist.get_rank()
        contents: dict[str, Tensor] = {}
        for first in firsts:
            if first in groups:
                whole = {}
                for name in groups[first].sources:
                    tensor = tensors[name].detach().to(dtypes[name])
                    whole[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if mine:
                    for key, tensor in groups[first].convert(whole.__getitem__).items():
                        contents[key] = jobs.on_host(key, tensor)
            elif mine:
                with safe_open(carried[first], framework="pt") as file:
                    contents[first] = file.get_tensor(first)
        if mine:
            jobs.later(partial(write_safetensors, contents, folder / file_name, {"format": "pt"}))
    if is_main():
        results = {first: [*group.results] for first, group in groups.items()}
        keys = {
            file_name: [key for first in firsts for key in results.get(first, [first])]
            for file_name, firsts in files.items()
        }
        jobs.now(lambda: write_index(folder, keys, sum(sizes.values())))
        jobs.now(lambda: save_small_files(config, tokenizer, parts, folder, dtype))


def save_small_files(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    parts: Parts,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write what makes the weights in `folder` a model: config.json, the tokenizer and the model's code."""
    saved = config.__class__.from_dict(config.to_dict())
    saved.dtype = dtype
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for source in parts.files:
        shutil.copyfile(source, folder / source.name)
