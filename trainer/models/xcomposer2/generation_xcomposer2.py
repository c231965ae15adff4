"""Generation with images: `generate`, and `chat` in the original's prompt format.

    answer, history = model.chat(tokenizer, "<ImageHere>What colour is it?", image="cat.jpg")
    answer, history = model.chat(tokenizer, "And the background?", image="cat.jpg", history=history)

The first prompt, with the control tokens as ids and the slots of a 490-pixel model:

    1 92543 "user\\n" 1,225 slots "What colour is it?" 92542 "\\n" 92543 "assistant\\n"

`generate` takes the inputs of `forward`; rows of unequal length are padded on the left.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from .conversation_xcomposer2 import IMAGE, TURN_END, Conversation
from .image_processing_xcomposer2 import image_processor_for

ImageLike = str | Path | Image.Image


class XComposer2GenerationMixin(GenerationMixin):
    """Adds images to transformers' generation: used in the first step only, and repeated with their rows."""

    def set_generation_defaults(self: Any) -> None:
        """Stop at the end of a turn too, and ignore the training settings of a published config.json:
        use_cache false, and a max_length."""
        defaults = self.generation_config
        eos = defaults.eos_token_id
        ends = eos if isinstance(eos, list) else [self.config.eos_token_id if eos is None else eos]
        defaults.eos_token_id = list(dict.fromkeys([*ends, self.config.end_token_id]))
        defaults.use_cache = True
        if defaults.max_length == self.config.max_length:
            defaults.max_length = None

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """from_pretrained reads the defaults again, from the folder, and calls this."""
        parent: Any = super()
        parent.adjust_generation_fn(*args, **kwargs)
        self.set_generation_defaults()

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Any:
        """All ones: without a mask every position is real, as image slots may have the id of padding."""
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.int64, device=inputs_tensor.device)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        is_first_iteration: bool | None = False,
        im_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        # transformers' method passes pixel_values by the same rule.
        if im_mask is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            new_tokens = max(input_ids.shape[1] - im_mask.shape[1], 0)
            inputs["im_mask"] = F.pad(im_mask, (0, new_tokens))
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat each row with its images, for beams or several answers."""
        images, im_mask = model_kwargs.pop("pixel_values", None), model_kwargs.get("im_mask")
        if images is not None and im_mask is not None and expand_size > 1:
            images = self._repeat_images(list(images), im_mask.sum(dim=1).tolist(), expand_size)
        parent: Any = super()
        input_ids, model_kwargs = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs if images is None else {**model_kwargs, "pixel_values": images}

    def _repeat_images(self: Any, images: list[Tensor], slots_of_row: list[int], times: int) -> list[Tensor]:
        repeated, at = [], 0
        for slots in slots_of_row:
            first = at
            while slots > 0 and at < len(images):
                slots -= self.vit.num_tokens(*images[at].shape[1:])
                at += 1
            repeated += images[first:at] * times
        return repeated

    @torch.no_grad()
    def chat(
        self: Any,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        image: ImageLike | Sequence[ImageLike] | None = None,
        history: Sequence[tuple[str, str]] = (),
        meta_instruction: str = "",
        hd_num: int | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = False,
        **generation: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer `query`; returns the answer and the history with it.

        image: one or several, for the `<ImageHere>` of history and query in order; a single one without a
            placeholder goes first. meta_instruction: a system turn. hd_num: maximum tiles of an image.
        generation: further arguments of `generate`, such as temperature.

        Control tokens written in query, history or instruction are treated as plain text. ValueError if
        images and placeholders differ in number.
        """
        if image is None:
            images = []
        else:
            images = [image] if isinstance(image, (str, Path, Image.Image)) else list(image)
        config = copy.copy(self.config)
        for name, value in (self._adapter_preprocessing() | {"hd_num": hd_num}).items():
            if value is not None:
                setattr(config, name, value)
        process = image_processor_for(config)
        opened = [item if isinstance(item, Image.Image) else Image.open(item) for item in images]
        pixels = [process(item).to(self.device) for item in opened]
        turns = [("system", meta_instruction)] if meta_instruction else []
        for asked, answered in history:
            turns += [("user", asked), ("assistant", answered)]
        turns.append(("user", query))
        slots = [self.vit.num_tokens(*item.shape[1:]) for item in pixels]
        ids, is_slot = prompt_ids(tokenizer, turns, slots)
        end = tokenizer.convert_tokens_to_ids(TURN_END)
        output = self.generate(
            input_ids=torch.tensor([ids], device=self.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=self.device),
            im_mask=torch.tensor([is_slot], device=self.device),
            pixel_values=pixels or None,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            **{"eos_token_id": [tokenizer.eos_token_id, end], **generation},
        )
        answer = cast(str, tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
        return answer, [*history, (query, answer)]

    def _adapter_preprocessing(self: Any) -> dict[str, Any]:
        """The preprocessing of the active adapter's training; empty if there is no active adapter."""
        if not (adapters := getattr(self, "peft_config", None)):
            return {}
        from peft.tuners.tuners_utils import BaseTunerLayer

        layer = next(module for module in self.modules() if isinstance(module, BaseTunerLayer))
        if layer.disable_adapters or not layer.active_adapters:
            return {}
        return (adapters[layer.active_adapters[0]].auto_mapping or {}).get("preprocessing", {})


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], slots: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """(role, text) turns → the ids of the prompt for the assistant, and which of them are image slots.

    slots: number of slots of each image, in the order of `<ImageHere>` in the texts.
    """
    placeholders = sum(text.count(IMAGE) for _, text in turns)
    first = len(slots) == 1 and placeholders == 0
    if placeholders != len(slots) and not first:
        raise ValueError(f"{placeholders} {IMAGE} for {len(slots)} images: write one for each image")
    conversation, waiting = Conversation(tokenizer), iter(slots)
    ids: list[int] = []
    is_slot: list[bool] = []
    for piece in conversation.pieces(turns, image_first=first, prompt=True):
        new = [conversation.pad_id] * next(waiting) if piece.ids is None else piece.ids
        ids += new
        is_slot += [piece.ids is None] * len(new)
    return ids, is_slot
