"""report.html: written by real runs, and looked at in a real browser."""

import base64
import io
import json
import os
import random
import re
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainer.report
from tests.browser import Browser
from tests.fault_cases import in_every_step, send
from tests.tiny import flags, read_metrics, run_ranks, tiny_world
from trainer.config import parse
from trainer.main import main
from trainer.report import report, write_report
from trainer.report.answers import read_questions
from trainer.report.commands import commands
from trainer.report.run import read_run

MEGABYTE = 1_000_000
TEXTS = """(() => {
  const found = [];
  const walk = root => {
    for (const element of root.querySelectorAll("*")) {
      if (element.shadowRoot) walk(element.shadowRoot);
      for (const node of element.childNodes) {
        const box = element.getBoundingClientRect();
        if (node.nodeType === 3 && node.textContent.trim() && box.width && root !== document)
          found.push([node.textContent.trim(), box.left, box.top]);
      }
    }
  };
  walk(document);
  return found;
})()"""
"""What can be read in Bokeh's figures, with its place in the window: legends, and values on hover."""


MARKS = """Bokeh.documents[0].roots()[0].renderers.filter(r => r.glyph.type === "VSpan")
  .map(r => [...r.data_source.data.step])"""
"""The steps at which vertical lines are drawn in the first figure: one list for each kind of line."""


def killed_after(step: int, argv: list[str]) -> int:
    in_every_step(lambda number, rank: send(signal.SIGKILL) if number == step + 1 else None)
    return main(argv)


def write_evaluations(folder: Path, steps: list[int], source: str = "colour", attack: str = "") -> None:
    """Lines of kind "eval" and the answers to four questions, of which more and more are right."""
    (folder / "eval").mkdir(exist_ok=True)
    lines = []
    for place, step in enumerate(steps):
        right = place / (len(steps) - 1)
        scores = {"exact_match": right, "token_f1": right}
        line = {
            "kind": "eval",
            "step": step,
            "epoch": step / 4,
            "loss": 3 - right,
            "samples": 4,
            "seconds": 0.5,
        }
        line |= {"loss_by_source": {source: 3 - right}, "supervised_tokens": 20, "metrics": {source: scores}}
        lines.append(line)
        rows = []
        for record in range(4):
            is_right = record / 4 < right
            rows.append(
                {
                    "source": source,
                    "record": record,
                    "id": f"sample-{record}",
                    "question": f"what colour is number {record}? {attack}",
                    "answer": "red",
                    "prediction": "red" if is_right and record < 3 else f"never {attack}",
                    "scores": {"exact_match": float(is_right and record < 3)},
                    "images": [str(folder / f"picture{record % 2}.jpg")],
                }
            )
        (folder / "eval" / f"step-{step}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Image.new("RGB", (3000, 2000), "red").save(folder / "picture0.jpg")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model and data, and `run`: killed twice, finished at the third start, and evaluated."""
    folder = tiny_world(tmp_path_factory.mktemp("report"))
    options = {"max_steps": 8, "per_device_train_batch_size": 6, "save_strategy": "steps", "save_steps": 2}
    argv = flags(folder, "run", **options, report=True, async_save=False)
    run_ranks(1, killed_after, 3, argv, status=-signal.SIGKILL)
    run_ranks(1, killed_after, 5, argv, status=-signal.SIGKILL)
    (output,) = run_ranks(1, main, argv)
    assert "warning" not in output
    return folder


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory) -> Path:
    """The page of that run after evaluations were added."""
    write_evaluations(world / "run", [0, 2, 4, 6, 8])
    page = tmp_path_factory.mktemp("page") / "report.html"
    write_report([world / "run"], page)
    return page


def test_the_trainer_writes_the_page_and_it_tells_the_resumes_of_a_run_that_was_killed_twice(world):
    page = (world / "run" / "report.html").read_text(encoding="utf-8")
    assert "finished after step 8" in page
    assert "This run was not evaluated." in page
    assert "<article" not in page
    assert "2 times" in page
    starts = json.loads((world / "run" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2, 4]
    assert starts[1]["from"].endswith("run/checkpoint-2")
    assert read_run(world / "run").resumed_after == [2, 4]
    for entry in starts:
        assert entry["time"] in page


def test_run_json_tells_which_parameters_train_as_the_table_at_the_start_does(world):
    rows = json.loads((world / "run" / "run.json").read_text())["parameters"]
    frozen = {row["part"] for row in rows if row["learning_rate"] is None}
    assert frozen == {"vision tower"}
    model = AutoModelForCausalLM.from_pretrained(world / "run")
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())


