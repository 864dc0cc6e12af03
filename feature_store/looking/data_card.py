"""The data card of a report: databases, tools, licences, release dates; and what is how big on the disk.

Owns these numbers and their tables. Reads index rows and the metadata of parts, no arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from foldfeed.feature_store.format.columns import EXTRA_PREFIX, column_values
from foldfeed.feature_store.index.files import INDEX_FOLDER
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.looking.markup import Child, tag
from foldfeed.feature_store.looking.tables import data_table, in_bytes, more
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.store.feature_store import FeatureStore

LICENCE_KEYS = ("licence", "license")
NOT_GIVEN = "not given"
MAX_LICENCES_LISTED = 200


def data_card(store: FeatureStore) -> Child:
    """Returns databases with tools, licences and release dates."""
    table = store.table()
    facts = [json.loads(text) for text in table["extra"].to_pylist()]
    uses = table["databases"].to_pylist()
    return [
        tag("h3", "Databases and tools"),
        _databases(uses),
        tag("h3", "Licences"),
        _licences(_licence_facts(table, facts), uses),
        tag("h3", "Release dates"),
        tag("p", _dates(table)),
    ]


def _databases(records: Sequence[Sequence[Mapping[str, object]]]) -> Child:
    found: dict[tuple[str, ...], list[int]] = {}
    for uses in records:
        for use in uses:
            key = tuple(str(use[name]) for name in ("name", "digest", "tool", "tool_version"))
            counts = found.setdefault(key, [0, 0])
            counts[0] += 1
            counts[1] += int(str(use["num_rows"]))
    if not found:
        return tag("p", "No database was searched.")
    heads = ["database", "sha256 of its manifest", "tool", "version", "records", "rows kept"]
    rows: list[list[Child]] = [
        [name, tag("code", digest[:16], title=digest), tool, version, f"{records:,}", f"{kept:,}"]
        for (name, digest, tool, version), (records, kept) in sorted(found.items())
    ]
    return data_table(heads, rows, numeric=(4, 5))


def _licence_facts(table: pa.Table, facts: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
    """Returns each record's facts about licences: those in ``extra`` and those in annotated columns."""
    found = [{key: str(value) for key, value in fact.items() if _is_licence(key)} for fact in facts]
    for name in filter(_is_licence, table.column_names):
        for fact, value in zip(found, table[name].to_pylist(), strict=True):
            if value is not None:
                fact[name] = str(value)
    return found


def _is_licence(key: str) -> bool:
    return key.lower().startswith(LICENCE_KEYS)


def _licence_of(fact: Mapping[str, str], database: str) -> str:
    """Returns the licence of a database in a record: its own, or else the record's."""
    # As `_is_licence`: whatever the case. Of keys that differ in nothing else the plain one is meant.
    found = {key.lower(): value for key, value in sorted(fact.items())}
    for key in (*(f"{word}.{database}" for word in LICENCE_KEYS), *LICENCE_KEYS):
        if key in fact or key.lower() in found:
            return fact.get(key, found.get(key.lower(), NOT_GIVEN))
    return NOT_GIVEN


def _licences(facts: Sequence[Mapping[str, str]], records: Sequence[Sequence[Mapping[str, object]]]) -> Child:
    if not any(facts):
        return tag(
            "p",
            "None given. A build or import may give one in the record's extra facts, or an annotation in a "
            "column: licence for the record, licence.NAME for the database NAME.",
        )
    by_database: collections.Counter[tuple[str, str]] = collections.Counter()
    by_fact: collections.Counter[tuple[str, str]] = collections.Counter()
    for fact, uses in zip(facts, records, strict=True):
        by_fact.update(fact.items())
        for name in {str(use["name"]) for use in uses}:
            by_database[name, _licence_of(fact, name)] += 1
    without = sum(not fact for fact in facts)
    return [
        _counted(["database", "licence", "records"], by_database) if by_database else None,
        _counted(["fact", "licence", "records"], by_fact),
        tag("p", f"{without:,} of {len(facts):,} records have no licence.") if without else None,
    ]


