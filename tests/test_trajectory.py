"""Our own loop, optimizer, schedule, accumulation and clipping repeat the original's training, step by step.

The original's batches come from its own collator, oddities included, so they stand in for the data loader;
everything else is `trainer.main` as it runs for a user, with the two flags that restore the original's mean
of means and weight decay.
"""

import json
import shutil

import pytest
from safetensors.torch import load_file

import trainer.main
from data.batch import MicroBatch
from tests.model_cases import FAMILIES, golden
from tests.tiny import read_metrics, run_ranks, tiny_data, word_tokenizer


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


class RecordedBatches(list):
    """Stands in for the loader."""

    def idle_share(self, step):
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_our_loop_repeats_the_originals_training(family, tmp_path, monkeypatch):
    trajectory = json.loads((golden(family).folder / "full_trajectory.json").read_text())
    order, accumulation = trajectory["order"], trajectory["gradient_accumulation"]
    steps = [order[i : i + accumulation] for i in range(0, len(order), accumulation)]
    batches = RecordedBatches([micro_batch(family, case) for case in step] for step in steps)
    monkeypatch.setattr(trainer.main, "StepLoader", lambda *args, **options: batches)
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden(family).folder / name, tmp_path / "model")
    word_tokenizer(tmp_path / "model")
    optimizer = trajectory["optimizer"]
    flags = f"""
        --model_name_or_path {tmp_path}/model --data_path {tiny_data(tmp_path / "data")}
        --output_dir {tmp_path}/out --max_steps {len(steps)} --gradient_accumulation_steps {accumulation}
        --learning_rate {optimizer["lr"]} --weight_decay {optimizer["weight_decay"]}
        --adam_beta1 {optimizer["betas"][0]} --adam_beta2 {optimizer["betas"][1]}
        --adam_epsilon {optimizer["eps"]} --max_grad_norm {trajectory["max_grad_norm"]}
        --warmup_ratio {trajectory["scheduler"]["warmup_ratio"]} --lr_scheduler_type cosine
        --fix_vit False --bf16 False --plora_dropout 0 --save_strategy no
        --loss_average micro_batch --original_weight_decay True
    """
    run_ranks(1, trainer.main.main, flags.split())

    found = read_metrics(tmp_path / "out")
    assert len(found) == len(trajectory["steps"])
    for ours, theirs, step in zip(found, trajectory["steps"], batches, strict=True):
        # metrics.jsonl holds the mean over tokens; the original logs a mean for each micro-batch.
        tokens = [batch.num_supervised for batch in step]
        expected = sum(n * loss for n, loss in zip(tokens, theirs["micro_losses"], strict=True)) / sum(tokens)
        assert ours["loss"] == pytest.approx(expected, abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm_before_clip"], rel=1e-4)
        assert ours["learning_rate"] == pytest.approx(theirs["lr"], rel=1e-9)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, norm in trajectory["final_param_norms"].items():
        if not name.endswith("k_proj.bias"):  # its true gradient is zero: Adam steps along rounding noise
            assert saved[name].norm().item() == pytest.approx(norm, rel=1e-4), name
