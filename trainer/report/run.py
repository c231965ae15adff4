"""The files of a run's folder → a `Run` for the report, whatever state a killed run left them in.

Input: an output_dir with run.json, metrics.jsonl, eval/step-<step>.jsonl and what else is there. Output:

    run = read_run(Path("output/pets"))
    run.train["loss"]                 # float64, a value per logged step, NaN where the line has none
    run.train["step"]                 # the same number of values, ascending
    run.loss_by_source["ocr"]         # float64 [2, n]: steps and losses
    run.evaluations[0]["loss"]        # the lines of kind "eval", by step

Nothing raises for a file that is missing, damaged or of an earlier version: what can be read is returned, and
lines that cannot be read are counted.
"""

import json
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.atomic import MARKER, numbered
from trainer.report.values import as_dict, dicts, number, number_at

COLUMNS = (
    *("step", "epoch", "loss", "learning_rate", "grad_norm", "samples", "tokens", "supervised_tokens"),
    *("left_out_samples", "skipped_steps", "tokens_per_second", "seconds_step", "seconds_data_wait"),
    *("seconds_saving", "memory_peak_bytes", "mfu"),
)
"""What is read of the lines of kind "train", beside the losses by source."""
MOST_STEPS = 2**53
"""A line of a later step is damaged: floats, in which steps are kept, are not exact from here on."""


@dataclass
class Run:
    """What the folder of a run holds."""

    folder: Path
    name: str
    about: dict[str, Any]
    """run.json; empty if there is none."""
    train: dict[str, np.ndarray]
    """COLUMNS of the lines of kind "train", ascending by step, and the share of the time waiting for data."""
    loss_by_source: dict[str, np.ndarray]
    evaluations: list[dict[str, Any]]
    """The lines of kind "eval", ascending by step."""
    epochs: list[dict[str, Any]]
    """The lines of kind "epoch": the ledger."""
    damaged_lines: int
    earlier: list[str] = field(default_factory=list)
    """Names of the metrics-<n>.jsonl of earlier attempts, which started from scratch."""
    bad_steps: list[str] = field(default_factory=list)
    """Names of the bad-step-<step>.json."""
    profile: str = ""
    """profile/table.txt"""
    forecast: dict[str, Any] = field(default_factory=dict)
    """forecast.json, if it is of as many ranks; else empty."""
    finished_step: int | None = None
    """The last step, if the run finished."""
    best_step: int | None = None
    """The step of the trained model, if it is that of the best evaluation."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps of the checkpoints in the folder."""

    @property
    def config(self) -> dict[str, Any]:
        return as_dict(self.about.get("config"))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """When, after which step and on what the run was started; the first, and once for each resume."""
        return dicts(self.about.get("starts"))

    @property
    def resumed_after(self) -> list[float]:
        """The steps after which the run was resumed."""
        return [step for entry in self.starts[1:] if (step := number(entry.get("step"))) >= 0]

    @property
    def last_step(self) -> float:
        """The last step of any line; infinite if there is none."""
        steps = [*self.train["step"][-1:], *(number(line.get("step")) for line in self.evaluations[-1:])]
        return max(steps, default=np.inf)

    @property
    def steps_per_line(self) -> np.ndarray:
        """How many steps each line of kind "train" stands for."""
        steps = self.train["step"]
        first = number(self.starts[0].get("step")) if self.starts else 0.0
        return np.diff(steps, prepend=first if len(steps) and 0 <= first < steps[0] else 0.0)

    def logged(self, column: str) -> np.ndarray:
        """float64 [2, lines]: the steps, and a column of the lines of kind "train"."""
        return np.stack([self.train["step"], self.train[column]])

    def evaluated(self, *keys: str) -> np.ndarray:
        """float64 [2, evaluations]: the steps, and the numbers that the keys lead to, as in `number_at`."""
        lines = [(number(line.get("step")), number_at(line, *keys)) for line in self.evaluations]
        return np.array(lines, np.float64).reshape(-1, 2).T

    def seconds(self, column: str) -> float:
        """Seconds of the whole run, from a column of seconds per step."""
        return float(np.nansum(self.train[column] * self.steps_per_line))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, named by their folders as briefly as tells them apart."""
    folders = [folder.resolve() for folder in folders]
    names = [folder.name for folder in folders]
    for parts in range(2, 1 + max(len(folder.parts) for folder in folders)):
        if len(set(names)) == len(set(folders)):
            break
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str | None = None) -> Run:
    """The run in `folder`; see the module's docstring."""
    run = _read_metrics(folder / "metrics.jsonl", name or folder.resolve().name)
    run.about = read_json(folder / "run.json")
    forecast = read_json(folder / "forecast.json")
    if forecast.get("ranks") == run.about.get("ranks"):
        run.forecast = forecast
    marker = read_json(folder / MARKER)
    finished, best = number(marker.get("step")), number(marker.get("best_step"))
    run.finished_step = int(finished) if finished >= 0 else None
    run.best_step = int(best) if best >= 0 else None
    run.checkpoints = sorted(numbered(folder))
    run.earlier = _numbered_names(folder, "metrics-", ".jsonl")
    run.bad_steps = _numbered_names(folder, "bad-step-", ".json")
    try:
        run.profile = (folder / "profile" / "table.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        run.profile = ""
    return run


def _read_metrics(path: Path, name: str) -> Run:
    columns = {column: array("d") for column in COLUMNS}
    by_source: defaultdict[str, tuple[array[float], array[float]]]
    by_source = defaultdict(lambda: (array("d"), array("d")))
    evaluations: dict[float, dict[str, Any]] = {}
    epochs: dict[float, dict[str, Any]] = {}
    damaged = 0
    for line in read_lines(path):
        step = number(line.get("step")) if line is not None else np.nan
        if line is None or not 0 <= step < MOST_STEPS:
            damaged += 1
        elif (kind := line.get("kind")) == "train":
            for column, values in columns.items():
                values.append(number(line.get(column)))
            for source, loss in as_dict(line.get("loss_by_source")).items():
                steps, losses = by_source[source]
                steps.append(step)
                losses.append(number(loss))
        elif kind == "eval":
            evaluations[step] = line
        elif kind == "epoch":
            epochs[step] = line
    train = np.array([np.frombuffer(values) for values in columns.values()])
    train = dict(zip(COLUMNS, _by_step(train), strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        train["waiting_share"] = train["seconds_data_wait"] / train["seconds_step"]
    return Run(
        folder=path.parent,
        name=name,
        about={},
        train=train,
        loss_by_source={source: _by_step(np.array(pair)) for source, pair in by_source.items()},
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        epochs=[epochs[step] for step in sorted(epochs)],
        damaged_lines=damaged,
    )


def _by_step(values: np.ndarray) -> np.ndarray:
    """Columns [k, n], whose first row is steps, in ascending order of the steps; of a step, the last line."""
    order = np.argsort(values[0], kind="stable")
    is_last = np.diff(values[0][order], append=np.inf) > 0
    return values[:, order[is_last]]


def _numbered_names(folder: Path, prefix: str, suffix: str) -> list[str]:
    found = {
        path.name.removeprefix(prefix).removesuffix(suffix): path.name
        for path in folder.glob(f"{prefix}*{suffix}")
    }
    return [found[text] for text in sorted(filter(str.isdecimal, found), key=int)]


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a .jsonl file; None for a line that is none. Nothing if the file cannot be read."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):  # cut off when the run was killed
                value = None
            yield value if isinstance(value, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is none that can be read."""
    try:
        return as_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}
