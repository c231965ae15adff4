"""Broken files of every kind and form: no traceback, no hang, and a refusal names file and record."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import DataError
from data.loader import SampleReader
from data.mixture import read_mixture
from tests.data_fixtures import encoder, record
from trainer.models.xcomposer2.image_processing_xcomposer2 import SquareImageProcessor

SECONDS_PER_CASE = 10
"""A case takes milliseconds; this is a hang."""
SCRAPS = [
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\",
        b"\\ud800",
        b"\n",
        b" ",
        b"\t",
        b"#",
        b"'",
        b"\0",
        b"\xff",
    ),
    *(b"null", b"true", b"1e999", b"-", b"NaN", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\xe6\xb5\xa6"),
    *(
        b"<ImageHere>",
        b"from",
        b"value",
        b"human",
        b"conversations",
        b"messages",
        b"role",
        b"content",
        b"image",
        b"images",
        b"<image>",
        b'"video": "a.mp4", ',
        b'{"type": "image"}, ',
        b"data:image/png;base64,",
        b"file:///",
        b"../",
        b"/dev/zero",
        b"a.json",
    ),
]
FORMATS = {
    "a.png": {},
    "a.jpg": {},
    "a.gif": {},
    "a.bmp": {},
    "a.tiff": {"compression": "tiff_lzw"},
    "a.webp": {},
    "a.ppm": {},
}


def mutate(data: bytes, choose: random.Random) -> bytes:
    for _ in range(choose.choice([1, 1, 2, 5, 20])):
        at, length = choose.randrange(len(data) + 1), choose.choice([1, 2, 8, 100])
        kind = choose.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([choose.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + length :]
        elif kind == 2:
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif kind == 3:
            data = data[:at] + choose.choice(SCRAPS) + data[at:]
        elif kind == 4:
            data = data[:at] if choose.random() < 0.3 else data
        else:
            data = data[:at] + choose.randbytes(length) + data[at + length :]
    return data


def chat(content) -> dict:
    """A record in OpenAI's form."""
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "4"}]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Good files by name."""
    folder = tmp_path_factory.mktemp("whole")
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    for name, options in FORMATS.items():
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(folder / name, exif=exif, **options)
    names = list(FORMATS)
    records = [
        record("1 <ImageHere>浦语", "2", "<ImageHere>", "3", images=names[:2], record_id="r0"),
        *(record("<ImageHere>", "\u2028 é", images=[name]) for name in names),
        {**record("<image>", "2"), "images": "a.png", "sorce": 1},
        {**chat("<image> 1 <image>"), "images": names[:2]},
        chat([{"type": "text", "text": "1"}, {"type": "image", "image": "a.png"}]),
        {
            **chat([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "浦"}]),
            "images": names[2:4],
        },
        chat([{"type": "image_url", "image_url": {"url": "a.gif"}}]),
        chat([{"type": "image_url", "image_url": {"url": (folder / "a.bmp").as_uri()}}]),
        record("<b>", "5", record_id="last"),
    ]
    (folder / "a.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(json.dumps(item) for item in records)
    (folder / "b.jsonl").write_text(lines)
    (folder / "data.txt").write_text("# all of it\na.json 0.02\n'b.jsonl'\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_case(folder: Path, whole: dict[str, bytes], seed: int) -> str:
    """Mutates one file, then does what a training would: indexes, checks, reads every sample."""
    choose = random.Random(seed)
    kind = choose.choice(["a.json", "b.jsonl", "data.txt", "image"])
    broken = choose.choice(list(FORMATS)) if kind == "image" else kind
    for name, data in whole.items():
        (folder / name).write_bytes(mutate(data, choose) if name == broken else data)
    started = time.monotonic()
    refusals = []  # (what it must say, what it says)
    try:
        sources = read_mixture(folder / "data.txt", skip_bad=choose.random() < 0.5, show_progress=False)
    except DataError as error:
        refusals = [(str(folder), line) for line in str(error).split("\n")]
    else:
        processor = SquareImageProcessor(14, 7, as_viewed=choose.random() < 0.5)
        reader = SampleReader(sources, encoder(), processor)
        for number, source in enumerate(sources):
            for index in range(len(source.records)):
                try:
                    reader.read(number, index)
                except DataError as error:
                    refusals.append((f"{source.records.path}: record {index} ", str(error)))
    assert time.monotonic() - started < SECONDS_PER_CASE
    for place, what in refusals:
        assert place in what
        assert what.isprintable()
    return "refused" if refusals else "accepted"


def test_the_whole_files_are_good(tmp_path, whole):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    sources = read_mixture(tmp_path / "data.txt", show_progress=False)
    reader = SampleReader(sources, encoder(), SquareImageProcessor(14, 7))
    for number, source in enumerate(sources):
        read = [reader.read(number, index) for index in range(len(source.records))]
        assert sum(len(pictures) for _, pictures in read) == source.records.num_images == 2 + len(FORMATS) + 8


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_broken_file_brings_more_than_a_sentence(tmp_path_factory, whole, seed):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    run_case(folder, whole, seed)


@pytest.mark.slow
def test_5000_broken_files(tmp_path, whole):
    outcomes = [run_case(tmp_path, whole, seed) for seed in range(5000)]
    assert min(outcomes.count("accepted"), outcomes.count("refused")) > 500
