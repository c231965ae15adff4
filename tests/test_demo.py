"""The embedded demo: its data says what it should, and (slow) the whole of it learns to see in time."""

import json
import subprocess
import sys

import pytest
import torch

from data.easy_vqa import in_chinese, write_demo_data
from data.mixture import read_mixture
from tests.tiny import ROOT
from trainer.demo import num_ranks
from trainer.models.xcomposer2.demo_base import make_tokenizer

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


def test_the_demos_tokenizer_reads_back_whatever_people_write():
    tokenizer = make_tokenizer(["what colour is the shape?", "blue", "是什么颜色？"] * 3)
    for text in ("A Blue & red one.", "猫和狗", "naïve 🙂", "<0x41>", "blue"):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_folder_that_is_no_demo_is_not_emptied(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    command = [sys.executable, "-m", "trainer.demo", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "contains something other than a demo" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(("accelerators", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_a_single_accelerator_takes_a_single_rank(monkeypatch, accelerators, ranks):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: accelerators)
    assert num_ranks() == ranks


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
def test_the_demo_learns_to_see_and_an_adapter_teaches_it_chinese(tmp_path):
    subprocess.run(["./torchrun.sh", "demo", str(tmp_path / "demo")], cwd=ROOT, check=True)
    result = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert result["colour"] >= 0.95
    assert result["all"] >= result["blind"] + 0.15
    assert result["chinese_after"] >= result["chinese_before"] + 0.3
