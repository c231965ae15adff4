"""The lock of an output_dir: only one run at a time writes there.

Input: the folder. Output: the file `run.lock` in it while the run lasts, or a sentence about who holds it:

    with Lock(Path("output")) as lock:
        lock.take()      # [], or ["--output_dir output is in use by process 123 on host abc (started …); …"]
        lock.check()     # returns while the lock is ours; ends this process if another run has taken over

A thread touches the file every BEAT_SECONDS. A lock is stale when its process ran on this machine and is
dead, or when the file is not touched while another process watches it for WATCH_SECONDS. Clocks of two
machines are never compared: only changes of the modification time, by the file server's clock, count.

Files are created exclusively (O_EXCL), which also works over NFS. A stale lock is never deleted first: of two
processes that find it stale, the slower could delete the lock of the faster. It gets a successor instead:

    run.lock                      id 7a…, stale
    run.lock-after-7a…            id 9c…: only one process can create it, and it holds the lock from then on
    run.lock                      id 9c…: renamed over the stale one

The holder is the last of this chain; a successor of an id that is no longer in the chain is void.

The file is deleted when the run ends, in any way that lets Python run. A process that is killed or ended by
the watchdog leaves it behind, and the next start takes it over.
"""

import errno
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.job import FAILED, before_exit, leave, log

NAME = "run.lock"
BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0
"""Six heartbeats, so that a run does not lose its lock when the file server is slow for a moment."""


@dataclass(frozen=True)
class Holder:
    """The content of a lock file, and when it was last touched by the clock of its file system."""

    id: str
    facts: dict[str, Any]
    touched_ns: int


