"""HMMER's daemon, which keeps sequences in memory and searches them for one query after another.

Owns a master and a worker of ``hmmpgmd`` for as long as a block runs, the file that they load, and the words
that they exchange with a client. Does not own settings of a search nor what becomes of hits
(`hmmpgmd_scanner`). Invariants: both programs end with the block, with this thread and with this process
(`subprocess_runner.running`); an answer comes from the master that was started here, because both ports were
seen to be its own before anybody spoke to them.

Which daemons. Those of 3.3 and 3.3.2 print ``results->hits[1]`` after every answer (``hmmdmstr.c`` line 897),
which is a null pointer where nothing was found, so their master dies of an empty result; and Debian's build
of 3.3.2 aborts before that, when a worker joins ("buffer overflow detected": its ``strcpy`` into ``char
data[1]`` under ``_FORTIFY_SOURCE``). 3.4 has neither. It is in the Python package ``hmmer``.

The daemon listens on all addresses of the machine (``INADDR_ANY``; no option changes that), without a
password, while it runs: who reaches the two ports can search the shard, and end the daemon.

Source: HMMER 3.4 ``cachedb.c`` (the file), ``hmmdmstr.c`` (the words), ``p7_hmmd_search_stats.c`` and
``p7_hit.c`` (the answer); user guide of HMMER 3.4, "hmmpgmd".
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from foldfeed.pipelines.errors import ToolFailedError, ToolNotFoundError, ToolOutputError
from foldfeed.pipelines.programs.subprocess_runner import Running, running
from foldfeed.pipelines.tools.search_tool import QUERY_NAME, binary_version, find_binaries

NAME = "hmmpgmd"
OLDEST = (3, 4)

_VERSION = re.compile(r"^# HMMER (\S+)", re.MULTILINE)

# Those that the daemon accepts; the system gives lower ones, too.
LOWEST_PORT = 49_152
# Somebody else may take a port between the moment when it was free and that in which the daemon asks for it.
_ATTEMPTS = 5
_LOOK_S = 0.02
# Of a client that waits for an answer.
_CLIENT_LOOK_S = 0.25

# Before the answer: status and number of bytes. Then times, Z and domZ (5 doubles), how they were set (2
# bytes), nmodels, nseqs, 4 counts of filters, nhits, nreported, nincluded; where each hit starts; hits. What
# stands before a hit's name: size, window_length, sortkey, 3 scores, 3 logarithms, nexpected, 9 integers, 2
# numbers, a byte of flags.
_STATUS = struct.Struct(">IQ")
_STATS = struct.Struct(">5d2B9Q")
_NSEQS, _NHITS = 8, 13
_BEFORE_NAME = struct.Struct(">2Id3f3df9i2qB")
_NO_WORKER = b"No compute nodes available"
_MOST_BYTES = 1 << 34


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DaemonProgram:
    """A daemon that can be talked to.

    Attributes:
      binary: absolute path.
      version: of HMMER.
    """

    binary: str
    version: str

    @classmethod
    def find(cls) -> DaemonProgram:
        """Returns the first one on PATH, or in the package ``hmmer``, that is not too old.

        Raises:
          ToolNotFoundError: there is none; says what others there are and why they will not do.
        """
        seen = []
        for binary in dict.fromkeys(find_binaries(NAME)):
            version = binary_version(NAME, binary, _VERSION)
            if _number(version) >= OLDEST:
                return cls(binary=binary, version=version)
            seen.append(f"{binary} is {version}")
        old = f" ({', '.join(seen)}; before 3.4 the daemon dies of a search that finds nothing, and Debian's"
        old += " 3.3.2 when a worker joins it)"
        raise ToolNotFoundError(
            NAME,
            f"no daemon of HMMER 3.4 or later found{old if seen else ''}; install one, e.g. "
            "'pip install foldfeed[search]', or use '--engine pyhmmer', which runs the same filters",
        )


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


class Daemon:
    """A master and its worker, ready to search; from `daemon`, in the thread that asked for it."""

    def __init__(self, programs: Sequence[Running], client: socket.socket, check: Callable[[], None]) -> None:
        self._programs, self._client, self._check = programs, client, check

    def search(self, sequence: str, options: str, num_targets: int) -> list[int]:
        """Returns the numbers of the targets that are hits, from 0 on, in the file's order.

        Args:
          sequence: the query.
          options: of the search, as the daemon takes them.
          num_targets: of the file, which the daemon must have searched.
        Raises:
          ToolOutputError: the daemon refuses, or its answer is none.
          ToolFailedError: it ended.
          CancelledError, or what ``check`` raises.
        """
        while True:
            self._send(f"@--seqdb 1 {options}\n>{QUERY_NAME}\n{sequence}\n//\n".encode("ascii"))
            status, size = _STATUS.unpack(self._receive(_STATUS.size))
            if size > _MOST_BYTES:
                raise ToolOutputError(NAME, f"it announces an answer of {size} bytes")
            answer = self._receive(size)
            if not status:
                return read_hits(answer, num_targets)
            if not answer.startswith(_NO_WORKER):
                said = answer.rstrip(b"\0").decode("utf-8", errors="backslashreplace")
                raise ToolOutputError(NAME, f"it refuses a search (status {status}): {said.strip()}")
            # The worker is still loading.
            self.look()
            time.sleep(_LOOK_S)

    def connect(self, port: int) -> None:
        """Opens the connection, once for all searches.

        Raises:
          ToolFailedError, ToolOutputError: there is nobody any more.
        """
        try:
            self._client.connect(("127.0.0.1", port))
        except OSError as error:
            raise self._lost(error) from error

    def look(self) -> None:
        """Raises where the search should not go on: see `search`."""
        self._check()
        for program in self._programs:
            program.check()

    def _receive(self, size: int) -> bytes:
        found = bytearray(size)
        view = memoryview(found)
        while len(view):
            try:
                received = self._client.recv_into(view)
            except TimeoutError:
                self.look()
                continue
            except OSError as error:
                raise self._lost(error) from error
            if not received:
                raise self._lost("closed")
            view = view[received:]
        return bytes(found)

    def _send(self, words: bytes) -> None:
        try:
            self._client.sendall(words)
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, why: object) -> ToolOutputError:
        """Returns the error of a connection that broke; raises that of a program that ended instead."""
        self.look()
        return ToolOutputError(NAME, f"the connection to it broke: {why}")


@contextlib.contextmanager
def daemon(
    program: DaemonProgram, database: Path, *, folder: Path, cpus: int, check: Callable[[], None]
) -> Iterator[tuple[Daemon, list[Running]]]:
    """Keeps a daemon for a block.

    Args:
      program: which one.
      database: of `hmmpgmd_scanner.write_daemon_database`.
      folder: for what the programs print.
      cpus: threads of the worker.
      check: called while something is waited for; raises to stop.
    Yields: the daemon, and its programs, which know what they cost when the block has ended.

    Raises:
      ToolFailedError: it does not start.
      CancelledError: the run was stopped.
    """
    with contextlib.ExitStack() as stack:
        for attempt in range(1, _ATTEMPTS + 1):
            ports = free_ports(2)
            words = ["--cport", str(ports[0]), "--wport", str(ports[1])]
            started = contextlib.ExitStack()
            master = started.enter_context(
                running(
                    [program.binary, "--master", "--seqdb", str(database), *words],
                    folder=folder,
                    name=f"{NAME}-master",
                )
            )
            try:
                _wait_for_ports(master, ports, check)
            except ToolFailedError as error:
                started.close()
                # It ends with 0 and a word to the system's log where a port is taken.
                if error.exit_code or attempt == _ATTEMPTS:
                    raise
            except BaseException:
                started.close()
                raise
            else:
                stack.push(started)
                break
        worker = stack.enter_context(
            running(
                [program.binary, "--worker", "127.0.0.1", *words[2:], "--cpu", str(cpus)],
                folder=folder,
                name=f"{NAME}-worker",
            )
        )
        client = stack.enter_context(socket.socket())
        client.settimeout(_CLIENT_LOOK_S)
        server = Daemon([master, worker], client, check)
        server.connect(ports[0])
        yield server, [master, worker]


def free_ports(number: int) -> list[int]:
    """Returns ports that nobody listens on, of those that the daemon accepts."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < number:
            one = held.enter_context(socket.socket())
            one.bind(("", 0))
            if one.getsockname()[1] >= LOWEST_PORT:
                ports.append(one.getsockname()[1])
        return ports


