"""The ranks of a job, before and beside their process group: messages, agreement on problems, and the end.

Input: torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
Output: messages on stderr, an exit status, and the end of all ranks soon after the first has failed:

    log("only rank 0 logs this")
    agree_on_problems(["there is no data.txt"])     # True on every rank, and a line on every machine's screen
    leave(FAILED)                                   # the others end within seconds, with this rank's reason

All of it goes through the store at which the ranks meet, a small server of keys and values, so that it works
where a collective would wait: before the process group exists, and when a rank is gone. A rank that fails
sets a key; a thread on each of the others polls it and ends their process, even if the main thread is blocked
in a C call. trainer/machines.py does so for a machine that is gone and can tell nobody.
"""

import itertools
import json
import os
import resource
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import DistError, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer import machines

MANY_FILES = 1 << 15
"""Files that a process of a large job may open: enough for four groups of 8,000 ranks."""

BAD_INPUT, STOPPED, FAILED = 2, 75, 1
"""Exit statuses other than 0: bad input, nothing trained; stopped on request, resumable; other failures."""

_last_message = ""
"""The last message that this rank logged; on failure, the reason."""

FAILED_RANK = "failed rank"
"""The key of the store that the first rank to fail sets: its number, a space, and what others log of it."""
POLL_SECONDS, ENDING_SECONDS = 1.0, 5.0
"""How often a rank checks whether another has failed, and the time it then has to end by itself."""
JOINING_SECONDS = 2.0
"""torchrun stops the ranks when a machine joins the run, and within this time it has noticed that on all
machines. Where ranks have ended before, because the others stop, it would not start them again."""
NEWEST_ATTEMPT = "newest attempt"
"""The key of torchrun's store under which `store_of_attempt` leaves its prefix, for other processes."""
LOST_PEER = "error: lost the connection to another rank, perhaps on another machine; see its error"
PATIENCE_SECONDS = 3.0
"""How long a rank waits for the store, and for why another has ended, as a launcher may be about to tell."""
before_exit: list[Callable[[], None]] = []
"""Called before a thread ends this process, as the main thread's clean-up does not run then."""
_neighbours: dict[int, int] = {}
"""The process ids of this machine's other ranks, by rank."""
_met: tuple[Any, int, int] | None = None
"""The store, this rank and the number of ranks, once several have met."""
_store: Any = None
"""This module's own connection to the store: a call that waits would block the others on its connection."""
lost_peer = threading.Event()
"""Set by a main thread that has lost a peer and only waits for its end."""
_is_ending = threading.Lock()
"""Held by the first thread that ends this process, so that one reason is logged."""
_over = threading.Event()
"""Set once this rank no longer depends on the others, so that their end is not a failure."""
_turns = itertools.count()


# --- this process, and what it logs ---------------------------------------------------------------------


