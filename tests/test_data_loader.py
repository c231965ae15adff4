"""The loader: mixed batches, dummy images, bad samples, order."""

import logging
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
from PIL import Image

import data.loader
from data.errors import DataError
from data.loader import SampleReader, StepLoader
from data.mixture import read_mixture
from data.sampler import StepSampler
from tests.data_fixtures import EOS, SizedProcessor, SquareProcessor, encoder, record, write_json

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path):
    for number, (name, rgb) in enumerate(COLOURS.items()):
        Image.new("RGB", (2 + number, 3), rgb).save(tmp_path / f"{name}.png")
    return tmp_path


def run(
    folder,
    records,
    *,
    processor=None,
    max_length=1000,
    rank=0,
    num_ranks=1,
    workers=0,
    per=2,
    meanwhile=lambda: None,
    **options,
):
    sources = read_mixture(
        write_json(folder / "a.json", records), skip_bad=options.get("on_bad_sample") == "skip"
    )
    sampler = StepSampler(sources, seed=0, global_batch=len(records))
    reader = SampleReader(sources, encoder(max_length), processor or SquareProcessor())
    meanwhile()
    loader = StepLoader(
        reader,
        sampler,
        rank=rank,
        num_ranks=num_ranks,
        samples_per_micro_batch=per,
        num_steps=1,
        num_workers=workers,
        **options,
    )
    (step,) = list(loader)
    return step


def test_images_and_text_mix_in_one_batch(folder):
    records = [
        record("<ImageHere>", "31", images=["red.png"]),
        record("<ImageHere><ImageHere>", "32", images=["green.png", "blue.png"]),
        record("5", "33"),
        record("6 6 6", "34"),
    ]
    (batch,) = run(folder, records, per=4)
    colours = {31: ["red"], 32: ["green", "blue"], 33: [], 34: []}
    expected = []
    for row, slots in zip(batch.inputs["labels"].tolist(), batch.inputs["im_mask"], strict=True):
        answer = next(label for label in row if label in colours)
        assert slots.sum() == 4 * len(colours[answer])
        expected += colours[answer]
    pixels = batch.inputs["pixel_values"]
    assert pixels.shape == (3, 3, 2, 2)
    assert [(pixels[i, :, 0, 0] * 255).int().tolist() for i in range(3)] == [
        list(COLOURS[c]) for c in expected
    ]
    assert (batch.num_samples, batch.num_supervised) == (4, 12)


def test_images_of_unequal_size_stay_a_list(folder):
    records = [record("<ImageHere>", "31", images=[f"{name}.png"]) for name in COLOURS]
    (batch,) = run(folder, records, processor=SizedProcessor(), per=3)
    pixels = batch.inputs["pixel_values"]
    assert sorted(tuple(image.shape) for image in pixels) == [(3, 3, 2), (3, 3, 3), (3, 3, 4)]
    assert batch.inputs["im_mask"].sum().item() == sum(image.shape[1] * image.shape[2] for image in pixels)


def test_every_rank_runs_vision_if_any_sample_of_the_run_has_an_image(folder):
    records = [record("<ImageHere>", "31", images=["red.png"]), *[record("5", "32")] * 3]
    with_images = 0
    for rank in range(4):
        (batch,) = run(folder, records, num_ranks=4, rank=rank, per=1)
        assert batch.inputs["pixel_values"].shape == (1, 3, 2, 2)
        with_images += int(batch.inputs["im_mask"].any())
    assert with_images == 1
    (batch,) = run(folder, records[1:], per=3)
    assert "pixel_values" not in batch.inputs


def test_a_rank_without_a_sample_gets_a_dummy(folder):
    batches = [run(folder, [record("5", "31")], num_ranks=3, rank=rank)[0] for rank in range(3)]
    assert [batch.num_samples for batch in batches] == [1, 0, 0]
    assert batches[2].inputs["input_ids"].tolist() == [[EOS, EOS]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_the_run_with_its_place(folder, workers):
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:45])
    records = [record("5", "31"), record("<ImageHere>", "32", images=["broken.png"], record_id="cat-7")]
    with pytest.raises(DataError) as caught:
        run(folder, records, workers=workers)
    message = str(caught.value)
    assert all(part in message for part in ("a.json: record 1", "'cat-7'", "broken.png")), message
    assert "\n" not in message
    assert "Traceback" not in message


