"""The benchmarks compare what is comparable: the peers train on our samples and begin with our loss."""

import argparse
import functools
from pathlib import Path

import pytest

from tests.benchmarks.workloads import QWEN_TEXT, QWEN_VISION, WORKLOADS, make_data, make_qwen2_5_vl
from tests.tiny import flags, read_metrics, run_ranks, tiny_model
from trainer.main import main

pytest.importorskip("accelerate")

STEPS, BATCH, RANKS = 2, 2, 2


def tiny_xcomposer2(folder):
    tiny_model(folder, plora_dropout=0.0)


def tiny_qwen2_5_vl(folder):
    text = QWEN_TEXT | {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = QWEN_VISION | {"hidden_size": 32, "intermediate_size": 64}
    vision |= {"depth": 2, "fullatt_block_indexes": [1]}
    make_qwen2_5_vl(folder, text, vision)


@pytest.fixture(scope="module")
def work_of(tmp_path_factory):
    """A tiny model and a realistic mixture for it, shorter than the real one; and what ours makes of them."""

    @functools.cache
    def work(make_model):
        folder = tmp_path_factory.mktemp("benchmark")
        make_model(folder / "model")
        shapes = WORKLOADS["realistic"].shapes
        data = make_data(folder / "data", shapes, STEPS * BATCH * RANKS, num_words=190)
        options = {"max_length": 2048, "lr_scheduler_type": "constant", "learning_rate": 1e-4}
        options |= {"data_path": data, "max_steps": STEPS, "per_device_train_batch_size": BATCH}
        run_ranks(RANKS, main, flags(folder, "ours", **options))
        return folder, read_metrics(folder / "ours")

    return work


@pytest.mark.parametrize(
    ("make_model", "peer", "lora"),
    [
        (tiny_xcomposer2, "hf_ddp", False),
        (tiny_qwen2_5_vl, "hf_fsdp2", False),
        pytest.param(tiny_xcomposer2, "hf_fsdp2", False, marks=pytest.mark.slow),
        pytest.param(tiny_xcomposer2, "trl", False, marks=pytest.mark.slow),
        pytest.param(tiny_xcomposer2, "hf_fsdp2_our_loss", True, marks=pytest.mark.slow),
        pytest.param(tiny_xcomposer2, "trl", True, marks=pytest.mark.slow),
        pytest.param(tiny_qwen2_5_vl, "hf_ddp", False, marks=pytest.mark.slow),
        pytest.param(tiny_qwen2_5_vl, "trl", False, marks=pytest.mark.slow),
        pytest.param(tiny_qwen2_5_vl, "hf_ddp", True, marks=pytest.mark.slow),
    ],
)
def test_a_peer_sees_our_samples_and_has_our_loss(make_model, peer, lora, work_of):
    if peer == "trl":
        pytest.importorskip("trl")
    from tests.benchmarks import compare, peers

    folder, ours = work_of(make_model)
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


def test_the_gpu_benchmark_skips_a_peer_whose_whole_state_does_not_fit_each_gpu():
    from tests.benchmarks.gpu import systems_that_fit

    systems = ["ours", "hf_ddp", "hf_fsdp2", "trl"]
    state = {"1.8b": 38e9, "7b": 138e9}
    assert systems_that_fit(systems, state["7b"], 80e9, 8) == ["ours", "hf_fsdp2"]
    assert systems_that_fit(systems, state["1.8b"], 80e9, 8) == systems
    assert systems_that_fit(systems, state["1.8b"], 141e9, 1) == systems
    assert systems_that_fit(systems, state["7b"], 141e9, 1) == []
    assert systems_that_fit(systems, 0, 80e9, 8) == systems


def test_the_gpu_benchmark_prints_its_table_and_goes_on_when_a_peer_fails(monkeypatch, tmp_path, capsys):
    from tests.benchmarks import gpu

    def failing(options, workload, folder, picture, runs):
        done = {"system": "ours", "flops": [1e9], "seconds": [1.0], "tokens": [7000], "mfu": [0.5]}
        runs.append(done | {"memory_all": 10**9})
        raise RuntimeError("the job ended with status 1: out of memory")

    monkeypatch.setattr(gpu, "compare", failing)
    monkeypatch.setitem(gpu.SMALL_MODELS, "xcomposer2", gpu.Model(lambda folder: 0, ()))
    arguments = ["--models", "1.8b", "--warm_up", "0", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["gpu", "--smoke", *arguments])
    with pytest.raises(SystemExit) as status:
        gpu.main()
    assert status.value.code == 1
    said = capsys.readouterr().out
    assert said.count("out of memory") == 2
    table = said.rsplit("|---|", 1)[1]
    for trained in ("all but the tower", "LoRA"):
        assert f"| 1.8b, small | {trained} | ours | 7,000 " in table
