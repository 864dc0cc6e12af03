"""What the clients of remote storage are told: endpoint, credentials, time limits. The one place for it.

Owns the way from the environment to options. Does not own any client. Invariant: whoever talks to a store on
S3 (fsspec for files, delta-rs for other readers of the index) is told the same endpoint and credentials.

S3 is set up by the variables that AWS's own tools read: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION; without keys
the clients look for a profile or an instance's role. AWS_SKIP_SIGNATURE=true reads public buckets without
any. Google's storage uses GOOGLE_APPLICATION_CREDENTIALS or what ``gcloud`` left.
"""

from __future__ import annotations

import os
from typing import Any

from foldfeed.feature_store.errors import StoreUrlError
from foldfeed.feature_store.storage.retries import retry_policy

S3_PROTOCOLS = ("s3", "s3a")
GCS_PROTOCOLS = ("gs", "gcs")
HTTP_PROTOCOLS = ("http", "https")
_NO_USER = (*S3_PROTOCOLS, *GCS_PROTOCOLS, *HTTP_PROTOCOLS)
# What must be installed for a kind of URL: package and extra of foldfeed.
EXTRAS = dict.fromkeys(S3_PROTOCOLS, ("s3fs", "s3")) | dict.fromkeys(GCS_PROTOCOLS, ("gcsfs", "gcs"))
CONNECT_TIMEOUT_S = 10.0
# All of the environment that `_s3_settings` looks at.
S3_VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"),
    *("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SKIP_SIGNATURE"),
)
# More reads in flight than a loader's threads; botocore's default is 10.
MAX_CONNECTIONS = 64


def protocol_of(url: str) -> str:
    """Returns the part of a URL before ``://`` in lower case, "" for a local path."""
    head, mark, _ = url.partition("://")
    return head.lower() if mark else ""


def without_secrets(url: str) -> str:
    """Returns a URL as it may be shown: without user and password, and without the query of a web address."""
    head, mark, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    if not mark:
        return url
    _, at, host = place.rpartition("@")
    if head.lower() in HTTP_PROTOCOLS:
        host, path = (_without_query(text) for text in (host, path))
    return f"{head}://{'***@' if at else ''}{host}{slash}{path}"


def _without_query(text: str) -> str:
    plain, mark, _ = text.partition("?")
    return f"{plain}?***" if mark else plain


def refuse_credentials(url: str) -> None:
    """Raises StoreUrlError for a URL with a user or a password where nothing would use them."""
    if protocol_of(url) in _NO_USER and "@" in url.partition("://")[2].partition("/")[0]:
        raise StoreUrlError(
            without_secrets(url),
            "a user or password in such a URL is never used and ends in logs. S3 takes its keys from "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, Google from GOOGLE_APPLICATION_CREDENTIALS, and a "
            "web server must let everybody read",
        )


def fsspec_options(url: str) -> dict[str, Any]:
    """Returns the keyword arguments for the file system that fsspec opens for a URL.

    Clients' own retries are off where they can be: `retries` counts and bounds them.

    Raises:
      StoreUrlError: half of the credentials is set.
    """
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol_of(url) not in S3_PROTOCOLS:
        return options
    found = _s3_settings(url)
    return options | {
        "endpoint_url": found.get("AWS_ENDPOINT_URL"),
        "key": found.get("AWS_ACCESS_KEY_ID"),
        "secret": found.get("AWS_SECRET_ACCESS_KEY"),
        "token": found.get("AWS_SESSION_TOKEN"),
        "anon": "AWS_SKIP_SIGNATURE" in found,
        "client_kwargs": {"region_name": found["AWS_REGION"]} if "AWS_REGION" in found else {},
        "config_kwargs": {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": retry_policy().timeout_s,
            "max_pool_connections": MAX_CONNECTIONS,
        },
    }


def delta_options(url: str | os.PathLike[str]) -> dict[str, str]:
    """Returns ``storage_options`` with which delta-rs, Polars or DuckDB's Delta reader open ``URL/index``.

    Example:
      >>> deltalake.DeltaTable(f"{url}/index", storage_options=delta_options(url)).version()

    Raises:
      StoreUrlError: half of the credentials is set.
    """
    text = os.fspath(url)
    if protocol_of(text) not in S3_PROTOCOLS:
        return {}
    options = _s3_settings(text)
    if options.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    # Whoever writes with these does so by put-if-absent, as foldfeed does, and not by an unsafe rename.
    return options | {"aws_conditional_put": "etag", "AWS_S3_ALLOW_UNSAFE_RENAME": "false"}


def _s3_settings(url: str) -> dict[str, str]:
    """Returns what the environment says about S3, under the names that delta-rs knows."""
    env = os.environ
    found = {
        name: env[name]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        if env.get(name)
    }
    if ("AWS_ACCESS_KEY_ID" in found) != ("AWS_SECRET_ACCESS_KEY" in found):
        raise StoreUrlError(url, "of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY only one is set; set both")
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
    if endpoint:
        found["AWS_ENDPOINT_URL"] = endpoint
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    if region:
        found["AWS_REGION"] = region
    if env.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        found["AWS_SKIP_SIGNATURE"] = "true"
    return found
