"""The embedded demo: its data says what it should, and (slow) the whole of it learns to see in time."""

import importlib
import json
import math
import subprocess

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

import data.easy_vqa
import trainer.demo
from data.easy_vqa import in_chinese, write_demo_data
from data.mixture import read_mixture
from tests.tiny import ROOT, read_metrics, run_ranks
from trainer.demo import main, num_ranks
from trainer.models import demo_bases
from trainer.models.demo_bases import DEMO_BASES
from trainer.models.xcomposer2 import demo_base

pytest.importorskip("easy_vqa", reason="the demo's pictures: pip install -e '.[demo]'")


def test_every_question_is_asked_alone_and_test_pictures_stay_unseen(tmp_path):
    write_demo_data(tmp_path, num_images=60)
    sources = read_mixture(tmp_path / "data.txt")
    assert [source.name for source in sources] == ["open", "yesno", "text"]
    trained = set()
    for source in sources:
        for index in range(len(source.records)):
            sample = source.sample(index)
            assert [role for role, _ in sample.turns] == ["user", "assistant"]
            trained.update(sample.images)
    asked = {image for r in json.loads((tmp_path / "test.json").read_text()) for image in r.get("image", [])}
    assert trained
    assert asked
    assert all(image.startswith("images/train/") for image in trained)
    assert all(image.startswith("images/test/") for image in asked)


@pytest.mark.parametrize(
    ("question", "chinese"),
    [
        ("what color is the circle?", "圆形是什么颜色？"),
        ("is there a red shape?", "有红色图形吗？"),
        ("what shape is in the image?", "图中是什么形状？"),
    ],
)
def test_questions_are_translated(question, chinese):
    assert in_chinese(question) == chinese


@pytest.mark.parametrize(
    "make_tokenizer", [demo_base.make_tokenizer, lambda texts: demo_bases.make_tokenizer(texts, ["<image>"])]
)
def test_the_demos_tokenizer_reads_back_whatever_people_write(make_tokenizer):
    tokenizer = make_tokenizer(["what colour is the shape?", "blue", "是什么颜色？"] * 3)
    for text in ("A Blue & red one.", "猫和狗", "naïve 🙂", "<0x41>", "blue"):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_folder_that_is_no_demo_is_not_emptied(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main([str(tmp_path)]) == 2
    assert "contains something other than a demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_high_resolution_of_a_family_without_tiles_is_refused_before_anything_is_written(tmp_path, capsys):
    assert main([str(tmp_path / "demo"), "--family", "llava", "--high_resolution"]) == 2
    assert "has no model with tiles of llava" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(("accelerators", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_a_single_accelerator_takes_a_single_rank(monkeypatch, accelerators, ranks):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: accelerators)
    assert num_ranks() == ranks


def in_forked_ranks(module, *arguments):
    """`trainer.demo.run` without torchrun, whose ranks take seconds to import torch and transformers."""
    run_ranks(num_ranks(), importlib.import_module(module).main, [str(word) for word in arguments])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_demo_of_another_family_trains_answers_and_adds_an_adapter(family, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.demo, "run", in_forked_ranks)
    monkeypatch.setattr(data.easy_vqa, "CHINESE_TXT", "chinese.json 0.15\n")
    out = tmp_path / "demo"
    assert main([str(out), "--family", family, "--num_images", "4", "--epochs", "0.02"]) == 0
    result = json.loads((out / "demo.json").read_text())
    assert all(0 <= result[kind] <= 1 for kind in ("colour", "shape", "yesno", "all", "text"))
    answers = (out / "adapter" / "chinese_test-predictions.jsonl").read_text().splitlines()
    assert len(answers) == len(json.loads((out / "data" / "chinese_test.json").read_text()))
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    assert model.config.model_type == family
    assert 250_000 <= model.num_parameters() <= 1_000_000
    for folder in ("model", "adapter"):
        [line] = read_metrics(out / folder)
        assert line["loss"] < math.log(model.config.text_config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert len(tokenizer.encode("blue", add_special_tokens=False)) == 1
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(out / "model")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--high_resolution"]])
def test_a_short_demo_runs_to_its_end(tmp_path, more):
    command = [
        "./torchrun.sh",
        "demo",
        str(tmp_path / "demo"),
        "--num_images",
        "20",
        "--epochs",
        "0.02",
        *more,
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert all(0 <= result[kind] <= 1 for kind in ("colour", "shape", "yesno", "all", "text"))
    adapter = json.loads((tmp_path / "demo" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "demo" / "model")


@pytest.mark.slow
@pytest.mark.parametrize("family", DEMO_BASES)
def test_the_demo_learns_to_see_and_an_adapter_teaches_it_chinese(family, tmp_path):
    command = ["./torchrun.sh", "demo", str(tmp_path / "demo"), "--family", family]
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert result["colour"] >= 0.95
    assert result["all"] >= result["blind"] + 0.15
    assert result["chinese_after"] >= result["chinese_before"] + 0.3
