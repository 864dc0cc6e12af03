"""Small named tables beside the index: one Parquet file each, written once.

Owns the file: a table and one JSON object about it in the Parquet metadata key ``foldfeed``. Does not know
what a record set or a split is. Invariant: a name never changes its meaning; of two writers one wins, and the
other is told unless it meant the same.
"""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from foldfeed.feature_store.errors import (
    CorruptDataError,
    FormatVersionError,
    NameNotFoundError,
    NameTakenError,
    QueryError,
)
from foldfeed.feature_store.index import sealed
from foldfeed.feature_store.parts.presence import check_present
from foldfeed.feature_store.storage import Blobs
from foldfeed.feature_store.storage.arrow_file import arrow_file

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
SUFFIX = ".parquet"
METADATA_KEY = b"foldfeed"
VERSION = 1


def check_name(kind: str, name: str) -> None:
    """Raises `QueryError` unless a name can be a file's name everywhere."""
    if not NAME.fullmatch(name):
        raise QueryError(
            f"{name!r} cannot name a {kind}; a name is 1 to 100 of A-Z a-z 0-9 _ . - "
            "and starts with a letter, a digit or _"
        )


def write(
    blobs: Blobs, folder: str, kind: str, name: str, table: pa.Table, about: dict[str, Any]
) -> dict[str, Any]:
    """Publishes a table under a name and returns what the store says about it then.

    Saving the same fingerprint again is no error: the file that is there stays.

    Args:
      blobs: the store.
      folder: ``sets`` or ``splits``.
      kind: for messages.
      name: see `NAME`.
      table: plain columns.
      about: JSON-able; ``fingerprint`` says what the table means.
    Raises:
      NameTakenError: the name exists with another fingerprint.
    """
    check_name(kind, name)
    document = about | {"format": kind, "version": VERSION, "name": name}
    # What the columns say is in the fingerprint; the rest of the description has a digest of its own, because
    # nothing in a Parquet file covers its metadata.
    sealed_document = document | {sealed.KEY: sealed.digest(document)}
    text = json.dumps(sealed_document, sort_keys=True, separators=(",", ":"))
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: text}), buffer, compression="zstd")
    path = f"{folder}/{name}{SUFFIX}"
    if blobs.create_exclusive(path, buffer.getvalue()):
        return document
    there = read(blobs, folder, kind, name, table.schema)[1]
    if there["fingerprint"] != document["fingerprint"]:
        raise NameTakenError(kind, name)
    return there


def read(
    blobs: Blobs, folder: str, kind: str, name: str, schema: pa.Schema
) -> tuple[pa.Table, dict[str, Any]]:
    """Returns a named table and what is known about it.

    Raises:
      NameNotFoundError: no such name.
      StoreGoneError: no such store any more.
      CorruptDataError: the file is not what `write` wrote.
      FormatVersionError: written by a newer release.
    """
    check_name(kind, name)
    path = f"{folder}/{name}{SUFFIX}"
    try:
        data = blobs.read(path)
    except FileNotFoundError as error:
        check_present(blobs, path)
        raise NameNotFoundError(kind, name, tuple(names(blobs, folder))) from error
    try:
        table = pq.ParquetFile(arrow_file(data)).read()
        # Bytes that are no text would fail later and without a name.
        table.validate(full=True)
        about = sealed.check_seal(json.loads((table.schema.metadata or {})[METADATA_KEY]), path)
        columns = table.schema.names
        version, found = about["version"], (about["format"], about["name"], type(about["fingerprint"]))
    except (pa.ArrowException, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptDataError(path, f"it is no {kind} ({str(error).splitlines()[0]})") from error
    if version != VERSION:
        raise FormatVersionError(path, version, (VERSION,))
    if found != (kind, name, str):
        raise CorruptDataError(path, f"it says it is the {about['format']} {about['name']!r}")
    if not table.schema.equals(schema, check_metadata=False):
        raise CorruptDataError(path, f"its columns are {columns}, not {schema.names}")
    return table.replace_schema_metadata(None), about


def names(blobs: Blobs, folder: str) -> list[str]:
    """Returns the names there are, sorted.

    Raises:
      StoreGoneError: no such store any more.
    """
    found = (name.removesuffix(SUFFIX) for name in blobs.list(folder) if name.endswith(SUFFIX))
    there = sorted(name for name in found if NAME.fullmatch(name))
    if not there:
        # A store that is gone has no names either, and that would be the wrong thing to say.
        check_present(blobs, folder)
    return there
