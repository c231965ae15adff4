"""Our trainer beside HF Trainer (DDP, FSDP2) and TRL's SFTTrainer: the same model, samples and global batch.

    pip install -e '.[test,bench]'
    python -m tests.benchmarks.compare --output output/compare
    python -m tests.benchmarks.compare --workloads realistic,lora --peers hf_ddp --dtype fp32 --rounds 5
    python -m tests.benchmarks.compare --family qwen2_5_vl --workloads realistic

Output: a table a workload, compare.json (every run of every system) and compare.png in --output.

Every run is a torchrun of its own, as a user would start it: `-m trainer.main`, or a peer of peers.py. The
systems take turns, and each round begins with another one. Seconds a step are the mean over the steps behind
the warm-up; tokens count without padding. Memory is that of the rank that used most, over the whole run:
"all" with the program itself, "own" beyond what the program's imports alone take (on an accelerator both are
what its allocator gave out).

A comparison is void, and ends with a sentence, unless all systems see the same samples in every step and
their losses of the first step agree: to 1e-5 of the loss in fp32, 2e-3 in bf16 (autocast and FSDP round in
other places).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from data.sampler import StepSampler
from tests.benchmarks import peers
from tests.benchmarks.watch import watch
from tests.benchmarks.workloads import MODELS, WORKLOADS, Workload, make_data
from tests.tiny import ROOT, read_metrics

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
SELECTIVE = "ours_selective"
"""Ours with `--gradient_checkpointing selective`, which HF Trainer and accelerate do not have."""
PROGRAMS = {
    "ours": "trainer.main",
    SELECTIVE: "trainer.main",
    "trl": "datasets, trl.trainer.sft_trainer, tests.benchmarks.peers",
}
"""What a system imports; the others import peers.py alone."""

Run = dict[str, Any]
"""A row of compare.json."""


class VoidError(Exception):
    """The systems did not do the same work."""


def our_arguments(
    options: argparse.Namespace, system: str, model: Path, data: Path, output: Path, workload: Workload
) -> list[Any]:
    """trainer.main with what the peers are told too; its own defaults for the rest."""
    checkpointing = "selective" if system == SELECTIVE else options.gradient_checkpointing
    flags = f"""
        --model_name_or_path {model} --data_path {data} --output_dir {output} --max_steps {options.steps}
        --per_device_train_batch_size {options.batch} --max_length {peers.MAX_LENGTH} --seed {peers.SEED}
        --learning_rate {peers.LEARNING_RATE} --lr_scheduler_type constant --plora_dropout 0
        --bf16 {options.dtype == "bf16"} --gradient_checkpointing {checkpointing}
        --dataloader_num_workers {peers.NUM_WORKERS} --save_strategy no --rehearse False
        --forecast False
    """
    flags += f"--fix_sampler {workload.fix_projector}"
    if workload.lora:
        flags += (
            f" --use_lora True --lora_r {peers.LORA_RANK} --lora_alpha {peers.LORA_RANK} --lora_dropout 0"
        )
    return ["-m", "trainer.main", *flags.split(), *options.ours.split()]


def peer_arguments(
    options: argparse.Namespace, peer: str, model: Path, data: Path, output: Path, workload: Workload
) -> list[Any]:
    flags = ["-m", "tests.benchmarks.peers", "--peer", peer, "--model", model, "--data", data]
    flags += [
        "--output",
        output,
        "--steps",
        options.steps,
        "--batch",
        options.batch,
        "--dtype",
        options.dtype,
    ]
    flags += ["--lora"] * workload.lora + ["--gradient_checkpointing"] * options.gradient_checkpointing
    return flags


def run(options: argparse.Namespace, system: str, model: Path, data: Path, workload: Workload) -> Run:
    """One job of one system."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        if system in ("ours", SELECTIVE):
            arguments = our_arguments(options, system, model, data, output, workload)
        else:
            arguments = peer_arguments(options, system, model, data, output, workload)
        usage = watch(
            arguments,
            output / "metrics.jsonl",
            steps=options.steps,
            warm_up=options.warm_up,
            ranks=options.ranks,
        )
        lines = read_metrics(output)
    result: Run = {
        "system": system,
        "load_before": load,
        "seconds": [line["seconds_step"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "mfu": [line.get("mfu") for line in lines],  # ours, with --measure_mfu
        "flops": [line.get("model_flops_vision", 0) + line.get("model_flops_language", 0) for line in lines],
        "tokens": [line["tokens"] for line in lines],
        "supervised_tokens": [line["supervised_tokens"] for line in lines],
        "cpu_seconds_step": usage.cpu_seconds / (options.steps - options.warm_up),
        "samples": [line.get("samples_seen") for line in lines],
    }
    if torch.accelerator.is_available():
        peak = max(line["memory_peak_bytes"] for line in lines)
        return result | {"memory_all": peak, "memory_own": peak}
    program = footprint(system)
    return result | {
        "memory_all": usage.resident_bytes,
        "memory_own": usage.private_bytes - program,
    }


def footprint(system: str, known: dict[str, int] = {}) -> int:  # noqa: B006 (a cache)
    """Private bytes of a process that has imported what `system` imports, and done nothing."""
    program = PROGRAMS.get(system, "tests.benchmarks.peers")
    if program not in known:
        code = (
            f"import {program}; from tests.benchmarks.watch import process_memory; print(process_memory()[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        known[program] = int(done.stdout.split()[-1])
    return known[program]


def expected_samples(model: Path, data: Path, steps: int, global_batch: int) -> list[list[int]]:
    """What every step must train on: the sorted CRC-32 of its samples."""
    reader = peers.open_data(model, data)
    sampler = StepSampler(reader.sources, peers.SEED, global_batch)
    crcs = [
        [peers.crc(reader.read(source, record, decode=False)[0].input_ids) for source, record in rows]
        for rows in (sampler.samples(step) for step in range(steps))
    ]
    return [sorted(step) for step in crcs]


def padding_share(model: Path, data: Path, options: argparse.Namespace) -> float:
    """Of the positions of the peers' batches, how many are padding."""
    reader = peers.open_data(model, data)
    samples = peers.Samples(reader, options.steps, options.batch * options.ranks).order
    lengths = [len(reader.read(*sample, decode=False)[0].input_ids) for sample in samples]
    batches = [lengths[i : i + options.batch] for i in range(0, len(lengths), options.batch)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def check_same_work(runs: list[Run], expected: list[list[int]], dtype: str) -> None:
    """VoidError unless all runs saw the same samples in each step and began with the same loss."""
    first = runs[0]
    for other in runs:
        if other["samples"][0] is not None and other["samples"] != expected:
            raise VoidError(f"{other['system']} did not train on the planned samples of each step")
        for what in ("tokens", "supervised_tokens"):
            if other[what] != first[what]:
                raise VoidError(
                    f"{what} of the steps differ: {first['system']} {first[what]}, "
                    f"{other['system']} {other[what]}"
                )
        difference = abs(other["losses"][0] / first["losses"][0] - 1)
        if not difference <= TOLERANCE[dtype]:
            raise VoidError(
                f"the first losses differ by {difference:.1e}, over {TOLERANCE[dtype]:.0e}: "
                f"{first['system']} {first['losses'][0]:.6f}, {other['system']} {other['losses'][0]:.6f}"
            )


def summary(runs: list[Run], warm_up: int) -> dict[str, dict[str, float]]:
    """System → medians over its rounds."""
    found: dict[str, dict[str, float]] = {}
    for system in dict.fromkeys(run["system"] for run in runs):
        own = [run for run in runs if run["system"] == system]
        seconds = [statistics.mean(run["seconds"][warm_up:]) for run in own]
        tokens = statistics.mean(own[0]["tokens"][warm_up:])
        found[system] = {
            "seconds_step": statistics.median(seconds),
            "seconds_least": min(seconds),
            "seconds_most": max(seconds),
            "tokens_per_second": tokens / statistics.median(seconds),
            "last_loss": statistics.median(run["losses"][-1] for run in own),
            **{
                name: statistics.median(run[name] for run in own)
                for name in ("cpu_seconds_step", "memory_all", "memory_own")
            },
        }
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The medians; × is ours over the peer in tokens a second, and in memory."""
    ours = found["ours"]
    lines = [
        "| system | seconds a step (least to most) | tokens/s | ours is | CPU s a step "
        "| peak MB, all | ours takes | peak MB, own | ours takes | last loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for system, row in found.items():
        lines.append(
            f"| {system} | {row['seconds_step']:.3f} "
            f"({row['seconds_least']:.3f} to {row['seconds_most']:.3f}) "
            f"| {row['tokens_per_second']:,.0f} "
            f"| {ours['tokens_per_second'] / row['tokens_per_second']:.2f} × "
            f"| {row['cpu_seconds_step']:.2f} | {row['memory_all'] / 1e6:,.0f} "
            f"| {ours['memory_all'] / row['memory_all']:.2f} × | {row['memory_own'] / 1e6:,.0f} "
            f"| {ours['memory_own'] / row['memory_own']:.2f} × | {row['last_loss']:.4f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], file: Path) -> None:
    """Tokens a second and peak memory, a group of bars a workload."""
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found]

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
    systems = list(dict.fromkeys(s for result in results.values() for s in result["summary"]))
    width = 0.8 / len(systems)
    for axis, field, scale, label in (
        (axes[0], "tokens_per_second", 1.0, "tokens a second, padding not counted"),
        (axes[1], "memory_own", 1e6, "peak MB of a rank, beyond the imports"),
    ):
        for number, system in enumerate(systems):
            values = [r["summary"].get(system, {}).get(field, 0) / scale for r in results.values()]
            axis.bar([i + number * width for i in range(len(results))], values, width, label=system)
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(results))], list(results))
        axis.set_ylabel(label)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def compare(
    options: argparse.Namespace,
    workload: Workload,
    folder: Path,
    picture: tuple[int, int] = (320, 240),
    runs: list[Run] | None = None,
) -> dict[str, Any]:
    """All rounds of one workload on the model in folder/model; picture: (width, height) of its pictures.

    `runs` collects the runs; given by a caller that needs those which ended before one fails.
    """
    model = folder / "model"
    global_batch = options.batch * options.ranks
    num_samples = options.steps * global_batch
    data = make_data(folder / "data", workload.shapes, num_samples, picture=picture)
    expected = expected_samples(model, data, options.steps, global_batch)
    systems = ["ours", *options.peers]
    runs = [] if runs is None else runs
    for number in range(options.rounds):
        turn = number % len(systems)
        for system in systems[turn:] + systems[:turn]:
            runs.append({"round": number, **run(options, system, model, data, workload)})
            check_same_work(runs, expected, options.dtype)
            seconds = statistics.mean(runs[-1]["seconds"][options.warm_up :])
            print(
                f"  round {number}, {system}: {seconds:.3f} s a step, "
                f"first loss {runs[-1]['losses'][0]:.5f}, {runs[-1]['memory_all'] / 1e6:,.0f} MB, "
                f"load {runs[-1]['load_before']:.1f}",
                flush=True,
            )
    found = summary(sorted(runs, key=lambda run: systems.index(run["system"])), options.warm_up)
    padding = padding_share(model, data, options)
    return {"what": workload.what, "padding_of_peers": padding, "summary": found, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", choices=MODELS, default="xcomposer2", help="whose model")
    parser.add_argument("--workloads", default="realistic,equal,multi_image,lora,text")
    parser.add_argument("--peers", help="the other systems (default: all that train the family)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="bf16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm_up", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--batch", type=int, default=4, help="samples a rank and step")
    parser.add_argument("--ranks", type=int, default=torch.accelerator.device_count() or 2)
    parser.add_argument("--no_gradient_checkpointing", dest="gradient_checkpointing", action="store_false")
    parser.add_argument("--ours", default="", help="more flags of trainer.main, for our system alone")
    parser.add_argument("--output", type=Path, default=Path("output/compare"))
    options = parser.parse_args()
    family = MODELS[options.family]
    others = [SELECTIVE, *family.peers]
    options.peers = others if options.peers is None else [peer for peer in options.peers.split(",") if peer]
    for chosen, known in ((options.workloads.split(","), WORKLOADS), (options.peers, others)):
        if unknown := set(chosen) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    if not 0 < options.warm_up < options.steps:
        parser.error("--warm_up must be from 1 to below --steps")
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    about = {key: str(value) for key, value in vars(options).items()} | {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.accelerator.current_accelerator(check_available=True).type
        if torch.accelerator.is_available()
        else "cpu",
        "torch": torch.__version__,
    }
    for name in options.workloads.split(","):
        workload = WORKLOADS[name]
        with tempfile.TemporaryDirectory() as folder:
            family.make(Path(folder) / "model")
            print(f"{options.family}, {name}, {options.dtype}: {workload.what}", flush=True)
            try:
                results[name] = compare(options, workload, Path(folder), family.picture)
            except VoidError as error:
                raise SystemExit(f"the comparison is void: {error}") from error
        result = results[name]
        print(f"{result['padding_of_peers']:.0%} of the peers' positions are padding")
        print(table(result["summary"]), flush=True)
        (options.output / "compare.json").write_text(json.dumps({"about": about, "workloads": results}))
        plot(results, options.output / "compare.png")
    print(f"\n{options.output}/compare.json, compare.png")


if __name__ == "__main__":
    main()
