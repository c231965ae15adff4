"""Trackers: every number under its path, one run across restarts, and no tracker that holds training up."""

import json
import os
import sqlite3
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny import run_ranks
from trainer import trackers
from trainer.metrics import MetricsFile
from trainer.rehearsal import prepare_output_dir
from trainer.resume import Start
from trainer.trackers import ID_FILE, Trackers, flatten

EVALUATION = {"loss": 0.7, "metrics": {"doc": {"anls": 0.8}, "pets": {"choice": 0.5}}, "note": "not a number"}


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}: pip install -e '.[{name}]'")


def report(name, folder, steps, **environment):
    """A run, or one that goes on, and its lines of two steps."""
    os.environ.update(environment)
    with Trackers([name], folder, {"seed": 42, "train_modules": ("a", "b")}) as board:
        metrics = MetricsFile(folder, board)
        for step in steps:
            metrics.write("train", step, loss=1.0 / step, grad_norm=float("nan"))
            metrics.write("eval", step, **EVALUATION)


def test_numbers_are_found_at_any_depth_and_nothing_else():
    values = {"loss": 1, "by": {"a": 0.5, "b": {"c": {"d": 2.0}}}, "none": None, "text": "x", "list": [1]}
    assert flatten(values, "eval") == [("eval/loss", 1), ("eval/by/a", 0.5), ("eval/by/b/c/d", 2.0)]


def test_a_resumed_run_adds_to_the_curves_of_tensorboard(tmp_path):
    for steps in ((1, 2), (2, 3)):
        report("tensorboard", tmp_path, steps)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("eval/metrics/doc/anls")] == [1, 2, 2, 3]
    assert board.Scalars("eval/metrics/pets/choice")[0].value == 0.5
    assert board.Scalars("train/loss")[-1].value == pytest.approx(1 / 3)
    assert "train/grad_norm" not in board.Tags()["scalars"]


