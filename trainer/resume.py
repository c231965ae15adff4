"""Choose where a run resumes: at the newest complete checkpoint, if it belongs to the same training.

Input: the configuration, the description of the run (`describe_run`), and the content of output_dir. Output:
a `Start`, the same on every rank, or ValueError with one line for each reason why the run must not resume:

    output/checkpoint-30/    optimizer shard with a flipped byte     reported and skipped
    output/checkpoint-20/    complete                                Start(step=20, folder=…)
    output/                  no checkpoint                           Start(step=0), which is logged

A changed configuration is compared field by field with the checkpoint's `run.json`. What cannot change the
training (folders, workers, how often to save) is logged; other changes are refused, unless `--resume_anyway`
is given. The configuration declares which fields may change (`may_change`).
"""

import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from data.files import replace_file
from data.mixture import Source
from trainer.atomic import FINAL, MARKER, move_into, numbered
from trainer.checkpoint import damage, read_marker
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.job import is_main, log
from trainer.lock import identity
from trainer.models import answering_class
from trainer.prepare import Plan
from trainer.weights import base_checksum


@dataclass(frozen=True)
class Start:
    """The start of a run: `step` steps are already done, and `folder` is their checkpoint."""

    step: int = 0
    folder: Path | None = None
    finished: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's marker, with the `notes` that the loop gave to `Checkpoints.save`."""


def describe_run(config: Config, plan: Plan, ranks: Ranks) -> dict[str, Any]:
    """The content of run.json: the resolved configuration, the versions, and the data and model used."""
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),  # as json.loads will return it
        "model_type": plan.model_config.model_type,
        "loads_with": answering_class(plan.model_config).__name__,
        "has_own_code": any(path.suffix == ".py" for path in plan.parts.files),
        "parameters": plan.parameter_rows(config),
        "global_batch": plan.global_batch,
        "steps_per_epoch": plan.sampler.steps_per_epoch,
        "total_steps": plan.total_steps,
        "warmup_steps": plan.warmup_steps,
        "data_plan": _describe_data(plan.sources),
        "evaluation_plan": _describe_data(plan.evaluation.reader.sources) if plan.evaluation else [],
        "conversation_format": plan.reader.encoder.conversation.format,
        "image_processor": repr(plan.reader.image_processor),
        "base_checksum": base_checksum(Path(config.model_name_or_path)),
        "ranks": ranks.world,
        "launchers": _launchers(ranks),
        "device": ranks.device.type,
        "device_name": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _describe_data(sources: Sequence[Source]) -> list[dict[str, Any]]:
    samples = sum(source.num_samples for source in sources)
    return [
        {
            "source": source.name,
            "path": str(source.records.path),
            "records": len(source.records),
            "samples_per_epoch": source.num_samples,
            "share": source.num_samples / samples,
            "fingerprint": _fingerprint(source),
        }
        for source in sources
    ]


def with_starts(run: Mapping[str, Any], output_dir: Path, start: Start) -> dict[str, Any]:
    """`run` with "starts": when, after which step and on what the run was started, this time and before.

    The starts before are those in output_dir's run.json whose steps were not dropped from metrics.jsonl; none
    if this run does not go on from a checkpoint there.
    """
    earlier: list[dict[str, Any]] = []
    if start.folder and start.folder.resolve().parent == output_dir.resolve():
        try:
            content = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
            earlier = [entry for entry in content["starts"] if entry["step"] <= start.step]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a lack of history is no reason not to train
    this = {
        "step": start.step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "from": str(start.folder) if start.folder else None,
        "started_in": str(Path.cwd()),
        **{name: run[name] for name in ("ranks", "launchers", "device", "device_name", "versions")},
    }
    return {**run, "starts": [*earlier, this]}


