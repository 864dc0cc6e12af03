"""The plan of a build: what the FASTA files hold and which searches that needs, counted before anything runs.

Owns the first pass over the queries, on the submitter. Does not own searching. The pass gives the audit at
the end something to compare with that no engine has touched, the progress bar its total, and the job its
name. Memory does not grow with the number of queries: ids and searches are sorted on disk
(`searches.id_set`).

Invariant: the same files, databases, tools and settings give the same plan and the same job id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

from foldfeed.pipelines.fasta import read_fasta
from foldfeed.pipelines.searches.id_set import DIGEST_BYTES, IdSet, Sorter
from foldfeed.pipelines.searches.search import shard_ids_of, units_of
from foldfeed.pipelines.searches.template_search import template_unit_id
from foldfeed.pipelines.sequences import Coverage, DeadLetter, QuerySequence, coverage_of, dead_letter
from foldfeed.pipelines.tools.search_tool import SearchedDatabase
from foldfeed.pipelines.tools.template_tool import TemplateDatabase

# Records per part where the user gives no number: a few hundred megabytes of tiles for deep alignments.
RECORDS_PER_PART = 1024


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a build will do.

    Attributes:
      coverage: every entry of every file.
      num_queries: entries that will be searched (valid, first of their id).
      rejects: entries that will not, in file order; at most `MAX_KEPT_REJECTS` of them.
      unit_ids: the distinct searches.
      content_digest: sha256 (hex) over all entries in order.
      shard_unit_ids: the parts of the searches in databases of several files, for a progress bar; none where
        there are more than `MAX_SHOWN_PARTS`.
      templates: what is searched with the alignments, if anything; its searches are among ``unit_ids``.
    """

    coverage: Coverage
    num_queries: int
    rejects: tuple[DeadLetter, ...]
    unit_ids: IdSet
    content_digest: str
    shard_unit_ids: IdSet = dataclasses.field(default_factory=IdSet)
    templates: TemplateDatabase | None = None


# Of an entry's place among all, in a record that is sorted.
_PLACE_BYTES = 8
# A bar that shows searches alone will do where there are so many.
MAX_SHOWN_PARTS = 100_000
# A file of millions of bad entries must not fill the submitter's memory with their descriptions.
MAX_KEPT_REJECTS = 10_000


def read_queries(
    urls: Sequence[str], max_residues: int, source_digests: list[str] | None = None
) -> Iterator[QuerySequence | DeadLetter]:
    """Yields the entries of all files, in order.

    Args:
      urls: FASTA files.
      max_residues: longer ones are dead letters.
      source_digests: receives the sha256 (hex) of what was read of each file, after its last entry.
    """
    for file_index, url in enumerate(urls):
        digest = None if source_digests is None else hashlib.sha256()
        yield from read_fasta(url, file_index=file_index, max_residues=max_residues, digest=digest)
        if source_digests is not None and digest is not None:
            source_digests.append(digest.hexdigest())


def duplicate_of(loser: QuerySequence, winner: QuerySequence) -> DeadLetter:
    """Returns the dead letter of an entry whose id an earlier entry has."""
    same = "the same sequence" if loser.sequence == winner.sequence else "another sequence"
    return dead_letter(
        loser,
        "read",
        f"the id was used before, with {same}, in {winner.source}, line {winner.line}; the first one is kept",
        "DuplicateId",
    )


def resolve_duplicates(
    queries: Iterable[QuerySequence],
) -> tuple[QuerySequence, list[DeadLetter]]:
    """Returns the first of the entries that share an id, and a dead letter for each of the others.

    First means the lowest file, then the lowest place in it: engines deliver entries in any order.

    Args:
      queries: at least one, in any order.
    """
    winner, *losers = sorted(queries, key=lambda query: (query.file_index, query.item_index))
    return winner, [duplicate_of(loser, winner) for loser in losers]