def test_a_person_sees_results_curves_answers_and_values_on_hover(world, evaluated):
    assert evaluated.stat().st_size < 5 * MEGABYTE
    with Browser(evaluated) as page:
        text = page.text("body")
        for heading in ("Results", "Curves", "Evaluations", "Answers", "What trained", "Data", "Commands"):
            assert heading in text
        assert "step 0: the base model" in text
        assert re.search(r"\b1\s+colour\s+12\s+12\b", text), "declared and realised, in the first epoch"
        titles = page.evaluate("[...document.querySelectorAll('.figures h3')].map(h => h.innerText)")
        assert titles[:3] == ["Loss", "Training loss by source", "Validation loss by source"]
        assert "Gradient norm, before clipping" in titles
        assert page.evaluate(MARKS) == [[2, 4]], "where it was resumed"
        labels = {label: (x, y) for label, x, y in page.evaluate(TEXTS)}
        assert {"training", "validation", "colour", "both", "text"} <= labels.keys()

        # --- the values on hover
        left, top, width = page.box(".figures > div")
        assert "step:" not in [label for label, *_ in page.evaluate(TEXTS)]
        page.move(left + width / 2, top + 150)
        shown = [label for label, *_ in page.evaluate(TEXTS)]
        assert shown.count("step:") == 2, "of the training and of the validation"
        tooltip = shown[max(place for place, label in enumerate(shown) if label == "training") :]
        step = int(tooltip[tooltip.index("step:") + 1])
        assert f"{read_metrics(world / 'run')[step - 1]['loss']:.4f}" in tooltip

        # --- a click on a name hides its curve
        x, y = next((x, y) for label, x, y in page.evaluate(TEXTS) if label == "validation")
        page.click(x + 5, y + 5)
        page.move(left + width / 2, top + 150)
        page.move(left + width / 2 + 1, top + 150)
        shown = [label for label, *_ in page.evaluate(TEXTS)]
        assert shown.count("step:") == 1
        assert (page.errors, page.requests) == ([], [])


def test_the_page_names_the_best_step_whose_model_is_the_trained_one(tmp_path):
    write_evaluations(tmp_path, [0, 2, 4])
    (tmp_path / "complete.json").write_text(json.dumps({"step": 4, "best_step": 2}))
    page = report([tmp_path])
    assert "<dt>Trained model</dt><dd>the best, that of step 2</dd>" in page
    assert re.findall(r"step \d+: the best model", page) == ["step 2: the best model"]


def test_the_filters_show_a_source_and_what_is_right_wrong_or_changed(evaluated):
    with Browser(evaluated) as page:

        def cards() -> list[str]:
            script = (
                "[...document.querySelectorAll('article')].filter(a => a.offsetHeight).map(a => a.innerText)"
            )
            return page.evaluate(script)

        assert len(cards()) == 4
        assert "4 of 4 shown" in page.text("#answers")
        for outcome, names in {
            "wrong": ["sample-3"],
            "right": ["sample-0", "sample-1", "sample-2"],
            "changed": ["sample-0", "sample-1", "sample-2"],
        }.items():
            page.choose("#outcome", outcome)
            assert sorted(re.search(r"sample-\d", card)[0] for card in cards()) == names
        page.choose("#outcome", "")
        page.choose("#source", "colour")
        (first,) = [card for card in cards() if "sample-0" in card]
        assert re.search(r"base model\s+never\s+✗ wrong\s+step 2 to 8\s+red\s+✓ right", first)
        pictures = page.evaluate(
            "[...document.querySelectorAll('article img')].map(i => [i.naturalWidth, i.naturalHeight])"
        )
        assert pictures == [[240, 160]] * 2
        assert "picture1.jpg does not exist" in page.text("#answers")
        assert (page.errors, page.requests) == ([], [])


