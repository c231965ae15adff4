"""Pictures of any vision-language model of transformers: their tokens from the size alone, and model inputs.

    pictures = Pictures("Qwen2.5-VL-3B-Instruct")        # the processor files of a model folder
    pictures.num_tokens(640, 480)                        # 391 = 23 · 17: resized to 644×476, 28×28 a token
    pictures.tokens(640, 480)                            # int64 [391], all −1: slots of features
    pictures(image)                                      # pixel_values [1564, 1176], image_grid_thw [1, 3]
    pictures.batch([pictures(image), pictures(photo)])   # what the model takes for both
    pictures.batch([pictures.dummy()])                   # for a rank that has no picture

In: the files that a processor's `save_pretrained` writes, or that a model is published with. Out: for each
picture, the tokens that replace the one image token that the chat template puts into the text, and the
tensors that the class's own `processor(text, images)` computes, bit for bit. A family may put other tokens
around and between its slots, as Idefics3 does for a picture of two tiles, here of two features each:

    <fake> <row_1_col_1> <image> <image> <fake> <row_1_col_2> <image> <image> \\n \\n <fake> <global-img> …
       4         9          −1      −1      4         10         −1      −1   243 243   4         7       …

The tokens come from the processor's own code: it runs on an array of the picture's size without memory
behind it, and the functions that would compute pixels give only shapes. For a processor whose code does not
allow this, it runs on a blank picture of the size. The PIL backend is used everywhere, so torchvision is not
needed, and videos are not supported.

LLaVA-OneVision cuts a picture into tiles only if its sample has no other picture. `num_images` is the number
of pictures in the sample; all other families ignore it.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig, ProcessorMixin

from data.tokens import SLOT
from trainer.models.generic.load_processor import load_processor
from trainer.models.generic.picture_shapes import shapes_alone
from trainer.models.xcomposer2.image_processing_xcomposer2 import rgb_size, to_rgb

CACHED_TOKENS, CACHED_COUNTS = 1_000, 100_000
"""Picture sizes whose tokens, and whose number of tokens, are kept. A picture takes thousands of tokens."""
TEXT_INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"),
    *("special_tokens_mask", "text_replacement_offsets"),
)
"""What a processor computes from the text, and not from the pictures."""
LARGE = (4096, 4096)
"""A picture that reaches the limit of its size in any model."""
DUMMY_SIZES = ((28, 28), (256, 256), (1024, 256), (1024, 32))


class Pictures:
    """Image processor of a model folder. It can be pickled, and threads may share it."""

    def __init__(self, source: str | Path | ProcessorMixin, *, as_viewed: bool = True):
        """Args:
        source: a model folder, or its processor with an image processor of the PIL backend.
        as_viewed: turn pictures by their EXIF tag, as transformers does with pictures that it opens, and put
            transparent ones on white, as its image processors do; False: as the files store them.

        ValueError if the processor cannot be loaded, or its tokens cannot be computed from a size.
        """
        is_folder = isinstance(source, (str, Path))
        self.processor: Any = load_processor(source) if is_folder else source
        self.as_viewed = as_viewed
        name = type(self.processor).__name__
        self.image_token: str = getattr(self.processor, "image_token", None) or ""
        if not self.image_token or not hasattr(self.processor, "_process_images"):
            raise ValueError(f"{name} has no image token that it replaces by a picture's tokens")
        tokenizer = self.processor.tokenizer
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(self.image_token)
        self.slot_id: int = _slot_id(source if is_folder else None, self.processor)
        self._start()
        try:
            real = _expansion(self.processor, Image.new("RGB", (448, 224)), 1, "pt")
        except Exception as error:  # whatever a processor of another design raises
            raise ValueError(f"{name} does not process a picture as others do: {error!r}") from error
        for self._shapes_alone, self._tensors in ((True, None), (True, "pt"), (False, "pt")):
            with contextlib.suppress(Exception):  # whatever code raises that needs more than shapes
                if self._expansion(448, 224, 1) == real:
                    break
        one, two, three = (self._expansion(448, 224, count) for count in (1, 2, 3))
        if two != three:
            raise ValueError(f"{name} gives a picture other tokens for every number of pictures in a sample")
        self._depends_on_count = one != two
        if SLOT not in self.tokens(448, 224):
            slot = tokenizer.convert_ids_to_tokens(self.slot_id)
            raise ValueError(f"{name} gives a picture no {slot!r}, which the model replaces by features")

    def tokens(self, width: int, height: int, *, num_images: int = 1) -> np.ndarray:
        """int64 ids that replace the image token of a picture of this size, −1 at slots; do not write to it.

        A text must be tokenised together with the `expansion` if its ends could merge with the text around
        it: Gemma3 puts two line ends before a picture, and three line ends may be one token.
        """
        return self._tokens(width, height, self._count(num_images))

    def num_tokens(self, width: int, height: int, *, num_images: int = 1) -> int:
        """Length of `tokens`."""
        return self._num_tokens(width, height, self._count(num_images))

    def expansion(self, width: int, height: int, *, num_images: int = 1) -> str:
        """The text that replaces the image token of a picture; ValueError if it cannot have this size."""
        return self._expansion(width, height, self._count(num_images))

    def __call__(self, image: Image.Image, *, num_images: int = 1) -> dict[str, torch.Tensor]:
        """The model's inputs for this picture; ValueError as in `rgb`, or if it cannot have this size."""
        count = self._count(num_images)
        # Every family takes a list of pictures for each text. The text's own tokens are not used.
        inputs = self.processor(
            text=[self.image_token * count],
            images=[[self.rgb(image)] * count],
            text_kwargs={"truncation": False, "verbose": False},
            return_tensors="pt",
        )
        kept = {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}
        # The same picture was given twice, if twice; a number for each sample, not picture, stays.
        return {name: value[: max(1, len(value) // count)] for name, value in kept.items()}

    def batch(self, pictures: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The model's inputs for pictures in the order of their slots.

        They are concatenated, and where they differ in another dimension, such as the number of tiles, filled
        up with zeros, as processors do. ValueError if one that was processed as one of several stands alone.
        """
        batch = {}
        for name in pictures[0]:
            values = [picture[name] for picture in pictures]
            shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            batch[name] = torch.cat([_padded(value, shape) for value in values])
        if "batch_num_images" in batch:
            batch["batch_num_images"] = _images_per_sample(batch["batch_num_images"])
        return batch

    def dummy(self) -> dict[str, torch.Tensor]:
        """The inputs of a black picture, with few pixels for the model."""
        return {name: value.clone() for name, value in self._dummy.items()}

    @functools.cached_property
    def _dummy(self) -> dict[str, torch.Tensor]:
        # Small pictures are enlarged, and how much depends on their shape.
        inputs = []
        for size in DUMMY_SIZES:
            with contextlib.suppress(ValueError):  # too narrow for this model
                inputs.append(self(Image.new("RGB", size)))
        return min(inputs, key=lambda values: values["pixel_values"].numel())

    def smaller(self) -> "dict[str, Pictures]":
        """The same with lower limits: a tile less each time ("max_patches=3"), or a quarter of the size.

        ValueError if the processor has no such limit. `longest_edge` counts pixels in Qwen-VL and GLM-4V.
        """
        return self._smaller

    @functools.cached_property
    def _smaller(self) -> "dict[str, Pictures]":
        image_processor = self.processor.image_processor
        name = type(image_processor).__name__
        size: Any = getattr(image_processor, "size", None)
        if getattr(image_processor, "max_patches", None) is not None:
            lower = range(image_processor.max_patches - 1, image_processor.min_patches - 1, -1)
            smaller = {f"max_patches={tiles}": self._with(max_patches=tiles) for tiles in lower}
        elif (edge := getattr(size, "longest_edge", None)) is not None:
            tile = getattr(image_processor, "max_image_size", None)
            least = size.shortest_edge or (tile["longest_edge"] if tile else edge // 16)
            smaller = {}
            while (edge := edge * 3 // 4) >= least:
                smaller[f"longest_edge={edge}"] = self._with(size=replace(size, longest_edge=edge))
        else:
            raise ValueError(f"{name} has no limit of a picture's tiles or size that could be lowered")
        if smaller and [*smaller.values()][-1].num_tokens(*LARGE) >= self.num_tokens(*LARGE):
            raise ValueError(f"{name} gives a picture as many tokens at a lower limit of its size")
        return smaller

    def _with(self, **settings: Any) -> "Pictures":
        """A copy with other settings of the image processor."""
        other = copy.copy(self)
        other.processor = copy.copy(self.processor)
        other.processor.image_processor = copy.copy(self.processor.image_processor)
        vars(other.processor.image_processor).update(settings)
        for name in ("fingerprint", "_dummy", "_smaller"):
            vars(other).pop(name, None)
        other._start()
        return other

    def check(self, image: Image.Image) -> None:
        """ValueError unless the tokens of an opened picture's size are those of its pixels."""
        picture, size = self.rgb(image), self.size(image)
        for count in (1, 2) if self._depends_on_count else (1,):
            if self._expansion(*size, count) != _expansion(self.processor, picture, count, "pt"):
                raise ValueError(
                    f"{type(self.processor).__name__} gives a picture of {picture.width}×{picture.height} "
                    "pixels other tokens than follow from its size"
                )

    def rgb(self, image: Image.Image) -> Image.Image:
        """The RGB picture of an image of any mode, before resizing; ValueError as in `to_rgb`."""
        return to_rgb(image, self.as_viewed)

    def resize(self, image: Image.Image) -> Image.Image:
        """`rgb(image)`: a model may see patches or tiles of it, which are no picture."""
        return self.rgb(image)

    def size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) of `rgb(image)`, from the header alone."""
        return rgb_size(image, self.as_viewed)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the settings, and with the tokens and pixels of a probe picture."""
        processor, image_processor = self.processor, self.processor.image_processor
        parts = {*type(processor).get_attributes(), "chat_template"}
        digest = hashlib.sha256(repr((type(processor), type(image_processor))).encode())
        for settings in (image_processor.to_dict(), vars(processor), {"as_viewed": self.as_viewed}):
            shown = {name: value for name, value in settings.items() if name not in parts}
            digest.update(json.dumps(shown, sort_keys=True, default=repr).encode())
        levels = np.arange(320 * 160 * 3, dtype=np.uint32).reshape(160, 320, 3) * 2_654_435_761 >> 24
        probe = Image.fromarray(levels.astype(np.uint8))
        digest.update(self.tokens(*probe.size).tobytes() + repr((self.image_token_id, self.slot_id)).encode())
        for name, value in sorted(self(probe).items()):
            digest.update(repr((name, value.shape)).encode() + value.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Pictures({type(self.processor).__name__}, {self.fingerprint})"

    def _start(self) -> None:
        """Set what is not pickled: caches, and the processor that computes shapes."""

        def tokens(width: int, height: int, count: int) -> np.ndarray:
            text = self._expansion(width, height, count)
            encoded = self.processor.tokenizer(text, add_special_tokens=False, verbose=False)
            ids = np.array(encoded["input_ids"], dtype=np.int64)
            ids[ids == self.slot_id] = SLOT
            ids.flags.writeable = False
            return ids

        self._shapes = shapes_alone(self.processor)
        self._tokens = functools.lru_cache(CACHED_TOKENS)(tokens)
        self._num_tokens = functools.lru_cache(CACHED_COUNTS)(lambda *size: len(self._tokens(*size)))

    def __getstate__(self) -> dict[str, Any]:
        started = ("_shapes", "_tokens", "_num_tokens", "_smaller")
        return {name: value for name, value in vars(self).items() if name not in started}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _count(self, num_images: int) -> int:
        """1 for a picture that is alone in its sample or need not know, 2 for one of several."""
        return min(num_images, 2) if self._depends_on_count else 1

    def _expansion(self, width: int, height: int, count: int) -> str:
        try:
            if self._shapes_alone:
                blank = np.broadcast_to(np.uint8(0), (3, height, width))
                return _expansion(self._shapes, blank, count, self._tensors)
            return _expansion(self.processor, Image.new("RGB", (width, height)), count, self._tensors)
        except Exception as error:  # the type differs between processors
            raise ValueError(f"a picture of {width}×{height} pixels cannot be processed: {error}") from error


def _slot_id(folder: str | Path | None, processor: Any) -> int:
    """Id of the token that the model replaces by features, for Gemma3 another than a text's image token."""
    config = {}
    if folder is not None and (Path(folder) / "config.json").is_file():
        config = PreTrainedConfig.get_config_dict(folder)[0]
    places = (config.get("image_token_id"), config.get("image_token_index"))
    places += (
        getattr(processor.tokenizer, "image_token_id", None),
        getattr(processor, "image_token_id", None),
    )
    return next(place for place in places if place is not None)


def _expansion(processor: Any, picture: Any, count: int, tensors: str | None) -> str:
    """The text that stands for a picture among `count` in a sample.

    tensors: "pt" as in a real call; without, arrays of shapes alone need not be copied.
    """
    text = processor.image_token * count
    images = processor.prepare_inputs_layout(images=[[picture] * count], text=[text])[0]
    options = processor._merge_kwargs(
        tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors=tensors
    )
    return processor._process_images(images, **options["images_kwargs"])[1][0]


def _padded(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """value [n, *smaller] with zeros at the end of each dimension up to [n, *shape]."""
    missing = [size - has for size, has in zip(shape, value.shape[1:], strict=True)]
    return torch.nn.functional.pad(value, [side for size in reversed(missing) for side in (0, size)])


def _images_per_sample(counts: torch.Tensor) -> torch.Tensor:
    """`batch_num_images` of pictures that were each processed with their own: [1, 2, 2, 2, 1] → [1, 3, 1].

    The model asks only whether it is 1, for each picture, so neighbouring samples of several may be one.
    """
    per_sample: list[int] = []
    runs = [(several, len(list(run))) for several, run in itertools.groupby((counts != 1).tolist())]
    for number, (several, length) in enumerate(runs, 1):
        if several and length == 1 and number < len(runs):
            raise ValueError("a picture that was processed as one of several stands alone in a batch")
        # The model ignores pictures after the last.
        per_sample += [max(2, length)] if several else [1] * length
    return torch.tensor(per_sample, dtype=counts.dtype)
