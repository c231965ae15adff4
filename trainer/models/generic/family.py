"""Any model of transformers, with or without pictures: what `trainer.models.family` asks, answered.

    family = TransformersFamily()
    config = family.load_config(Path("Qwen2.5-VL-3B-Instruct"), {}, {})
    model = family.build(config)                                   # its training forward in place
    family.parts(config).vision_blocks                             # "model.visual.blocks"
    family.conversation(Path("Qwen2.5-VL-3B-Instruct"))            # the folder's own chat template
    family.image_processor(config).num_tokens(640, 480)            # 391

Input: a model folder of transformers. Output: the model with the forward of `modeling.py`, its parts
(`model_parts.py`), the conversation format of its chat template (`chat.py`) and the processor of its pictures
(`pictures.py`). No code of the folder is run. What a family must answer itself is in `answers.py`.
"""

import copy
import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data.errors import DataError
from data.images import ImageProcessor
from data.loader import SampleReader
from data.tokens import IGNORED
from trainer.models.family import Conversion, Flops, Names, Parts, Shapes
from trainer.models.generic import conversions, modeling
from trainer.models.generic.answers import answers_of
from trainer.models.generic.chat import TemplateConversation
from trainer.models.generic.model_parts import find_parts
from trainer.models.generic.modeling import takes_pictures
from trainer.models.generic.pictures import Pictures

FOLDER_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
"""Files that a saved folder takes over from its base: the settings of its processor and of generation."""


