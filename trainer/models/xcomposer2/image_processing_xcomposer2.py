"""Image preprocessing of InternLM-XComposer2: resize, pad, normalise.

Input: a `PIL.Image` of any mode and size. Output: float32 [3, H, W], normalised as CLIP's, bit for bit equal
to the original with torchvision. `num_tokens(width, height)` computes the number of tokens from the size.

Square (2.0: `-7b`, `-vl-7b`, `-vl-1_8b`): resized to a square of `img_size`, bicubic; a token per patch.

    >>> SquareImageProcessor(img_size=490, patch_size=14).num_tokens(640, 480)  # 35 · 35 patches
    1225

HD (`4khd`, `2d5`): resized to the tiling of at most `hd_num` tiles that fits its shape, bilinear, and padded
white, centred. The tower also sees the whole picture in one tile. 2×2 patches merge into a token: a tile of
560 pixels is m · m tokens, m = 20. A separator ends every row of tokens, and one stands between the views.

    >>> processor = HDImageProcessor(tile=560, patch_size=14, hd_num=18, max_upscale=1.5)
    >>> processor.num_tokens(640, 480)  # 2 = min(4, ceil(1.5 · 640 / 560)) columns: 1120×840, so 2×2 tiles
    2061
    >>> (2 * 2 + 1) * 20 * 20 + 1 + (2 + 1) * 20  # (tiles + global) · m² + 1 + (rows + global) · m
    2061

Any mode becomes RGB by `convert("RGB")`, as in the original: a phone picture is not rotated, and a
transparent pixel shows its hidden colour. `as_viewed=True` gives what a person sees: rotated by the EXIF tag,
transparency on white. An animation gives its first frame. 16-bit grey is scaled to 8 bits, where `convert`
would clip nearly all of it to white. Training, `trainer.generate` and a saved model's `chat()` all use this
file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TILE_4KHD = 336
"""4KHD is recognised by its tile: 336 pixels, where 2.5 has 560."""
EXIF_ORIENTATION = 0x0112
TIFF_WIDTH = 256
"""Its number among the tags of a TIFF file."""
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def to_rgb(image: Image.Image, as_viewed: bool = False) -> Image.Image:
    """Convert an image of any mode to RGB; ValueError if its pixels cannot be interpreted as colours."""
    if as_viewed:
        image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT_MODES:
        image = _to_8_bits(image)
    if as_viewed and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it as 8 bits")
    return image.convert("RGB")


def rgb_size(image: Image.Image, as_viewed: bool = False) -> tuple[int, int]:
    """(width, height) of `to_rgb(image, as_viewed)`, from the header alone."""
    turned = as_viewed and _exif(image).get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    if turned and image.format == "TIFF":  # newer versions of Pillow turn it, but keep the tag
        turned = image.width == cast(Any, image).tag_v2[TIFF_WIDTH]
    return (image.height, image.width) if turned else image.size


def _exif(image: Image.Image) -> Image.Exif:
    """EXIF data without decoding the pixels, which Pillow does for a PNG, to see what is behind them."""
    file: Any = getattr(image, "fp", None)
    if image.format != "PNG" or file is None or _has_text_or_exif_at_end(file):
        return image.getexif()
    return Image.Image.getexif(image)


def _has_text_or_exif_at_end(file: Any) -> bool:
    """Whether a PNG file has chunks behind its pixels that may contain EXIF data."""
    position, behind_pixels = file.tell(), False
    file.seek(8)
    try:
        while len(header := file.read(8)) == 8:
            kind = header[4:]
            behind_pixels |= kind == b"IDAT"
            if behind_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)  # the chunk and its checksum
        return False
    finally:
        file.seek(position)


def _to_8_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its pixels run from {levels.min()} to {levels.max()}, more than 16 bits")
    # Mode "I" may hold 8-bit levels in 32 bits; the 16-bit modes are what they say.
    shift = 0 if image.mode == "I" and levels.max() <= 255 else 8
    return Image.fromarray((levels >> shift).astype(np.uint8))


@dataclass(frozen=True, kw_only=True)
class _Views:
    """Options and methods of both processors."""

    as_viewed: bool = False
    """Rotate images by their EXIF tag and put transparent ones on white; the original does neither."""

    def rgb(self, image: Image.Image) -> Image.Image:
        """The RGB picture of an image of any mode, before resizing; ValueError as in `to_rgb`."""
        return to_rgb(image, self.as_viewed)

    def size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) of `rgb(image)`, from the header alone."""
        return rgb_size(image, self.as_viewed)

    def batch(self, pictures: Sequence[torch.Tensor]) -> dict[str, Any]:
        """pixel_values: [N, 3, H, W], or a list of [3, H, W] where the sizes differ."""
        same_size = all(picture.shape == pictures[0].shape for picture in pictures)
        return {"pixel_values": torch.stack(list(pictures)) if same_size else list(pictures)}


def _compare(by_size: int, by_pixels: int) -> None:
    if by_size != by_pixels:
        raise ValueError(f"it has {by_size} tokens by its size, but {by_pixels} by its pixels")


