"""A block through all tiers: memory, folder, Redis, store. Read once however many want it.

Owns the way of a block and who reads it. The first who wants a block that is not in memory leads its flight;
others in this process wait for that, and other processes of the machine are held off while it reads from the
store (`FolderTier.alone`). What comes from a lower tier is put into those above; what comes from the store,
into all.

Invariants: `read` returns the bytes that the store has, whatever a tier holds; a tier that fails is a miss;
nobody waits for a flight while leading one, so nobody waits in a circle. A part that is distrusted (its bytes
did not match the checksums of the store's own format) is read from the store, past every tier, and what comes
takes the place of what the tiers had.

Thread safe.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeAlias

from foldfeed.feature_store.storage import RangeReader
from foldfeed.loader.cache.blocks import Block
from foldfeed.loader.cache.config import CacheConfig
from foldfeed.loader.cache.eviction import NextUses, unknown_uses
from foldfeed.loader.cache.folder import FolderTier, check_place, claim
from foldfeed.loader.cache.memory import MemoryTier
from foldfeed.loader.cache.redis_server import RedisTier
from foldfeed.loader.cache.requests import Answer, Hedge, RequestThreads
from foldfeed.loader.errors import LoaderUseError

# Largest read of the store: a deep alignment then comes in several, side by side.
MAX_READ_BYTES = 4 << 20
# Blocks of one file that somebody reads, and who waits for them.
Flights: TypeAlias = "dict[Block, Future[bytes]]"
# Where a block came from.
MEMORY, FOLDER, REDIS, STORE = "memory", "folder", "redis", "store"
COUNTERS = (
    *(f"cache_{tier}_{what}" for tier in (MEMORY, FOLDER, REDIS, STORE) for what in ("hits", "bytes")),
    "cache_memory_evictions",
    "cache_folder_evictions",
    "cache_folder_not_admitted",
    "cache_folder_failures",
    "cache_damaged",
    "cache_redis_outages",
    "cache_redis_refused",
    "cache_hedges",
    "cache_hedges_won",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileOfPart:
    """A file whose blocks are cached.

    Attributes:
      part_id: of its part.
      file: its path within the part.
      read: reads it from the store.
    """

    part_id: str
    file: str
    read: RangeReader

    def block(self, number: int) -> Block:
        """Returns the name of a block of it."""
        return Block(self.part_id, self.file, number)


def check_cache(config: CacheConfig, store_urls: Sequence[str]) -> None:
    """Raises what `Tiers` would for a folder or a server that cannot be used; leaves nothing open."""
    if config.folder:
        check_place(Path(config.folder), store_urls)
        claim(Path(config.folder), config.block_bytes)
    if config.redis_url:
        RedisTier(config).close()


class Tiers:
    """The cache of one process."""

    def __init__(
        self,
        config: CacheConfig,
        store_urls: Sequence[str],
        next_uses: tuple[NextUses, NextUses] | None = None,
    ) -> None:
        """Opens the tiers.

        Args:
          config: which ones.
          store_urls: of the stores, which the folder must lie apart from; second requests are for URLs.
          next_uses: of blocks by this process, and by this machine.
        Raises:
          LoaderConfigError: the folder or the server cannot be used.
          MissingExtraError: the package for Redis is missing.
        """
        mine, ours = next_uses or (unknown_uses, unknown_uses)
        self._block_bytes = config.block_bytes
        self.memory = MemoryTier(config.memory_bytes, mine)
        self.folder: FolderTier | None = None
        self.redis: RedisTier | None = None
        if config.redis_url:
            self.redis = RedisTier(config)
        if config.folder:
            folder = Path(config.folder)
            check_place(folder, store_urls)
            self.folder = FolderTier(folder, config.folder_bytes, config.block_bytes, ours)
        far = any("://" in url for url in store_urls)
        # A disk that is late is late for a second request, too.
        self.hedge = Hedge(config.in_flight) if config.hedge and far else None
        self._threads = RequestThreads(config.in_flight, "foldfeed-request")
        self._lock = threading.Lock()
        self._flights: dict[Block, Future[bytes]] = {}
        self._distrusted: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def read(self, file: FileOfPart, start: int, size: int) -> bytes:
        """Returns bytes of a file, fewer than asked for only at its end.

        Raises:
          FileNotFoundError: there is no such file.
          StorageError: the store could not be read.
        """
        if not size:
            return b""
        numbers = self.blocks_of(start, size)
        offset = start - numbers[0] * self._block_bytes
        if len(numbers) == 1:
            return self._get(file, numbers)[0][offset : offset + size]
        return b"".join(self._get(file, numbers))[offset : offset + size]

    def bring(self, file: FileOfPart, numbers: Sequence[int]) -> list[Future[bytes]]:
        """Lets blocks come into memory; returns a future for each that is not there already."""
        flights = []
        lead: Flights = {}
        with self._lock:
            for number in numbers:
                block = file.block(number)
                if not self.memory.has(block):
                    flights.append(self._join(block, lead))
        self._lead(file, lead)
        return flights

    def blocks_of(self, start: int, size: int) -> range:
        """Returns the numbers of the blocks that bytes of a file lie in."""
        return range(start // self._block_bytes, (start + size - 1) // self._block_bytes + 1)

    @property
    def block_bytes(self) -> int:
        """Size of a block."""
        return self._block_bytes

    @contextlib.contextmanager
    def distrusting(self, part_id: str) -> Iterator[None]:
        """Reads a part from the store, whatever the tiers hold of it, and puts that there instead."""
        with self._lock:
            self._distrusted[part_id] += 1
            begun = [flight for block, flight in self._flights.items() if block.part_id == part_id]
        try:
            # What is on its way from a tier must not be taken for the store's answer.
            concurrent.futures.wait(begun)
            yield
        finally:
            with self._lock:
                self._distrusted[part_id] -= 1
                if not self._distrusted[part_id]:
                    del self._distrusted[part_id]

    def passed(self, now: int) -> None:
        """Says that samples before ``now`` have been read."""
        self.memory.passed(now)
        if self.folder is not None:
            self.folder.passed(now)

    def counters(self) -> dict[str, float]:
        """Returns `COUNTERS` since the start."""
        with self._lock:
            found = Counter(self._counts)
        found["cache_memory_evictions"] = self.memory.evictions
        if self.folder is not None:
            found["cache_folder_evictions"] = self.folder.evictions
            found["cache_folder_not_admitted"] = self.folder.not_admitted
            found["cache_folder_failures"] = self.folder.failures
            found["cache_damaged"] += self.folder.damaged
        if self.redis is not None:
            found["cache_redis_outages"] = self.redis.outages
            found["cache_redis_refused"] = self.redis.refused
            found["cache_damaged"] += self.redis.damaged
        if self.hedge is not None:
            found["cache_hedges"], found["cache_hedges_won"] = self.hedge.extra, self.hedge.won
        return {name: float(found[name]) for name in COUNTERS}

    def close(self) -> None:
        """Ends threads and connections. Whoever still waits for a block gets an error."""
        self._threads.stop()
        with self._lock:
            flights, self._flights = dict(self._flights), {}
        # First, so that whoever waits does not hold up the end.
        self._fail(flights, LoaderUseError("the cache was closed while this was being read"))
        self._threads.close()
        if self.hedge is not None:
            self.hedge.close()
        if self.folder is not None:
            self.folder.close()
        if self.redis is not None:
            self.redis.close()

    def _get(self, file: FileOfPart, numbers: range) -> list[bytes]:
        found: dict[int, bytes] = {}
        waiting: dict[int, Future[bytes]] = {}
        lead: Flights = {}
        with self._lock:
            for number in numbers:
                block = file.block(number)
                data = None if self._distrusted[block.part_id] else self.memory.get(block)
                if data is not None:
                    found[number] = data
                else:
                    waiting[number] = self._join(block, lead)
            self._counts["cache_memory_hits"] += len(found)
            self._counts["cache_memory_bytes"] += sum(map(len, found.values()))
        self._lead(file, lead)
        found |= {number: flight.result() for number, flight in waiting.items()}
        return [found[number] for number in numbers]

    def _join(self, block: Block, lead: Flights) -> Future[bytes]:
        """Returns the flight of a block; one that is new is ours to lead. The lock is held."""
        flight = self._flights.get(block)
        if flight is None:
            flight = self._flights[block] = lead[block] = Future()
        return flight

    def _lead(self, file: FileOfPart, flights: Flights) -> None:
        """Reads blocks whose flights are ours, on threads, neighbours together."""
        for run in _runs(sorted(flights), max(1, MAX_READ_BYTES // self._block_bytes)):
            mine = {block: flights[block] for block in run}
            try:
                taken = self._threads.submit(functools.partial(self._fly, file, mine))
            except RuntimeError as error:
                self._fail(mine, error)
                continue
            if not taken:
                self._fail(mine, LoaderUseError("the cache is closed"))

    def _fly(self, file: FileOfPart, flights: Flights) -> None:
        """Finds blocks in the tiers below memory, or reads them from the store."""
        try:
            for run in _runs(self._from_tiers(flights), len(flights)):
                self._from_store(file, {block: flights[block] for block in run})
        except BaseException as error:  # noqa: BLE001  handed on whole to whoever waits
            self._fail(flights, error)

    def _from_tiers(self, flights: Flights) -> list[Block]:
        """Lands what the folder or Redis have; returns the rest."""
        if self._distrusts(flights):
            return list(flights)
        left = self._from_folder(flights)
        if self.redis is None or not left:
            return left
        found = self.redis.get(left)
        for block, data in found.items():
            self._land(block, data, REDIS, flights)
            if self.folder is not None:
                self.folder.put(block, data)
        return [block for block in left if block not in found]

    def _from_folder(self, flights: Flights) -> list[Block]:
        if self.folder is None:
            return list(flights)
        left = []
        for block in flights:
            data = self.folder.get(block)
            if data is None:
                left.append(block)
            else:
                self._land(block, data, FOLDER, flights)
        return left

    def _from_store(self, file: FileOfPart, flights: Flights) -> None:
        """Reads neighbouring blocks from the store; one process at a time where they share a folder."""
        if self.folder is None:
            self._ask_store(file, flights)
            return
        with self.folder.alone(list(flights)) as waited:
            # Another process may have put them there while this one waited.
            left = self._from_folder(flights) if waited and not self._distrusts(flights) else list(flights)
            for run in _runs(left, len(flights)):
                self._ask_store(file, {block: flights[block] for block in run})

    def _ask_store(self, file: FileOfPart, flights: Flights) -> None:
        start, size = min(flights).number * self._block_bytes, len(flights) * self._block_bytes
        answer = Answer(lambda: file.read(start, size), functools.partial(self._arrived, flights))
        if self.hedge is None:
            answer.ask()
        else:
            self.hedge.run(answer)

    def _arrived(self, flights: Flights, found: bytes | BaseException) -> None:
        """Lands what the store answered; called once for each request, on any thread."""
        if isinstance(found, BaseException):
            self._fail(flights, found)
            return
        replace = self._distrusts(flights)
        for place, block in enumerate(sorted(flights)):
            data = found[place * self._block_bytes : (place + 1) * self._block_bytes]
            self._land(block, data, STORE, flights)
            if self.folder is not None:
                if replace:
                    self.folder.drop(block)
                self.folder.put(block, data)
            if self.redis is not None:
                self.redis.put(block, data)

    def _distrusts(self, flights: Flights) -> bool:
        with self._lock:
            return any(self._distrusted[block.part_id] > 0 for block in flights)

    def _land(self, block: Block, data: bytes, tier: str, flights: Flights) -> None:
        self.memory.put(block, data)
        self._end(block, flights[block])
        with self._lock:
            self._counts[f"cache_{tier}_hits"] += 1
            self._counts[f"cache_{tier}_bytes"] += len(data)
        # Whoever closes the cache may be first.
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            flights[block].set_result(data)

    def _fail(self, flights: Flights, error: BaseException) -> None:
        for block, flight in flights.items():
            self._end(block, flight)
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                flight.set_exception(error)

    def _end(self, block: Block, flight: Future[bytes]) -> None:
        with self._lock:
            if self._flights.get(block) is flight:
                del self._flights[block]


def _runs(blocks: Sequence[Block], most: int) -> list[list[Block]]:
    """Returns runs of neighbours among ascending blocks of a file, each of so many at most."""
    runs: list[list[Block]] = []
    for block in blocks:
        if runs and runs[-1][-1].number + 1 == block.number and len(runs[-1]) < most:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
