"""Verify that a model trains exactly as it should: `python -m trainer.verify MODEL [data.txt]`.

Input: a model folder and, if given, data, of which the shortest samples with and without a picture are used;
otherwise such samples are made. Output: a table, and the same as JSON:

    check         what is equal                                                    measured   at most
    logits        training's and the class's own                                    3.1e-08     1e-04   pass
    ranks         one rank, and two of which one has text alone                     1.2e-07     1e-04   pass
    resumed       the weights of a resumed run and of an uninterrupted one                0         0   pass
    …

The first five checks are those of every run (trainer/check_model.py). The others compare short runs of
`trainer.main` with each other, and the folders that they save with transformers and peft, all in float32.
That takes some 20 bytes of memory per parameter, and 50 of disk space in TMPDIR; `--tiny True` verifies a
small random model of the same family.

Exit status: 0 all passed; 1 a check failed; 2 bad input.
"""

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import trainer.models
from data.config import DataConfig
from data.errors import DataError
from data.flags import ConfigError, parse_flags
from data.loader import SampleReader
from data.mixture import read_mixture
from data.reader import open_reader
from trainer.check_model import ROUNDING, Check, check_model, shortest_samples
from trainer.config import parse
from trainer.distributed import Ranks, device_mesh, finish, start
from trainer.evaluate import without_dropout
from trainer.generate import load_model as load_for_answers
from trainer.job import BAD_INPUT, FAILED
from trainer.loss import chunked_cross_entropy
from trainer.model_files import load_model
from trainer.models import load_config, own_arguments, parts_of
from trainer.models.shrink import shrink
from trainer.parallelize import allocate, parallelize
from trainer.prepare import Plan, make_plan
from trainer.rehearsal import all_sizes, read_batch
from trainer.trainable import part_of

LIMIT = ROUNDING[torch.float32]
STEPS, SAVED = 3, 2
"""Steps of a run, and the one after which it saves a checkpoint, whose loss is that of the next step."""
BYTES_PER_PARAMETER = 20
"""Weights, gradients and both moments in float32, and a gathered or loaded copy."""
WHAT = {
    "tokens": "a picture's tokens by its header and by its pixels",
    "logits": "training's and the class's own",
    "leak": "losses beside samples with other words",
    "packed": "losses of samples packed together and alone",
    "gradients": "parameters that train without a gradient",
    "packed gradients": "gradients of samples packed together and alone",
    "ranks": "one rank, and two of which one has text alone",
    "accumulated": "one micro-batch, and two accumulated",
    "resumed": "weights of a resumed run and of an uninterrupted one",
    "saved": "losses of the run, and of its saved model in transformers",
    "adapter": "losses of the run, and of its saved adapter in peft",
}


@dataclass
class Settings:
    """Verify that a model trains exactly: `python -m trainer.verify MODEL [data.txt]`."""

    model_name_or_path: str = ""
    """Folder of the model."""
    data_path: str | None = None
    """data.txt, or one .json / .jsonl file; by default samples are made."""
    image_root: str | None = None
    """Folder that image paths are relative to; by default each JSON file's own."""
    chat_template: str | None = None
    """File of a chat template, for a model that has none."""
    max_length: int = 4096
    """Most tokens of a sample."""
    tiny: bool = False
    """Verify a small random model of the same family: same class, tokenizer and processor, other sizes."""
    output: str = "verify.json"
    """File for the results."""

    def problems(self) -> list[str]:
        found = []
        if not Path(self.model_name_or_path).is_dir() or not self.model_name_or_path:
            found.append(f"the model {self.model_name_or_path or '(missing)'}: there is no such folder")
        for name in ("data_path", "chat_template"):
            if (path := getattr(self, name)) is not None and not Path(path).is_file():
                found.append(f"--{name} {path}: there is no such file")
        return found


# --- what is verified ------------------------------------------------------------------------------------