def test_the_page_fits_a_narrow_screen_and_paper(evaluated, tmp_path):
    with Browser(evaluated, width=390) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.print(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
        assert not page.errors


def test_texts_of_users_stay_text(world, tmp_path):
    attack = "</script><img src=x onerror=alert(1)> $$x$$ \\(x\\) {{ 7 * 7 }}"
    run = tmp_path / "run <b>"
    run.mkdir()
    about = json.loads((world / "run" / "run.json").read_text())
    about["config"]["chat_template"] = attack
    about["data_plan"][0]["source"] = attack
    (run / "run.json").write_text(json.dumps(about))
    lines = [
        {"kind": "train", "step": step, "loss": 1, "loss_by_source": {attack: 1.0, "b": 2.0}}
        for step in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write_evaluations(run, [0, 2], attack, attack)
    write_report([run, world / "run"], tmp_path / "page.html")
    with Browser(tmp_path / "page.html") as page:
        assert attack in page.text("#answers")
        assert page.evaluate("document.querySelectorAll('img[src=x], h1 b').length") == 0
        assert any("</script>" in label for label, *_ in page.evaluate(TEXTS)), "in a legend"
        left, top, _ = page.box(".figures > div:nth-child(2)")
        page.move(left + 200, top + 120)
        assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
        assert (page.errors, page.requests) == ([], [])


def test_several_runs_are_overlaid_and_their_differences_are_a_table(world, tmp_path, capsys):
    evaluation = {"eval_data_path": world / "data" / "data.txt", "eval_strategy": "steps", "eval_steps": 2}
    evaluation |= {"eval_on_start": True, "eval_generate": 2, "eval_max_new_tokens": 3}
    argv = flags(world, "other", max_steps=4, per_device_train_batch_size=6, learning_rate=5e-4, **evaluation)
    run_ranks(1, main, argv)
    out = tmp_path / "compare.html"
    assert trainer.report.main([str(world / "run"), str(world / "other")]) == 2
    assert "name the file of the page with --out" in capsys.readouterr().err
    assert trainer.report.main([str(world / "run"), str(world / "other"), "--out", str(out)]) == 0
    with Browser(out) as page:
        results = page.text("#results")
        assert re.search(r"--learning_rate\s+0.001\s+0.0005", results)
        assert "--fix_vit" not in results, "it is the same"
        labels = [label for label, *_ in page.evaluate(TEXTS)]
        assert {"run: training", "other: training", "run: colour", "other: colour"} <= set(labels)
        lines = read_metrics(world / "other", "eval")
        assert [line["step"] for line in lines] == [0, 2, 4]
        numbers = r"\s+".join([r"step 0: the base model\s+0\.00", f"{lines[0]['loss']:.4f}"])
        assert re.search(numbers, page.text("#evaluations"))
        data = page.text("#data")
        assert re.search(r"Not trained on: .*\s+source.*\s+colour\s+12\s+12\s.*colour\.json\s+\d+-\w+", data)
        page.choose("#source", "both")
        cards = "[...document.querySelectorAll('article')].filter(card => card.offsetHeight)"
        assert page.evaluate(f"{cards}.map(card => card.querySelectorAll('img').length)") == [2, 2]
        assert "what are the two?" in page.text("#answers")
        assert not page.errors


def test_the_commands_repeat_the_run_and_load_its_result(world):
    repeat, load, _, serve = commands(read_run(world / "run"))
    assert "ask it as above" in serve.text
    _, _, words = repeat.text.partition("-m trainer.main ")
    again = parse(words.replace("\\\n", " ").split())
    assert (
        json.loads(json.dumps(vars(again))) == json.loads((world / "run" / "run.json").read_text())["config"]
    )
    names: dict = {}
    exec("\n".join(line for line in load.text.splitlines() if "chat" not in line), names)
    weights = names["model"].state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert isinstance(names["tokenizer"], type(AutoTokenizer.from_pretrained(world / "run")))


@pytest.mark.parametrize(
    ("own_code", "auto_class", "loaded"),
    [
        (
            True,
            "AutoModelForCausalLM",
            "AutoPeftModelForCausalLM.from_pretrained('out', trust_remote_code=True)",
        ),
        (False, "AutoModelForImageTextToText", "AutoModelForImageTextToText.from_pretrained('a base')"),
    ],
)
def test_an_adapter_is_loaded_on_its_base_as_its_family_needs(tmp_path, own_code, auto_class, loaded):
    config = {"use_lora": True, "model_name_or_path": "a base", "output_dir": "out", "bf16": False}
    about = {"config": config, "loads_with": auto_class, "has_own_code": own_code, "ranks": 2}
    (tmp_path / "run.json").write_text(json.dumps(about))
    repeat, load, ask, serve = commands(read_run(tmp_path))
    assert "--nproc_per_node 2" in repeat.text
    assert "--model_name_or_path 'a base'" in repeat.text
    assert loaded in load.text
    assert ("--modernise 'a base'" in load.text) == own_code
    compile(load.text, "load", "exec")
    assert ("--merge out out-merged && vllm serve out-merged" in serve.text) == (not own_code)
    assert "--model_name_or_path out --bf16 False --data_path test.json" in ask.text


def test_a_run_on_two_machines_is_repeated_on_two_and_a_full_model_served_as_it_is(tmp_path):
    about = {"config": {"output_dir": "out"}, "has_own_code": False, "ranks": 16}
    launchers = [{"host": host, "process": 1} for host in ("a", "b")]
    (tmp_path / "run.json").write_text(json.dumps(about | {"launchers": launchers}))
    repeat, *_, serve = commands(read_run(tmp_path))
    assert "--nnodes 2 --node_rank RANK --master_addr ADDRESS --nproc_per_node 8 -m" in repeat.text
    assert "16 ranks in all, on 2 machines" in repeat.what
    assert serve.text == "vllm serve out"


def test_no_damage_to_the_files_of_a_run_prevents_a_page(world, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.report, "find_spec", lambda name: None)  # the figures see what was read
    chance, run = random.Random(0), tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    whole = {
        name: (world / "run" / name).read_bytes()
        for name in ("run.json", "metrics.jsonl", "eval/step-8.jsonl")
    }
    rubbish = [
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"step": 1e400}',
        b"9" * 5000,
        b'{"step": "x"}',
        b'"',
        b"-1",
    ]
    for _ in range(30):
        for name, content in whole.items():
            damaged = bytearray(content)
            for _ in range(chance.randrange(4)):
                place = chance.randrange(len(damaged))
                damaged[place : place + chance.randrange(20)] = chance.choice(rubbish)
            (run / name).write_bytes(damaged[: chance.randrange(len(damaged) + 1)])
        assert "<h1>run</h1>" in report([run])
    (run / "metrics.jsonl").write_bytes(whole["metrics.jsonl"][:-5])
    assert read_run(run).damaged_lines == 1
    assert "cannot be read were left out" in report([run])


def test_values_of_other_types_than_expected_do_not_prevent_a_page(world, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.report, "find_spec", lambda name: None)
    chance, run = random.Random(1), tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    others = [None, [], {}, "x", -1, True, 1e300, float("nan"), [1, {"a": 2}], {"x": {"y": 1}}, 10**400]

    def change(value, depth=0):
        if chance.random() < 0.05 * bool(depth):
            return chance.choice(others)
        if isinstance(value, dict):
            return {key: change(inner, depth + 1) for key, inner in value.items()}
        return [change(inner, depth + 1) for inner in value] if isinstance(value, list) else value

    for number in range(20):
        if number == 18:
            monkeypatch.undo()  # with the figures, which take a second
        for name in ("metrics.jsonl", "eval/step-8.jsonl"):
            lines = [json.loads(line) for line in (world / "run" / name).read_text().splitlines()]
            (run / name).write_text("".join(json.dumps(change(line)) + "\n" for line in lines))
        about = json.loads((world / "run" / "run.json").read_text())
        with suppress(ValueError):
            (run / "run.json").write_text(json.dumps(change(about)))
        assert "<h1>run</h1>" in report([run])


def test_without_bokeh_the_page_has_tables_and_says_how_to_get_the_curves(world, monkeypatch):
    monkeypatch.setattr(trainer.report, "find_spec", lambda name: None)
    page = report([world / "run"])
    assert "pip install bokeh" in page
    assert len(page) < 100_000
    losses = [line["loss"] for line in read_metrics(world / "run")]
    assert f"{losses[3]:.4f}" in page
    assert "Bokeh." not in page


def test_a_page_that_cannot_be_written_is_a_warning_and_not_the_end_of_a_training(world, tmp_path):
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    (output,) = run_ranks(1, main, flags(world, tmp_path / "run", max_steps=1, report=True))
    assert f"warning: {tmp_path}/run/report.html was not written" in output
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".saving")]