@dataclass(frozen=True)
class SquareImageProcessor(_Views):
    """Resizes every picture to img_size × img_size pixels."""

    img_size: int
    patch_size: int

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """float32 [3, img_size, img_size]"""
        return _normalise(self.resize(image))

    def resize(self, image: Image.Image) -> Image.Image:
        """The RGB picture that the model sees."""
        return self.rgb(image).resize((self.img_size, self.img_size), Image.Resampling.BICUBIC)

    def num_tokens(self, width: int, height: int) -> int:
        """Image tokens of a picture, the same for every size."""
        return (self.img_size // self.patch_size) ** 2

    def tokens(self, width: int, height: int) -> np.ndarray:
        """int64 [num_tokens] of -1: each is the slot of a feature."""
        return np.full(self.num_tokens(width, height), -1)

    def check(self, image: Image.Image) -> None:
        """ValueError unless the tokens by an opened picture's size are those by its pixels."""
        width, height = self.resize(image).size
        by_pixels = (width // self.patch_size) * (height // self.patch_size)
        _compare(self.num_tokens(*self.size(image)), by_pixels)

    def smaller(self) -> dict[str, SquareImageProcessor]:
        """ValueError, as every picture takes the same number of tokens."""
        raise ValueError("this model resizes every image to the same square")

    def dummy(self) -> torch.Tensor:
        """The smallest valid image, all zeros."""
        return torch.zeros(3, self.img_size, self.img_size)


@dataclass(frozen=True)
class HDImageProcessor(_Views):
    """Resizes a picture to the largest tiling of its own shape that `hd_num` and `max_upscale` allow."""

    tile: int
    """Side of a tile, in pixels."""
    patch_size: int
    hd_num: int
    """Maximum number of tiles, without the global view."""
    max_upscale: float | None
    """The longer side grows at most by this factor, rounded up to a whole tile; None: no limit."""

    def __post_init__(self) -> None:
        if self.hd_num < 1:
            raise ValueError(f"hd_num is {self.hd_num}; a high-resolution model needs at least 1 tile")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """float32 [3, rows · tile, columns · tile]"""
        return _normalise(self.resize(image))

    def resize(self, image: Image.Image) -> Image.Image:
        """The RGB picture that the model sees, padded to whole tiles."""
        image = self.rgb(image)
        # The original resizes portraits transposed, which matters as Pillow rounds between its two passes.
        portrait = image.width < image.height
        if portrait:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        width, height = self._size(*image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        padded_height = math.ceil(height / self.tile) * self.tile
        padded = Image.new("RGB", (width, padded_height), (255, 255, 255))
        padded.paste(image, (0, (padded_height - height) // 2))
        return padded.transpose(Image.Transpose.TRANSPOSE) if portrait else padded

    def num_tokens(self, width: int, height: int) -> int:
        """Image tokens of a picture of width × height pixels, separators included."""
        long, short = (
            math.ceil(side / self.tile) for side in self._size(max(width, height), min(width, height))
        )
        return self._num_tokens(long * short, rows=short if width >= height else long)

    def check(self, image: Image.Image) -> None:
        """ValueError unless the tokens by an opened picture's size are those by its pixels."""
        columns, rows = (side // self.tile for side in self.resize(image).size)
        _compare(self.num_tokens(*self.size(image)), self._num_tokens(columns * rows, rows))

    def _num_tokens(self, tiles: int, rows: int) -> int:
        merged = self.tile // self.patch_size // 2  # tokens along a tile's side
        return (tiles + 1) * merged**2 + 1 + (rows + 1) * merged

    def tokens(self, width: int, height: int) -> np.ndarray:
        """int64 [num_tokens] of -1: each is the slot of a feature."""
        return np.full(self.num_tokens(width, height), -1)

    def smaller(self) -> dict[str, HDImageProcessor]:
        """The same processor with fewer tiles, from hd_num - 1 down to one, by limit ("hd_num=4")."""
        return {f"hd_num={tiles}": replace(self, hd_num=tiles) for tiles in range(self.hd_num - 1, 0, -1)}

    def dummy(self) -> torch.Tensor:
        """The smallest valid image, all zeros: one tile."""
        return torch.zeros(3, self.tile, self.tile)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """New (width, height) of a landscape picture, before padding; the width is a multiple of the tile."""
        ratio = width / height
        columns = 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= self.hd_num:
            columns += 1
        if self.max_upscale is not None:
            columns = min(math.ceil(width * self.max_upscale / self.tile), columns)
        new_width = columns * self.tile
        # A strip of 2000×1 would be less than a pixel high; the original fails there.
        return new_width, max(1, int(new_width / ratio))


ImageProcessor = SquareImageProcessor | HDImageProcessor


def image_processor_for(config: Any) -> ImageProcessor:
    """The image processor of a model with this configuration.

    config: its `high_resolution`, `image_size` (of the square or the tile), `patch_size`, `images_as_viewed`
    and `hd_num`, the maximum tiles of an image; None: as in the original's fine-tuning, 16 for 4KHD and 18
    for 2.5. ValueError if hd_num is below 1, or set for a model of square images.
    """
    side, patch_size, hd_num = config.image_size, config.patch_size, config.hd_num
    if not config.high_resolution:
        if hd_num is not None:
            raise ValueError(
                f"hd_num is {hd_num}, but this model takes square images of {side} pixels: do not set hd_num"
            )
        return SquareImageProcessor(side, patch_size, as_viewed=config.images_as_viewed)
    is_4khd = side == TILE_4KHD
    return HDImageProcessor(
        tile=side,
        patch_size=patch_size,
        hd_num=(16 if is_4khd else 18) if hd_num is None else hd_num,
        max_upscale=None if is_4khd else 1.5,
        as_viewed=config.images_as_viewed,
    )


def _normalise(image: Image.Image) -> torch.Tensor:
    """RGB of H × W pixels → float32 [3, H, W], in torchvision's order of operations."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return pixels.float().div_(255).sub_(mean).div_(std)
