"""The process groups of a run and the small collectives on them.

A run has up to three groups: ``scatter`` and ``gather`` carry gradients (one communicator per phase of the
reducer, so that neither phase's messages can be mistaken for the other's), ``control`` carries a few bytes
over gloo on the CPU even when gradients use NCCL. A single process has none and every collective is local.

Does not own: when ranks are started or restarted; torchrun does.
Invariant: every rank calls the collectives of one group in the same order. Nothing here pickles: ranks
exchange bytes, JSON and float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import torch
import torch.distributed as dist

from foldfeed.trainer.errors import (
    CommunicationError,
    MeetingPointError,
    PeerError,
    ReplicaMismatchError,
    TrainerConfigError,
    WireError,
)
from foldfeed.trainer.groups import nccl
from foldfeed.trainer.groups.meeting import meet
from foldfeed.trainer.groups.topology import by_place, told_place
from foldfeed.trainer.groups.wire import MeshGroup

# Of devices: several ranks on a GPU.
SHARED = "cuda-shared"

# Between two meetings of ranks of which one is busy; far below any sensible limit of a collective.
ROUND_S = 0.5
# For which a rank may be busy by itself; a file system that does not answer for longer ends the run.
LONGEST_WAIT_S = 1800.0


class Group(Protocol):
    """The collectives that gradients and scalars need; gloo, NCCL or own sockets stand behind them."""

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        """Sends each rank its run of ``sent``; ``received`` gets the runs of all, in rank order."""

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> Callable[[], None]:
        """Starts to gather every rank's equally long tensor; returns what waits for it."""

    def part(self, members: Sequence[int]) -> Group:
        """Returns a group of some ranks, this one among them; each of them calls it, with equal members.

        It ends with this group.
        """

    def abort(self, reason: str) -> None:
        """Makes whatever waits for a peer end with an error, soon; from any thread."""

    def close(self) -> None:
        """Gives everything back."""