def choose_start(config: Config, run: Mapping[str, Any]) -> Start:
    """Find where to resume; every rank calls it. ValueError lists the reasons not to, one per line."""
    output_dir = Path(config.output_dir)
    if is_main() and (output_dir / FINAL).is_dir():
        _finish_move(output_dir)
    # Rank 0 decides: a file server may show other machines an older state of the folder.
    shared: list[Any] = [(numbered(output_dir), _is_restarted(output_dir, run["launchers"]))]
    dist.broadcast_object_list(shared, src=0)
    found, restarted = shared[0]
    has = f"{output_dir} has {', '.join(path.name for path in found.values()) or 'no checkpoints'}"
    # Ranks that torchrun has restarted resume, regardless of --resume_from_checkpoint.
    wanted = "auto" if restarted and found else config.resume_from_checkpoint
    if wanted == "auto" and (output_dir / MARKER).is_file():
        marker = read_marker(output_dir)
        start = Start(marker["step"], output_dir, finished=True)
        patience, since_best = config.early_stopping_patience, _since_best(marker)
        if start.step >= run["total_steps"] or (patience is not None and since_best >= patience):
            _compare(output_dir, run, config.resume_anyway)
            log(f"{output_dir} holds the finished model of this run, after step {start.step}: nothing to do")
            return start
        if not found:
            raise ValueError(
                f"{output_dir} holds the finished model of step {start.step} of {run['total_steps']} and no "
                "checkpoint to resume from; name another --output_dir, or set --resume_from_checkpoint none "
                "to train from scratch and replace that model"
            )
    skipped: list[Path] = []
    folder = None
    if wanted == "auto":
        for candidate in found.values():
            if (problem := damage(candidate)) is None:
                folder = candidate
                break
            log(f"warning: {candidate} is skipped: {problem}")
            skipped.append(candidate)
        if found and folder is None:
            raise ValueError(
                f"none of the checkpoints in {output_dir} can be used; delete them, or name another "
                "--output_dir, to start from the beginning"
            )
    elif wanted != "none":
        folder = Path(wanted)
        if not folder.is_dir():
            raise ValueError(f"--resume_from_checkpoint {folder}: there is no such folder; {has}")
        if (problem := damage(folder)) is not None:
            raise ValueError(f"--resume_from_checkpoint: {problem}; name another checkpoint: {has}")
    marker = read_marker(folder) if folder else {"step": 0}
    start = Start(marker["step"], folder, notes=marker)
    for step, other in found.items():
        if step > start.step and other not in skipped:
            raise ValueError(
                f"{other} is from a later step than this run would start from ({start.step}), so a restart "
                "would resume from it; resume from it now with --resume_from_checkpoint auto, delete it, or "
                "name another --output_dir"
            )
    if folder:
        _compare(folder, run, config.resume_anyway)
        log(f"resuming from {folder}, after step {start.step} of {run['total_steps']}")
    else:
        log(f"starting from scratch: {has}")
    return start


def _launchers(ranks: Ranks) -> list[dict[str, Any]]:
    """The torchrun processes that started the ranks, one of each machine; none if it was not torchrun."""
    found: list[Any] = [None] * ranks.world
    is_first = ranks.local_rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ
    dist.all_gather_object(found, identity(os.getppid()) if is_first else None)
    return [launcher for launcher in found if launcher]


