"""Where snapshots go and when: memory (/dev/shm) every few steps, disk now and then, both in the background.

    live state --crc32c, compared on all ranks--> a copy --thread--> /dev/shm/foldfeed-RUN/step-*
                                             +--> a copy --thread--> OUTPUT/snapshots/step-*
                                                                         +--thread--> a URL (mirror.py)

Nothing changes the state between two updates, so it is summed up and copied by a thread while the next step
computes (`Saver.begin_snapshot`); the comparison is made at that step's commit point. The training loop pays
for it, and for what the thread then still has to do. Each tier has its own copy and its own thread that
writes, so a slow disk never holds the memory tier up; a tier that is still writing when its next snapshot is
due makes the loop wait. The memory tier survives the death of processes, not that of the machine; two
generations lie there, and the older one's files are written over, so one is whole at any moment. All ranks
hold the same state, so every machine writes a whole copy without any traffic, and after the loss of a machine
(or damage in its memory) its successor gets the generation from the memory of another one (resume.py).

A memory tier that is full, absent or not ours only slows a restart down: it is left out, said once. A disk
that cannot be written ends the run, on all ranks, at the next step.

Invariant: one process per machine writes a memory tier, the first rank alone writes to disk.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foldfeed.feature_store.errors import StorageFullError
from foldfeed.trainer.config import SnapshotConfig
from foldfeed.trainer.errors import SnapshotError
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.processes import boot_id
from foldfeed.trainer.state.interval import Interval
from foldfeed.trainer.state.mirror import Mirror
from foldfeed.trainer.state.snapshot import SnapshotFolder, replica_digest, sum_and_copy

# A double buffer: one generation stays whole while the other is written over.
MEMORY_GENERATIONS = 2
NO_MEMORY = "none"


class Job(threading.Thread):
    """Work in a thread of its own, whose result or error is kept for whoever waits for it."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        super().__init__(name=f"foldfeed-{name}")
        self._work = work
        self._found: Future[Any] = Future()
        self.start()

    def run(self) -> None:
        """See `threading.Thread`."""
        try:
            self._found.set_result(self._work())
        except BaseException as error:  # noqa: BLE001 - kept whole, raised by result()
            self._found.set_exception(error)

    def is_done(self, wait_s: float | None) -> bool:
        """Returns whether the work is done, after waiting so long for it at most; None: as it takes."""
        self.join(wait_s)
        return not self.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """What the work met, once it is done."""
        return self._found.exception() if self._found.done() else None

    def result(self) -> Any:
        """Waits; returns what the work did, or raises what it met."""
        self.join()
        return self._found.result()


class Begun(NamedTuple):
    """A snapshot under way: its manifest, which tiers it is for, steps' seconds, and the sums to come."""

    manifest: Mapping[str, Any]
    memory: bool
    disk: bool
    step_s: float
    checksums: Job


def memory_folder(
    root: str, run_id: str, before_write: Callable[[], None] = lambda: None
) -> SnapshotFolder | None:
    """Returns the memory tier of a run, which need not exist; None when it is turned off.

    Args:
      root: a folder in memory, or ``none``.
      run_id: of the run.
      before_write: see `SnapshotFolder`.
    """
    if root == NO_MEMORY:
        return None
    return SnapshotFolder(Path(root) / f"foldfeed-{run_id}", MEMORY_GENERATIONS, before_write, recycle=True)


def prepare_memory(folder: SnapshotFolder | None, ranks: Ranks) -> bool:
    """Makes the memory tier ready; returns whether this rank is the one that writes it.

    The first rank of each machine (of each mount, when containers have their own) writes. All ranks call it.
    """
    if folder is None:
        return False
    reason, place = "", ""
    root = folder.path.parent
    try:
        folder.path.mkdir(mode=0o700, exist_ok=True)
        found = folder.path.stat()
        # Tells machines, and mounts of one machine, apart.
        place = f"{boot_id()} {found.st_dev} {found.st_ino}"
        if found.st_uid != os.geteuid():
            reason = f"{folder.path} belongs to another user"
    except OSError as error:
        reason = f"{root}: {error.strerror or error}"
    rows = ranks.gather_json([place, reason], "the look at memory for snapshots")
    if reason:
        if [text for _, text in rows[: ranks.rank]].count(reason) == 0:
            _say_off(ranks, reason)
        return False
    writes = [row[0] for row in rows].index(place) == ranks.rank
    if writes:
        folder.sweep()
    return writes


def _say_off(ranks: Ranks, reason: str) -> None:
    # Printed by the rank it happened to: the first one need not be on that machine.
    print(
        f"rank {ranks.rank}: no snapshots in memory ({reason}); a restart takes those of another machine, or "
        "goes back to the last one on disk",
        flush=True,
    )


