"""Adapters (LoRA) on a frozen base: inject, initialise, save in peft's format, and prove what was saved.

peft's own layers do the arithmetic: `y = W x + alpha / r · B A dropout(x)`. Input: a model on the meta
device and the configuration. Output: `adapter_config.json` and `adapter_model.safetensors`, which stock peft
loads in a process that has never heard of this project.

    with torch.device("meta"):
        model = build_model(config)
        adapters = add_adapters(model, parts, config)      # layers.0.attention.wqkv gains lora_A and lora_B
    …                                                      # shard, allocate, load the base
    load_adapters(model, adapters, seed=42)                # new ones, or those of --lora_weight_path
    save_adapter(model, adapters, …, Path("output"), jobs)

With r = 64 and the default targets the adapters of a 7 B model are 151 M parameters, 0.6 GB in float32.

    in the model   model.layers.0.attention.wqkv.lora_A.default.weight              [64, 4096]
    in the file    base_model.model.model.layers.0.attention.wqkv.lora_A.weight     [64, 4096]

Modules that train as they are (`--fix_vit False`, `--fix_sampler False`, `--train_modules`) stand in the same
file under their own names, and in the configuration as `modules_to_save`. Training needs no wrapper of peft's
around them, which would hold them twice. Parameters that are no module (`plora_glb_GN`) or lie in an adapted
layer (PLoRA's A and B) can be no `modules_to_save`: they stand in the file alone, and peft loads them as it
loads biases.

Papers: LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353; LoRA+, 2402.12354.
"""

import copy
import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.errors import DataError
from trainer.config import Config
from trainer.distributed import is_main, log
from trainer.folders import Jobs
from trainer.models import Parts, build_model
from trainer.trained import is_adapter, trained_whole
from trainer.weights import load_weights, local_rows, tensor_files

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model: what the saved folder says of them, and what it holds."""

    peft_config: LoraConfig
    """As it will be saved."""
    base: Path
    base_class: type
    """The model's class before FSDP2 derived its own from it."""
    saved: frozenset[str]
    """Names, in the model, of the parameters that the folder holds: adapters and modules trained whole."""
    source: Path | None
    """The folder that training goes on from."""


# --- inject -------------------------------------------------------------------------------------------


def add_adapters(model: PreTrainedModel, parts: Parts, config: Config) -> Adapters:
    """Put adapters into `model`, on the meta device; they alone, and biases if asked for, require gradients.

    DataError for targets that are no linear layers, and for a `lora_weight_path` that holds no adapter, one
    for another base, or one that the flags contradict.
    """
    base, base_class = Path(config.model_name_or_path), type(model)
    source, shapes = None, {}
    if config.lora_weight_path:
        source = Path(config.lora_weight_path)
        peft_config, shapes = read_adapter(source)
        _check_flags(config, peft_config, source)
    else:
        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules=resolve_targets(model, config.lora_target_modules or parts.lora_targets),
            bias=config.lora_bias,  # type: ignore[arg-type] (checked by Config)
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        )
    modules_to_save = set(peft_config.modules_to_save or ())
    peft_config.lora_dropout = config.lora_dropout
    peft_config.modules_to_save = None
    peft_config.inference_mode = False
    peft_config.init_lora_weights = True
    inject_adapter_in_model(peft_config, model)

    whole = trained_whole(model, parts, config)
    modules = {name for name, _ in model.named_modules()}
    modules_to_save |= {place for place in whole if place in modules and ".base_layer." not in place}
    saved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved.update(*whole.values())
    if source:
        saved |= _fit(model, source, shapes, peft_config.base_model_name_or_path)
        _check_base(source, base)
    peft_config.modules_to_save = sorted(modules_to_save) or None
    peft_config.base_model_name_or_path = str(base.absolute())
    peft_config.inference_mode = True
    return Adapters(peft_config, base, base_class, frozenset(saved), source)


