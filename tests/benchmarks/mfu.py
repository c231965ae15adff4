"""How much of the machine's arithmetic the language blocks reach, and what the rest of the time is made of.

    python -m tests.benchmarks.mfu --ranks 2 [--json mfu.json] [--flags "--gradient_checkpointing selective"]

Real runs of the trainer on a model of 50 M parameters in the language blocks and on text alone, packed into
rows of 1,024 tokens, first in bfloat16, then in float32, without activation checkpointing unless the flags
say so. Output for each: the speed of matrix products measured on all ranks at once, and

    mfu of a step         model operations / (seconds of a step × that speed), the median of the plain steps
    mfu of the blocks     the operations of the language blocks / (seconds of forward and backward, without
                          vision and loss × that speed), in traced steps, which are slower

and from rank 0's trace, by the kind of operation, the shares of its traced steps that are not model
operations at full speed: the three largest are what to work on.
"""

import argparse
import gzip
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.load_memory import make_checkpoint
from tests.tiny import read_metrics, torchrun, word_tokenizer
from trainer.extras.profile import RANGES
from trainer.models import build_model, load_config
from trainer.models.xcomposer2.flops import count_flops

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "plora_rank": 8,
    "img_size": 56,
    "vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    | {"num_attention_heads": 2, "image_size": 56, "patch_size": 14, "projection_dim": 64},
}
KINDS: dict[str, Sequence[str]] = {
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"),
    "optimizer": ("_fused_adamw_", "_foreach_norm", "_foreach_mul_", "linalg_vector_norm"),
    "communication": ("FSDP::", "fsdp::", "c10d", "gloo:", "aten::_chunk_cat", "aten::split_with_sizes_copy"),
    "reductions (norms, softmax)": ("aten::mean", "aten::sum", "aten::rsqrt", "aten::pow", "aten::logsumexp"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::index", "_to_copy"),
    "Python and dispatch": ("autograd::", "Optimizer.", "PythonSubclass", "ProfilerStep"),
}
"""Kind → beginnings or parts of the names of operations; what fits none is elementwise."""


def make_data(folder: Path) -> Path:
    """64 questions in text with answers of 60 to 500 words."""
    records = [
        {
            "id": str(i),
            "conversations": [
                {"from": "user", "value": f"say w{i}"},
                {"from": "assistant", "value": " ".join(f"w{(i + j) % 200}" for j in range(60 + 7 * i))},
            ],
        }
        for i in range(64)
    ]
    (folder / "text.json").write_text(json.dumps(records))
    return folder / "text.json"


def self_times(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Name → microseconds, of the events of one thread, without what runs inside them."""
    found: Counter[str] = Counter()
    inside: list[tuple[float, str]] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        begin, end = event["ts"], event["ts"] + event["dur"]
        while inside and begin >= inside[-1][0]:
            inside.pop()
        if inside:
            end = min(end, inside[-1][0])
            found[inside[-1][1]] -= end - begin
        found[event["name"]] += end - begin
        inside.append((end, event["name"]))
    return found


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The time within any of the spans (begin, end): [(0, 2), (1, 3), (5, 6)] → 4."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def read_trace(trace: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(named range → its seconds, the operations in them) on the thread of the step loop."""
    with gzip.open(trace) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    thread = next(event["tid"] for event in events if event["name"] == "optimizer")
    names = {name.strip() for name in RANGES}
    own = [e for e in events if e["tid"] == thread and e.get("cat") in ("cpu_op", "user_annotation")]
    seconds: Counter[str] = Counter()
    for event in own:
        if event["name"] in names:
            seconds[event["name"]] += event["dur"] / 1e6
    return dict(seconds), [event for event in own if event["name"] not in names]


def shares(operations: Sequence[dict[str, Any]], wall: float) -> dict[str, float]:
    """Kind → share of the `wall` seconds of the traced steps."""
    times: Counter[str] = Counter()
    for name, microseconds in self_times(operations).items():
        times[kind_of(name)] += microseconds / 1e6 / wall
    spans = ((event["ts"], event["ts"] + event["dur"]) for event in operations)
    times["Python and dispatch"] += 1 - covered(spans) / 1e6 / wall
    return dict(times)


def measure(folder: Path, ranks: int, bf16: bool, steps: int, flags: Sequence[str]) -> dict[str, Any]:
    """Run `steps` plain steps and two traced ones."""
    output = folder / f"bf16-{bf16}"
    arguments = f"""
        --model_name_or_path {folder}/model --data_path {folder}/text.json --output_dir {output}
        --bf16 {bf16} --max_length 1024 --per_device_train_batch_size 6 --fix_vit True --fix_sampler True
        --gradient_checkpointing False --max_steps {steps + 3} --profile {steps + 2}:{steps + 3}
        --measure_mfu True --save_strategy no --dataloader_num_workers 0 --rehearse False
        --forecast False
    """
    done = torchrun(ranks, [*arguments.split(), *flags], timeout=1800)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(output)
    plain, traced = lines[1 : steps + 1], lines[steps + 1 :]
    seconds, operations = read_trace(output / "profile" / "rank0.json.gz")
    wall = sum(line["seconds_step"] for line in traced)
    first = plain[0]
    flops = first["model_flops_vision"] + first["model_flops_language"]
    peak = flops / first["seconds_step"] / first["mfu"]
    with torch.device("meta"):
        model = build_model(load_config(folder / "model"))
    head = count_flops(model).per["supervised"]
    blocks = sum(line["model_flops_language"] - head * line["supervised_tokens"] for line in traced)
    # The tower is frozen and the loss forms its gradients in the forward pass, so backward is the blocks'
    # alone.
    in_language = seconds["forward"] - seconds.get("vision", 0.0) - seconds["loss"] + seconds["backward"]
    by_kind = shares(operations, wall)
    at_full_speed = sum(line["model_flops_language"] for line in traced) / peak / wall
    losses = {**by_kind, "matrix products below full speed": by_kind["matrix products"] - at_full_speed}
    del losses["matrix products"]
    return {
        "peak_gflops": peak / 1e9,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in plain),
        "mfu_step": statistics.median(line["mfu"] for line in plain),
        "mfu_step_best": max(line["mfu"] for line in plain),
        "mfu_blocks": blocks / in_language / peak,
        "at_full_speed": at_full_speed,
        "losses": dict(sorted(losses.items(), key=lambda item: -item[1])),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="plain steps, after one that warms up")
    parser.add_argument("--flags", default="", help="of the trainer")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_checkpoint(folder / "model", **SIZES)
        word_tokenizer(folder / "model")
        make_data(folder)
        print(f"{parameters:,} parameters, {given.ranks} ranks, {torch.get_num_threads()} threads a process")
        for dtype in ("bfloat16", "float32"):
            found = measure(folder, given.ranks, dtype == "bfloat16", given.steps, given.flags.split())
            results[dtype] = found
            print(
                f"\n{dtype}: products reach {found['peak_gflops']:,.0f} GFLOP/s on all ranks; "
                f"{found['tokens_per_second']:,.0f} tokens/s\n"
                f"  mfu of a step     {found['mfu_step']:6.1%}   (best {found['mfu_step_best']:.1%})\n"
                f"  mfu of the blocks {found['mfu_blocks']:6.1%}\n"
                f"  of a traced step, model operations at full speed take {found['at_full_speed']:.1%}; "
                "the rest:",
                flush=True,
            )
            for kind, share in found["losses"].items():
                print(f"  {share:6.1%}  {kind}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