def is_main() -> bool:
    """True on rank 0, which logs and writes the run's files."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_here() -> bool:
    """True on the first rank of every machine, which logs what concerns the machine or ends the run."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def local_world() -> int:
    """The number of ranks on this machine; all of them where no launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def ranks_here() -> range:
    """The ranks of this machine."""
    first = int(os.environ["RANK"]) - int(os.environ["LOCAL_RANK"])
    return range(first, first + local_world())


def allow_many_sockets() -> None:
    """Raise this process's limit of open files, which is often 1,024, as far as it may.

    In each of its groups gloo has a socket for every other rank, also where GPUs communicate by NCCL, and the
    store has several for every rank. With TORCH_GLOO_LAZY_INIT=1 ranks connect when they first communicate,
    but then one that is killed before that is noticed only at the timeout.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(MANY_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def log(message: str, every_rank: bool = False, every_machine: bool = False) -> None:
    """Print to stderr, by default on rank 0 only; stdout is for results."""
    global _last_message
    _last_message = message.strip()
    if every_rank or is_main() or (every_machine and is_first_here()):
        print(message, file=sys.stderr, flush=True)


def no_bar() -> bool:
    """Whether to log progress as lines, because redrawing a bar would fill a log file."""
    return not is_main() or not sys.stderr.isatty()


# --- the store ------------------------------------------------------------------------------------------


def meet() -> tuple[Any, int, int]:
    """Connect to the store through which all ranks meet, and end if one of them fails from now on."""
    global _met, _store
    if _met is not None:
        return _met
    _over.clear()
    store, rank, world = next(rendezvous("env://"))
    store: Any = store_of_attempt(store, rank, world)
    store.set(f"process {rank}", json.dumps([socket.gethostname(), os.getpid()]))
    if world > 1:
        _met, _store = (store, rank, world), store.clone()
        others = [other for other in ranks_here() if other != rank]
        _neighbours.update({other: json.loads(store.get(f"process {other}"))[1] for other in others})
        threading.Thread(target=_watch, args=(store.clone(),), name="watch", daemon=True).start()
    if world > local_world() and is_first_here():
        machines.watch(store, os.environ["MASTER_ADDR"], _lose_machine)
    return store, rank, world


def store_of_attempt(store: Store, rank: int, world: int) -> Store:
    """The keys of the ranks that were started together; all of them call it.

    torchrun may reuse its store when it restarts ranks, which must not find the failures and addresses of
    dead processes. Its count of restarts is each machine's own, and a rank may start again before another
    machine's ranks have ended. So a rank arrives by a name that no other process has, and rank 0 tells it the
    name of the attempt until it has answered.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"arrived as rank {rank}", name)
        attempt = store.get(f"attempt of {name}").decode()
        store.set(f"{attempt} has rank {rank}", "")
    else:
        attempt, missing = name, set(range(1, world))
        while missing:
            for other in missing:
                if store.check([key := f"arrived as rank {other}"]):
                    store.set(f"attempt of {store.get(key).decode()}", attempt)
            missing = {other for other in missing if not store.check([f"{attempt} has rank {other}"])}
            time.sleep(0.02)
        store.set(NEWEST_ATTEMPT, attempt)
    return PrefixStore(attempt, store)


# --- a rank that fails ends the job ---------------------------------------------------------------------


def tell_failure(rank: int | None = None, reason: str | None = None) -> None:
    """Tell all ranks that one has failed and why, by default this one with its last message, so that they
    end too; only the first failure counts."""
    if _store is None or _over.is_set():
        return
    if reason is None:
        reason = LOST_PEER
        if _last_message.startswith("error: ") and _last_message != LOST_PEER:
            first, *others = _last_message.removeprefix("error: ").splitlines()
            what = " ".join([first, *others[-1:]])  # after a traceback, the exception
            reason = f"error on {socket.gethostname()}: {what}\n{LOST_PEER}"
    value = f"{os.environ['RANK'] if rank is None else rank} {reason}"
    # In a thread, because a store on a silent machine would never answer.
    telling = threading.Thread(target=_tell, args=(_store, value), daemon=True)
    telling.start()
    telling.join(PATIENCE_SECONDS)
    if int(os.environ["WORLD_SIZE"]) > local_world():
        time.sleep(1.5 * POLL_SECONDS)  # the store may end with this machine's torchrun; others poll it


def _tell(store: Store, value: str) -> None:
    with suppress(DistError):  # the store has ended, which tells them as well
        store.compare_set(FAILED_RANK, "", value)


def _watch(store: Store) -> None:
    """End this process soon after another rank has failed, even if its main thread is blocked in a C call."""
    failed, reason = None, f"{LOST_PEER}; the store at {os.environ['MASTER_ADDR']} has ended"
    while not _over.wait(POLL_SECONDS):
        try:
            if not store.check([FAILED_RANK]):
                continue
            number, _, reason = store.get(FAILED_RANK).decode().partition(" ")
            failed = int(number)
        except DistError:
            pass  # the store has ended, and the job with it
        # A neighbour's error is in the same log.
        end_soon("" if failed in ranks_here() else reason)
        return


def _lose_machine(rank: int, name: str, how: str) -> None:
    """Called by the thread that watches other machines when one, whose first rank is `rank`, is gone."""
    if how == machines.ENDED and _over.wait(PATIENCE_SECONDS):
        return
    reason = f"error: {name} {how}"
    if is_main():
        tell_failure(rank, reason)  # this rank polls it too
    else:
        end_soon(reason)  # the store was on the machine that is gone


def end_soon(reason: str = "") -> None:
    """Let the main thread end by itself for a while, then end this process; for other threads.

    reason: logged by one rank per machine. Returns if the main thread has finished its work, or another
    thread ends the process.
    """
    if not _is_ending.acquire(blocking=False):
        return
    until = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < until and not lost_peer.is_set():
        if _over.wait(0.1):
            return
    _over.set()  # the others know already
    end_now(reason)


def end_now(reason: str = "") -> NoReturn:
    """End this process from any thread."""
    tell_failure()
    for function in before_exit:
        function()
    if reason:
        _let_the_first_log(ENDING_SECONDS + 2 * POLL_SECONDS)
        log(reason, every_machine=True)
        leave(FAILED)
    os._exit(FAILED)


def _let_the_first_log(seconds: float) -> None:
    """Wait, on all but the first rank of this machine, which logs for all of them.

    torchrun ends the other ranks as soon as one has ended.
    """
    if not is_first_here():
        time.sleep(seconds)


def gone_neighbour() -> int | None:
    """A rank of this machine whose process has ended, successfully or not."""
    for rank, process in _neighbours.items():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return rank
    return None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended; that rank's error is then the cause."""
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("gloo", "Connection closed by peer", "NCCL", "Socket")
    )


