"""What a user gets wrong is said in one sentence with the place and the remedy, before any weight is read."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

import trainer.prepare
from tests.fault_cases import at_step
from tests.tiny import flags, read_metrics, run_ranks, tiny_data, tiny_model
from trainer.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("bad") / "model")


@pytest.fixture
def data(tmp_path):
    tiny_data(tmp_path / "data")
    return tmp_path / "data"


def run(status, model, data_path, output_dir, *more, ranks=1, **changes):
    options = {"model_name_or_path": model, "data_path": data_path, "max_steps": 3, "learning_rate": None}
    argv = flags(Path(), output_dir, *more, **{**options, "per_device_train_batch_size": 4, **changes})
    return run_ranks(ranks, main, argv, status=status)


def errors_of(output):
    return [line for line in output.splitlines() if line.startswith("error: ")]


def change_record(data, index, **fields):
    records = json.loads((data / "colour.json").read_text())
    records[index] |= fields
    records[index] = {name: value for name, value in records[index].items() if value is not ...}
    (data / "colour.json").write_text(json.dumps(records))


QUESTION = {"from": "user", "value": "<ImageHere>what colour is it?"}
ANSWER = {"from": "assistant", "value": "red"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"conversations": ...}, "has no 'conversations'"),
        ({"conversations": [{"from": "usr", "value": "hi"}, ANSWER]}, "unknown role 'usr'"),
        ({"conversations": [QUESTION]}, "no assistant turn"),
        (
            {"conversations": [{**QUESTION, "value": "<ImageHere><ImageHere>"}, ANSWER]},
            "2 <ImageHere> but 1 images",
        ),
        ({"image": ["red40.png", "red90.png"]}, "1 <ImageHere> but 2 images"),
    ],
)
def test_a_bad_record_is_named_by_file_index_and_id(model, data, tmp_path, fields, said):
    change_record(data, 7, **fields)
    (output,) = run(2, model, data / "data.txt", tmp_path / "out")
    (error,) = errors_of(output)
    assert "colour.json: record 7 (id 'colour-7')" in error
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("missing.json 1\n", "missing.json"),
        ("", "names no file"),
        ("# only a comment\n\n", "names no file"),
        ("colour.json 0\n", "is no sample an epoch"),
        ("colour.json -1\n", "is not a number of samples"),
        ("broken.json\n", "broken.json"),
    ],
)
def test_a_bad_data_txt_is_named_by_file_and_line(model, data, tmp_path, content, said):
    (data / "broken.json").write_text('[{"id": 1, "conversations": [')
    (data / "data.txt").write_text(content)
    (output,) = run(2, model, data / "data.txt", tmp_path / "out")
    (error,) = errors_of(output)
    assert said in error
    assert str(data) in error
    assert "Traceback" not in output


def test_problems_of_data_and_model_are_reported_together_and_once_for_all_ranks(model, data, tmp_path):
    shutil.copytree(model, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    (data / "data.txt").write_text("none.json\nnothing.json\n")
    first, second = run(2, tmp_path / "empty", data / "data.txt", tmp_path / "out", ranks=2)
    errors = errors_of(first)
    assert len(errors) == 3
    assert "none.json" in errors[0]
    assert "nothing.json" in errors[1]
    assert f"{tmp_path}/empty: no *.safetensors file" in errors[2]
    assert not errors_of(second)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_output_dir_that_is_the_base_model_or_the_adapter_is_refused(model, data, tmp_path):
    """Under any name; together with the problems of the data; and nothing in it changes."""
    base = shutil.copytree(model, tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    before = contents(base)
    for name in (base, tmp_path / "link", f"{base}/../base"):
        (output,) = run(2, base, data / "data.txt", name)
        (error,) = errors_of(output)
        assert f"--output_dir {name} is the folder of --model_name_or_path" in error
    (tmp_path / "bad.txt").write_text("none.json\n")
    (output,) = run(2, base, tmp_path / "bad.txt", base)
    assert len(errors_of(output)) == 2
    assert contents(base) == before
    lora = ["--use_lora", "True", "--fix_sampler", "True", "--lora_r", "4"]
    run(0, model, data / "data.txt", tmp_path / "adapter", *lora)
    before = contents(tmp_path / "adapter")
    (output,) = run(
        2,
        model,
        data / "data.txt",
        tmp_path / "adapter",
        *lora[:4],
        "--lora_weight_path",
        f"{tmp_path}/adapter",
    )
    assert f"--output_dir {tmp_path}/adapter is the folder of --lora_weight_path" in errors_of(output)[0]
    assert contents(tmp_path / "adapter") == before


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "adapter_config.json", "model-00001-of-00002.safetensors", "tokenizer.model"),
        *("run.json", "checkpoint-500/trainer_state.json"),
    ],
)
def test_an_output_dir_with_what_no_run_of_ours_wrote_is_refused(model, data, tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("precious")
    (output,) = run(2, model, data / "data.txt", tmp_path / "out")
    (error,) = errors_of(output)
    assert f"--output_dir {tmp_path}/out holds {name.split('/')[0]}, which no run of this trainer" in error
    assert [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["precious"]


def test_an_output_dir_with_notes_and_the_folder_of_an_earlier_run_are_used(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("notes.txt", "slurm-123.log", "checkpoint-notes", "config.yaml"):
        (tmp_path / "out" / name).write_text("precious")
    run(0, model, data / "data.txt", tmp_path / "out", "--save_strategy", "steps", "--save_steps", "2")
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"
    (output,) = run(0, model, data / "data.txt", tmp_path / "out")
    assert "nothing to do" in output
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (output,) = run(2, model, data / "data.txt", checkpoint)
    assert f"--output_dir {checkpoint} is itself a checkpoint" in errors_of(output)[0]
    (output,) = run(2, checkpoint, data / "data.txt", tmp_path / "out")
    assert "holds the checkpoint that --model_name_or_path names" in errors_of(output)[0]


def test_contradictory_flags_are_refused_before_anything_is_read(model, data, tmp_path):
    more = ["--img_size", "70", "--hd_num", "4", "--vit_learning_rate", "1e-5", "--deepspeed", "zero2.json"]
    (output,) = run(2, model, data / "data.txt", tmp_path / "out", *more)
    assert len(errors_of(output)) == 3


def test_unreadable_images_are_all_named_before_training(model, data, tmp_path):
    (data / "red40.png").write_bytes(b"not an image")
    first, second = run(2, model, data / "data.txt", tmp_path / "out", "--max_steps", "-1", ranks=2)
    errors = errors_of(first)
    assert len(errors) == 4
    assert "colour.json: record 0 (id 'colour-0')" in errors[0]
    assert "red40.png cannot be opened" in errors[0]
    assert not errors_of(second)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_breaks_in_mid_training_ends_the_run_with_its_place(model, data, tmp_path, workers):
    """Without packing no image is looked at before its turn."""
    (data / "red40.png").write_bytes(b"not an image")
    more = ["--dataloader_num_workers", workers, "--packing", "False", "--rehearse", "False"]
    (output,) = run(1, model, data / "data.txt", tmp_path / "out", *more)
    (error,) = errors_of(output)
    assert "colour.json: record" in error or "both.json: record" in error
    assert "red40.png" in error
    assert "Traceback" not in output


def test_unreadable_images_are_skipped_and_counted_when_asked_for(model, data, tmp_path):
    (data / "red40.png").write_bytes(b"not an image")
    more = ["--on_bad_sample", "skip", "--max_steps", "-1"]
    (output,) = run(0, model, data / "data.txt", tmp_path / "out", *more)
    lines = read_metrics(tmp_path / "out")
    bad = [
        record["id"]
        for name in ("colour", "both")
        for record in json.loads((data / f"{name}.json").read_text())
        if "red40.png" in record["image"]
    ]
    assert sum(line["left_out_samples"] for line in lines) == len(bad)
    assert sum(line["samples"] for line in lines) == 30 - len(bad)
    assert all(f"'{record_id}'" in output for record_id in bad)


def test_a_sample_that_truncation_leaves_without_an_answer_is_named_and_trains_nothing(model, data, tmp_path):
    image_tokens, question = 25, 12
    more = f"--max_length {image_tokens + question} --max_steps -1 --dataloader_num_workers 0".split()
    (output,) = run(0, model, data / "data.txt", tmp_path / "out", *more)
    lines = read_metrics(tmp_path / "out")
    assert sum(line["left_out_samples"] for line in lines) > 0
    assert "keeps no answer token within max_length=37" in output
    assert all(line["loss"] == line["loss"] for line in lines)  # never NaN


def test_a_bomb_of_an_image_is_refused(model, data, tmp_path):
    Image.new("1", (40_000, 40_000)).save(data / "red40.png")
    (output,) = run(2, model, data / "data.txt", tmp_path / "out")
    assert all("red40.png" in error and "1600000000 pixels" in error for error in errors_of(output))


def test_text_alone_with_parts_that_only_images_reach_is_refused_with_all_else(model, data, tmp_path):
    more = ["--fix_vit", "False", "--attn_implementation", "flex_attention", "--image_root", str(tmp_path)]
    (output,) = run(2, model, data / "text.json", tmp_path / "out", *more)
    flex, vision, projector = errors_of(output)
    assert "flex_attention has no backward pass on a CPU" in flex
    assert "the vision tower would get no gradient: freeze it with --fix_vit True" in vision
    assert "the projector would get no gradient: freeze it with --fix_sampler True" in projector
    run(0, model, data / "text.json", tmp_path / "out", "--fix_sampler", "True")


@pytest.mark.parametrize("kernel", ["flash_attention_2", "kernels-community/flash-attn2", "flesh"])
def test_an_attention_kernel_that_is_not_there_is_a_sentence(model, data, tmp_path, kernel):
    (output,) = run(2, model, data / "data.txt", tmp_path / "out", "--attn_implementation", kernel)
    (error,) = errors_of(output)
    assert f"--attn_implementation {kernel}: " in error
    assert "use --attn_implementation sdpa" in error
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def main_and_change(path, when, arguments):
    """A run in the midst of which somebody cuts a file short: while lengths are measured, or at step 2."""
    if when == "measuring":
        needed = trainer.prepare.needed_records
        trainer.prepare.needed_records = lambda *given: (os.truncate(path, 100), needed(*given))[1]
    else:
        at_step(2, 0, lambda: os.truncate(path, 100))
    return main(arguments)


@pytest.mark.parametrize(("when", "workers", "status"), [("measuring", 0, 2), ("step", 0, 1), ("step", 2, 1)])
def test_a_json_file_that_changes_ends_the_run_in_a_sentence(model, data, tmp_path, when, workers, status):
    """Also where bad samples are skipped: not one of its records can be trusted."""
    options = {"model_name_or_path": model, "max_steps": 60, "per_device_train_batch_size": 4}
    argv = flags(tmp_path, "out", on_bad_sample="skip", dataloader_num_workers=workers, **options)
    (output,) = run_ranks(1, main_and_change, data / "text.json", when, argv, status=status)
    (error,) = errors_of(output)
    assert error.endswith(f"{data}/text.json: the file has changed while it was in use; start again")
    assert "Traceback" not in output


def test_the_start_warns_of_samples_that_lose_their_tail_and_of_files_repeated_often(model, data, tmp_path):
    (data / "data.txt").write_text("colour.json\ntext.json 0.13\n")
    (output,) = run(0, model, data / "data.txt", tmp_path / "out", "--max_steps", "-1", "--max_length", "46")
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    tails, repeated = [line for line in warnings if "text.json: " in line or "are truncated" in line]
    assert tails == "warning: colour: 12 of 12 measured samples are over max_length=46 and are truncated"
    assert "text.json: 130 samples an epoch of 12 records, each about 11 times" in repeated
