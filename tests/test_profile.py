"""Traces of some steps: named ranges, a table of them, and not a number changed."""

import gzip
import json
import re
import time

import pytest

from data.flags import ConfigError
from tests.tiny import flags, read_metrics, run_ranks, tiny_world
from trainer.checkpoint import Checkpoints
from trainer.config import parse
from trainer.extras.profile import RANGES
from trainer.main import main

SLEEP = 0.3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny_world(tmp_path_factory.mktemp("profile"))
    train(folder, "plain")
    return folder


def train(folder, name, *more, run=main):
    options = {
        "max_length": 128,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "rehearse": False,
    }
    options |= {"fix_vit": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return run_ranks(2, run, flags(folder, name, *more, **options))[0]


def test_every_rank_leaves_a_trace_with_named_ranges_and_a_table_that_adds_up(world):
    output = train(world, "traced", "--profile", "2:3")
    for rank in range(2):
        with gzip.open(world / "traced" / "profile" / f"rank{rank}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        for name in map(str.strip, RANGES):
            assert any(event.get("name") == name for event in events), name
        assert sum(event.get("name") == "optimizer" for event in events) == 2
    table = (world / "traced" / "profile" / "table.txt").read_text()
    assert table.strip() in output
    rows = {
        name: (float(seconds), int(calls))
        for name, seconds, calls in re.findall(r"(\w+) +([\d.]+) +(\d+)", table)
    }
    assert rows.keys() == {name.strip() for name in RANGES}
    assert rows["optimizer"][1] == 2
    assert rows["forward"][1] == rows["backward"][1] >= 2
    assert rows["forward"][0] > rows["vision"][0] + rows["loss"][0]
    for a, b in zip(read_metrics(world / "plain"), read_metrics(world / "traced"), strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    assert not (world / "plain" / "profile").exists()


def test_the_wait_for_data_and_the_time_of_saves_are_always_told(world):
    def run_with_a_slow_save(arguments):
        save = Checkpoints.save

        def slow_save(self, *given, **options):
            time.sleep(SLEEP)
            return save(self, *given, **options)

        Checkpoints.save = slow_save
        return main(arguments)

    train(world, "slow", run=run_with_a_slow_save)
    lines = read_metrics(world / "slow")
    assert lines[3]["seconds_saving"] >= SLEEP, "of the save after step 3, whose line was written before"
    assert lines[1]["seconds_saving"] == 0
    assert all(0 < line["seconds_data_wait"] < line["seconds_step"] for line in lines)
    assert all(line["memory_peak_bytes"] > 0 for line in lines)


@pytest.mark.parametrize("steps", ["5", "3:2", "0:4", "a:b"])
def test_steps_that_cannot_be_traced_are_a_sentence(steps):
    with pytest.raises(ConfigError, match=f"--profile {steps}"):
        parse(["--profile", steps])
