"""What the benchmarks train on: a model of 67 M parameters, and samples of chosen lengths.

    model = tiny_model(folder / "model", **SIZES)              # a Hugging Face folder, random weights
    data = make_data(folder / "text", WORKLOADS["text"].shapes, samples=32)    # data.json and its pictures

A picture of 168 × 168 pixels is 144 image slots. Texts are random words, so that no two samples are alike; a
word and the space behind it are two tokens. Half of a sample's text is its answer, on average, which is what
trains: with image slots and questions, a third of the realistic mixture's tokens are supervised.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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


def make_data(folder: Path, shapes: Shapes, samples: int, num_words: int = 31000) -> Path:
    """Write `samples` records whose lengths `shapes` draws, and a JPEG for each of their images.

    num_words: the words w0, w1, … that texts are drawn from; the tokenizer must know them.
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
            _picture(random).save(folder / path, quality=85)
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


def _picture(random: np.random.Generator) -> Image.Image:
    """Smooth blobs of colour, 320 × 240: decodes and compresses like a photograph."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return coarse.resize((320, 240), Image.Resampling.BICUBIC)
