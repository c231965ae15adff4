"""Which parameters train, at which rate, in which dtype, and which are saved: decided here and nowhere else.

Input: the model on the meta device and the configuration. Output: names of modules with their parameters, and
the table at the start of a run.

    trained_whole(model, parts, config)        # --fix_vit True --train_modules model.norm,Plora_B
    # {"vision_proj": ["vision_proj.0.weight", …], "model.norm": ["model.norm.weight"],
    #  "model.layers.0.attention.wqkv.Plora_B": ["model.layers.0.attention.wqkv.Plora_B.weight"], …}

    part                    parameters  trains  learning rate  stored as  saved
    vision tower           303,507,456  no      -              bfloat16   as loaded
    projector               20,979,712  yes     1.00e-05       float32    trained

A name means every module or parameter whose dotted name ends with it, as peft's names do.

peft puts an adapted layer one level down: `wo.weight` is `wo.base_layer.weight` once `wo` has an adapter.
`checkpoint_name` takes that back, so the flags, a checkpoint and the model speak of the same layer.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
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


def set_trainable(
    model: nn.Module, training: Collection[str], in_float32: Collection[str], frozen_dtype: torch.dtype
) -> None:
    """Set on a model without memory which parameters get gradients, and every parameter's dtype."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in training)
        parameter.data = parameter.data.to(torch.float32 if name in in_float32 else frozen_dtype)


def refuse_idle(trained: Mapping[str, nn.Parameter]) -> None:
    """ValueError if parameters that are set to train have no gradient after a backward pass."""
    if idle := [name for name, parameter in trained.items() if parameter.grad is None]:
        raise ValueError(
            f"{len(idle)} parameters are set to train but got no gradient in a backward pass, "
            f"first {idle[0]}; freeze them, or give data that reaches them"
        )


def part_of(name: str, parts: Parts) -> str:
    """The part of the model that a parameter belongs to: vision, projector, language, or an adapter."""
    if is_adapter(name):
        return "adapter_b" if ".lora_B." in name else "adapter"
    if name.startswith(parts.vision):
        return "vision"
    return "projector" if name.startswith(parts.projector) else "language"


def _group_of(name: str, parts: Parts) -> str:
    """The row of the start table that a parameter counts in."""
    part = part_of(name, parts)
    if part != "language":
        rows = {
            "vision": "vision tower",
            "projector": "projector",
            "adapter": "adapters",
            "adapter_b": "adapters: B",
        }
        return rows[part]
    if "Plora_" in name:
        return "language: PLoRA"
    return (
        "language: blocks" if name.startswith(parts.language_blocks + ".") else "language: embeddings, head"
    )


def parameter_rows(
    model: nn.Module,
    parts: Parts,
    learning_rates: Mapping[str, float],
    in_adapter: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """A row per group of modules: parameters, peak learning rate (None if frozen), dtype, and if it is saved.

    in_adapter: names of the parameters that an adapter's folder holds; None where the whole model is saved.
    """
    rows: dict[tuple[str, str, bool, torch.dtype, str], int] = {}
    for name, parameter in model.named_parameters():
        trains = parameter.requires_grad
        saved = "trained" if trains else "as loaded"
        if in_adapter is not None:
            saved = "in the adapter" if name in in_adapter else "no"
        key = (_group_of(name, parts), part_of(name, parts), trains, parameter.dtype, saved)
        rows[key] = rows.get(key, 0) + parameter.numel()
    return [
        {
            "part": group,
            "parameters": count,
            "learning_rate": learning_rates[part] if trains else None,
            "stored_as": str(dtype).removeprefix("torch."),
            "saved": saved,
        }
        for (group, part, trains, dtype, saved), count in rows.items()
    ]


def model_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`parameter_rows` as aligned text."""
    lines = [
        f"{'part':<28}{'parameters':>15}  {'trains':<8}{'learning rate':<15}{'stored as':<11}saved",
    ]
    for row in rows:
        trains, rate = ("no", "-") if row["learning_rate"] is None else ("yes", f"{row['learning_rate']:.2e}")
        lines.append(
            f"{row['part']:<28}{row['parameters']:>15,}  {trains:<8}{rate:<15}"
            f"{row['stored_as']:<11}{row['saved']}"
        )
    total = sum(row["parameters"] for row in rows)
    trained = sum(row["parameters"] for row in rows if row["learning_rate"] is not None)
    lines.append(f"{'all':<28}{total:>15,}  {trained:,} train")
    return "\n".join(lines)
