"""Folders that appear whole or not at all, and folders that make room.

Input: a target folder and a block that fills it. Output: the folder, complete and on the disk, or none.

    with appears_whole(Path("output/checkpoint-100")) as folder:   # output/.saving-checkpoint-100
        save_weights(model, folder, ...)                           # killed here: no checkpoint-100
                                                                   # renamed to checkpoint-100 here
All ranks run the block, and must see the same file system.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.distributed import barrier, is_main


def sync_to_disk(path: Path) -> None:
    """Return only when the file's (or folder's) content has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def appears_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder on all ranks that becomes `folder` only when the block has ended without an error.

    A process killed inside leaves `.saving-<name>`, which the next save removes, and `folder` as it was.
    Every rank must see the same file system.
    """
    temporary = folder.parent / f".saving-{folder.name}"
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    if not temporary.is_dir():
        raise ValueError(
            f"{folder.parent} is not on a file system that all machines share: "
            "a rank does not see the folder that rank 0 made there"
        )
    yield temporary
    barrier()
    if is_main():
        for path in temporary.iterdir():
            if path.is_file():
                sync_to_disk(path)
        sync_to_disk(temporary)
        if folder.exists():
            discard = folder.parent / f".removing-{folder.name}"
            folder.rename(discard)
            temporary.rename(folder)
            shutil.rmtree(discard)
        else:
            temporary.rename(folder)
        sync_to_disk(folder.parent)
    barrier()


def move_into(source: Path, folder: Path) -> None:
    """Move the files of a complete model folder into `folder`, its config.json out first and in last.

    Without a config.json nothing loads a folder as a model, so a move that is cut short never passes for a
    complete one.
    """
    (folder / "config.json").unlink(missing_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
        old.unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(folder / path.name)
    sync_to_disk(folder)
    source.rmdir()


def remove_old_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all but the `keep` newest `checkpoint-<step>` folders."""
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in output_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    for _, path in sorted(numbered)[:-keep]:
        doomed = path.with_name(f".removing-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
