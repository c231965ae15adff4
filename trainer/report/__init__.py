"""One page about a run, or several side by side: `python -m trainer.report output/pets`.

    python -m trainer.report output/pets                              # output/pets/report.html
    python -m trainer.report output/a output/b --out compare.html

Input: the folders of runs, of which nothing is needed but what the trainer writes there (run.json,
metrics.jsonl, eval/). Output: an HTML page without any other file, which works offline and can be printed:
what trained, on which data, the curves, the evaluations with answers and pictures, time and memory, the
configuration, and the commands that repeat the run and load its result. A run that still trains, or that was
killed, has a page too.

The curves need Bokeh (`pip install 'xcomposer-fsdp[report]'`), about 1.3 MB in the page; without it the page
has tables. The page stays under 5 MB: long runs, many questions and large pictures are thinned out.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import jinja2

from data.files import replace_file
from trainer.config import Config
from trainer.job import BAD_INPUT, is_main, log
from trainer.report import tables
from trainer.report.answers import MOST_EVALUATIONS, RIGHT_FROM, read_questions
from trainer.report.commands import all_flags, changed_flags, commands, differences
from trainer.report.run import read_runs

TEMPLATE = Path(__file__).with_name("page.html")


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the page about these runs; OSError if that fails. Damaged files of a run are told on the page."""
    replace_file(out, report(run_dirs).encode())


def write_own_report(config: Config) -> None:
    """Write the page of the run that trains, on rank 0, if it shall have one; what prevents it is only a
    warning."""
    if not config.report or not is_main():
        return
    output_dir = Path(config.output_dir)
    try:
        write_report([output_dir], output_dir / "report.html")
    except Exception as error:  # nothing about a page is a reason to lose a training
        log(f"\nwarning: {output_dir / 'report.html'} was not written: {type(error).__name__}: {error}")


def report(run_dirs: Sequence[Path]) -> str:
    """The page."""
    runs = read_runs(run_dirs)
    script, figures, has_plots = "", [], find_spec("bokeh") is not None
    if has_plots:
        from trainer.report.curves import curves

        script, figures = curves(runs)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=" · ".join(run.name for run in runs),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        runs=runs,
        damaged=[f"{run.name}: {run.damaged_lines:,}" for run in runs if run.damaged_lines],
        facts=tables.facts(runs[0]),
        compared=tables.compared(runs),
        differences=differences(runs),
        figures=figures,
        script=script,
        has_plots=has_plots,
        questions=read_questions(runs),
        most_evaluations=MOST_EVALUATIONS,
        right_from=RIGHT_FROM,
        # The sections that each run has of its own, one below the other.
        numbers=[tables.numbers(run) for run in runs],
        evaluations=[tables.evaluations(run) for run in runs],
        parameters=[tables.parameters(run) for run in runs],
        data=[tables.data(run) for run in runs],
        time=[tables.time(run) for run in runs],
        starts=[tables.starts(run) for run in runs],
        changed_flags=[changed_flags(run) for run in runs],
        all_flags=[all_flags(run) for run in runs],
        versions=[tables.versions(run) for run in runs],
        commands=[commands(run) for run in runs],
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainer.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--out", type=Path, help="file of the page (default, for one run: RUN/report.html)")
    arguments = parser.parse_args(argv)
    problems = [
        f"{folder} holds no run: neither run.json nor metrics.jsonl is there"
        for folder in arguments.runs
        if not any((folder / name).is_file() for name in ("run.json", "metrics.jsonl"))
    ]
    if arguments.out is None and len(arguments.runs) > 1:
        problems.append("several runs: name the file of the page with --out")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return BAD_INPUT
    out = arguments.out or arguments.runs[0] / "report.html"
    try:
        write_report(arguments.runs, out)
    except OSError as error:
        print(f"error: {out} cannot be written: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"the page is {out}")
    return 0
