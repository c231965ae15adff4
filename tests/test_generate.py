"""Answers from the command line: the same from one rank and from two, in any batch, or a sentence why not."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from data.flags import parse_flags
from data.loader import SampleReader
from data.mixture import read_mixture
from data.tokens import SampleEncoder
from tests.tiny import ROOT, run_ranks, tiny_data, tiny_model
from trainer.generate import Questions, is_correct, load_model, main, one_question
from trainer.models import load_conversation, load_image_processor
from trainer.scores import scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    tiny_model(folder / "model")
    tiny_data(folder / "data")
    records = json.loads((folder / "data" / "both.json").read_text())
    records += json.loads((folder / "data" / "text.json").read_text())
    records.append({"id": "open", "conversations": [{"from": "user", "value": "how many?"}]})
    (folder / "data" / "mixed.json").write_text(json.dumps(records))
    return folder


def flags(folder, *more):
    common = f"--model_name_or_path {folder}/model --data_path {folder}/data/mixed.json --bf16 False"
    return [*common.split(), "--max_new_tokens", "6", *map(str, more)]


def predictions(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ranks_and_batches_change_no_answer_and_keep_the_order(folder, tmp_path):
    (said,) = run_ranks(1, main, flags(folder, "--batch_size", 5, "--output", tmp_path / "one.jsonl"))
    run_ranks(2, main, flags(folder, "--batch_size", 3, "--output", tmp_path / "two.jsonl"))
    one = predictions(tmp_path / "one.jsonl")
    assert one == predictions(tmp_path / "two.jsonl")
    records = json.loads((folder / "data" / "mixed.json").read_text())
    assert [row["id"] for row in one] == [record["id"] for record in records]
    assert [row.get("answer") for row in one[:-1]] == [r["conversations"][-1]["value"] for r in records[:-1]]
    assert "correct" not in one[-1]
    assert f"of {len(records) - 1} correct" in said
    assert len({row["prediction"] for row in one}) > 1


def test_an_answer_is_what_the_model_gives_alone(folder, tmp_path):
    run_ranks(1, main, flags(folder, "--batch_size", 8, "--output", tmp_path / "all.jsonl"))
    model, model_folder = load_model(folder / "model", None, torch.float32)
    sources = read_mixture(folder / "data" / "mixed.json", skip_bad=True)
    encoder = SampleEncoder(load_conversation(model_folder), 256)
    reader = SampleReader(sources, encoder, load_image_processor(model.config))
    for index, row in list(enumerate(predictions(tmp_path / "all.jsonl")))[::5]:
        _, prompt, pixels = reader.read_prompt(0, index)
        ids = torch.from_numpy(prompt.input_ids)[None]
        images = {"pixel_values": pixels, "im_mask": torch.from_numpy(prompt.im_mask)[None]} if pixels else {}
        for _ in range(6):  # greedy, without a cache
            with torch.no_grad():
                token = model(ids, **images).logits[0, -1].argmax()
            if token.item() in (2, 318):
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
            if images:
                images["im_mask"] = torch.nn.functional.pad(images["im_mask"], (0, 1))
        answer = encoder.tokenizer.decode(ids[0, len(prompt.input_ids) :], skip_special_tokens=True)
        assert row["prediction"] == answer.strip()


def test_a_single_question_is_answered_on_the_standard_output(folder):
    image = folder / "data" / "red40.png"
    arguments = f"--model_name_or_path {folder}/model --image {image} --max_new_tokens 3 --bf16 False".split()
    (said,) = run_ranks(1, main, [*arguments, "--question", "what colour is it?"])
    assert len(said.strip().splitlines()) == 1


def test_drawing_depends_on_the_seed_alone(folder, tmp_path):
    drawn = []
    for seed in (1, 1, 2):
        more = ("--do_sample", "True", "--temperature", 3, "--seed", seed, "--output", tmp_path / "p.jsonl")
        run_ranks(1, main, flags(folder, *more))
        drawn.append(predictions(tmp_path / "p.jsonl"))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--data_path", "none.json"], "--data_path none.json: there is no such file"),
        (["--model_name_or_path", "none"], "--model_name_or_path none: there is no such folder"),
        (["--question", "why?"], "give either --data_path or --question"),
        (["--temperature", "2"], "no effect without --do_sample"),
        (["--bach_size", "2"], "did you mean --batch_size?"),
        (["--metrics", "anls", "token_f2"], "--metrics: 'token_f2' is no metric; did you mean token_f1?"),
    ],
)
def test_bad_flags_are_a_sentence(folder, change, said):
    (output,) = run_ranks(1, main, flags(folder, *change), status=2)
    assert said in output
    assert "Traceback" not in output


def test_a_question_that_does_not_fit_is_named_and_never_cut(folder, tmp_path):
    more = ("--max_length", 40, "--output", tmp_path / "p.jsonl")
    (output,) = run_ranks(1, main, flags(folder, *more), status=1)
    assert "both-0" in output
    assert "longer than max_length=40" in output
    assert not (tmp_path / "p.jsonl").exists()


def test_metrics_are_in_every_row_with_an_answer_and_their_means_in_the_last_line(folder, tmp_path):
    more = ("--metrics", "exact_match", "token_f1,anls", "--output", tmp_path / "p.jsonl")
    (said,) = run_ranks(1, main, flags(folder, *more))
    rows = predictions(tmp_path / "p.jsonl")
    answered = [row for row in rows if "answer" in row]
    assert "scores" not in rows[-1]
    names = ("exact_match", "token_f1", "anls")
    for row in answered:
        assert row["scores"] == scores(row["prediction"], [row["answer"]], names)
        assert row["scores"]["exact_match"] == float(row["correct"])
    f1 = sum(row["scores"]["token_f1"] for row in answered) / len(answered)
    assert f", exact_match {sum(row['correct'] for row in answered) / len(answered):.1%}" in said
    assert f", token_f1 {f1:.1%}, anls " in said


def test_an_answer_counts_whatever_its_case_space_and_full_stop():
    assert is_correct(" Blue.", "blue")
    assert is_correct("是。", "是")
    assert not is_correct("light blue", "blue")


# --- nothing is lost ---------------------------------------------------------------------------------------


def with_a_missing_image(folder, path):
    """The questions, of which the sixth names an image that is not there."""
    records = json.loads((folder / "data" / "mixed.json").read_text())
    records[5] = {**records[0], "id": "gone", "image": ["gone.png", "red40.png"]}
    path.write_text(json.dumps(records))
    return path


def test_a_missing_image_costs_one_answer_when_asked_for(folder, tmp_path):
    questions = with_a_missing_image(folder, tmp_path / "q.json")
    more = ["--data_path", questions, "--image_root", folder / "data", "--batch_size", 2]
    run_ranks(2, main, flags(folder, "--output", tmp_path / "all.jsonl"))
    output, _ = run_ranks(
        2, main, flags(folder, *more, "--on_bad_sample", "skip", "--output", tmp_path / "p.jsonl")
    )
    rows, whole = predictions(tmp_path / "p.jsonl"), predictions(tmp_path / "all.jsonl")
    assert rows[5]["id"] == "gone"
    assert "gone.png does not exist" in rows[5]["error"]
    assert [row for row in rows if "error" not in row] == whole[:5] + whole[6:]
    assert "1 samples left out" in output


def test_answers_before_a_missing_image_are_kept_and_the_same_command_goes_on(folder, tmp_path):
    questions = with_a_missing_image(folder, tmp_path / "q.json")
    more = ["--data_path", questions, "--image_root", tmp_path / "images", "--batch_size", 2]
    more += ["--output", tmp_path / "new" / "folder" / "p.jsonl"]
    shutil.copytree(folder / "data", tmp_path / "images")
    output, other = run_ranks(2, main, flags(folder, *more), status=1)
    assert "record 5 (id 'gone')" in output
    assert "continues after them" in output
    assert "Traceback" not in output + other
    partial = tmp_path / "new" / "folder" / "p.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 1 + 5
    shutil.copy(folder / "data" / "red40.png", tmp_path / "images" / "gone.png")
    output, _ = run_ranks(2, main, flags(folder, *more), status=0)
    assert "continuing after 5 answers" in output
    assert not partial.exists()
    straight = [*more[:-1], tmp_path / "straight.jsonl"]
    run_ranks(1, main, flags(folder, *straight))
    assert predictions(partial.with_suffix("")) == predictions(tmp_path / "straight.jsonl")


def test_a_killed_run_keeps_its_answers_and_goes_on_to_the_same_ones(folder, tmp_path):
    more = ["--do_sample", "True", "--batch_size", "1", "--output", str(tmp_path / "p.jsonl")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer.generate", *flags(folder, *more)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    partial, until = tmp_path / "p.jsonl.partial", time.monotonic() + 90
    while time.monotonic() < until and (not partial.exists() or partial.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert partial.read_bytes().count(b"\n") >= 4
    with partial.open("ab") as file:
        file.write(b'{"id": "cut o')
    (output,) = run_ranks(1, main, flags(folder, *more))
    assert "continuing after" in output
    run_ranks(1, main, flags(folder, *more[:-1], tmp_path / "straight.jsonl"))
    assert predictions(tmp_path / "p.jsonl") == predictions(tmp_path / "straight.jsonl")


def test_answers_of_other_questions_or_flags_are_not_mixed_in_or_overwritten(folder, tmp_path):
    questions = with_a_missing_image(folder, tmp_path / "q.json")
    more = ["--data_path", questions, "--image_root", folder / "data", "--output", tmp_path / "p.jsonl"]
    run_ranks(1, main, flags(folder, *more, "--batch_size", 2), status=1)
    before = (tmp_path / "p.jsonl.partial").read_bytes()
    (output,) = run_ranks(1, main, flags(folder, *more, "--max_new_tokens", 7), status=2)
    assert "p.jsonl.partial contains the answers of another run" in output
    assert (tmp_path / "p.jsonl.partial").read_bytes() == before


def test_a_place_that_cannot_be_written_is_named_before_the_model_is_read(folder, tmp_path):
    (tmp_path / "file").write_text("")
    (output,) = run_ranks(1, main, flags(folder, "--output", tmp_path / "file" / "p.jsonl"), status=2)
    assert "file/p.jsonl cannot be written" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("text", ["What?", "<ImageHere>What?", "<image>What?"])
def test_a_single_question_shows_its_picture_where_it_says_or_first(text):
    source = one_question(Questions(model_name_or_path="m", question=text, image=("cat.jpg",)))
    assert source.sample(0, needs_answer=False).turns == [("user", "<ImageHere>What?")]


def test_a_single_question_is_called_the_question(folder, tmp_path):
    words = f"--model_name_or_path {folder}/model --image {tmp_path}/none.png --bf16 False".split()
    (output,) = run_ranks(1, main, [*words, "--question", "what?"], status=1)
    assert f"error: the question {tmp_path}/none.png does not exist" in output
    assert "record" not in output


def test_an_image_with_a_comma_in_its_name_is_one_image(folder, tmp_path):
    arguments = ["--model_name_or_path", str(folder / "model"), "--question", "what?"]
    images = ["paris,france.jpg", "img/paris,france.jpg"]
    (tmp_path / "ask.yaml").write_text(json.dumps({"image": images}))
    for given in (["--image", *images], ["--config", str(tmp_path / "ask.yaml")]):
        assert parse_flags(Questions, [*arguments, *given], "trainer.generate").image == tuple(images)
