"""The tables of the report: what a run is made of and how it went, as text.

Input: a `Run`, any value of which may be missing. Output: `Section`s for the template:

    section = evaluations(run)
    section.tables[0].head         # ["evaluation", "epoch", "loss", "loss", "exact_match"]
    section.tables[0].groups       # [("", 3), ("ocr", 2)]
    section.tables[0].rows[0]      # ["step 0: the base model", "0.00", "2.3911", "2.3911", "0.031"]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.report.run import Run
from trainer.report.values import (
    as_dict,
    count,
    decimal,
    dicts,
    duration,
    first_and_last,
    number,
    number_at,
    percent,
    rate,
    text,
)

MOST_ROWS = 60
"""Rows of a table of evaluations: the first, the last, and evenly spaced ones."""
MOST_EPOCHS = 5
"""Epochs whose ledger is shown: the last ones."""
MOST_STARTS = 30
"""Starts of a run that are listed: the last ones."""
NUMBERS_ALONG_THE_WAY = 12


@dataclass
class Table:
    """A table of text: columns are aligned to the left (l) or right (r), as in "lrr"."""

    align: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()
    """Headings above those of the columns, and the columns that each spans."""
    note: str = ""


@dataclass
class Section:
    """What the page says about one run under one heading."""

    run: str
    tables: list[Table]
    note: str = ""
    text: str = ""
    """Preformatted."""


def facts(run: Run) -> list[tuple[str, str]]:
    """(what, value) of what a reader looks for first."""
    train, about = run.train, run.about
    steps, total = train["step"], number(about.get("total_steps"))
    last = int(steps[-1]) if len(steps) else 0
    result = f"at step {last:,}" + ("" if np.isnan(total) else f" of {total:,.0f}")
    if run.finished_step is not None:
        result = f"finished after step {run.finished_step:,}"
    found = [("Training", result)]
    if run.best_step is not None:
        found.append(("Trained model", f"the best, that of step {run.best_step:,}"))
    seconds = run.seconds("seconds_step")
    if len(steps):
        found += [
            ("Epochs", decimal(train["epoch"][-1], 2)),
            ("Training loss", first_and_last(train["loss"])),
        ]
    losses = run.evaluated("loss")[1]
    if len(losses):
        best = f", lowest {np.nanmin(losses):.4f}" if np.isfinite(losses).any() else ""
        found.append(("Validation loss", first_and_last(losses) + best))
    first_scores: dict[str, str] = {}
    for source, name in _scores_of(run):
        first_scores.setdefault(source, name)
    for source, name in list(first_scores.items())[:4]:
        found.append((f"{source}: {name}", first_and_last(run.evaluated("metrics", source, name)[1], 3)))
    if len(steps):
        speed = np.nansum(train["tokens"]) / seconds if seconds else np.nan
        waited = run.seconds("seconds_data_wait") / seconds if seconds else np.nan
        found += [
            ("Samples", count(np.nansum(train["samples"]))),
            ("Tokens", count(np.nansum(train["tokens"]))),
            ("Time in steps", duration(seconds)),
            ("Tokens per second", count(speed)),
            ("Waiting for data", percent(waited)),
            ("Peak memory of a rank", _peak(run)),
            ("Skipped steps", count(np.nansum(train["skipped_steps"]))),
        ]
    within, between = (number(run.forecast.get(f"sent_{where}_bytes")) for where in ("within", "between"))
    if within + between > 0:
        sent = f"{(within + between) / 1e9:,.3f} GB (forecast)"
        sent += f", {between / 1e9:,.3f} GB of them to other machines" if between else ""
        found.append(("Sent by a rank in a step", sent))
    device = about.get("device_name") or about.get("device")
    found.append(("Ranks", f"{count(about.get('ranks'))} × {text(device)}"))
    found.append(("Resumed", f"{len(run.resumed_after):,} times" if run.starts else "–"))
    return found


def _peak(run: Run) -> str:
    """The peak of a rank's memory, beside its forecast: of tensors, which on CPUs is not what is measured."""
    values = run.train["memory_peak_bytes"]
    forecast = number(run.forecast.get("peak_bytes"))
    if not np.isfinite(values).any():
        return "–"
    peak = float(np.nanmax(values))
    measured = f"{peak / 2**30:.2f} GiB"
    if np.isnan(forecast):
        return measured
    if run.about.get("device") == "cpu":
        return f"{measured} with the program; tensors {forecast / 2**30:.2f} GiB (forecast)"
    return f"{measured}; forecast {forecast / 2**30:.2f} GiB, {forecast / peak - 1:+.1%}"


def compared(runs: Sequence[Run]) -> Table:
    """The `facts` of several runs side by side."""
    known = [dict(facts(run)) for run in runs]
    names = dict.fromkeys(name for values in known for name in values)
    rows = [(name, *(values.get(name, "–") for values in known)) for name in names]
    return Table("l" * (1 + len(runs)), ("", *(run.name for run in runs)), rows)


