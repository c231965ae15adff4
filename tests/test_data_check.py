"""`python -m data.check`: what it finds before training, and how it says so."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data import check as check_module
from data.check import main
from tests.data_fixtures import record, write_json
from tests.tiny import ROOT, tiny_data, tiny_model


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
    assert "record 5 (id 'again') is the same as" in again
    assert "record 0 (id 'good')" in again
    shown = capsys.readouterr().out
    assert all(what in shown for what in report["errors"])


def test_warnings_alone_are_no_failure(tmp_path, model):
    data = write_json(tmp_path / "a.json", [record("w1", "w2")] * 2)
    status, report = run(data, model)
    assert (status, len(report["warnings"]["duplicate"])) == (0, 1)


def test_files_that_cannot_be_read_are_reported(tmp_path, model, capsys):
    (tmp_path / "data.txt").write_text("nowhere.json 1\n")
    status, report = run(tmp_path / "data.txt", model)
    assert status == 2
    assert "nowhere.json" in report["errors"][0]
    assert main([str(tmp_path / "data.txt"), "--model_name_or_path", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().out


def test_long_lists_are_cut_on_the_terminal(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr(check_module, "MAX_SHOWN", 3)
    status, report = run(write_json(tmp_path / "a.json", [7] * 10), model)
    assert (status, len(report["errors"])) == (2, 10)
    assert "… and 7 more" in capsys.readouterr().out


def test_the_command_uses_all_cores(tmp_path, model):
    data = tiny_data(tmp_path, samples=600)
    command = [sys.executable, "-m", "data.check", str(data), "--model_name_or_path", str(model)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert "the whole report is in" in result.stdout
