"""How long a save stops training: ours in a thread, ours at once, HF Trainer's; 300 M parameters.

    python -m tests.benchmarks.save_stall --ranks 2 --folder /some/disk

Every way writes the model, in float32, and Adam's two moments; ours the float32 parameters a second time, and
checksums, and it waits for the disk. Output, a line a way: the stall (from the call to its return, on the
slowest rank), the time until the checkpoint is complete, and an optimizer step's time before and while it is
written. Ours are of the second save, because the first allocates the memory that all later ones reuse; its
stall is printed too. The same model, tokens, machine and disk, one after the other. HF Trainer needs
`pip install accelerate`; FULL_STATE_DICT is what it needs to write a folder that loads as a model.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.benchmarks.load_memory import make_checkpoint
from tests.tiny import run_ranks, word_tokenizer
from trainer.atomic import Jobs
from trainer.checkpoint import Checkpoints, resumable
from trainer.config import Config
from trainer.distributed import all_max, device_mesh, start
from trainer.lock import Lock
from trainer.loss import chunked_cross_entropy
from trainer.models import build_model, load_config, load_tokenizer, parts_of
from trainer.optim import adamw
from trainer.parallelize import parallelize
from trainer.weights import load_weights, save_model_folder

TOKENS = 16
STEPS_BEFORE = 3


def report(
    way: str,
    stall: float,
    complete: float,
    step: float,
    step_meanwhile: float | None = None,
    first_stall: float | None = None,
) -> None:
    device = torch.device("cpu")
    numbers = [
        all_max(value or 0.0, device) for value in (stall, complete, step, step_meanwhile, first_stall)
    ]
    if dist.get_rank() == 0:
        keys = ("stall", "complete", "step", "step_meanwhile", "first_stall")
        print(json.dumps({"way": way, **dict(zip(keys, numbers, strict=True))}), flush=True)


def timed(call: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def ours(model_folder: Path, output_dir: Path, asynchronous: bool) -> int:
    ranks = start()
    config = load_config(model_folder)
    parts = parts_of(config)
    with torch.device("meta"):
        model = build_model(config)
    mesh = device_mesh(ranks)
    model = parallelize(model, mesh, parts, Config(bf16=False, gradient_checkpointing=False))
    model.to_empty(device="cpu")
    load_weights(model, model_folder)
    model.init_buffers()
    model.loss_function = chunked_cross_entropy(1024)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(parts.unused))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw([{"params": list(trained.values())}], (0.9, 0.95), 1e-8, ranks.device)
    ids = torch.randint(3, 1000, (1, TOKENS))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def write_model(folder: Path, jobs: Jobs) -> None:
        save_model_folder(model, config, load_tokenizer(model_folder), parts, folder, torch.float32, {}, jobs)

    flags = Config(output_dir=str(output_dir), async_save=asynchronous)
    checkpoints = Checkpoints({}, flags, Lock(output_dir), steps_per_epoch=1, last_step=2)

    def save(number: int) -> None:
        checkpoints.save(number, write_model, resumable(trained, optimizer), {})

    before = min(timed(step) for _ in range(STEPS_BEFORE))
    first_stall = timed(partial(save, 1))
    checkpoints.wait()
    if ranks.rank == 0:
        shutil.rmtree(output_dir / "checkpoint-1")
    dist.barrier()
    started = time.perf_counter()
    stall = timed(partial(save, 2))
    meanwhile, saved = [], output_dir / "checkpoint-2"
    while asynchronous and all_max(
        float(checkpoints.newest != saved and not checkpoints.failed), ranks.device
    ):
        meanwhile.append(timed(step))
    checkpoints.wait()
    complete = time.perf_counter() - started
    assert (output_dir / "checkpoint-2" / "complete.json").exists()
    report(
        f"ours, {'in a thread' if asynchronous else 'at once'}",
        stall,
        complete,
        before,
        sum(meanwhile) / len(meanwhile) if meanwhile else None,
        first_stall,
    )
    return 0


def hf_trainer(model_folder: Path, output_dir: Path, state: str) -> int:
    from accelerate import DistributedType, PartialState  # type: ignore[import-not-found]
    from transformers import Trainer, TrainingArguments

    model = build_model(load_config(model_folder))
    model.load_state_dict(load_file(model_folder / "model.safetensors"))
    blocks = {type(model.model.layers[0]).__name__}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=True,
        max_steps=STEPS_BEFORE + 1,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=STEPS_BEFORE + 1,
        report_to="none",
        disable_tqdm=True,
        fsdp=True,
        fsdp_config={
            "version": 2,
            "transformer_layer_cls_to_wrap": list(blocks),
            "state_dict_type": state,
        },
    )
    # accelerate forgets about FSDP without a word where ranks have no accelerator.
    PartialState().distributed_type = DistributedType.MULTI_GPU
    ids = torch.randint(3, 1000, (TOKENS,))
    samples = [{"input_ids": ids, "labels": ids}] * 64
    trainer = Trainer(model=model, args=arguments, train_dataset=samples)
    assert trainer.accelerator.state.is_fsdp2, trainer.accelerator.state
    save, stalls, steps = trainer._save_checkpoint, [], []
    train = trainer.training_step

    def timed_save(*args: Any, **kwargs: Any) -> None:
        stalls.append(timed(partial(save, *args, **kwargs)))

    def noted_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(time.perf_counter())
        return train(*args, **kwargs)

    trainer._save_checkpoint, trainer.training_step = timed_save, noted_step
    trainer.train()
    report(f"HF Trainer, FSDP2, {state}", stalls[0], stalls[0], steps[-1] - steps[-2])
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", default=None, help="where to write; the temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        print(f"{make_checkpoint(folder / 'model'):,} parameters, {arguments.ranks} ranks")
        word_tokenizer(folder / "model")
        ways = [partial(ours, asynchronous=value) for value in (True, False)]
        ways += [partial(hf_trainer, state=value) for value in ("SHARDED_STATE_DICT", "FULL_STATE_DICT")]
        for way in ways:
            output, *_ = run_ranks(arguments.ranks, way, folder / "model", folder / "out", timeout=1200)
            print(next(line for line in output.splitlines() if line.startswith('{"way"')), flush=True)
            size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
            print(f"    {size / 1e9:.2f} GB written", flush=True)
            shutil.rmtree(folder / "out")


if __name__ == "__main__":
    main()