class Lane:
    """One tier's copy of the state and the thread that writes it.

    Attributes:
      folder: where generations go.
      write_s: seconds that the last write took.
    """

    def __init__(self, folder: SnapshotFolder, name: str, after: Callable[[Path], None]) -> None:
        """Allocates nothing yet.

        Args:
          folder: where generations go.
          name: of the thread.
          after: called in the thread with the path of each published generation.
        """
        self.folder = folder
        self.write_s = 0.0
        self._name = name
        self._after = after
        self._copy: dict[str, torch.Tensor] = {}
        self._writing: Job | None = None

    @property
    def failure(self) -> BaseException | None:
        """What the last write met, once it has ended."""
        return self._writing.failure if self._writing is not None else None

    def room(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """Returns where the copy of a buffer goes; nothing may be under way."""
        if name not in self._copy:
            self._copy[name] = torch.empty_like(buffer, device="cpu")
        return self._copy[name]

    def submit(self, manifest: Mapping[str, Any], checksums: Mapping[str, int]) -> None:
        """Starts to write the copy; waits for the write before.

        Raises:
          StorageFullError, SnapshotError, LeaseLostError: of the write before.
        """
        self.wait()

        def write() -> Path:
            started = time.monotonic()
            path = self.folder.write(manifest, self._copy, checksums)
            self.write_s = time.monotonic() - started
            self._after(path)
            return path

        self._writing = Job(self._name, write)

    def wait(self) -> Path | None:
        """Waits for the write under way; returns what it published, None when there was none.

        Raises:
          StorageFullError, SnapshotError, LeaseLostError: the write failed.
        """
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def is_idle(self, wait_s: float | None = None) -> bool:
        """Returns whether nothing is being written, after waiting so long for it at most.

        Whatever became of the write is for `wait`; where nobody calls it another error is on its way already.
        """
        return self._writing is None or self._writing.is_done(wait_s)


class Saver:
    """Both tiers of one run. All ranks call `save`, `check` and `finish` at the same steps.

    Attributes:
      disk: snapshots on disk.
    """

    def __init__(
        self,
        disk: SnapshotFolder,
        memory: SnapshotFolder | None,
        ranks: Ranks,
        config: SnapshotConfig,
        say: Callable[[str], None] = lambda line: None,
        before: Saver | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """Finds out who writes. A collective.

        Args:
          disk: written by the first rank.
          memory: from `memory_folder`; None for no memory tier.
          ranks: the groups.
          config: intervals.
          say: prints a line on the first rank.
          before: of the same process among other ranks: what is under way there goes on.
          mirror: gets what is written to disk; of this process, whatever its number.
        """
        self.disk = disk
        self._ranks = ranks
        self._memory_on = memory is not None
        self._begun: Begun | None = None
        # Seconds that staging and writing took in the background.
        self._busy_s = 0.0
        if before is not None:
            # A moment: what is left of a write in memory is swept away below.
            before.settle_memory()
        writes = prepare_memory(memory, ranks)
        self._memory: Lane | None = None
        if memory is not None and writes:
            self._memory = Lane(memory, "memory", lambda path: None)
        self._mirror = mirror

        def published(path: Path) -> None:
            say(f"snapshot: step {int(path.name.split('-')[1])}  {path}")
            if mirror is not None:
                mirror.offer(path)

        self._disk = Lane(disk, "disk", published)
        if before is not None and ranks.is_first:
            self._disk = before._disk
        self._on_disk = Interval(config.disk_every, config.mtbf_s)
        self._in_memory = Interval(config.memory_every or -1, config.mtbf_s)

    def settle_memory(self) -> None:
        """Waits for the write to memory that is under way, if any."""
        if self._memory is not None:
            self._memory.is_idle()

    def begin(self, step: int) -> None:
        """Goes on after ``step`` completed steps; newer generations in memory are those that were refused."""
        self._on_disk.begin(step)
        self._in_memory.begin(step)
        if self._memory is not None:
            self._memory.folder.discard_after(step)

    def due(self, step: int) -> tuple[bool, bool]:
        """Returns whether a snapshot belongs after ``step`` steps: in memory, on disk. Equal on all ranks."""
        return self._memory_on and self._in_memory.is_due(step), self._on_disk.is_due(step)

    def begin_snapshot(
        self,
        manifest: Mapping[str, Any],
        state: Callable[[], Mapping[str, torch.Tensor]],
        step_s: float,
        *,
        memory: bool,
        disk: bool,
    ) -> None:
        """Starts to sum the state up and to copy it for the tiers that this rank writes; see `end_snapshot`.

        Args:
          manifest: JSON-able; has ``step``.
          state: gives fp32 (numel,) on the CPU, by name; they must stay as they are until the snapshot ends.
          step_s: of this rank's steps, to choose the next interval by; 0 not to.
          memory: whether it is for memory.
          disk: whether it is for the disk.
        """
        chosen = ((self._memory, memory), (self._disk if self._ranks.is_first else None, disk))
        lanes = [lane for lane, wanted in chosen if lane is not None and wanted]

        def work() -> dict[str, int]:
            started = time.monotonic()
            for lane in lanes:
                # It reads the copy; what it met is raised by `end_snapshot`.
                lane.is_idle()
            sums = {
                name: sum_and_copy(buffer, [lane.room(name, buffer) for lane in lanes])
                for name, buffer in state().items()
            }
            self._busy_s = time.monotonic() - started + sum(lane.write_s for lane in lanes)
            return sums

        # No earlier one is left: it was ended, or dropped.
        self._begun = Begun(manifest, memory, disk, step_s, Job("stage", work))

    def end_snapshot(self) -> tuple[float, bool]:
        """Compares the state of a snapshot under way on all ranks, and starts to write it. A collective.

        Returns: seconds for which it held this rank up, and whether it goes to disk.
        Raises:
          ReplicaMismatchError: a rank's parameters or moments differ; nothing is written.
          StorageFullError, SnapshotError, LeaseLostError: the disk's write before failed, on the first rank.
          PeerError: on the others.
        """
        if (begun := self._begun) is None:
            return 0.0, False
        started = time.perf_counter()
        # It waits for the write before on ranks that write.
        self._ranks.wait_for_all(self.is_staged, "the copy of a snapshot")
        self._begun = None
        checksums, step = begun.checksums.result(), int(begun.manifest["step"])
        digest = replica_digest(checksums)
        self._ranks.require_equal(digest, f"parameters and moments after step {step}")
        manifest = {**begun.manifest, "replica_digest": digest.hex()}
        if begun.memory:
            self._in_memory.begin(step)
            self._save_in_memory(manifest, checksums)
        if begun.disk:
            self._on_disk.begin(step)
            self._await_disk()
            self._ranks.first_does(lambda: self._disk.submit(manifest, checksums), "the snapshot")
        stall_s = time.perf_counter() - started
        if begun.step_s:
            self._learn(stall_s, begun.step_s, disk=begun.disk)
        return stall_s, begun.disk

    def is_staged(self, wait_s: float | None = None) -> bool:
        """Returns whether the state may change again, after waiting so long for it at most."""
        return self._begun is None or self._begun.checksums.is_done(wait_s)

    def drop_snapshot(self) -> None:
        """Waits until the state may change, and forgets the snapshot under way, if any."""
        self.is_staged()
        self._begun = None

    def _save_in_memory(self, manifest: Mapping[str, Any], checksums: Mapping[str, int]) -> None:
        if self._memory is None:
            return
        try:
            self._memory.submit(manifest, checksums)
        except (StorageFullError, SnapshotError) as error:
            folder, self._memory = self._memory.folder, None
            shutil.rmtree(folder.path, ignore_errors=True)
            reason = "no space left" if isinstance(error, StorageFullError) else str(error).rstrip(".")
            _say_off(self._ranks, f"{folder.path}: {reason}")

    def _learn(self, cost_s: float, step_s: float, *, disk: bool) -> None:
        """Chooses the next intervals from what the last snapshot cost. A collective where costs decide.

        Args:
          cost_s: for which this rank was held up.
          step_s: of this rank's steps.
          disk: it went to disk (or to both).
        """
        # What went to both says nothing about memory alone.
        interval = self._on_disk if disk else self._in_memory
        if not interval.chosen:
            return
        rows = self._ranks.gather_floats([cost_s, step_s, self._busy_s], "the cost of a snapshot")
        interval.learn(*(max(column) for column in zip(*rows, strict=True)))

    @property
    def failed(self) -> bool:
        """Whether this rank's write to disk failed; `check` raises it on all ranks."""
        return self._disk.failure is not None

    def check(self) -> None:
        """Waits for the disk on all ranks.

        Raises:
          StorageFullError, SnapshotError, LeaseLostError: the write failed, on the first rank.
          PeerError: on the others.
        """
        self._await_disk()
        self._ranks.first_does(lambda: str(self._disk.wait() or ""), "the snapshot")

    def _await_disk(self) -> None:
        """Waits for the write to disk that is under way; it may last longer than a collective waits."""
        disk = self._disk
        self._ranks.wait_for_all(
            lambda wait_s: not self._ranks.is_first or disk.is_idle(wait_s), "the write of a snapshot"
        )

    def finish(self) -> None:
        """Waits for the disk; then nothing in memory is newer, and the memory is given back. All ranks.

        Raises: as `check`.
        """
        self.check()
        mirror = self._mirror
        self._ranks.wait_for_all(
            lambda wait_s: mirror is None or mirror.is_idle(wait_s), "the copies of snapshots"
        )
        self.close()
        if self._memory is not None:
            shutil.rmtree(self._memory.folder.path, ignore_errors=True)
            self._memory = None

    def close(self) -> None:
        """Lets writes under way end, after a failure; what is in memory stays for the restart."""
        self._disk.is_idle()
        if self._mirror is not None:
            self._mirror.is_idle()
        if self._memory is not None:
            self._memory.is_idle()
            if not self._memory.folder.steps():
                shutil.rmtree(self._memory.folder.path, ignore_errors=True)
