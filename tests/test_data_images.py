"""Image files as people have them: each right, or refused in a sentence."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

import data.images as images_module
from data.errors import DataError
from data.images import open_image, process, size_of
from trainer.models.xcomposer2.image_processing_xcomposer2 import SquareImageProcessor

RED, BLUE = (250, 5, 5), (5, 5, 250)


def image_size(path, as_viewed=False):
    """What the lengths are computed from: the header."""
    with open_image(path) as image:
        return size_of(image, SquareImageProcessor(2, 1, as_viewed=as_viewed))


def load_image(path, as_viewed=False):
    """What the model's processor resizes."""
    with open_image(path) as image:
        return process(image, SquareImageProcessor(2, 1, as_viewed=as_viewed).rgb)


@pytest.fixture
def picture():
    """6×4, the left half red, the right half blue."""
    image = Image.new("RGB", (6, 4), RED)
    image.paste(BLUE, (3, 0, 6, 4))
    return image


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.ppm", {}),
        ("a.tiff", {}),
        ("a.gif", {}),
        ("a.webp", {"lossless": True}),
        ("misnamed.jpg", {"format": "PNG"}),
    ],
)
def test_lossless_formats_read_back(tmp_path, picture, name, options):
    picture.save(tmp_path / name, **options)
    loaded = load_image(tmp_path / name)
    assert (loaded.mode, loaded.size) == ("RGB", (6, 4))
    assert image_size(tmp_path / name) == (6, 4)
    assert np.abs(np.asarray(loaded).astype(int) - np.asarray(picture)).max() <= 5


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, picture, mode):
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    picture.convert(mode).save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    left, right = loaded.getpixel((0, 0)), loaded.getpixel((5, 0))
    if mode in ("P", "RGBA", "CMYK", "YCbCr"):
        assert left[0] > 200 > right[0]
        assert right[2] > 200 > left[2]


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((0, 0))
    assert red > 200
    assert max(green, blue) < 50


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        assert [pixel[0] for pixel in load_image(tmp_path / name).getdata()] == [0, 0x12, 0x80, 0xFF]


def test_32_bits_with_the_levels_of_8_keep_them(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], dtype=np.int32)).save(tmp_path / "a.tiff")
    assert [pixel[0] for pixel in load_image(tmp_path / "a.tiff").getdata()] == [0, 100, 255]


@pytest.mark.parametrize("value", [70_000, -1])
def test_more_than_16_bits_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value]], dtype=np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(
        DataError, match=r"a\.tiff cannot be decoded: its pixels run from .* more than 16 bits"
    ):
        load_image(tmp_path / "a.tiff")


def test_floats_are_refused(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff cannot be decoded: its pixels are floating-point"):
        load_image(tmp_path / "a.tiff")


def test_exif_rotation_is_an_option(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to view
    picture.save(tmp_path / "a.png", exif=exif)
    picture.resize((60, 40)).save(tmp_path / "a.jpg", exif=exif)
    picture.save(tmp_path / "a.tiff", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    at, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4
    rest, last = content[end:-12], content[-12:]
    (tmp_path / "behind.png").write_bytes(content[:at] + rest + content[at:end] + last)
    assert image_size(tmp_path / "a.png") == load_image(tmp_path / "a.png").size == (6, 4)
    sizes = {"a.png": (4, 6), "behind.png": (4, 6), "a.tiff": (4, 6), "a.jpg": (40, 60)}
    for name, size in sizes.items():
        viewed = load_image(tmp_path / name, as_viewed=True)
        assert image_size(tmp_path / name, as_viewed=True) == viewed.size == size
        assert viewed.getpixel((0, 0))[0] > 200
        assert viewed.getpixel((0, size[1] - 1))[2] > 200


def test_the_size_of_a_picture_is_known_without_decoding_it(tmp_path, monkeypatch):
    names = ("a.png", "a.jpg", "a.webp", "a.gif", "a.tiff")
    for name in names:
        Image.new("RGB", (6, 4), RED).save(tmp_path / name)
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda image: pytest.fail(f"{image.filename} is decoded")
    )
    for name in names:
        assert image_size(tmp_path / name, as_viewed=True) == (6, 4)
    monkeypatch.undo()
    with open_image(tmp_path / "a.png") as image:  # and asking for it does not disturb decoding
        assert size_of(image, SquareImageProcessor(2, 1, as_viewed=True)) == (6, 4)
        assert process(image, SquareImageProcessor(2, 1).rgb).getpixel((0, 0)) == RED


def test_transparency_shows_the_hidden_colour_or_white(tmp_path):
    Image.new("RGBA", (2, 2), (9, 8, 7, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (9, 8, 7)
    assert load_image(tmp_path / "a.png", as_viewed=True).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.save(tmp_path / "b.png", transparency=0)
    assert load_image(tmp_path / "b.png", as_viewed=True).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_gives_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    red, _, blue = load_image(tmp_path / name).getpixel((4, 4))
    assert red > 200 > blue


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_extreme_shapes(tmp_path, size):
    Image.new("RGB", size, RED).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == image_size(tmp_path / "a.png") == size


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.tiff"])
def test_cut_files_are_refused(tmp_path, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0.0, 0.01, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=name):
            load_image(tmp_path / name)


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_001, 10_000), (200_000, 200_000), (2**31 - 1, 1)])
def test_a_header_of_absurd_size_is_refused_unread(tmp_path, size, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for read in (image_size, load_image):
        with pytest.raises(DataError, match=r"bomb.png (has|cannot be opened)"):
            read(tmp_path / "bomb.png")


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("<html>not found</html>")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("a.png", "a.eps"):
        with pytest.raises(DataError, match="none of JPEG"):
            load_image(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(DataError, match="it is not a file"):
        load_image(tmp_path)
    with pytest.raises(DataError, match="cannot be opened"):
        load_image(str(tmp_path / "a\0b.png"))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="it is not a file"):
        load_image(tmp_path / "pipe.png")


def test_the_limit_is_on_pixels(tmp_path, monkeypatch):
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(images_module, "MAX_PIXELS", 99)
    with pytest.raises(DataError, match="10×10 pixels; from 1 to 99"):
        image_size(tmp_path / "a.png")
