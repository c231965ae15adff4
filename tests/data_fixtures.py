"""What the data tests share: records, files of them, sources of made-up sizes, a tokenizer of numbers.

write_json(tmp_path / "a.json", [record("Hi", "Hello")])
NumberTokenizer()(["11 12"])["input_ids"] == [[11, 12]]
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from data.mixture import Source, read_mixture
from data.tokens import SLOT, SampleEncoder
from trainer.models.xcomposer2.conversation_xcomposer2 import CHAT_TEMPLATE, Conversation
from trainer.models.xcomposer2.image_processing_xcomposer2 import SquareImageProcessor

START, END, BOS, EOS, NEWLINE = 92543, 92542, 1, 2, 364
HEADERS = {"user\n": [1008, NEWLINE], "assistant\n": [525, 11353, NEWLINE], "system\n": [77, NEWLINE]}


CONTROL_IDS = {"<s>": BOS, "</s>": EOS, "<unk>": 0, "[UNUSED_TOKEN_145]": END, "[UNUSED_TOKEN_146]": START}


class NumberTokenizer:
    """Reads "11 12" as the ids 11 and 12, a word by its length; has InternLM2's control tokens."""

    backend_tokenizer = SimpleNamespace(to_str=lambda: "numbers")
    bos_token, eos_token, unk_token, unk_token_id, pad_token_id = "<s>", "</s>", "<unk>", 0, EOS
    all_special_tokens = tuple(CONTROL_IDS)
    chat_template = CHAT_TEMPLATE

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, str):
            return CONTROL_IDS.get(tokens, 0)
        return [CONTROL_IDS.get(token, 0) for token in tokens]

    def __call__(self, texts: list[str], *, split_special_tokens: bool = False, **_: Any):
        if split_special_tokens:
            return {"input_ids": [self._encode(text) for text in texts]}
        control = "|".join(map(re.escape, CONTROL_IDS))
        ids = []
        for text in texts:
            stretches = [stretch for stretch in re.split(f"({control})", text) if stretch]
            encoded = [[CONTROL_IDS[s]] if s in CONTROL_IDS else self._encode(s) for s in stretches]
            ids.append([token for stretch in encoded for token in stretch])
        return {"input_ids": ids}

    def apply_chat_template(self, messages, *, chat_template: str, add_generation_prompt: bool, **_: Any):
        variables = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        (text,), _ = render_jinja_template(
            [messages],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return text

    def _encode(self, text: str) -> list[int]:
        if text in HEADERS:
            return HEADERS[text]
        if text == "\n":
            return [NEWLINE]
        return [int(word) if word.isdigit() else 100 + len(word) for word in text.split()]


def pixel_values(pictures: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The model's arguments for pictures, none without any."""
    return SquareImageProcessor(2, 1).batch(pictures) if pictures else {}


@dataclass(frozen=True)
class SquareProcessor:
    """A picture becomes its mean colour in a 2×2 square, and `slots` tokens."""

    slots: int = 4
    as_viewed: bool = False

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixel = self.rgb(image).resize((1, 1)).getpixel((0, 0))
        return torch.tensor(cast(tuple, pixel)).float().div(255).view(3, 1, 1).expand(3, 2, 2).clone()

    def rgb(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB")

    def size(self, image: Image.Image) -> tuple[int, int]:
        return image.size

    def num_tokens(self, width: int, height: int) -> int:
        return self.slots

    def tokens(self, width: int, height: int) -> np.ndarray:
        return np.full(self.num_tokens(width, height), SLOT)

    def batch(self, pictures: Sequence[torch.Tensor]) -> dict[str, Any]:
        return pixel_values(pictures)

    def dummy(self) -> torch.Tensor:
        return torch.zeros(3, 2, 2)


class SizedProcessor(SquareProcessor):
    """Keeps a picture's own size, a token a pixel: the high-resolution case."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.zeros(3, image.height, image.width)

    def num_tokens(self, width: int, height: int) -> int:
        return width * height


def encoder(max_length: int = 1000) -> SampleEncoder:
    return SampleEncoder(Conversation(NumberTokenizer()), max_length)


def turns(*texts: str) -> list[dict[str, str]]:
    """Alternating turns, the user's first."""
    roles = ("user", "assistant")
    return [{"from": roles[number % 2], "value": text} for number, text in enumerate(texts)]


def record(*texts: str, images: Sequence[str] = (), record_id: str | None = None) -> dict[str, Any]:
    fields: dict[str, Any] = {"conversations": turns(*texts)}
    if images:
        fields["image"] = list(images)
    if record_id is not None:
        fields["id"] = record_id
    return fields


def write_json(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def numbered_mixture(folder: Path, sizes: Sequence[tuple[int, float]]) -> list[Source]:
    """Sources of (records, samples an epoch); the answer of record i of source s is "1<s><i>"."""
    lines = []
    for number, (num_records, num_samples) in enumerate(sizes):
        records = [record("5", f"1{number}{index:03}") for index in range(num_records)]
        write_json(folder / f"s{number}.json", records)
        lines.append(f"s{number}.json {num_samples / 1000}")
    (folder / "data.txt").write_text("\n".join(lines))
    return read_mixture(folder / "data.txt")


def fake_sources(sizes: Sequence[tuple[int, int]]) -> list[Source]:
    """Sources that only the order looks at: (records, samples an epoch)."""
    return [cast(Source, SimpleNamespace(records=range(n), num_samples=k)) for n, k in sizes]
