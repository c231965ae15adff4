"""The life of a project, as its user lives it: in a folder of one's own, with the installed wheel."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from tests.installed import install
from tests.tiny import read_metrics, tiny_model

STEPS = 150
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}

CHAT = """
import json, sys
sys.modules["trainer"] = sys.modules["data"] = None  # importing either now fails
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps([
    model.chat(tokenizer, "<ImageHere>what colour is it?", image=image, max_new_tokens=6)[0].strip()
    for image in sys.argv[2:]
]))
"""


def write_project(folder: Path) -> None:
    """Discs on transparent ground, whose hidden colour is another, and LLaVA's form of questions."""
    (folder / "data" / "pictures").mkdir(parents=True)
    tiny_model(folder / "model")
    records = []
    for number in range(24):
        name = list(COLOURS)[number % 3]
        hidden = COLOURS[list(COLOURS)[(number + 1) % 3]]
        picture = Image.new("RGBA", (40 + number, 60), (*hidden, 0))
        ImageDraw.Draw(picture).ellipse((5, 5, 35, 55), fill=(*COLOURS[name], 255))
        picture.save(folder / "data" / "pictures" / f"{number}.png")
        records.append(
            {
                "id": f"disc-{number}",
                "images": [f"pictures/{number}.png"],
                "conversations": [
                    {"from": "human", "value": "<image>what colour is it?"},
                    {"from": "gpt", "value": name},
                ],
            }
        )
    (folder / "data" / "discs.json").write_text(json.dumps(records))
    (folder / "data.txt").write_text("data/discs.json\n")


@pytest.mark.slow
def test_a_project_from_its_check_to_plain_transformers(tmp_path):
    python, here = install(tmp_path), tmp_path / "my project"
    write_project(here)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: object, status: int = 0) -> str:
        command = [python, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    # --- check the data, and see it -------------------------------------------------------------------
    checked = run("-m", "data.check", "data.txt", "--model_name_or_path", "model")
    assert "24" in checked
    assert "--images_as_viewed True" in checked
    run("-m", "data.preview", "data.txt", "--model_name_or_path", "model", "--images_as_viewed", "True")
    assert (here / "preview.html").exists()

    # --- train it, with everything that can happen ----------------------------------------------------
    flags = f"""
        --model_name_or_path model --data_path data.txt --images_as_viewed True --bf16 False
        --fix_vit False --plora_dropout 0 --learning_rate 1e-3 --max_steps {STEPS} --save_strategy steps
        --save_steps 10 --save_total_limit 2 --dataloader_num_workers 1
    """.split()

    def training(ranks: int, output_dir: str = "output/discs") -> list[object]:
        launch = ["-m", "trainer.launch", "--standalone", "--nproc_per_node", ranks, "-m", "trainer.main"]
        share = ["--per_device_train_batch_size", str(4 // ranks), "--output_dir", output_dir]
        return [*launch, *flags, *share]

    def interrupted(happen, status: int) -> str:
        """Start the run again, let something happen to it three steps later, and return what it said."""
        metrics = here / "output/discs/metrics.jsonl"
        with (tmp_path / "log").open("w") as log:
            job = subprocess.Popen(
                [python, *map(str, training(2))], cwd=here, env=environment, stdout=log, stderr=log
            )
            size = metrics.stat().st_size if metrics.exists() else 0
            until = time.monotonic() + 120
            steps = len(read_metrics(here / "output/discs")) if size else 0
            while not metrics.exists() or len(metrics.read_bytes().splitlines()) < steps + 3:
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                assert job.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            happen(job)
            assert job.wait(120) == status, (tmp_path / "log").read_text()
        said = (tmp_path / "log").read_text()
        assert "Traceback" not in said, said
        return said

    def kill_a_rank(job: subprocess.Popen) -> None:
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)

    said = interrupted(lambda job: (here / "output/discs/STOP").touch(), 75)
    assert "starting from scratch" in said
    interrupted(lambda job: job.send_signal(signal.SIGTERM), 75)
    interrupted(lambda job: job.send_signal(signal.SIGUSR1), 75)
    said = interrupted(kill_a_rank, 1)
    assert "was killed by SIGKILL" in said.rstrip().splitlines()[-1], said
    said = run(*training(1))  # fewer ranks, to the end
    assert "resuming from" in said
    lines = read_metrics(here / "output/discs")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] / 4
    assert "nothing to do" in run(*training(1))

    run(*training(2, "output/straight"))
    ours = load_file(here / "output/discs/model.safetensors")
    theirs = load_file(here / "output/straight/model.safetensors")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)

    # --- an adapter on it, merged; a checkpoint's model alone -----------------------------------------
    flags[1] = "output/discs"
    adapter = [
        "--use_lora",
        "True",
        "--lora_r",
        "4",
        "--fix_vit",
        "True",
        "--max_steps",
        "4",
        "--save_steps",
        "2",
    ]
    run(*training(2, "output/adapter"), *adapter)
    run("-m", "trainer.export", "--merge", "output/adapter", "output/merged")
    run("-m", "trainer.export", "--checkpoint", "output/discs/checkpoint-140", "output/early")
    assert json.loads((here / "output/merged/config.json").read_text())["images_as_viewed"] is True

    # --- answers, of ours and of transformers alone ---------------------------------------------------
    answers = {}
    for name in ("discs", "adapter", "merged", "early"):
        words = f"--model_name_or_path output/{name} --output answers/{name}.jsonl --bf16 False".split()
        run("-m", "trainer.generate", "--data_path", "data/discs.json", *words, "--max_new_tokens", 6)
        rows = [json.loads(line) for line in (here / f"answers/{name}.jsonl").read_text().splitlines()]
        answers[name] = [row["prediction"] for row in rows]
        assert sum(row["correct"] for row in rows) == len(rows) == 24
    assert answers["adapter"] == answers["merged"]
    pictures = [f"data/pictures/{number}.png" for number in range(24)]
    assert json.loads(run("-I", "-c", CHAT, "output/merged", *pictures).splitlines()[0]) == answers["merged"]
