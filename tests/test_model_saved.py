"""A saved folder: the same model again, in this project and in a process that has only transformers."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.model_cases import FAMILIES, golden
from tests.tiny import GOLDEN, word_tokenizer
from trainer.models import load_config, parts_of

CASE = {"xcomposer2": "two_images_apart", "xcomposer2-hd": "two_images_multi_turn"}


def save(folder, family, dtype=torch.float32):
    model = golden(family).model().to(dtype)
    model.save_pretrained(folder)
    word_tokenizer(folder)
    for path in parts_of(model.config).files:
        shutil.copy(path, folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit_and_the_dtype(tmp_path, family, dtype):
    model = save(tmp_path, family, dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert again.config.image_size == model.config.image_size
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(GOLDEN / family / "model.safetensors").keys()
    )
    inputs = golden(family).inputs(CASE[family])
    with torch.no_grad():
        expected = model(**inputs).logits
        found = again.eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
    assert again.generation_config.eos_token_id == [2, 318]


SCRIPT = """
import sys
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
assert not any(name.split(".")[0] in ("trainer", "data") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert "trainer" not in type(model).__module__, type(model).__module__
inputs = load_file(out + "/inputs.safetensors")
images = [inputs.pop(name) for name in sorted(inputs) if name.startswith("image.")]
inputs["im_mask"] = inputs["im_mask"].bool()
with torch.no_grad():
    logits = model(**inputs, pixel_values=images).logits
answer = model.generate(**inputs, pixel_values=images, max_new_tokens=5, do_sample=False, eos_token_id=320)
tokenizer = AutoTokenizer.from_pretrained(folder)
picture = Image.new("RGB", (60, 60))
text, history = model.chat(tokenizer, "<ImageHere>what is it?", image=picture, max_new_tokens=3)
assert history == [("<ImageHere>what is it?", text)]
save_file({"logits": logits, "answer": answer}, out + "/outputs.safetensors")
model.save_pretrained(out + "/again")
print(type(model).__module__)
"""


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])]
)
def test_a_saved_folder_works_without_this_project(tmp_path, family):
    folder, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    model = save(folder, family)
    inputs = {k: v for k, v in golden(family).inputs(CASE[family]).items() if k != "labels"}
    images = inputs.pop("pixel_values")
    stored = {**inputs, **{f"image.{i}": image for i, image in enumerate(images)}}
    save_file({k: v.contiguous() for k, v in stored.items()}, out / "inputs.safetensors")
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(folder), str(out)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "transformers_modules" in done.stdout
    outputs = load_file(out / "outputs.safetensors")
    with torch.no_grad():
        expected = model(**inputs, pixel_values=images).logits
    torch.testing.assert_close(outputs["logits"], expected, rtol=0, atol=1e-5)
    answer = model.generate(
        **inputs, pixel_values=images, max_new_tokens=5, do_sample=False, eos_token_id=320
    )
    assert torch.equal(outputs["answer"], answer)
    # Saved once more by that process, it brings its code along.
    assert (out / "again" / "modeling_xcomposer2.py").is_file()
    assert json.loads((out / "again" / "config.json").read_text())["auto_map"]["AutoConfig"]


def folder_with(tmp_path, change):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "xcomposer2" / name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_a_checkpoint_without_post_layernorm_loads_in_silence(tmp_path, caplog):
    prefix = "vit.vision_tower.vision_model.post_layernorm."

    def change(weights):
        del weights[prefix + "weight"], weights[prefix + "bias"]

    folder = folder_with(tmp_path, change)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert prefix + "weight" in model.state_dict()
    assert torch.equal(model.state_dict()[prefix + "weight"], torch.ones(32))


def test_unknown_keys_of_a_checkpoint_are_reported_and_harmless(tmp_path):
    folder = folder_with(tmp_path, lambda weights: weights.update({"video_proj.weight": torch.ones(2, 2)}))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"video_proj.weight"}
    with torch.no_grad():
        logits = model.eval()(**golden("xcomposer2").inputs("one_image_front")).logits
    assert golden("xcomposer2").logits_error("one_image_front", logits) < 2e-5


def test_missing_partial_lora_starts_as_a_new_one(tmp_path):
    def change(weights):
        for name in [name for name in weights if "Plora" in name and ".layers.1." in name]:
            del weights[name]

    model = AutoModelForCausalLM.from_pretrained(folder_with(tmp_path, change))
    wqkv = model.model.layers[1].attention.wqkv
    assert not wqkv.Plora_B.weight.any()
    bound = (1 / 64) ** 0.5
    assert 0.5 * bound < wqkv.Plora_A.weight.abs().max() <= bound
    kept = load_file(GOLDEN / "xcomposer2" / "model.safetensors")
    for name in ("model.layers.1.attention.wqkv.weight", "model.layers.0.attention.wqkv.Plora_B.weight"):
        assert torch.equal(model.state_dict()[name], kept[name])


def test_the_files_are_all_that_the_code_imports():
    names = {path.stem for path in parts_of(load_config(GOLDEN / "xcomposer2")).files}
    for path in parts_of(load_config(GOLDEN / "xcomposer2")).files:
        for line in path.read_text().splitlines():
            if line.startswith("from ."):
                assert line.split()[1].lstrip(".") in names, f"{path.name}: {line}"
            assert not line.startswith(("from trainer", "import trainer", "from data.", "import data.")), (
                path.name
            )