def parameters(run: Run) -> Section:
    rows = dicts(run.about.get("parameters"))
    lines = [
        (
            text(row.get("part")),
            count(row.get("parameters")),
            "no" if row.get("learning_rate") is None else "yes",
            rate(row.get("learning_rate")),
            text(row.get("stored_as")),
            text(row.get("saved")),
        )
        for row in rows
    ]
    total = sum(number(row.get("parameters")) for row in rows)
    trained = sum(number(row.get("parameters")) for row in rows if row.get("learning_rate") is not None)
    base = as_dict(run.about.get("config")).get("model_name_or_path")
    note = f"Model: {text(base)} ({text(run.about.get('model_type'))})."
    if not rows:
        return Section(run.name, [], f"{note} run.json does not tell which parameters train.")
    share = percent(trained / total if total else None)
    lines.append(("all", count(total), f"{count(trained)} of them ({share})", "", "", ""))
    head = ("part", "parameters", "trains", "peak learning rate", "stored as", "saved")
    return Section(run.name, [Table("lrlrll", head, lines)], note)


def _sources(plan: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each source of a plan in run.json."""
    return [
        (
            text(source.get("source")),
            count(source.get("records")),
            count(source.get("samples_per_epoch")),
            percent(source.get("share")),
            text(source.get("path")),
            text(source.get("fingerprint")),
        )
        for source in plan
    ]


def data(run: Run) -> Section:
    tables = [
        Table("lrrrll", ("source", "records", samples, "share", "file", "fingerprint"), rows, note=note)
        for plan, samples, note in (
            ("data_plan", "samples per epoch", "Declared: the mixture of an epoch."),
            ("evaluation_plan", "samples", "Not trained on: the same samples at every evaluation."),
        )
        if (rows := _sources(dicts(run.about.get(plan))))
    ]
    rows = []
    for line in run.epochs[-MOST_EPOCHS:]:
        ledger = dicts(line.get("sources"))
        realised = sum(filter(np.isfinite, (number(row.get("realised_samples")) for row in ledger)))
        rows += [
            (
                f"{number(line.get('epoch')) + 1:.0f}",
                text(row.get("source")),
                count(row.get("declared_samples")),
                count(row.get("realised_samples")),
                percent(number(row.get("realised_samples")) / realised if realised else None),
                count(row.get("left_out_samples")),
                count(row.get("supervised_tokens")),
                decimal(row.get("mean_loss")),
                f"{count(row.get('unique_records'))} of {count(row.get('records'))}",
            )
            for row in ledger
        ]
    head = ("epoch", "source", "declared", "realised", "share", "left out", "supervised tokens", "mean loss")
    head = (*head, "unique records so far")
    if rows:
        tables.append(Table("rlrrrrrrr", head, rows, note="Realised: what each epoch really trained on."))
    note = ""
    if not run.epochs:
        note = "No epoch is complete, so nothing is known yet of what an epoch really trained on."
    elif len(run.epochs) > MOST_EPOCHS:
        note = f"The last {MOST_EPOCHS} of {len(run.epochs):,} epochs; metrics.jsonl has them all."
    return Section(run.name, tables, note)


def numbers(run: Run) -> Section:
    train = run.train
    rows = [
        (
            count(train["step"][place]),
            decimal(train["epoch"][place], 2),
            decimal(train["loss"][place]),
            rate(train["learning_rate"][place]),
            decimal(train["grad_norm"][place], 3),
            count(train["tokens_per_second"][place]),
            percent(train["waiting_share"][place]),
            decimal(train["memory_peak_bytes"][place] / 2**30, 2),
        )
        for place in _spaced(len(train["step"]), NUMBERS_ALONG_THE_WAY)
    ]
    head = ("step", "epoch", "loss", "learning rate", "gradient norm", "tokens/s", "data wait", "memory, GiB")
    return Section(run.name, [Table("rrrrrrrr", head, rows)] if rows else [])


def _scores_of(run: Run) -> dict[tuple[str, str], None]:
    """(source, name) of all scores that any evaluation has."""
    return dict.fromkeys(
        (source, name)
        for line in run.evaluations
        for source, scores in as_dict(line.get("metrics")).items()
        for name in as_dict(scores)
    )


def evaluations(run: Run) -> Section:
    if not run.evaluations:
        return Section(run.name, [], "This run was not evaluated.")
    by_source = dict.fromkeys(s for line in run.evaluations for s in as_dict(line.get("loss_by_source")))
    scores = _scores_of(run)
    sources = dict.fromkeys([*by_source, *(source for source, _ in scores)])
    head, groups = ["evaluation", "epoch", "loss"], [("", 3)]
    for source in sources:
        names = ["loss"] * (source in by_source) + [name for s, name in scores if s == source]
        head += names
        groups.append((source, len(names)))
    rows = []
    for place in _spaced(len(run.evaluations), MOST_ROWS):
        line = run.evaluations[place]
        losses, step = as_dict(line.get("loss_by_source")), number(line.get("step"))
        best = ": the best model" if step == run.best_step else ""
        row = [
            "step 0: the base model" if step == 0 else f"step {step:,.0f}{best}",
            decimal(line.get("epoch"), 2),
            decimal(line.get("loss")),
        ]
        for source in sources:
            row += [decimal(losses.get(source))] * (source in by_source)
            row += [decimal(number_at(line, "metrics", source, name), 3) for s, name in scores if s == source]
        rows.append(row)
    last = run.evaluations[-1]
    note = (
        f"The same {count(last.get('samples'))} samples with {count(last.get('supervised_tokens'))} "
        "supervised tokens at every evaluation."
    )
    if len(run.evaluations) > MOST_ROWS:
        note += f" {MOST_ROWS} of {len(run.evaluations):,} evaluations; metrics.jsonl has them all."
    return Section(run.name, [Table("l" + "r" * (len(head) - 1), head, rows, groups)], note)


def time(run: Run) -> Section:
    total = run.seconds("seconds_step")
    waiting, saving = run.seconds("seconds_data_wait"), run.seconds("seconds_saving")
    steps = run.steps_per_line.sum()
    evaluating = [number(line.get("seconds")) for line in run.evaluations]
    parts = [
        ("steps", total),
        ("of these: waiting for data", waiting),
        ("of these: saving, as far as training waits", saving),
        ("of these: all else, that is computing and communicating", total - waiting - saving),
    ]
    if evaluating:
        parts.append(("evaluations", float(np.nansum(evaluating))))
    rows = [
        (
            what,
            duration(seconds),
            percent(seconds / total if total else None),
            decimal(seconds / steps if steps else None, 3),
        )
        for what, seconds in parts
    ]
    tables = [Table("lrrr", ("", "time", "of the time in steps", "seconds per step"), rows)] if total else []
    note = "Of rank 0. Steps that a killed run did again are counted once."
    profile = f"Profiler, from profile/table.txt:\n\n{run.profile}" if run.profile else ""
    return Section(run.name, tables, note if total else "No step was logged.", profile)


def starts(run: Run) -> Section:
    rows = []
    for entry in run.starts[-MOST_STARTS:]:
        versions = as_dict(entry.get("versions"))
        step = number(entry.get("step"))
        rows.append(
            (
                text(entry.get("time")),
                "the beginning" if step == 0 else f"after step {count(step)}",
                text(entry.get("from")),
                f"{count(entry.get('ranks'))} × {text(entry.get('device_name') or entry.get('device'))}",
                ", ".join(f"{name} {version}" for name, version in versions.items()),
            )
        )
    notes = []
    if len(run.starts) > MOST_STARTS:
        notes.append(f"The last {MOST_STARTS} of {len(run.starts):,} starts.")
    if run.earlier:
        notes.append(
            f"Earlier attempts in this folder, which started from scratch: {', '.join(run.earlier[-10:])}"
            f"{' and more' * (len(run.earlier) > 10)}."
        )
    if run.bad_steps:
        notes.append(
            f"Steps that were skipped because a loss or gradient was not finite: {len(run.bad_steps):,}, "
            f"described in {', '.join(run.bad_steps[:10])}{' and more' * (len(run.bad_steps) > 10)}."
        )
    if run.checkpoints:
        last = [f"checkpoint-{step}" for step in run.checkpoints[-5:]]
        notes.append(f"Newest checkpoints in the folder: {', '.join(last)}.")
    head = ("started", "from", "checkpoint", "ranks", "versions")
    return Section(run.name, [Table("lllll", head, rows)] if rows else [], " ".join(notes))


def versions(run: Run) -> Section:
    about = run.about
    rows = [(name, text(version)) for name, version in as_dict(about.get("versions")).items()]
    for what, name in (
        ("global batch, samples", "global_batch"),
        ("steps per epoch", "steps_per_epoch"),
        ("steps in all", "total_steps"),
        ("warm-up steps", "warmup_steps"),
        ("checksum of the base's weights", "base_checksum"),
        ("conversation format", "conversation_format"),
        ("image processor", "image_processor"),
    ):
        rows.append((what, text(about.get(name))[:2000]))
    return Section(run.name, [Table("ll", ("", "value"), rows)])


def _spaced(length: int, most: int) -> list[int]:
    """At most `most` places of a sequence, evenly spaced, the first and the last among them."""
    return (
        np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)).tolist()
        if length
        else []
    )
