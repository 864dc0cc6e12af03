"""Tables that tell when structures became public: entry -> day and resolution.

Owns two spellings: lines of ``entry, date[, resolution]`` with tabs, and the JSON that OpenFold calls an
mmCIF cache (``{"4hhb": {"release_date": "1984-07-17", "resolution": 1.74}}``; ``{"4hhb": "1984-07-17"}``
will do, too). Does not own where the dates come from. Invariant: a value that is no date or no number is an
error with its entry, never a date that is not known.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from typing import Any, NamedTuple

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.parsers.a3m import shown
from foldfeed.feature_store.parsers.lines import lines_of

# Python also takes 20200201 and 2020-W05-6.
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
HEADER = "entry\trelease_date\tresolution_angstrom"


class Release(NamedTuple):
    """What is known of an entry.

    Attributes:
      date: on which it became public.
      resolution_angstrom: None where there is none.
    """

    date: datetime.date
    resolution_angstrom: float | None


def parse_release_dates(text: bytes) -> dict[str, Release]:
    """Returns entry, in lower case -> what is known of it.

    Args:
      text: a table with tabs (``#`` begins a comment, a header is skipped) or JSON.
    Raises:
      AlignmentParseError: neither, an entry without a date, or with two different ones.
    """
    rows = _json_rows(text) if text.lstrip()[:1] == b"{" else _table_rows(text)
    found: dict[str, Release] = {}
    for entry, day, resolution, line in rows:
        try:
            release = Release(_date(day), resolution)
        except ValueError as error:
            raise AlignmentParseError(f"entry {shown(entry)}: {error}", line) from error
        key = entry.lower()
        if found.setdefault(key, release) != release:
            raise AlignmentParseError(
                f"entry {shown(entry)} has two dates or resolutions: {found[key]} and {release}", line
            )
    return found


def release_line(entry: str, release: Release) -> str:
    """Returns a line of the table, without a line feed."""
    resolution = "" if release.resolution_angstrom is None else repr(release.resolution_angstrom)
    return f"{entry}\t{release.date.isoformat()}\t{resolution}"


def _date(text: str) -> datetime.date:
    if not _DAY.fullmatch(text):
        raise ValueError(f"{shown(text)} is no date (YYYY-MM-DD)")
    return datetime.date.fromisoformat(text)


def _table_rows(text: bytes) -> list[tuple[str, str, float | None, int | None]]:
    found: list[tuple[str, str, float | None, int | None]] = []
    for number, raw in lines_of(text):
        line = raw.decode("utf-8", errors="replace").rstrip("\r")
        fields = [field.strip() for field in line.split("\t")]
        if not line.strip() or line.startswith("#") or fields[0].lower() == "entry":
            continue
        if len(fields) < 2 or not fields[0]:
            raise AlignmentParseError(
                f"expected entry, tab, YYYY-MM-DD, and perhaps a tab and the resolution, not {shown(line)}",
                number,
            )
        found.append((fields[0], fields[1], _number(fields[0], "".join(fields[2:3]), number), number))
    return found


def _json_rows(text: bytes) -> list[tuple[str, str, float | None, int | None]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AlignmentParseError(f"the release dates are no JSON ({error})") from error
    found: list[tuple[str, str, float | None, int | None]] = []
    for entry, facts in entries.items():
        if isinstance(facts, str):
            found.append((entry, facts, None, None))
        elif isinstance(facts, dict) and isinstance(facts.get("release_date"), str):
            found.append((entry, facts["release_date"], _number(entry, facts.get("resolution"), None), None))
        else:
            raise AlignmentParseError(f"entry {shown(entry)} has no release_date")
    return found


def _number(entry: str, value: Any, line: int | None) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise AlignmentParseError(
            f"entry {shown(entry)}: the resolution {shown(str(value))} is no number", line
        ) from error
    # Caches of others say 0.0 or NaN where there is none.
    return number if math.isfinite(number) and number > 0 else None
