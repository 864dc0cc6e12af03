"""Copies of a run's snapshots at a URL: what is left when the machine and its disk are gone.

    URL/run.json                 what the run is, as in OUTPUT
    URL/step-00000010/           the files of a generation (snapshot.py); its manifest is written last

Each generation on disk is offered for copying once it is published. A thread of its own uploads the newest
one offered, so a slow network holds nothing up: what is offered meanwhile waits, and older than that is left
out. The files are opened when they are offered, so removing a generation does not hurt its copy. A copy that
fails is said and costs nothing else; the next generation is tried.

A start in an empty OUTPUT fetches the newest generation that validates. Where OUTPUT holds a run the URL is
not asked: what is on disk is at least as new.

Invariant: a folder at the URL without a manifest is no generation. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.storage import Blobs, LocalBlobs, open_blobs
from foldfeed.trainer.errors import InvalidSnapshotError, NoValidSnapshotError, TrainerError
from foldfeed.trainer.state.snapshot import GENERATION, MANIFEST, RUN_FILE, SNAPSHOTS, read_generation


class Offer(NamedTuple):
    """A generation to copy: its name, its open files by name, and the run it belongs to."""

    name: str
    files: dict[str, BinaryIO]
    run: bytes

    def close(self) -> None:
        """Closes the files."""
        for file in self.files.values():
            file.close()


class Mirror:
    """Uploads generations of one run, from one process."""

    def __init__(self, url: str, keep: int, say: Callable[[str], None]) -> None:
        """Keeps the settings; nothing is read or written before the first offer.

        Args:
          url: of a folder of this run alone; any that feature stores can be in.
          keep: newest generations that stay there.
          say: prints a line.
        """
        self._url, self._keep, self._say = url, keep, say
        self._lock = threading.Lock()
        self._waiting: Offer | None = None
        self._thread: threading.Thread | None = None

    def offer(self, generation: Path) -> None:
        """Has a published generation copied, instead of one that still waits.

        Args:
          generation: its folder, OUTPUT/snapshots/step-N.
        """
        found = Offer(
            generation.name,
            {path.name: path.open("rb") for path in sorted(generation.iterdir())},
            (generation.parents[1] / RUN_FILE).read_bytes(),
        )
        with self._lock:
            left_out, self._waiting = self._waiting, found
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="foldfeed-mirror")
                self._thread.start()
        if left_out is not None:
            left_out.close()

    def is_idle(self, wait_s: float | None = None) -> bool:
        """Returns whether what was offered is copied, or has failed, after waiting so long for it at most."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(wait_s)
        return thread is None or not thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._lock:
                offer, self._waiting = self._waiting, None
                if offer is None:
                    self._thread = None
                    return
            try:
                self._copy(open_blobs(self._url), offer)
            except (FoldfeedError, OSError) as error:
                self._say(f"warning: {offer.name} was not copied to {self._url}: {error}")
            finally:
                offer.close()

    def _copy(self, blobs: Blobs, offer: Offer) -> None:
        blobs.write_atomic(RUN_FILE, offer.run)
        names = [*(name for name in offer.files if name != MANIFEST), MANIFEST]
        try:
            for name in names:
                blobs.write_atomic(f"{offer.name}/{name}", offer.files[name].read())
        except (FoldfeedError, OSError):
            # What there is of it would only take the next one's room. An earlier copy has its manifest.
            with contextlib.suppress(FoldfeedError, OSError):
                if not blobs.exists(f"{offer.name}/{MANIFEST}"):
                    blobs.delete(offer.name)
            raise
        self._say(f"copied: {offer.name} to {self._url}")
        # Later ones were refused, or left by a run that a start elsewhere went back of: they must not push
        # this one out.
        names = [name for name in _generations(blobs) if _step_of(name) <= _step_of(offer.name)]
        for name in names[: -self._keep]:
            # Without its manifest it is no generation, whatever becomes of the rest.
            blobs.delete(f"{name}/{MANIFEST}")
            blobs.delete(name)


def _generations(blobs: Blobs) -> list[str]:
    """Returns the names of complete generations, oldest first."""
    names = [name for name in blobs.list("") if GENERATION.fullmatch(name)]
    return sorted((name for name in names if blobs.exists(f"{name}/{MANIFEST}")), key=_step_of)


def _step_of(name: str) -> int:
    return int(name.split("-")[1])


def fetch(url: str, output: Path, say: Callable[[str], None]) -> bool:
    """Fetches a run into an empty folder; returns whether there was one at the URL.

    Args:
      url: where a `Mirror` copied to.
      output: the run's folder; one that holds a run is left alone.
      say: prints a line.
    Raises:
      StorageError: the URL cannot be read.
      NoValidSnapshotError: there are generations, and none validates.
      TrainerError: there are, and nothing says of which run.
    """
    if (output / RUN_FILE).exists():
        return False
    blobs = open_blobs(url)
    names = _generations(blobs)
    if not names:
        return False
    try:
        run = blobs.read(RUN_FILE)
    except OSError as error:
        raise TrainerError(
            f"{url} holds snapshots of a run, but its {RUN_FILE} cannot be read ({error.strerror or error}). "
            "Restore it from a copy; or copy a snapshot to a disk and go on from it with --resume"
        ) from error
    reasons = []
    for name in reversed(names):
        try:
            _fetch_one(blobs, name, output / SNAPSHOTS)
        except (InvalidSnapshotError, FileNotFoundError) as error:
            reasons.append(f"{name}: {error}")
            say(f"warning: {name} at {url} is no valid generation ({error}); trying an older one")
            continue
        LocalBlobs(output).write_atomic(RUN_FILE, run)
        say(f"fetched: {name} from {url}")
        return True
    raise NoValidSnapshotError(url, reasons)


def _fetch_one(blobs: Blobs, name: str, folder: Path) -> None:
    """Fetches one generation and publishes it when it has validated."""
    temporary = folder / f".writing-{name}-fetch"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for found in blobs.walk(name):
            (temporary / Path(found.path).name).write_bytes(blobs.read(found.path))
        read_generation(temporary)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder / name)
        temporary.rename(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
