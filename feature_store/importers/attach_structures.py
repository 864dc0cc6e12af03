"""Puts structures of mmCIF entries into records that a store has already, in one commit.

Owns which chain belongs to which record, and the commit. Does not own how entries are read
(`parsers.mmcif.entry`) or records rewritten (`rebuild`). Invariants: alignments and all other facts of a
record stay what they are; letters of chain and record agree, or the chain is refused; a record that others
changed meanwhile is left to them and reported; done again it finds nothing to do. One record and one entry
are in memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.exchange_errors import LayoutError
from foldfeed.feature_store.format.columns import RELEASE_DATE
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.format.structure import Structure
from foldfeed.feature_store.importers.into_store import batches
from foldfeed.feature_store.importers.mmcif import SUFFIXES, record_ids
from foldfeed.feature_store.importers.sources import Reject, relative, walk_files
from foldfeed.feature_store.index.transactions import ON_EXISTING, Index
from foldfeed.feature_store.parsers.mmcif.entry import DEFAULT_MAX_BYTES, MmcifChain, MmcifEntry, load_mmcif
from foldfeed.feature_store.parsers.mmcif.sequence import MODIFIED
from foldfeed.feature_store.parsers.mmcif.tables import gemmi_module
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.rebuild import load_record
from foldfeed.feature_store.parts.wanted import mark_wanted
from foldfeed.feature_store.parts.writer import write_part
from foldfeed.feature_store.progress import Progress, silent
from foldfeed.feature_store.storage import Blobs, open_blobs
from foldfeed.feature_store.store.feature_store import FeatureStore

BY = ("id", "sequence")
_OPEN_PARTS = 16
_DIGEST_BYTES = 16
# Facts of `Structure.source` about how it was read, not about what it is; stores from before may have parser.
_OF_THE_READER = frozenset({"parser", "num_models", "arginine_swaps", "sequence_from", "modified"})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttachOptions:
    """What the user may choose.

    Attributes:
      by: ``id`` (a chain goes to the record of its id, `importers.mmcif`: 1abc_A) or ``sequence`` (to
        every record with exactly its sequence; of several such chains the one with most residues observed,
        then of best resolution, then first by id).
      on_existing: for a record with another structure: ``error`` refuses that record, ``replace``, ``skip``.
      modified: letter of modified residues, see `parsers.mmcif.entry.read_mmcif`.
      model: of entries with several; the first of the file when None.
      max_bytes: most bytes of one file, decompressed.
    """

    by: str = "id"
    on_existing: str = "error"
    modified: str = MODIFIED[0]
    model: int | None = None
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        for name, allowed in (("by", BY), ("on_existing", ON_EXISTING), ("modified", MODIFIED)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes {self.max_bytes} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttachReport:
    """What was attached.

    Attributes:
      num_files: entries looked at.
      num_chains: protein chains found in them.
      num_matched: records for which there is a chain.
      num_attached: records that got a structure.
      num_unchanged: records that had this structure, or were skipped.
      version: of the store after it; None when nothing was committed.
      job_id: of the commit; "" when nothing was committed.
      already_done: the same job was committed before.
      rejects: files, chains and records that were refused.
      wanted_id: the record that one of the chains looked for; "" when chains go by sequence or are none.
      stored_id: of a record of the store; "" when it has none.
    """

    num_files: int
    num_chains: int
    num_matched: int
    num_attached: int
    num_unchanged: int
    version: int | None
    job_id: str
    already_done: bool
    rejects: tuple[Reject, ...]
    wanted_id: str = ""
    stored_id: str = ""


def attach_structures(
    store_url: str | os.PathLike[str],
    path: Path,
    options: AttachOptions | None = None,
    *,
    job_id: str | None = None,
    progress: Progress = silent,
) -> AttachReport:
    """Gives records the structures of their chains.

    The release date of the entry becomes the record's ``extra.release_date``, because that is where
    `FeatureStore.as_of` looks for the day on which a structure became public.

    Args:
      store_url: must exist.
      path: a file or a folder of mmCIF entries, plain or compressed.
      options: what belongs together.
      job_id: names the commit; made from the content when None.
      progress: told after each file and each record.
    Raises:
      NotAStoreError: there is no store.
      LayoutError: there is no mmCIF file.
      MissingExtraError: gemmi is not installed.
      StorageFullError: no space left; nothing is committed.
    """
    gemmi_module()
    return _Attachment(FeatureStore.open(store_url), path, options or AttachOptions(), progress).run(job_id)


@dataclasses.dataclass(frozen=True, slots=True)
class _Choice:
    """The chain that a record gets; the better of two sorts first."""

    rank: tuple[int, float, str, str]
    path: Path
    label: str
    where: str


class _Attachment:
    """One run of `attach_structures`."""

    def __init__(self, store: FeatureStore, path: Path, options: AttachOptions, progress: Progress) -> None:
        self._store = store
        self._root = path
        self._options = options
        self._progress = progress
        self._files = list(walk_files(path, SUFFIXES))
        if not self._files:
            raise LayoutError(str(path), "it holds no *.cif file")
        self._rejects: list[Reject] = []
        self._num_chains = 0
        self._an_id = ""
        self._num_unchanged = 0
        self._choices: dict[str, _Choice] = {}
        self._before: dict[str, str] = {}
        self._blobs: Blobs = open_blobs(store.url)
        self._part = functools.lru_cache(_OPEN_PARTS)(functools.partial(PartReader, self._blobs))
        self._entry = functools.lru_cache(1)(self._load)

    def run(self, job_id: str | None) -> AttachReport:
        """Chooses, writes and commits."""
        rows = self._store.index_rows()
        self._choose(rows)
        parts = [
            write_part(self._store.url, batch, self._store.settings).part_id
            for batch in batches(self._changed(rows))
        ]
        attached, version, already, job = 0, None, False, ""
        if parts:
            job = job_id or self._job_id(parts)
            attached, version, already = self._commit(parts, job)
        return AttachReport(
            num_files=len(self._files),
            num_chains=self._num_chains,
            num_matched=len(self._choices),
            num_attached=attached,
            num_unchanged=self._num_unchanged,
            version=version,
            job_id=job,
            already_done=already,
            rejects=tuple(self._rejects),
            wanted_id=self._an_id,
            stored_id=rows["record_id"][0].as_py() if len(rows) else "",
        )

    def _load(self, path: Path) -> MmcifEntry:
        options = self._options
        return load_mmcif(path, options.max_bytes, model=options.model, modified=options.modified)

    def _choose(self, rows: pa.Table) -> None:
        """Finds the chain of every record."""
        ids, sequences = rows["record_id"], rows["sequence"]
        known: dict[Any, int | list[int]] = {}
        keys = ids.to_pylist() if self._options.by == "id" else map(_digest, _texts(sequences))
        for position, key in enumerate(keys):
            there = known.setdefault(key, position)
            # A list only where it is needed: a store may have millions of records.
            if isinstance(there, list):
                there.append(position)
            elif there != position:
                known[key] = [there, position]
        for number, path in enumerate(self._files, start=1):
            where = relative(path, self._root)
            try:
                self._look_into(path, where, known, ids, sequences)
            except (FoldfeedError, OSError) as error:
                self._rejects.append(Reject("", where, str(error)))
            self._progress("reading entries", number, len(self._files))

    def _look_into(
        self,
        path: Path,
        where: str,
        known: Mapping[Any, int | list[int]],
        ids: pa.ChunkedArray,
        sequences: pa.ChunkedArray,
    ) -> None:
        entry = self._entry(path)
        for label, chain_id in record_ids(entry).items():
            self._num_chains += 1
            by_id = self._options.by == "id"
            if by_id:
                self._an_id = self._an_id or chain_id
                if chain_id not in known:
                    continue
            try:
                chain = entry.chain(label)
            except FoldfeedError as error:
                # Other chains of the entry may be good.
                cannot = f"chain {chain_id} cannot be read: {error}"
                self._rejects.append(Reject(chain_id if by_id else "", where, cannot))
                continue
            key = chain_id if by_id else _digest(chain.sequence)
            resolution = float(chain.structure.source.get("resolution_angstrom", math.inf))
            rank = (-int(chain.structure.observed.sum()), resolution, chain_id, where)
            found = known.get(key, [])
            for position in [found] if isinstance(found, int) else found:
                record_id = ids[position].as_py()
                reason = disagreement(chain, sequences[position].as_py())
                if reason is not None:
                    self._rejects.append(Reject(record_id, where, f"chain {chain_id} is refused: {reason}"))
                    continue
                self._offer(record_id, _Choice(rank, path, label, where))

    def _offer(self, record_id: str, choice: _Choice) -> None:
        other = self._choices.get(record_id)
        if other is None:
            self._choices[record_id] = choice
        elif self._options.by == "sequence":
            self._choices[record_id] = min(choice, other, key=lambda one: one.rank)
        else:
            reason = f"the record already gets the structure of {other.where}; leave one of the files out"
            self._rejects.append(Reject(record_id, choice.where, reason))

    def _changed(self, rows: pa.Table) -> Iterator[MsaRecord]:
        """Yields the records that get a structure, as they will be, in the order of their ids."""
        wanted = sorted(self._choices)
        positions = pc.index_in(pa.array(wanted, pa.string()), value_set=rows["record_id"]).to_pylist()
        for number, (record_id, position) in enumerate(zip(wanted, positions, strict=True), start=1):
            row = rows.slice(position, 1).to_pylist()[0]
            choice = self._choices[record_id]
            try:
                record = self._with_structure(row, choice)
            except (FoldfeedError, OSError) as error:
                self._rejects.append(Reject(record_id, choice.where, str(error)))
                record = None
            if record is not None:
                self._before[record_id] = row["fingerprint"]
                yield record
                del record
            self._progress("writing records", number, len(wanted))

    def _with_structure(self, row: dict[str, Any], choice: _Choice) -> MsaRecord | None:
        """Returns a record with its new structure; None when it is to stay as it is."""
        record = load_record(self._part(row["part_id"]), row)
        structure = self._entry(choice.path).chain(choice.label).structure
        there = record.structure
        differences = [] if there is None else _differences(there, structure)
        is_other = bool(differences)
        if there is not None and not is_other:
            structure = there
        extra = dict(record.extra)
        if RELEASE_DATE in structure.source:
            extra[RELEASE_DATE] = structure.source[RELEASE_DATE]
        elif there is not None and extra.get(RELEASE_DATE) == there.source.get(RELEASE_DATE):
            # It was the day of the structure that goes; `as_of` would show this one from that day on.
            extra.pop(RELEASE_DATE, None)
        found = dataclasses.replace(record, structure=structure, extra=extra)
        if found.fingerprint == row["fingerprint"] or (is_other and self._options.on_existing == "skip"):
            self._num_unchanged += 1
            return None
        if is_other and self._options.on_existing == "error":
            assert there is not None
            reason = (
                f"the record has another structure ({_name(there.source)}, not {_name(structure.source)}; "
                f"they differ in {', '.join(differences)}); choose with --on-existing which one to keep: "
                "replace or skip"
            )
            self._rejects.append(Reject(record.record_id, choice.where, reason))
            return None
        return found

    def _job_id(self, parts: list[str]) -> str:
        # Also from what the records were: after a way back, the same structures are another job.
        lines = [*parts, *(f"{name} {self._before[name]}" for name in sorted(self._before))]
        return "structures-" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    def _commit(self, parts: list[str], job_id: str) -> tuple[int, int, bool]:
        """Makes the records visible; returns how many, the version, and whether it had been done."""
        mark_wanted(self._store.url, parts)
        new = {
            row["record_id"]: {**row, "part_id": part_id, "job_id": job_id}
            for part_id in parts
            for row in self._part(part_id).index_rows()
        }
        index = Index.open(self._store.url, None)
        index.add_columns(list(INDEX_SCHEMA))
        left: list[str] = []

        def change(now: pa.Table) -> pa.Table:
            rows = now.to_pylist()
            same = [row for row in rows if row["fingerprint"] == self._before[row["record_id"]]]
            left[:] = sorted(set(new) - {row["record_id"] for row in same})
            return pa.Table.from_pylist([row | new[row["record_id"]] for row in same], schema=now.schema)

        reader = f"gemmi {gemmi_module().__version__}"
        message = f"structures of {len(new)} records (by {self._options.by}, read with {reader})"
        result = index.update(list(new), change, operation="replace", job_id=job_id, message=message)
        for record_id in left:
            reason = "the record was changed or removed while its structure was written; run this again"
            self._rejects.append(Reject(record_id, self._choices[record_id].where, reason))
        attached = 0 if result.already_done else len(new) - len(left)
        return attached, result.version, result.already_done


def disagreement(chain: MmcifChain, sequence: str) -> str | None:
    """Returns why a chain cannot be the structure of a sequence, or None.

    X matches every letter, and so does a modified residue, for which there is more than one letter.
    """
    if len(chain.sequence) != len(sequence):
        return (
            f"it has {len(chain.sequence)} residues and the record {len(sequence)}; a structure goes with "
            "the whole sequence that was crystallised (SEQRES)"
        )
    ours, theirs = (
        np.frombuffer(text.encode("ascii"), dtype=np.uint8) for text in (sequence, chain.sequence)
    )
    differs = (ours != theirs) & ~chain.modified & (ours != ord("X")) & (theirs != ord("X"))
    if not differs.any():
        return None
    at = int(np.argmax(differs))
    return f"residue {at + 1} is {chain.sequence[at]} in the chain and {sequence[at]} in the record"


def _differences(there: Structure, new: Structure) -> list[str]:
    """Returns in what two structures of a record differ, in words; nothing when they are the same.

    What a parser says about its own work is no difference: another release of it may count otherwise.
    """
    found = []
    for key in sorted((set(there.source) | set(new.source)) - _OF_THE_READER):
        values = [source.get(key, "none") for source in (there.source, new.source)]
        if values[0] != values[1]:
            found.append(f"{key} ({values[0]}, not {values[1]})")
    for name, array in there.arrays.items():
        other = new.arrays[name]
        if array.shape != other.shape:
            found.append(f"{name} ({len(array)} residues, not {len(other)})")
        elif not np.array_equal(array, other):
            residues = np.flatnonzero((array != other).reshape(len(array), -1).any(axis=1))
            found.append(f"{name} (of {len(residues)} residues, first {residues[0] + 1})")
    return found


def _name(source: Mapping[str, str]) -> str:
    """Returns what tells structures apart, for a message."""
    known = [f"{key} {source[key]}" for key in ("entry_id", "label_asym_id", "model") if key in source]
    return ", ".join(known) or "of unknown origin"


def _texts(column: pa.ChunkedArray) -> Iterator[str]:
    return (text.as_py() for text in column)


def _digest(sequence: str) -> bytes:
    return hashlib.sha256(sequence.encode()).digest()[:_DIGEST_BYTES]