def make_plan(
    urls: Sequence[str],
    databases: tuple[SearchedDatabase, ...],
    max_residues: int,
    templates: TemplateDatabase | None = None,
    source_digests: list[str] | None = None,
) -> Plan:
    """Reads all files once and returns the plan.

    Args:
      urls: FASTA files.
      databases: in merge order.
      max_residues: longer queries are not searched.
      templates: what is searched with the alignments.
      source_digests: receives the sha256 (hex) of what was read of each file.
    Raises:
      QueryFileError: a file cannot be opened.
      StorageFullError: no space for temporary files.
    """
    digest = hashlib.sha256()
    coverage = Coverage()
    num_searched = len(databases) + (templates is not None)
    queries = Sorter(DIGEST_BYTES + _PLACE_BYTES + DIGEST_BYTES * num_searched)
    rejects: list[DeadLetter] = []
    shown = _ShownParts(databases)
    for entry in read_queries(urls, max_residues, source_digests):
        place = coverage.count.to_bytes(_PLACE_BYTES, "big")
        coverage += coverage_of([entry])
        digest.update(_identity(entry))
        if isinstance(entry, QuerySequence):
            names = list(units_of(entry.sequence, databases))
            if templates is not None:
                names.append(template_unit_id(entry.sequence, databases, templates))
            record_key = hashlib.sha256(entry.record_id.encode()).digest()
            queries.add(record_key + place + bytes.fromhex("".join(names)))
            shown.add(entry)
        elif len(rejects) < MAX_KEPT_REJECTS:
            rejects.append(entry)
    units = Sorter(DIGEST_BYTES)
    num_queries = 0
    for names_of_first in _firsts(queries):
        num_queries += 1
        for start in range(0, len(names_of_first), DIGEST_BYTES):
            units.add(names_of_first[start : start + DIGEST_BYTES])
    return Plan(
        coverage=coverage,
        num_queries=num_queries,
        rejects=tuple(rejects),
        unit_ids=IdSet(name for bucket in units.buckets() for name in bucket),
        content_digest=digest.hexdigest(),
        shard_unit_ids=IdSet.of(shown.names),
        templates=templates,
    )


def _firsts(queries: Sorter) -> Iterator[bytes]:
    """Yields the searches of the first of the entries that share an id."""
    for bucket in queries.buckets():
        last = b""
        # Of equal ids the first in the files comes first: its place is next in the record.
        for record in bucket:
            if record[:DIGEST_BYTES] != last:
                last = record[:DIGEST_BYTES]
                yield record[DIGEST_BYTES + _PLACE_BYTES :]


class _ShownParts:
    """Collects the parts of searches for a progress bar, as long as they are few."""

    def __init__(self, databases: tuple[SearchedDatabase, ...]) -> None:
        self.names: set[str] = set()
        self._seen: set[str] = set()
        self._databases = databases
        self._are_few = any(shard_ids_of("", database) for database in databases)

    def add(self, query: QuerySequence) -> None:
        if not self._are_few or query.record_id in self._seen:
            return
        self._seen.add(query.record_id)
        self.names.update(part for one in self._databases for part in shard_ids_of(query.sequence, one))
        if len(self.names) > MAX_SHOWN_PARTS:
            self._are_few = False
            self.names, self._seen = set(), set()


def job_id_of(
    plan: Plan, databases: tuple[SearchedDatabase, ...], num_parts: int, *, taxonomy_ids: bool = False
) -> str:
    """Returns the name of the folder of a job: a hash of everything its outcome depends on."""
    searched = [
        (database.name, database.digest, database.tool.identity.digest, database.max_hits)
        for database in databases
    ]
    words: list[object] = [plan.content_digest, searched, num_parts]
    if plan.templates is not None:
        one = plan.templates
        day = None if one.max_date is None else one.max_date.isoformat()
        words.append([one.name, one.digest, one.tool.identity.digest, one.msa, one.max_hits, day])
    if taxonomy_ids:
        words.append("taxonomy ids")
    text = json.dumps(words)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def part_of(record_id: str, num_parts: int) -> int:
    """Returns the part that a record is written to: a stable hash, equal on every machine."""
    return int.from_bytes(hashlib.sha256(record_id.encode()).digest()[:8], "little") % num_parts


def default_num_parts(num_queries: int) -> int:
    """Returns how many parts hold so many records; independent of workers, so that bytes are too."""
    return max(1, -(-num_queries // RECORDS_PER_PART))


def _identity(entry: QuerySequence | DeadLetter) -> bytes:
    if isinstance(entry, DeadLetter):
        words = [entry.file_index, entry.item_index, entry.record_id, entry.reason]
    else:
        words = [entry.file_index, entry.item_index, entry.record_id, entry.description, entry.sequence]
    return json.dumps(words).encode() + b"\n"