class Lock:
    """The lock of one folder, a context manager that releases it. Only rank 0 takes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.id = folder, folder / NAME, uuid.uuid4().hex
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._checking = threading.Lock()
        self._made_folder = False

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def take(self) -> list[str]:
        """Take the lock, after watching one that may be stale; returns the problem if that is impossible."""
        try:
            self._made_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            if problem := self._take():
                return [problem]
        except OSError as error:
            return [
                f"--output_dir {self.folder}: cannot be written: {error}; make it writable, free disk space, "
                "or name another folder"
            ]
        self._thread = threading.Thread(target=self._beat, name=NAME, daemon=True)
        self._thread.start()
        before_exit.append(self.release)
        return []

    def check(self) -> None:
        """End this process if another run has taken over its lock; call before every write to the folder."""
        if self._thread is None:
            return
        with self._checking:
            holder = self._holder()
            if self._over.is_set() or (holder and holder.id == self.id):
                return
            if holder:
                log(
                    f"\nerror: --output_dir {self.folder} has been taken over by {self._describe(holder)}, "
                    f"because this process sent no heartbeat for {WATCH_SECONDS:.0f} s; this run ends, so "
                    "that no two runs write to one folder: keep the other, or stop it and start this again"
                )
                leave(FAILED)
            if self.folder.is_dir():  # only the file has been deleted
                self._create(self.path)

    def release(self) -> None:
        """Delete the file if it is ours; may be called by a signal handler."""
        if self._thread is None or self._over.is_set():
            return
        self._over.set()
        self._thread.join(BEAT_SECONDS)
        try:
            if self._is_ours():
                self.path.unlink()
        except OSError as error:
            log(f"warning: {self.path} cannot be deleted: {error}; the next start takes it over")
        if self._made_folder:  # a run that was rejected leaves nothing behind
            with suppress(OSError):
                self.folder.rmdir()

    def _take(self) -> str | None:
        while True:
            stale, why = self._holder(), None
            if stale and (why := self._why_stale(stale)) is None:
                holder = self._holder()
                if holder is None or holder.id != stale.id:
                    continue  # it has ended, or another process has taken it over
                return (
                    f"--output_dir {self.folder} is in use by {self._describe(holder)}; wait until it ends, "
                    f"stop it (touch {self.folder / 'STOP'}), or name another --output_dir"
                )
            path = self._after(stale.id) if stale else self.path
            if not self._create(path):
                time.sleep(0.05)
                continue  # another process was faster
            if stale:
                if not self._is_ours():
                    path.unlink(missing_ok=True)
                    continue
                log(f"taking over output_dir {self.folder} from {self._describe(stale)}, {why}")
                os.replace(path, self.path)
            if self._is_ours():
                break
        for void in self.folder.glob(f"{NAME}-after-*"):
            if void != self._after(self.id):
                void.unlink(missing_ok=True)
        return None

    def _why_stale(self, holder: Holder) -> str | None:
        """Watch the lock; returns why it is stale, or None as soon as it changes."""
        until = None
        while not _is_dead(holder.facts):
            if until is None:
                until = time.monotonic() + WATCH_SECONDS
                log(
                    f"output_dir {self.folder} is locked by {self._describe(holder)}; waiting up to "
                    f"{WATCH_SECONDS:.0f} s for its heartbeat"
                )
            time.sleep(min(0.5, BEAT_SECONDS / 4))
            now = self._holder()
            if now is None or (now.id, now.touched_ns) != (holder.id, holder.touched_ns):
                return None
            if time.monotonic() > until:
                return f"which sent no heartbeat for {WATCH_SECONDS:.0f} s"
        return "which is dead"

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(OSError):  # of the file server, which may answer at the next beat
                self.check()
                os.utime(self.path)  # by the file server's clock

    def _create(self, path: Path) -> bool:
        """Create the lock file `path`; False if it exists already."""
        facts = {"id": self.id, **identity(os.getpid()), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(json.dumps(facts) + "\n")
        except OSError:  # a full disk
            path.unlink(missing_ok=True)
            raise
        return True

    def _chain(self) -> Iterator[Holder]:
        """The lock and its successors."""
        path = self.path
        while True:
            try:
                with path.open("rb") as file:  # opening makes an NFS client ask the server
                    status, content = os.fstat(file.fileno()), file.read()
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno == errno.ESTALE:  # another machine has just replaced it
                    continue
                raise
            try:
                facts = json.loads(content)
                name = str(facts["id"])
            except (ValueError, KeyError, TypeError):  # it is being written, or its writer was killed
                facts, name = {}, f"unreadable-{status.st_ino}"
            yield Holder(name, facts, status.st_mtime_ns)
            path = self._after(name)

    def _holder(self) -> Holder | None:
        """The last of the chain; None if the folder is not locked."""
        holders = list(self._chain())
        return holders[-1] if holders else None

    def _is_ours(self) -> bool:
        holder = self._holder()
        return holder is not None and holder.id == self.id

    def _after(self, name: str) -> Path:
        return self.path.with_name(f"{NAME}-after-{name}")

    def _describe(self, holder: Holder) -> str:
        """The process that holds the lock, since when, and its last heartbeat by the file server's clock."""
        facts, age = holder.facts, "?"
        with suppress(OSError), tempfile.TemporaryFile(dir=self.folder) as file:
            os.utime(file.fileno())
            age = f"{max(0, os.fstat(file.fileno()).st_mtime_ns - holder.touched_ns) / 1e9:.0f}"
        return (
            f"process {facts.get('process', '?')} on host {facts.get('host', '?')} (started "
            f"{facts.get('started', '?')}, last heartbeat {age} s ago)"
        )


def identity(process: int) -> dict[str, Any]:
    """Identifies a process of this machine among all machines and boots; a value is None where the system has
    none."""

    def read(path: str) -> str | None:
        try:
            return Path(path).read_text().strip()
        except OSError:
            return None

    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = None
    return {
        "host": socket.gethostname(),
        "boot": read("/proc/sys/kernel/random/boot_id"),
        "process_namespace": namespace,
        "process": process,
        "process_ticks": _state_and_start(process)[1],
    }


def _is_dead(facts: dict[str, Any]) -> bool:
    """Whether a process is known to be dead: it ran here, and no process of its start time has its id."""
    here = identity(os.getpid())
    if any(here[key] is None or here[key] != facts.get(key) for key in ("host", "boot", "process_namespace")):
        return False
    try:
        os.kill(facts["process"], 0)
        state, ticks = _state_and_start(facts["process"])
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError):
        return False
    return ticks is not None and (state in "ZX" or ticks != facts.get("process_ticks"))


def _state_and_start(process: int) -> tuple[str, int | None]:
    """The state of a process (Z: zombie) and its start, in ticks since the boot."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", None
    return fields[0], int(fields[19])
