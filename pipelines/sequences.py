"""The values that travel through a build: a query that will be searched, and a dead letter that will not.

Owns nothing but their shape. Invariant: every entry of every FASTA file is exactly one of the two, and
carries (file_index, item_index), by which the audit at the end proves that none was lost.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

Retry: TypeAlias = Literal["retryable", "poison"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuerySequence:
    """One valid sequence to search.

    Attributes:
      file_index: position of its file in the order given.
      item_index: position of the entry in its file.
      source: URL of the file.
      line: 1-based line of its header.
      record_id: first word of the header.
      description: the rest of the header.
      sequence: upper-case one-letter residues.
    """

    file_index: int
    item_index: int
    source: str
    line: int
    record_id: str
    description: str
    sequence: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """One entry that will not be in the store, and why.

    Attributes:
      file_index: position of its file in the order given.
      item_index: position of the entry in its file.
      source: URL of the file.
      line: 1-based line of its header, or of the fault where there is no header.
      record_id: first word of the header; ``FILE#ITEM`` when the entry has no usable id.
      stage: ``read``, ``search`` or ``features``.
      reason: a sentence for a person.
      kind: ``BadEntry``, ``DuplicateId``, or the name of the error (``ToolTimeoutError``, ...); "" of
      older runs. retry: ``retryable`` when the same command may succeed later, ``poison`` when it will not.
    """

    file_index: int
    item_index: int
    source: str
    line: int
    record_id: str
    stage: str
    reason: str
    kind: str = ""
    retry: Retry = "poison"

    def __str__(self) -> str:
        return f"{self.record_id} ({self.source}, line {self.line}): {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, ready for `json.dumps`."""
        return dataclasses.asdict(self)


def dead_letter(
    query: QuerySequence, stage: str, reason: str, kind: str = "", retry: Retry = "poison"
) -> DeadLetter:
    """Returns the dead letter of a query that was valid when it was read."""
    return DeadLetter(
        file_index=query.file_index,
        item_index=query.item_index,
        source=query.source,
        line=query.line,
        record_id=query.record_id,
        stage=stage,
        reason=reason,
        kind=kind,
        retry=retry,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """Which entries were seen, as a count and an order-independent sum of hashes.

    Two multisets of entries have equal coverage only if they are equal (up to 64-bit hash collisions), so
    parts written anywhere can be added up and compared with what the submitter read, without listing
    millions of ids.

    Attributes:
      count: number of entries.
      total: sum of their 64-bit hashes modulo 2**64.
    """

    count: int = 0
    total: int = 0

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(count=self.count + other.count, total=(self.total + other.total) % 2**64)


def coverage_of(entries: Iterable[QuerySequence | DeadLetter]) -> Coverage:
    """Returns the coverage of entries, in any order."""
    count = total = 0
    for entry in entries:
        digest = hashlib.sha256(f"{entry.file_index}:{entry.item_index}".encode()).digest()
        count += 1
        total += int.from_bytes(digest[:8], "little")
    return Coverage(count=count, total=total % 2**64)
