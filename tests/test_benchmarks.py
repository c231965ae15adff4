"""The benchmarks compare what is comparable: the peers train on our samples and begin with our loss."""

import argparse
from pathlib import Path

import pytest

from tests.benchmarks.workloads import WORKLOADS, make_data
from tests.tiny import flags, read_metrics, run_ranks, tiny_model
from trainer.main import main

pytest.importorskip("accelerate")

STEPS, BATCH, RANKS = 2, 2, 2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model and a realistic mixture for it, shorter than the real one; and what ours makes of them."""
    folder = tmp_path_factory.mktemp("benchmark")
    tiny_model(folder / "model", plora_dropout=0.0)
    shapes = WORKLOADS["realistic"].shapes
    data = make_data(folder / "data", shapes, STEPS * BATCH * RANKS, num_words=190)
    options = {"max_length": 2048, "lr_scheduler_type": "constant", "learning_rate": 1e-4}
    options |= {"data_path": data, "max_steps": STEPS, "per_device_train_batch_size": BATCH}
    run_ranks(RANKS, main, flags(folder, "ours", **options))
    return folder, read_metrics(folder / "ours")


@pytest.mark.parametrize(
    ("peer", "lora"),
    [("hf_ddp", False), ("hf_fsdp2", False), ("hf_fsdp2_our_loss", True), ("trl", False), ("trl", True)],
)
def test_a_peer_sees_our_samples_and_has_our_loss(peer, lora, work):
    if peer == "trl":
        pytest.importorskip("trl")
    from tests.benchmarks import compare, peers

    folder, ours = work
    options = argparse.Namespace(
        peer=peer,
        model=str(folder / "model"),
        data=str(folder / "data" / "data.json"),
        output=str(folder / f"{peer}{lora}"),
        steps=STEPS,
        batch=BATCH,
        dtype="fp32",
        lora=lora,
        gradient_checkpointing=True,
    )
    run_ranks(RANKS, peers.train, options)
    found = read_metrics(Path(options.output))
    expected = compare.expected_samples(folder / "model", options.data, STEPS, BATCH * RANKS)
    assert [line["samples_seen"] for line in found] == expected
    # The second loss too, as both took the same step; new adapters begin as the base, and go another way.
    for line, ours_line in list(zip(found, ours, strict=True))[: 1 if lora else STEPS]:
        assert line["tokens"] == ours_line["tokens"]
        assert line["supervised_tokens"] == ours_line["supervised_tokens"]
        assert line["loss"] == pytest.approx(ours_line["loss"], rel=1e-5)
