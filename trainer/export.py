"""Build model folders from other folders, without training and without a whole model in memory.

    python -m trainer.export --merge ADAPTER OUT                    # base + adapter, a full model
    python -m trainer.export --checkpoint RUN/checkpoint-500 OUT    # its model or adapter, without the state
    python -m trainer.export --modernise BASE OUT                   # its weights, with code that runs today

Input: an adapter's folder, whose configuration names the base, a checkpoint, or a published model.
Output: the new folder OUT, which is created atomically.

Merging reads one tensor at a time, computes in float32 and writes files of 1 GB in the base's dtype:

    W' = W + scale · B A                                  scale = alpha / r, or alpha / √r for rsLoRA
    W' = m / ‖W + scale · B A‖ · (W + scale · B A)        DoRA: a magnitude m and a norm for each row

which peaks at 1.7 GB of memory for layers of the 7B's width. PLoRA's weights in an adapted layer are
unchanged, except under DoRA: peft scales the whole output of a row, so the row of `Plora_B` gets the same
factor.

A published folder contains code that fails with today's transformers, and only a SentencePiece tokenizer.
`--modernise` links to its weights, about 17 GB; with `--adapter A`, OUT becomes the base of adapter A, so
that this works in a process without this project:

    AutoPeftModelForCausalLM.from_pretrained("A", device_map="auto", trust_remote_code=True)
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from data.errors import DataError
from data.files import sync_to_disk
from trainer.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_preprocessing,
    file_key,
    own_chat_template,
    read_adapter,
)
from trainer.atomic import MARKER, create_temporary, put_in_place, write_json, write_safetensors
from trainer.lora import adapted_model
from trainer.models import load_config, load_tokenizer, parts_of
from trainer.models.family import Conversion
from trainer.trainable import checkpoint_name, is_adapter
from trainer.weights import (
    SAFETENSORS_DTYPES,
    OpenFiles,
    persistent_buffers,
    save_small_files,
    split_into_files,
    tensor_files,
    weights_dtype,
    write_index,
)

# --- merge --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Merge:
    """Merged tensors of a base and an adapter, computed one at a time."""

    folder: Path
    files: dict[str, Path]
    """By key of the base, its file."""
    base: dict[str, Conversion]
    """By tensor, what the base has for it."""
    layers: dict[str, tuple[str, float]]
    """By layer, the key in the adapter's file up to `.lora_`, and the layer's scale."""
    whole: dict[str, str]
    """By tensor of the base, the key in the adapter's file that replaces it."""

    def tensor(self, name: str) -> Tensor:
        """The merged tensor: in float32 if the adapter changes it, else the base's own."""
        replaced = name in self.whole
        tensor = self._adapter(self.whole[name]) if replaced else self._base(name)
        for kind in ("Plora_B.weight", "weight", "bias"):
            layer = name.removesuffix(f".{kind}")
            if layer != name and layer in self.layers:
                return self._changed(tensor, layer, kind)
        return tensor

    def _changed(self, tensor: Tensor, layer: str, kind: str) -> Tensor:
        key, scale = self.layers[layer]
        if kind == "bias":
            added = f"{key}.lora_B.bias"
            return tensor.float() + scale * self._adapter(added) if self._has(added) else tensor
        magnitude = f"{key}.lora_magnitude_vector"
        is_dora = self._has(magnitude)
        if kind == "Plora_B.weight" and not is_dora:
            return tensor
        weight = tensor if kind == "weight" else self._base(f"{layer}.weight")
        down, up = self._adapter(f"{key}.lora_A.weight"), self._adapter(f"{key}.lora_B.weight")
        weight = torch.addmm(weight.float(), up, down, alpha=scale)
        if not is_dora:
            return weight
        factor = (self._adapter(magnitude) / weight.norm(dim=1))[:, None]
        return factor * (weight if kind == "weight" else tensor.float())

    def _has(self, key: str) -> bool:
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            return key in file.keys()  # noqa: SIM118 (a safetensors file is not a mapping)

    def _base(self, name: str) -> Tensor:
        return self.base[name].convert(OpenFiles(self.files))[name]

    def _adapter(self, key: str) -> Tensor:
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            return file.get_tensor(key).float()


