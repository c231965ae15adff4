"""The curves of runs, as Bokeh draws them in a page: values on hover, lines that a click hides, linked zoom.

Input: runs, of any number of lines. Output: figures to put into a page, and the script that they share.

    script, figures = curves([run])
    figures[0].title, figures[0].html        # "Loss", '<div …></div>'

A curve of more lines than MOST_POINTS is divided into that many stretches of as many lines each. It then
shows their means, and a band from the least to the greatest value of each stretch, so that no spike is lost.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import (
    ColumnDataSource,
    HoverTool,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    PrintfTickFormatter,
)
from bokeh.palettes import Category10_10
from bokeh.plotting import figure
from bokeh.resources import Resources

from trainer.report.run import Run
from trainer.report.values import as_dict

MOST_POINTS = 1_000
"""Points of a curve, about two for each pixel of its width."""
ALL_POINTS = 30_000
"""Points of a page, 1 MB in it; a page of many curves has fewer for each, but at least LEAST_POINTS."""
LEAST_POINTS = 100
MOST_CURVES = 24
"""Curves of a figure. Of more sources, those in most lines of metrics.jsonl are shown."""
MOST_SCORES = 4
"""Scores of answers with a figure of their own."""
HEIGHT = 250
"""Pixels of a figure without its legend."""
NARROWEST = 330
"""Pixels that a legend may be wide, for telephones; Bokeh does not break its lines."""
LABEL_LENGTH = 40
MOST_MARKS = 500
DASHES = ("solid", "dashed", "dotted", "dotdash")
RESUMED, SKIPPED = "#8a8f98", "#c0392b"
"""Colours of the vertical lines; the page's style sheet has them too."""
SIDES: tuple[Literal["left", "right", "above", "below"], ...] = ("right", "left", "above", "below")
"""Where the values of a figure's curves are shown, in turn: on one side, they would hide each other."""
FEW_POINTS = 40
"""A curve of fewer points shows each of them."""


@dataclass(frozen=True)
class Curve:
    """A line of a figure."""

    label: str
    points: np.ndarray
    """float64 [2, n]: steps and values."""
    color: str
    dash: str = "solid"
    with_points: bool = False

    @property
    def has_values(self) -> bool:
        return bool(np.isfinite(self.points[1]).any())


