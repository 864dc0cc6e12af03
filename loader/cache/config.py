"""`CacheConfig`: what a user says about the loader's cache.

Owns validity of the values, and nothing that happens.
"""

from __future__ import annotations

import dataclasses
import os
import urllib.parse
from typing import Any

from foldfeed.feature_store.storage.options import protocol_of, without_secrets
from foldfeed.loader.errors import LoaderConfigError

REDIS_PROTOCOLS = ("redis", "rediss")
# A record of a few hundred rows is about as large, compressed. A read behind a network takes its latency, in
# which so much would arrive anyway; and 100 GB of files of this size are 400,000.
BLOCK_BYTES = 256 << 10
_LEAST_BLOCK_BYTES = 1 << 10
MAX_IN_FLIGHT = 256
MEMORY_BYTES = 256 << 20
# Where command lines take the password of a Redis server from: their arguments can be seen by everybody.
REDIS_PASSWORD = "FOLDFEED_REDIS_PASSWORD"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Where a loader keeps what it has read of a store. Nothing of it changes a sample.

    Of use for a store in an object store or behind HTTP. A store on a local disk lies in the page cache
    already and is read without any of this.

    Attributes:
      memory_bytes: of blocks kept in memory, in each process that reads; at least four blocks.
      folder: on a local disk, made when missing; "" for none. Shared by all processes of a machine, kept
        between runs. It may not lie in a store, nor hold anything else.
      folder_bytes: most bytes of files in it.
      redis_url: ``redis://[USER:PASSWORD@]HOST[:PORT][/DB]``, ``rediss://`` for TLS; "" for none. Needs
        ``pip install 'foldfeed[redis]'``. The server evicts by its own rule (``maxmemory-policy
        allkeys-lru``).
      redis_value_bytes: larger blocks are not sent there.
      redis_timeout_s: longest wait for an answer of it; a server that is late counts as lost for a while.
      block_bytes: size of the stretches that files are cached in; a folder keeps the one it was made with.
      prefetch_bytes: of blocks brought into memory ahead of the samples that need them; half of memory_bytes
        when None.
      in_flight: requests to the store at a time, in each process.
      hedge: ask a store behind a URL a second time when an answer is later than 95 % of those before it, and
        take whichever comes first; at most one request in twenty is such a second one.
    """

    memory_bytes: int = MEMORY_BYTES
    folder: str | os.PathLike[str] = ""
    folder_bytes: int = 100 << 30
    redis_url: str = dataclasses.field(default="", repr=False)
    redis_value_bytes: int = 1 << 20
    redis_timeout_s: float = 0.5
    block_bytes: int = BLOCK_BYTES
    prefetch_bytes: int | None = None
    in_flight: int = 32
    hedge: bool = True

    def __post_init__(self) -> None:
        self._check_int(
            "block_bytes", _LEAST_BLOCK_BYTES, f"must be an integer of at least {_LEAST_BLOCK_BYTES}"
        )
        least = 4 * self.block_bytes
        self._check_int("memory_bytes", least, f"must be an integer of at least {least}, four blocks")
        self._check_int("folder_bytes", least, f"must be an integer of at least {least}, four blocks")
        self._check_int("redis_value_bytes", 1, "must be an integer of at least 1")
        self._check_int("in_flight", 1, f"must be an integer from 1 to {MAX_IN_FLIGHT}")
        if self.in_flight > MAX_IN_FLIGHT:
            raise LoaderConfigError(
                "in_flight", self.in_flight, f"must be an integer from 1 to {MAX_IN_FLIGHT}"
            )
        if self.prefetch_bytes is not None:
            self._check_int("prefetch_bytes", 0, "must be an integer of at least 0, or None")
            if self.prefetch_bytes > self.memory_bytes:
                raise LoaderConfigError(
                    "prefetch_bytes", self.prefetch_bytes, f"must fit into memory_bytes={self.memory_bytes}"
                )
        if not isinstance(self.hedge, bool):
            raise LoaderConfigError("hedge", self.hedge, "must be True or False")
        timeout = self.redis_timeout_s
        if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout <= 60:
            raise LoaderConfigError(
                "redis_timeout_s", timeout, "must be a number of seconds above 0, at most 60"
            )
        if self.redis_url and protocol_of(self.redis_url) not in REDIS_PROTOCOLS:
            raise LoaderConfigError(
                "redis_url",
                without_secrets(self.redis_url),
                "must begin with redis:// or, for TLS, rediss://",
            )
        if "://" in os.fspath(self.folder):
            raise LoaderConfigError("folder", self.folder, "must be a folder on a local disk, not a URL")

    @property
    def ahead_bytes(self) -> int:
        """``prefetch_bytes`` with its default."""
        return self.memory_bytes // 2 if self.prefetch_bytes is None else self.prefetch_bytes

    def facts(self) -> dict[str, Any]:
        """Returns the values as JSON-able ones, without secrets, for reports."""
        values = dataclasses.asdict(self)
        return values | {"folder": os.fspath(self.folder), "redis_url": without_secrets(self.redis_url)}

    def _check_int(self, field: str, least: int, rule: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise LoaderConfigError(field, value, rule)


def cache_of_options(folder: str, folder_gb: float, memory_mb: float, redis_url: str) -> CacheConfig | None:
    """Returns the cache that options of a command line ask for; None when they ask for none.

    The password of the server is taken from FOLDFEED_REDIS_PASSWORD.

    Args:
      folder: "" for none.
      folder_gb: its limit in 10**9 bytes; 0 for the default.
      memory_mb: memory in 10**6 bytes; 0 for none, or with another tier for the default.
      redis_url: "" for none.
    Raises:
      LoaderConfigError: a value that cannot work, or a password in the URL.
    """
    if folder_gb and not folder:
        raise LoaderConfigError("cache_gb", folder_gb, "is the limit of a folder; give --cache-folder, too")
    if not (folder or memory_mb or redis_url):
        return None
    values: dict[str, Any] = {"folder": folder, "redis_url": _with_password(redis_url)}
    if folder_gb:
        values["folder_bytes"] = round(folder_gb * 1e9)
    if memory_mb:
        values["memory_bytes"] = round(memory_mb * 1e6)
    return CacheConfig(**values)


def _with_password(url: str) -> str:
    if not url:
        return ""
    parts = urllib.parse.urlsplit(url)
    if parts.password is not None or "password=" in parts.query:
        raise LoaderConfigError(
            "cache_redis",
            without_secrets(url).partition("?")[0],
            f"holds a password, which command lines and run files show; put it into {REDIS_PASSWORD}",
        )
    password = os.environ.get(REDIS_PASSWORD)
    if not password:
        return url
    place = parts.netloc.rpartition("@")[2]
    user = f"{parts.username or ''}:{urllib.parse.quote(password, safe='')}"
    return urllib.parse.urlunsplit(parts._replace(netloc=f"{user}@{place}"))
