"""Atomic folders, checkpoint rotation, and a check of what a run may replace in output_dir.

Input: a target folder and code that fills it. Output: the folder, complete and on disk, or none.

    temporary = create_temporary(Path("output/checkpoint-100"))  # output/.saving-checkpoint-100
    write_safetensors(tensors, temporary / "model.safetensors")  # killed here: no checkpoint-100
    put_in_place(temporary, Path("output/checkpoint-100"))

The name of a folder that is being written or deleted starts with a dot; `sweep` deletes those that a killed
run left. Only one rank calls these functions; all ranks must share the file system.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.files import UNFINISHED, replace_file, sync_to_disk

Job = Callable[[], object]
MARKER = "complete.json"
"""Marker of a complete folder, listing its files; written last, and moved last."""
CONFIGS = ("config.json", "adapter_config.json")
"""Files without which a folder does not load as a model or an adapter."""
RESUME = "resume"
"""Sub-folder with the state to resume from; only checkpoints have it."""
FINAL = "complete"
"""Folder of the final model until its files are moved into output_dir."""
MODEL_FILES = (
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
"""Patterns of the files that the final model may contain, and so replace."""


class HostCopies:
    """Copies of tensors in host memory, for a thread to write while training changes the originals.

    The first save allocates the memory and every later one reuses it, so a save must not begin before the
    previous one is written. It is pinned for tensors of an accelerator, which are then copied at the speed of
    the bus and without waiting for each.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copy `tensor` into the memory of the last copy of that name; complete only after `wait`."""
        if name not in self._memory:
            pinned = tensor.device.type != "cpu"
            self._memory[name] = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned
            )
        return self._memory[name].copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()


class Jobs:
    """File writes of one rank, without collectives: immediate ones, and others that may be deferred.

    Errors are stored, not raised, because the other ranks proceed to the next collective; `finish` raises the
    first.
    """

    def __init__(self, copies: HostCopies | None = None) -> None:
        """copies: where deferred jobs keep what they write; without it, no job is deferred."""
        self._copies, self._jobs, self._error = copies, list[Job](), list[Exception]()

    def on_host(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in host memory for a job to write: a copy under that name if the job may be deferred."""
        return self._copies.copy(name, tensor) if self._copies else tensor.cpu().contiguous()

    def now(self, job: Job) -> None:
        """Run a job immediately: for small files, and for data that would change before a deferred run."""
        try:
            job()
        except Exception as error:
            self._error.append(error)

    def later(self, job: Job) -> None:
        """Run a job, or defer it if this object defers jobs; its tensors must come from `on_host`."""
        self._jobs.append(job) if self._copies else self.now(job)

    def finish(self) -> None:
        """Run the deferred jobs; raise the first error of any job."""
        while self._jobs and not self._error:
            self.now(self._jobs.pop(0))
        if self._error:
            raise self._error[0]


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically: a reader finds either the old or the new content."""
    replace_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any new file, which follow the umask.

    safetensors 0.8 itself makes the file readable by its owner alone.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def create_temporary(folder: Path) -> Path:
    """Create an empty temporary folder, which `put_in_place` will rename to `folder`."""
    temporary = folder.parent / f"{UNFINISHED}{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename `temporary`, whose files are already synced to disk, to `folder`, replacing an existing one."""
    for path in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
        sync_to_disk(path)
    if folder.exists():
        remove(folder)
    temporary.rename(folder)
    sync_to_disk(folder.parent)


def remove(folder: Path) -> None:
    """Delete a folder, renaming it first: an interrupted call leaves nothing under its own name."""
    doomed = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def move_into(source: Path, folder: Path) -> None:
    """Move the files of the complete model folder `source` into `folder`; if interrupted, call it again.

    The configuration files of `folder` are deleted first and the new ones moved last, so that a partial move
    never loads as a model.
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


def link_model(checkpoint: Path, folder: Path, content: Mapping[str, Any]) -> None:
    """Create the complete model folder `folder` from `checkpoint`, without writing its weights again.

    Weights are hard links, if the file system supports them; small files, which users may edit, are copies.
    content: of the marker, beside the list of files.
    """
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    files = {
        name: found
        for name, found in marker["files"].items()
        if name != "run.json" and not name.startswith(f"{RESUME}/")
    }
    temporary = create_temporary(folder)
    for name in files:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(checkpoint / name, temporary / name)
    write_json(temporary / MARKER, {**content, "files": files})
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
    """The `checkpoint-<step>` folders by step, the newest first."""
    found = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in output_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and path.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))


def remove_old_checkpoints(output_dir: Path, keep: int | None, best_step: int | None = None) -> None:
    """Delete all `checkpoint-<step>` folders except the `keep` newest (None: keep all), and those older than
    the newest that are marked `until_next`; that of `best_step` stays."""
    older = [folder for step, folder in list(numbered(output_dir).items())[1:] if step != best_step]
    permanent = [folder for folder in older if not _is_until_next(folder)]
    kept = permanent if keep is None else permanent[: keep - 1]
    for folder in older:
        if folder not in kept:
            remove(folder)


def _is_until_next(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["until_next"] is True
    except (OSError, ValueError, KeyError, TypeError):  # a folder that cannot be read is kept
        return False


def output_dir_problems(output_dir: Path, read: Mapping[str, str | None]) -> list[str]:
    """Reasons not to write to `output_dir`: files would be replaced that no run of this trainer wrote.

    read: by flag, the folder from which the run reads a model or adapter, if any.
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
    foreign = {path.name for pattern in MODEL_FILES for path in output_dir.glob(pattern)}
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
    """Whether the folder contains a run.json, a complete model or a complete checkpoint of this trainer."""
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
    """Delete the partly written and partly deleted files and folders of a killed run."""
    for path in [*output_dir.glob(f"{UNFINISHED}*"), *output_dir.glob(".removing-*")]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
