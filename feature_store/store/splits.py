"""Splits of records into parts (train, validation, ...) that no cluster of similar proteins straddles.

Owns the assignment of clusters to parts and its checks. Does not cluster: the clusters come from a tool such
as MMseqs2 or from a fact recorded with each record. The part of a cluster is a pure function of (seed,
cluster id, fractions), so a store that grows, or another store, gives every cluster the part it had.
Invariant of a stored split: every record of it is in one part, and all records of a cluster, and all records
with equal sequences, are in the same one; checked when it is saved and again when it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.errors import CorruptDataError, LeakageError, QueryError, SplitError
from foldfeed.feature_store.format.columns import column_values
from foldfeed.feature_store.storage import Blobs
from foldfeed.feature_store.store import named_tables

FOLDER = "splits"
KIND = "split"
SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("record_id", "cluster_id", "part")]
)
# A cluster's place in [0, 1) has this many steps; part boundaries are rounded to them.
HASH_STEPS = 1 << 64
MEMBER_COLUMNS = ("record_id", "sequence", "sequence_sha256")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A stored split.

    Attributes:
      name: in its store.
      table: record_id, cluster_id, part; sorted by record id.
      seed: of the assignment.
      fractions: expected share of the *clusters* by part, in order.
      source: where the clusters came from, for people.
      fingerprint: sha256 (hex) of seed, fractions and table.
    """

    name: str
    table: pa.Table
    seed: int
    fractions: Mapping[str, float]
    source: str
    fingerprint: str

    def ids(self, part: str) -> list[str]:
        """Returns the record ids of a part, sorted.

        Raises:
          SplitError: no such part.
        """
        self.check_part(part)
        return self.table.filter(pc.equal(self.table["part"], part))["record_id"].to_pylist()

    def check_part(self, part: str) -> None:
        """Raises `SplitError` unless the split has that part."""
        if part not in self.fractions:
            raise SplitError(f"split {self.name!r} has no part {part!r}; it has {', '.join(self.fractions)}")

    def check_inside(self, part: str, record_ids: Sequence[str]) -> None:
        """Raises unless every record belongs to a part.

        Raises:
          LeakageError: a record is of a cluster that is held out, or of none that the split knows.
        """
        self.check_part(part)
        known = dict(zip(*(self.table[name].to_pylist() for name in ("record_id", "part")), strict=True))
        held_out = tuple(sorted(name for name in record_ids if known.get(name, part) != part))
        if held_out:
            raise LeakageError(
                f"records of clusters that split {self.name!r} keeps out of {part!r}", held_out
            )
        unknown = tuple(sorted(name for name in record_ids if name not in known))
        if unknown:
            raise LeakageError(f"records that split {self.name!r} does not know", unknown)


def part_of_cluster(cluster_id: str, seed: int, fractions: Mapping[str, float]) -> str:
    """Returns the part of a cluster: where its hash falls among the cumulated fractions.

    Args:
      cluster_id: any text.
      seed: another seed, an unrelated assignment.
      fractions: share by part; the order counts.
    Raises:
      SplitError: the fractions are not positive or do not add up to one.
    """
    _check_fractions(fractions)
    digest = hashlib.sha256(json.dumps([seed, cluster_id]).encode()).digest()
    place = int.from_bytes(digest[:8], "big")
    ends = itertools.accumulate(fractions.values())
    for part, end in zip(fractions, ends, strict=True):
        if place < int(end * HASH_STEPS):
            return part
    return list(fractions)[-1]


def make_split(
    name: str,
    index: pa.Table,
    clusters: Sequence[str],
    *,
    seed: int,
    fractions: Mapping[str, float],
    source: str,
) -> Split:
    """Returns a checked split of index rows.

    Args:
      name: of the split.
      index: ``record_id`` and ``sequence_sha256``, sorted by id.
      clusters: cluster id of each row, see `clusters_of`.
      seed: see `part_of_cluster`.
      fractions: see `part_of_cluster`.
      source: where the clusters came from.
    Raises:
      SplitError: bad fractions or names.
      LeakageError: equal sequences have clusters in different parts.
    """
    for part in fractions:
        named_tables.check_name("part of a split", part)
    # As they come back from JSON, where 1 and 1.0 differ.
    fractions = {part: float(share) for part, share in fractions.items()}
    parts = {cluster: part_of_cluster(cluster, seed, fractions) for cluster in sorted(set(clusters))}
    columns = [index["record_id"].to_pylist(), list(clusters), [parts[cluster] for cluster in clusters]]
    table = pa.table([pa.array(column, pa.string()) for column in columns], schema=SCHEMA)
    check(table)
    _one_part_each("sequences (by sha256) in more than one part", index["sequence_sha256"], table["part"])
    digest = _fingerprint(table, seed, fractions)
    return Split(name=name, table=table, seed=seed, fractions=fractions, source=source, fingerprint=digest)


def check(table: pa.Table) -> None:
    """Raises unless every record, and every cluster, is in one part.

    Args:
      table: of `SCHEMA`.
    Raises:
      LeakageError: a record or a cluster is in two.
    """
    ids = table["record_id"].to_pylist()
    twice = tuple(sorted({a for a, b in itertools.pairwise(sorted(ids)) if a == b}))
    if twice:
        raise LeakageError("records that a split lists twice", twice)
    _one_part_each("clusters in more than one part", table["cluster_id"], table["part"])


