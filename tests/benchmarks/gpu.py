"""Speed and memory on GPUs at the published sizes, full fine-tuning and LoRA, beside HF Trainer.

    pip install -e '.[test,bench]'
    python -m tests.benchmarks.gpu --output output/gpu
    python -m tests.benchmarks.gpu --models qwen2.5-vl-3b

Input: none; the models have random weights, in the shapes of vl-1.8b and vl-7b or of Qwen2.5-VL-3B, and the
samples are random words with a picture of 1,225 slots in 60 % of them. Output: a table on stdout, and
gpu.json:

| model | trained | system | tokens/s a GPU | ours is | TFLOP/s a GPU | MFU | peak GB |

All GPUs of this machine are used, one run at a time. The systems are those of compare.py, take turns and do
the same work, which it checks. TFLOP/s and MFU count the model's operations alone (trainer/models/family.py):
padding, recomputation and logits that nobody reads lower them. The MFU is the fraction of the speed that
matrix products reach on the same GPUs in bfloat16. What cannot fit is skipped; when a run fails, its reason
and the rows so far are printed, the next mode begins, and the exit status is 1. Without an
accelerator the benchmark says so and ends; `--smoke` then runs a small model, to check the benchmark itself.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.compare import Run, VoidError, compare
from tests.benchmarks.workloads import MODELS as SMALL_MODELS
from tests.benchmarks.workloads import WORKLOADS, Model, Workload, make_qwen2_5_vl
from tests.tiny import word_tokenizer
from trainer.models import build_model
from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config

SMALL: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
QWEN_3B_TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN_3B_VISION: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
STATE_BYTES = 16
"""Bytes per trained parameter: weight, gradient and two moments in float32."""


def make_xcomposer2(folder: Path, **sizes: Any) -> int:
    """Write a model of random weights in bfloat16 to `folder`; returns its parameters."""
    config = InternLMXcomposer2Config(**sizes, img_size=490, plora_dropout=0.0)
    config.dtype = torch.bfloat16
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build_model(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    word_tokenizer(folder, config.vocab_size)
    return model.num_parameters()


MODELS: dict[str, Model] = {
    "1.8b": Model(
        functools.partial(make_xcomposer2, **SMALL, num_attention_heads=16), ("hf_ddp", "hf_fsdp2")
    ),
    "7b": Model(make_xcomposer2, ("hf_ddp", "hf_fsdp2")),  # in the configuration's default sizes
    "qwen2.5-vl-3b": Model(
        functools.partial(make_qwen2_5_vl, text=QWEN_3B_TEXT, vision=QWEN_3B_VISION, dtype=torch.bfloat16),
        ("hf_ddp", "hf_fsdp2"),
        picture=(980, 980),
    ),
}


def systems_that_fit(systems: list[str], needed: float, memory: float, ranks: int) -> list[str]:
    """Those of `systems` whose state takes at most 80 % of each of `ranks` GPUs with `memory` bytes.

    needed: bytes of the whole state, which DDP keeps on every GPU; ours and FSDP divide it over them.
    """
    divides = {system: system.startswith("ours") or "fsdp" in system for system in systems}
    return [s for s in systems if needed / (ranks if divides[s] else 1) <= 0.8 * memory]


def with_picture(random: np.random.Generator) -> tuple[int, int]:
    """(tokens of text, images): log-normal text, median 180, of at most 700 tokens."""
    return int(np.clip(random.lognormal(np.log(180), 0.7), 24, 700)), int(random.random() < 0.6)


def rows_of(size: str, workload: Workload, runs: list[Run], warm_up: int, ranks: int) -> list[dict[str, Any]]:
    """Rows of the table: medians over the rounds of each system."""
    ours = [run for run in runs if run["system"] == "ours"]
    flops = statistics.mean(ours[0]["flops"][warm_up:])
    # The speed of matrix products on all ranks, derived from the MFU that our trainer reports.
    peak = flops / statistics.mean(ours[0]["seconds"][warm_up:]) / statistics.mean(ours[0]["mfu"][warm_up:])
    rows = []
    for system in dict.fromkeys(run["system"] for run in runs):
        own = [run for run in runs if run["system"] == system]
        seconds = statistics.median(statistics.mean(run["seconds"][warm_up:]) for run in own)
        rows.append(
            {
                "model": size,
                "trained": "LoRA" if workload.lora else "all but the tower",
                "system": system,
                "tokens_per_second_per_gpu": statistics.mean(own[0]["tokens"][warm_up:]) / seconds / ranks,
                "flops_per_second_per_gpu": flops / seconds / ranks,
                "mfu": flops / seconds / peak,
                "peak_bytes": max(run["memory_all"] for run in own),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | trained | system | tokens/s a GPU | ours is | TFLOP/s a GPU | MFU | peak GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = next(r for r in rows if (r["model"], r["trained"]) == (row["model"], row["trained"]))
        speed = row["tokens_per_second_per_gpu"]
        lines.append(
            f"| {row['model']} | {row['trained']} | {row['system']} | {speed:,.0f} "
            f"| {ours['tokens_per_second_per_gpu'] / speed:.2f} × "
            f"| {row['flops_per_second_per_gpu'] / 1e12:,.1f} | {row['mfu']:.1%} "
            f"| {row['peak_bytes'] / 1e9:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="1.8b,7b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--modes", default="full,lora")
    parser.add_argument("--peers", default="hf_ddp", help="as in compare.py; empty for none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm_up", type=int, default=4, help="steps that are not timed")
    parser.add_argument("--batch", type=int, default=8, help="samples a GPU and step")
    parser.add_argument("--ours", default="", help="more flags of trainer.main, for our system alone")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"))
    parser.add_argument("--smoke", action="store_true", help="a small model, on any machine")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None and not options.smoke:
        print("skipped: there is no accelerator here (--smoke runs a small model on the CPU)")
        return
    options.peers = [peer for peer in options.peers.split(",") if peer]
    options.ours += " --measure_mfu True"
    options.ranks = max(1, torch.accelerator.device_count())
    options.dtype, options.gradient_checkpointing = "bf16", True
    name, memory = "the CPU", 0
    if device is not None:
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    print(f"{options.ranks} × {name}, torch {torch.__version__}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    peers, failed = options.peers, False
    rows: list[dict[str, Any]] = []
    all_runs: list[Run] = []
    for size in options.models.split(","):
        model = MODELS[size]
        if options.smoke:
            model = SMALL_MODELS["qwen2_5_vl" if size.startswith("qwen") else "xcomposer2"]
            size = f"{size}, small"
        with tempfile.TemporaryDirectory() as folder:
            with device or torch.device("cpu"):
                parameters: Any = model.make(Path(folder) / "model")
            if device is not None:
                torch.accelerator.empty_cache()  # the runs are other processes, and need the memory
            for mode in options.modes.split(","):
                needed = parameters * STATE_BYTES if mode == "full" and not options.smoke else 0
                systems = ["ours", *peers]
                if device is not None:
                    systems = systems_that_fit(systems, needed, memory, options.ranks)
                for system in [system for system in ("ours", *peers) if system not in systems]:
                    reason = f"its state alone takes {needed / 1e9:.0f} GB"
                    print(f"{size}, {mode}, {system}: skipped, {reason}", flush=True)
                if "ours" not in systems:
                    continue
                options.peers = systems[1:]
                workload = WORKLOADS["realistic" if mode == "full" else "lora"]
                if not options.smoke:
                    workload = replace(workload, shapes=with_picture)
                runs: list[Run] = []
                with tempfile.TemporaryDirectory() as work:
                    (Path(work) / "model").symlink_to(Path(folder) / "model")
                    try:
                        compare(options, workload, Path(work), model.picture, runs)
                    except (RuntimeError, VoidError) as error:
                        failed = True
                        print(f"{size}, {mode}: a run failed: {error}", flush=True)
                        if isinstance(error, VoidError):
                            runs.clear()  # the systems did not do the same work, so nothing can be compared
                if any(run["system"] == "ours" for run in runs):
                    rows += rows_of(size, workload, runs, options.warm_up, options.ranks)
                    all_runs += [{"model": size, "mode": mode, **run} for run in runs]
                    about = {"gpu": name, "gpus": options.ranks, "torch": torch.__version__}
                    about |= {"rows": rows, "runs": all_runs}
                    (options.output / "gpu.json").write_text(json.dumps(about))
                print(table(rows), flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
