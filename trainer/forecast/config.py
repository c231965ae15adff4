"""The flags of a forecast: those of the training, and the machines to forecast for.

config = parse_flags(ForecastConfig, ["--model_name_or_path", "MODEL"], "trainer.forecast")
config.other_ranks                         # [1, 8, 64, 1024]
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data.config import may_change
from trainer.config import Config

GB = 1e9


@dataclass
class ForecastConfig(Config):
    """Forecast memory, time, traffic and disk of a training, before machines are rented."""

    # --- the forecast --------------------------------------------------------------------------------
    data_path: str = may_change("")
    """As for training; without it, every row is full, and each of its samples has a picture."""
    picture: str = "640x480"
    """Without data_path: width and height of every sample's picture; none: text alone."""
    ranks: int = 8
    """Processes of the training, one for each accelerator."""
    local_ranks: int = 8
    """Processes of a machine."""
    cpu_ranks: bool = False
    """The ranks are CPUs, with gloo, instead of accelerators."""
    memory: float = 80.0
    """GB of an accelerator."""
    mfu: float = 0.4
    """Share of `peak_tflops` that the model's own operations will reach."""
    peak_tflops: float = 989.0
    """An accelerator's dense matrix products in bfloat16, in TFLOP/s: H100 and H200 989, A100 312."""
    measured: str | None = None
    """output_dir of a run on such machines, whose speed is taken instead of mfu and peak_tflops. Four steps
    are enough: what they consisted of tells the time of other lengths and pictures."""
    compared_ranks: tuple[str, ...] = ("1", "8", "64", "1024")
    """Other numbers of ranks to forecast; none: no other."""
    output: str | None = None
    """File for all numbers, as JSON."""

    @classmethod
    def of(cls, values: Mapping[str, Any], **changes: Any) -> "ForecastConfig":
        """From JSON values, as of a run.json; what this version does not know is left out."""
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {name: value for name, value in values.items() if name in known} | changes
        for name, value in given.items():
            given[name] = tuple(value) if isinstance(value, list) else value
        return cls(**given)

    def problems(self) -> list[str]:
        found = [p for p in super().problems() if self.data_path or not p.startswith("--data_path ")]
        found += self.too_small(ranks=1, local_ranks=1)
        for name in ("memory", "mfu", "peak_tflops"):
            if not getattr(self, name) > 0:
                found.append(f"--{name} {getattr(self, name)}: must be above 0")
        try:
            _ = self.picture_size, self.other_ranks
        except ValueError as error:
            found.append(str(error))
        if self.measured is not None and not self.measured_steps:
            found.append(f"--measured {self.measured}: holds no steps of a run; name the output_dir of one")
        return found

    @property
    def measured_steps(self) -> list[dict[str, Any]]:
        """The lines of the run that `measured` names, without the first one, which is slower."""
        folder = Path(self.measured or "")
        if not all((folder / name).is_file() for name in ("metrics.jsonl", "run.json")):
            return []
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
        return lines[1:] or lines

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """`picture` as two numbers; ValueError if it is not."""
        if self.picture == "none":
            return None
        try:
            width, height = (int(number) for number in self.picture.split("x"))
            if width < 1 or height < 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"--picture {self.picture}: give WIDTHxHEIGHT, or none") from None
        return width, height

    @property
    def other_ranks(self) -> list[int]:
        """`compared_ranks` as numbers; ValueError if they are not."""
        words = [word for word in self.compared_ranks if word != "none"]
        if not all(word.isdecimal() and int(word) for word in words):
            raise ValueError(f"--compared_ranks {' '.join(words)}: give numbers of ranks, or none")
        return [int(word) for word in words]
