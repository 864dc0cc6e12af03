"""Where snapshots go and when: memory (/dev/shm) every few steps, disk now and then, both in the background.

    live state --crc32c, compared on all ranks--> a copy --thread--> /dev/shm/foldfeed-RUN/step-*
                                             +--> a copy --thread--> OUTPUT/snapshots/step-*
                                                                         +--thread--> a URL (mirror.py)

Nothing changes the state between two updates, so it is summed up and copied by a thread while the next step
computes (`Saver.stage`); the comparison is made at that step's commit point. The training loop pays for it,
and for what the thread then still has to do. Each tier has its own copy and its own thread that writes, so a
slow disk never holds the memory tier up; a tier that is still writing when its next snapshot is due makes the
loop wait. The memory tier survives the death of processes, not that of the machine; two
generations lie there, and the older one's files are written over, so one is whole at any moment. All ranks
hold the same state, so every machine writes a whole copy without any traffic, and after the loss of a machine
(or damage in its memory) its successor gets the generation from the memory of another one (resume.py).

A memory tier that is full, absent or not ours only slows a restart down: it is left out, said once. A disk
that cannot be written ends the run, on all ranks, at the next step.

Invariant: one process per machine writes a memory tier, the first rank alone writes to disk.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch

from foldfeed.feature_store.errors import StorageFullError
from foldfeed.trainer.config import SnapshotConfig
from foldfeed.trainer.errors import SnapshotError
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.state.interval import Interval
from foldfeed.trainer.state.mirror import Mirror
from foldfeed.trainer.state.snapshot import SnapshotFolder, replica_digest, sum_and_copy

# A double buffer: one generation stays whole while the other is written over.
MEMORY_GENERATIONS = 2
NO_MEMORY = "none"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Capture:
    """The state after a step, compared on all ranks.

    Attributes:
      manifest: JSON-able; has ``step``.
      buffers: fp32 (numel,) on the CPU, by name; they may alias memory that the next step changes. None when
        the tiers hold copies already (`Saver.stage`).
      checksums: crc32c of each, taken from these buffers.
    """

    manifest: Mapping[str, Any]
    buffers: Mapping[str, torch.Tensor] | None
    checksums: Mapping[str, int]


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
        boot = Path("/proc/sys/kernel/random/boot_id")
        folder.path.mkdir(mode=0o700, exist_ok=True)
        found = folder.path.stat()
        # Tells machines, and mounts of one machine, apart.
        place = f"{boot.read_text().strip() if boot.exists() else ''} {found.st_dev} {found.st_ino}"
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
    """One tier's copy of the state and the thread that writes it."""

    def __init__(self, folder: SnapshotFolder, name: str, after: Callable[[Path], None]) -> None:
        """Allocates nothing yet.

        Args:
          folder: where generations go.
          name: of the thread.
          after: called in the thread with the path of each published generation.
        """
        self.folder = folder
        self._name = name
        self._after = after
        # Seconds that the last write took.
        self.write_s = 0.0
        self._copy: dict[str, torch.Tensor] = {}
        self._result: Future[Path] | None = None
        self._thread: threading.Thread | None = None

    @property
    def failure(self) -> BaseException | None:
        """What the last write met, once it has ended."""
        if self._result is None or not self._result.done():
            return None
        return self._result.exception()

    def room(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """Returns where the copy of a buffer goes; nothing may be under way."""
        if name not in self._copy:
            self._copy[name] = torch.empty_like(buffer, device="cpu")
        return self._copy[name]

    def submit(self, capture: Capture) -> None:
        """Copies the state, if that is not done, and starts to write it; waits for the write before.

        Raises:
          StorageFullError, SnapshotError, LeaseLostError: of the write before.
        """
        self.wait()
        for name, buffer in (capture.buffers or {}).items():
            self.room(name, buffer).copy_(buffer)
        result: Future[Path] = Future()
        self._result = result
        self._thread = threading.Thread(
            target=self._write, args=(capture, result), name=f"foldfeed-{self._name}"
        )
        self._thread.start()

    def _write(self, capture: Capture, result: Future[Path]) -> None:
        started = time.monotonic()
        try:
            path = self.folder.write(capture.manifest, self._copy, capture.checksums)
            self.write_s = time.monotonic() - started
            self._after(path)
        except BaseException as error:  # noqa: BLE001 - kept whole, raised by wait()
            result.set_exception(error)
        else:
            result.set_result(path)

    def wait(self) -> Path | None:
        """Waits for the write under way; returns what it published, None when there was none.

        Raises:
          StorageFullError, SnapshotError, LeaseLostError: the write failed.
        """
        self.close()
        result, self._result = self._result, None
        return None if result is None else result.result()

    def is_idle(self, wait_s: float) -> bool:
        """Returns whether nothing is being written, after waiting so long for it at most."""
        thread = self._thread
        if thread is not None:
            thread.join(wait_s)
        return thread is None or not thread.is_alive()

    def close(self) -> None:
        """Waits for the write under way, whatever comes of it: another error is on its way already."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


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
        # A snapshot under way: its checksums, and what ends it.
        self._staged: Future[Mapping[str, int]] | None = None
        self._conclude: Callable[[Mapping[str, int], float], tuple[float, bool]]
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
            self._memory.close()

    def begin(self, step: int) -> None:
        """Goes on after ``step`` completed steps; newer generations in memory are those that were refused."""
        self._on_disk.begin(step)
        self._in_memory.begin(step)
        if self._memory is not None:
            self._memory.folder.discard_after(step)

    def due(self, step: int) -> tuple[bool, bool]:
        """Returns whether a snapshot belongs after ``step`` steps: in memory, on disk. Equal on all ranks."""
        return self._memory_on and self._in_memory.is_due(step), self._on_disk.is_due(step)

    def stage(
        self, state: Callable[[], Mapping[str, torch.Tensor]], *, memory: bool, disk: bool
    ) -> Future[Mapping[str, int]]:
        """Starts to sum the state up and to copy it for the tiers that this rank writes.

        Args:
          state: gives buffers as in `Capture`; they must stay as they are until it is done.
          memory: whether the copy is for memory.
          disk: whether it is for the disk.
        Returns: crc32c by name, later.
        """
        chosen = ((self._memory, memory), (self._disk if self._ranks.is_first else None, disk))
        lanes = [lane for lane, wanted in chosen if lane is not None and wanted]
        found: Future[Mapping[str, int]] = Future()

        def work() -> None:
            started = time.monotonic()
            try:
                for lane in lanes:
                    # It reads the copy; what it met is raised by `save`.
                    lane.close()
                sums = {
                    name: sum_and_copy(buffer, [lane.room(name, buffer) for lane in lanes])
                    for name, buffer in state().items()
                }
                self._busy_s = time.monotonic() - started + sum(lane.write_s for lane in lanes)
            except BaseException as error:  # noqa: BLE001 - kept whole, raised by result()
                found.set_exception(error)
            else:
                found.set_result(sums)

        threading.Thread(target=work, name="foldfeed-stage").start()
        return found

    def begin_snapshot(
        self,
        manifest: Mapping[str, Any],
        state: Callable[[], Mapping[str, torch.Tensor]],
        step_s: float,
        *,
        memory: bool,
        disk: bool,
    ) -> None:
        """Begins what `end_snapshot` ends, before the state changes.

        Args:
          manifest: JSON-able; has ``step``.
          state: see `stage`.
          step_s: of this rank's steps, to choose the next interval by; 0 not to.
          memory: whether it is for memory.
          disk: whether it is for the disk.
        """
        # No staging of an earlier one is left: it was ended, or dropped.
        self._staged = self.stage(state, memory=memory, disk=disk)

        def conclude(checksums: Mapping[str, int], started: float) -> tuple[float, bool]:
            digest = replica_digest(checksums)
            self._ranks.require_equal(digest, f"parameters and moments after step {manifest['step']}")
            named = {**manifest, "replica_digest": digest.hex()}
            self.save(Capture(manifest=named, buffers=None, checksums=checksums), memory=memory, disk=disk)
            stall_s = time.perf_counter() - started
            if step_s:
                self.learn(stall_s, step_s, disk=disk)
            return stall_s, disk

        self._conclude = conclude

    def end_snapshot(self) -> tuple[float, bool]:
        """Compares the state of a snapshot under way on all ranks, and starts to write it. A collective.

        Returns: seconds for which it held this rank up, and whether it goes to disk.
        Raises:
          ReplicaMismatchError: a rank's parameters or moments differ; nothing is written.
        """
        if self._staged is None:
            return 0.0, False
        started, staged = time.perf_counter(), self._staged
        # It waits for the write before on ranks that write.
        self._ranks.wait_for_all(lambda wait_s: bool(wait([staged], wait_s).done), "the copy of a snapshot")
        checksums, self._staged = staged.result(), None
        return self._conclude(checksums, started)

    def drop_snapshot(self) -> None:
        """Waits until the state may change, and forgets the snapshot under way, if any."""
        if self._staged is not None:
            wait([self._staged])
            self._staged = None

    def save(self, capture: Capture, *, memory: bool, disk: bool) -> None:
        """Starts to write a captured state.

        Raises:
          StorageFullError, SnapshotError, LeaseLostError: the disk's write before failed, on the first rank.
          PeerError: on the others.
        """
        step = int(capture.manifest["step"])
        if memory:
            self._in_memory.taken(step)
            self._save_in_memory(capture)
        if disk:
            self._on_disk.taken(step)
            self._await_disk()
            self._ranks.first_does(lambda: self._disk.submit(capture), "the snapshot")

    def _save_in_memory(self, capture: Capture) -> None:
        if self._memory is None:
            return
        try:
            self._memory.submit(capture)
        except (StorageFullError, SnapshotError) as error:
            folder, self._memory = self._memory.folder, None
            shutil.rmtree(folder.path, ignore_errors=True)
            reason = "no space left" if isinstance(error, StorageFullError) else str(error).rstrip(".")
            _say_off(self._ranks, f"{folder.path}: {reason}")

    def learn(self, cost_s: float, step_s: float, *, disk: bool) -> None:
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
        self._disk.close()
        if self._mirror is not None:
            self._mirror.close()
        if self._memory is not None:
            self._memory.close()
            if not self._memory.folder.steps():
                shutil.rmtree(self._memory.folder.path, ignore_errors=True)
