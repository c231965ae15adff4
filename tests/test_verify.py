"""`python -m trainer.verify`: what it compares, and that whatever is broken is a row FAIL and status 1."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tests.benchmarks import families
from tests.benchmarks.families import forked_run
from tests.data_fixtures import record, write_json
from tests.tiny import ROOT, run_ranks, tiny_data, tiny_model
from tests.tiny_models import tiny_folder
from trainer import verify
from trainer.models import shrink
from trainer.models.generic import modeling
from trainer.models.generic.packed_attention import ATTENTION


def verified(folder, *words, status=0, breaks=lambda: None, run=forked_run):
    """(what it prints, the rows of the JSON by name)"""

    def main(argv):
        verify.train = run
        breaks()
        return verify.main(argv)

    argv = [*map(str, words), "--output", str(folder / "verify.json")]
    (printed,) = run_ranks(1, main, argv, status=status)
    if status == 2:
        return printed, {}
    return printed, {row["name"]: row for row in json.loads((folder / "verify.json").read_text())["checks"]}


def test_a_model_with_pictures_passes_every_check(tmp_path):
    model = tiny_folder("qwen2_5_vl", tmp_path / "model")
    printed, rows = verified(tmp_path, model)
    assert rows.keys() == verify.WHAT.keys()
    assert all(row["passed"] and 0 <= row["measured"] <= row["limit"] for row in rows.values())
    assert printed.count("   pass") == len(verify.WHAT)
    assert "all passed; also in" in printed
    assert rows["leak"]["measured"] == rows["resumed"]["measured"] == 0
    assert max(row["measured"] for row in rows.values()) < 1e-5


def test_a_broken_model_and_a_failing_run_are_rows_that_fail(tmp_path):
    model = tiny_folder("qwen3", tmp_path / "model")

    def run(num_ranks, flags):
        raise verify.RunFailedError("status 1: error: no such thing")

    def leaks():
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)

    printed, rows = verified(tmp_path, model, status=1, breaks=leaks, run=run)
    assert [name for name, row in rows.items() if row["passed"]] == ["tokens", "logits"]
    assert "FAIL   model.layers.0.self_attn: other words in one sample change" in printed
    assert rows["ranks"]["measured"] is None
    assert printed.count("FAIL   status 1: error: no such thing") >= 3
    assert "NOT all passed" in printed


def test_adapters_that_peft_does_not_apply_fail(tmp_path):
    """peft drops what it does not find; here the saved names are none of its own."""
    model = tiny_folder("qwen3", tmp_path / "model")

    def only_adapters(num_ranks, flags):
        if "--use_lora" not in flags:
            raise verify.RunFailedError("not of interest")
        forked_run(num_ranks, flags)
        weights = next((tmp_path / "work").glob("**/adapter/checkpoint-2")) / "adapter_config.json"
        weights.write_text(weights.read_text().replace('"lora_alpha": 64', '"lora_alpha": 6400'))

    def keep_folder():
        (tmp_path / "work").mkdir()
        verify.tempfile.tempdir = str(tmp_path / "work")

    _, rows = verified(tmp_path, model, status=1, breaks=keep_folder, run=only_adapters)
    assert rows["adapter"]["measured"] > rows["adapter"]["limit"]
    assert not rows["adapter"]["problem"]


def test_bad_input_is_a_sentence_and_status_2(tmp_path):
    assert "there is no such folder" in verified(tmp_path, tmp_path / "nowhere", status=2)[0]
    model = tiny_folder("qwen3", tmp_path / "model")
    assert "--data_path none.txt: there is no such file" in verified(tmp_path, model, "none.txt", status=2)[0]
    (tmp_path / "empty").mkdir()
    assert "no config.json" in verified(tmp_path, tmp_path / "empty", status=2)[0]

    def hardly_any_memory():
        verify.os.sysconf = lambda name: 10

    printed, _ = verified(tmp_path, model, status=2, breaks=hardly_any_memory)
    assert "use --tiny True, which verifies a small model of the same family" in printed


def test_the_shortest_samples_of_the_users_data_are_verified(tmp_path):
    data = tiny_data(tmp_path / "data")
    settings = verify.Settings(str(tiny_folder("qwen2_5_vl", tmp_path / "model")), str(data))
    verify.prepare(settings, tmp_path)
    picture, text = json.loads((tmp_path / "data.json").read_text())
    assert picture["image"] == [str(tmp_path / "data" / "red40.png")]
    assert picture["conversations"][0] == {"from": "user", "value": "<ImageHere>what colour is it?"}
    assert text == {"image": [], "conversations": text["conversations"]}
    assert text["conversations"][0]["value"].startswith("say w")

    settings.data_path = str(write_json(tmp_path / "only.json", [record("Only text.", "Yes.")]))
    verify.prepare(settings, tmp_path)
    picture, text = json.loads((tmp_path / "data.json").read_text())
    assert picture["image"] == [str(tmp_path / "picture.png")]
    assert text["conversations"][1]["value"] == "Yes."


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "internvl", "glm4v", "qwen3_5"]
)
def test_a_published_size_shrinks_to_a_small_model_of_its_class(family):
    config = CONFIG_MAPPING[family]()
    small = shrink.shrunk(config)
    with torch.device("meta"):
        models = [modeling.build(value) for value in (config, small)]
    whole, tiny = (sum(p.numel() for p in model.parameters()) for model in models)
    assert type(models[0]) is type(models[1])
    rows = small.get_text_config().vocab_size * small.get_text_config().hidden_size
    assert tiny - 2 * rows < whole / 100
    parts = modeling.find_parts(models[1])
    language, vision = parts.blocks(models[1])
    assert (len(language), len(vision)) == (2, shrink.VISION_BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["xcomposer2", "qwen3", "gemma3"])
def test_the_command_verifies_a_tiny_model_of_a_family_in_its_own_processes(family, tmp_path):
    model = tmp_path / "model"
    tiny_model(model) if family == "xcomposer2" else tiny_folder(family, model)
    command = [sys.executable, "-m", "trainer.verify", str(model), "--tiny", "True"]
    command += ["--output", str(tmp_path / "verify.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("   pass") == len(verify.WHAT)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.ALL)
def test_the_committed_table_of_families_has_the_verdicts_of_today(family):
    found = families.cells(families.results(family))
    assert families.verdict(found) == families.verdict(families.committed()[family])


def test_the_committed_table_has_every_family_and_no_failure():
    rows = families.committed()
    assert tuple(rows) == families.ALL
    assert not any("FAIL" in row for row in rows.values())
    assert len(families.verdict(rows["xcomposer2"])) == len(verify.WHAT)
