"""What the original model computed on tiny random weights: inputs, and the numbers to meet.

golden = Golden("xcomposer2-hd")
golden.model()                              # our model with its weights, in evaluation mode
golden.inputs("one_image_2x2")              # the keyword arguments of forward, labels among them
golden.tensors["one_image_2x2/logits"]      # every 5th of the 320 logits
golden_folder("xcomposer2", tmp_path)       # its folder, and a tokenizer, to start a run from
packed_row(samples("xcomposer2"))           # all cases in one row
packed_micro_batch()                        # four samples, as the data packs them; 70-pixel images
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.batch import MicroBatch, collate
from data.tokens import Encoded
from tests.data_fixtures import pixel_values
from tests.tiny import GOLDEN, word_tokenizer
from trainer.models.xcomposer2.modeling_xcomposer2 import InternLMXComposer2ForCausalLM

FAMILIES = ("xcomposer2", "xcomposer2-hd")
SQUARE = ("text_only", "one_image_front", "two_images_apart")
HD = ("text_only", "one_image_wide_1x3", "two_images_multi_turn")
SAMPLES = {"xcomposer2": SQUARE, "xcomposer2-hd": HD}
"""Cases that are put into one batch."""

torch.set_num_threads(1)  # on models this small a second thread only waits


class Golden:
    def __init__(self, family: str) -> None:
        self.folder = GOLDEN / family
        self.numbers: dict[str, Any] = json.loads((self.folder / "cases.json").read_text())
        self.cases: dict[str, dict[str, Any]] = self.numbers["cases"]
        self.tensors = load_file(self.folder / "cases.safetensors")
        self.stride = self.numbers["logits_stride"]
        noise = torch.Generator().manual_seed(self.numbers["images"]["seed"])
        draws = [torch.randn(shape, generator=noise) for shape in self.numbers["images"]["draws"]]
        self.images = [image for draw in draws for image in draw]

    def model(self) -> InternLMXComposer2ForCausalLM:
        return InternLMXComposer2ForCausalLM.from_pretrained(self.folder).eval()

    def inputs(self, case: str) -> dict[str, Any]:
        part = {
            name: self.tensors[f"{case}/{name}"]
            for name in ("input_ids", "attention_mask", "im_mask", "labels")
        }
        inputs: dict[str, Any] = {name: tensor.long() for name, tensor in part.items()}
        inputs["im_mask"] = inputs["im_mask"].bool()
        images = [self.images[index] for index in self.cases[case]["images"]]
        return {**inputs, "pixel_values": images or None}

    def logits_error(self, case: str, logits: Tensor) -> float:
        """The largest difference at real positions."""
        real = self.tensors[f"{case}/attention_mask"].bool()
        return (logits[..., :: self.stride] - self.tensors[f"{case}/logits"])[real].abs().max().item()


@functools.cache
def golden(family: str) -> Golden:
    return Golden(family)


def golden_folder(family: str, folder: Path) -> Path:
    """Make a model folder of the golden weights with a word-level tokenizer."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden(family).folder / name, folder)
    word_tokenizer(folder)
    return folder


def samples(family):
    parts = [golden(family).inputs(case) for case in SAMPLES[family]]
    return [{**part, "attention_mask": None} for part in parts]


def images_of(parts):
    return [image for part in parts for image in part["pixel_values"] or []]


def padded(parts, side):
    """One batch of all samples, padded with </s> on `side`."""
    width = max(part["input_ids"].shape[1] for part in parts)

    def pad(tensor, value):
        gap = width - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (gap, 0) if side == "left" else (0, gap), value=value)

    batch = {
        "input_ids": torch.cat([pad(part["input_ids"], 2) for part in parts]),
        "attention_mask": torch.cat([pad(torch.ones_like(part["input_ids"]), 0) for part in parts]),
        "im_mask": torch.cat([pad(part["im_mask"], False) for part in parts]),
        "labels": torch.cat([pad(part["labels"], -100) for part in parts]),
    }
    return {**batch, "pixel_values": images_of(parts)}


def packed_row(parts):
    """One row of all samples, whose positions restart."""
    keys = ("input_ids", "im_mask", "labels")
    row = {key: torch.cat([part[key] for part in parts], dim=1) for key in keys}
    positions = [torch.arange(part["input_ids"].shape[1]) for part in parts]
    return {**row, "position_ids": torch.cat(positions)[None], "pixel_values": images_of(parts)}


def encoded(images: int, text: int, seed: int, slots: int = 25) -> Encoded:
    """Three tokens, the images with a token behind each, and text, half of it supervised."""
    is_slot = [False] * 3 + ([True] * slots + [False]) * images + [False] * text
    ids = np.random.default_rng(seed).integers(3, 300, len(is_slot))
    labels = np.where(np.arange(len(ids)) < len(ids) - text // 2, -100, ids)
    return Encoded(ids, labels, np.array(is_slot), [slots] * images)


PACKED = [encoded(1, 9, 0), encoded(0, 20, 1), encoded(2, 6, 2), encoded(0, 4, 3)]
PACKED_IMAGES = list(torch.randn(3, 3, 70, 70, generator=torch.Generator().manual_seed(0)))


def packed_micro_batch(parts: list[Encoded] = PACKED, images: list[Tensor] = PACKED_IMAGES) -> MicroBatch:
    return collate(parts, pixel_values(images), [(0, i) for i in range(len(parts))], pad_id=2, packed=True)