@dataclass
class Plan:
    """What a figure shows; number_format: how Bokeh formats its values."""

    title: str
    lines: list[Curve]
    number_format: str
    is_log: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure of the page: its heading, and the HTML in which the script draws it."""

    title: str
    html: str


def thin(points: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """At most `most` of the points [2, n] of a curve, as columns: step and value; and if they are stretches
    of several lines each: first and last step, the mean as value, low and high."""
    steps, values = points
    if len(steps) <= most:
        return {"step": steps.astype(np.int64), "value": values.astype(np.float32)}
    begins = np.linspace(0, len(steps), most, endpoint=False).astype(int)
    ends = np.append(begins[1:], len(steps)) - 1
    is_number = np.isfinite(values)
    counts = np.add.reduceat(is_number, begins, dtype=np.int64)
    sums = np.add.reduceat(np.where(is_number, values, 0.0), begins)
    return {
        "step": steps[(begins + ends) // 2].astype(np.int64),
        "first": steps[begins].astype(np.int64),
        "last": steps[ends].astype(np.int64),
        "value": np.divide(sums, counts, out=np.full(most, np.nan), where=counts > 0).astype(np.float32),
        "low": np.fmin.reduceat(values, begins).astype(np.float32),
        "high": np.fmax.reduceat(values, begins).astype(np.float32),
    }


def curves(runs: Sequence[Run]) -> tuple[str, list[Figure]]:
    """The scripts for a page, and its figures; those without any value are left out."""
    wanted = [plan for plan in _plans(runs) if any(line.has_values for line in plan.lines)]
    if not wanted:
        return "", []
    num_lines = sum(len(plan.lines) for plan in wanted)
    points = min(MOST_POINTS, max(LEAST_POINTS, ALL_POINTS // num_lines))
    marks = _marks(runs)
    drawn: list[figure] = []
    for plan in wanted:
        plot = _draw(plan, marks, points)
        if drawn:
            plot.x_range = drawn[0].x_range  # a zoom into one is a zoom into all
        drawn.append(plot)
    document = Document()
    with (
        document.models.freeze()
    ):  # else it looks through all figures, which are linked, once for each of them
        for plot in drawn:
            document.add_root(plot)
    script, elements = components({str(place): plot for place, plot in enumerate(drawn)})
    library = Resources(mode="inline", components=["bokeh"]).render_js()
    figures = [Figure(plan.title, elements[str(place)]) for place, plan in enumerate(wanted)]
    return f"{library}\n{script}", figures


def _plans(runs: Sequence[Run]) -> list[Plan]:
    """All figures. Colours tell runs apart; by source, they tell sources apart, and dashes runs."""
    several = len(runs) > 1
    colors = [Category10_10[place % 10] for place in range(len(runs))]
    loss: list[Curve] = []
    for run, color in zip(runs, colors, strict=True):
        prefix = f"{run.name}: " if several else ""
        loss.append(Curve(f"{prefix}training", run.logged("loss"), color))
        if run.evaluations:
            evaluated = run.evaluated("loss")
            color = color if several else Category10_10[1]
            loss.append(Curve(f"{prefix}validation", evaluated, color, "dashed", with_points=True))

    def of_runs(
        title: str, number_format: str, column: str, scale: float = 1.0, is_log: bool = False
    ) -> Plan:
        lines = [
            Curve(run.name if several else title, run.logged(column) * [[1], [scale]], color)
            for run, color in zip(runs, colors, strict=True)
        ]
        return Plan(title, lines, number_format, is_log)

    return [
        Plan("Loss", loss, "0.0000"),
        *_plans_by_source(runs),
        of_runs("Learning rate", "0.00e+0", "learning_rate"),
        of_runs("Gradient norm, before clipping", "0.000", "grad_norm", is_log=True),
        of_runs("Tokens per second", "0,0", "tokens_per_second"),
        of_runs("Share of the time waiting for data", "0.0 %", "waiting_share"),
        of_runs("Peak memory of a rank, GiB", "0.00", "memory_peak_bytes", scale=2**-30),
        of_runs("MFU", "0.0 %", "mfu"),
    ]


def _plans_by_source(runs: Sequence[Run]) -> list[Plan]:
    """Losses by source, and a figure for each score of the answers."""
    sources: Counter[str] = Counter()
    scores: Counter[str] = Counter()
    for run in runs:
        sources.update({source: values.shape[1] for source, values in run.loss_by_source.items()})
        for line in run.evaluations:
            sources.update([*as_dict(line.get("loss_by_source"))])
            scores.update(name for found in as_dict(line.get("metrics")).values() for name in as_dict(found))
    most = [source for source, _ in sources.most_common(max(1, MOST_CURVES // len(runs)))]
    colors = {source: Category10_10[place % 10] for place, source in enumerate(sorted(most))}
    training = Plan("Training loss by source", [], "0.0000")
    validation = Plan("Validation loss by source", [], "0.0000")
    answers = {name: Plan(f"Answers: {name}", [], "0.000") for name, _ in scores.most_common(MOST_SCORES)}
    for place, run in enumerate(runs):
        dash = DASHES[place % len(DASHES)]
        for source, color in colors.items():
            label = f"{run.name}: {source}" if len(runs) > 1 else source
            if source in run.loss_by_source:
                training.lines.append(Curve(label, run.loss_by_source[source], color, dash))
            losses = run.evaluated("loss_by_source", source)
            validation.lines.append(Curve(label, losses, color, dash, with_points=True))
            for name, plan in answers.items():
                values = run.evaluated("metrics", source, name)
                plan.lines.append(Curve(label, values, color, dash, with_points=True))
    for plan in (validation, *answers.values()):
        plan.lines[:] = [line for line in plan.lines if line.has_values]
    return [*([training] if len(most) > 1 else []), validation, *answers.values()]


def _marks(runs: Sequence[Run]) -> list[tuple[str, list[int]]]:
    """(colour, steps) of the vertical lines in every figure: resumes, and skipped steps."""
    resumed = {int(step) for run in runs for step in run.resumed_after}
    skipped = {int(step) for run in runs for step in run.train["step"][run.train["skipped_steps"] > 0]}
    marks = [(RESUMED, sorted(resumed)), (SKIPPED, sorted(skipped))]
    return [(color, steps[:: 1 + len(steps) // MOST_MARKS]) for color, steps in marks if steps]


def _draw(plan: Plan, marks: Sequence[tuple[str, list[int]]], points: int) -> figure:
    lines, number = plan.lines, plan.number_format
    plot = figure(
        height=HEIGHT,
        sizing_mode="stretch_width",
        tools="box_zoom,xpan,xwheel_zoom,reset,save",
        active_drag="box_zoom",
        active_scroll=None,
        toolbar_location="above",
        toolbar_inner=True,
        y_axis_type="log" if plan.is_log else "linear",
    )
    for color, steps in marks:
        source = ColumnDataSource({"step": steps})
        plot.vspan(x="step", source=source, line_color=color, line_alpha=0.8, line_dash="4 3")
    items: list[LegendItem] = []
    for place, line in enumerate(lines):
        columns = thin(line.points, points)
        source = ColumnDataSource(columns)
        curve: Any = plot.line("step", "value", source=source, name=_plain(line.label))
        curve.glyph.update(line_color=line.color, line_dash=line.dash, line_width=1.6)
        drawn: list[Any] = [curve]
        tooltips = [("step", "@step{0,0}"), ("value", f"@value{{{number}}}")]
        if "low" in columns:
            drawn += [
                plot.varea("step", "low", "high", source=source, fill_color=line.color, fill_alpha=0.25),
                plot.line("step", "high", source=source, line_color=line.color, line_alpha=0.4),
            ]
            tooltips = [
                ("steps", "@first{0,0} to @last{0,0}"),
                ("mean", f"@value{{{number}}}"),
                ("from, to", f"@low{{{number}}}, @high{{{number}}}"),
            ]
        hover = HoverTool(renderers=[curve], mode="vline", tooltips=[("", "$name"), *tooltips])
        hover.attachment = SIDES[place % len(SIDES)]
        plot.add_tools(hover)
        if line.with_points or line.points.shape[1] < FEW_POINTS:
            drawn.append(plot.scatter("step", "value", source=source, size=5, color=line.color))
        items.append(LegendItem(label=_plain(line.label), renderers=drawn))
    if len(items) > 1:
        longest = max(len(line.label[:LABEL_LENGTH]) for line in lines)
        columns = min(len(items), max(1, NARROWEST // (40 + 6 * longest)))
        legend = Legend(items=items, click_policy="hide", orientation="horizontal", location="top_left")
        legend.update(ncols=columns, border_line_color=None, label_text_font_size="11px")
        legend.update(glyph_width=16, padding=2, margin=0, spacing=4)
        plot.add_layout(legend, "below")
        plot.height = HEIGHT + 22 * -(-len(items) // columns)
    _style(plot, number)
    return plot


def _style(plot: figure, number: str) -> None:
    if "%" in number or "," in number:
        plot.yaxis.formatter = NumeralTickFormatter(format=number)
    elif "e" in number:
        plot.yaxis.formatter = PrintfTickFormatter(format="%.1e")
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xaxis.axis_label = "step"
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.outline_line_color = None
    plot.axis.axis_line_color = "#c8ccd2"
    plot.axis.major_tick_line_color = "#c8ccd2"
    plot.axis.minor_tick_line_color = None
    plot.axis.axis_label_text_font_style = "normal"
    plot.xgrid.grid_line_color = None
    plot.ygrid.grid_line_color = "#e6e8ec"


def _plain(text: str) -> str:
    """Text that Bokeh takes for nothing but text: formulas would make it look for MathJax on the network."""
    return text.replace("$$", "$ $").replace("\\(", "\\ (").replace("\\[", "\\ [")[:LABEL_LENGTH]