def test_bad_samples_can_be_skipped_and_are_counted(folder, caplog):
    records = [
        record("5", "31"),
        record("<ImageHere>", "32", images=["absent.png"], record_id="cat-7"),
        {"id": "no-turns"},
        record("5", "34"),
    ]
    with caplog.at_level(logging.WARNING):
        batches = run(folder, records, on_bad_sample="skip")
    assert sum(batch.num_samples for batch in batches) == 2
    skipped = sorted(why for batch in batches for _, why in batch.skipped)
    assert ["record 1 (id 'cat-7')" in skipped[0], "record 2 (id 'no-turns')" in skipped[1]] == [True, True]
    assert caplog.text.count("left out") == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_changes_ends_the_run_also_where_bad_samples_are_skipped(folder, workers):
    records = [record("5", f"3{index}") for index in range(40)]
    with pytest.raises(DataError) as caught:
        run(
            folder,
            records,
            workers=workers,
            on_bad_sample="skip",
            meanwhile=lambda: os.truncate(folder / "a.json", 100),
        )
    assert str(caught.value) == f"{folder / 'a.json'}: the file has changed while it was in use; start again"


def test_a_sample_whose_answer_is_cut_off_is_named_and_left_out(folder, caplog):
    records = [record("5 " * 50, "31", record_id="long"), record("5", "32")]
    with caplog.at_level(logging.WARNING):
        batches = run(folder, records, max_length=30, per=1)
    assert [batch.num_samples for batch in sorted(batches, key=lambda batch: batch.num_samples)] == [0, 1]
    assert "a.json: record 0 (id 'long') keeps no answer token within max_length=30" in caplog.text
    (left_out,) = [what for batch in batches for what in batch.unsupervised]
    assert left_out[0] == 0


def test_images_behind_the_cut_are_not_decoded(folder):
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:45])
    records = [record("5", "31", "<ImageHere>", "32", images=["broken.png"])]
    (batch,) = run(folder, records, max_length=20, processor=SquareProcessor(slots=10))
    assert batch.inputs["pixel_values"].shape == (1, 3, 2, 2), "the dummy"
    assert not batch.inputs["im_mask"].any()
    assert batch.num_supervised == 2


def test_a_micro_batch_moves_as_one(folder):
    (batch,) = run(folder, [record("<ImageHere>", "31", images=["red.png"])])
    moved = batch.to("meta")
    assert moved.inputs["pixel_values"].device.type == moved.source_of_target.device.type == "meta"
    assert moved.inputs["position_ids"] is None
    assert moved.sample_ids == batch.sample_ids
    assert isinstance(batch.inputs["pixel_values"], torch.Tensor)


def test_a_process_ends_though_something_still_holds_its_workers(folder):
    held = []

    def fail() -> None:
        try:
            run(folder, [record("<ImageHere>", "31", images=["absent.png"])], workers=2)
        except DataError as error:
            held.append(error)  # its traceback has the iterator

    process = multiprocessing.get_context("fork").Process(target=fail)
    process.start()
    process.join(30)
    ended = not process.is_alive()
    process.kill()
    assert ended
    assert process.exitcode == 0


def test_a_worker_shows_its_errors_but_not_that_its_rank_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(data.loader, "_end_with_parent", lambda: None)  # it would win the race, mostly
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"

    def show(message: str) -> None:
        try:
            raise ConnectionResetError(message)
        except ConnectionResetError:
            sys.excepthook(*sys.exc_info())

    def work() -> None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        data.loader.start_worker(0)
        show("of another")
        print("ready", file=sys.stderr)
        show("of the rank, killed meanwhile")
        print("done", file=sys.stderr)

    def rank() -> None:
        context.Process(target=work).start()
        while not log.exists() or "ready" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    context.Process(target=rank).start()
    until = time.monotonic() + 30
    while not log.exists() or "done" not in log.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert "ConnectionResetError: of another" in log.read_text()
    assert "of the rank" not in log.read_text()
