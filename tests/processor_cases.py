"""Small processors of vision-language families, built in code, and the files of each in a folder.

processor = make_processor("qwen2_5_vl", tmp_path)   # transformers' own class, PIL backend, trained tokenizer

Pictures are small: a tile or crop has 28 × 28 pixels, and a feature stands for 14 × 14 or 28 × 28 of them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.utils import is_num2words_available

from trainer.models.generic.load_processor import build_processor

TILE = 28
TEXTS = (
    "What is in the picture? A cat sleeps on the red sofa.",
    "How many dogs are there? There are two dogs, and both of them look at the ball.",
    "Is the sky blue?\n\nYes, it is.\nIt is a sunny day.",
)
COMMON_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
ROWS_AND_COLUMNS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
NEEDS_NUM2WORDS = {"smolvlm": None if is_num2words_available() else "its processor needs num2words"}
"""Why a family cannot be built here; None if it can."""


def make_tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on TEXTS.

    special: control tokens. named: those that the tokenizer has as attributes, `image_token="<image>"`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = list(dict.fromkeys([*COMMON_TOKENS, *special, *named.values()]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(tokens), special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special,
        model_specific_special_tokens=named,
    )


def image_processor(name: str, **settings: Any) -> Any:
    """An image processor with the PIL backend."""
    return get_image_processor_class_from_name(f"{name}ImageProcessorPil")(**settings)


def _qwen(processor: str) -> Callable[[], ProcessorMixin]:
    return lambda: _with_video(
        processor,
        image_processor(
            "Qwen2VL", patch_size=14, size={"shortest_edge": 4 * TILE**2, "longest_edge": 64 * TILE**2}
        ),
        make_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]),
    )


def _glm4v() -> ProcessorMixin:
    special = ["<|image|>", "<|video|>", "<|user|>"]
    special += [f"<|{side}_of_{what}|>" for what in ("image", "video") for side in ("begin", "end")]
    return _with_video(
        "Glm4vProcessor",
        image_processor("Glm4v", size={"shortest_edge": 4 * TILE**2, "longest_edge": 128 * TILE**2}),
        make_tokenizer(special),
    )


def _internvl() -> ProcessorMixin:
    tokenizer = make_tokenizer(
        [],
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    tiles = image_processor("GotOcr2", size={"height": TILE, "width": TILE}, max_patches=6)
    return _with_video("InternVLProcessor", tiles, tokenizer, image_seq_length=4)


def _llava() -> ProcessorMixin:
    crop = image_processor(
        "CLIP", size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, do_center_crop=True
    )
    return transformers.LlavaProcessor(
        crop,
        make_tokenizer(["<image>"]),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision() -> ProcessorMixin:
    sides = (TILE, 2 * TILE, 3 * TILE)
    tiles = image_processor(
        "LlavaOnevision",
        size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
    )
    return _with_video(
        "LlavaOnevisionProcessor",
        tiles,
        make_tokenizer(["<image>", "<video>"]),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def _tiles_with_names(name: str) -> tuple[Any, PreTrainedTokenizerFast]:
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>"]
    tiles = image_processor(name, size={"longest_edge": 4 * TILE}, max_image_size={"longest_edge": TILE})
    return tiles, make_tokenizer(special + ROWS_AND_COLUMNS)


def _smolvlm() -> ProcessorMixin:
    return _with_video("SmolVLMProcessor", *_tiles_with_names("SmolVLM"), image_seq_len=4)


def _idefics3() -> ProcessorMixin:
    return transformers.Idefics3Processor(*_tiles_with_names("Idefics3"), image_seq_len=4)


def _gemma3() -> ProcessorMixin:
    tokenizer = make_tokenizer(
        [], boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    square = image_processor("Gemma3", size={"height": TILE, "width": TILE})
    return transformers.Gemma3Processor(square, tokenizer, image_seq_length=4)


def _paligemma() -> ProcessorMixin:
    square = image_processor("Siglip", size={"height": TILE, "width": TILE}, image_seq_length=4)
    square.image_seq_length = 4
    return transformers.PaliGemmaProcessor(square, make_tokenizer([], image_token="<image>"))


def _with_video(name: str, *parts: Any, **settings: Any) -> ProcessorMixin:
    return build_processor(getattr(transformers, name), [*parts, None], settings)


FAMILIES: dict[str, Callable[[], ProcessorMixin]] = {
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor"),
    "internvl": _internvl,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "glm4v": _glm4v,
    "paligemma": _paligemma,
}
"""Builders by model_type."""


def make_processor(family: str, folder: Path) -> Any:
    """The family's processor, whose files are written to the folder.

    A processor without a video part is saved by `save_pretrained`: everything in processor_config.json. The
    others cannot be saved without torchvision; they get preprocessor_config.json, as published models have.
    """
    processor: Any = FAMILIES[family]()
    folder.mkdir(parents=True, exist_ok=True)
    if "video_processor" not in processor.get_attributes():
        processor.save_pretrained(folder)
        return processor
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    names = ("image_seq_length", "image_seq_len", "num_image_tokens")
    names += ("vision_feature_select_strategy", "vision_aspect_ratio")
    settings = {name: getattr(processor, name) for name in names if hasattr(processor, name)}
    settings["processor_class"] = type(processor).__name__
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return processor
