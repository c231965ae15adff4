"""The demo's base models: small, with random weights and a tokenizer of their own, one for each family.

    DEMO_BASES["qwen2_5_vl"].make(Path("output/demo/base"), texts)     # 0.4 M parameters, 450 token ids

Input: the texts of the training data. Output: a model folder like a published one (configuration, weights,
tokenizer with chat template, image processor), which `trainer.main` fine-tunes like any other.

The models of transformers see 64 × 64 pixels in patches of 8. Their conversations are as short as can be:

    <|user|> <image> what color is the shape? </s> <|assistant|> blue </s>

A question is some 6 tokens, and its answer is one: the tokenizer is a byte-level byte-pair encoding trained
on the texts, in which Chinese characters stand alone. Weights have four times the usual standard deviation
where the family lets one choose it, as these models are 50 times narrower than usual.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trainer.models.generic.modeling import auto_class
from trainer.models.xcomposer2.demo_base import make_base as make_xcomposer2

SIDE, PATCH = 64, 8
"""Pixels of a picture's side, and of a patch's."""
MAX_PIECES = 600
END, ROLES = "</s>", ("<|system|>", "<|user|>", "<|assistant|>")
QWEN_TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {{- 'IMAGE' if part.type == 'image' else part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.08}
TEXT: dict[str, Any] = SIZES | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
Make = Callable[[Path, Iterable[str]], None]
"""(folder, texts): writes the model folder."""


@dataclass(frozen=True)
class DemoBase:
    """A family's base model, and the learning rates at which it learns."""

    make: Make
    make_high_resolution: Make | None = None
    """The same with tiles; None for a family whose demo has none."""
    learning_rate: float = 2e-3
    lora_learning_rate: float = 3e-3


def make_qwen2_5_vl(folder: Path, texts: Iterable[str]) -> None:
    """Four patches are one of 16 slots; the tower's first block sees a quarter of the picture at a time."""
    tokenizer = make_tokenizer(texts, QWEN_TOKENS)
    vision = SIZES | {"depth": 3, "num_heads": 4, "patch_size": PATCH}
    vision |= {"window_size": SIDE // 2, "fullatt_block_indexes": [1, 2]}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    write_qwen2_5_vl(folder, tokenizer, text, vision, min_pixels=SIDE**2, max_pixels=SIDE**2)


def write_qwen2_5_vl(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    text: dict[str, Any],
    vision: dict[str, Any],
    min_pixels: int,
    max_pixels: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write a Qwen2.5-VL of random weights; the tokenizer has QWEN_TOKENS, and gets the chat template.
    Returns the number of parameters.

    text, vision: the sizes in its configuration. min_pixels, max_pixels: of a resized picture.
    """
    vocabulary = tokenizer.get_vocab()
    start, image, end, video = (vocabulary[token] for token in QWEN_TOKENS)
    config = Qwen2_5_VLConfig(
        text_config=_of_tokenizer(tokenizer) | text,
        vision_config=vision | {"out_hidden_size": text["hidden_size"]},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    Qwen2VLImageProcessorPil(patch_size=vision["patch_size"], size=size).save_pretrained(folder)
    return _write(folder, config, tokenizer, "".join(QWEN_TOKENS[:3]), dtype)


def make_llava(folder: Path, texts: Iterable[str]) -> None:
    """Each of 64 patches is a slot."""
    tokenizer = make_tokenizer(texts, ["<image>"])
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, **_of_tokenizer(tokenizer)),
        vision_config=CLIPVisionConfig(
            **SIZES, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
        ),
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    _write(folder, config, tokenizer, "<image>")
    size = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",  # without the token of the class
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def make_tokenizer(texts: Iterable[str], special: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with the chat template's control tokens and the family's own (`special`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[\u4e00-\u9fff?？:]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=MAX_PIECES,
            special_tokens=["<pad>", END, *ROLES, *special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<pad>",
        additional_special_tokens=[*ROLES, *special],
    )


def _of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What a configuration of a language model says about its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _write(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    picture: str,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write configuration, random weights and tokenizer to `folder`; returns the number of parameters.

    picture: what the chat template puts for a picture.
    """
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", picture)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


DEMO_BASES = {
    "xcomposer2": DemoBase(
        functools.partial(make_xcomposer2, seed=0),
        functools.partial(make_xcomposer2, seed=0, high_resolution=True),
    ),
    "qwen2_5_vl": DemoBase(make_qwen2_5_vl),
    "llava": DemoBase(make_llava),
}
"""By family; those of transformers by the model_type of their configuration."""