def prepare(settings: Settings, folder: Path) -> Path:
    """Write to `folder` the tiny model, if one is wanted, and `data.json`: a sample with a picture, if the
    model takes any, and one without. Returns the model's folder; ValueError or OSError for bad input."""
    model = Path(settings.model_name_or_path).absolute()
    if settings.tiny:
        shrink(model, folder / "model")
        model = folder / "model"
    parts = parts_of(load_config(model))
    levels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    Image.fromarray(levels).save(folder / "picture.png")
    picture = _record(("<ImageHere>What is it?", "It is a cat."), [str(folder / "picture.png")])
    text = _record(("How many dogs are there?", "Two dogs, and both of them are brown."))
    if settings.data_path:
        reader = reader_of(settings, model, settings.data_path)
        for number, index in shortest_samples(reader, all_sizes(reader, None)) or ():
            source = reader.sources[number]
            sample = source.sample(index)
            images = [str((source.image_root / path).absolute()) for path in sample.images]
            record = {"image": images, "conversations": [{"from": r, "value": v} for r, v in sample.turns]}
            picture, text = (record, text) if images else (picture, record)
    records = [picture, text] if parts.vision else [_record(("Is the sky blue?", "Yes, it is.")), text]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return model


def reader_of(settings: Settings, model: Path, data_path: str) -> SampleReader:
    """A reader of the samples of data.txt or a JSON file for the model."""
    config = DataConfig(
        model_name_or_path=str(model),
        data_path=data_path,
        chat_template=settings.chat_template,
        max_length=settings.max_length,
    )
    sources = read_mixture(data_path, image_root=settings.image_root, skip_bad=True)
    return open_reader(config, sources, trainer.models)[0]


def _record(turns: Sequence[str], images: Sequence[str] = ()) -> dict[str, Any]:
    said = [{"from": role, "value": text} for role, text in zip(("user", "assistant"), turns, strict=True)]
    return {"image": list(images), "conversations": said}


def flags_of(settings: Settings, model: Path, folder: Path, name: str, **changes: Any) -> list[str]:
    """The flags of a run of STEPS steps, of both samples each, that saves to `folder`/`name`."""
    takes_pictures = bool(parts_of(load_config(model)).vision)
    values = {
        "model_name_or_path": model,
        "data_path": folder / "data.json",
        "output_dir": folder / name,
        "chat_template": settings.chat_template,
        "max_length": settings.max_length,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "bf16": False,
        "fix_vit": not takes_pictures,
        "fix_sampler": not takes_pictures,
        "plora_dropout": 0,
        "dataloader_num_workers": 0,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "save_dtype": "float32",
        "deterministic": True,
        "check_model": False,  # done once, here
        "rehearse": False,
        "report": False,
        "forecast": False,
    } | changes
    return [word for flag, value in values.items() if value is not None for word in (f"--{flag}", str(value))]


# --- in this process -------------------------------------------------------------------------------------


def verify_model(plan: Plan, config: Any, ranks: Ranks) -> list[Check]:
    """The checks of every run, and packed gradients, on the whole model in this process."""
    model: Any = parallelize(plan.model, device_mesh(ranks), plan.parts, config)
    allocate(model, ranks.device, cpu_offload=False)
    load_model(model, plan, config)
    model.loss_function = chunked_cross_entropy(config.loss_chunk_tokens)
    checks = check_model(model, plan, config, ranks.device)
    if all(check.passed for check in checks):
        checks.append(packed_gradients(model, plan, ranks.device))
    return checks


