"""The image processors against what the original makes of the same pictures, and on shapes that break it."""

import hashlib
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.models.xcomposer2.image_processing_xcomposer2 import (
    CLIP_MEAN,
    CLIP_STD,
    HDImageProcessor,
    SquareImageProcessor,
    image_processor_for,
)

IMAGES = Path(__file__).parent / "golden" / "images"
PROCESSED = json.loads((IMAGES / "processor.json").read_text())
TILINGS = json.loads((IMAGES / "hd_transform.json").read_text())
HD = {"4khd": (336, None), "2d5": (560, 1.5)}  # tile, max_upscale


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def pattern(width: int, height: int) -> Image.Image:
    """The picture of hd_transform.json: value (3x + 5y + 40c + xy // 7) mod 256 at x, y, channel c."""
    y, x, c = np.ogrid[:height, :width, :3]
    return Image.fromarray(((3 * x + 5 * y + 40 * c + x * y // 7) % 256).astype(np.uint8))


@pytest.mark.parametrize("name", PROCESSED)
def test_tensors_equal_the_original_s_bit_for_bit(name):
    for case in PROCESSED[name]:
        if "square" in case:
            processor = SquareImageProcessor(case["square"], patch_size=14)
        else:
            processor = HDImageProcessor(case["tile"], 14, case["hd_num"], case["max_upscale"])
        pixels = processor(Image.open(IMAGES / name))
        assert list(pixels.shape) == case["shape"]
        assert pixels.dtype == torch.float32
        assert pixels.is_contiguous()
        stride = case["stride"]
        assert sha256(pixels[:, ::stride, ::stride].numpy()) == case["sha256"], case


@pytest.mark.parametrize("variant", HD)
def test_hd_pictures_sizes_and_token_counts_equal_the_original_s(variant):
    tile, max_upscale = HD[variant]
    for width, height, hd_num, out_width, out_height, num_tokens, digest in TILINGS[variant]:
        processor = HDImageProcessor(tile, 14, hd_num, max_upscale)
        assert processor.num_tokens(width, height) == num_tokens, (width, height, hd_num)
        if digest:
            resized = processor.resize(pattern(width, height))
            assert resized.size == (out_width, out_height), (width, height, hd_num)
            assert sha256(np.asarray(resized)) == digest, (width, height, hd_num)


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    hd_num=st.integers(1, 30),
    max_upscale=st.sampled_from([None, 1.5]),
)
@example(width=700, height=1, hd_num=30, max_upscale=None)
@example(width=1, height=700, hd_num=1, max_upscale=1.5)
@settings(max_examples=60, deadline=None)
def test_the_header_alone_tells_the_tokens_of_any_shape_and_tiles_stay_below_hd_num(
    width, height, hd_num, max_upscale
):
    processor = HDImageProcessor(tile=28, patch_size=7, hd_num=hd_num, max_upscale=max_upscale)
    _, tall, wide = processor(Image.new("RGB", (width, height))).shape
    rows, columns = tall // 28, wide // 28
    assert (rows * 28, columns * 28) == (tall, wide)
    assert rows * columns <= hd_num
    assert processor.num_tokens(width, height) == (rows * columns + 1) * 4 + 1 + (rows + 1) * 2


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
def test_a_strip_thinner_than_a_pixel_after_resizing_is_still_an_image(size):
    processor = HDImageProcessor(tile=56, patch_size=14, hd_num=6, max_upscale=None)
    pixels = processor(Image.new("RGB", size, "red"))
    assert pixels.shape[1] * pixels.shape[2] <= 6 * 56 * 56
    assert processor.num_tokens(*size) > 0


def test_padding_is_white_and_centred():
    processor = HDImageProcessor(tile=56, patch_size=14, hd_num=1, max_upscale=None)
    column = np.asarray(processor.resize(Image.new("RGB", (56, 11), "black")))[:, 0, 0]
    assert column.tolist() == [255] * 22 + [0] * 11 + [255] * 23


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16"])
def test_every_mode_becomes_three_channels(mode):
    image = Image.new(mode, (30, 20))
    for processor in (SquareImageProcessor(28, 14), HDImageProcessor(28, 14, 4, 1.5)):
        pixels = processor(image)
        assert pixels.shape[0] == 3
        assert pixels.isfinite().all()


def test_alpha_is_dropped_not_blended_and_16_bit_grey_is_scaled():
    processor = SquareImageProcessor(2, 1)

    def first_pixel(image: Image.Image) -> list[int]:
        values = processor(image)[:, 0, 0] * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
        return (values * 255).round().int().tolist()

    assert first_pixel(Image.new("RGBA", (4, 4), (10, 20, 30, 0))) == [10, 20, 30]
    assert first_pixel(Image.fromarray(np.full((4, 4), 40_000, np.uint16))) == [40_000 >> 8] * 3


def config_of(image_size: int, high_resolution: bool, hd_num: int | None = None, as_viewed=False):
    return SimpleNamespace(
        high_resolution=high_resolution,
        image_size=image_size,
        patch_size=14,
        hd_num=hd_num,
        images_as_viewed=as_viewed,
    )


def test_the_configuration_chooses_the_variant_and_its_default_hd_num():
    assert image_processor_for(config_of(490, False)) == SquareImageProcessor(490, 14)
    viewed = SquareImageProcessor(490, 14, as_viewed=True)
    assert image_processor_for(config_of(490, False, as_viewed=True)) == viewed
    assert image_processor_for(config_of(336, True)) == HDImageProcessor(336, 14, 16, None)
    assert image_processor_for(config_of(560, True)) == HDImageProcessor(560, 14, 18, 1.5)
    assert image_processor_for(config_of(560, True, 24)) == HDImageProcessor(560, 14, 24, 1.5)
    with pytest.raises(ValueError, match="hd_num is 0"):
        image_processor_for(config_of(560, True, 0))
    with pytest.raises(ValueError, match="square images of 490 pixels"):
        image_processor_for(config_of(490, False, 16))


@pytest.mark.parametrize("config", [config_of(70, False), config_of(56, True)])
def test_processors_reach_worker_processes_and_their_dummy_is_the_smallest_image(config):
    processor = image_processor_for(config)
    assert pickle.loads(pickle.dumps(processor)) == processor
    smallest = processor(Image.new("RGB", (1, 1)))
    assert processor.dummy().shape == smallest.shape
    assert not processor.dummy().any()
