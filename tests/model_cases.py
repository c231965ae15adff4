"""What the original model computed on tiny random weights: inputs, and the numbers to meet.

golden = Golden("xcomposer2-hd")
golden.model()                              # our model with its weights, in evaluation mode
golden.inputs("one_image_2x2")              # the keyword arguments of forward, labels among them
golden.tensors["one_image_2x2/logits"]      # every 5th of the 320 logits
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.models.xcomposer2.modeling_xcomposer2 import InternLMXComposer2ForCausalLM

GOLDEN = Path(__file__).resolve().parent / "golden"
FAMILIES = ("xcomposer2", "xcomposer2-hd")

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
