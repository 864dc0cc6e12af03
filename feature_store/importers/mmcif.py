"""The layout ``mmcif``: every protein chain of every entry becomes a record with its sequence and structure.

Owns what such records are called and what they hold. Does not own how an entry is read
(`parsers.mmcif.entry`).

A record is called ``ENTRY_CHAIN`` as in AlphaFold 2's and OpenProteinSet's data, with the author's name of
the chain: ``1abc_A``. Identifiers of the PDB are written in lower case, all others as they are. Where several
protein chains of an entry share the author's name, each also gets its ``label_asym_id``, which is unique in
an entry: ``1abc_A.B``. The alignment is the sequence alone (depth 1); `foldfeed structures` is the way to put
structures into records that have an alignment. Every file is read twice: for the names of its chains, and for
the chains.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path

import numpy as np

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.columns import RELEASE_DATE
from foldfeed.feature_store.format.record import MsaRecord, RowProvenance
from foldfeed.feature_store.importers.rows import ImportOptions
from foldfeed.feature_store.importers.sources import Found, Reject, Source, relative, walk_files
from foldfeed.feature_store.parsers.hit_names import make_id
from foldfeed.feature_store.parsers.mmcif.entry import MmcifEntry, load_mmcif
from foldfeed.feature_store.parsers.mmcif.tables import gemmi_module

SUFFIXES = (".cif", ".mmcif")
# 1abc and pdb_00001abc
_PDB_ID = re.compile(r"[0-9][A-Za-z0-9]{3}|pdb_[A-Za-z0-9]{8}", re.IGNORECASE)


def scan_mmcif(root: Path, options: ImportOptions) -> Found:
    """Yields one source per protein chain of the files at or below ``root``.

    Raises:
      MissingExtraError: gemmi is not installed.
    """
    gemmi_module()

    # The chains of an entry follow one another in order of their ids, too.
    @functools.lru_cache(1)
    def entry_of(path: Path) -> MmcifEntry:
        return load_mmcif(path, options.max_bytes, model=options.model, modified=options.modified)

    for path in walk_files(root, SUFFIXES):
        where = relative(path, root)
        try:
            entry = entry_of(path)
        except (FoldfeedError, OSError) as error:
            yield Reject("", where, str(error))
            continue
        for label, record_id in record_ids(entry).items():
            read = functools.partial(_read, functools.partial(entry_of, path), label, record_id, where)
            yield Source(record_id, where, read)
        for label in entry.without_atoms:
            reason = f"chain {label} (label_asym_id) has no atom in model {entry.facts['model']}"
            yield Reject("", where, reason)
        for label in entry.without_entity:
            reason = (
                f"chain {label} (label_asym_id) is a polypeptide, but the label_entity_id of its atoms is "
                "not; give the file as it was deposited"
            )
            yield Reject("", where, reason)


def record_ids(entry: MmcifEntry) -> dict[str, str]:
    """Returns the record id of every protein chain, by label_asym_id."""
    name = entry.entry_id.lower() if _PDB_ID.fullmatch(entry.entry_id) else entry.entry_id
    times = Counter(entry.chain_ids.values())
    return {
        label: make_id(f"{name}_{auth}" if times[auth] == 1 else f"{name}_{auth}.{label}")
        for label, auth in entry.chain_ids.items()
    }


def _read(entry: functools.partial[MmcifEntry], label: str, record_id: str, where: str) -> MsaRecord:
    chain = entry().chain(label)
    extra = {"source": where, "source_format": "mmcif"}
    if RELEASE_DATE in chain.structure.source:
        extra[RELEASE_DATE] = chain.structure.source[RELEASE_DATE]
    return MsaRecord(
        record_id=record_id,
        description=chain.description,
        sequence=chain.sequence,
        msa=alphabet.encode(chain.sequence)[None],
        deletions=np.zeros((1, len(chain.sequence)), dtype=np.int32),
        rows=RowProvenance(
            database=np.full(1, -1, dtype=np.int16),
            e_value=np.full(1, np.nan),
            bit_score=np.full(1, np.nan, dtype=np.float32),
            hit_id=[record_id],
            species=[""],
        ),
        databases=(),
        extra=extra,
        structure=chain.structure,
    )