def packed_gradients(model: Any, plan: Plan, device: torch.device) -> Check:
    """Compared by part of the model, so that the tower's gradient counts as much as the language model's."""

    def gradients(batches: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Tensor]:
        for samples in batches:
            model(**read_batch(plan.reader, samples, packed=True).to(device).inputs).loss.backward()
        found: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(part_of(name, plan.parts), []).append(parameter.grad.to_local().flatten())
        model.zero_grad(set_to_none=True)
        return {part: torch.cat(tensors) for part, tensors in found.items()}

    with without_dropout(model):
        ours, theirs = gradients([[(0, 0), (0, 1)]]), gradients([[(0, 0)], [(0, 1)]])
    gaps = {part: ((ours[part] - theirs[part]).norm() / theirs[part].norm()).item() for part in theirs}
    worst = max(gaps, key=lambda part: gaps[part])
    return Check("packed gradients", gaps[worst], LIMIT, f"those of {worst} differ the most")


# --- runs of the trainer -----------------------------------------------------------------------------------


class RunFailedError(Exception):
    """A run ended with another status than 0."""


def train(num_ranks: int, flags: Sequence[str]) -> None:
    """Run the trainer, as a user would; RunFailedError with its last error."""
    launcher = f"trainer.launch --standalone --nproc_per_node {num_ranks} -m".split()
    command = [sys.executable, "-m", *(launcher if num_ranks > 1 else ()), "trainer.main"]
    of_this_process = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in of_this_process}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        errors = [line for line in lines if "error:" in line.lower()]
        raise RunFailedError(f"status {done.returncode}: {(errors or lines)[-1]}")


def verify_runs(settings: Settings, model: Path, folder: Path) -> list[Check]:
    """Runs that must train alike, and the folders that they save."""
    checks: list[Check] = []

    def run(name: str, num_ranks: int = 1, **changes: Any) -> None:
        print(f"training: {name}", file=sys.stderr, flush=True)
        train(num_ranks, flags_of(settings, model, folder, name, **changes))

    def check(name: str, measure: Callable[[], float], limit: float = LIMIT) -> None:
        try:
            checks.append(Check(name, measure(), limit, ""))
        except Exception as error:  # whatever transformers and peft raise for a folder that does not load
            why = str(error) if isinstance(error, RunFailedError) else f"{type(error).__name__}: {error}"
            checks.append(Check(name, math.nan, limit, " ".join(why.split())))

    def compared(name: str, num_ranks: int = 1, **changes: Any) -> float:
        run(name, num_ranks, **changes)
        return difference(metrics(folder / name), metrics(folder / "one"))

    def resumed() -> float:
        run("resumed", resume_from_checkpoint=folder / "one" / f"checkpoint-{SAVED}")
        ours, theirs = weights_in(folder / "resumed"), weights_in(folder / "one")
        both = ours.keys() & theirs.keys()
        return len(ours.keys() ^ theirs.keys()) + sum(not torch.equal(ours[n], theirs[n]) for n in both)

    def saved(name: str, **changes: Any) -> float:
        if not (folder / name).exists():
            run(name, save_strategy="steps", save_steps=SAVED, **changes)
        reader = reader_of(settings, model, str(folder / "data.json"))
        ours = metrics(folder / name)[SAVED]["loss"]
        return abs(loss_outside(reader, folder / name / f"checkpoint-{SAVED}") - ours) / abs(ours)

    check("saved", lambda: saved("one"))
    if torch.accelerator.device_count() == 1:
        print("ranks: not verified, as two ranks need two accelerators", file=sys.stderr)
    else:
        check("ranks", lambda: compared("two", num_ranks=2, per_device_train_batch_size=1))
    split = {"packing": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    check("accumulated", lambda: compared("accumulated", **split))
    check("resumed", resumed, limit=0)
    lora = {"use_lora": True, "lora_r": 4, "lora_dropout": 0, "fix_vit": True, "save_dtype": None}
    check("adapter", lambda: saved("adapter", **lora))
    return checks


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's steps."""
    if not (run / "metrics.jsonl").is_file():
        raise RunFailedError(f"the run {run.name} failed")
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == "train"]