def _is_restarted(output_dir: Path, launchers: Sequence[dict[str, Any]]) -> bool:
    """Whether a torchrun process that started these ranks also made the last start in output_dir.

    torchrun's count of restarts does not tell: a machine that joins a run, or comes back, counts anew.
    """
    try:
        content = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
        return any(launcher in launchers for launcher in content["starts"][-1]["launchers"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _since_best(marker: Mapping[str, Any]) -> int:
    """Evaluations of a finished run since its best one."""
    return marker.get("evaluation", {}).get("since_best", 0)


def _finish_move(output_dir: Path) -> None:
    """Finish a move of the final model into output_dir that a killed run left half done."""
    if (output_dir / FINAL / MARKER).is_file():
        move_into(output_dir / FINAL, output_dir)
    else:
        (output_dir / FINAL).rmdir()


def drop_later_lines(path: Path, step: int) -> None:
    """Delete the lines of steps after `step` from metrics.jsonl; they will be written again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # cut off when the run was killed
    replace_file(path, *kept)


def set_aside(path: Path) -> None:
    """Rename the metrics.jsonl of an earlier attempt to metrics-1.jsonl, or to the next free number; a folder
    of its answers too."""
    if path.exists() and path.stat().st_size:
        names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
        free = next(name for name in names if not name.exists())
        path.rename(free)
        log(f"earlier metrics were moved to {free}")


def _compare(folder: Path, run: Mapping[str, Any], anyway: bool) -> None:
    """Log what has changed since the run that wrote `folder`; ValueError if that changes the training."""
    try:
        old = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        harmless, harmful = changes(old, run)
        kept, wanted = (config.get("optim_state", "float32") for config in (old["config"], run["config"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        harmless, harmful = [], [f"{folder / 'run.json'} cannot be read: {error}"]
        kept = wanted = None
    for change in harmless:
        log(f"since {folder}: {change}")
    if kept != wanted:
        raise ValueError(f"{folder} holds AdamW's moments in another format: set --optim_state {kept}")
    if harmful and not anyway:
        raise ValueError(
            "\n".join(
                [
                    f"{folder} belongs to a different training:",
                    *(f"  {change}" for change in harmful),
                    "change it back, or name another --output_dir; --resume_anyway True resumes all the same",
                ]
            )
        )
    for change in harmful:
        log(f"warning: resuming in spite of a change: {change}")


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(harmless, harmful) differences between two run.json files, a sentence each."""
    harmless, harmful = [], []
    may_change = {field.name for field in dataclasses.fields(Config) if field.metadata.get("may_change")}
    for name in sorted(old["config"].keys() & new["config"].keys()):
        if (was := old["config"][name]) != (now := new["config"][name]):
            (harmless if name in may_change else harmful).append(f"--{name} was {was} and is {now}")
    schedule = new["config"]["lr_scheduler_type"]
    for name in ("total_steps", "warmup_steps"):
        if old[name] != new[name]:
            unused = schedule == "constant" or (schedule == "constant_with_warmup" and name == "total_steps")
            where = harmless if unused else harmful
            where.append(f"{name} was {old[name]} and is {new[name]}, which changes the learning rate")
    if old["global_batch"] != new["global_batch"]:
        harmful.append(_batch_sentence(old["global_batch"], new))
    if "base_checksum" in old and old["base_checksum"] != new["base_checksum"]:
        harmful.append("the base model has other weights, so the frozen parameters would be different")
    for name, what in (
        ("conversation_format", "the conversation format"),
        ("image_processor", "how images become tensors"),
    ):
        if name in old and old[name] != new[name]:
            harmful.append(f"{what} has changed: {old[name]} then, {new[name]} now")
    harmful += _data_changes(old["data_plan"], new["data_plan"])
    if old["ranks"] != new["ranks"]:
        harmless.append(
            f"{old['ranks']} ranks then, {new['ranks']} now: the same batches in the same order, but dropout "
            "draws other masks, and sums are rounded in another order"
        )
    for name, version in new["versions"].items():
        if old["versions"].get(name) != version:
            harmless.append(f"{name} was {old['versions'].get(name)} and is {version}")
    return harmless, harmful


def _batch_sentence(batch: int, new: Mapping[str, Any]) -> str:
    """A sentence on how to keep a global batch of `batch` samples, on the current ranks and on any."""
    ranks, per_device = new["ranks"], new["config"]["per_device_train_batch_size"]
    share, rest = divmod(batch, ranks)
    if rest:
        fits = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        keep = f"{ranks} ranks cannot share {batch} evenly: use {fits} ranks"
    else:
        size = max(n for n in range(1, share + 1) if share % n == 0 and n <= max(per_device, 1))
        keep = f"keep it with --gradient_accumulation_steps {share // size}"
        if size != per_device:
            keep += f" --per_device_train_batch_size {size}"
    if new["config"].get("global_batch_size"):
        keep = f"keep it with --global_batch_size {batch}"
    else:
        keep += f", or --global_batch_size {batch}, which allows any number of ranks"
    return f"the global batch was {batch} samples and is {new['global_batch']}; {keep}"


def _data_changes(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(old) != len(new):
        return [f"the data had {len(old)} files and has {len(new)}"]
    found = []
    for was, now in zip(old, new, strict=True):
        for name in ("records", "samples_per_epoch", "fingerprint"):
            if was[name] != now[name]:
                what = (
                    "other records" if name == "fingerprint" else f"{name}: {was[name]} then, {now[name]} now"
                )
                found.append(f"the data of {now['path']} has changed: {what}")
                break
    return found


def _fingerprint(source: Source) -> str:
    """The fingerprint of the file without its modification time, so that a copy counts as the same data."""
    size, _, content = source.records.fingerprint.split("-")
    return f"{size}-{content}"
