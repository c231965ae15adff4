"""Weights between folders and shards: exact, within a rank's share of memory, and never half a save."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainer.weights
from tests.benchmarks.load_memory import growths, make_checkpoint
from tests.tiny import flags, run_ranks, tiny_data, tiny_model
from trainer.atomic import MARKER, Jobs, move_into, remove_old_checkpoints
from trainer.config import Config
from trainer.distributed import barrier, device_mesh, start
from trainer.main import main
from trainer.models import build_model, load_config, load_tokenizer, parts_of
from trainer.parallelize import parallelize
from trainer.weights import load_weights, save_model_folder, tensor_files, weights_dtype


def copy_through_shards(source: Path, target: Path, max_file_bytes: int) -> int:
    """Load `source` into shards and save them to `target`, as a run does without a step between."""
    ranks = start()
    config = load_config(source)
    parts = parts_of(config)
    with torch.device("meta"):
        model = build_model(config)
    mesh = device_mesh(ranks)
    model = parallelize(model, mesh, parts, Config(bf16=False, gradient_checkpointing=False))
    model.to_empty(device="cpu")
    loaded = load_weights(model, source, optional=parts.unused)
    model.init_buffers()
    if ranks.rank == 0:
        target.mkdir()
    jobs = Jobs()
    save_model_folder(
        model,
        config,
        load_tokenizer(source),
        parts,
        target,
        torch.float32,
        loaded.carried,
        jobs,
        max_file_bytes,
    )
    jobs.finish()
    barrier()
    return 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("weights") / "model")


def tensors_of(folder):
    return {name: load_file(path)[name] for name, path in tensor_files(folder).items()}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("max_file_bytes", [10**9, 10**5])
def test_shards_keep_every_bit_whatever_the_number_of_ranks(model, tmp_path, max_file_bytes):
    for ranks in (1, 3):
        run_ranks(ranks, copy_through_shards, model, tmp_path / f"by{ranks}", max_file_bytes)
    assert_same_tensors(tensors_of(model), tensors_of(tmp_path / "by1"))
    ours, theirs = sorted((tmp_path / "by1").iterdir()), sorted((tmp_path / "by3").iterdir())
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))
    if max_file_bytes == 10**5:
        sizes = [path.stat().st_size for path in ours if path.suffix == ".safetensors"]
        assert len(sizes) > 5
        index = json.loads((tmp_path / "by1" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors_of(model).keys()


def test_a_tensor_that_the_model_does_not_know_is_carried_along_unchanged(model, tmp_path):
    source = tmp_path / "with-extra"
    shutil.copytree(model, source)
    extra = {"something.else": torch.arange(7, dtype=torch.float16)}
    save_file({**load_file(source / "model.safetensors"), **extra}, source / "model.safetensors")
    run_ranks(2, copy_through_shards, source, tmp_path / "out", 10**9)
    assert_same_tensors(tensors_of(source), tensors_of(tmp_path / "out"))


def test_a_checkpoint_without_the_unused_norm_loads(model, tmp_path):
    source = tmp_path / "without"
    shutil.copytree(model, source)
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "post_layernorm" not in name}
    save_file(kept, source / "model.safetensors")
    run_ranks(1, copy_through_shards, source, tmp_path / "out", 10**9)
    saved = tensors_of(tmp_path / "out")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_missing_tensors_and_pickled_weights_are_refused_in_a_sentence(model, tmp_path):
    shutil.copytree(model, tmp_path / "cut")
    tensors = load_file(model / "model.safetensors")
    del tensors["output.weight"]
    save_file(tensors, tmp_path / "cut" / "model.safetensors")
    (output,) = run_ranks(1, copy_through_shards_or_say, tmp_path / "cut", tmp_path / "out")
    assert "1 of the model's" in output
    assert "output.weight" in output
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="pickles, which are never opened"):
        tensor_files(tmp_path / "pickled")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        tensor_files(tmp_path / "broken")


def copy_through_shards_or_say(source: Path, target: Path) -> None:
    try:
        copy_through_shards(source, target, 10**9)
    except ValueError as error:
        print(error)


def print_what_is_opened(source: Path, target: Path, bytes_between_closes: int) -> None:
    """`copy_through_shards`; prints the names of the files that loading opens."""
    opened, safe_open = [], trainer.weights.safe_open

    def counted(path: Path, framework: str) -> Any:
        opened.append(path.name)
        return safe_open(path, framework)

    trainer.weights.safe_open, trainer.weights.BYTES_BETWEEN_CLOSES = counted, bytes_between_closes
    copy_through_shards(source, target, 10**9)
    print(json.dumps(opened))


def test_a_file_is_opened_for_its_names_and_its_rows_but_not_for_every_tensor(model, tmp_path):
    run_ranks(1, copy_through_shards, model, tmp_path / "split", 10**5)
    files = sorted(path.name for path in (tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 5
    for ranks, limit in ((2, 1 << 30), (1, 1)):  # the least and the most often that files are closed
        output, *_ = run_ranks(
            ranks, print_what_is_opened, tmp_path / "split", tmp_path / f"by{ranks}", limit
        )
        opened = json.loads(output.splitlines()[-1])
        if ranks == 2:
            assert sorted(opened) == sorted(2 * files)
        assert_same_tensors(tensors_of(model), tensors_of(tmp_path / f"by{ranks}"))


def test_the_dtype_of_a_checkpoint_is_that_of_its_matrices(tmp_path):
    assert weights_dtype(tiny_model(tmp_path / "model", torch.bfloat16)) == torch.bfloat16


def test_no_rank_holds_more_than_its_share_while_loading(tmp_path):
    """300 M parameters over 2 ranks: half of the float32 model each, and one tensor at a time."""
    parameters = make_checkpoint(tmp_path)
    assert parameters > 290e6
    for growth in growths(2, tmp_path):
        assert growth < 0.75 * 4 * parameters


def test_a_trained_folder_loads_without_this_project(model, tmp_path):
    tiny_data(tmp_path / "data")
    run_ranks(2, main, flags(tmp_path, "out", model_name_or_path=model, max_steps=2, fix_vit=False))
    program = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor([tokenizer("what colour is the square?", add_special_tokens=False)["input_ids"]])
print(model(ids).logits.double().sum().item())
assert "trainer" not in sys.modules
"""
    isolated = [sys.executable, "-I", "-c", program, str(tmp_path / "out")]
    environment = {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(
        isolated, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(tmp_path / "out")
    config = load_config(tmp_path / "out")
    ours = build_model(config).eval()
    ours.load_state_dict(tensors_of(tmp_path / "out"))
    ids = torch.tensor([tokenizer("what colour is the square?", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = ours(ids).logits.double().sum().item()
    assert float(result.stdout) == pytest.approx(expected, rel=1e-5)


def test_a_move_that_is_killed_is_finished_by_calling_it_again(model, tmp_path):
    """Killed between any two of its renames; a config.json is never without its weights."""
    new = tmp_path / "new"
    shutil.copytree(model, new)
    save_file({**load_file(model / "model.safetensors"), "x": torch.ones(1)}, new / "model.safetensors")
    (new / MARKER).write_text(json.dumps({"files": {path.name: None for path in model.iterdir()}}))
    for steps in range(20):
        whole, output = tmp_path / f"whole{steps}", tmp_path / f"output{steps}"
        shutil.copytree(new, whole)
        shutil.copytree(model, output)  # an older run's model, which is being replaced
        (output / "model-00001-of-00002.safetensors").write_bytes(b"stale")
        left = steps

        def rename_or_die(self, target, rename=Path.rename):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return rename(self, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", rename_or_die)
            try:
                move_into(whole, output)
                killed = False
            except KeyboardInterrupt:
                killed = True
        assert (output / MARKER).exists() is not killed
        if (output / "config.json").exists():
            assert_same_tensors(tensors_of(output), tensors_of(new))
        if killed:
            move_into(whole, output)
        assert not whole.exists()
        assert (output / "config.json").exists()
        assert_same_tensors(tensors_of(output), tensors_of(new))
        if not killed:
            return
    pytest.fail("the move never ended")


def test_only_the_newest_checkpoints_stay(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-best", "other"):
        (tmp_path / name).mkdir()
    remove_old_checkpoints(tmp_path, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-10", "checkpoint-100", "checkpoint-best", "other"]
