"""Features of pictures into their slots, without waiting for the device.

transformers finds the slots of a row by a mask, whose number of True only the device knows: models wait to
compare it with the number of features, and again wherever the mask is an index, forward and backward. But the
data knows the row's ids on the host:

    ids [[7 5 5 8]], 5 the image token     places [1, 2]
    row of embeddings                      features [2, D] are copied to places 1 and 2

    slots_on_host(model)                   # before training

`get_placeholder_mask` of the model then runs on the host's ids, with all of its checks, and returns masks
that know their places.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import map_tensors, on_host, to_device


class SlotMask(Tensor):
    """A mask [B, T, …] of slots, with their `places` in the flattened [B · T]."""

    places: Tensor

    @staticmethod
    def of(mask: Tensor, device: torch.device) -> "SlotMask":
        """From a mask [B, T], [B, T, 1] or expanded [B, T, D], on the host."""
        column = mask[..., :1] if mask.ndim == 3 else mask
        slots: Any = to_device(column, device).expand(mask.shape).as_subclass(SlotMask)
        slots.places = to_device(column.flatten().nonzero()[:, 0], device)
        return slots

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.masked_scatter:
            row, mask, features = _row_mask_and_features(*args, **kwargs)
            features = features.reshape(-1, row.shape[-1])
            return row.flatten(0, 1).index_copy(0, mask.places, features).view_as(row)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        mask = args[0]
        if isinstance(mask, SlotMask) and (
            func is Tensor.to or (func is Tensor.__getitem__ and args[1] == (..., 0) and mask.ndim == 3)
        ):
            result = result.as_subclass(SlotMask)
            result.places = mask.places
        return result


def _row_mask_and_features(input: Tensor, mask: Any, source: Tensor) -> tuple[Tensor, SlotMask, Tensor]:
    """The arguments of `Tensor.masked_scatter`, by its names."""
    return input, mask, source


def slots_on_host(model: nn.Module) -> None:
    """Let the model find the slots of its rows on the host; what a model does otherwise stays as it is."""
    module: Any
    for module in model.modules():
        if hasattr(module, "get_placeholder_mask"):
            module.get_placeholder_mask = functools.partial(_placeholder_mask, module.get_placeholder_mask)
        if hasattr(module, "_deepstack_process"):
            module._deepstack_process = functools.partial(_deepstack_process, module._deepstack_process)


def _placeholder_mask(
    own: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, *features: Any, **named: Any
) -> Any:
    """The class's own function, of the row's ids on the host; the masks that it returns are `SlotMask`s."""
    ids = None if input_ids is None else on_host(input_ids)
    if ids is None or ids.device.type != "cpu" or inputs_embeds is None:
        return own(input_ids, inputs_embeds, *features, **named)
    without_memory = torch.empty(()).expand(inputs_embeds.shape)
    masks = own(ids, without_memory, *features, **named)
    return map_tensors(masks, lambda mask: SlotMask.of(mask, inputs_embeds.device))


def _deepstack_process(own: Any, hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """Features of the tower's earlier layers, added at the slots [B, T] of the hidden states [B, T, D]."""
    if not isinstance(mask, SlotMask):
        return own(hidden, mask, features)
    added = features.to(hidden.device, hidden.dtype)
    return hidden.flatten(0, 1).index_add(0, mask.places, added).view_as(hidden)