def clusters_of(
    index: pa.Table, clusters: str | Mapping[str, str], member: str = "record_id"
) -> tuple[list[str], str]:
    """Returns the cluster id of every index row, and words for where they come from.

    Args:
      index: rows of a store.
      clusters: a text column of the index, ``extra.KEY`` for a fact recorded with each record, or a mapping
        from member to cluster.
      member: what the keys of a mapping are: ``record_id``, ``sequence`` or ``sequence_sha256``.
    Raises:
      SplitError: a record has no cluster, or there is no such column.
    """
    if member not in MEMBER_COLUMNS:
        raise SplitError(f"member {member!r} is not one of {', '.join(MEMBER_COLUMNS)}")
    if isinstance(clusters, Mapping):
        found = [clusters.get(key) for key in index[member].to_pylist()]
        source = f"a table of {len(clusters)} members by {member}"
    else:
        try:
            found = column_values(index, clusters)
        except QueryError as error:
            raise SplitError(str(error)) from error
        source = f"column {clusters}"
    missing = [name for name, value in zip(index["record_id"].to_pylist(), found, strict=True) if not value]
    if missing:
        raise SplitError(
            f"{len(missing)} of {len(found)} records have no cluster in {source}, e.g. {missing[0]!r}; "
            "give every record one (a record alone in its family is a cluster of its own)"
        )
    return [str(value) for value in found], source


def read_cluster_tsv(path: Path, layout: str = "cluster-member") -> dict[str, str]:
    """Returns member -> cluster from a table of two columns.

    Args:
      path: tab separated, no header; ``#`` starts a comment.
      layout: ``cluster-member`` as MMseqs2's ``easy-cluster`` writes it (representative first), or
        ``member-cluster``.
    Raises:
      SplitError: another number of columns, an empty one, or a member of two clusters.
    Source: MMseqs2 user guide, "Cluster TSV format".
    """
    if layout not in ("cluster-member", "member-cluster"):
        raise SplitError(f"layout {layout!r} is neither 'cluster-member' nor 'member-cluster'")
    found: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SplitError(f"{path} is not UTF-8 text ({error})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.rstrip("\r").split("\t")
        if fields == [""] or line.startswith("#"):
            continue
        if len(fields) != 2 or not all(fields):
            raise SplitError(f"{path}, line {number}: {len(fields)} columns; write two, separated by a tab")
        cluster, member = fields if layout == "cluster-member" else fields[::-1]
        if found.setdefault(member, cluster) != cluster:
            raise SplitError(f"{path}, line {number}: {member!r} is in {found[member]!r} and {cluster!r}")
    return found


def save(blobs: Blobs, split: Split, store_version: int) -> Split:
    """Publishes a split under its name.

    Raises:
      NameTakenError: the name exists and means something else.
    """
    about = {
        "seed": split.seed,
        "fractions": [[part, share] for part, share in split.fractions.items()],
        "source": split.source,
        "store_version": store_version,
        "fingerprint": split.fingerprint,
    }
    named_tables.write(blobs, FOLDER, KIND, split.name, split.table, about)
    return split


def load(blobs: Blobs, name: str) -> Split:
    """Returns a stored split, checked again.

    Raises:
      NameNotFoundError: no split of that name.
      CorruptDataError: the file is damaged or does not match its fingerprint.
      LeakageError: somebody made a file in which a cluster is in two parts.
    """
    table, about = named_tables.read(blobs, FOLDER, KIND, name, SCHEMA)
    try:
        fractions = {str(part): float(share) for part, share in about["fractions"]}
        seed, source = int(about["seed"]), str(about["source"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptDataError(f"{FOLDER}/{name}", f"its description is damaged ({error})") from error
    if _fingerprint(table, seed, fractions) != about["fingerprint"]:
        raise CorruptDataError(f"{FOLDER}/{name}", "the table does not match its fingerprint")
    check(table)
    return Split(
        name=name,
        table=table,
        seed=seed,
        fractions=fractions,
        source=source,
        fingerprint=about["fingerprint"],
    )


def _check_fractions(fractions: Mapping[str, float]) -> None:
    shares = list(fractions.values())
    good = shares and all(0 < share <= 1 for share in shares)
    if not good or not math.isclose(math.fsum(shares), 1, abs_tol=1e-9):
        raise SplitError(f"fractions {dict(fractions)} must be positive and add up to 1")


def _one_part_each(what: str, keys: pa.ChunkedArray, parts: pa.ChunkedArray) -> None:
    pairs = set(zip(keys.to_pylist(), parts.to_pylist(), strict=True))
    ordered = sorted(pairs)
    twice = tuple(sorted({a[0] for a, b in itertools.pairwise(ordered) if a[0] == b[0]}))
    if twice:
        raise LeakageError(what, twice)


def _fingerprint(table: pa.Table, seed: int, fractions: Mapping[str, float]) -> str:
    digest = hashlib.sha256(json.dumps([seed, list(fractions.items())]).encode() + b"\n")
    for row in zip(*(table[name].to_pylist() for name in SCHEMA.names), strict=True):
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
