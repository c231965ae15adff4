"""Files that appear whole or not at all, and the files that cache what was computed from another.

replace_file(Path("run.json"), b"{}")              # a reader finds the old or the new content, never half
paths = cache_paths(Path("a.json"), ".index")      # beside it, else in the user's cache folder
write_cache(paths, header, offsets.data)           # at the first path that can be written
"""

import hashlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

UNFINISHED = ".saving-"
"""Prefix of what is being written; a killed process leaves it behind."""


def replace_file(path: Path, *content: bytes | memoryview, mode: int | None = None) -> None:
    """Write a file, or replace it, in one step, whoever else reads or writes it; OSError if that fails.

    mode: its permissions; by default those of any new file, which follow the umask.
    """
    temporary = path.with_name(f"{UNFINISHED}{path.name}-{uuid.uuid4().hex[:8]}")
    with temporary.open("xb") as file:
        try:
            file.writelines(content)
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink()
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
    """Write a cache that all users can read to the first writable one of `paths`; False if none is."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, *content, mode=0o644)
        except OSError:
            continue
        return True
    return False
