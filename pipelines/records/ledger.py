"""What a build cost: one row per record and database, kept as Parquet, and its sums.

Owns the columns, the file ``jobs/JOB_ID/ledger.parquet`` in the result store and the sums by database.
Does not own the measurement (`programs.subprocess_runner`) or the receipts
(`searches.results`). Nothing here enters a record, a part or a fingerprint: equal answers are
equal bytes whatever they cost.

Invariant: a search that several records share has a row for each of them and is counted once in every sum.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.storage.arrow_file import arrow_file
from foldfeed.pipelines.costs import DatabaseCost
from foldfeed.pipelines.programs.subprocess_runner import Usage
from foldfeed.pipelines.searches.results import UnitReceipt
from foldfeed.pipelines.tools.search_tool import SearchedDatabase
from foldfeed.pipelines.tools.template_tool import TemplateDatabase

TABLE = "searches"
SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("unit_id", pa.string()),
        ("database", pa.string()),
        ("database_digest", pa.string()),
        ("tool", pa.string()),
        ("tool_version", pa.string()),
        ("host", pa.string()),
        ("finished", pa.string()),
        ("run_id", pa.string()),
        ("num_residues", pa.int64()),
        ("num_hits", pa.int64()),
        ("wall_s", pa.float64()),
        ("cpu_s", pa.float64()),
        ("max_rss_bytes", pa.int64()),
        ("bytes_read", pa.int64()),
        ("bytes_from_disk", pa.int64()),
        ("answer_bytes", pa.int64()),
        ("energy_wh", pa.float64()),
        ("num_together", pa.int64()),
    ]
)


def rows_of(
    record_id: str, receipts: Iterable[UnitReceipt], databases: Sequence[SearchedDatabase | TemplateDatabase]
) -> list[dict[str, object]]:
    """Returns the rows of one record.

    Args:
      record_id: the record.
      receipts: of its searches, one per database.
      databases: of the build, templates among them, whose names the rows carry.
    """
    return [
        {
            "record_id": record_id,
            "unit_id": receipt.unit_id,
            "tool": receipt.tool.name,
            "tool_version": receipt.tool.version,
            "answer_bytes": receipt.stored_bytes,
            **dataclasses.asdict(receipt.facts),
            **_usage(receipt.usage),
            "database": database.name,
            "database_digest": database.digest,
        }
        for receipt, database in zip(receipts, databases, strict=True)
    ]


def to_parquet(rows: list[dict[str, object]]) -> bytes:
    """Returns rows as a Parquet file."""
    return _encode(pa.Table.from_pylist(rows, schema=SCHEMA))


def join(results_url: str, paths: Iterable[str], job_id: str) -> tuple[pa.Table, str]:
    """Writes the ledger of a job from those of its parts; returns it and where it lies.

    Args:
      results_url: the result store.
      paths: of the parts' ledgers, in the result store.
      job_id: of the job.
    """
    blobs = open_blobs(results_url)
    tables = [pq.read_table(arrow_file(blobs.read(path)), schema=SCHEMA) for path in paths]
    table = pa.concat_tables([SCHEMA.empty_table(), *tables]).sort_by([("record_id", "ascending")])
    path = f"jobs/{job_id}/ledger.parquet"
    blobs.write_atomic(path, _encode(table))
    return table, f"{blobs.url}/{path}"


def read_all(results_url: str) -> pa.Table:
    """Returns the searches of all jobs of a result store; a search that jobs share comes once per record."""
    blobs = open_blobs(results_url)
    paths = [f"jobs/{job_id}/ledger.parquet" for job_id in sorted(blobs.list("jobs"))]
    tables = [
        pq.read_table(arrow_file(blobs.read(path)), schema=SCHEMA) for path in paths if blobs.exists(path)
    ]
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    return table.group_by(SCHEMA.names, use_threads=False).aggregate([]).select(SCHEMA.names).cast(SCHEMA)


def costs(table: pa.Table, run_id: str | None) -> tuple[DatabaseCost, ...]:
    """Returns the sums by database, in order of their first row.

    Args:
      table: of `SCHEMA`.
      run_id: the run whose searches count as new; None for none.
    """
    found = []
    for database in pc.unique(table["database"]).to_pylist():
        rows = table.filter(pc.equal(table["database"], database))
        # Records of equal sequence share a search.
        first = rows.group_by("unit_id", use_threads=False).aggregate(
            [(name, "first") for name in SCHEMA.names if name != "unit_id"]
        )
        new = [one == run_id and run_id is not None for one in first["run_id_first"].to_pylist()]
        cpu_s = first["cpu_s_first"].to_pylist()
        energy_wh = first["energy_wh_first"].drop_null().to_pylist()
        found.append(
            DatabaseCost(
                database=database,
                tool=first["tool_first"][0].as_py(),
                num_searches=len(first),
                num_new=sum(new),
                num_hits=sum(count or 0 for count in first["num_hits_first"].to_pylist()),
                cpu_s=sum(cpu_s),
                new_cpu_s=sum(one for one, is_new in zip(cpu_s, new, strict=True) if is_new),
                wall_s=sum(first["wall_s_first"].to_pylist()),
                max_rss_bytes=max(first["max_rss_bytes_first"].to_pylist()),
                bytes_read=sum(first["bytes_read_first"].to_pylist()),
                energy_wh=sum(energy_wh) if energy_wh else None,
                num_with_energy=len(energy_wh),
            )
        )
    return tuple(found)


def _usage(usage: Usage) -> dict[str, object]:
    """Returns the columns that a receipt's costs fill; a ledger speaks of watt-hours, as bills do."""
    columns = dataclasses.asdict(usage)
    joules = columns.pop("energy_j")
    return {**columns, "energy_wh": None if joules is None else joules / 3600}


def _encode(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