@pytest.mark.slow
@needs("wandb")
def test_a_resumed_run_has_the_same_id_in_wandb(tmp_path):
    (tmp_path / "pets").mkdir()
    for steps in ((1, 2), (2, 3)):
        (said,) = run_ranks(1, lambda: report("wandb", tmp_path / "pets", steps, WANDB_MODE="offline"))  # noqa: B023
        assert "wandb: offline, in " in said
        assert "warning" not in said
    run_id = (tmp_path / "pets" / ID_FILE).read_text()
    files = sorted((tmp_path / "pets" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files
    for content in (file.read_bytes() for file in files):
        for word in (b"eval/metrics/doc/anls", b"train/loss", b"xcomposer-fsdp", b"pets", b"seed"):
            assert word in content


@needs("wandb")
def test_wandb_without_a_login_is_a_warning_and_asks_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    environment = {"WANDB_MODE": "online", "WANDB_CONFIG_DIR": str(tmp_path), "NETRC": str(tmp_path / "no")}
    (said,) = run_ranks(1, lambda: report("wandb", tmp_path, (1, 2), **environment))
    assert said.count("warning: --report_to wandb: No API key configured") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@needs("trackio")
def test_a_resumed_run_continues_in_trackio(tmp_path):
    (tmp_path / "pets").mkdir()
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_PROJECT": "tests"}
    for steps in ((1, 2), (2, 3)):
        run_ranks(1, lambda: report("trackio", tmp_path / "pets", steps, **environment))  # noqa: B023
    database = sqlite3.connect(tmp_path / "trackio" / "tests.db")
    rows = database.execute("select run_name, run_id, step, metrics from metrics")
    rows = [(name, run, step, json.loads(numbers)) for name, run, step, numbers in rows]
    assert {name for name, *_ in rows} == {f"pets-{(tmp_path / 'pets' / ID_FILE).read_text()}"}
    assert len({run for _, run, *_ in rows}) == 1
    anls = [(step, numbers["eval/metrics/doc/anls"]) for *_, step, numbers in rows if "eval/loss" in numbers]
    assert anls == [(1, 0.8), (2, 0.8), (2, 0.8), (3, 0.8)]


# --- trackers that fail ---------------------------------------------------------------------------------


class Recorded:
    """A tracker that keeps what it gets, and fails or hangs where it is told to."""

    def __init__(self, fails_at=None, hangs_at=None):
        self.lines, self.finished = [], False
        self.fails_at, self.hangs_at, self.released = fails_at, hangs_at, threading.Event()

    def __call__(self, folder: Path, run_id: str, config):
        self.stumble("start")
        return self.write, self.finish

    def stumble(self, where):
        if where == self.fails_at:
            raise RuntimeError("no\nnetwork.")
        if where == self.hangs_at:
            self.released.wait(20)

    def write(self, numbers, step):
        self.stumble(step)
        self.lines.append((step, numbers))

    def finish(self):
        self.stumble("finish")
        self.finished = True


@pytest.mark.parametrize("where", ["start", 1, 2, "finish"])
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(tmp_path, monkeypatch, capsys, where):
    bad, good = Recorded(fails_at=where), Recorded()
    monkeypatch.setattr(trackers, "TRACKERS", {"bad": bad, "good": good})
    with Trackers(["bad", "good"], tmp_path, {}) as board:
        for step in (1, 2, 3):
            board.log("train", step, {"loss": step})
    assert capsys.readouterr().err.count("warning") == 1
    assert good.finished
    assert good.lines == [(step, {"train/loss": step}) for step in (1, 2, 3)]
    assert len(bad.lines) == {"start": 0, 1: 0, 2: 1, "finish": 3}[where]


def test_the_warning_names_the_tracker_and_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "TRACKERS", {"bad": Recorded(fails_at="start")})
    report("bad", tmp_path, (1, 2))
    assert (
        capsys.readouterr().err == "\nwarning: --report_to bad: no network; training continues without it\n"
    )


@pytest.mark.parametrize("where", ["start", 1, "finish"])
def test_a_tracker_that_hangs_holds_up_no_step_and_the_end_only_for_a_while(
    tmp_path, monkeypatch, capsys, where
):
    slow = Recorded(hangs_at=where)
    monkeypatch.setattr(trackers, "TRACKERS", {"slow": slow})
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "MAX_WAITING", 100)
    begun = time.monotonic()
    with Trackers(["slow"], tmp_path, {}) as board:
        for step in range(1, 200):
            board.log("train", step, {"loss": step})
            if where == "finish":
                time.sleep(0.001)
    assert time.monotonic() - begun < 5
    said = capsys.readouterr().err
    assert said.count("slow is given up 0.5 s after the end of training") == 1
    assert said.count("slow hangs: it gets no more lines") == (where != "finish")
    slow.released.set()


def test_a_folder_without_room_for_the_id_is_a_warning(tmp_path, capsys):
    with Trackers(["tensorboard"], tmp_path / "gone", {}) as board:
        board.log("train", 1, {"loss": 1.0})
        board.log("train", 2, {"loss": 1.0})
    assert capsys.readouterr().err.count("training continues without trackers") == 1


def test_no_tracker_and_other_ranks_start_nothing(tmp_path):
    with Trackers(["none"], tmp_path, {}) as board:
        board.log("train", 1, {"loss": 1.0})
    with Trackers(["tensorboard"], tmp_path, {}) as board:
        MetricsFile(None, board).write("train", 1, loss=1.0)
    assert not list(tmp_path.iterdir())


def test_a_run_from_scratch_gets_a_new_id_and_a_resumed_one_keeps_it(tmp_path):
    (tmp_path / ID_FILE).write_text("0123abcd")
    (tmp_path / "checkpoint-2").mkdir()
    run = {"ranks": 1, "launchers": [], "device": "cpu", "device_name": "cpu", "versions": {}}
    assert prepare_output_dir(tmp_path, run, Start(2, tmp_path / "checkpoint-2"), 0) == []
    assert (tmp_path / ID_FILE).read_text() == "0123abcd"
    assert prepare_output_dir(tmp_path, run, Start(), 0) == []
    assert not (tmp_path / ID_FILE).exists()
