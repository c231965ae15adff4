"""Files that appear whole or not at all, and the files that cache what was computed from another.

replace_file(Path("run.json"), b"{}")              # a reader finds the old or the new content, never half
paths = cache_paths(Path("a.json"), ".index")      # beside it, else in the user's cache folder
write_cache(paths, header, offsets.data)           # at the first path that can be written
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

UNFINISHED = ".saving-"
"""Prefix of what is being written; a killed process leaves it behind."""


def replace_file(path: Path, *content: bytes | memoryview) -> None:
    """Write a file, or replace it, in one step, whoever else reads or writes it; OSError if that fails."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f"{UNFINISHED}{path.name}-", delete=False
    ) as file:
        try:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Return only when the content of a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_paths(path: Path, suffix: str) -> list[Path]:
    """Where something derived from `path` is cached: beside it, else in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xcomposer-fsdp"
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    return [path.with_name(path.name + suffix), cache / f"{path.stem}-{name}{suffix}"]


def write_cache(paths: Sequence[Path], *content: bytes | memoryview) -> bool:
    """Write a cache to the first of `paths` that can be written; False if none can."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, *content)
        except OSError:
            continue
        return True
    return False