class TorchGroup:
    """torch's process groups. NCCL can be aborted; gloo cannot (wire.py), and is not asked to.

    Attributes:
      aborted: why it was given up; empty before.
    """

    def __init__(self, group: Any, make_part: Callable[[list[int]], Any] | None = None) -> None:
        """Takes a group.

        Args:
          group: a ``ProcessGroup``, or a backend such as ``ProcessGroupNCCL``.
          make_part: makes one of some ranks; torch's ``new_group`` when None.
        """
        self._group = group
        self._make_part = make_part or functools.partial(dist.new_group, use_local_synchronization=True)
        self._parts: list[TorchGroup] = []
        self.aborted = ""
        self._aborting: list[threading.Thread] = []

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        """See `Group`."""
        self._group.alltoall_base(received, sent, received_sizes, sent_sizes).wait()

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> Callable[[], None]:
        """See `Group`."""
        work = self._group._allgather_base(gathered, mine)
        return lambda: work.wait() and None

    def all_reduce(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Starts to sum a tensor over the ranks, in place and in the backend's order; returns what waits."""
        work: Any = dist.all_reduce(tensor, group=self._group, async_op=True)
        return lambda: work.wait() and None

    def part(self, members: Sequence[int]) -> TorchGroup:
        """See `Group`."""
        self._parts.append(TorchGroup(self._make_part(list(members))))
        return self._parts[-1]

    def abort(self, reason: str) -> None:
        """See `Group`."""
        if self.aborted:
            return
        # First: whoever finds a collective ended asks for it.
        self.aborted = reason or "aborted"
        # Not one after another: a communicator's may wait for work of one that would come later
        # (pytorch#119797).
        for group in (self, *self._parts):
            thread = threading.Thread(target=group._group.abort, name="foldfeed-abort", daemon=True)
            self._aborting.append(thread)
            thread.start()

    def close(self) -> None:
        """See `Group`."""
        for thread in self._aborting:
            thread.join()
        for group in (self, *self._parts):
            group._group.shutdown()


def _alone() -> Group:
    return MeshGroup(0, {}, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among its peers.

    Attributes:
      rank: 0 .. world-1.
      world: number of processes.
      device: where this rank's tensors live.
      scatter: group of the reducer's first phase; a single process has groups of itself alone.
      gather: group of the reducer's second phase.
      control: group for scalars and digests, on the CPU.
      generation: how often the ranks of an elastic run have changed; 0 otherwise.
    """

    rank: int
    world: int
    device: torch.device
    scatter: Group = dataclasses.field(default_factory=_alone)
    gather: Group = dataclasses.field(default_factory=_alone)
    control: Group = dataclasses.field(default_factory=_alone)
    generation: int = 0

    @property
    def is_first(self) -> bool:
        """True on the rank that prints and writes."""
        return self.rank == 0

    def require_groups(self, phase: str) -> None:
        """Checks that what gradients travelled by was not given up meanwhile.

        NCCL's calls return before their work is done, and aborted work raises nothing where it is waited for.

        Raises:
          CommunicationError: a group was aborted.
        """
        for group in (self.scatter, self.gather):
            if isinstance(group, TorchGroup) and group.aborted:
                raise CommunicationError(self.rank, phase, group.aborted)

    def gather_bytes(self, payload: bytes, phase: str) -> list[bytes]:
        """Returns every rank's payload (any sizes), in rank order, on every rank.

        Raises:
          CommunicationError: a peer died or the group's timeout passed.
        """
        if self.world == 1:
            return [payload]
        with self.guard(phase):
            size = torch.tensor([len(payload)], dtype=torch.int64)
            sizes = torch.empty(self.world, dtype=torch.int64)
            self.control.all_gather(sizes, size)()
            width = max(1, int(sizes.max()))
            mine = torch.frombuffer(bytearray(payload.ljust(width, b"\0")), dtype=torch.uint8)
            everyone = torch.empty(self.world * width, dtype=torch.uint8)
            self.control.all_gather(everyone, mine)()
        rows = everyone.view(self.world, width)
        return [rows[rank, : int(sizes[rank])].numpy().tobytes() for rank in range(self.world)]

    def gather_json(self, value: Any, phase: str) -> list[Any]:
        """Returns every rank's JSON-able value, in rank order, on every rank."""
        return [json.loads(raw) for raw in self.gather_bytes(json.dumps(value).encode(), phase)]

    def gather_floats(self, values: Sequence[float], phase: str) -> list[list[float]]:
        """Returns every rank's values (equal lengths) as float64, exactly, in rank order."""
        if self.world == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = torch.empty(self.world * len(values), dtype=torch.float64)
        with self.guard(phase):
            self.control.all_gather(everyone, mine)()
        rows: list[list[float]] = everyone.view(self.world, len(values)).tolist()
        return rows

    def wait_for_all(self, is_done: Callable[[float], bool], phase: str) -> None:
        """Returns when every rank is done with something of its own that may last, a write to disk above all.

        They meet every `ROUND_S`, so that no collective waits long; after `LONGEST_WAIT_S` one does.

        Args:
          is_done: waits so many seconds at most and returns whether it is done.
          phase: for the error of a rank that is lost meanwhile.
        """
        # Counted, because clocks would let one rank leave a round earlier than the others.
        for _ in range(int(LONGEST_WAIT_S / ROUND_S)):
            if not any(row[0] for row in self.gather_floats([float(not is_done(ROUND_S))], phase)):
                return

    def first_does(self, work: Callable[[], Any], phase: str, *, lasts: bool = False) -> Any:
        """Runs ``work`` on the first rank only and returns its JSON-able result on every rank.

        Args:
          work: for all.
          phase: for errors.
          lasts: it may take longer than a collective waits. It runs in a thread then, which goes on where
            another rank is lost meanwhile: for work that a failed rank may leave behind.
        Raises:
          PeerError: on the other ranks, when it failed on the first; that one raises the error itself.
        """
        done: Future[Any] = Future()

        def settle() -> None:
            try:
                found = work()
            except BaseException as error:  # noqa: BLE001 - kept whole, raised below
                done.set_exception(error)
            else:
                done.set_result(found)

        if self.is_first and lasts:
            threading.Thread(target=settle, name="foldfeed-first", daemon=True).start()
        elif self.is_first:
            settle()
        if lasts:
            self.wait_for_all(lambda wait_s: not self.is_first or bool(wait([done], wait_s).done), phase)
        failure = done.exception() if self.is_first else None
        if failure is not None and not isinstance(failure, Exception):
            # Ctrl-C waits for nobody.
            raise failure
        answer: dict[str, Any] = {"error": _first_line(failure)} if failure is not None else {}
        if self.is_first and failure is None:
            answer = {"result": done.result()}
        answer = self.gather_json(answer, phase)[0]
        if failure is not None:
            raise failure
        if "error" in answer:
            raise PeerError(0, phase, answer["error"])
        return answer["result"]

    def require_equal(self, digest: bytes, what: str) -> None:
        """Compares a short digest across ranks.

        Raises:
          ReplicaMismatchError: on every rank, naming the odd ones, when the digests are not all equal.
        """
        digests = self.gather_bytes(digest, f"the comparison of {what}")
        if len(set(digests)) > 1:
            raise ReplicaMismatchError(what, [d.hex() for d in digests], odd_ranks(digests))

    @contextlib.contextmanager
    def guard(self, phase: str) -> Iterator[None]:
        """Turns a backend's failure into a `CommunicationError` that names the phase."""
        try:
            yield
        except (RuntimeError, WireError) as error:
            # torch raises DistBackendError, DistNetworkError and plain RuntimeError, all RuntimeErrors.
            raise CommunicationError(self.rank, phase, _first_line(error)) from error


def odd_ranks(digests: Sequence[bytes]) -> list[int]:
    """Returns the ranks outside the strict majority, or all ranks when no digest has one."""
    majority = max(set(digests), key=digests.count)
    if 2 * digests.count(majority) <= len(digests):
        return list(range(len(digests)))
    return [rank for rank, digest in enumerate(digests) if digest != majority]


# gloo wraps its reason in the source line before it and advice after it.
_GLOO_NOISE = re.compile(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*| This is typically caused by.*$")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return _GLOO_NOISE.sub("", text[0]) if text else type(error).__name__


def world_from_environment() -> tuple[int, int, int]:
    """Returns (rank, world, local rank) as torchrun sets them; (0, 1, 0) without it.

    Raises:
      TrainerConfigError: only some of torchrun's variables are set.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return 0, 1, 0
    if len(found) < len(names):
        missing = ", ".join(name for name in names if name not in found)
        raise TrainerConfigError(
            f"{', '.join(found)} set but not {missing}: start ranks with torchrun, or unset them."
        )
    return int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"])


def pick_device(name: str, local_rank: int, preset: str = "none") -> torch.device:
    """Returns the device of this rank.

    Args:
      name: ``auto``, ``cpu``, ``cuda``, or ``cuda-shared``: ranks take turns on the node's GPUs.
      local_rank: of this process on its node.
      preset: of NCCL, as the run wishes it.
    Raises:
      TrainerConfigError: ``cuda`` was asked for and this rank has no device; or the preset has no effect.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = ("cuda" if available else "cpu") if name == "auto" else name
    nccl.require_effect(preset, kind)
    if kind == "cpu":
        return torch.device("cpu")
    if kind == SHARED and available:
        local_rank %= available
    if local_rank >= available:
        raise TrainerConfigError(
            f"--device {name}: local rank {local_rank} has no CUDA device ({available} visible). "
            "Start fewer ranks per node, or use --device cpu (or cuda-shared, to try something out)."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _meeting_point(rank: int, world: int, timeout: datetime.timedelta) -> dist.Store:
    """Returns the store in which ranks find each other, empty for this attempt.

    torchrun's agent keeps one store over all restarts, and torch 2.15 no longer separates them: a restarted
    rank would find the addresses of the killed attempt and fail with "Connection refused" (seen with gloo;
    pytorch#167288 shows it with NCCL). So each attempt gets its own prefix. The count is the agent's own: in
    a run over several nodes, where agents may count differently, start torchrun with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which makes a new store for each attempt instead.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"foldfeed/attempt{attempt}", store)


def _new_group(backend: str, timeout: datetime.timedelta) -> Group:
    make = functools.partial(dist.new_group, backend=backend, timeout=timeout)
    return TorchGroup(make(), functools.partial(make, use_local_synchronization=True))


def speaker(speaks: bool) -> Callable[[str], None]:
    """Returns what prints a line at once, or on ranks for which another one speaks, nothing."""
    return functools.partial(print, flush=True) if speaks else lambda line: None


def _take_place(store: dist.Store, rank: int, world: int) -> tuple[int, bool, bool]:
    """Returns this process's number among the ranks, whether they have several nodes, and InfiniBand.

    Ranks of a node, switch or region are neighbours in number where a topology is told; whoever started them
    may have dealt their numbers out in turn. The first one stays the first. A collective.
    """
    mine = [told_place(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), nccl.has_infiniband()]
    store.set(f"foldfeed/place/{rank}", json.dumps(mine))
    if rank == 0:
        # One of them reads what all say: 4,096 answers, not 4,096 times as many.
        rows = [json.loads(store.get(f"foldfeed/place/{other}")) for other in range(world)]
        places = [row[0] for row in rows]
        several = len({tuple(place) for place in places}) > 1 or (not places[0] and rows[0][1] < world)
        infiniband = all(row[2] for row in rows)
        store.set("foldfeed/places", json.dumps([by_place(places), several, infiniband]))
    order, several, infiniband = json.loads(store.get("foldfeed/places"))
    if (place := order.index(rank)) != rank:
        print(f"rank {place} by its place is what {rank} was by RANK", flush=True)
    return place, several, infiniband


@contextlib.contextmanager
def joined(
    *,
    rank: int,
    world: int,
    device: torch.device,
    timeout_s: float,
    shared: bool = False,
    always: bool = False,
    preset: str = "none",
    pins: bool = False,
) -> Iterator[Ranks]:
    """Joins the run's process groups and leaves them at the end of a run that went well.

    After an exception the groups are left alone: destroying a group whose peers are gone can wait for the
    whole timeout, and the process is about to exit, which closes its sockets and tells the others.

    Args:
      rank: this process.
      world: number of processes; the addresses come from torchrun's environment.
      device: gloo carries gradients on the CPU, NCCL on CUDA.
      shared: ranks share a GPU, which NCCL does not take: gloo carries them.
      timeout_s: after which a collective that waits for a stalled peer fails.
      always: make a group for a single process too (torch's DDP wants one).
      preset: of NCCL (nccl.py), by name, ``auto`` or ``none``.
      pins: fix NCCL's order of sums, whatever the preset.
    Raises:
      CommunicationError: not all ranks came.
      TrainerConfigError: a topology cannot be read.
      MeetingPointError: the port where they meet is taken.
    """
    if world == 1 and not always:
        yield Ranks(rank=0, world=1, device=device)
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" and not shared else "gloo"
    try:
        mesh = None
        if world == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            store = _meeting_point(rank, world, timeout)
            rank, several, infiniband = _take_place(store, rank, world)
            if backend == "nccl":
                name = nccl.choose(preset, several_nodes=several, infiniband=infiniband)
                nccl.apply(name, speaker(rank == 0), pins=pins or preset != "auto")
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
            if device.type == "cpu":
                # The tree's exchange goes over own sockets (stream.py), all else over gloo.
                mesh = meet(store, rank, world, timeout_s)
        ranks = Ranks(
            rank=rank,
            world=world,
            device=device,
            scatter=_new_group(backend, timeout) if mesh is None else mesh,
            gather=_new_group(backend, timeout),
            control=_new_group("gloo", timeout),
        )
    except (RuntimeError, OSError, WireError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise MeetingPointError(address, port, _first_line(error)) from error
        raise CommunicationError(rank, "the start", _first_line(error)) from error
    yield ranks
    if mesh is not None:
        mesh.close()
    dist.destroy_process_group()
