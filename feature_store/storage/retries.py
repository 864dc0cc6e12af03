"""Requests to remote storage: tried again a bounded number of times, then one typed error.

Owns the decision what is worth another attempt, the pauses, and the final `StorageError`. Does not own any
protocol. Invariants: a call ends after `RetryPolicy.attempts` attempts; "there is no such file" and "the name
is taken" are answers and never repeated; an error that is a fault of the program is not touched.

Thread safe: no state.
"""

from __future__ import annotations

import dataclasses
import errno
import http.client
import logging
import math
import os
import random
import ssl
import time
from collections.abc import Callable
from typing import Any, TypeVar

from foldfeed.feature_store.errors import StorageError

T = TypeVar("T")
N = TypeVar("N", int, float)
_log = logging.getLogger(__name__)

# Answers, not failures.
ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# Another attempt would meet the same.
_FINAL_NAMES = (
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"),
    *("ParamValidationError", "SSLCertVerificationError", "ClientConnectorCertificateError"),
)
# S3's words for a request that is wrong in itself. Not all that s3fs calls EINVAL: a body that was cut on its
# way (IncompleteBody, BadDigest) comes whole the next time.
_FINAL_CODES = (
    *("InvalidArgument", "InvalidBucketName", "InvalidLocationConstraint", "InvalidURI"),
    "AuthorizationHeaderMalformed",
)
_FINAL_NUMBERS = (errno.EINVAL, errno.ENOSYS)
_NOT_IMPLEMENTED = 501
# Packages below fsspec, whose errors share no base class.
_CLIENT_PACKAGES = (
    "aiohttp",
    "botocore",
    "aiobotocore",
    "ftplib",
    "gcsfs",
    "google",
    "paramiko",
    "requests",
    "urllib3",
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How long a request may take.

    Attributes:
      attempts: most attempts, the first one counted.
      timeout_s: longest silence of a server within one attempt.
      first_pause_s: pause after the first failure; doubles with each.
      longest_pause_s: and ends here. A random part keeps a thousand workers from coming back at once.
    """

    attempts: int = 8
    timeout_s: float = 60.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0

    def __post_init__(self) -> None:
        # Not the other way round: nan compares as neither.
        if self.attempts < 1 or not 0 < self.timeout_s < math.inf:
            raise ValueError(
                f"attempts {self.attempts} must be at least 1 and timeout_s {self.timeout_s} finite and > 0 "
                "(FOLDFEED_STORAGE_ATTEMPTS, FOLDFEED_STORAGE_TIMEOUT_S)"
            )
        if not 0 <= self.first_pause_s <= self.longest_pause_s < math.inf:
            raise ValueError(
                f"first_pause_s {self.first_pause_s} must be within 0..{self.longest_pause_s} "
                "(FOLDFEED_STORAGE_PAUSE_S)"
            )

    def pause_s(self, attempt: int) -> float:
        """Returns how long to wait after an attempt that failed, counted from 1."""
        return random.uniform(0.5, 1.0) * min(
            self.longest_pause_s, self.first_pause_s * 2 ** min(attempt - 1, 30)
        )


class ShortReadError(OSError):
    """A server sent fewer bytes than it has; they are thrown away and asked for again."""


def retry_policy() -> RetryPolicy:
    """Returns the policy; FOLDFEED_STORAGE_ATTEMPTS, _TIMEOUT_S and _PAUSE_S (the first one) change it.

    Raises:
      ValueError: they hold no possible number.
    """
    default = RetryPolicy()
    return RetryPolicy(
        attempts=_from_environment("FOLDFEED_STORAGE_ATTEMPTS", int, default.attempts),
        timeout_s=_from_environment("FOLDFEED_STORAGE_TIMEOUT_S", float, default.timeout_s),
        first_pause_s=_from_environment("FOLDFEED_STORAGE_PAUSE_S", float, default.first_pause_s),
    )


def _from_environment(name: str, kind: Callable[[str], N], default: N) -> N:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {text!r}, not {what}; set one, or unset it for {default}") from error


def retrying(call: Callable[[], T], operation: str, url: str) -> T:
    """Returns what a call returns, after as many attempts as the policy allows.

    Args:
      call: one attempt; it can be repeated at any time.
      operation: a verb for the message.
      url: what it is about.
    Raises:
      StorageError: the last attempt failed too, or the storage denies access.
      OSError: one of `ANSWERS`, or this machine's own disk is full.
    """
    policy = retry_policy()
    attempt = 1
    while True:
        try:
            return call()
        except Exception as error:
            # All of them, because the packages below fsspec have no base class in common.
            if not is_storage_failure(error):
                raise
            if attempt >= policy.attempts or _is_final(error):
                raise StorageError(url, operation, attempt, describe(error)) from error
            _log.info("%s %s: attempt %d failed (%s)", operation, url, attempt, describe(error))
        time.sleep(policy.pause_s(attempt))
        attempt += 1


def is_storage_failure(error: Exception) -> bool:
    """Returns whether an error is the network's or the storage's, and no answer of it."""
    if isinstance(error, ANSWERS) or (isinstance(error, OSError) and error.errno in _NO_SPACE):
        return False
    if isinstance(error, (OSError, TimeoutError, EOFError, http.client.HTTPException)):
        return True
    return type(error).__module__.split(".")[0] in _CLIENT_PACKAGES


def _is_final(error: Exception) -> bool:
    if isinstance(error, (PermissionError, ssl.SSLCertVerificationError)) or is_not_implemented(error):
        return True
    answer = _answer_of(error)
    if answer is not None:
        return answer.get("Error", {}).get("Code") in _FINAL_CODES
    if isinstance(error, OSError) and error.errno in _FINAL_NUMBERS:
        return True
    # Clients of fsspec put their own error in front of the one that says why.
    return any(type(one).__name__ in _FINAL_NAMES for one in (error, error.__cause__))


def is_not_implemented(error: BaseException) -> bool:
    """Returns whether a server says that it has no such operation (501 or NotImplemented)."""
    answer = _answer_of(error) or {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status == _NOT_IMPLEMENTED or answer.get("Error", {}).get("Code") == "NotImplemented"


def _answer_of(error: BaseException) -> dict[str, Any] | None:
    """Returns what S3 answered, where an error of botocore, or one that s3fs made of it, holds that."""
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):
            return answer
    return None


def describe(error: BaseException) -> str:
    """Returns an error in one line, its type included: many of these have no text of their own."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
