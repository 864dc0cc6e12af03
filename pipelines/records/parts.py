"""Writing one part of the store and its receipt; reading the receipts back and checking that all is there.

Owns the last step on a worker and the audit on the submitter. Does not own the part format
(`foldfeed.feature_store.write_part`) or the commit. No Beam here. Invariants: records go to the writer one
at a time, in sorted order, so memory is one record's; a query enters a part only if every database has an
answer; the audit accepts a run only if the parts cover exactly the entries that the plan counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from foldfeed.feature_store.errors import AlignmentParseError, InvalidRecordError
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.parts.writer import write_part
from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.errors import AuditError, CorruptResultError, SearchError
from foldfeed.pipelines.planning.plan import Plan
from foldfeed.pipelines.records import ledger
from foldfeed.pipelines.records.features import build_record
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.searches.search import JobContext, Receipt, units_of
from foldfeed.pipelines.searches.template_search import template_unit_id, templates_of
from foldfeed.pipelines.sequences import (
    Coverage,
    DeadLetter,
    QuerySequence,
    Retry,
    coverage_of,
    dead_letter,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartReceipt:
    """What one part holds.

    Attributes:
      part: its number, 0 to num_parts - 1.
      part_id: its name in the store; None when no record fell to it.
      num_records: records in it.
      coverage: entries accounted for, written or dead.
      dead_letters: entries of this part that are not in the store, in file order.
    """

    part: int
    part_id: str | None
    num_records: int
    coverage: Coverage
    dead_letters: tuple[DeadLetter, ...]

    def to_json(self) -> bytes:
        """Returns the receipt as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> PartReceipt:
        """Returns the receipt that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(data)
        fields["coverage"] = Coverage(**fields["coverage"])
        fields["dead_letters"] = tuple(DeadLetter(**letter) for letter in fields["dead_letters"])
        return cls(**fields)


def completed(
    query: QuerySequence,
    receipts: Iterable[Receipt],
    context: JobContext,
    asked: Sequence[int] | None = None,
) -> QuerySequence | DeadLetter:
    """Returns the query if every database answered, else the dead letter that says which did not.

    Args:
      query: what was searched.
      receipts: of its searches.
      context: of the build.
      asked: positions in `JobContext.searched`; those of all databases, without the templates, when None.
    """
    by_database = {receipt.database_index: receipt for receipt in receipts}
    failed = [
        by_database.get(index) or _no_report(index, context.searched[index].name)
        for index in (range(len(context.databases)) if asked is None else asked)
        if index not in by_database or by_database[index].status != "ok"
    ]
    if not failed:
        return query
    # One poisoned search is enough: trying again cannot complete the record.
    poisoned = [receipt for receipt in failed if receipt.status == "poison"]
    reasons = "; ".join(receipt.reason for receipt in failed)
    kind = (poisoned or failed)[0].kind
    return dead_letter(query, "search", reasons, kind, "poison" if poisoned else "retryable")


def _no_report(index: int, name: str) -> Receipt:
    return Receipt(
        unit_id="",
        database_index=index,
        record_ids=(),
        status="retryable",
        reason=f"search in {name!r}: no report",
        kind="NoReport",
    )


def write_one_part(
    part: int, entries: Iterable[QuerySequence | DeadLetter], context: JobContext
) -> PartReceipt:
    """Writes the records of one part and publishes its receipt.

    Args:
      part: its number.
      entries: complete queries and dead letters that fell to it, in any order.
      context: of the build.
    Raises:
      StorageFullError: no space left; neither part nor receipt is visible.
    """
    everything = list(entries)
    queries = sorted(
        (entry for entry in everything if isinstance(entry, QuerySequence)), key=lambda query: query.record_id
    )
    letters = [entry for entry in everything if isinstance(entry, DeadLetter)]
    costs: list[dict[str, object]] = []
    records = _records(queries, context, letters, costs)
    first = next(records, None)
    written = None
    if first is not None:
        written = write_part(context.store_url, _chain(first, records), context.settings)
    receipt = PartReceipt(
        part=part,
        part_id=written.part_id if written else None,
        num_records=written.num_records if written else 0,
        coverage=coverage_of(everything),
        dead_letters=tuple(sorted(letters, key=lambda letter: (letter.file_index, letter.item_index))),
    )
    blobs = open_blobs(context.results_url)
    # Before the receipt, which says that the part is done.
    blobs.write_atomic(ledger_path(part, context), ledger.to_parquet(costs))
    blobs.write_atomic(_receipt_path(part, context), receipt.to_json())
    return receipt


def _records(
    queries: Sequence[QuerySequence],
    context: JobContext,
    letters: list[DeadLetter],
    costs: list[dict[str, object]],
) -> Iterator[MsaRecord]:
    """Yields the records of queries and appends what they cost; one that cannot be built gives a letter."""
    results = ResultStore(context.results_url)
    for query in queries:
        try:
            units = units_of(query.sequence, context.databases)
            answers = [results.get(unit_id) for unit_id in units]
            record = build_record(query, context.databases, answers, taxonomy_ids=context.taxonomy_ids)
            if context.templates is not None:
                found = template_unit_id(query.sequence, context.databases, context.templates)
                units = (*units, found)
                hits = templates_of(results.get(found), query.sequence, context.templates)
                record = dataclasses.replace(record, templates=hits)
            cost = ledger.rows_of(query.record_id, map(results.receipt, units), context.searched)
        except (AlignmentParseError, InvalidRecordError, SearchError, CorruptResultError) as error:
            # A damaged answer is searched anew by the next run; the other errors would come again.
            retry: Retry = "retryable" if isinstance(error, CorruptResultError) else "poison"
            letters.append(dead_letter(query, "features", str(error), type(error).__name__, retry))
            continue
        costs.extend(cost)
        yield record


def _chain(first: MsaRecord, rest: Iterator[MsaRecord]) -> Iterator[MsaRecord]:
    yield first
    yield from rest


def _receipt_path(part: int, context: JobContext) -> str:
    return f"{context.run_folder}/parts/{part:05d}-of-{context.num_parts:05d}.json"


def ledger_path(part: int, context: JobContext) -> str:
    """Returns where a part's rows of the ledger lie, in the result store."""
    return f"{context.run_folder}/ledger/{part:05d}-of-{context.num_parts:05d}.parquet"


def audit(plan: Plan, context: JobContext) -> list[PartReceipt]:
    """Returns the receipts of all parts after checking that they account for every entry of the plan.

    Raises:
      AuditError: a part is missing, or the parts do not cover exactly the entries that were read.
    """
    blobs = open_blobs(context.results_url)
    receipts: list[PartReceipt] = []
    for part in range(context.num_parts):
        try:
            receipts.append(PartReceipt.from_json(blobs.read(_receipt_path(part, context))))
        except FileNotFoundError as error:
            raise AuditError(
                f"part {part} of {context.num_parts} has no receipt although the engine reported success; "
                "nothing was committed, run the same command again"
            ) from error
    seen = sum((receipt.coverage for receipt in receipts), Coverage())
    if seen != plan.coverage:
        raise AuditError(
            f"the parts account for {seen.count} entries (sum {seen.total}), the FASTA files hold "
            f"{plan.coverage.count} (sum {plan.coverage.total}); nothing was committed. "
            "Did a file change during the run?"
        )
    written = sum(receipt.num_records + len(receipt.dead_letters) for receipt in receipts)
    if written != plan.coverage.count:
        raise AuditError(f"{plan.coverage.count} entries gave {written} records and dead letters")
    return receipts