def part() -> None:
    """Stop depending on the other ranks: their end is not a failure any more, and this rank reports none."""
    global _met
    _over.set()
    _met = None


def leave(status: int) -> NoReturn:
    """Exit with a status; on failure immediately, because cleaning up could wait for a lost peer.

    torchrun's own status is only 0 or 1, so the first rank of each machine writes ours to the file
    XCOMPOSER_STATUS_FILE, if set. A failing rank's last message is written to torchrun's error file.
    """
    if status == BAD_INPUT:
        _let_the_first_log(10)
    if is_first_here() and "XCOMPOSER_STATUS_FILE" in os.environ:
        Path(os.environ["XCOMPOSER_STATUS_FILE"]).write_text(str(status))
    if status and _last_message and "TORCHELASTIC_ERROR_FILE" in os.environ:
        extra = {"py_callstack": _last_message, "timestamp": str(int(time.time()))}
        error = {"message": {"message": _last_message, "extraInfo": extra}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(error))
    if status:
        tell_failure()
    if status == STOPPED and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        time.sleep(JOINING_SECONDS)
    if status == STOPPED and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        status = 0  # any other status would make torchrun restart the ranks
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status) if status else sys.exit(0)


# --- agreement through the store ------------------------------------------------------------------------


def agree_on_problems(problems: Sequence[str]) -> bool:
    """Log the problems of all ranks on every machine, a line each; returns whether any rank has one.

    Every rank calls it, also before `start`, and all end together if there are any. What not all ranks have,
    such as a file that is missing on one machine, is logged with the machines that do.
    """
    world, name = int(os.environ.get("WORLD_SIZE", "1")), socket.gethostname()
    found = [(0, name, list(problems))] if world == 1 else _problems_of_all(name, problems)
    machines_by_problem: dict[str, list[str]] = {}
    for _, machine, its_problems in sorted(found):
        for problem in dict.fromkeys(its_problems):
            machines_by_problem.setdefault(problem, []).append(machine)
    if not machines_by_problem:
        return False
    lines = []
    for problem, having in machines_by_problem.items():
        is_everywhere = len(having) == world or world == local_world()
        where = "" if is_everywhere else f"on {', '.join(dict.fromkeys(having))}: "
        lines.append(f"error: {where}{problem}")
    log("\n".join(lines), every_machine=True)
    _over.set()  # all end alike
    return True


def _problems_of_all(name: str, problems: Sequence[str]) -> list[tuple[int, str, list[str]]]:
    """Rank, machine and problems of the ranks that have any, through the store."""
    _, rank, world = meet()
    store, key = _store, f"problems {next(_turns)}"
    if problems:
        store.append(key, json.dumps([rank, name, list(problems)]) + "\n")
    store.add(f"{key} given", 1)
    _wait_until(lambda: store.add(f"{key} given", 0) == world)
    if not store.check([key]):
        return []
    found = [tuple(json.loads(line)) for line in store.get(key).decode().splitlines()]
    store.add(f"{key} read", 1)
    if rank == 0:  # the store ends with it, or with its machine's torchrun
        _wait_until(lambda: store.add(f"{key} read", 0) == world)
    return found


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the block, then all others together: for results that are cached in files.

    Rank 0 may take hours, and where nothing can be cached the others too. So they wait for each other at the
    store: a collective has a timeout and keeps a GPU busy.
    """
    turn, store = f"turn {next(_turns)}", _store
    if store is None:
        yield
        return
    if not is_main():
        _wait_until(lambda: store.add(turn, 0) > 0)
    try:
        yield
    finally:
        store.add(turn, 1)
    _wait_until(lambda: store.add(turn, 0) == int(os.environ["WORLD_SIZE"]))


def _wait_until(condition: Callable[[], bool]) -> None:
    """Poll the store, soon ever less often."""
    pause = 0.001
    while not condition():
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)
