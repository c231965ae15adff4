"""What the tests share: a tiny model folder, tiny data, and ways to run the trainer on several ranks.

world = tiny_world(tmp_path)                                 # a model in model/, and data in data/
argv = flags(world, "run", max_steps=3)                      # of a training whose output goes to world/run
first, second = run_ranks(2, main, argv)                     # what each of two forked ranks printed
result = torchrun(2, argv)                                   # real torchrun, output captured
"""

import faulthandler
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(
    world: int, function: Callable[..., Any], args: tuple, folder: Path
) -> tuple[list[Any], list[Path]]:
    """Fork `world` ranks that call `function(*args)`; returns them, and the files of what they print."""
    context, port = multiprocessing.get_context("fork"), free_port()
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, function, args, log))
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    return ranks, logs


def _rank(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple, log: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    call_in_fork(function, args, log)


def call_in_fork(function: Callable[..., Any], args: tuple, log: Path) -> NoReturn:
    """What a forked process does: it calls `function(*args)`, prints to the file `log`, and ends."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        faulthandler.enable(file)  # a crash shows its stacks in the rank's output
        logging.getLogger().handlers.clear()  # pytest's own
        status = function(*args)
        file.flush()
    os._exit(status if isinstance(status, int) else 0)


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 120, status: int = 0
) -> list[str]:
    """Call `function(*args)` on `world` forked ranks and return what each printed.

    Forking skips the import of torch and transformers, which costs a torchrun seconds a rank. A rank that
    hangs, or ends with another exit status than `status`, fails the test with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks, logs = start_ranks(world, function, args, Path(folder))
        for process in ranks:
            process.join(timeout)
        hung = [process for process in ranks if process.is_alive()]
        for process in hung:
            process.kill()
        outputs = [log.read_text() if log.exists() else "" for log in logs]
        statuses = [process.exitcode for process in ranks]
        assert not hung, f"{len(hung)} of {world} ranks hung:\n" + "\n".join(outputs)
        assert statuses == [status] * world, f"statuses {statuses}:\n" + "\n".join(outputs)
        return outputs


def torchrun(
    world: int, arguments: Sequence[object], timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node world -m trainer.main arguments`, as a user would, its output captured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    command += ["--master_port", str(free_port()), "-m", "trainer.main", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def flags(world: Path, output_dir: str | Path, *more: str, **changes: Any) -> list[str]:
    """The flags of a short training in float32 on the model and data of `world`, without checkpoints.

    output_dir: a folder in `world`, or a path of its own.
    The report at the end, and the forecast beside the start, which take seconds, are only made where a test
    says so.
    changes: other flags, or other values of these; None leaves a flag out, a list gives it several values.
    """
    values = {
        "model_name_or_path": world / "model",
        "data_path": world / "data" / "data.txt",
        "output_dir": world / output_dir,
        "bf16": False,
        "plora_dropout": 0,
        "dataloader_num_workers": 0,
        "check_model": False,  # half a second a run; tests/test_check_model.py is for it
        "rehearse": False,  # and another; tests/test_rehearsal.py
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "report": False,
        "forecast": False,
        **changes,
    }
    argv = []
    for name, value in values.items():
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return [*argv, *more]


def read_metrics(output_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a kind: train, a line a logged step; epoch, the ledger."""
    lines = (json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


ENDS_OF_TURNS = ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")


def word_tokenizer(folder: Path, size: int = 320, special: Sequence[str] = ENDS_OF_TURNS) -> None:
    """Save a word-level tokenizer of `size` ids: the words of the tiny data, w0 to w(size − 121), and control
    tokens where the tiny golden models have them: unk 0, bos 1, eos = pad 2, the `special` ones last."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {token: size - len(special) + number for number, token in enumerate(special)}
    words = ["user", "assistant", "system", "\n", " ", "?", ".", "what", "colour", "is", "the", "it", "red"]
    words += ["green", "blue", "square", "how", "many", "are", "there", "one", "two", "say", "yes", "no"]
    words += [f"w{i}" for i in range(size - 120)]
    for index, word in enumerate(words):
        vocabulary[word] = 3 + index
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|[^\w\s]"), behavior="isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
    )
    fast.save_pretrained(folder)


def tiny_model(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A whole model folder of 0.2 M parameters: 2 language and 2 vision blocks, 70-pixel images, 25 slots."""
    from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config
    from trainer.models.xcomposer2.modeling_xcomposer2 import InternLMXComposer2ForCausalLM

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "img_size": 70,
        "plora_rank": 8,
        "vision_config": {**vision, "image_size": 70, "patch_size": 14, "projection_dim": 32},
    }
    torch.manual_seed(0)
    model = InternLMXComposer2ForCausalLM(InternLMXcomposer2Config(**{**fields, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "Plora_B" in name or name.endswith(
                "bias"
            ):  # zero in a new model: nothing would depend on them
                parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(folder)
    word_tokenizer(folder, model.config.vocab_size)
    return folder


def tiny_data(folder: Path, samples: int = 12, image_sizes: Sequence[int] = (40, 90)) -> Path:
    """data.txt over image questions (`colour.json`), two-image ones (`both.json`) and text (`text.json`)."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}
    for name, rgb in colours.items():
        for size in image_sizes:
            Image.new("RGB", (size, size), rgb).save(folder / f"{name}{size}.png")

    def turn(question: str, answer: str) -> list[dict[str, str]]:
        return [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]

    names = list(colours)
    one = [
        {
            "id": f"colour-{i}",
            "image": [f"{names[i % 3]}{image_sizes[i % 2]}.png"],
            "conversations": turn("<ImageHere>what colour is it?", f"it is {names[i % 3]}."),
        }
        for i in range(samples)
    ]
    both = [
        {
            "id": f"both-{i}",
            "image": [f"{names[i % 3]}{image_sizes[0]}.png", f"{names[(i + 1) % 3]}{image_sizes[1]}.png"],
            "conversations": turn(
                "<ImageHere> <ImageHere>what are the two?", f"{names[i % 3]} {names[(i + 1) % 3]}"
            ),
        }
        for i in range(samples // 2)
    ]
    text = [
        {
            "id": f"text-{i}",
            "conversations": turn(f"say w{i}", f"w{i}") + turn("how many?", " ".join(["w1"] * (1 + i % 5))),
        }
        for i in range(samples)
    ]
    for name, records in {"colour": one, "both": both, "text": text}.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    lines = [f"colour.json {samples / 1000}", f"both.json {samples / 2000}", f"text.json {samples / 1000}"]
    (folder / "data.txt").write_text("\n".join(lines) + "\n")
    return folder / "data.txt"


def tiny_world(folder: Path, samples: int = 12, **changes: Any) -> Path:
    """`tiny_model` in folder/model, with its `changes`, and `tiny_data` in folder/data."""
    tiny_model(folder / "model", **changes)
    tiny_data(folder / "data", samples)
    return folder
