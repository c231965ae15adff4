"""`python -m data.check`: what it finds before training, and how it says so."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from data import check as check_module
from data.check import CheckConfig, main
from data.packing import CostModel
from data.preview import PreviewConfig
from tests.data_fixtures import record, write_json
from tests.tiny import tiny_data, tiny_model
from trainer.config import Config
from trainer.models import cost_sizes, load_config


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model")


def run(data, model, *flags):
    status = main([str(data), "--model_name_or_path", str(model), "--num_workers", "0", *flags])
    return status, json.loads(data.with_name(data.name + ".check.json").read_text(encoding="utf-8"))


def test_good_data(tmp_path, model, capsys):
    status, report = run(tiny_data(tmp_path), model, "--max_length", "256", "--num_ranks", "2")
    assert status == 0
    assert report["errors"] == []
    assert [source["source"] for source in report["sources"]] == ["colour", "both", "text"]
    colour = report["sources"][0]
    assert (colour["records"], colour["samples_per_epoch"], colour["images"]) == (12, 12, 12)
    assert sum(count for _, count in colour["histogram"]) == 12
    assert report["epoch"]["samples"] == 30
    assert report["epoch"]["steps"] == 15
    assert report["epoch"]["packed"]["padding_share"] == 0
    shown = capsys.readouterr().out
    assert "colour" in shown
    assert "30 samples in 15 steps of 2" in shown


def test_a_packed_row_has_room_for_as_many_tokens_as_a_padded_micro_batch(tmp_path, model):
    def packed(samples, accumulation):
        flags = f"--max_length 60 --per_device_train_batch_size {samples} "
        flags += f"--gradient_accumulation_steps {accumulation}"
        epoch = run(tiny_data(tmp_path), model, *flags.split())[1]["epoch"]
        return epoch["tokens"], epoch["packed"]["rows_per_step_and_rank"]

    tokens, rows = packed(6, 1)
    assert rows == 1
    same_tokens, shorter_rows = packed(1, 6)
    assert same_tokens == tokens
    assert 2 < shorter_rows < 6


def test_every_problem_is_named(tmp_path, model, capsys):
    tiny_data(tmp_path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    noise.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    records = [
        record("w1", "w2", record_id="good"),
        record("<ImageHere>w1", "w2", images=["cut.png"], record_id="cut"),
        record("<ImageHere>w1", "w2", images=["absent.png"], record_id="absent"),
        {"id": "shapeless"},
        record("w1", "  ", record_id="empty"),
        record("w1", "w2", record_id="again"),
        record("w1 " * 300, "w2", record_id="long"),
    ]
    write_json(tmp_path / "bad.json", records)
    (tmp_path / "data.txt").write_text("colour.json\nbad.json\n")
    status, report = run(tmp_path / "data.txt", model, "--max_length", "256")
    assert status == 2
    for what, parts in zip(
        report["errors"],
        [
            ("record 1 (id 'cut')", "cut.png cannot be decoded"),
            ("record 2 (id 'absent')", "absent.png does not exist"),
            ("record 3 (id 'shapeless')", "'conversations'"),
        ],
        strict=True,
    ):
        assert all(part in what for part in ("bad.json", *parts)), what
    warnings = report["warnings"]
    assert len(warnings["no answer left"]) == len(warnings["empty answer"]) == 1
    assert "record 6 (id 'long')" in warnings["no answer left"][0]
    assert "record 4 (id 'empty')" in warnings["empty answer"][0]
    (again,) = [what for what in warnings["duplicate"] if "bad.json" in what]
    assert again.endswith("bad.json: records 0 and 5 are the same")
    shown = capsys.readouterr().out
    assert all(what in shown for what in report["errors"])


def test_warnings_alone_are_no_failure(tmp_path, model):
    data = write_json(tmp_path / "a.json", [record("w1", "w2")] * 2)
    status, report = run(data, model)
    assert (status, len(report["warnings"]["duplicate"])) == (0, 1)


def test_duplicates_are_grouped_also_across_files(tmp_path, model):
    write_json(
        tmp_path / "a.json", [record(f"w{(3, 1, 2, 1, 4, 1)[i]}", "w2", record_id=str(i)) for i in range(6)]
    )
    other_form = {"messages": [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w2"}]}
    write_json(tmp_path / "b.json", [record("w5", "w2"), other_form, record("w5", "w2")])
    (tmp_path / "data.txt").write_text("a.json\nb.json\na.json\n")
    _, report = run(tmp_path / "data.txt", model)
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert report["warnings"]["duplicate"] == [
        f"{a}: records 1, 3 and 5 are the same",
        f"{a}: record 2, {b}: record 1 are the same",
        f"{b}: records 0 and 2 are the same",
    ]
    _, report = run(write_json(tmp_path / "c.json", [record("w1", "w2")] * 500), model)
    (group,) = report["warnings"]["duplicate"]
    assert "records 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 490 more are the same" in group


def test_truncation_is_reported_with_lengths_before_the_cut(tmp_path, model, capsys):
    records = [record("w1", " ".join(["w1"] * words), record_id=f"r{words}") for words in (1, 50, 120, 250)]
    data = write_json(tmp_path / "a.json", records)
    _, whole = run(data, model, "--max_length", "1000")
    status, report = run(data, model, "--max_length", "200")
    assert status == 0
    (source,) = report["sources"]
    assert (source["over_max_length"], source["over_max_length_share"]) == (2, 0.5)
    assert source["tokens"] == whole["sources"][0]["tokens"]
    assert source["histogram"] == whole["sources"][0]["histogram"]
    longest = source["tokens"]["longest"]
    assert longest > 500
    (first, second) = report["warnings"]["tail cut off"]
    assert "record 2 (id 'r120') is cut at max_length: 200 of " in first
    assert f"record 3 (id 'r250') is cut at max_length: 200 of {longest} tokens" in second
    assert report["epoch"]["tokens"] < whole["epoch"]["tokens"], "what is trained is what is left"
    assert "2 (50%)" in capsys.readouterr().out
    _, skipped = run(data, model, "--max_length", "200", "--on_long_sample", "skip")
    assert skipped["warnings"]["tail cut off"] == []
    assert len(skipped["warnings"]["no answer left"]) == skipped["sources"][0]["over_max_length"] == 2


def test_a_missing_picture_behind_the_cut_is_named_and_the_cut_too(tmp_path, model):
    records = [record("w1 " * 100, "w2", "<ImageHere>", "w2", images=["absent.png"])]
    status, report = run(write_json(tmp_path / "a.json", records), model, "--max_length", "100")
    assert (status, len(report["errors"]), len(report["warnings"]["tail cut off"])) == (2, 1, 1)


def test_what_may_not_be_meant_is_a_warning(tmp_path, model):
    records = [record(f"w{i}", "w2") | {"sorce": "x"} for i in range(1200)]
    records[7] |= {"imgae": "a.png"}
    records[8] = record("what is <image> in <video>", "w2", record_id="tag")
    records[9] = record("w9", "w2", "and then?", record_id="open") | {"sorce": "x"}
    data = write_json(tmp_path / "a.json", records)
    (tmp_path / "one.json").write_text(json.dumps([record("w1", "w3")]))
    (tmp_path / "data.txt").write_text("a.json\none.json 1\na.json 12\n")
    status, report = run(tmp_path / "data.txt", model)
    warnings = report["warnings"]
    assert status == 0
    assert warnings["unknown keys"] == [
        f"{data}: has the unknown keys 'sorce' in 1,199 records and 'imgae' in 1 record"
    ]
    assert (
        f"{data}: record 8 (id 'tag') has <image> and <video> as text" in warnings["placeholders as text"][0]
    )
    (unanswered, _) = warnings["no answer to the last turn"]  # data.txt lists the file twice
    assert unanswered == f"{data}: record 9 (id 'open') ends with a turn that no answer follows"
    (often,) = warnings["repeated often"]
    assert f"{tmp_path / 'one.json'}: 1,000 samples an epoch of 1 record, each about 1,000 times" in often


def picture(path, mode, colour, alpha=None, orientation=None):
    image = Image.new(mode, (8, 6), colour)
    if alpha is not None:
        image.putalpha(Image.fromarray(np.array(alpha, dtype=np.uint8).reshape(6, 8)))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif)


def test_pictures_that_the_model_sees_otherwise_than_a_person_are_counted(tmp_path, model):
    half = [0] * 24 + [255] * 24
    picture(tmp_path / "opaque.png", "RGB", "red", alpha=[255] * 48)
    picture(tmp_path / "white.png", "RGB", "white", alpha=half)
    picture(tmp_path / "hidden.png", "RGB", "black", alpha=half)
    picture(tmp_path / "faint.png", "L", 10, alpha=[200] * 48)
    picture(tmp_path / "upright.jpg", "RGB", "red", orientation=1)
    picture(tmp_path / "turned.jpg", "RGB", "red", orientation=6)
    Image.new("P", (8, 6)).save(tmp_path / "palette.png", transparency=0)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    records = [
        record("<ImageHere>", f"w{i}", images=[name], record_id=name) for i, name in enumerate(names * 2)
    ]
    data = write_json(tmp_path / "a.json", records)
    status, report = run(data, model)
    assert status == 0
    hidden, turned = report["warnings"]["images not as a person sees them"]
    assert hidden.startswith("pictures with colours under their transparency, which the model would see: 3 ")
    assert turned.startswith("pictures that EXIF data turns for a person but not for the model: 1 ")
    assert all("--images_as_viewed True" in what for what in (hidden, turned))
    assert all(f"{name!r} of {data}: record" in hidden for name in ("hidden.png", "faint.png", "palette.png"))
    assert "'turned.jpg'" in turned
    _, report = run(data, model, "--images_as_viewed", "True")
    assert report["warnings"]["images not as a person sees them"] == []


def test_a_report_that_cannot_be_written_is_printed_and_keeps_its_status(tmp_path, model, capsys):
    good = write_json(tmp_path / "a.json", [record("w1", "w2")])
    bad = write_json(tmp_path / "b.json", [record("w1", "w2"), {"id": "x"}])
    for data, status in ((good, 0), (bad, 2)):
        arguments = [str(data), "--model_name_or_path", str(model), "--num_workers", "0"]
        assert main([*arguments, "--out", str(tmp_path / "nowhere" / "report.json")]) == status
        shown = capsys.readouterr().out
        assert "an epoch: " in shown
        assert "warning: " in shown
        assert "cannot be written" in shown


def test_a_pipe_in_place_of_a_file_is_a_sentence(tmp_path, model):
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "data.txt").write_text("a.json 1\n")
    status, report = run(tmp_path / "data.txt", model)
    assert status == 2
    assert "a.json: is a pipe, not a file" in report["errors"][0]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_changes_ends_the_check_with_one_sentence(tmp_path, model, monkeypatch, workers):
    data = write_json(tmp_path / "a.json", [record(f"w{i % 200}", "w2") for i in range(1000)])

    def shorten_then_check(reader, *arguments):
        os.truncate(data, 1000)
        return check(reader, *arguments)

    check = check_module.check
    monkeypatch.setattr(check_module, "check", shorten_then_check)
    status, report = run(data, model, "--num_workers", workers)
    assert status == 2
    assert report["errors"] == [f"{data}: the file has changed while it was in use; start again"]


def test_files_that_cannot_be_read_are_reported(tmp_path, model, capsys):
    (tmp_path / "data.txt").write_text("nowhere.json 1\n")
    status, report = run(tmp_path / "data.txt", model)
    assert status == 2
    assert "nowhere.json" in report["errors"][0]
    assert main([str(tmp_path / "data.txt"), "--model_name_or_path", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "config.json" in said
    assert "nowhere.json" in said


def test_long_lists_are_cut_on_the_terminal(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr(check_module, "MAX_SHOWN", 3)
    status, report = run(write_json(tmp_path / "a.json", [7] * 10), model)
    assert (status, len(report["errors"])) == (2, 10)
    assert "… and 7 more" in capsys.readouterr().out


def test_the_command_uses_all_cores(tmp_path, model, capsys):
    data = tiny_data(tmp_path, samples=600)
    assert main([str(data), "--model_name_or_path", str(model)]) == 0
    assert "the whole report is in" in capsys.readouterr().out


def test_the_check_plans_the_order_and_the_rows_that_training_does(tmp_path, model):
    """The same seed, and the cost of samples of this model."""
    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    for command in (CheckConfig, PreviewConfig):
        for field in dataclasses.fields(command):
            if field.name in fields:
                assert field.default == fields[field.name], field.name
    wide = CostModel.from_sizes(**cost_sizes(load_config(model)), trains_vision=True)
    frozen = CostModel.from_sizes(**cost_sizes(load_config(model)), trains_vision=False)
    assert wide.image_slot == 3 * frozen.image_slot != 3 * CostModel().image_slot
    data = tiny_data(tmp_path / "data")
    shares = [
        run(data, model, "--num_ranks", "2", "--per_device_train_batch_size", "3", "--fix_vit", flag)[1]
        for flag in ("True", "False")
    ]
    assert shares[0]["epoch"]["packed"] != shares[1]["epoch"]["packed"]


def test_flags_of_the_check_that_cannot_be_used_are_reported_together(capsys, tmp_path):
    assert main([str(tmp_path / "no.txt"), "--max_lenght", "3", "--model_name_or_path", "nowhere"]) == 2
    said = capsys.readouterr().err
    for problem in ("--max_lenght is unknown; did you mean --max_length?", "no.txt", "nowhere"):
        assert problem in said
