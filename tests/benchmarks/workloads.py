"""What the benchmarks train on: models of about 67 M parameters, and samples of chosen lengths.

    MODELS["xcomposer2"].make(folder / "model")                # a Hugging Face folder, random weights
    data = make_data(folder / "text", WORKLOADS["text"].shapes, samples=32)    # data.json and its pictures

A picture is 144 image slots: XComposer2 sees 168 × 168 pixels, Qwen2.5-VL 336 × 336. Texts are random
words, so that no two samples are alike; a word and the space behind it are two tokens. Half of a sample's
text is its answer, on average, which is what trains: with image slots and questions, a third of the realistic
mixture's tokens are supervised.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_model, word_tokenizer
from trainer.models.demo_bases import QWEN_TOKENS, ROLES, write_qwen2_5_vl

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
    "plora_rank": 16,
    "plora_dropout": 0.0,
    "img_size": 168,
    "vision_config": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "image_size": 168, "patch_size": 14, "projection_dim": 256},
}
"""Of the language model's arithmetic the output layer takes 40 % here and 5 % in the published 7 B models:
what saves rows of logits counts more here than there."""
IMAGE_SLOTS = 144
QWEN_TEXT: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]},
}
QWEN_VISION: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "depth": 4,
    "num_heads": 4,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [3],
}
"""The sizes of the model above, as far as there are the same; other blocks of the tower see windows."""

Shapes = Callable[[np.random.Generator], tuple[int, int]]
"""Draws (tokens of text, images) of a sample."""


@dataclass(frozen=True)
class Workload:
    """The samples of a comparison, and what trains on them."""

    what: str
    shapes: Shapes
    lora: bool = False
    fix_projector: bool = False


def _length(random: np.random.Generator) -> int:
    """Log-normal, as lengths of instructions are: median 180, one in twenty over 570; from 24 to 1,024."""
    return int(np.clip(random.lognormal(np.log(180), 0.7), 24, 1024))


def _realistic(random: np.random.Generator) -> tuple[int, int]:
    return _length(random), int(random.random() < 0.6)


def _equal(random: np.random.Generator) -> tuple[int, int]:
    images = int(random.random() < 0.6)
    return 384 - images * IMAGE_SLOTS, images


@dataclass(frozen=True)
class Model:
    """A family's model."""

    make: Callable[[Path], object]
    peers: tuple[str, ...]
    """The other systems that can train it."""
    picture: tuple[int, int] = (320, 240)
    """(width, height) of its pictures' files."""


def make_qwen2_5_vl(
    folder: Path,
    text: dict[str, Any] = QWEN_TEXT,
    vision: dict[str, Any] = QWEN_VISION,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Pictures keep their size: a slot is 28 × 28 pixels. The tokenizer knows words, as XComposer2's does.
    Returns the model's parameters."""
    word_tokenizer(folder, text["vocab_size"], special=[*ROLES, *QWEN_TOKENS])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    pixels = {"min_pixels": 28**2, "max_pixels": 1280 * 28**2}
    return write_qwen2_5_vl(folder, tokenizer, text, vision, **pixels, dtype=dtype)


OUR_LOSS = ("hf_ddp_our_loss", "hf_fsdp2_our_loss")
"""Peers with the loss of XComposer2's class."""
MODELS = {
    "xcomposer2": Model(lambda folder: tiny_model(folder, **SIZES), ("hf_ddp", "hf_fsdp2", *OUR_LOSS, "trl")),
    "qwen2_5_vl": Model(make_qwen2_5_vl, ("hf_ddp", "hf_fsdp2", "trl"), picture=(336, 336)),
}
WORKLOADS = {
    "realistic": Workload("log-normal lengths, an image in 60 % of the samples", _realistic),
    "equal": Workload("all samples equally long, an image in 60 %: no padding to save", _equal),
    "multi_image": Workload(
        "3 to 6 images and 200 to 600 tokens of text",
        lambda random: (int(random.integers(200, 600)), int(random.integers(3, 7))),
    ),
    "lora": Workload(
        "the realistic mixture, adapters of rank 16 on a frozen base",
        _realistic,
        lora=True,
        fix_projector=True,
    ),
    "text": Workload(
        "log-normal lengths, no images", lambda random: (_length(random), 0), fix_projector=True
    ),
}


def make_data(
    folder: Path,
    shapes: Shapes,
    samples: int,
    num_words: int = 31000,
    picture: tuple[int, int] = (320, 240),
) -> Path:
    """Write `samples` records whose lengths `shapes` draws, and a JPEG for each of their images.

    num_words: the words w0, w1, … that texts are drawn from; the tokenizer must know them.
    picture: (width, height) of the images.
    """
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records, num_images = [], 0

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in random.integers(0, num_words, length))

    for number in range(samples):
        tokens, images = shapes(random)
        paths = [f"images/{num_images + i}.jpg" for i in range(images)]
        num_images += images
        for path in paths:
            _picture(random, picture).save(folder / path, quality=85)
        length = max(2, tokens // 2)
        asked = max(1, int(length * random.uniform(0.3, 0.7)))
        records.append(
            {
                "id": str(number),
                "image": paths,
                "conversations": [
                    {"from": "user", "value": "<ImageHere>" * images + text(asked)},
                    {"from": "assistant", "value": text(length - asked)},
                ],
            }
        )
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def _picture(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Smooth blobs of colour: decodes and compresses like a photograph."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)