def difference(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> float:
    """The largest relative difference between losses, and between norms of gradients, of any step."""
    return max(
        abs(a[name] - b[name]) / abs(b[name])
        for a, b in zip(ours, theirs, strict=True)
        for name in ("loss", "grad_norm")
    )


def weights_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@torch.no_grad()
def loss_outside(reader: SampleReader, folder: Path) -> float:
    """The mean loss over the supervised tokens of all samples, by the class's own forward on a model that
    transformers has loaded, or peft if the folder holds an adapter."""
    model, _ = load_for_answers(folder, None, torch.float32)
    total, count = 0.0, 0
    for index in range(len(reader.sources[0].records)):
        inputs = read_batch(reader, [(0, index)]).inputs
        logits = model(**own_arguments(model.config, inputs), use_cache=False).logits[0].float()
        total += F.cross_entropy(logits[inputs["supervised"]], inputs["targets"], reduction="sum").item()
        count += len(inputs["targets"])
    return total / count


# --- the report --------------------------------------------------------------------------------------------


def table(checks: Sequence[Check]) -> str:
    lines = [f"{'check':<18}{'what is equal':<62}{'measured':>9}{'at most':>10}"]
    for check in checks:
        measured, limit = (
            f"{check.measured:.1e}" if check.limit else f"{check.measured:g}",
            f"{check.limit:g}",
        )
        verdict = "pass" if check.passed else f"FAIL   {check.problem}"
        lines.append(f"{check.name:<18}{WHAT[check.name]:<62}{measured:>9}{limit:>10}   {verdict}")
    return "\n".join(lines)


def report(settings: Settings, checks: Sequence[Check]) -> dict[str, Any]:
    return {
        "model": settings.model_name_or_path,
        "tiny": settings.tiny,
        "passed": all(check.passed for check in checks),
        "checks": [
            asdict(check)
            | {"measured": check.measured if math.isfinite(check.measured) else None}
            | {"what": WHAT[check.name], "passed": check.passed}
            for check in checks
        ],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def memory_problem(plan: Plan, device: torch.device) -> str | None:
    """A sentence if this machine cannot train the whole model in float32."""
    needed = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in plan.model.parameters())
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[1]
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed <= available:
        return None
    return (
        f"training this model in float32 takes {needed / 1e9:.0f} GB, and there are {available / 1e9:.0f}: "
        "use --tiny True, which verifies a small model of the same family"
    )


def verify(settings: Settings, folder: Path) -> list[Check]:
    """All checks; DataError for bad input."""
    try:
        model = prepare(settings, folder)
        config = parse(flags_of(settings, model, folder, "checked"))
    except (ValueError, OSError) as error:
        raise DataError(*str(error).splitlines()) from error
    ranks = start()
    try:
        plan = make_plan(config, ranks)
        if plan is None:
            raise DataError("the model or the data cannot be used: see above")
        if problem := memory_problem(plan, ranks.device):
            raise DataError(problem)
        checks = verify_model(plan, config, ranks)
    finally:
        finish()
    del plan  # and with it the model
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return [*checks, *verify_runs(settings, model, folder)]


def main(argv: Sequence[str] | None = None) -> int:
    """Verify, print the table and write the JSON file; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    for position, flag in ((0, "--model_name_or_path"), (2, "--data_path")):
        if len(words) > position and not words[position].startswith("-"):
            words.insert(position, flag)
    try:
        settings = parse_flags(Settings, words, "trainer.verify")
        with tempfile.TemporaryDirectory() as folder:
            checks = verify(settings, Path(folder))
    except (ConfigError, DataError) as error:
        print("\n".join(f"error: {problem}" for problem in str(error).splitlines()), file=sys.stderr)
        return BAD_INPUT
    print(table(checks))
    result = report(settings, checks)
    Path(settings.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{'all passed' if result['passed'] else 'NOT all passed'}; also in {settings.output}")
    return 0 if result["passed"] else FAILED


if __name__ == "__main__":
    sys.exit(main())