def _counted(heads: Sequence[Child], counts: collections.Counter[tuple[str, str]]) -> Child:
    rows = [[name, value, f"{count:,}"] for (name, value), count in sorted(counts.items())]
    listed = rows[:MAX_LICENCES_LISTED]
    return [
        more(len(listed), len(rows), "line") if len(listed) < len(rows) else None,
        data_table(heads, listed, numeric=(2,)),
    ]


def _dates(table: pa.Table) -> str:
    column = "release_date" if "release_date" in table.column_names else f"{EXTRA_PREFIX}release_date"
    dates = sorted(str(value) for value in column_values(table, column) if value is not None)
    if not dates:
        return "No record has a release date."
    missing = len(table) - len(dates)
    return f"{dates[0]} to {dates[-1]} ({len(dates):,} records; {missing:,} have none)."


@dataclasses.dataclass(kw_only=True, slots=True)
class ArraySize:
    """One array of all parts together.

    Attributes:
      stored_bytes: its files, metadata included.
      plain_bytes: its values, neither compressed nor left out where they are all fill.
    """

    stored_bytes: int = 0
    plain_bytes: int = 0


def array_sizes(store: FeatureStore) -> dict[str, ArraySize]:
    """Returns how big each array of the version's parts is, the largest first.

    ``""`` is the parts' own metadata. Parts are counted whole, with records that this version does not show.
    """
    blobs = open_blobs(store.url)
    found: dict[str, ArraySize] = collections.defaultdict(ArraySize)
    for part_id in store.table(["part_id"])["part_id"].unique().to_pylist():
        part = PartReader(blobs, part_id)
        for path, entry in part.files.items():
            found[path.split("/")[0]].stored_bytes += entry["bytes"]
        for name, array in part.arrays.items():
            cell = math.prod(array.spec.chunk[1:]) * np.dtype(array.spec.dtype).itemsize
            found[name].plain_bytes += array.length * cell
        found[""].stored_bytes += blobs.info(f"{part.path}/zarr.json").num_bytes
    return dict(sorted(found.items(), key=lambda item: (-item[1].stored_bytes, item[0])))


def sizes_section(store: FeatureStore) -> Child:
    """Returns bytes on disk by array, with compression ratios, and those of the index."""
    sizes = array_sizes(store)
    if not sizes:
        return tag("p", "Nothing: there is no part.")
    blobs = open_blobs(store.url)
    index = Index.open(store.url, store.version)
    index_bytes = sum(blobs.info(f"{INDEX_FOLDER}/{name}").num_bytes for name in index.files)
    total = sum(size.stored_bytes for size in sizes.values()) + index_bytes
    rows: list[list[Child]] = [
        [
            tag("code", name) if name else "metadata of parts",
            in_bytes(size.stored_bytes),
            f"{size.stored_bytes / total:.1%}",
            in_bytes(size.plain_bytes) if size.plain_bytes else "",
            f"{size.plain_bytes / size.stored_bytes:.1f}" if size.plain_bytes else "",
        ]
        for name, size in sizes.items()
    ]
    rows.append(["index, files of this version", in_bytes(index_bytes), f"{index_bytes / total:.1%}", "", ""])
    rows.append([tag("b", "all"), tag("b", in_bytes(total)), "", "", ""])
    heads = ["array", "on disk", "share", "plain", "ratio"]
    return [
        data_table(heads, rows, numeric=(1, 2, 3, 4)),
        tag("p", _per_token(store, total), class_="where"),
    ]


def _per_token(store: FeatureStore, total: int) -> str:
    table = store.table(["length", "depth"])
    tokens = int((table["length"].to_numpy().astype(np.int64) * table["depth"].to_numpy()).sum())
    words = "Plain is what the values take without compression, padding of tiles included. "
    return words + f"{total / max(tokens, 1):.3f} bytes per token of a visible record, everything included."