def test_a_folder_without_a_run_is_a_sentence(tmp_path, capsys):
    assert trainer.report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no run")


def test_answers_to_steps_that_will_be_done_again_are_not_shown(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 4, "loss": 1.0}\n')
    write_evaluations(tmp_path, [0, 4])
    stale = (tmp_path / "eval" / "step-4.jsonl").read_text().replace("red", "of a killed run")
    (tmp_path / "eval" / "step-8.jsonl").write_text(stale)
    found = read_questions([read_run(tmp_path)])
    assert {answer.last for question in found.shown for answer in question.answers} == {0, 4}


def test_a_picture_of_16_bit_grey_has_on_the_page_the_shades_that_the_model_sees(tmp_path):
    levels = np.linspace(0, 60000, 64).astype(np.uint16)
    Image.fromarray(np.tile(levels, (64, 1))).save(tmp_path / "grey.png")
    (tmp_path / "eval").mkdir()
    row = {"source": "grey", "record": 0, "question": "which?", "images": [str(tmp_path / "grey.png")]}
    (tmp_path / "eval" / "step-0.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    (question,) = read_questions([read_run(tmp_path)]).shown
    (picture,) = question.pictures
    with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
        shades = np.asarray(image.convert("L"))[32].astype(int)
    assert np.abs(shades - (levels >> 8)).max() <= 8  # as JPEG has it
