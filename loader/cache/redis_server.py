"""Blocks in a Redis server that several machines share. Its loss only slows things down.

A failure (no connection, no answer within `CacheConfig.redis_timeout_s`) opens a circuit: nothing is asked
for `FIRST_PAUSE_S`, then one request tries; while that fails the pause doubles up to `LONGEST_PAUSE_S`.
Values are sealed (`blocks`), so one that was changed is a miss; the server evicts by its own rule. A server
that is full and evicts nothing refuses values, which is counted.

Thread safe.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.feature_store.storage.options import without_secrets
from foldfeed.loader.cache.blocks import FORMAT, Block, opened, seal
from foldfeed.loader.cache.config import CacheConfig
from foldfeed.loader.errors import LoaderConfigError

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
T = TypeVar("T")
_log = logging.getLogger(__name__)


class RedisTier:
    """Sealed blocks under the keys ``foldfeed:FORMAT:BLOCK_BYTES:PART/FILE/NUMBER``.

    Attributes:
      outages: times that the server was lost.
      damaged: values that were not what was put there.
      refused: values that the server did not take.
    """

    def __init__(self, config: CacheConfig) -> None:
        """Connects.

        Raises:
          MissingExtraError: the package ``redis`` is not installed.
          LoaderConfigError: the server refuses user or password, or its certificate is not trusted. One that
            cannot be reached is lost, as it may be later.
        """
        try:
            self._redis = importlib.import_module("redis")
        except ModuleNotFoundError as error:
            raise MissingExtraError("redis", "redis") from error
        self.outages = self.damaged = self.refused = 0
        self._shown = without_secrets(config.redis_url).partition("?")[0]
        self._prefix = f"foldfeed:{FORMAT}:{config.block_bytes}:"
        self._max_value = config.redis_value_bytes
        self._lock = threading.Lock()
        self._lost = False
        self._pause_s = FIRST_PAUSE_S
        self._ask_again = 0.0
        self._client = self._connect(config)
        self._check()

    def get(self, blocks: Sequence[Block]) -> dict[Block, bytes]:
        """Returns those of some blocks that are there, in one request."""
        values = self._try(lambda: self._client.mget([self._key(block) for block in blocks]))
        found: dict[Block, bytes] = {}
        for block, sealed in zip(blocks, values or (), strict=False):
            data = None if sealed is None else opened(block, sealed)
            if data is not None:
                found[block] = data
            elif sealed is not None:
                self.damaged += 1
                self.drop(block)
        return found

    def put(self, block: Block, data: bytes) -> None:
        """Sends a block unless it is too large."""
        if len(data) <= self._max_value:
            self._try(lambda: self._client.set(self._key(block), seal(block, data) + data))

    def drop(self, block: Block) -> None:
        """Removes a block."""
        self._try(lambda: self._client.delete(self._key(block)))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _connect(self, config: CacheConfig) -> Any:
        retry = importlib.import_module("redis.retry").Retry
        none = importlib.import_module("redis.backoff").NoBackoff
        try:
            return self._redis.Redis.from_url(
                config.redis_url,
                socket_timeout=config.redis_timeout_s,
                socket_connect_timeout=config.redis_timeout_s,
                retry=retry(none(), 0),
                max_connections=2 * config.in_flight + 16,
                decode_responses=False,
            )
        except (ValueError, TypeError) as error:
            raise LoaderConfigError("redis_url", self._shown, f"is no URL of a server ({error})") from error

    def _check(self) -> None:
        """Asks the server once, so that a wrong password is an error now and not a slow run."""
        exceptions = self._redis.exceptions
        try:
            self._client.ping()
        except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
            raise LoaderConfigError(
                "redis_url", self._shown, f"the server refuses user or password ({error})"
            ) from error
        except exceptions.ConnectionError as error:
            if "certificate" in str(error).lower():
                raise LoaderConfigError(
                    "redis_url",
                    self._shown,
                    f"the server's certificate is not trusted ({error}); add ?ssl_ca_certs=FILE to the URL",
                ) from error
            self._failed(error)
        except exceptions.RedisError as error:
            if "NOAUTH" in str(error) or "WRONGPASS" in str(error):
                raise LoaderConfigError(
                    "redis_url", self._shown, f"the server refuses user or password ({error})"
                ) from error
            self._failed(error)

    def _try(self, call: Callable[[], T]) -> T | None:
        """Returns what a request returns; None while the server is lost, or when it refuses."""
        with self._lock:
            if self._lost:
                if time.monotonic() < self._ask_again:
                    return None
                # This one tries; the others go on without until it knows.
                self._ask_again = time.monotonic() + self._pause_s
        exceptions = self._redis.exceptions
        try:
            answer = call()
        except exceptions.ResponseError as error:
            with self._lock:
                self.refused += 1
                first = self.refused == 1
            if first:
                _log.warning("cache: Redis at %s refuses a request (%s; said once)", self._shown, error)
            return None
        except (exceptions.RedisError, OSError) as error:
            self._failed(error)
            return None
        with self._lock:
            back, self._lost, self._pause_s = self._lost, False, FIRST_PAUSE_S
        if back:
            _log.warning("cache: Redis at %s is back", self._shown)
        return answer

    def _failed(self, error: Exception) -> None:
        with self._lock:
            new = not self._lost
            if new:
                self.outages += 1
            else:
                self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
            self._lost = True
            self._ask_again = time.monotonic() + self._pause_s
        if new:
            _log.warning("cache: Redis at %s is lost (%s); going on without it", self._shown, error)

    def _key(self, block: Block) -> str:
        return f"{self._prefix}{block.name}"
