"""The model card of a trained folder, read back by huggingface_hub; what somebody wrote is never replaced."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel

from tests.tiny import flags, run_ranks, tiny_world
from tests.tiny_models import tiny_folder
from trainer.main import main
from trainer.model_card import is_ours, model_id, write_card
from trainer.models import load_config, parts_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a licence, and a full model and an adapter trained on it for a step."""
    world = tiny_world(tmp_path_factory.mktemp("card"))
    licence = "license: other\nlicense_name: weights\nlicense_link: https://example.com/licence"
    (world / "model" / "README.md").write_text(f"---\n{licence}\nlanguage: zh\n---\n# The base\n")
    run_ranks(1, main, flags(world, "pets", max_steps=1))
    options = {"max_steps": 1, "use_lora": True, "lora_r": 4, "fix_sampler": True}
    run_ranks(1, main, flags(world, "adapter", **options))
    return world


def rewrite(folder, base, step=1):
    """Write the card of a trained folder again, as training does."""
    config = load_config(base)
    write_card(folder, json.loads((folder / "run.json").read_text()), step, config, parts_of(config))
    return folder / "README.md"


def usage(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return code


def test_a_full_model_gets_a_card_that_names_base_licence_and_data(world):
    text = (world / "pets" / "README.md").read_text()
    card = ModelCard(text)
    assert (
        yaml.safe_load(text.split("---\n")[1])
        == card.data.to_dict()
        == {
            "base_model": "model",
            "datasets": ["colour", "both", "text"],
            "library_name": "transformers",
            "license": "other",
            "license_name": "weights",
            "license_link": "https://example.com/licence",
            "pipeline_tag": "image-text-to-text",
            "tags": ["custom_code", "xcomposer-fsdp"],
        }
    )
    assert "# pets\n\nA fine-tune of model" in card.text
    assert "| colour | 12 | 12 |" in card.text
    assert is_ours(text)


def test_the_code_in_the_card_loads_the_model(world, monkeypatch):
    monkeypatch.chdir(world)
    found = {}
    exec(usage(ModelCard.load(world / "pets" / "README.md")), found)
    assert type(found["model"]).__name__ == "InternLMXComposer2ForCausalLM"
    assert found["tokenizer"]("red").input_ids


def test_an_adapter_gets_a_card_of_peft_whose_code_loads_it_on_its_base(world, monkeypatch):
    card = ModelCard.load(world / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "model"
    assert card.data.tags[:3] == ["base_model:adapter:model", "lora", "transformers"]
    assert card.data.license == "other"
    monkeypatch.chdir(world)
    found = {}
    exec(usage(card), found)
    assert isinstance(found["model"], PeftModel)


@pytest.mark.parametrize(
    ("family", "task", "classes"),
    [
        ("qwen2_5_vl", "image-text-to-text", "AutoModelForImageTextToText, AutoProcessor"),
        ("llama", "text-generation", "AutoModelForCausalLM, AutoTokenizer"),
    ],
)
def test_a_model_of_transformers_has_its_own_task_and_classes(world, tmp_path, family, task, classes):
    base = tiny_folder(family, tmp_path / "base")
    run = json.loads((world / "pets" / "run.json").read_text())
    run["config"]["model_name_or_path"] = str(base)
    config = load_config(base)
    write_card(tmp_path, run, 1, config, parts_of(config))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == task
    assert card.data.license is None
    assert card.data.tags == ["xcomposer-fsdp"]
    assert f"from transformers import {classes}" in usage(card)
    assert "trust_remote_code" not in card.text


def test_the_models_evaluation_is_in_the_card(world):
    with (world / "pets" / "metrics.jsonl").open("a") as file:
        for step, loss in ((1, 2.5), (2, 1.25), (3, 1.5)):
            line = {"kind": "eval", "step": step, "loss": loss, "loss_by_source": {"doc": loss, "pets": None}}
            line["metrics"] = {"doc": {"anls": 0.8125}, "pets": {"exact_match": 0.5, "token_f1": 0.75}}
            file.write(json.dumps(line) + "\n")
    card = ModelCard.load(rewrite(world / "pets", world / "model", step=2))
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results == {
        ("doc", "loss"): 1.25,
        ("doc", "anls"): 0.8125,
        ("pets", "exact_match"): 0.5,
        ("pets", "token_f1"): 0.75,
    }
    assert card.data.metrics == ["loss", "anls", "exact_match", "token_f1"]
    assert card.data.model_name == "pets"
    assert "Steps: 2;" in card.text
    assert "Evaluation after step 2; loss: 1.25." in card.text
    assert "| doc | anls | 0.8125 |" in card.text


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("A fine-tune", "My fine-tune"),
        lambda text: text.replace("license: other", "license: mit"),
        lambda text: text + "\nMore.\n",
        lambda text: "",
        lambda text: "# Mine\n",
    ],
)
def test_an_edited_or_foreign_card_is_kept(world, tmp_path, capsys, edit):
    (tmp_path / "run.json").write_text((world / "pets" / "run.json").read_text())
    text = edit(rewrite(tmp_path, world / "model").read_text())
    (tmp_path / "README.md").write_text(text)
    rewrite(tmp_path, world / "model")
    assert (tmp_path / "README.md").read_text() == text
    assert "README.md is kept" in capsys.readouterr().err


def test_names_and_licences_that_break_yaml_or_tables_are_quoted(world, tmp_path):
    folder, base = tmp_path / "a: b # c|d", tmp_path / "models--internlm--xcomposer2-vl" / "snapshots" / "1"
    folder.mkdir()
    run = json.loads((world / "pets" / "run.json").read_text())
    run["config"]["model_name_or_path"] = str(base)
    run["data_plan"][0]["path"] = "/data/a|b: [c].json"
    config = load_config(world / "model")
    write_card(folder, run, 1, config, parts_of(config))
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets[0] == "a|b: [c]"
    assert card.data.base_model == model_id(base) == "internlm/xcomposer2-vl"
    assert r"| a\|b: [c] | 12 |" in card.text


def test_a_card_that_cannot_be_written_is_a_warning(world, tmp_path, capsys):
    (tmp_path / "run.json").write_text((world / "pets" / "run.json").read_text())
    (tmp_path / "README.md").mkdir()
    rewrite(tmp_path, world / "model")
    assert "README.md is not written" in capsys.readouterr().err
