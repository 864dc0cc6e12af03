"""Which records were there at a point in time: by release date, by release of a database.

Pure selections of index rows. Owns the rule for records without a date: there is no silent choice, because
keeping one and dropping one can both be the leak.
"""

from __future__ import annotations

import datetime

import pyarrow as pa

from foldfeed.feature_store.errors import QueryError
from foldfeed.feature_store.format.columns import EXTRA_PREFIX, RELEASE_DATE, column_values

UNDATED = ("error", "keep", "drop")
MIN_DIGEST_HEX = 8


def released_until(index: pa.Table, date: datetime.date | str, column: str | None, undated: str) -> pa.Table:
    """Returns the index rows whose release date is not after another date.

    Args:
      index: rows of a store.
      date: a date, or ISO text.
      column: holds the dates, as dates or ISO text: a column of the index or ``extra.KEY``. When None,
        the column ``release_date`` where somebody annotated one, ``extra.release_date`` otherwise.
      undated: what becomes of rows without one: ``error``, ``keep`` or ``drop``.
    Raises:
      QueryError: a date that is none, or undated records with ``undated="error"``.
    """
    if undated not in UNDATED:
        raise QueryError(f"undated {undated!r} is not one of {', '.join(UNDATED)}")
    limit = to_date(date, "the date asked for")
    if column is None:
        column = RELEASE_DATE if RELEASE_DATE in index.column_names else EXTRA_PREFIX + RELEASE_DATE
    ids, found = index["record_id"].to_pylist(), column_values(index, column)
    missing = [name for name, text in zip(ids, found, strict=True) if text is None]
    if missing and undated == "error":
        raise QueryError(
            f"{len(missing)} of {len(ids)} records have no {column}, e.g. {missing[0]!r}; say whether "
            "such records were public: undated='keep' or undated='drop'"
        )
    keep = [
        undated == "keep" if text is None else to_date(text, f"{column} of {name!r}") <= limit
        for name, text in zip(ids, found, strict=True)
    ]
    return index.filter(pa.array(keep, pa.bool_()))


def searched_with(index: pa.Table, database: str, digest: str) -> pa.Table:
    """Returns the index rows whose search used one release of a database.

    Args:
      index: rows of a store.
      database: its name.
      digest: the first hex digits of the digest of its manifest.
    Raises:
      QueryError: too few digits to name one release.
    """
    if len(digest) < MIN_DIGEST_HEX:
        raise QueryError(
            f"digest {digest!r} is too short to name a release; give {MIN_DIGEST_HEX} hex digits or more"
        )
    keep = [
        any(use["name"] == database and use["digest"].startswith(digest) for use in uses)
        for uses in index["databases"].to_pylist()
    ]
    return index.filter(pa.array(keep, pa.bool_()))


def to_date(value: object, where: str) -> datetime.date:
    """Returns a date; QueryError names ``where`` when the value is none."""
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.date.fromisoformat(str(value))
    except ValueError as error:
        raise QueryError(f"{where} is {value!r}; a date is written YYYY-MM-DD") from error
