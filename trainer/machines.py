"""Several machines: the network interface between them, and noticing that one has ended or is silent.

Input: the store that all ranks share. Output: GLOO_SOCKET_IFNAME in the environment, and calls of `lost`.

    use_interface_towards(store, master)     # eth0, by which this machine reaches MASTER_ADDR
    watch(store, master, lost)               # later perhaps lost(8, "node2", "has not answered for 60 s: …")

The first rank of every machine holds a connection to rank 0 on which nothing is sent. When the process at the
other end is gone, its kernel closes the connection, which is seen at once. When a cable is pulled or a kernel
has crashed, nobody answers TCP's keepalive probes. A kernel answers them for processes that compute, wait for
a file server or are suspended, so that a machine which is only slow is never taken for a silent one.
"""

import errno
import fcntl
import json
import os
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from torch.distributed import DistError, Store  # pyright: ignore[reportPrivateImportUsage]

Lost = Callable[[int, str, str], None]
"""Called with the first rank of a machine, the machine's name, and what happened to it: ENDED, or SILENT."""
ENDED = "has ended all its processes, or the first of its ranks, without saying why"
SILENT = "has not answered for {:.0f} s: it has crashed, or the network to it is interrupted"
SILENT_SECONDS = 60.0
"""Without an answer for so long, a machine counts as lost: longer than a switch takes to start again."""
PORT = "port of the watch"
"""The key of the store with the port at which the other machines connect to rank 0."""
IPV4_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of <linux/sockios.h>


# --- the interface ----------------------------------------------------------------------------------------


def use_interface_towards(store: Store, master: str) -> None:
    """Let gloo use the network interface by which this machine reaches MASTER_ADDR; every rank calls it.

    By default gloo takes the address of the machine's own name, which other machines try in vain if it is
    127.0.1.1 (as in Debian's /etc/hosts), or which is missing. GLOO_SOCKET_IFNAME decides if it is set.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "GLOO_SOCKET_IFNAME" in os.environ or world == 1:
        return
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    address = address_towards("127.0.0.1" if is_one_machine else master)
    if rank == world - 1:
        store.set("address of the last rank", str(address or ""))
    if address and address.is_loopback and not is_one_machine:
        # MASTER_ADDR is this machine's own name: other machines show by which interface they are reached.
        last = store.get("address of the last rank").decode()
        address = address_towards(last) if last else None
    if address and (interface := interface_of(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def address_towards(peer: str) -> IPv4Address | IPv6Address | None:
    """This machine's address on the way to another, by the kernel's routes: no packet is sent."""
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)
                return ip_address(probe.getsockname()[0].partition("%")[0])
    return None


def interface_of(address: IPv4Address | IPv6Address) -> str | None:
    """The name of the interface with an address of this machine; None if it is none's first address."""
    if sys.platform != "linux":
        return None
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode())
            answer = fcntl.ioctl(probe, IPV4_ADDRESS_OF_INTERFACE, request)
            its = ip_address(answer[20:24])
            if its == address or (its.is_loopback and address.is_loopback):
                return name
    ipv6 = Path("/proc/net/if_inet6")
    for line in ipv6.read_text().splitlines() if ipv6.exists() else []:
        number, *_, name = line.split()
        if ip_address(int(number, 16)) == address:
            return name
    return None


# --- machines that end or fall silent ---------------------------------------------------------------------


def watch(store: Any, master: str, lost: Lost) -> None:
    """Call `lost`, in a thread, when another machine has ended or is silent; the first rank of each calls it.

    Rank 0 watches all machines, each of which watches rank 0's.
    """
    if int(os.environ["RANK"]) == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
        store.set(PORT, str(server.getsockname()[1]))
        target, args = _watch_all, (server, lost)
    else:
        target, args = _watch_first, (store.clone(), master, lost)
    threading.Thread(target=target, args=args, name="machines", daemon=True).start()


def _watch_all(server: socket.socket, lost: Lost) -> None:
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is server:
                connection, _ = server.accept()
                _keep_alive(connection)
                selector.register(connection, selectors.EVENT_READ)
                continue
            connection: Any = key.fileobj
            received, end = _receive(connection)
            if received:
                with suppress(ValueError, TypeError):  # not of a rank
                    rank, name = json.loads(received)
                    selector.modify(connection, selectors.EVENT_READ, (int(rank), str(name)))
                continue
            selector.unregister(connection)
            connection.close()
            if key.data:
                rank, name = key.data
                lost(rank, name, end)


def _watch_first(store: Store, master: str, lost: Lost) -> None:
    try:
        port, name = int(store.get(PORT)), json.loads(store.get("process 0"))[0]
    except DistError:  # the store has ended, which is noticed elsewhere
        return
    try:
        connection = socket.create_connection((master, port), timeout=SILENT_SECONDS)
    except OSError as error:
        here, limit = socket.gethostname(), "if either falls silent, the run ends after --hang_minutes"
        print(f"warning: {here} cannot connect to port {port} of {name}: {error}; {limit}", file=sys.stderr)
        return
    with connection:
        connection.settimeout(None)
        _keep_alive(connection)
        connection.sendall(json.dumps([int(os.environ["RANK"]), socket.gethostname()]).encode())
        _, end = _receive(connection)
        lost(0, name, end)


def _receive(connection: socket.socket) -> tuple[bytes, str]:
    """What has arrived; if nothing, how the connection ended."""
    try:
        return connection.recv(1000), ENDED
    except OSError as error:
        unreachable = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
        return b"", SILENT.format(SILENT_SECONDS) if error.errno in unreachable else ENDED


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernels at both ends probe each other, and end the connection after SILENT_SECONDS in vain."""
    idle, interval = max(1, int(SILENT_SECONDS / 3)), max(1, int(SILENT_SECONDS / 6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, int((SILENT_SECONDS - idle) / interval))
