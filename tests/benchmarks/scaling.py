"""How a step of ours grows: with the length of a sample, the images in it, and the number of ranks.

    python -m tests.benchmarks.scaling --output output/scaling
    python -m tests.benchmarks.scaling --curves ranks

Output: tables, scaling.json and scaling.png in --output. All fits are least squares:

    length   one rank, one text of 512 to 8,192 tokens a step: seconds = a + b·T + c·T², megabytes = a + b·T
    images   one rank, one text of 256 tokens with 0 to 8 images of 144 slots: seconds and megabytes = a + b·n
    ranks    1, 2 and 4 ranks with a text of 512 tokens each: bytes that a rank sends
             = a·(W − 1)/W, megabytes = a + b/W; not time, as ranks may have to share cores

Megabytes are a rank's peak beyond what the program's imports take; on a CPU the C library is told to give
freed memory back at once, as an accelerator's allocator uses it again: that costs time, which both the fits
and their shapes contain. `exponent` is the slope between the last two points in log-log.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.compare import footprint
from tests.benchmarks.watch import watch
from tests.benchmarks.workloads import IMAGE_SLOTS, SIZES, make_data
from tests.tiny import read_metrics, tiny_model

MODEL = SIZES | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 8000}
STEPS, WARM_UP = 5, 2
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CHAT_TOKENS = 10
"""What the chat's format adds to a sample's text; the whole is then one token short of its round number."""

Terms = dict[str, Callable[[np.ndarray], np.ndarray]]
CURVES: dict[str, tuple[list[int], dict[str, Terms]]] = {
    "length": (
        [512, 1024, 2048, 4096, 8192],
        {
            "seconds": {"1": np.ones_like, "T": lambda x: x, "T²": lambda x: x**2},
            "megabytes": {"1": np.ones_like, "T": lambda x: x},
        },
    ),
    "images": (
        [0, 1, 2, 4, 8],
        {
            "seconds": {"1": np.ones_like, "n": lambda x: x},
            "megabytes": {"1": np.ones_like, "n": lambda x: x},
        },
    ),
    "ranks": (
        [1, 2, 4],
        {
            "megabytes_sent": {"(W − 1)/W": lambda x: (x - 1) / x},
            "megabytes": {"1": np.ones_like, "1/W": lambda x: 1 / x},
        },
    ),
}


def measure(model: Path, folder: Path, curve: str, point: int, bf16: bool) -> dict[str, float]:
    """One run of trainer.main at one point of a curve."""
    ranks = point if curve == "ranks" else 1
    tokens = {"length": point, "images": 256, "ranks": 512}[curve]
    images = point if curve == "images" else 0
    text = tokens - CHAT_TOKENS
    data = make_data(folder, lambda random: (text, images), STEPS * ranks, num_words=7000)
    output = folder / "out"
    output.mkdir()
    flags = f"""
        --model_name_or_path {model} --data_path {data} --output_dir {output} --max_steps {STEPS}
        --per_device_train_batch_size 1 --max_length {tokens + images * IMAGE_SLOTS}
        --fix_sampler {images == 0} --bf16 {bf16} --plora_dropout 0 --save_strategy no --rehearse False
        --dataloader_num_workers 1 --forecast False
    """.split()
    program = ["-m", "trainer.main"]
    if curve == "ranks":
        program = ["-m", "tests.benchmarks.sent_bytes", str(folder / "bytes.json")]
    usage = watch(
        [*program, *flags],
        output / "metrics.jsonl",
        steps=STEPS,
        warm_up=WARM_UP,
        ranks=ranks,
        environment=GIVE_BACK,
    )
    lines = read_metrics(output)
    peak = usage.private_bytes - footprint("ours")
    if torch.accelerator.is_available():
        peak = max(line["memory_peak_bytes"] for line in lines)
    found = {
        "seconds": statistics.median(line["seconds_step"] for line in lines[WARM_UP:]),
        "megabytes": peak / 1e6,
        "tokens": lines[-1]["tokens"],
    }
    if curve == "ranks":
        sent = json.loads((folder / "bytes.json").read_text())
        found["megabytes_sent"] = sent["bytes"][-1] / 1e6
        found["messages"] = sent["calls"][-1]
        del found["seconds"]
    return found


def fit(points: list[int], values: list[float], terms: Terms) -> dict[str, float]:
    """Least squares of `values` by `terms`: their coefficients, the share of variance that they explain, and
    the slope of the last two points in log-log."""
    x, y = np.array(points, dtype=float), np.array(values)
    design = np.stack([term(x) for term in terms.values()], axis=1)
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    left = float(((y - design @ coefficients) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    result = dict(zip(terms, coefficients.tolist(), strict=True))
    result["r2"] = 1 - left / spread if spread else 1.0
    if min(*x[-2:], *y[-2:]) > 0:
        result["exponent"] = float(np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2]))
    return result


def plot(results: dict[str, Any], file: Path) -> None:
    """A row a curve: what was measured as points, the fits as lines."""
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found]

    figure, axes = pyplot.subplots(len(results), 2, figsize=(10, 3.5 * len(results)), squeeze=False)
    for row, (curve, result) in zip(axes, results.items(), strict=True):
        points, fitted = CURVES[curve]
        x = np.linspace(points[0], points[-1], 100)
        for axis, (field, terms) in zip(row, fitted.items(), strict=True):
            axis.plot(points, [found[field] for found in result["points"]], "o")
            axis.plot(x, sum(result["fits"][field][name] * term(x) for name, term in terms.items()))
            axis.set_xlabel(curve)
            axis.set_ylabel(field.replace("_", " "))
            axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--curves", default=",".join(CURVES))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--output", type=Path, default=Path("output/scaling"))
    options = parser.parse_args()
    if unknown := set(options.curves.split(",")) - set(CURVES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(CURVES)}")
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        model = tiny_model(Path(name) / "model", **MODEL)
        for curve in options.curves.split(","):
            points, fitted = CURVES[curve]
            found = []
            for point in points:
                folder = Path(name) / f"{curve}{point}"
                found.append(measure(model, folder, curve, point, options.dtype == "bf16"))
                print(curve, point, {key: round(value, 3) for key, value in found[-1].items()}, flush=True)
            fits = {
                field: fit(points, [one[field] for one in found], terms) for field, terms in fitted.items()
            }
            results[curve] = {"at": points, "points": found, "fits": fits}
            for field, values in fits.items():
                print(f"  {field}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
            (options.output / "scaling.json").write_text(json.dumps({"dtype": options.dtype, **results}))
            plot(results, options.output / "scaling.png")
    print(f"\n{options.output}/scaling.json, scaling.png")


if __name__ == "__main__":
    main()
