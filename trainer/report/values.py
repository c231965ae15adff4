"""Values of files that may hold anything → numbers and text.

number("0.5"), number(None), number(3)     # nan, nan, 3.0
count(12345.0), percent(0.125), count(nan) # "12,345", "12.5%", "–"
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def number(value: Any) -> float:
    """A finite number as a float; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else np.nan


def as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def number_at(value: Any, *keys: str) -> float:
    """The number that the keys lead to, one inside the other, as in a line's "metrics", "ocr", "anls"."""
    for key in keys:
        value = as_dict(value).get(key)
    return number(value)


def dicts(value: Any) -> list[dict[str, Any]]:
    """Those elements of a list that are objects."""
    return [dict(entry) for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def text(value: Any) -> str:
    return "–" if value is None or value == "" else str(value)


def count(value: Any) -> str:
    value = number(value)
    return "–" if np.isnan(value) else f"{value:,.0f}"


def decimal(value: Any, digits: int = 4) -> str:
    value = number(value)
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def percent(value: Any) -> str:
    value = number(value)
    return "–" if np.isnan(value) else f"{value:.1%}"


def rate(value: Any) -> str:
    value = number(value)
    return "–" if np.isnan(value) else f"{value:.2e}"


def duration(seconds: float) -> str:
    if np.isnan(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


def first_and_last(values: Sequence[float] | np.ndarray, digits: int = 4) -> str:
    """The first and the last number, with an arrow between them."""
    valid = [value for value in values if np.isfinite(value)]
    if len(valid) < 2:
        return "".join(decimal(value, digits) for value in valid) or "–"
    return f"{valid[0]:.{digits}f} → {valid[-1]:.{digits}f}"
