"""The rehearsal runs the micro-batches that take most memory: most tokens, and most image slots."""

import pytest
from PIL import Image

from data.lengths import measure_lengths
from data.loader import SampleReader
from data.mixture import read_mixture
from data.packing import Packing
from tests.data_fixtures import SquareProcessor, encoder, record, write_json
from trainer.rehearsal import largest_micro_batches

LONG_TEXT = record("5 " * 30, "31")
TWO_IMAGES = record("<ImageHere><ImageHere>", "32", images=["red.png", "red.png"])
LONG_WITH_IMAGE = record("<ImageHere>" + "5 " * 20, "33", images=["red.png"])
SHORT_TEXT = record("5", "34")


def batches(folder, records, num_samples=2, max_tokens=None):
    """(ids of the samples, tokens, image slots) of each micro-batch to rehearse."""
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    sources = read_mixture(write_json(folder / "a.json", records))
    reader = SampleReader(sources, encoder(1000), SquareProcessor())
    packing = Packing(measure_lengths(reader, num_workers=0), max_tokens) if max_tokens else None
    return [
        (
            [record for _, record in batch.sample_ids],
            batch.inputs["input_ids"].shape[1],
            int(batch.inputs["im_mask"].sum()),
        )
        for batch in largest_micro_batches(reader, num_samples, packing)
    ]


def test_padded_the_longest_samples_and_those_with_most_images_are_rehearsed(tmp_path):
    (longest, tokens, slots), (imaged, fewer, more) = batches(
        tmp_path, [SHORT_TEXT, LONG_TEXT, TWO_IMAGES, LONG_WITH_IMAGE]
    )
    assert (longest, slots) == ([1, 3], 4)
    assert (imaged, more) == ([2, 3], 12)
    assert tokens > fewer


def test_packed_a_row_is_filled_with_the_longest_and_one_with_images(tmp_path):
    records = [SHORT_TEXT, LONG_TEXT, TWO_IMAGES, LONG_WITH_IMAGE]
    (longest, tokens, slots), (imaged, others, more) = batches(tmp_path, records, max_tokens=100)
    assert longest[:2] == [1, 1]
    assert slots < more == 4 * 8
    assert imaged[:4] == [2] * 4
    assert 80 < others <= 100
    assert 80 < tokens <= 100


@pytest.mark.parametrize("max_tokens", [None, 100])
@pytest.mark.parametrize("records", [[SHORT_TEXT, LONG_TEXT], [TWO_IMAGES], [SHORT_TEXT, TWO_IMAGES]])
def test_what_is_largest_in_both_ways_is_rehearsed_once(tmp_path, records, max_tokens):
    assert len(batches(tmp_path, records, max_tokens=max_tokens)) == 1


def test_fewer_samples_than_a_micro_batch_are_repeated(tmp_path):
    ((ids, *_),) = batches(tmp_path, [SHORT_TEXT, LONG_TEXT], num_samples=5)
    assert ids == [1, 0, 1, 0, 1]