class TransformersFamily:
    """Models whose classes, tokenizers and processors are transformers' own."""

    def load_config(
        self, folder: Path, flags: Mapping[str, Any], adapter_preprocessing: Mapping[str, Any]
    ) -> PreTrainedConfig:
        for name, value in flags.items():
            raise ValueError(
                f"--{name} {value}: this model's pictures are processed as its preprocessor_config.json "
                "says; change that file, and leave the flag out"
            )
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        if (wanted := config._attn_implementation) not in (None, "sdpa", modeling.ATTENTION):
            raise ValueError(f"{wanted} is not for this model, whose attention packed rows decide.")
        model: Any = modeling.build(config)
        modeling.prepare_for_training(model)
        model.init_buffers = functools.partial(modeling.init_buffers, model)
        model.resize_for_load = _same_shape
        return model

    def parts(self, config: PreTrainedConfig) -> Parts:
        folder = Path(config._name_or_path)
        with torch.device("meta"):
            model = modeling.build(copy.deepcopy(config))
        files = tuple(folder / name for name in FOLDER_FILES if (folder / name).is_file())
        return replace(find_parts(model), files=files, names=TransformersNames(model))

    def tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # `tokenizers` raises no narrower class for a broken file
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer files of {folder} cannot be read: {reason}") from error

    def conversation(self, folder: Path, chat_template: str | None = None) -> TemplateConversation:
        """The tokenizer keeps the template, so that a trained model's folder has the one of its training."""
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer: Any = self.tokenizer(folder)
        tokenizer.chat_template = chat_template or _template_in(folder) or tokenizer.chat_template
        ends = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
        if (folder / "generation_config.json").is_file():
            ends = _read_json(folder / "generation_config.json").get("eos_token_id", ends)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        pictures = Pictures(folder) if takes_pictures(config) else None
        conversation = TemplateConversation(
            tokenizer,
            image_token=pictures.image_token if pictures else None,
            generation_eos=ends,
            final_end=answers_of(config).final_end,
        )
        if pictures:
            conversation.slot_id = pictures.slot_id
        return conversation

    def image_processor(self, config: PreTrainedConfig) -> ImageProcessor:
        return Pictures(config._name_or_path) if takes_pictures(config) else NoPictures()

    def positions(
        self, config: PreTrainedConfig, input_ids: np.ndarray, pictures: Sequence[Any]
    ) -> np.ndarray | None:
        names = [name for name in pictures[0] if "grid" in name] if pictures else []
        grids = {name: torch.cat([picture[name] for picture in pictures]) for name in names}
        found = modeling.positions(config, torch.from_numpy(input_ids), **grids)
        return None if found is None else found.numpy()

    def answering_class(self, config: PreTrainedConfig) -> Any:
        return modeling.auto_class(config)

    def prompt_arguments(self, config: PreTrainedConfig, im_mask: Tensor) -> dict[str, Any]:
        base_class: Any = MODEL_MAPPING[type(config)]
        takes_types = "mm_token_type_ids" in inspect.signature(base_class.forward).parameters
        types = {"mm_token_type_ids": im_mask.int()} if takes_types else {}
        untrained = torch.full_like(im_mask, IGNORED, dtype=torch.int64)
        return types | answers_of(config).token_types(im_mask, untrained, [im_mask.shape[1]])

    def own_arguments(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
        ids, slots = inputs["input_ids"], inputs["im_mask"]
        vision = modeling.vision_arguments(inputs) if inputs["image_runs"] else {}
        types = self.prompt_arguments(config, slots) if vision else {}
        types |= answers_of(config).token_types(slots if vision else None, inputs["labels"], [ids.shape[1]])
        return {"input_ids": ids, **vision, **types}

    def cost_sizes(self, config: PreTrainedConfig) -> dict[str, Any]:
        """From the names that configurations of transformers use; an unknown tower costs nothing."""
        text: Any = config.get_text_config(decoder=True)
        experts = getattr(text, "num_experts_per_tok", None)
        width = text.intermediate_size  # in some families with experts, of one
        if experts:
            width = getattr(text, "moe_intermediate_size", width) * experts
        sizes = {
            "language": (text.hidden_size, width, text.num_hidden_layers),
            "vision": (0, 0, 0),
            "kv_share": (text.num_key_value_heads or text.num_attention_heads) / text.num_attention_heads,
            "patches_per_image": 0,
            "patches_per_slot": 1,
        }
        if not takes_pictures(config):
            return sizes
        vision: Any = getattr(config, "vision_config", None)
        hidden = _first(vision, "embed_dim", "hidden_size")
        merged = _first(vision, "spatial_merge_size") or 1
        side, patch = (_first(vision, name) for name in ("image_size", "patch_size"))
        side, patch = (value[0] if isinstance(value, Sequence) else value for value in (side, patch))
        return sizes | {
            "vision": (
                hidden,
                _first(vision, "intermediate_size") or int(hidden * (_first(vision, "mlp_ratio") or 4)),
                _first(vision, "depth", "num_hidden_layers"),
            ),
            "patches_per_image": (side // patch) ** 2 if side else 1024,
            "patches_per_slot": merged**2,
        }

    def flops(self, model: Any, reader: SampleReader) -> Flops:
        from trainer.extras.measured_flops import measure_flops

        return measure_flops(model, reader)

    def preprocessing(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {}


class TransformersNames(Names):
    """The tensors that transformers itself writes, and those that it reads."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tied = set(getattr(model, "all_tied_weights_keys", {}))

    def loaded(self, shapes: Shapes) -> list[Conversion]:
        return conversions.loaded(self._model, shapes)

    def saved(self, shapes: Shapes) -> list[Conversion]:
        return conversions.saved(self._model, shapes)

    def is_tied(self, key: str) -> bool:
        return key in self._tied


NO_PICTURES = "has images, but this model takes text alone; leave them out, or train another model"


class NoPictures:
    """The image processor of a model of text alone: a DataError for a sample with a picture."""

    as_viewed = False

    def __repr__(self) -> str:
        return "NoPictures()"

    def __call__(self, image: Image.Image) -> Any:
        raise DataError(NO_PICTURES)

    def rgb(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB")

    def resize(self, image: Image.Image) -> Image.Image:
        return self.rgb(image)

    def size(self, image: Image.Image) -> tuple[int, int]:
        return image.size

    def num_tokens(self, width: int, height: int) -> int:
        return len(self.tokens(width, height))

    def tokens(self, width: int, height: int) -> np.ndarray:
        raise DataError(NO_PICTURES)

    def check(self, image: Image.Image) -> None:
        raise DataError(NO_PICTURES)

    def batch(self, pictures: Sequence[Any]) -> dict[str, Any]:
        return {}

    def dummy(self) -> Any:
        return None

    def smaller(self) -> dict[str, "NoPictures"]:
        raise ValueError("this model takes text alone")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _template_in(folder: Path) -> str | None:
    """The chat template that a folder has beside its tokenizer's settings."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return _read_json(folder / "chat_template.json")["chat_template"]
    return None


def _first(config: Any, *names: str) -> Any:
    """The first of these settings that the configuration has, or None."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _same_shape(name: str, tensor: Tensor) -> Tensor:
    """Nothing is resized: `load_weights` reports a tensor of another shape."""
    return tensor
