"""The forecast of a training beside the training itself, on CPUs with gloo.

    python -m tests.benchmarks.forecast

Input: none; two models of some 10 million random parameters, an XComposer2 and a Qwen2.5-VL, train for two
steps in bfloat16 on samples of 500 tokens (Qwen2.5-VL: 1,090) with a picture. Output: a Markdown table.
Tensors are the most bytes of a rank's tensors, counted in the run as in the forecast
(`trainer.forecast.fake_step.Count`).
Resident is the largest set of private pages of any rank, beyond what the program's imports take, as the
kernel counts them, with the C library told to give freed memory back at once. Bytes sent are those of a step.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from data.flags import parse_flags
from tests.benchmarks.compare import footprint
from tests.benchmarks.scaling import GIVE_BACK, MODEL
from tests.benchmarks.watch import watch
from tests.benchmarks.workloads import make_data
from tests.tiny import tiny_model
from tests.tiny_models import tiny_folder
from trainer.forecast.config import ForecastConfig
from trainer.forecast.forecast import forecast

STEPS, SAMPLES = 2, 2
CASES = {
    "XComposer2, full": (2, 2, ""),
    "XComposer2, a tower that trains": (2, 2, "--fix_vit False"),
    "XComposer2, LoRA": (2, 2, "--use_lora True --lora_r 16 --fix_sampler True"),
    "XComposer2, two nodes of two, hybrid": (4, 2, "--sharding hybrid"),
    "Qwen2.5-VL, accumulation of 3": (2, 2, "--max_length 1536 --gradient_accumulation_steps 3"),
    "Qwen2.5-VL, selective checkpointing": (2, 2, "--max_length 1536 --gradient_checkpointing selective"),
}
"""Name, beginning with the model → (ranks, ranks of a node, flags)."""


def make_models(folder: Path) -> None:
    tiny_model(folder / "XComposer2", torch.bfloat16, **MODEL)
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8000}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}
    vision = {"hidden_size": 128, "intermediate_size": 512, "depth": 4, "num_heads": 4}
    vision |= {"out_hidden_size": text["hidden_size"]}
    tiny_folder("qwen2_5_vl", folder / "Qwen2.5-VL", vision, **text)


def measure(folder: Path, name: str, output: Path) -> dict[str, float]:
    """A training and its forecast, in bytes."""
    ranks, local_ranks, more = CASES[name]
    flags = [
        "--model_name_or_path",
        folder / name.partition(",")[0],
        "--data_path",
        folder / "data/data.json",
    ]
    flags += ["--output_dir", output, "--per_device_train_batch_size", SAMPLES, "--max_length", 768]
    flags += ["--max_steps", STEPS, "--save_strategy", "no", "--dataloader_num_workers", 0, *more.split()]
    flags += ["--check_model", False, "--report", False, "--forecast", False]
    output.mkdir()
    usage = watch(
        ["-m", "tests.benchmarks.sent_bytes", output / "bytes.json", *flags],
        output / "metrics.jsonl",
        steps=STEPS,
        warm_up=0,
        ranks=ranks,
        environment=GIVE_BACK | {"RANKS_PER_NODE": str(local_ranks)},
    )
    run = json.loads((output / "bytes.json").read_text())
    machines = ["--ranks", ranks, "--local_ranks", local_ranks, "--cpu_ranks", "--compared_ranks", "none"]
    config = parse_flags(ForecastConfig, [str(word) for word in flags + machines], "trainer.forecast")
    result = forecast(config, ranks)
    return {
        "tensors": run["tensors"],
        "forecast_tensors": result.step.peak_bytes,
        "resident": usage.private_bytes - footprint("ours"),
        "sent": run["bytes"][-1],
        "forecast_sent": sum(each.within + each.between for each in result.step.sent.values()),
    }


HEADER = """\
| run | ranks | tensors, MB | forecast | off by | resident, MB | sent a step, MB | forecast | off by |
|---|---|---|---|---|---|---|---|---|"""


def row(name: str, found: dict[str, float]) -> str:
    tensors, sent = found["tensors"], found["sent"]
    return (
        f"| {name} | {CASES[name][0]} | {tensors / 1e6:,.1f} | {found['forecast_tensors'] / 1e6:,.1f} "
        f"| {found['forecast_tensors'] / tensors - 1:+.1%} | {found['resident'] / 1e6:,.1f} "
        f"| {sent / 1e6:,.1f} | {found['forecast_sent'] / 1e6:,.1f} "
        f"| {found['forecast_sent'] / sent - 1:+.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        make_data(folder / "data", lambda random: (350, 1), samples=24, num_words=7000)
        print(HEADER, flush=True)
        for number, case in enumerate(case for case in CASES if only in case):
            print(row(case, measure(folder, case, folder / f"run{number}")), flush=True)


if __name__ == "__main__":
    main()
