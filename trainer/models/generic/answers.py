"""What a model family of transformers answers itself, where what holds for nearly all of them does not.

    answers_of(config).token_types(slots, labels, samples)   # PaliGemma: {"token_type_ids": 0 for the prompt}

Everything has a default, so a family that is not in `ANSWERS` is an ordinary one.
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
class Answers:
    """The answers of one family."""

    token_types: TokenTypes = no_types
    """(slots [B, T] or None, labels [B, T], a row's sample lengths) → further arguments of the base model."""
    first_position: int = 0
    """The position of a sample's first token."""
    final_end: str | None = None
    """The token that ends an answer, where the chat template leaves the last one open."""
    sizes_on_host: bool = False
    """Whether all that it computes from the sizes of pictures may be on the host, where nothing waits."""
    mixers: tuple[str, ...] = ()
    """Classes of modules that mix tokens, beside attention and modules with a convolution of their own."""


ANSWERS = {
    "exaone4_5": Answers(sizes_on_host=True),
    "gemma3": Answers(token_types=image_types),
    "glm4v": Answers(final_end="<|user|>"),
    "glm4v_moe": Answers(final_end="<|user|>"),
    "llava": Answers(final_end="</s>"),
    "llava_onevision": Answers(sizes_on_host=True),
    "minimax": Answers(mixers=("MiniMaxLightningAttention",)),
    "mistral3": Answers(sizes_on_host=True),
    "paligemma": Answers(token_types=prefix_types, first_position=1),
    "qwen2_vl": Answers(sizes_on_host=True),
    "qwen2_5_vl": Answers(sizes_on_host=True),
    "qwen3_vl": Answers(sizes_on_host=True),
    "qwen3_vl_moe": Answers(sizes_on_host=True),
    "qwen3_5": Answers(sizes_on_host=True),
}
"""By the configuration's model_type."""


def answers_of(config: PreTrainedConfig) -> Answers:
    return ANSWERS.get(config.model_type, Answers())
