"""The flags of a run, what differs between runs, and the commands that repeat a run and use its result.

Input: a `Run`, whose run.json has the resolved configuration. Output: tables and commands for the template:

    commands(run)[0].text
    # torchrun --nproc_per_node 8 -m trainer.main \\
    #     --model_name_or_path internlm-xcomposer2-vl-7b \\
    #     --learning_rate 2e-05
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from trainer.config import Config
from trainer.report.run import Run
from trainer.report.tables import Section, Table
from trainer.report.values import as_dict, count, dicts, number, text


@dataclass
class Command:
    """A command or a few lines of Python, and what they are for."""

    what: str
    text: str


def _defaults() -> dict[str, Any]:
    """Flag → its default, as JSON has it."""
    values = {field.name: getattr(Config(), field.name) for field in fields(Config)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def changed_flags(run: Run) -> Section:
    """The flags that differ from their defaults."""
    defaults = _defaults()
    return _flags(run, [name for name, value in run.config.items() if defaults.get(name, ...) != value])


def all_flags(run: Run) -> Section:
    return _flags(run, list(run.config))


def _flags(run: Run, names: Sequence[str]) -> Section:
    defaults = _defaults()
    rows = [
        (
            f"--{name}",
            _words(run.config[name])[:1000],
            _words(defaults[name]) if name in defaults else "no such flag now",
        )
        for name in names
    ]
    return Section(run.name, [Table("lll", ("flag", "value", "default"), rows)] if rows else [])


def _words(value: Any) -> str:
    """A value as the command line has it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    return "none" if value is None else str(value)


def differences(runs: Sequence[Run]) -> Table:
    """What differs between runs: flags, and what run.json says beside them."""
    tables: list[dict[str, str]] = []
    for run in runs:
        about, values = run.about, {f"--{name}": _words(value) for name, value in run.config.items()}
        names = (
            "model_type",
            "global_batch",
            "steps_per_epoch",
            "total_steps",
            "warmup_steps",
            "base_checksum",
        )
        names = (*names, "conversation_format", "image_processor", "ranks", "device", "device_name")
        values |= {name: text(about.get(name)) for name in names}
        values |= {f"version of {name}": text(v) for name, v in as_dict(about.get("versions")).items()}
        for source in dicts(about.get("data_plan")):
            values[f"data: {source.get('source')}"] = (
                f"{count(source.get('samples_per_epoch'))} of {count(source.get('records'))} records "
                f"an epoch, fingerprint {source.get('fingerprint')}"
            )
        tables.append(values)
    names = dict.fromkeys(name for values in tables for name in values)
    rows = [
        (name, *(values.get(name, "–")[:1000] for values in tables))
        for name in names
        if len({values.get(name) for values in tables}) > 1
    ]
    return Table("l" + "l" * len(runs), ("", *(run.name for run in runs)), rows)


def commands(run: Run) -> list[Command]:
    """The commands that repeat the run, load its result, ask it and serve it; relative paths are as they were
    given."""
    config = run.config
    if not config:
        return []
    defaults, folder = _defaults(), str(config.get("output_dir"))
    flags = [
        shlex.join([f"--{name}", *map(str, value if isinstance(value, list) else [_words(value)])])
        for name, value in config.items()
        if name in defaults and defaults[name] != value
    ]
    ranks = number(run.about.get("ranks"))
    processes = 1 if np.isnan(ranks) else int(ranks)
    machines = max(1, len(dicts(run.about.get("launchers"))))
    nodes = "" if machines == 1 else f"--nnodes {machines} --node_rank RANK --master_addr ADDRESS "
    launch = [f"torchrun {nodes}--nproc_per_node {processes // machines} -m trainer.main", *flags]
    had = f"it had {processes} ranks in all"
    if machines > 1:
        had += f", on {machines} machines: start it on each, RANK 0 at ADDRESS"
    started_in = run.starts[-1].get("started_in") if run.starts else None
    if started_in:
        launch[0] = f"cd {shlex.quote(str(started_in))} && {launch[0]}"
    ask = ["python -m trainer.generate", f"--model_name_or_path {shlex.quote(folder)}"]
    if config.get("bf16") is False:
        ask.append("--bf16 False")
    return [
        Command(
            f"Repeat the run ({had}; another --output_dir keeps this one)",
            " \\\n    ".join(launch),
        ),
        Command("Load the result in Python", _loading(run, folder)),
        Command(
            "Ask it: a file of questions, or one",
            " ".join([*ask, "--data_path test.json", "--output predictions.jsonl"])
            + "\n"
            + " ".join([*ask, "--image cat.jpg", "--question", shlex.quote("Which breed is it?")]),
        ),
        Command("Serve it, by vLLM's documentation; not run here", _serving(run, folder)),
    ]


def _serving(run: Run, folder: str) -> str:
    """Commands of vLLM, to which an adapter goes merged: it takes none with modules trained beside it."""
    if run.about.get("has_own_code"):
        return "# Neither vLLM nor lmdeploy runs the code of XComposer2 in this folder: ask it as above."
    merge, served = "", shlex.quote(folder)
    if run.config.get("use_lora"):
        served = shlex.quote(f"{folder}-merged")
        merge = f"python -m trainer.export --merge {shlex.quote(folder)} {served} && "
    return f"{merge}vllm serve {served}"


def _loading(run: Run, folder: str) -> str:
    """Python that loads the model, or the adapter on its base, without this project."""
    auto_class = str(run.about.get("loads_with") or "AutoModelForCausalLM")
    base, own_code = str(run.config.get("model_name_or_path")), bool(run.about.get("has_own_code"))
    trust = ", trust_remote_code=True" if own_code else ""
    if run.config.get("use_lora") and own_code:
        lines = [
            "# Needs code in the base's folder that today's transformers can run. Once:",
            f"# python -m trainer.export --modernise {shlex.quote(base)} NEW_BASE --adapter "
            + shlex.quote(folder),
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            f"model = AutoPeftModelForCausalLM.from_pretrained({folder!r}{trust}).eval()",
        ]
    elif run.config.get("use_lora"):
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto_class}",
            "",
            f"base = {auto_class}.from_pretrained({base!r})",
            f"model = PeftModel.from_pretrained(base, {folder!r}).eval()",
        ]
    else:
        names = f"{auto_class}, AutoTokenizer" if own_code else auto_class
        lines = [
            f"from transformers import {names}",
            "",
            f"model = {auto_class}.from_pretrained({folder!r}{trust}).eval()",
        ]
    if own_code:
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r}{trust})",
            'answer, history = model.chat(tokenizer, "<ImageHere>Which breed is it?", image="cat.jpg")',
        ]
    return "\n".join(lines)
