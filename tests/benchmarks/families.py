"""What `trainer.verify` measures on a tiny random model of every family, as a table in README.md.

    python -m tests.benchmarks.families                  # all of tests/vlm_cases.py, and XComposer2: minutes
    python -m tests.benchmarks.families gemma3 llava     # these rows alone

Input: the tiny models and processors of the tests. Output: the table, printed and written into README.md
beside this file. Exit status 1 if a verdict is another one than that of the table as it stood.
"""

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.processor_cases import FAMILIES as PROCESSORS
from tests.processor_cases import NEEDS_NUM2WORDS
from tests.tiny import run_ranks, tiny_model
from tests.tiny_models import SAME_PROCESSOR, tiny_folder
from tests.vlm_cases import CASES, TEXT_ONLY
from trainer import verify
from trainer.main import main as train_main

README = Path(__file__).with_name("README.md")
ALL = ("xcomposer2", *CASES)
CHECKS = tuple(verify.WHAT)
HEAD = f"| family | {' | '.join(CHECKS)} |\n|{'---|' * (1 + len(CHECKS))}\n"
ROW = re.compile(r"^\| (\w+) \| (.*) \|$", re.MULTILINE)


def forked_run(num_ranks: int, flags: Sequence[str]) -> None:
    """`verify.train` without the seconds that a new process takes for its imports."""
    try:
        run_ranks(num_ranks, train_main, list(flags))
    except AssertionError as error:
        raise verify.RunFailedError(str(error).strip().splitlines()[-1]) from error


def why_not(family: str) -> str | None:
    """Why no folder of the family can be made here; None if one can."""
    if family in ("xcomposer2", *TEXT_ONLY):
        return None
    processor = SAME_PROCESSOR.get(family, family)
    return NEEDS_NUM2WORDS.get(family) if processor in PROCESSORS else "its processor is not among the tests'"


def make_folder(family: str, folder: Path) -> Path:
    """A tiny model whose random weights are large enough that every part matters."""
    tiny_model(folder) if family == "xcomposer2" else tiny_folder(family, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for tensor in weights.values():
        if tensor.ndim < 2:
            tensor += 0.1 * torch.randn_like(tensor)
        else:
            tensor.normal_(std=0.5 / tensor.shape[-1] ** 0.5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def results(family: str) -> list[dict[str, Any]] | str:
    """The rows of verify.json, or the reason why there are none."""
    if reason := why_not(family):
        return reason
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "verify.json"

        def run(argv: list[str]) -> int:
            verify.train = forked_run
            verify.main(argv)
            return 0

        argv = [str(make_folder(family, Path(folder) / "model")), "--output", str(output)]
        (printed,) = run_ranks(1, run, argv, timeout=1200)
        if not output.is_file():
            errors = [line for line in printed.splitlines() if line.startswith("error: ")]
            return errors[0].removeprefix("error: ").replace(f"{folder}/model: ", "").replace("|", "/")
        return json.loads(output.read_text())["checks"]


def cells(found: list[dict[str, Any]] | str) -> str:
    """What stands behind the family's name in its row."""
    if isinstance(found, str):
        return f"not verified: {found}"
    by_name = {row["name"]: row for row in found}
    return " | ".join(_cell(by_name.get(name)) for name in CHECKS)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if not row["passed"]:
        return "FAIL"
    return f"{row['measured']:.0e}" if row["measured"] else "0"


def verdict(row: str) -> list[str]:
    """A row without its figures."""
    if row.startswith("not verified"):
        return ["not verified"]
    return ["pass" if cell[0].isdigit() else cell for cell in row.split(" | ")]


def committed() -> dict[str, str]:
    """The rows of the table in the README, by family."""
    _, _, table = README.read_text(encoding="utf-8").partition(HEAD)
    return dict(ROW.findall(table.partition("\n\n")[0] + "\n"))


def write(rows: dict[str, str]) -> None:
    """Replace the table in the README."""
    text = README.read_text(encoding="utf-8")
    before, head, after = text.partition(HEAD)
    assert head, f"{README} has no table of families"
    lines = "".join(f"| {family} | {rows[family]} |\n" for family in ALL if family in rows)
    README.write_text(before + head + lines + "\n" + after.partition("\n\n")[2], encoding="utf-8")


def main(families: Sequence[str]) -> int:
    rows, wrong = committed(), []
    for family in families or ALL:
        row = cells(results(family))
        print(f"| {family} | {row} |", flush=True)
        if family not in rows or verdict(rows[family]) != verdict(row):
            wrong.append(family)
        rows[family] = row
        write(rows)
    print(f"other verdicts than in the table as it stood: {', '.join(wrong)}" if wrong else "as in the table")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
