"""Our own loop, optimizer, schedule, accumulation and clipping repeat the original's training, step by step.

The original's batches come from its own collator, oddities included, so they stand in for the data loader's;
everything else is `trainer.main` as it runs for a user, with the flags that restore the original's mean of
means and weight decay.
"""

import json

import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from data.batch import MicroBatch
from data.loader import StepLoader
from tests.adapter_cases import FILES, adapter
from tests.model_cases import FAMILIES, golden, golden_folder
from tests.tiny import flags, read_metrics, run_ranks, tiny_data
from trainer.main import main


def micro_batch(family, case):
    inputs = golden(family).inputs(case)
    supervised = inputs["labels"] != -100
    return MicroBatch(
        inputs=inputs,
        source_of_target=inputs["labels"].new_zeros(int(supervised.sum())),
        lengths=inputs["attention_mask"].sum(1).tolist(),
        num_supervised=int(supervised.sum()),
        sample_ids=[(0, 0)] * len(inputs["input_ids"]),
    )


def repeat(folder, family, trajectory, monkeypatch, **changes):
    """Train folder/model on a trajectory's batches, and compare losses, norms and learning rates."""
    order, accumulation = trajectory["order"], trajectory["gradient_accumulation"]
    steps = [order[i : i + accumulation] for i in range(0, len(order), accumulation)]
    batches = [[micro_batch(family, case) for case in step] for step in steps]
    monkeypatch.setattr(StepLoader, "__iter__", lambda self: iter(batches))
    tiny_data(folder / "data")
    optimizer = trajectory["optimizer"]
    options = {
        "max_steps": len(steps),
        "gradient_accumulation_steps": accumulation,
        "learning_rate": optimizer["lr"],
        "weight_decay": optimizer["weight_decay"],
        "adam_beta1": optimizer["betas"][0],
        "adam_beta2": optimizer["betas"][1],
        "adam_epsilon": optimizer["eps"],
        "max_grad_norm": trajectory["max_grad_norm"],
        "warmup_ratio": trajectory["scheduler"]["warmup_ratio"],
        "lr_scheduler_type": "cosine",
        "loss_average": "micro_batch",
    }
    run_ranks(1, main, flags(folder, "out", **options, **changes))

    found = read_metrics(folder / "out")
    assert len(found) == len(trajectory["steps"])
    for ours, theirs, step in zip(found, trajectory["steps"], batches, strict=True):
        # metrics.jsonl holds the mean over tokens; the original logs a mean for each micro-batch.
        tokens = [batch.num_supervised for batch in step]
        expected = sum(n * loss for n, loss in zip(tokens, theirs["micro_losses"], strict=True)) / sum(tokens)
        assert ours["loss"] == pytest.approx(expected, abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm_before_clip"], rel=1e-4)
        assert ours["learning_rate"] == pytest.approx(theirs["lr"], rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_loop_repeats_the_originals_training(family, tmp_path, monkeypatch):
    trajectory = json.loads((golden(family).folder / "full_trajectory.json").read_text())
    golden_folder(family, tmp_path / "model")
    repeat(tmp_path, family, trajectory, monkeypatch, fix_vit=False, original_weight_decay=True)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, norm in trajectory["final_param_norms"].items():
        if not name.endswith("k_proj.bias"):  # its true gradient is zero: Adam steps along rounding noise
            assert saved[name].norm().item() == pytest.approx(norm, rel=1e-4), name


def test_our_loop_repeats_the_originals_lora_training(tmp_path, monkeypatch):
    trajectory = json.loads((golden("xcomposer2").folder / "lora_trajectory.json").read_text())
    golden_folder("xcomposer2", tmp_path / "model")
    start = tmp_path / "start"
    targets = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    r, alpha = trajectory["lora"]["r"], trajectory["lora"]["alpha"]
    LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=targets).save_pretrained(start)
    # The reference drew every B anew before this run, the model's own Plora_B among them.
    tensors = load_file(golden("xcomposer2").folder / "lora_start.safetensors")
    parts = {name: {} for name in ("adapter", "base")}
    for name, tensor in tensors.items():
        part, _, key = name.partition("/")
        parts[part][key] = tensor
    save_file(parts["adapter"], start / FILES[1], metadata={"format": "pt"})
    weights = load_file(tmp_path / "model/model.safetensors") | parts["base"]
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    lora = {"use_lora": True, "lora_weight_path": start, "fix_sampler": True, "lora_dropout": 0}
    repeat(tmp_path, "xcomposer2", trajectory, monkeypatch, **lora)
    config, tensors = adapter(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (r, alpha, sorted(targets))
    assert tensors.keys() == {f"base_model.model.{name}" for name in trajectory["final_param_norms"]}
    for name, norm in trajectory["final_param_norms"].items():
        assert tensors[f"base_model.model.{name}"].norm().item() == pytest.approx(norm, rel=1e-3), name
