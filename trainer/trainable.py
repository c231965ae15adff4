"""What trains as it is, by the flags: the vision tower, the projector, and whatever `--train_modules` names.

Input: the model, on any device, and the configuration. Output: names of modules with their parameters.

    trained_whole(model, parts, config)        # --fix_vit True --train_modules model.norm,Plora_B
    # {"vision_proj": ["vision_proj.0.weight", …], "model.norm": ["model.norm.weight"],
    #  "model.layers.0.attention.wqkv.Plora_B": ["model.layers.0.attention.wqkv.Plora_B.weight"], …}

A name means every module or parameter whose dotted name ends with it, as peft's names do.

peft puts an adapted layer one level down: `wo.weight` is `wo.base_layer.weight` once `wo` has an adapter.
`checkpoint_name` takes that back, so the flags, a checkpoint and the model speak of the same layer.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from data.errors import DataError
from trainer.models import Parts

if TYPE_CHECKING:
    from trainer.config import Config


def is_adapter(name: str) -> bool:
    """Whether peft added this parameter: `….lora_A.default.weight`, but not PLoRA's `….Plora_A.weight`."""
    return ".lora_" in name


def checkpoint_name(name: str) -> str:
    """The name that a parameter or module of an adapted model has in the base model's checkpoint."""
    return name.replace(".base_layer.", ".")


def trained_whole(model: nn.Module, parts: Parts, config: "Config") -> dict[str, list[str]]:
    """Module or parameter → the names of the parameters in it, all to be trained as they are.

    Adapters are no part of the answer, nor is what full fine-tuning trains of the language model by itself.
    DataError for a name that nothing has, and for a module that holds adapted layers.
    """
    parameters = [name for name, _ in model.named_parameters()]
    places = [name for name, _ in model.named_modules() if name] + parameters
    inside = {place: [n for n in parameters if f"{n}.".startswith(f"{place}.")] for place in places}
    chosen: list[str] = []
    for prefixes, frozen in ((parts.vision, config.fix_vit), (parts.projector, config.fix_sampler)):
        chosen += [prefix.removesuffix(".") for prefix in prefixes if not frozen]
    chosen = [place for place in chosen if inside.get(place)]
    for wanted in config.train_modules:
        matches = [
            place
            for place in places
            if f".{checkpoint_name(place)}".endswith(f".{wanted}") and inside[place] and not is_adapter(place)
        ]
        if not matches:
            raise DataError(f"--train_modules {wanted}: the model has no module or parameter of this name")
        chosen += matches
    for place in chosen:
        adapted = [name for name in inside[place] if is_adapter(name)]
        if adapted:
            layer = adapted[0].partition(".lora_")[0]
            raise DataError(
                f"{place} cannot train as a whole while {layer} in it has an adapter: "
                "freeze it, or name other --lora_target_modules"
            )
    return {place: inside[place] for place in chosen}


def trained_names(model: nn.Module, parts: Parts, config: "Config") -> set[str]:
    """The names of all parameters that train.

    With `--use_lora`, `model` must come fresh from `add_adapters`: peft has then set `requires_grad` on the
    adapters, and on the biases that `--lora_bias` asks for, and on nothing else.
    """
    names = {name for members in trained_whole(model, parts, config).values() for name in members}
    if config.use_lora:
        names |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        beside = parts.vision + parts.projector
        names |= {name for name, _ in model.named_parameters() if not name.startswith(beside)}
    return {name for name in names if not name.startswith(parts.unused)}


def refuse_idle(trained: Mapping[str, nn.Parameter]) -> None:
    """ValueError if parameters that are set to train have no gradient after a backward pass."""
    if idle := [name for name, parameter in trained.items() if parameter.grad is None]:
        raise ValueError(
            f"{len(idle)} parameters are set to train but got no gradient in the first step, "
            f"first {idle[0]}; freeze them, or give data that reaches them"
        )
