"""Named record sets: the answer to a question, kept, so that a training run can be tied to it.

Owns what a set is and its file. Does not own how a set is read through (`source.StoreView`). Invariant: a set
names records by content. A version of the store in which one of them is missing or says something else does
not have the set, and saying so is better than training on other data under the same name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.errors import CorruptDataError, QueryError, RecordSetMismatchError
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.storage import Blobs
from foldfeed.feature_store.store import named_tables

FOLDER = "sets"
KIND = "record set"
SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("record_id", "fingerprint")])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Within:
    """The part of a split that a set is drawn from.

    Attributes:
      split: name of the split.
      part: of it, e.g. ``train``.
      fingerprint: of the split, "" before the set is saved.
    """

    split: str
    part: str
    fingerprint: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordSet:
    """A stored set.

    Attributes:
      name: in its store.
      table: record_id and fingerprint, sorted by id.
      fingerprint: of the records in it; equals that of a store that holds these and no others.
      sql: the question whose answer it is.
      store_version: when it was saved.
      within: the constraint it satisfies, or None.
    """

    name: str
    table: pa.Table
    fingerprint: str
    sql: str
    store_version: int
    within: Within | None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def ids(self) -> list[str]:
        """Its record ids, sorted."""
        return self.table["record_id"].to_pylist()


def content_fingerprint(settings: StoreSettings, ids: Iterable[str], fingerprints: Iterable[str]) -> str:
    """Returns sha256 (hex) of the settings and of what some records say (FORMAT.md, "Record sets").

    Args:
      settings: of the store.
      ids: sorted.
      fingerprints: of the records, in that order.
    """
    digest = hashlib.sha256(settings.to_json())
    for name, content in zip(ids, fingerprints, strict=True):
        digest.update(f"{name}\x00{content}\n".encode())
    return digest.hexdigest()


def fingerprint_of(settings: StoreSettings, rows: pa.Table) -> str:
    """Returns `content_fingerprint` of index rows, sorted by id."""
    return content_fingerprint(settings, rows["record_id"].to_pylist(), rows["fingerprint"].to_pylist())


def draw(index: pa.Table, answer: pa.Table) -> pa.Table:
    """Returns the records that a query's answer names, as a set's table.

    Args:
      index: rows of a store, sorted by id.
      answer: has a column ``record_id``; order and repeats do not matter.
    Raises:
      QueryError: no such column, an id that is no record, or no id at all.
    """
    if "record_id" not in answer.column_names:
        raise QueryError(
            f"a set needs a column 'record_id'; the query gives {', '.join(answer.column_names)}"
        )
    kind = answer.schema.field("record_id").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise QueryError(f"the column 'record_id' of the query is {kind}; record ids are text")
    wanted = sorted({name for name in answer["record_id"].to_pylist() if name is not None})
    rows = index.filter(pc.is_in(index["record_id"], pa.array(wanted, pa.string())))
    if not wanted or len(rows) != len(wanted):
        raise QueryError(
            f"the query gives {len(wanted)} record ids, of which {len(rows)} are records here; "
            "a set holds one record or more, all of them in the store"
        )
    return rows.select(SCHEMA.names).cast(SCHEMA).combine_chunks()


def select(index: pa.Table, found: RecordSet, version: int) -> pa.Table:
    """Returns the index rows of a set's records.

    Args:
      index: rows of a store, sorted by id.
      found: the set.
      version: of the store, for the message.
    Raises:
      RecordSetMismatchError: a record of the set is missing here or has other content.
    """
    rows = index.filter(pc.is_in(index["record_id"], found.table["record_id"]))
    here = dict(zip(rows["record_id"].to_pylist(), rows["fingerprint"].to_pylist(), strict=True))
    wanted = dict(zip(found.ids, found.table["fingerprint"].to_pylist(), strict=True))
    missing = tuple(name for name in wanted if name not in here)
    changed = tuple(name for name in wanted if name in here and here[name] != wanted[name])
    if missing or changed:
        raise RecordSetMismatchError(found.name, version, found.store_version, missing, changed)
    return rows


def save(blobs: Blobs, made: RecordSet) -> RecordSet:
    """Publishes a set under its name; returns the one that is there.

    Raises:
      NameTakenError: the name exists and holds other records, or is bound otherwise.
    """
    about = {
        "sql": made.sql,
        "store_version": made.store_version,
        "within": dataclasses.asdict(made.within) if made.within else None,
        "num_records": len(made),
        "fingerprint": _meaning(made.table, made.within),
    }
    there = named_tables.write(blobs, FOLDER, KIND, made.name, made.table, about)
    return dataclasses.replace(made, sql=there["sql"], store_version=there["store_version"])


def load(blobs: Blobs, settings: StoreSettings, name: str) -> RecordSet:
    """Returns a stored set.

    Raises:
      NameNotFoundError: no set of that name.
      CorruptDataError: the file is damaged or does not match its fingerprint.
    """
    table, about = named_tables.read(blobs, FOLDER, KIND, name, SCHEMA)
    ids, fingerprints = (table[column].to_pylist() for column in SCHEMA.names)
    try:
        within = about["within"]
        made = RecordSet(
            name=name,
            table=table,
            fingerprint=content_fingerprint(settings, ids, fingerprints),
            sql=str(about["sql"]),
            store_version=int(about["store_version"]),
            within=None if within is None else Within(**{key: str(text) for key, text in within.items()}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptDataError(f"{FOLDER}/{name}", f"its description is damaged ({error})") from error
    if ids != sorted(set(ids)) or about["fingerprint"] != _meaning(table, made.within):
        raise CorruptDataError(f"{FOLDER}/{name}", "the records do not match their fingerprint")
    return made


def _meaning(table: pa.Table, within: Within | None) -> str:
    """Returns sha256 (hex) of records and promise: the same records under another promise are another set."""
    bound = [within.split, within.part, within.fingerprint] if within else []
    digest = hashlib.sha256(json.dumps(bound).encode() + b"\n")
    for row in zip(*(table[column].to_pylist() for column in SCHEMA.names), strict=True):
        digest.update("\x00".join(row).encode() + b"\n")
    return digest.hexdigest()
