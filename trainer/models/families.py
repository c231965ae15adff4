"""What a model family of transformers answers itself, where what holds for nearly all of them does not.

    family_of(config).token_types(slots, labels, samples)    # PaliGemma: {"token_type_ids": 0 for the prompt}

Everything has a default, so a family that is not in `FAMILIES` is an ordinary one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

TokenTypes = Callable[[Tensor | None, Tensor | None, list[int]], dict[str, Tensor]]


def no_types(slots: Tensor | None, labels: Tensor | None, lengths: list[int]) -> dict[str, Tensor]:
    return {}


def image_types(slots: Tensor | None, labels: Tensor | None, lengths: list[int]) -> dict[str, Tensor]:
    """1 at image slots: the tokens of an image see all of it."""
    return {} if slots is None else {"token_type_ids": slots.long()}


def prefix_types(slots: Tensor | None, labels: Tensor | None, lengths: list[int]) -> dict[str, Tensor]:
    """0 in a sample's prompt, which sees all of itself, and 1 from its first trained token on."""
    assert labels is not None
    parts = [part.long().cummax(dim=1).values for part in (labels != -100).split(lengths, dim=1)]
    return {"token_type_ids": torch.cat(parts, dim=1)}


@dataclass(frozen=True)
class Family:
    """The answers of one family."""

    token_types: TokenTypes = no_types
    """(slots [B, T] or None, labels [B, T], a row's sample lengths) → further arguments of the base model."""
    first_position: int = 0
    """The position of a sample's first token."""
    mixers: tuple[str, ...] = ()
    """Classes of modules that mix tokens, beside attention and modules with a convolution of their own."""


FAMILIES = {
    "gemma3": Family(token_types=image_types),
    "paligemma": Family(token_types=prefix_types, first_position=1),
    "minimax": Family(mixers=("MiniMaxLightningAttention",)),
}
"""By the configuration's model_type."""


def family_of(config: PreTrainedConfig) -> Family:
    return FAMILIES.get(config.model_type, Family())
