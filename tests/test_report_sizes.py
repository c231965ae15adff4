"""report.html of runs whose files are made up: long ones, many large pictures, a forecast beside the peak."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import Browser
from tests.test_report import MARKS, MEGABYTE
from trainer.report import report, write_report
from trainer.report.answers import MOST_QUESTIONS, read_questions
from trainer.report.curves import thin
from trainer.report.run import read_run
from trainer.report.tables import facts


def made_up_metrics(folder: Path, lines: int) -> None:
    """A long run with one spike of the loss and one skipped step."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    noise = chance.normal(scale=0.1, size=(lines, 3))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            loss = 0.5 + 2 * 0.9 ** (20 * step / lines) + noise[step - 1, 0]
            loss = 77.0 if step == lines // 2 + 3 else loss
            line = {"kind": "train", "step": step, "epoch": step / 5000, "learning_rate": 1e-5, "loss": loss}
            line |= {"planned_idle_share": 0.01, "grad_norm": 1 + noise[step - 1, 1], "samples": 128}
            line |= {"tokens": 50_000, "supervised_tokens": 9000, "left_out_samples": 0}
            line |= {"skipped_steps": int(step == 777), "tokens_per_second": 5e4, "seconds_step": 1.0}
            line |= {"supervised_tokens_per_second": 9e3, "samples_per_second": 128.0, "seconds_saving": 0.0}
            line |= {"seconds_data_wait": 0.02, "memory_peak_bytes": 60_000_000_000}
            line["loss_by_source"] = {f"source {i}": loss + noise[step - 1, 2] + i for i in range(4)}
            file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("cuda", "55.88 GiB; forecast 53.09 GiB, -5.0%"),
        ("cpu", "55.88 GiB with the program; tensors 53.09 GiB (forecast)"),
    ],
)
def test_the_forecast_of_the_start_stands_beside_the_measured_peak(tmp_path, device, told):
    run = tmp_path / "run"
    made_up_metrics(run, 10)
    (run / "run.json").write_text(json.dumps({"ranks": 2, "device": device}))
    found = {"ranks": 2, "peak_bytes": 57_000_000_000, "sent_within_bytes": 3e9, "sent_between_bytes": 1e9}
    (run / "forecast.json").write_text(json.dumps(found))
    values = dict(facts(read_run(run)))
    assert values["Peak memory of a rank"] == told
    assert values["Sent by a rank in a step"] == "4.000 GB (forecast), 1.000 GB of them to other machines"
    (run / "forecast.json").write_text(json.dumps(found | {"ranks": 4}))  # of an earlier start
    assert dict(facts(read_run(run)))["Peak memory of a rank"] == "55.88 GiB"


@pytest.mark.parametrize("lines", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_run_of_many_lines_keeps_its_spike_in_a_page_that_is_small(tmp_path, lines):
    run, page = tmp_path / "run", tmp_path / "run" / "report.html"
    made_up_metrics(run, lines)
    write_report([run], page)
    assert page.stat().st_size < 5 * MEGABYTE
    found = read_run(run)
    points = thin(found.logged("loss"), 1000)
    assert len(points["step"]) == 1000
    (spike,) = np.flatnonzero(points["high"] > 10)
    assert points["high"][spike] == 77
    assert points["first"][spike] <= lines // 2 + 3 <= points["last"][spike]
    assert points["low"].min() == np.float32(found.train["loss"].min())
    with Browser(page) as browser:
        assert f"at step {lines:,}" in browser.text("#results")
        assert re.search(r"Skipped steps\s+1\b", browser.text("#results"))
        assert browser.evaluate(MARKS) == [[777]], "the skipped step"
        assert (browser.errors, browser.requests) == ([], [])


def milliseconds_to_open(page: Path) -> float:
    """Until everything is drawn."""
    with Browser(page) as browser:
        return browser.evaluate("performance.now()")


@pytest.mark.slow
def test_a_run_of_many_lines_opens_about_as_fast_as_one_of_few(tmp_path):
    pages = []
    for lines in (2_000, 100_000):
        made_up_metrics(tmp_path / str(lines), lines)
        pages.append(tmp_path / f"{lines}.html")
        write_report([tmp_path / str(lines)], pages[-1])
    took = [[milliseconds_to_open(page) for page in pages] for _ in range(3)]  # in turn
    few, many = np.median(took, axis=0)
    assert many < 2 * few


def test_many_questions_with_large_pictures_still_fit(tmp_path):
    rows, folder = [], tmp_path / "run"
    (folder / "eval").mkdir(parents=True)
    for record in range(300):
        if record < 200:
            noise = np.random.default_rng(record).integers(0, 255, (300, 300, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{record}.png", compress_level=0)
        row = {
            "source": f"s{record % 3}",
            "record": record,
            "question": "x" * 10_000,
            "prediction": "y" * 10_000,
        }
        rows.append(row | {"images": [str(folder / f"{record}.png")], "scores": {"anls": record % 2}})
    (folder / "eval" / "step-0.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = report([folder])
    assert len(page) < 5 * MEGABYTE
    questions = read_questions([read_run(folder)])
    assert (len(questions.shown), questions.total) == (MOST_QUESTIONS, 300)
    assert {question.state for question in questions.shown} == {"right", "wrong"}
    assert "left out, as the page would become too large" in page
