"""Memory of training: a whole model, adapters on a sharded base, adapters on a base that every rank holds.

    python -m tests.benchmarks.lora_memory --ranks 2

Output: for each way, on a 300 M-parameter checkpoint in bfloat16, the peak resident memory of a rank beyond
that of the same run on a model of 0.2 M parameters (Python, torch, the loader), and seconds a step. Two steps
of a question about a small image a rank, bfloat16 compute, activation checkpointing, rank-16 adapters on the
default layers. The C library is told to give freed memory back at once, as the allocator of a GPU reuses it:
left alone it keeps up to 1.3 GB of freed gathered blocks.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from tests.benchmarks.load_memory import SIZES, make_checkpoint
from tests.tiny import read_metrics, tiny_data, tiny_model, torchrun, word_tokenizer

WAYS = {
    "all parameters, sharded": "--fix_vit False",
    "adapters, base sharded": "--use_lora True --lora_r 16 --fix_sampler True",
    "adapters, base on every rank": "--use_lora True --lora_r 16 --fix_sampler True --sharding none",
}


def measure(folder: Path, model: str, way: str, ranks: int) -> tuple[int, float]:
    """Peak bytes of the rank that used most, and seconds of the fastest step."""
    output = folder / f"{model} {way}"
    arguments = f"""
        --model_name_or_path {folder}/{model} --data_path {folder}/data/colour.json
        --max_steps 2 --max_length 64
        --per_device_train_batch_size 1 --save_strategy no --dataloader_num_workers 0
        --forecast False {WAYS[way]}
    """
    flags = [*arguments.split(), "--output_dir", output]
    done = torchrun(ranks, flags, timeout=900, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(output)
    return lines[-1]["memory_peak_bytes"], min(line["seconds_step"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_data(folder / "data")
        tiny_model(folder / "tiny")
        vision = {**SIZES["vision_config"], "image_size": 56}
        parameters = make_checkpoint(folder / "large", torch.bfloat16, img_size=56, vision_config=vision)
        word_tokenizer(folder / "large")
        print(f"{parameters:,} parameters, {ranks} ranks; a rank's peak beyond the program itself:")
        for way in WAYS:
            program, _ = measure(folder, "tiny", way, ranks)
            peak, seconds = measure(folder, "large", way, ranks)
            print(f"{way:<30} {(peak - program) / 1e6:7,.0f} MB   {seconds:5.1f} s a step", flush=True)


if __name__ == "__main__":
    main()
