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
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = Callable[[], object]
MARKER = "complete.json"
"""Written last, and moved last: a folder that has it has everything that it lists."""
CONFIGS = ("config.json", "adapter_config.json")
"""What makes a folder load as a model."""


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


def sync_to_disk(path: Path) -> None:
    """Return only when the file's (or folder's) content has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step: whoever reads it, whenever, finds the old or the new content."""
    temporary = path.with_name(f".saving-{path.name}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_to_disk(temporary)
    temporary.replace(path)
    sync_to_disk(path.parent)


def begin(folder: Path) -> Path:
    """An empty folder to fill in place of `folder`."""
    temporary = folder.parent / f".saving-{folder.name}"
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


def numbered(output_dir: Path) -> dict[int, Path]:
    """Step → its `checkpoint-<step>` folder, the newest first."""
    found = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in output_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and path.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))


def remove_old_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all but the `keep` newest `checkpoint-<step>` folders."""
    for folder in list(numbered(output_dir).values())[keep:]:
        remove(folder)


def sweep(output_dir: Path) -> None:
    """Delete what a killed run left half written or half removed."""
    for path in [*output_dir.glob(".saving-*"), *output_dir.glob(".removing-*")]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