def merge(adapter: Path, out: Path, base: Path | None = None, dtype: torch.dtype | None = None) -> None:
    """Merge the adapter into its base and write the model to the new folder `out`.

    base: by default the folder that the adapter names; dtype: of floating tensors, by default the base's.
    DataError if the adapter is for another base, or its biases cannot be merged.
    """
    peft_config, _ = read_adapter(adapter)
    base = base or Path(peft_config.base_model_name_or_path or "")
    if not base.is_dir():
        raise DataError(f"{adapter}: there is no folder {base}, its base; set --base to where it is")
    config = load_config(base, adapter_preprocessing=adapter_preprocessing(adapter))
    tokenizer = load_tokenizer(base)
    if template := own_chat_template(adapter, tokenizer):
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    model, names_in_file = adapted_model(adapter, base)
    parts = parts_of(config)
    base_files = tensor_files(base)
    loaded = parts.names.loaded(OpenFiles(base_files).shapes())
    # A tied output layer may be stored too, but the embeddings are what the adapter was trained on.
    in_base = {name: c for c in loaded for name in c.results if not parts.names.is_tied(name)}
    layers = {
        name: (file_key(name), module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    if peft_config.lora_bias and (bare := [n for n in layers if f"{n}.bias" not in in_base]):
        raise DataError(f"{adapter}: lora_bias cannot be merged into {bare[0]}, which has no bias")
    if tied := [name for name in layers if f"{name}.weight" not in in_base]:
        raise DataError(f"{adapter}: {tied[0]} shares its weight with the embeddings and cannot be merged")
    whole = {checkpoint_name(name): file_key(name) for name in names_in_file if not is_adapter(name)}
    merged = _Merge(adapter, base_files, in_base, layers, whole)

    buffers = {checkpoint_name(name) for name in persistent_buffers(model)}  # which keep their dtype
    dtypes: dict[str, torch.dtype] = {}
    shapes: dict[str, Sequence[int]] = {}
    for name in dict.fromkeys([*in_base, *whole]):
        key = in_base[name].sources[0] if name in in_base else whole[name]
        with safe_open(base_files.get(key, adapter / WEIGHTS_FILE), framework="pt") as file:
            entry = file.get_slice(key)
            shapes[name] = in_base[name].results[name] if name in in_base else entry.get_shape()
            stored = SAFETENSORS_DTYPES.get(entry.get_dtype())  # None: not floating
            changed = dtype if name not in buffers else None
            dtypes[name] = (changed or stored) if stored else file.get_tensor(key).dtype
    groups = {next(iter(group.results)): group for group in parts.names.saved(shapes)}
    sizes = {
        first: sum(map(math.prod, group.results.values())) * dtypes[group.sources[0]].itemsize
        for first, group in groups.items()
    }
    temporary = create_temporary(_new(out))
    files = split_into_files(sizes)
    keys: dict[str, list[str]] = {}
    with tqdm(total=len(sizes), unit="tensor", desc="merging", dynamic_ncols=True) as bar:
        for file_name, firsts in files.items():
            tensors: dict[str, Tensor] = {}
            for group in map(groups.__getitem__, firsts):
                tensors |= group.convert(lambda name: merged.tensor(name).to(dtypes[name]))
                bar.update()
            tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
            write_safetensors(tensors, temporary / file_name, {"format": "pt"})
            keys[file_name] = [*tensors]
    write_index(temporary, keys, sum(sizes.values()))
    save_small_files(config, tokenizer, parts, temporary, dtype or weights_dtype(base))
    _finish(temporary, out)


# --- checkpoints and published models -----------------------------------------------------------------


def from_checkpoint(checkpoint: Path, out: Path) -> None:
    """Copy the model or adapter of a checkpoint to the new folder `out`; DataError if it is not complete."""
    if not (checkpoint / MARKER).is_file():
        raise DataError(f"{checkpoint}: no {MARKER}, so this is not a complete checkpoint")
    temporary = create_temporary(_new(out))
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name not in (MARKER, "run.json"):
            shutil.copyfile(path, temporary / path.name)
    _finish(temporary, out)


def modernise(base: Path, out: Path, adapter: Path | None = None) -> None:
    """Create the new folder `out`: links to the weights of `base`, our code, a complete configuration and a
    fast tokenizer. It loads as long as `base` is not moved.

    adapter: changed to have `out` as its base; DataError if it is for another base.
    """
    config, tokenizer, files = load_config(base), load_tokenizer(base), tensor_files(base)
    if adapter:
        adapted_model(adapter, base)
    temporary = create_temporary(_new(out))
    paths = sorted(set(files.values()))
    names = {path: path.name if len(paths) > 1 else "model.safetensors" for path in paths}
    for path, name in names.items():
        (temporary / name).symlink_to(path.resolve())
    by_file = {names[path]: [tensor for tensor in files if files[tensor] == path] for path in paths}
    write_index(temporary, by_file, sum(path.stat().st_size for path in paths))
    save_small_files(config, tokenizer, parts_of(config), temporary, weights_dtype(base))
    _finish(temporary, out)
    if adapter:
        content = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
        write_json(adapter / CONFIG_FILE, content | {"base_model_name_or_path": str(out.absolute())})


def _new(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already; name a new folder")
    return out


def _finish(temporary: Path, out: Path) -> None:
    for path in temporary.iterdir():
        sync_to_disk(path)
    put_in_place(temporary, out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="trainer.export", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--merge", type=Path, metavar="ADAPTER", help="write its base with the adapter merged in"
    )
    what.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="copy the model or adapter of a checkpoint"
    )
    what.add_argument(
        "--modernise", type=Path, metavar="BASE", help="link its weights, with code that runs today"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to create")
    parser.add_argument("--base", type=Path, help="with --merge: by default the one that the adapter names")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="with --merge: by default the base's own"
    )
    parser.add_argument("--adapter", type=Path, help="with --modernise: make OUT the base of this adapter")
    arguments = parser.parse_args(argv)
    if not arguments.merge and (arguments.base or arguments.dtype):
        parser.error("--base and --dtype need --merge")
    if not arguments.modernise and arguments.adapter:
        parser.error("--adapter needs --modernise")
    try:
        if arguments.merge:
            dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
            merge(arguments.merge, arguments.out, arguments.base, dtype)
        elif arguments.checkpoint:
            from_checkpoint(arguments.checkpoint, arguments.out)
        else:
            modernise(arguments.modernise, arguments.out, arguments.adapter)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out} is complete", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