def _wait_for_ports(master: Running, ports: Sequence[int], check: Callable[[], None]) -> None:
    """Returns when a process listens on its ports; another process that does counts for nothing."""
    while not set(ports) <= ports_of(master.pid):
        check()
        master.check()
        time.sleep(_LOOK_S)


def ports_of(pid: int) -> set[int]:
    """Returns the IPv4 ports on which a process of this machine listens; none where it has ended."""
    listening = {}
    with open("/proc/self/net/tcp", encoding="ascii") as file:
        for line in file.readlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                listening[f"socket:[{words[9]}]"] = int(words[1].rpartition(":")[2], 16)
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            # A descriptor may be closed, and the process gone, between the two looks.
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {port for link, port in listening.items() if link in found}


def read_hits(answer: bytes, num_targets: int) -> list[int]:
    """Returns the numbers of the targets in an answer, from 0 on, ascending.

    Args:
      answer: what follows the status.
      num_targets: that must have been searched.
    Raises:
      ToolOutputError: it is not whole, or of another database.
    """
    try:
        stats = _STATS.unpack_from(answer)
        hits = stats[_NHITS]
        starts = struct.unpack_from(f">{hits}Q", answer, _STATS.size)
        # Where there are no hits a word stands for the starts.
        first = _STATS.size + 8 * max(1, hits)
        numbers = []
        for start in starts:
            name = first + start + _BEFORE_NAME.size
            if _BEFORE_NAME.unpack_from(answer, first + start)[0] < _BEFORE_NAME.size:
                raise ValueError("a hit is too short")
            numbers.append(int(answer[name : answer.index(b"\0", name)]) - 1)
    except (struct.error, ValueError) as error:
        raise ToolOutputError(NAME, f"its answer of {len(answer)} bytes cannot be read: {error}") from error
    if stats[_NSEQS] != num_targets or not all(0 <= number < num_targets for number in numbers):
        raise ToolOutputError(
            NAME, f"it searched {stats[_NSEQS]} targets, and not the {num_targets} that it was given"
        )
    return sorted(numbers)
