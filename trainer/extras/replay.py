"""Replay a step whose loss or gradient was not finite, from the file that the run wrote about it.

Input: `bad-step-12.json` in output_dir, which lists the step's micro-batches on all ranks. Output:

    python -m trainer.extras.replay output/bad-step-12.json [--weights output/checkpoint-10]

    weights of output/checkpoint-10
    rank 0, micro-batch 0: loss 2.31, gradient norm 1.72
    rank 1, micro-batch 0: loss nan, gradient norm nan
      first not finite: the output of vision_proj.0
      pets/train.json: record 7: loss nan, gradient norm nan
      pets/train.json: record 9: loss 2.02, gradient norm 3.1

This runs in one process, with the dropout masks of the step. The weights are those of the newest checkpoint
before the step, or the base model's: the data is exactly that of the step, but the weights may be older. If
everything is finite, the weights were the cause: look at the gradient norms of the steps before.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM

import trainer.models
from data.batch import MicroBatch, map_tensors
from data.mixture import read_mixture
from data.reader import open_reader
from trainer.adapter_folder import adapter_preprocessing, adapter_template
from trainer.atomic import numbered
from trainer.config import Config
from trainer.loss import chunked_cross_entropy
from trainer.models import load_config, set_options
from trainer.rehearsal import read_batch


def load_model(base: Path, weights: Path, config: Config) -> nn.Module:
    """Load the model of a run in training mode on one device; `weights`: a model's folder or an adapter's."""
    is_adapter = (weights / "adapter_config.json").is_file()
    model_config = load_config(base if is_adapter else weights, config.img_size)
    set_options(model_config, plora_dropout=config.plora_dropout)
    model = AutoModelForCausalLM.from_pretrained(
        base if is_adapter else weights,
        config=model_config,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        attn_implementation=config.attn_implementation,
    )
    model.loss_function = chunked_cross_entropy(config.loss_chunk_tokens)
    if is_adapter:
        model = PeftModel.from_pretrained(model, str(weights), is_trainable=True)
    return cast(nn.Module, model).to(torch.accelerator.current_accelerator(check_available=True)).train()


def run_batch(model: nn.Module, batch: MicroBatch) -> tuple[float, float, str | None]:
    """Run a micro-batch; returns (mean loss, gradient norm, first module whose output is not finite)."""
    first: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not first and not output.isfinite().all():
                first.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    model.zero_grad(set_to_none=True)
    parameter = next(model.parameters())
    batch = batch.to(parameter.device)
    if "pixel_values" in batch.inputs:
        pixels = map_tensors(batch.inputs["pixel_values"], lambda images: images.to(parameter.dtype))
        batch.inputs["pixel_values"] = pixels
    loss = model(**batch.inputs).loss / max(1, batch.num_supervised)
    loss.backward()
    for hook in hooks:
        hook.remove()
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return loss.item(), norm.item(), next(iter(first), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Replay the step and print where it is not finite; returns 1 if a micro-batch is not finite, else 0."""
    parser = argparse.ArgumentParser(
        prog="trainer.extras.replay", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("capsule", type=Path, help="a bad-step-<step>.json")
    parser.add_argument("--weights", type=Path, help="model or adapter; by default the newest checkpoint")
    arguments = parser.parse_args(argv)
    capsule = json.loads(arguments.capsule.read_text(encoding="utf-8"))
    values = capsule["run"]["config"]
    config = Config(**{field.name: values[field.name] for field in fields(Config) if field.name in values})
    base = Path(config.model_name_or_path)
    before = [folder for step, folder in numbered(arguments.capsule.parent).items() if step < capsule["step"]]
    weights = arguments.weights or next(iter(before), base)
    print(f"weights of {weights}")
    model = load_model(base, weights, config)
    sources = read_mixture(
        config.data_path, config.given_num, config.image_root, skip_bad=config.on_bad_sample == "skip"
    )
    preprocessing = adapter_preprocessing(config.lora_weight_path)
    template = adapter_template(config.lora_weight_path, base)
    reader, _ = open_reader(config, sources, trainer.models, preprocessing, template)
    numbers = {source.name: number for number, source in enumerate(sources)}
    num_bad = 0
    for rank in capsule["ranks"]:
        torch.manual_seed(rank["seed"])
        for number, samples in enumerate(rank["micro_batches"]):
            chosen = [(numbers[sample["source"]], sample["record"]) for sample in samples]
            loss, norm, module = run_batch(model, read_batch(reader, chosen, config.packing))
            print(f"rank {rank['rank']}, micro-batch {number}: loss {loss:.6g}, gradient norm {norm:.6g}")
            if math.isfinite(loss) and math.isfinite(norm):
                continue
            num_bad += 1
            if module:
                print(f"  first not finite: the output of {module}")
            for source, record in chosen:
                loss, norm, _ = run_batch(model, read_batch(reader, [(source, record)], config.packing))
                where = sources[source].where(record)
                print(f"  {where}: loss {loss:.6g}, gradient norm {norm:.6g}")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
