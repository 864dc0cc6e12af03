"""The dead letters of builds, as a section of a report.

Owns reading them: one JSON object per line (record_id, stage, reason, source, line, ...), in
``RESULTS/jobs/JOB/dead_letters.jsonl`` or in a file that somebody names. Does not know what made them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from foldfeed.feature_store.errors import CorruptDataError, NotAStoreError
from foldfeed.feature_store.looking.markup import Child, tag
from foldfeed.feature_store.looking.tables import data_table, more
from foldfeed.feature_store.storage import open_blobs

MAX_LETTERS_LISTED = 200
DEAD_LETTERS = "dead_letters.jsonl"
KEYS = ("record_id", "stage", "reason", "source", "line")


def letters_of_results(results: str) -> Child:
    """Lists what all builds of a folder of results could not put into the store.

    Raises:
      NotAStoreError: it is no folder of results.
      CorruptDataError: a file of dead letters is damaged.
    """
    blobs = open_blobs(results)
    jobs = blobs.list("jobs")
    if not jobs:
        raise NotAStoreError(results, "it is no folder of results either: it has no jobs/")
    paths = {f"jobs/{job}/{DEAD_LETTERS}": job for job in jobs}
    found = ((path, job, blobs.read(path)) for path, job in paths.items() if blobs.exists(path))
    return _section(
        found, f"None: every entry of {len(jobs):,} job{'s' if len(jobs) > 1 else ''} is in the store."
    )


def letters_of_file(path: str) -> Child:
    """Lists the dead letters of one file.

    Args:
      path: local path or URL of a ``dead_letters.jsonl``.
    Raises:
      FileNotFoundError: there is no such file.
      CorruptDataError: it holds something else.
    """
    name = path.rsplit("/", 1)[-1]
    data = open_blobs(path.removesuffix(name) or ".").read(name)
    return _section([(path, "", data)], "None: the file is empty.")


def _section(files: Iterable[tuple[str, str, bytes]], none: str) -> Child:
    rows: list[Sequence[Child]] = []
    total = 0
    for path, job, data in files:
        for number, line in enumerate(data.splitlines(), start=1):
            total += 1
            letter = _letter(line, f"{path}, line {number}")
            if len(rows) < MAX_LETTERS_LISTED:
                rows.append(
                    [*(str(letter.get(key, "")) for key in KEYS), job or str(letter.get("job_id", ""))]
                )
    if not total:
        return tag("p", none)
    heads = ["record", "stage", "reason", "file", "line", "job"]
    return [more(len(rows), total, "dead letter"), data_table(heads, rows, numeric=(4,))]


def _letter(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise CorruptDataError(where, f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise CorruptDataError(where, "it is no JSON object")
    return found
