"""What a run tells while it goes: lines in a log file, curves by source."""

import re
from types import SimpleNamespace
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny import flags, read_metrics, tiny_world, torchrun
from trainer.distributed import finish, start
from trainer.metrics import Window


def test_the_host_waits_for_the_device_once_in_a_step_and_its_line(monkeypatch):
    start()
    sources: list[Any] = [SimpleNamespace(name="pets")]
    window, waits = Window(sources, torch.device("cpu"), {}), []
    for name in ("item", "cpu", "__bool__", "__float__"):
        wait = getattr(torch.Tensor, name)
        recorded = lambda tensor, name=name, wait=wait: waits.append(name) or wait(tensor)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, recorded)
    window.close_step(torch.zeros(6, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64))
    line = window.flush()
    monkeypatch.undo()
    finish()
    assert (line["grad_norm"], line["memory_peak_bytes"] > 0) == (2.0, True)
    # The other reads what the first has brought to the host: whether all losses are finite.
    assert waits == ["cpu", "__bool__"]


def test_a_log_file_gets_a_line_a_step_and_tensorboard_the_losses_by_source(tmp_path):
    options = {"max_steps": 3, "per_device_train_batch_size": 12, "report_to": "tensorboard"}
    result = torchrun(1, flags(tiny_world(tmp_path), "out", **options))
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^step (\d) of 3: loss \d", result.stderr, re.MULTILINE) == ["1", "2", "3"]
    assert result.stderr.index("loading PyTorch") < result.stderr.index("step 1 of 3"), (
        "no silence at the start"
    )
    assert "\r" not in result.stderr, "a bar that redraws itself fills a log file"
    lines = read_metrics(tmp_path / "out")
    board = EventAccumulator(str(tmp_path / "out/tensorboard"))
    board.Reload()
    for source in ("colour", "both", "text"):
        events = {event.step: event.value for event in board.Scalars(f"train/loss_by_source/{source}")}
        written = {
            line["step"]: line["loss_by_source"][source] for line in lines if source in line["loss_by_source"]
        }
        assert events.keys() == written.keys()
        assert all(abs(events[step] - loss) < 1e-5 for step, loss in written.items())
    assert {event.step for event in board.Scalars("train/loss")} == {1, 2, 3}
