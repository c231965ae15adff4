"""Folders made of folders: what a merged model computes, and an adapter where this project is not."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainer.export
from data.errors import DataError
from tests.adapter_cases import FILES, adapter, train_adapter
from tests.model_cases import golden, golden_folder
from tests.tiny import ROOT, read_metrics, run_ranks, tiny_data
from trainer.adapter_folder import read_adapter
from trainer.export import main
from trainer.generate import load_model
from trainer.generate import main as generate
from trainer.models import load_config, parts_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A published model: the golden weights, a configuration that names code of its own, and no code."""
    folder = tmp_path_factory.mktemp("export")
    golden_folder("xcomposer2", folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_gone.InternLMXComposer2ForCausalLM"}
    (folder / "model/config.json").write_text(json.dumps(config))
    tiny_data(folder / "data")
    return folder


WHOLE = ("--fix_vit", "False")


@pytest.fixture(scope="module")
def trained(world):
    """An adapter, and modules trained beside it in every way that its folder can hold them."""
    flags = (*WHOLE, "--use_rslora", "True", "--train_modules", "Plora_A", "Plora_B", "model.norm")
    return train_adapter(world, "trained", *flags, ranks=2)[0]


def reload(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()


def logits(model, *cases):
    with torch.no_grad():
        return [model(**golden("xcomposer2").inputs(case)).logits for case in cases]


CASES = ("two_images_apart", "text_only", "batch2_images_equal_length")


@pytest.mark.parametrize(
    "flags",
    [
        ("--fix_sampler", "True"),
        ("--fix_sampler", "True", "--use_dora", "True", "--train_modules", "Plora_B"),
        ("--fix_vit", "False", "--use_rslora", "True", "--train_modules", "Plora_A", "output"),
        ("--fix_sampler", "True", "--lora_target_modules", "all-linear", "--lora_bias", "all"),
    ],
)
def test_a_merged_model_computes_what_base_and_adapter_do(world, tmp_path, flags):
    name = "merge-" + "-".join(flag.strip("-") for flag in flags)
    folder, _ = train_adapter(world, name, *flags, ranks=2)
    assert main(["--merge", str(folder), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    plain = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    both = reload(world / "model", folder)
    for ours, theirs, base in zip(*(logits(model, *CASES) for model in (merged, both, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert (ours - base).abs().max() > 1e-2


def test_a_merged_model_is_written_in_files_reloads_and_trains_on(world, trained, tmp_path, monkeypatch):
    split = partial(trainer.export.split_into_files, max_file_bytes=200_000)
    monkeypatch.setattr(trainer.export, "split_into_files", split)
    assert main(["--merge", str(trained), str(world / "merged"), "--dtype", "float32"]) == 0
    assert len(list((world / "merged").glob("model-*-of-*.safetensors"))) > 3
    assert {path.name for path in parts_of(load_config(world / "merged")).files} <= {
        path.name for path in (world / "merged").iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(world / "merged").eval()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert all(torch.equal(a, b) for a, b in zip(logits(model, *CASES), logits(again, *CASES), strict=True))
    going_on, _ = train_adapter(world, "going-on", model="merged", ranks=2)
    losses = [line["loss"] for line in read_metrics(going_on)]
    assert losses[-1] < losses[0]


def test_merging_in_bf16_rounds_once(world, tmp_path):
    folder, _ = train_adapter(world, "bf16", "--fix_sampler", "True")
    shutil.copytree(world / "model", tmp_path / "model")
    weights = {n: t.bfloat16() for n, t in load_file(tmp_path / "model/model.safetensors").items()}
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    assert main(["--merge", str(folder), str(tmp_path / "out"), "--base", str(tmp_path / "model")]) == 0
    merged = load_file(tmp_path / "out/model.safetensors")
    config, tensors = adapter(folder)
    name = "model.layers.1.feed_forward.w2"
    down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    exact = weights[f"{name}.weight"].float() + config["lora_alpha"] / config["r"] * (up @ down)
    assert torch.equal(merged[f"{name}.weight"], exact.bfloat16())
    untouched = [n for n in weights if "Plora" in n or "norm" in n or n.startswith("v")]
    assert all(torch.equal(merged[n], weights[n]) for n in untouched)
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_unknown_tensors_of_the_base_are_merged_along(world, trained, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors") | {"video.weight": torch.arange(6).view(2, 3)}
    del weights["vit.vision_tower.vision_model.post_layernorm.bias"]
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    shutil.copytree(trained, tmp_path / "adapter")
    tensors = load_file(trained / FILES[1])
    save_file(tensors, tmp_path / "adapter" / FILES[1], metadata={"format": "pt"})  # as stock peft saves it
    folders = [tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "model"]
    assert main(["--merge", *map(str, folders)]) == 0
    merged = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(merged["video.weight"], weights["video.weight"])
    assert "vit.vision_tower.vision_model.post_layernorm.bias" in merged


# --- without this project -------------------------------------------------------------------------------

ISOLATED = """
import sys
for name in ("trainer", "data", "tests", "sentencepiece", "tiktoken", "torchvision"):
    sys.modules[name] = None  # as if it were not installed
"""


def run_isolated(code, folder, *arguments):
    environment = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED + code, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def snippet():
    """The README's Python block that loads an adapter."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "AutoPeftModelForCausalLM" in block]
    return block


@pytest.fixture(scope="module")
def portable(world, trained, tmp_path_factory):
    """The adapter, moved to where the README's block looks for it, on a base that was made to last."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(trained, folder / "output/adapter")
    arguments = ["--modernise", world / "model", folder / "modern", "--adapter", folder / "output/adapter"]
    assert main([*map(str, arguments)]) == 0
    Image.new("RGB", (90, 60), (200, 30, 40)).save(folder / "cat.jpg")
    return folder


def test_the_readmes_block_answers_as_the_trainer_does_without_this_project(world, trained, portable):
    question = "Which breed is it?"
    printed = run_isolated(snippet() + "\nprint(repr(answer))", portable)
    record = {
        "id": "cat",
        "image": [f"{portable}/cat.jpg"],
        "conversations": [{"from": "user", "value": f"<ImageHere>{question}"}],
    }
    (portable / "ask.json").write_text(json.dumps([record]))
    flags = ["--data_path", f"{portable}/ask.json", "--output", f"{portable}/said.jsonl", "--bf16", "False"]
    run_ranks(1, generate, ["--model_name_or_path", str(trained), *flags, "--max_new_tokens", "2048"])
    expected = json.loads((portable / "said.jsonl").read_text())["prediction"]
    assert eval(printed.splitlines()[-1]) == expected
    assert len(expected.split()) > 1


def test_stock_peft_computes_the_trainers_logits_and_goes_on_training(world, trained, portable):
    inputs = {k: v for k, v in golden("xcomposer2").inputs("two_images_apart").items() if k != "labels"}
    images = inputs.pop("pixel_values")
    stored = {**inputs, **{f"image.{i}": image for i, image in enumerate(images)}}
    save_file({k: v.contiguous() for k, v in stored.items()}, portable / "inputs.safetensors")
    code = """
import torch
from peft import PeftModel

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("modern", trust_remote_code=True)
assert type(base).__module__.startswith("transformers_modules"), type(base).__module__
model = PeftModel.from_pretrained(base, "output/adapter", is_trainable=True).eval()
inputs = load_file("inputs.safetensors")
images = [inputs.pop(name) for name in sorted(inputs) if name.startswith("image.")]
logits = model(**{**inputs, "im_mask": inputs["im_mask"].bool()}, pixel_values=images).logits
logits.sum().backward()
assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_" in n)
save_file({"logits": logits.detach().contiguous()}, "outputs.safetensors")
model.save_pretrained("again")
"""
    run_isolated(code, portable)
    (expected,) = logits(reload(world / "model", trained), "two_images_apart")
    found = load_file(portable / "outputs.safetensors")["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    ours, theirs = adapter(trained)[1], load_file(portable / "again" / FILES[1])
    plain = {name for name in ours if "base_layer" in name}  # PLoRA in adapted layers: peft can't save it
    assert theirs.keys() == ours.keys() - plain
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_modern_base_links_the_weights_and_brings_all_else(world, portable):
    modern = portable / "modern"
    assert (modern / "model.safetensors").is_symlink()
    assert (modern / "model.safetensors").resolve() == (world / "model/model.safetensors").resolve()
    config = json.loads((modern / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_xcomposer2.")
    assert config["plora_alpha"]["wqkv"] == 8
    assert AutoTokenizer.from_pretrained(modern).is_fast
    config, _ = adapter(portable / "output/adapter")
    assert config["base_model_name_or_path"] == str(modern)
    # The adapter goes on training on it: the same weights are the same base.
    flags = ("--lora_weight_path", str(portable / "output/adapter"), "--model_name_or_path", str(modern))
    train_adapter(world, "on-modern", *flags, *WHOLE, steps=1)


def test_a_base_in_several_files_is_linked_with_an_index(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    (tmp_path / "model/model.safetensors").unlink()
    for i in (0, 1):
        part = {name: weights[name] for name in sorted(weights)[i::2]}
        save_file(part, tmp_path / f"model/odd-{i}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"odd-{i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert main(["--modernise", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


# --- checkpoints, and what cannot be done -----------------------------------------------------------------


@pytest.mark.parametrize("flags", [("--use_lora", "False", "--lora_r", "64", "--lora_alpha", "64"), ()])
def test_a_checkpoint_becomes_a_folder_of_its_model_alone(world, tmp_path, flags):
    flags = ("--save_strategy", "steps", "--save_steps", "2", *flags)
    if flags[4:]:
        flags += ("--lora_dropout", "0.05")
    folder, _ = train_adapter(world, f"checkpoints-{len(flags)}", *flags, ranks=2)
    assert main(["--checkpoint", str(folder / "checkpoint-2"), str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"resume", "run.json", "complete.json"}
    if "adapter_config.json" in names:
        reload(world / "model", tmp_path / "out")
    else:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_adapter_of_embeddings_is_refused_in_a_sentence(tmp_path):
    LoraConfig(target_modules=["embed_tokens"]).save_pretrained(str(tmp_path))
    rows = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 4)}
    save_file(rows, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DataError, match="lora_embedding_A adapts embeddings"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--merge", "{}/data", "{}/new"], "{}/data: no adapter_config.json, so this is not the folder"),
        (["--merge", "{}/trained", "{}/data"], "{}/data exists already; name a new folder"),
        (["--merge", "{}/trained", "{}/new", "--base", "{}/none"], "there is no folder {}/none, its base"),
        (["--merge", "{}/trained", "{}/new", "--base", "{}/data"], "{}/data: no config.json"),
        (["--checkpoint", "{}/model", "{}/new"], "{}/model: no complete.json, so this is not a complete"),
        (["--modernise", "{}/data", "{}/new"], "{}/data: no config.json; is this the folder of a model?"),
        (["--modernise", "{}/model", "{}/new", "--adapter", "{}/nope"], "{}/nope: no adapter_config.json"),
    ],
)
def test_one_sentence_says_what_cannot_be_done(world, trained, capsys, arguments, expected):
    assert main([argument.format(world) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected.format(world) in line
    assert not (world / "new").exists()
    assert not (world / ".saving-new").exists()


def test_an_adapter_for_another_base_is_not_merged(world, trained, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    for arguments in (
        ["--merge", trained, tmp_path / "out", "--base", tmp_path / "model"],
        ["--modernise", tmp_path / "model", tmp_path / "out", "--adapter", trained],
    ):
        assert main([*map(str, arguments)]) == 2
        assert "an adapter for another base" in capsys.readouterr().err
    with pytest.raises(DataError, match="an adapter for another base"):
        load_model(trained, tmp_path / "model", torch.float32)
    assert not Path(tmp_path / "out").exists()
