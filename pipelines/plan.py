"""The plan of a build: what the FASTA files hold and which searches that needs, counted before anything runs.

Owns the first pass over the queries, on the submitter. Does not own searching. The pass gives the audit at
the end something to compare with that no engine has touched, the progress bar its total, and the job its
name. Memory: about 100 bytes per distinct search.

Invariant: the same files, databases, tools and settings give the same plan and the same job id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

from foldfeed.pipelines.fasta import read_fasta
from foldfeed.pipelines.search import shard_ids_of, units_of
from foldfeed.pipelines.search_tool import SearchedDatabase
from foldfeed.pipelines.sequences import Coverage, DeadLetter, QuerySequence, coverage_of, dead_letter
from foldfeed.pipelines.template_search import template_unit_id
from foldfeed.pipelines.template_tool import TemplateDatabase

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
    unit_ids: frozenset[str]
    content_digest: str
    shard_unit_ids: frozenset[str] = frozenset()
    templates: TemplateDatabase | None = None


# A bar that shows searches alone will do where there are so many.
MAX_SHOWN_PARTS = 100_000
# A file of millions of bad entries must not fill the submitter's memory with their descriptions.
MAX_KEPT_REJECTS = 10_000


def read_queries(urls: Sequence[str], max_residues: int) -> Iterator[QuerySequence | DeadLetter]:
    """Yields the entries of all files, in order."""
    for file_index, url in enumerate(urls):
        yield from read_fasta(url, file_index=file_index, max_residues=max_residues)


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
) -> Plan:
    """Reads all files once and returns the plan.

    Args:
      urls: FASTA files.
      databases: in merge order.
      max_residues: longer queries are not searched.
      templates: what is searched with the alignments.
    Raises:
      QueryFileError: a file cannot be opened.
    """
    digest = hashlib.sha256()
    coverage = Coverage()
    first_of: dict[str, None] = {}
    rejects: list[DeadLetter] = []
    unit_ids: set[str] = set()
    parts: set[str] = set()
    for entry in read_queries(urls, max_residues):
        coverage += coverage_of([entry])
        digest.update(_identity(entry))
        if isinstance(entry, QuerySequence) and entry.record_id not in first_of:
            first_of[entry.record_id] = None
            unit_ids.update(units_of(entry.sequence, databases))
            if templates is not None:
                unit_ids.add(template_unit_id(entry.sequence, databases, templates))
            if len(parts) <= MAX_SHOWN_PARTS:
                parts.update(part for one in databases for part in shard_ids_of(entry.sequence, one))
        elif isinstance(entry, DeadLetter) and len(rejects) < MAX_KEPT_REJECTS:
            rejects.append(entry)
    return Plan(
        coverage=coverage,
        num_queries=len(first_of),
        rejects=tuple(rejects),
        unit_ids=frozenset(unit_ids),
        content_digest=digest.hexdigest(),
        shard_unit_ids=frozenset(parts if len(parts) <= MAX_SHOWN_PARTS else ()),
        templates=templates,
    )


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
