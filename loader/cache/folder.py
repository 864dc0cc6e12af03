"""Blocks in a folder on a local disk, shared by all processes of a machine and kept between runs.

    FOLDER/foldfeed-cache.json        what this folder is; nothing else is ever taken for a cache
    FOLDER/state                      bytes of all blocks; its lock serialises every change of the folder
    FOLDER/users                      every process that uses the folder holds a shared lock on it
    FOLDER/flights/NN                 locks: who reads some blocks from the store just now
    FOLDER/new/NAME.BYTES             being written
    FOLDER/blocks/PART/FILE+NUMBER    a sealed block

Only files under ``blocks/`` and ``new/`` are ever removed, and only those of these names. No process relies
on a list of its own: the bytes are counted in ``state``, under its lock, before a block is written; a block
that somebody else removed is a miss. The list of what could go (`Evictor`) is each process's own and may be
stale: what is gone already frees nothing and the next one goes. Locks are flocks, which end with their
process.

A block appears by a rename, whole, and is checked whenever it is read, so nothing is forced to the disk: what
a power cut leaves is a damaged block, which is removed, counted and read from the store again. After a kill
``state`` may count up to one block per thread too much, never too little; the next process that finds nobody
else here counts anew.

Thread safe.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import google_crc32c

from foldfeed.loader.cache.blocks import FORMAT, HEAD_BYTES, Block, opened, seal
from foldfeed.loader.cache.eviction import Evictor, NextUses
from foldfeed.loader.errors import LoaderConfigError

MARKER = "foldfeed-cache.json"
_SEPARATOR = "+"
_NUM_FLIGHTS = 256
# Blocks side by side share the lock of a flight: one read usually brings several.
_FLIGHT_BLOCKS = 16
# Somebody who reads a block for longer is not waited for: two reads of a block are better than none.
FLIGHT_WAIT_S = 10.0
_POLL_S = 0.003
LOCK_WAIT_S = 10.0
# Nothing is written for so long after the disk was full, or failed.
PAUSE_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger(__name__)


class FolderTier:
    """Sealed blocks in files.

    Attributes:
      evictions: blocks removed for others.
      damaged: blocks found damaged, and removed.
      not_admitted: blocks not taken because everything here is needed sooner.
      failures: blocks not written because the disk was full or failed.
    """

    def __init__(self, folder: Path, max_bytes: int, block_bytes: int, next_uses: NextUses) -> None:
        """Opens a folder, or makes it.

        Raises:
          LoaderConfigError: it holds something else, was made for other blocks, or cannot be written.
        """
        self.evictions = self.damaged = self.not_admitted = self.failures = 0
        self._folder = folder
        self._blocks, self._new = folder / "blocks", folder / "new"
        self._max_bytes = max_bytes
        # One thread at a time changes the folder; another lock guards what this process knows of it.
        self._turn, self._lock = threading.Lock(), threading.Lock()
        # Names of files below `blocks`.
        self._evictor: Evictor[Block] = Evictor(next_uses)
        self._next_uses = next_uses
        self._listed = False
        self._now = 0
        self._paused_until = 0.0
        self._told: set[str] = set()
        # Locks of flights that this process holds: descriptor and number of threads.
        self._boarding = threading.Lock()
        self._flights: dict[int, list[int]] = {}
        self._state = self._users = -1
        try:
            claim(folder, block_bytes)
            for name in (self._blocks, self._new, folder / "flights"):
                name.mkdir(exist_ok=True)
            self._state = _open(folder / "state")
            self._users = _open(folder / "users")
            with self._changing():
                self._count_if_alone()
        except OSError as error:
            self.close()
            raise LoaderConfigError("folder", str(folder), f"cannot be used as a cache ({error})") from error

    def get(self, block: Block) -> bytes | None:
        """Returns a block, checked; None when it is not here, or was damaged and is gone now."""
        path = self._path(block)
        try:
            sealed = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._tell("read", f"{path} cannot be read ({error})")
            sealed = b""
        data = opened(block, sealed)
        with self._lock:
            if data is not None:
                self._evictor.used(block, len(sealed), self._now)
                return data
            self.damaged += 1
        self._tell("damaged", f"{path} is damaged; it is removed and read from the store again")
        self.drop(block)
        return None

    def has(self, block: Block) -> bool:
        """Returns whether there is a file of that block."""
        return self._path(block).exists()

    def put(self, block: Block, data: bytes) -> None:
        """Publishes a block unless it is here, or everything here is needed sooner, or the disk is full."""
        if self._state < 0:
            # A request that outlived the loader brought it.
            return
        if time.monotonic() < self._paused_until:
            self.failures += 1
            return
        try:
            self._publish(block, data)
        except OSError as error:
            self.failures += 1
            self._paused_until = time.monotonic() + PAUSE_S
            what = "is full" if error.errno in _FULL else f"cannot be written ({error})"
            self._tell("write", f"{self._folder} {what}; going on without new blocks in it for {PAUSE_S:g} s")

    def drop(self, block: Block) -> None:
        """Removes a block."""
        if self._state < 0:
            return
        try:
            with self._changing():
                self._set_total(self._total() - self._remove(block))
        except OSError as error:
            self._tell("remove", f"{self._path(block)} cannot be removed ({error})")

    def passed(self, now: int) -> None:
        """Says that samples before ``now`` have been read."""
        with self._lock:
            self._now = max(now, self._now)
            self._evictor.passed(self._now)

    @contextlib.contextmanager
    def alone(self, blocks: Sequence[Block]) -> Iterator[bool]:
        """Holds off all other processes that read any of these blocks from the store, for `FLIGHT_WAIT_S`.

        Yields: whether there is any of them here now, put by another process meanwhile.
        """
        names = {f"{block.part_id}/{block.file}/{block.number // _FLIGHT_BLOCKS}" for block in blocks}
        # In one order everywhere, so that nobody waits in a circle.
        numbers = sorted({google_crc32c.value(name.encode()) % _NUM_FLIGHTS for name in names})
        stop = time.monotonic() + FLIGHT_WAIT_S
        mine = []
        try:
            for number in numbers:
                while not self._board(number):
                    if time.monotonic() > stop or all(map(self.has, blocks)):
                        break
                    time.sleep(_POLL_S)
                else:
                    mine.append(number)
            yield any(map(self.has, blocks))
        finally:
            for number in mine:
                self._leave(number)

    def _board(self, number: int) -> bool:
        """Takes the lock of a flight for this process, whose threads share it; returns whether it is free."""
        with self._boarding:
            if number not in self._flights:
                handle = _open(self._folder / "flights" / f"{number:02x}")
                if not _try_lock(handle):
                    os.close(handle)
                    return False
                self._flights[number] = [handle, 0]
            self._flights[number][1] += 1
            return True

    def _leave(self, number: int) -> None:
        with self._boarding:
            flight = self._flights[number]
            flight[1] -= 1
            if not flight[1]:
                os.close(flight[0])
                del self._flights[number]

    def close(self) -> None:
        """Gives the folder back; it stays as it is."""
        for handle in (self._state, self._users):
            if handle >= 0:
                os.close(handle)
        self._state = self._users = -1

    def _publish(self, block: Block, data: bytes) -> None:
        path, size = self._path(block), HEAD_BYTES + len(data)
        # Whoever counts the folder anew learns from the name how much room is taken for it.
        fresh = self._new / f"{uuid.uuid4().hex}.{size}"
        with self._changing():
            if path.exists() or not self._make_room(block, size):
                return
            try:
                fresh.touch()
            except OSError:
                self._set_total(self._total() - size)
                raise
        try:
            with fresh.open("r+b") as file:
                file.write(seal(block, data))
                file.write(data)
            with self._changing():
                if path.exists():
                    raise FileExistsError(path)
                path.parent.mkdir(exist_ok=True)
                fresh.rename(path)
                self._evictor.used(block, size, self._now)
        except BaseException as error:
            with self._changing():
                fresh.unlink(missing_ok=True)
                self._set_total(self._total() - size)
            # Another process had the same block.
            if not isinstance(error, FileExistsError):
                raise

    def _make_room(self, block: Block, size: int) -> bool:
        """Takes room in `state`, after others went for it; returns whether there is any."""
        total = self._total()
        if total + size <= self._max_bytes:
            self._set_total(total + size)
            return True
        use = self._next_uses([block], self._now)[0]
        if not self._listed:
            self._list()
        counted = False
        while total + size > self._max_bytes:
            found = self._evictor.farthest()
            if found is None and not counted:
                # Nothing left that could go, though there must be something: others wrote or removed it.
                total, counted = self._list(), True
                continue
            if found is None or found[1] < use:
                self.not_admitted += 1
                self._set_total(total)
                return False
            freed = self._remove(found[0])
            total -= freed
            self.evictions += freed > 0
        self._set_total(total + size)
        return True

    def _remove(self, block: Block) -> int:
        """Removes a block's file; returns its size, 0 when there was none. The lock is held."""
        self._evictor.removed(block)
        path = self._path(block)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        with contextlib.suppress(OSError):
            # Fails while other blocks of that part are here.
            path.parent.rmdir()
        return size

    def _list(self) -> int:
        """Takes all blocks into the list of what could go; returns their bytes, unfinished ones' too."""
        total = sum(int(unfinished.name.rpartition(".")[2]) for unfinished in self._new.iterdir())
        for folder in os.scandir(self._blocks):
            for entry in os.scandir(folder.path) if folder.is_dir() else ():
                block, size = _block_of(folder.name, entry.name), entry.stat().st_size
                total += size
                if block is not None and block not in self._evictor:
                    self._evictor.used(block, size, self._now)
        self._listed = True
        return total

    def _count_if_alone(self) -> None:
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            for leftover in self._new.iterdir():
                leftover.unlink()
            self._set_total(self._list())
        fcntl.flock(self._users, fcntl.LOCK_SH)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Lets one thread of one process change the folder; never for long.

        Raises:
          OSError: another process has held the lock for `LOCK_WAIT_S`: it was stopped, for it does no more
            with it than remove some files.
        """
        with self._turn:
            stop = time.monotonic() + LOCK_WAIT_S
            while not _try_lock(self._state):
                if time.monotonic() > stop:
                    raise TimeoutError(
                        f"another process has held {self._folder / 'state'} for {LOCK_WAIT_S:g} s"
                    )
                time.sleep(_POLL_S / 10)
            try:
                with self._lock:
                    yield
            finally:
                fcntl.flock(self._state, fcntl.LOCK_UN)

    def _total(self) -> int:
        data = os.pread(self._state, 8, 0)
        return int.from_bytes(data, "little") if len(data) == 8 else self._list()

    def _set_total(self, total: int) -> None:
        os.pwrite(self._state, max(0, total).to_bytes(8, "little"), 0)

    def _path(self, block: Block) -> Path:
        name = f"{block.file.replace('/', _SEPARATOR)}{_SEPARATOR}{block.number}"
        return self._blocks / block.part_id / name

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("cache folder: %s (said once; see the loader's stats)", text)


def check_place(folder: Path, store_urls: Sequence[str]) -> None:
    """Raises LoaderConfigError unless a folder is apart from all stores, those of others included."""
    place = folder.resolve()
    for url in store_urls:
        if "://" in url:
            continue
        store = Path(url).resolve()
        if place == store or store in place.parents or place in store.parents:
            raise LoaderConfigError(
                "folder",
                str(folder),
                f"overlaps the store {url}; a cache is removed from, choose another place",
            )
    for parent in (place, *place.parents):
        if (parent / "foldfeed.json").exists():
            raise LoaderConfigError(
                "folder", str(folder), f"lies in the store {parent}; choose another place"
            )


def claim(folder: Path, block_bytes: int) -> None:
    """Marks an empty folder as a cache, or checks that it is one.

    Raises:
      LoaderConfigError: it holds something else, was made for other blocks, or cannot be written.
    """
    about = {"format": FORMAT, "block_bytes": block_bytes}
    marker = folder / MARKER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            names = [name for name in os.listdir(folder) if not name.startswith(MARKER)]
            if names and not marker.exists():
                raise LoaderConfigError(
                    "folder",
                    str(folder),
                    f"is no cache and holds other things, e.g. {names[0]!r}; give an empty or new folder",
                )
            fresh = folder / f"{MARKER}.{uuid.uuid4().hex}"
            fresh.write_text(json.dumps(about) + "\n")
            fresh.replace(marker)
        found = json.loads(marker.read_text())
    except (OSError, ValueError) as error:
        if isinstance(error, LoaderConfigError):
            raise
        raise LoaderConfigError("folder", str(folder), f"cannot be used as a cache ({error})") from error
    if found != about:
        raise LoaderConfigError(
            "folder",
            str(folder),
            f"is a cache of {found}, not of {about}; use that block_bytes or another folder",
        )


def _block_of(part_id: str, name: str) -> Block | None:
    file, _, number = name.rpartition(_SEPARATOR)
    return Block(part_id, file.replace(_SEPARATOR, "/"), int(number)) if file and number.isdecimal() else None


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
