"""Adapters (LoRA) on a frozen base: target layers and initial values.

peft's own layers do the arithmetic: `y = W x + alpha / r · B A dropout(x)`. Input: a model on the meta device
and the configuration. Output: the same model with adapters, which main.py shards like any other parameters;
`trainer/adapter_folder.py` reads and writes them.

    with torch.device("meta"):
        model = build_model(config)
        adapters = add_adapters(model, parts, config)      # layers.0.attention.wqkv gains lora_A and lora_B
    …                                                      # shard, allocate, load the base
    load_adapters(model, adapters, seed=42)                # new ones, or those of --lora_weight_path

With r = 64 and the default targets the adapters of a 7 B model are 151 M parameters, 0.6 GB in float32.

Papers: LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353; LoRA+, 2402.12354.
"""

import copy
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from data.errors import DataError
from trainer.adapter_folder import WEIGHTS_FILE, Adapters, file_key, parameters_in, read_adapter
from trainer.config import Config
from trainer.models import Parts, build_model, load_config
from trainer.trainable import trained_whole
from trainer.weights import base_checksum, local_rows


def add_adapters(
    model: PreTrainedModel, parts: Parts, config: Config, checksum: str | None = None
) -> Adapters:
    """Add adapters to `model`, on the meta device; only they, and biases if configured, require gradients.

    checksum: of the base's weights, which are read if it is None.

    DataError for targets that are not linear layers, and for a `lora_weight_path` without an adapter, with an
    adapter for another base, or with one that the flags contradict.
    """
    base, base_class = Path(config.model_name_or_path), type(model)
    source = Path(config.lora_weight_path) if config.lora_weight_path else None
    if config.img_size is not None and config.img_size != (own := load_config(base).image_size):
        raise DataError(
            f"--img_size {config.img_size}: {base} takes images of {own} pixels, and an adapter cannot carry "
            "another size to where it is loaded"
        )
    if source:
        peft_config, _ = read_adapter(source)
        _check_flags(config, peft_config, source)
    else:
        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules=_targets(model, parts, config),
            bias=config.lora_bias,  # type: ignore[arg-type] (checked by Config)
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        )
    peft_config.lora_dropout = config.lora_dropout
    peft_config.base_model_name_or_path = str(base.absolute())
    modules_to_save = set(peft_config.modules_to_save or ())
    inject(model, peft_config)

    whole = trained_whole(model, parts, config)
    modules = dict(model.named_modules())
    places = [place for place in whole if place in modules and ".base_layer." not in place]
    for place in places:  # peft takes no containers, only what is in them
        if isinstance(modules[place], nn.ModuleList | nn.ModuleDict):
            places += [f"{place}.{name}" for name, _ in modules[place].named_children()]
        else:
            modules_to_save.add(place)
    peft_config.modules_to_save = sorted(modules_to_save) or None
    saved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = saved.union(*whole.values(), parameters_in(model, source, base) if source else ())
    checksum = base_checksum(base) if checksum is None else checksum
    return Adapters(peft_config, checksum, base_class, frozenset(saved), source)


def _targets(model: PreTrainedModel, parts: Parts, config: Config) -> list[str]:
    """peft's `target_modules`: what `lora_target_modules` selects, or by default the family's targets without
    those that peft would rewrite.

    In some families peft takes gate_proj, up_proj and down_proj for those of the experts, which transformers
    stores as one parameter of all experts, and adapts that; shared experts have the same names. DataError for
    such a target in `lora_target_modules`.
    """
    targets = resolve_targets(model, config.lora_target_modules or parts.lora_targets)
    rewritten = LoraConfig(target_modules=targets)
    convert_peft_config_for_transformers(rewritten, model, None)
    kept = [target for target in targets if target in (rewritten.target_modules or ())]
    if config.lora_target_modules and kept != targets:
        lost = next(target for target in targets if target not in kept)
        raise DataError(
            f"--lora_target_modules: {lost} is for peft the name of this model's experts, whose weights are "
            "not linear layers; leave it out"
        )
    return kept


def inject(model: nn.Module, peft_config: LoraConfig) -> None:
    """Wrap the targets in peft's LoRA layers; modules that train in full are not wrapped."""
    injected = copy.copy(peft_config)
    injected.modules_to_save, injected.inference_mode, injected.init_lora_weights = None, False, True
    inject_adapter_in_model(injected, model)
    peft_config.target_modules = injected.target_modules  # peft shortens a long list
    peft_config.inference_mode, peft_config.init_lora_weights = True, True


def adapted_model(adapter: Path, base: Path) -> tuple[PreTrainedModel, set[str]]:
    """(`base` with the layers of `adapter`, on the meta device; the parameters in the adapter's folder).

    DataError if the adapter is for another base.
    """
    peft_config, _ = read_adapter(adapter)
    with torch.device("meta"):
        model = build_model(load_config(base))
        inject(model, peft_config)
    return model, parameters_in(model, adapter, base)


def resolve_targets(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """Resolve names or patterns of linear layers to peft's `target_modules`.

    A name selects every linear layer whose dotted name ends with it, as in peft, and is kept. A pattern (a
    regular expression that is not a plain name) must match the whole dotted name; it is replaced by the names
    that it matches, except linear layers inside another one (PLoRA's A and B). `all-linear` selects all of
    those except the output layer.
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
                f"--lora_target_modules {entry}: no linear layer has this name; found {', '.join(endings)}"
            )
        targets += [entry] if plain else sorted(matches)
        chosen |= matches
    for name in sorted(chosen):
        if (parent := outer(name)) in chosen:
            raise DataError(
                f"--lora_target_modules: {name} is a part of {parent}, which gets an adapter itself; "
                f"to train it in full: --train_modules {name.rpartition('.')[2]}"
            )
    return targets


def _check_flags(config: Config, peft_config: LoraConfig, source: Path) -> None:
    """DataError listing every flag that is set to another value than the adapter's own."""
    theirs = {
        "lora_r": peft_config.r,
        "lora_alpha": peft_config.lora_alpha,
        "lora_bias": peft_config.bias,
        "use_rslora": peft_config.use_rslora,
        "use_dora": peft_config.use_dora,
    }
    problems = [
        f"--{name} {given}: the adapter of {source} has {value}; leave the flag out"
        for name, value in theirs.items()
        if (given := getattr(config, name)) not in (value, getattr(Config, name))
    ]
    if config.lora_target_modules:
        problems.append(f"--lora_target_modules: the adapter of {source} has its own; leave the flag out")
    if peft_config.use_dora and config.lora_dropout > 0:
        problems.append(f"{source}: a DoRA adapter; it needs --lora_dropout 0")
    if problems:
        raise DataError(*problems)


@torch.no_grad()
def load_adapters(model: nn.Module, adapters: Adapters, seed: int) -> None:
    """Initialise the adapters of the sharded and loaded model, or load them from `adapters.source`.

    New adapters: A uniform in ±1/√(inputs) as in peft, B zero, DoRA's magnitudes the norms of the base's
    rows. A is drawn per tensor from (seed, its name), so it does not depend on the number of ranks.
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
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            uniform = torch.rand(parameter.shape, generator=generator)
            target.copy_(((2 * uniform - 1) / parameter.shape[1] ** 0.5)[where])
        elif ".lora_B." in name:
            target.zero_()
        elif ".lora_magnitude_vector." in name:
            base, _ = local_rows(parameters[name.replace("lora_magnitude_vector.default", "base_layer")])
            target.copy_(base.float().norm(dim=1))
