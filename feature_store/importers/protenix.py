"""Protenix: a folder per chain with ``pairing.a3m`` and ``non_pairing.a3m``, in a folder per job.

Rows of ``pairing.a3m`` are named ``UniRef100_NAME_TAXONOMY/``; the taxonomy id pairs them with rows of the
other chains and becomes their `RowProvenance.pairing_key`, valid among the chains of the job, which is the
``assembly`` in the records' ``extra``. They come first and stay all; rows of ``non_pairing.a3m`` that
repeat earlier letters go.

Source: Protenix ``data/msa/msa_utils.py``, ``web_service/colab_request_parser.py``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.exchange_errors import SourceFileError
from foldfeed.feature_store.format.columns import ASSEMBLY
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.importers.rows import MAX_IMPORT_ROWS, ImportOptions, build_record, rows_of
from foldfeed.feature_store.importers.sources import (
    Found,
    names_of_folders,
    plain_name,
    relative,
    source_of,
    walk_folders,
)
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.feature_store.parsers.bounded_files import kind_of, read_blocks, stem_of
from foldfeed.feature_store.parsers.hit_names import fit_pairing_key

PAIRING, NON_PAIRING = "pairing", "non_pairing"
# Protenix's own rule for names such as UniRef100_A0A1B2_9606/.
_TAXONOMY = re.compile(r"UniRef100_[^_]+_([^_/]+)")


def is_protenix_folder(names: Iterable[str]) -> bool:
    """Returns whether names of files, without a compression's extension, are those of a chain of Protenix."""
    return not {f"{PAIRING}.a3m", f"{NON_PAIRING}.a3m"}.isdisjoint(names)


def scan_protenix(root: Path, options: ImportOptions) -> Found:
    """Yields one source per folder at or below ``root`` with ``pairing.a3m`` or ``non_pairing.a3m``."""
    folders = [folder for folder, names in walk_folders(root) if is_protenix_folder(map(plain_name, names))]
    for name, folder in zip(names_of_folders(folders), folders, strict=True):
        where = relative(folder, root)
        yield source_of(name, where, functools.partial(_read_protenix, folder, where, options))


def _read_protenix(folder: Path, where: str, options: ImportOptions, record_id: str) -> MsaRecord:
    files = {stem_of(path): path for path in sorted(folder.iterdir()) if kind_of(path)[1] == ".a3m"}
    databases = []
    for name in (PAIRING, NON_PAIRING):
        if name not in files:
            continue
        try:
            alignment = parse_a3m(read_blocks(files[name], options.max_bytes), MAX_IMPORT_ROWS)
        except AlignmentParseError as error:
            raise SourceFileError(files[name].name, str(error)) from error
        keys = ["", *map(_taxonomy, alignment.names[1:])] if name == PAIRING else ()
        databases.append(rows_of(name, alignment, pairing_keys=keys))
    return build_record(
        record_id,
        databases,
        drop_repeats=options.dedup != "none",
        keep_pairs=options.dedup == "source",
        keep_query_rows=False,
        max_hits=options.max_hits,
        extra={
            "source": where,
            "source_format": "protenix",
            ASSEMBLY: folder.resolve().parent.name,
        },
    )


def _taxonomy(header: str) -> str:
    found = _TAXONOMY.match(header)
    return fit_pairing_key(found[1]) if found else ""
