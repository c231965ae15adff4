"""Seconds of a step as three measured steps of other samples tell them, beside those that it took.

    python -m tests.benchmarks.forecast_time --families xcomposer2,qwen2_5_vl --dtype fp32

Input: none. A model of each family (workloads.py) trains four steps on the realistic mixture, whose rates
(`trainer/forecast/speed.py`) forecast the four that it trains next on other samples: all equally long,
several pictures, long texts, text alone, and larger pictures where the model takes them as they are. Output:
a Markdown table. The realistic mixture is measured anew before each of the others, because a machine's speed
drifts. The first step of a run counts nowhere; what the steps consisted of is counted from their samples.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from data.flags import parse_flags
from tests.benchmarks.workloads import MODELS, WORKLOADS, Workload, make_data
from tests.tiny import torchrun
from trainer.forecast.config import ForecastConfig
from trainer.forecast.speed import fit_rates, work_of_run

STEPS, SAMPLES = 4, 4
SAMPLES_OF = {
    "realistic": WORKLOADS["realistic"],
    "equal lengths": WORKLOADS["equal"],
    "3 to 6 pictures": WORKLOADS["multi_image"],
    "1,000 tokens, a picture": Workload("", lambda random: (856, 1)),
    "text alone": WORKLOADS["text"],
    "a picture four times as large": Workload("", lambda random: (200, 1)),
}
LARGE = (672, 672)
HEADER = """\
| model | samples | s a step, realistic | s a step | forecast | off by |
|---|---|---|---|---|---|"""


def measure(folder: Path, family: str, name: str, ranks: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What the steps of a run consisted of, and their seconds, as `work_of_run` returns them."""
    workload, model = SAMPLES_OF[name], MODELS[family]
    picture = LARGE if "large" in name else model.picture
    output = Path(tempfile.mkdtemp(dir=folder))
    data = make_data(output / "data", workload.shapes, STEPS * SAMPLES * ranks, picture=picture)
    flags = f"""
        --model_name_or_path {folder}/model --data_path {data} --output_dir {output} --max_steps {STEPS}
        --per_device_train_batch_size {SAMPLES} --max_length 2048 --plora_dropout 0 --save_strategy no
        --fix_sampler {workload.fix_projector} --dataloader_num_workers 1 --check_model False --report False
        --rehearse False --forecast False --bf16 {dtype == "bf16"}
    """
    done = torchrun(ranks, flags.split(), timeout=1800)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    given = f"--model_name_or_path {folder}/model --data_path {data} --measured {output}"
    lines = parse_flags(ForecastConfig, given.split(), "forecast_time").measured_steps
    return work_of_run(json.loads((output / "run.json").read_text()), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", default="xcomposer2,qwen2_5_vl")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    options = parser.parse_args()
    print(HEADER, flush=True)
    for family in options.families.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            MODELS[family].make(folder / "model")
            for samples in [name for name in SAMPLES_OF if name != "realistic"]:
                if "large" in samples and family == "xcomposer2":  # it scales every picture to one size
                    continue
                known = measure(folder, family, "realistic", options.ranks, options.dtype)
                work, seconds = measure(folder, family, samples, options.ranks, options.dtype)
                took, told = seconds.mean(), (work @ fit_rates(*known)).mean()
                numbers = [known[1].mean(), took, told]
                row = [family, samples, *(f"{n:.2f}" for n in numbers), f"{told / took - 1:+.1%}"]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
