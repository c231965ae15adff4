"""Floating-point operations of an XComposer2, its layers counted one by one.

Input: a model (its layers, and which of them train) and a micro-batch. Output: two integers, by the rules of
`trainer.models.family.Flops`.

    flops = count_flops(model)                       # once; the model may be on the meta device
    vision, language = flops.of(micro_batch)

PLoRA's products are at image slots only, the output layer's at supervised positions only. The published 7B
with a frozen tower, a sample of 1,500 tokens, 1,225 of them one image's, 200 supervised:

    vision 1.03e12 (the projector included), language 7.13e13
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from data.batch import MicroBatch


@dataclass(frozen=True)
class ModelFlops:
    """Operations for each unit of work, forward and backward together."""

    config: Any
    """The model's."""
    per: Counter[str]
    """Unit → operations. Units: view (an input of the vision tower), feature (a row through the projector),
    token, slot (an image slot, beside its token), pair (of tokens of a sample), supervised (position)."""

    @property
    def of_language(self) -> dict[str, float]:
        return {unit: self.per[unit] for unit in ("token", "slot", "pair", "supervised")}

    def of(self, micro_batch: MicroBatch) -> tuple[int, int]:
        inputs, per = micro_batch.inputs, self.per
        slots = int(inputs["im_mask"].sum())
        vision = per["feature"] * slots + per["view"] * (
            self._views(inputs.get("pixel_values")) if slots else 0
        )
        return vision, (
            per["token"] * micro_batch.num_tokens
            + per["slot"] * slots
            + per["pair"] * sum(length**2 for length in micro_batch.lengths)
            + per["supervised"] * micro_batch.num_supervised
        )

    def _views(self, images: Any) -> int:
        """Inputs of the vision tower: images, or tiles and a global view of each image."""
        if images is None:
            return 0
        if not self.config.high_resolution:
            return len(images)
        side = self.config.image_size
        return sum(1 + image.shape[1] // side * (image.shape[2] // side) for image in images)


def count_flops(model: nn.Module, backward: bool = True) -> ModelFlops:
    """Count the operations of an XComposer2, adapters included; backward False: of the forward pass alone."""
    config: Any = model.config
    walk = _Walk(model, backward)
    patches = (config.image_size // config.patch_size) ** 2
    positions = patches + 1  # the class token
    tower = "vit.vision_tower.vision_model"
    walk.layers(f"{tower}.embeddings.patch_embedding", unit="view", rows=patches)
    walk.through(f"{tower}.embeddings", f"{tower}.pre_layrnorm")
    for i in range(config.vision_config.num_hidden_layers):
        block = f"{tower}.encoder.layers.{i}"
        walk.through(f"{block}.layer_norm1")
        qkv = walk.layers(*(f"{block}.self_attn.{x}_proj" for x in "qkv"), unit="view", rows=positions)
        walk.attention(*qkv, unit="view", pairs=positions**2, width=config.vision_config.hidden_size)
        walk.layers(f"{block}.self_attn.out_proj", unit="view", rows=positions)
        walk.through(f"{block}.layer_norm2")
        walk.layers(f"{block}.mlp.fc1", unit="view", rows=positions)
        walk.layers(f"{block}.mlp.fc2", unit="view", rows=positions)
    walk.through("plora_glb_GN", "plora_sub_GN")
    walk.layers("vision_proj.0", unit="feature")
    walk.layers("vision_proj.2", unit="feature")

    walk.through("model.tok_embeddings")
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}"
        walk.through(f"{block}.attention_norm")
        (qkv,) = walk.layers(f"{block}.attention.wqkv", unit="token")
        walk.attention(qkv, qkv, qkv, unit="pair", pairs=1, width=config.hidden_size)
        walk.layers(f"{block}.attention.wo", unit="token")
        walk.through(f"{block}.ffn_norm")
        walk.layers(f"{block}.feed_forward.w1", f"{block}.feed_forward.w3", unit="token")
        walk.layers(f"{block}.feed_forward.w2", unit="token")
    walk.through("model.norm")
    walk.layers("output", unit="supervised")
    return ModelFlops(config, walk.per)


class _Walk:
    """Sums products in the order of computation; `needs_gradient`: whether the activations there need one."""

    def __init__(self, model: nn.Module, backward: bool) -> None:
        self.model, self.backward = model, backward
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.per: Counter[str] = Counter()
        self.needs_gradient = False

    def through(self, *names: str) -> None:
        """Pass modules or parameters without products."""
        self.needs_gradient = self.needs_gradient or any(map(self._trains, names))

    def layers(self, *names: str, unit: str, rows: int = 1) -> list[bool]:
        """Count linear layers with the same input, of `rows` rows a unit; returns which outputs need a
        gradient."""
        for prefix in names:
            for name, layer in self.model.get_submodule(prefix).named_modules(prefix=prefix):
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    self._product(name, layer, unit, rows)
        outputs = [self.needs_gradient or self._trains(name) for name in names]
        self.needs_gradient = any(outputs)
        return outputs

    def _product(self, name: str, layer: nn.Linear | nn.Conv2d, unit: str, rows: int) -> None:
        # The input of the second matrix of a low-rank pair is the output of the first.
        first = name[: name.rindex("_B")] + "_A" if "_B" in name else None
        of_input = self.needs_gradient or (first is not None and self._trains(first))
        products = 1 + self.backward * (of_input + layer.weight.requires_grad)
        unit, rows = ("slot", 1) if "Plora_" in name else (unit, rows)
        self.per[unit] += 2 * layer.weight.numel() * rows * products

    def attention(self, q: bool, k: bool, v: bool, *, unit: str, pairs: int, width: int) -> None:
        """Count scores and weighted values of `pairs` pairs a unit; q, k, v: whether they need a gradient."""
        products = 2 + self.backward * (q + k + (q or k) + v)
        self.per[unit] += 2 * width * pairs * products

    def _trains(self, prefix: str) -> bool:
        return any(f"{name}.".startswith(f"{prefix}.") for name in self.trained)