def resolve_targets(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """Names or patterns of linear layers → peft's `target_modules`.

    A name means every linear layer whose dotted name ends with it, as in peft, and stays as it is. A pattern
    (a regular expression that is no plain name) must match the whole dotted name; it becomes the names that
    it matches, without linear layers inside another one (PLoRA's A and B). `all-linear` is all of those but
    the output layer.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    output = model.get_output_embeddings()

    def outer(name: str) -> str | None:
        parents = (name[: match.start()] for match in re.finditer(r"\.", name))
        return next((parent for parent in parents if parent in linear), None)

    targets: list[str] = []
    chosen: set[str] = set()
    for entry in wanted:
        plain = re.fullmatch(r"[\w.]+", entry) is not None
        if plain:
            matches = {name for name in linear if f".{name}".endswith(f".{entry}")}
        elif entry == "all-linear":
            matches = {n for n in linear if not outer(n) and model.get_submodule(n) is not output}
        else:
            try:
                matches = {name for name in linear if re.fullmatch(entry, name) and not outer(name)}
            except re.error as error:
                raise DataError(f"--lora_target_modules {entry}: not a regular expression: {error}") from None
        if not matches:
            endings = sorted({".".join(name.split(".")[-2:]) for name in linear if not outer(name)})
            raise DataError(
                f"--lora_target_modules {entry}: no linear layer is named so; there are {', '.join(endings)}"
            )
        targets += [entry] if plain else sorted(matches)
        chosen |= matches
    for name in sorted(chosen):
        if (parent := outer(name)) in chosen:
            raise DataError(
                f"--lora_target_modules: {name} is a part of {parent}, which gets an adapter itself; "
                f"to train it as it is: --train_modules {name.rpartition('.')[2]}"
            )
    return targets


# --- read ---------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, list[int]]]:
    """The configuration of the adapter in `folder`, and the names and shapes in its file.

    DataError if the folder holds no LoRA adapter in safetensors.
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
    if not isinstance(peft_config, LoraConfig):
        raise DataError(f"{folder}: holds an adapter of type {peft_config.peft_type}, not LORA")
    return peft_config, shapes


def file_key(name: str) -> str:
    """A parameter of the adapted model → its key in `adapter_model.safetensors`."""
    name = re.sub(r"(\.lora_\w+)\.default\b", r"\1", name)
    return PREFIX + name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _check_flags(config: Config, peft_config: LoraConfig, source: Path) -> None:
    """DataError if a flag was set to something else than the adapter's own value."""
    theirs = {
        "lora_r": peft_config.r,
        "lora_alpha": peft_config.lora_alpha,
        "lora_bias": peft_config.bias,
        "use_rslora": peft_config.use_rslora,
        "use_dora": peft_config.use_dora,
    }
    for name, value in theirs.items():
        given = getattr(config, name)
        if given not in (value, getattr(Config, name)):
            raise DataError(f"--{name} {given}: the adapter of {source} has {value}; leave the flag out")
    if config.lora_target_modules:
        raise DataError(f"--lora_target_modules: the adapter of {source} has its own; leave the flag out")


def _fit(model: nn.Module, source: Path, shapes: dict[str, list[int]], made_for: str | None) -> set[str]:
    """The parameters of the model that the file of `source` holds; DataError if it is for another model."""
    by_key = {file_key(name): (name, list(p.shape)) for name, p in model.named_parameters()}
    needed = {key for key, (name, _) in by_key.items() if is_adapter(name)}
    odd = [f"it has no {key}" for key in sorted(needed - shapes.keys())]
    odd += [f"this base has no place for {key}" for key in sorted(shapes.keys() - by_key.keys())]
    odd += [
        f"{key} is {shape}, this base needs {by_key[key][1]}"
        for key, shape in shapes.items()
        if key in by_key and shape != by_key[key][1]
    ]
    if odd:
        raise DataError(f"{source}: an adapter for another base ({made_for}): {odd[0]}")
    return {by_key[key][0] for key in shapes}


def base_fingerprint(base: Path) -> str:
    """A hash of the base's vectors (norms and biases), which tell two models of one architecture apart.

    Taken in bfloat16, so that a copy of the base in another dtype is the same base.
    """
    digest = hashlib.sha256()
    for name, path in sorted(tensor_files(base).items()):
        with safe_open(path, framework="pt") as file:
            if len(file.get_slice(name).get_shape()) == 1:
                digest.update(
                    name.encode() + file.get_tensor(name).bfloat16().view(torch.int16).numpy().tobytes()
                )
    return digest.hexdigest()


def _check_base(source: Path, base: Path) -> None:
    """DataError if the adapter's file names another base's fingerprint; stock peft's files name none."""
    with safe_open(source / WEIGHTS_FILE, framework="pt") as file:
        known = (file.metadata() or {}).get("base_fingerprint")
    if known and known != base_fingerprint(base):
        made_for = LoraConfig.from_pretrained(str(source)).base_model_name_or_path
        raise DataError(
            f"{source}: an adapter for another base ({made_for}), whose weights are not those of {base}"
        )


# --- initialise ---------------------------------------------------------------------------------------


@torch.no_grad()
def load_adapters(model: nn.Module, adapters: Adapters, seed: int) -> None:
    """Set the adapters of the sharded model, whose base is loaded: new ones, or those of `adapters.source`.

    New: A uniform in ±1/√(inputs) as in peft, B zero, DoRA's magnitudes the norms of the base's rows. A is
    drawn for each tensor from (seed, its name), so it does not depend on the number of ranks.
    """
    parameters = dict(model.named_parameters())
    if adapters.source:
        with safe_open(adapters.source / WEIGHTS_FILE, framework="pt") as file:
            keys = set(file.keys())
            for name in sorted(adapters.saved):
                target, where = local_rows(parameters[name])
                if (key := file_key(name)) in keys and target.numel():
                    target.copy_(file.get_slice(key)[where])
        return
    for name, parameter in parameters.items():
        target, where = local_rows(parameter)
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            uniform = torch.rand(parameter.shape, generator=generator)
            target.copy_(((2 * uniform - 1) / parameter.shape[1] ** 0.5)[where])
        elif ".lora_magnitude_vector." in name:
            base, _ = local_rows(parameters[name.replace("lora_magnitude_vector.default", "base_layer")])
            target.copy_(base.float().norm(dim=1))
        elif ".lora_B." in name:
            target.zero_()


# --- save and prove -----------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    adapters: Adapters,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    jobs: Jobs,
) -> None:
    """Write the adapter to the existing `folder`, load it with peft, and log a line; every rank must call it.

    Tensors are gathered one at a time, and rank 0 alone keeps them: 4 bytes for each trained parameter. The
    bytes of the files do not depend on the number of ranks.
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
        metadata = {"format": "pt", "base_fingerprint": base_fingerprint(adapters.base)}
        save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
        written = copy.copy(adapters.peft_config)
        # peft keeps a set, whose order differs from run to run.
        written.target_modules = sorted(written.target_modules or ())  # type: ignore[assignment]
        base_class = {
            "base_model_class": adapters.base_class.__name__,
            "parent_library": adapters.base_class.__module__,
        }
        written.save_pretrained(str(folder), auto_mapping_dict=base_class)
        tokenizer.save_pretrained(folder)
        log(prove_adapter(folder, model_config))

    if is_main():
        jobs.now(write)


def _load_with_peft(base: PreTrainedModel, folder: Path) -> PeftModel:
    with warnings.catch_warnings(action="ignore"):
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(base, str(folder), torch_device="cpu")


def loads_by_itself(base: Path, parts: Parts) -> bool:
    """Whether transformers loads `base` in a process without this project, by `trust_remote_code`."""
    return all((base / path.name).is_file() for path in parts.code_files)


def prove_adapter(folder: Path, model_config: PreTrainedConfig) -> str:
    """Load `folder` with stock peft, on a base without memory, and say what was found, in a line.

    Raises if a tensor of the file finds no place in the model, has another shape or is not finite, or if the
    model has an adapter that the file lacks.
    """
    with torch.device("meta"):
        base = build_model(model_config)
    loaded = _load_with_peft(base, folder)
    with warnings.catch_warnings(action="ignore"):  # that values copied to the meta device are lost
        result = loaded.load_adapter(str(folder), "default", torch_device="cpu")
    tensors = load_file(folder / WEIGHTS_FILE)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if result.unexpected_keys or broken:
        raise RuntimeError(f"{folder}: peft cannot use {broken or result.unexpected_keys}")
    up = [name for name in tensors if ".lora_B." in name and name.endswith("weight")]
    moved = sum(bool(tensors[name].any()) for name in up)
    return (
        f"adapter: peft loads {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers; "
        f"{moved} of {len(up)} B matrices are not zero" + ("" if moved else ": it changes nothing yet")
    )


@torch.no_grad()
def verify_adapter(
    model: nn.Module, adapters: Adapters, folder: Path, config: PreTrainedConfig, inputs: dict[str, Any]
) -> str:
    """Compare the loss of a batch in the running model and in the base with `folder` on it, as peft loads it.

    Every rank must call it with a batch of its own; rank 0's counts, and rank 0 loads the whole base once, in
    CPU memory. Raises RuntimeError if the losses differ by more than the compute dtype explains.
    """
    was_training = model.training
    model.eval()
    before = model(**inputs).loss.sum().item()
    model.train(was_training)
    if not is_main():
        return ""
    dtype = next(p.dtype for n, p in model.named_parameters() if n not in adapters.saved)
    with torch.device("meta"):
        base: Any = build_model(config)
    base = base.to(dtype).to_empty(device="cpu")
    load_weights(base, adapters.base)
    base.init_buffers()
    base.loss_function = model.loss_function
    loaded = _load_with_peft(base, folder).eval()
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    after = loaded(**on_cpu).loss.sum().item()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if abs(after - before) > tolerance * max(1.0, abs(before)):
        raise RuntimeError(
            f"{folder}: loss {after} as peft loads it, {before} in training: not the same model"
        )
    return f"adapter: the loss of a batch is {before:.6f} in training and {after:.6f} as peft loads it"
