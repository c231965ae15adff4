"""The answers of a run's evaluations, question by question, so that one sees the model learn.

Input: eval/step-<step>.jsonl of the runs, and the pictures that they name. Output: a choice of questions,
each with what the model said at every evaluation:

    what colour is it?   expected: blue
      step 0            it is a        wrong
      steps 200 to 400  red            wrong
      step 600          blue           right

Of each source as many are chosen of those that the last evaluation got right and wrong and of those that
changed between the first and the last. Pictures are small JPEGs in the page; there is a limit to their bytes
and to the seconds that they take.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.errors import DataError
from data.images import jpeg_uri, open_image, process
from trainer.models.xcomposer2.image_processing_xcomposer2 import to_rgb
from trainer.report.run import Run, read_lines
from trainer.report.values import as_dict, number

MOST_QUESTIONS = 120
"""Questions on the page."""
MOST_EVALUATIONS = 12
"""Evaluations of a run whose answers are read: the first, the last, and evenly spaced ones."""
MOST_CHARACTERS = 400
"""Of a question or an answer; what is longer is cut."""
MOST_PICTURES = 4
"""Pictures of a question."""
PICTURE_SIDE = 240
"""Longest side of a picture in pixels."""
PICTURE_BYTES = 1_500_000
"""Of all pictures of the page together."""
PICTURE_SECONDS = 10.0
"""Time for all pictures of the page; the other ranks may be waiting."""
RIGHT_FROM = 0.5
"""An answer whose first score is at least this counts as right; most scores are 0 or 1."""

Key = tuple[str, Any, str]
"""(source, record, question): what is the same question in every evaluation of every run."""


@dataclass
class Answer:
    """What a run's model said at one evaluation, or at several in a row."""

    run: str
    first: int
    last: int
    text: str
    is_right: bool | None
    """None without a score."""
    scores: str


@dataclass
class Question:
    """A question with the answers of all runs, run by run."""

    source: str
    name: str
    text: str
    expected: str
    paths: list[str]
    answers: list[Answer] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    """Data URIs."""
    missing: list[str] = field(default_factory=list)
    """A sentence for each picture that is not shown."""

    @property
    def state(self) -> str:
        """right, wrong or unscored: the last answer of any run, of which a wrong one counts most."""
        last = {answer.run: answer.is_right for answer in self.answers}
        if False in last.values():
            return "wrong"
        return "right" if True in last.values() else "unscored"

    @property
    def changed(self) -> bool:
        """Whether a run's last answer is right and its first was wrong, or the other way round."""
        by_run = itertools.groupby(self.answers, key=lambda answer: answer.run)
        first_and_last = [(rows[0], rows[-1]) for rows in ([*rows] for _, rows in by_run)]
        return any(first.is_right != last.is_right for first, last in first_and_last)


@dataclass(frozen=True)
class Questions:
    """The questions on the page, and how many there are in the files."""

    shown: list[Question]
    total: int

    @property
    def sources(self) -> list[str]:
        return sorted({question.source for question in self.shown})


def read_questions(runs: Sequence[Run]) -> Questions:
    """The questions of the runs' evaluations for the page, with their pictures."""
    found: dict[Key, Question] = {}
    for run in runs:
        files = {
            int(path.stem.removeprefix("step-")): path
            for path in (run.folder / "eval").glob("step-*.jsonl")
            if path.stem.removeprefix("step-").isdecimal()
        }
        # Later ones are of steps that a killed run did, and that will be done again.
        steps = sorted(step for step in files if step <= run.last_step)
        if steps:
            places = np.linspace(0, len(steps) - 1, min(len(steps), MOST_EVALUATIONS)).round().astype(int)
            for step in [steps[place] for place in places]:
                _read_answers(files[step], step, run.name, found)
    shown = _choose(list(found.values()))
    _add_pictures(shown)
    return Questions(shown, len(found))


def _read_answers(path: Path, step: int, run: str, found: dict[Key, Question]) -> None:
    """Add the answers of an evaluation to their questions; one that equals the last one extends it."""
    for row in read_lines(path):
        if row is None:
            continue
        source, text = _cut(row.get("source")), _cut(row.get("question"))
        key = (source, str(row.get("record")), text)
        if key not in found:
            images = row.get("images")
            paths = [str(image) for image in images] if isinstance(images, list) else []
            name = str(row.get("id") or f"record {row.get('record')}")
            found[key] = Question(source, _cut(name), text, _cut(row.get("answer")), paths)
        scores = {name: number(value) for name, value in as_dict(row.get("scores")).items()}
        first = next(iter(scores.values()), np.nan)
        is_right = None if np.isnan(first) else first >= RIGHT_FROM
        told = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
        said, answers = _cut(row.get("prediction")), found[key].answers
        before = answers[-1] if answers and answers[-1].run == run else None
        if before and (before.text, before.is_right, before.scores) == (said, is_right, told):
            before.last = step
        else:
            answers.append(Answer(run, step, step, said, is_right, told))


def _cut(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"


def _choose(questions: Sequence[Question]) -> list[Question]:
    """MOST_QUESTIONS of them, in turn from each source and, in it, from those right, wrong and changed."""
    groups: defaultdict[tuple[str, str, bool], list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.source, question.state, question.changed].append(question)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    chosen = itertools.islice((question for question in in_turn if question is not None), MOST_QUESTIONS)
    return list(chosen)


def _add_pictures(questions: Sequence[Question]) -> None:
    until, room = time.monotonic() + PICTURE_SECONDS, PICTURE_BYTES
    small: dict[str, str | DataError] = {}
    for question in questions:
        for path in question.paths[:MOST_PICTURES]:
            if path not in small and time.monotonic() < until:
                try:
                    small[path] = _small(path)
                except DataError as error:
                    small[path] = error
            picture = small.get(path)
            if isinstance(picture, str) and len(picture) <= room:
                room -= len(picture)
                question.pictures.append(picture)
            else:
                full = "left out, as the page would become too large or take too long to write"
                why = _cut(picture if isinstance(picture, DataError) else f"{path}: {full}")
                question.missing.append(why)
        if more := len(question.paths) - MOST_PICTURES:
            question.missing += [f"and {more} more pictures"] * (more > 0)


def _small(path: str) -> str:
    """The picture as a data URI, as a viewer shows it; DataError if it cannot be read."""
    with open_image(path) as image:
        image.draft(
            "RGB", (2 * PICTURE_SIDE, 2 * PICTURE_SIDE)
        )  # a large JPEG is decoded at a lower resolution

        def shrink(image: Image.Image) -> str:
            image = to_rgb(image, as_viewed=True)
            image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            return jpeg_uri(image, quality=75)

        return process(image, shrink)
