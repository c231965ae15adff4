"""The model card of a trained folder: README.md with the metadata that the Hugging Face Hub reads.

Input: output_dir with the trained model or adapter, the content of run.json, and the model's evaluation in
metrics.jsonl, if any. Output: README.md there, which huggingface_hub's ModelCard loads:

    ---
    base_model: internlm-xcomposer2-vl-7b
    library_name: transformers
    pipeline_tag: image-text-to-text
    datasets: [pets]
    model-index: …                                              # the metrics of the evaluation
    ---
    # pets
    A fine-tune of internlm-xcomposer2-vl-7b, trained with xcomposer-fsdp.
    …                                                           # data, settings, evaluation, code to load it

The last line of the file holds a checksum of the others: a README.md whose checksum is not right was written
or edited by somebody, and is never replaced.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load
from transformers import PreTrainedConfig

from data.files import replace_file
from trainer.job import log
from trainer.models import Parts, answering_class

CARD = """---
{metadata}
---

# {name}

{what} {base}, trained with xcomposer-fsdp.

| data | records | samples per epoch |
|---|---|---|
{data}

Steps: {step:,}; samples per step: {run[global_batch]:,}, of at most {flags[max_length]:,} tokens.
Peak learning rate {flags[learning_rate]:g}, schedule {flags[lr_scheduler_type]}.
torch {run[versions][torch]}, transformers {run[versions][transformers]}.
{evaluation}
```python
{usage}
```

"""
EVALUATION = """
Evaluation after step {step:,}; loss: {loss}.

| data | metric | value |
|---|---|---|
{results}
"""
MARK = "<!-- Written by xcomposer-fsdp, checksum {}: an edited file is never replaced. -->\n"


def write_card(
    output_dir: Path, run: Mapping[str, Any], step: int, config: PreTrainedConfig, parts: Parts
) -> None:
    """Write README.md for the final model in `output_dir`; a warning if that is impossible.

    run: the content of run.json; step: after which the model is; config, parts: of the model, or of an
    adapter's base.
    """
    path = output_dir / "README.md"
    try:
        if path.exists() and not is_ours(path.read_text(encoding="utf-8")):
            log(f"{path} is kept: it was not written here, or was edited since")
            return
        text = model_card(output_dir, run, step, config, parts)
        replace_file(path, (text + MARK.format(_checksum(text))).encode())
    except (OSError, ValueError) as error:
        log(f"warning: {path} is not written: {error}")


def is_ours(text: str) -> bool:
    """Whether a card is as `write_card` wrote it."""
    body, separator, last = text.rstrip("\n").rpartition("\n")
    return last == MARK.format(_checksum(body + separator)).rstrip("\n")


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_card(
    output_dir: Path, run: Mapping[str, Any], step: int, config: PreTrainedConfig, parts: Parts
) -> str:
    """The text of the card, without its last line; arguments as in `write_card`."""
    flags, name = run["config"], output_dir.resolve().name
    folder = Path(flags["model_name_or_path"])
    base, is_adapter = model_id(folder), flags["use_lora"]
    has_code = any(path.suffix == ".py" for path in parts.files)
    task = "image-text-to-text" if parts.vision_blocks else "text-generation"
    evaluation = last_evaluation(output_dir / "metrics.jsonl", step)
    losses = {source: {"loss": loss} for source, loss in evaluation.get("loss_by_source", {}).items()}
    results = [
        EvalResult(task, source, source, metric, value)
        for by_source in (losses, evaluation.get("metrics", {}))
        for source, metrics in by_source.items()
        for metric, value in metrics.items()
        if value is not None
    ]
    tags = [f"base_model:adapter:{base}", "lora", "transformers"] if is_adapter else []
    metadata = ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(Path(source["path"]).stem for source in run["data_plan"])),
        library_name="peft" if is_adapter else "transformers",
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=name if results else None,
        eval_results=results or None,
        pipeline_tag=task,
        tags=[*tags, *["custom_code"] * has_code, "xcomposer-fsdp"],
        **license_of(folder, config),
    )
    loader = "AutoProcessor" if parts.vision_blocks and not has_code else "AutoTokenizer"
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        what="A LoRA adapter for" if is_adapter else "A fine-tune of",
        base=base,
        data=_rows((Path(s["path"]).stem, s["records"], s["samples_per_epoch"]) for s in run["data_plan"]),
        step=step,
        run=run,
        flags=flags,
        evaluation=_evaluation_section(evaluation, results),
        usage=_usage(name, base, is_adapter, answering_class(config).__name__, loader, has_code),
    )


def _evaluation_section(evaluation: Mapping[str, Any], results: Sequence[EvalResult]) -> str:
    if not evaluation:
        return ""
    loss = evaluation["loss"]  # null in the file if it was not finite
    return EVALUATION.format(
        step=evaluation["step"],
        loss="not finite" if loss is None else f"{loss:.4g}",
        results=_rows((r.dataset_name, r.metric_type, f"{r.metric_value:.4g}") for r in results),
    )


def _rows(rows: Iterable[Iterable[Any]]) -> str:
    """The rows of a table in Markdown."""
    cells = ([str(cell).replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _usage(name: str, base: str, is_adapter: bool, auto_class: str, loader: str, has_code: bool) -> str:
    """Code that loads the folder."""
    trust = ", trust_remote_code=True" if has_code else ""
    source = base if is_adapter else name
    lines = [
        *["from peft import PeftModel"] * is_adapter,
        f"from transformers import {', '.join(sorted((auto_class, loader)))}",
        "",
        f'model = {auto_class}.from_pretrained("{source}"{trust})',
        *[f'model = PeftModel.from_pretrained(model, "{name}")'] * is_adapter,
        f'{loader.removeprefix("Auto").lower()} = {loader}.from_pretrained("{source}"{trust})',
    ]
    return "\n".join(lines)


def model_id(folder: Path) -> str:
    """The Hub's name of a folder in its cache, …/models--internlm--xcomposer/…, else the folder's own."""
    cached = [part for part in folder.absolute().parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else folder.resolve().name


def license_of(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """The base's licence as metadata, if its README.md or its config.json states one."""
    try:
        stated = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        stated = {}
    found = {key: stated[key] for key in ("license", "license_name", "license_link") if key in stated}
    return found or {"license": getattr(config, "license", None)}


def last_evaluation(path: Path, step: int) -> dict[str, Any]:
    """The last line of kind "eval" up to a step in a metrics.jsonl; empty if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    evaluations = [line for line in map(json.loads, lines) if line["kind"] == "eval" and line["step"] <= step]
    return evaluations[-1] if evaluations else {}
