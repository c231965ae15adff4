"""Folders that appear whole or not at all, and folders that make room.

Input: a target folder and something that fills it. Output: the folder, complete and on the disk, or none.

    temporary = begin(Path("output/checkpoint-100"))      # output/.saving-checkpoint-100
    save_file(tensors, temporary / "model.safetensors")   # killed here: no checkpoint-100
    put_in_place(temporary, Path("output/checkpoint-100"))

A folder that is being written or removed has a name that starts with a dot; `sweep` deletes what a killed run
left of those. One rank calls these functions; all ranks must see the same file system.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.files import UNFINISHED, replace_file, sync_to_disk

Job = Callable[[], object]
MARKER = "complete.json"
"""Written last, and moved last: a folder that has it has everything that it lists."""
CONFIGS = ("config.json", "adapter_config.json")
"""What makes a folder load as a model."""
RESUME = "resume"
"""The sub-folder that makes a model's folder a checkpoint."""
FINAL = "complete"
"""The folder of the final model, until its files are moved into output_dir."""
OF_A_MODEL = (
    *CONFIGS,
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
)
"""Files that the final model may bring, and so replace."""


class Jobs:
    """What a rank writes: some at once, some perhaps later, in a thread; no other rank has a part in it.

    Errors are kept, not raised, as the other ranks are on their way to the next collective; `finish` raises
    the first.
    """

    def __init__(self, *, put_off: bool = False) -> None:
        self._put_off, self._jobs, self._error = put_off, list[Job](), list[Exception]()

    def now(self, job: Job) -> None:
        """For what is small, or would change while it waits."""
        try:
            job()
        except Exception as error:
            self._error.append(error)

    def later(self, job: Job) -> None:
        """For a job that holds copies of what it writes."""
        self._jobs.append(job) if self._put_off else self.now(job)

    def finish(self) -> None:
        """Do what was put off; raise the first error of all."""
        while self._jobs and not self._error:
            self.now(self._jobs.pop(0))
        if self._error:
            raise self._error[0]


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step: whoever reads it, whenever, finds the old or the new content."""
    replace_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def begin(folder: Path) -> Path:
    """An empty folder to fill in place of `folder`."""
    temporary = folder.parent / f"{UNFINISHED}{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def put_in_place(temporary: Path, folder: Path) -> None:
    """Make `temporary` be `folder`; its files must have reached the disk. A folder of that name goes."""
    for path in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
        sync_to_disk(path)
    if folder.exists():
        remove(folder)
    temporary.rename(folder)
    sync_to_disk(folder.parent)


def remove(folder: Path) -> None:
    """Delete a folder; cut short, none of it is left under its own name."""
    doomed = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def move_into(source: Path, folder: Path) -> None:
    """Move the files of the complete model folder `source` into `folder`; cut short, it can be called again.

    What makes `folder` load as a model goes first and comes last, so half a move never passes for a model.
    """
    listed = json.loads((source / MARKER).read_text(encoding="utf-8"))["files"]
    last = (*CONFIGS, MARKER)
    names = sorted((path.name for path in source.iterdir()), key=lambda name: (name in last, name == MARKER))
    for path in [*(folder / name for name in last), *folder.glob("*model*.safetensors*")]:
        if path.name not in listed or (path.name in last and path.name in names):
            path.unlink(missing_ok=True)
    for name in names:
        (source / name).rename(folder / name)
    sync_to_disk(folder)
    source.rmdir()


def link_model(checkpoint: Path, folder: Path) -> None:
    """Make the complete folder `folder` of the model in `checkpoint`, without writing its weights again.

    Weights are hard links, where the file system has them; small files, which users may edit, are copies.
    """
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    files = {
        name: found
        for name, found in marker["files"].items()
        if name != "run.json" and not name.startswith(f"{RESUME}/")
    }
    temporary = begin(folder)
    for name in files:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(checkpoint / name, temporary / name)
    write_json(temporary / MARKER, {"step": marker["step"], "files": files})
    put_in_place(temporary, folder)


def _link_or_copy(source: Path, target: Path) -> None:
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # a file system without hard links
            pass
    shutil.copyfile(source, target)
    sync_to_disk(target)


def numbered(output_dir: Path) -> dict[int, Path]:
    """Step → its `checkpoint-<step>` folder, the newest first."""
    found = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in output_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and path.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))


def remove_old_checkpoints(output_dir: Path, keep: int | None) -> None:
    """Delete all `checkpoint-<step>` folders but the `keep` newest (None: all), and those before the newest
    that were made to last until the next one only."""
    older = list(numbered(output_dir).values())[1:]
    lasting = [folder for folder in older if not _lasts_until_the_next(folder)]
    stay = lasting if keep is None else lasting[: keep - 1]
    for folder in older:
        if folder not in stay:
            remove(folder)


def _lasts_until_the_next(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["until_next"] is True
    except (OSError, ValueError, KeyError, TypeError):  # nothing is deleted that cannot be read
        return False


def output_dir_problems(output_dir: Path, read: Mapping[str, str | None]) -> list[str]:
    """Why a run must not write to `output_dir`: something would be replaced that no run of ours wrote.

    read: flag → the folder that the run reads a model or adapter from, if any.
    """
    if not output_dir.is_dir():
        return []
    for flag, name in read.items():
        if not name or not Path(name).is_dir():
            continue
        if output_dir.samefile(name):
            return [
                f"--output_dir {output_dir} is the folder of --{flag}, whose files the trained model would "
                "replace; name another folder"
            ]
        if Path(name).resolve() in [folder.resolve() for folder in numbered(output_dir).values()]:
            return [
                f"--output_dir {output_dir} holds the checkpoint that --{flag} names, which later ones would "
                "replace; name another folder"
            ]
    if (output_dir / RESUME).is_dir() and _is_of_a_run(output_dir):
        return [f"--output_dir {output_dir} is itself a checkpoint; name another folder"]
    if _is_of_a_run(output_dir):
        return []
    foreign = {path.name for pattern in OF_A_MODEL for path in output_dir.glob(pattern)}
    foreign |= {folder.name for folder in numbered(output_dir).values()}
    foreign |= {name for name in (MARKER, "run.json", FINAL) if (output_dir / name).exists()}
    if not foreign:
        return []
    names = sorted(foreign)
    return [
        f"--output_dir {output_dir} holds {', '.join(names[:3])}{' and more' * (len(names) > 3)}, which no "
        "run of this trainer wrote and this one would replace; name a new folder, or one of an earlier run"
    ]


def _is_of_a_run(folder: Path) -> bool:
    """Whether the trainer wrote there before: a run.json, or a complete model or checkpoint, of its own."""
    for path, keys in (
        (folder / "run.json", {"config", "data_plan"}),
        *((place / MARKER, {"step", "files"}) for place in (folder, *numbered(folder).values())),
    ):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and keys <= content.keys():
            return True
    return False


def sweep(output_dir: Path) -> None:
    """Delete what a killed run left half written or half removed."""
    for path in [*output_dir.glob(f"{UNFINISHED}*"), *output_dir.glob(".removing-*")]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
