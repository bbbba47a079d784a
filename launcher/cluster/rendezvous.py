"""The meeting of all ranks at rank 0's port before torch starts: names missing ranks, and rejects other programs.

Every job has a random token, which `loldu launch` sends over ssh's standard input and the batch script passes in
Slurm's environment; it is never on a command line. On each connection both sides prove that they know it, without
sending it:

    rank 0 -> rank n    loldu CHALLENGE
    rank n -> rank 0    loldu-rank N CHALLENGE MAC          MAC over N and rank 0's challenge
    rank 0 -> rank n    MAC TEXT                            once all are there (no TEXT), or with the error TEXT

Lines are bounded, connections that send anything else are closed and logged, and the ranks continue to wait. Uses only
the standard library: it runs before seconds of imports.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

TOKEN = "LOLDU_TOKEN"
MEET_S = 300.0
HANDSHAKE_S = 5.0
STOP_S = 10.0  # after a stop signal: time for the other ranks to come, so that the run itself can record the stop
LINE_BYTES = 1024
MOST_PENDING = 128  # connections that have not proved themselves; beyond this the oldest is closed
MOST_LOGGED = 5
GREETING = re.compile(rb"loldu ([0-9a-f]{32})\n")
HELLO = re.compile(rb"loldu-rank ([0-9]{1,7}) ([0-9a-f]{32}) ([0-9a-f]{64})\n")
VERDICT = re.compile(rb"([0-9a-f]{64}) ([^\n]*)\n")


class RendezvousError(Exception):
    """The ranks did not meet; the message says which one is missing, and where to look."""


def meet(environ: Mapping[str, str], limit_s: float | None = None, asked: Callable[[], int] = lambda: 0) -> None:
    """Wait until all ranks have connected to rank 0; afterwards the port is free again.

    torch would wait longer, and its error would not name the rank that is missing. asked: the number of stop signals so
    far; after the first one the ranks wait STOP_S longer, after the second not at all. Raises RendezvousError.
    """
    world = int(environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return
    rank, address, port = int(environ["RANK"]), environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    limit_s = float(environ.get("LOLDU_MEET_S", MEET_S)) if limit_s is None else limit_s
    patience, token = Patience(limit_s, asked), environ.get(TOKEN, "")
    if not token and rank == 0:
        print(f"warning: {TOKEN} is not set, so any program that reaches port {port} can pose as a rank", flush=True)
    if rank == 0:
        several_nodes = world > int(environ.get("LOCAL_WORLD_SIZE", world))
        asyncio.run(Head(world, token, address, port, patience).run(listen(address, port, world, several_nodes)))
    else:
        visit(rank, address, port, token, patience)


class Patience:
    """How long to continue waiting: until a deadline, or shortly after a stop signal."""

    def __init__(self, limit_s: float, asked: Callable[[], int]):
        self.limit_s, self._asked = limit_s, asked
        self._deadline, self._stopped = time.monotonic() + limit_s, float("inf")

    def left_s(self) -> float:
        if self._asked() and self._stopped == float("inf"):
            self._stopped = time.monotonic() + STOP_S
        return 0.0 if self._asked() > 1 else min(self._deadline, self._stopped) - time.monotonic()

    def reason(self) -> str:
        """Why there is no time left."""
        return "stopped by a signal" if self._asked() else f"waited {self.limit_s:.0f} s"


def listen(address: str, port: int, backlog: int, several_nodes: bool) -> list[socket.socket]:
    """Sockets that listen at the address that the other ranks were given.

    They listen at all addresses, and log this, if that name is not an address of this machine (a translated one) or is
    the loopback address here, as in Debian's /etc/hosts, while other nodes must reach it.
    """
    host = socket.gethostname()
    try:
        _open("", port, socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET, 1).close()
    except OSError as error:  # torch opens the port at all addresses next
        raise RendezvousError(
            f"port {port} on {host} cannot be opened ({os.strerror(error.errno or 0)}): another program may use it; "
            "start again with another --port"
        ) from None
    opened: list[socket.socket] = []
    try:
        known = sorted(
            {(info[0], str(info[4][0])) for info in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)}
        )
    except OSError:
        known = []
    loopback = all(ipaddress.ip_address(ip.partition("%")[0]).is_loopback for _, ip in known)
    for family, ip in known if not (several_nodes and loopback) else ():
        try:
            opened.append(_open(ip, port, family, MOST_PENDING + backlog))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise RendezvousError(f"cannot listen on {ip}:{port} of {host}: {error.strerror}") from None
    if not opened:
        print(f"{address} is not an address of {host} that others reach: rank 0 listens on all addresses", flush=True)
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        opened.append(_open("", port, family, MOST_PENDING + backlog))
    return opened


def _open(ip: str, port: int, family: int, backlog: int) -> socket.socket:
    both = family == socket.AF_INET6 and not ip
    return socket.create_server((ip, port), family=family, backlog=backlog, dualstack_ipv6=both)


class Head:
    """Rank 0's side: one proven connection from every other rank."""

    def __init__(self, world: int, token: str, address: str, port: int, patience: Patience):
        self.world, self.token, self.where, self.patience = world, token, f"{address}:{port}", patience
        self.ranks: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]] = {}
        self.pending: dict[asyncio.StreamWriter, None] = {}  # in the order of their arrival
        self.closing, self.strangers = False, 0

    async def run(self, sockets: list[socket.socket]) -> None:
        """Collect all ranks and tell each that all are there, or which is missing. Raises RendezvousError."""
        servers = [await asyncio.start_server(self.greet, sock=one, limit=LINE_BYTES) for one in sockets]
        while len(self.ranks) < self.world - 1 and self.patience.left_s() > 0:
            await asyncio.sleep(0.02)
        self.closing = True
        for server in servers:
            server.close()
        for writer in self.pending:
            writer.transport.abort()
        error = ""
        if missing := [str(rank) for rank in range(1, self.world) if rank not in self.ranks]:
            shown = ", ".join([*missing[:20], *(["…"] if len(missing) > 20 else [])])
            error = (
                f"{self.patience.reason()} on {self.where}: rank {shown} of {self.world} did not connect; look at the "
                "log of that rank and at its node first"
            )
        await asyncio.gather(*(self.dismiss(*connection, error) for connection in self.ranks.values()))
        if self.strangers > MOST_LOGGED:
            print(f"warning: closed {self.strangers} foreign connections on {self.where}", flush=True)
        if error:
            raise RendezvousError(error)

    async def greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep a connection that proves to be a rank, close any other."""
        self.pending[writer] = None
        if len(self.pending) > MOST_PENDING:  # a proof takes milliseconds, so the oldest is not a rank
            next(iter(self.pending)).transport.abort()
        try:
            rank, challenge = await asyncio.wait_for(self.prove(reader, writer), HANDSHAKE_S)
        except (OSError, ValueError, TimeoutError) as error:
            if not self.closing:
                self.reject(writer, str(error) if isinstance(error, ValueError) else "it said nothing in time")
            return
        finally:
            self.pending.pop(writer, None)
        if rank in self.ranks:  # it connected again
            self.ranks[rank][1].transport.abort()
        self.ranks[rank] = reader, writer, challenge

    async def prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, bytes]:
        """The rank on the other side and its challenge. Raises ValueError if it does not know the token."""
        challenge = secrets.token_hex(16).encode()
        writer.write(b"loldu %s\n" % challenge)
        try:
            line = await reader.readline()
        except ValueError:
            raise ValueError(f"it sent more than {LINE_BYTES} bytes without a line break") from None
        hello = HELLO.fullmatch(line)
        if not hello:
            raise ValueError("it does not speak this protocol")
        if not hmac.compare_digest(hello[3], mac(self.token, b"hello", hello[1], challenge)):
            raise ValueError("it does not know this job's token")
        if not 0 < int(hello[1]) < self.world:
            raise ValueError(f"there is no rank {int(hello[1])} of {self.world}")
        return int(hello[1]), hello[2]

    def reject(self, writer: asyncio.StreamWriter, reason: str) -> None:
        self.strangers += 1
        if self.strangers <= MOST_LOGGED:
            peer = (writer.get_extra_info("peername") or ("an unknown address",))[0]
            print(f"warning: closed a connection from {peer} to {self.where}: {reason}", flush=True)
        writer.transport.abort()

    async def dismiss(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, challenge: bytes, error: str
    ) -> None:
        """Tell a rank how it ended; it closes the connection first, so that the port is free for torch at once."""
        with suppress(OSError, TimeoutError):  # a rank that has died in the meantime ends the run anyway
            text = error.encode()
            writer.write(b"%s %s\n" % (mac(self.token, b"verdict", challenge, text), text))
            await asyncio.wait_for(reader.read(1), HANDSHAKE_S)
        writer.transport.abort()


def visit(rank: int, address: str, port: int, token: str, patience: Patience) -> None:
    """Connect to rank 0, again and again, until all ranks are there. Raises RendezvousError."""
    refused = "no answer"
    while (left := patience.left_s()) > 0:
        try:
            with socket.create_connection((address, port), timeout=min(left, 10.0)) as line:
                error = _ask(line, rank, token, patience)
        except (OSError, ValueError) as problem:
            refused = str(problem)
            time.sleep(0.2)
            continue
        if error:
            raise RendezvousError(error)
        return
    raise RendezvousError(
        f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port} ({patience.reason()}, last: "
        f"{refused}): is a firewall between the nodes, or does that name mean another address here? Run loldu doctor"
    )


def _ask(line: socket.socket, rank: int, token: str, patience: Patience) -> str:
    """What rank 0 sends once all are there: nothing, or an error. Raises ValueError if it is not our rank 0."""
    end = time.monotonic() + HANDSHAKE_S
    greeting = GREETING.fullmatch(_read_line(line, lambda: min(patience.left_s(), end - time.monotonic())))
    if not greeting:
        raise ValueError("another program answers there")
    challenge, number = secrets.token_hex(16).encode(), str(rank).encode()
    line.sendall(b"loldu-rank %s %s %s\n" % (number, challenge, mac(token, b"hello", number, greeting[1])))
    # Rank 0 gives up first and names the missing rank.
    verdict = VERDICT.fullmatch(_read_line(line, lambda: patience.left_s() + HANDSHAKE_S))
    if not verdict or not hmac.compare_digest(verdict[1], mac(token, b"verdict", challenge, verdict[2])):
        raise ValueError(f"it does not know this job's token ({TOKEN}): it belongs to another job")
    return verdict[2].decode(errors="replace")


def _read_line(line: socket.socket, left_s: Callable[[], float]) -> bytes:
    """The next line, at most LINE_BYTES; what came until then if the other side closes. Raises TimeoutError."""
    found = b""
    while not found.endswith(b"\n") and len(found) < LINE_BYTES:
        if (left := left_s()) <= 0:
            raise TimeoutError("no answer in time")
        line.settimeout(min(left, 0.5))
        with suppress(TimeoutError):
            new = line.recv(LINE_BYTES - len(found))
            if not new:
                break
            found += new
    return found


def mac(token: str, *parts: bytes) -> bytes:
    """The proof that its sender knows the token, bound to these parts."""
    return hmac.new(token.encode(), b"\0".join(parts), "sha256").hexdigest().encode()
