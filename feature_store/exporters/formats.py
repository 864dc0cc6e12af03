"""The front door of export: formats by name, file names, compression, whole files or none.

Owns the list of formats and what files are called. Does not own any format. Invariant: a file appears whole
under its name or not at all; of a format with several files for a record, each by itself.
"""

from __future__ import annotations

import bz2
import dataclasses
import functools
import gzip
import lzma
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import zstandard

from foldfeed.feature_store.exporters.arrays import to_alphafold2_npz, to_boltz_npz
from foldfeed.feature_store.exporters.folders import to_openproteinset, write_openfold_db
from foldfeed.feature_store.exporters.jobs import (
    CHAI_SOURCES,
    chai_file_name,
    to_alphafold3_json,
    to_chai_pqt,
)
from foldfeed.feature_store.exporters.mmcif import to_mmcif
from foldfeed.feature_store.exporters.rows import ExportRows, rows_of_record
from foldfeed.feature_store.exporters.texts import to_a2m, to_a3m, to_colabfold, to_stockholm
from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.store.feature_store import Record

_NOT_IN_FILE_NAMES = re.compile(r"[^A-Za-z0-9_.+=@-]")


@dataclasses.dataclass(frozen=True, slots=True)
class ExportFormat:
    """One format that records can be written in.

    Attributes:
      name: as a user types it.
      extension: of its files.
      is_text: may go to a terminal.
      has_structure: holds the atoms of a record that has some.
      has_alignment: holds rows besides the query.
      is_folder: a record is a folder of several files.
      is_database: all records together are one database.
    """

    name: str
    extension: str
    is_text: bool
    has_structure: bool = False
    has_alignment: bool = True
    is_folder: bool = False
    is_database: bool = False


EXPORT_FORMATS = {
    form.name: form
    for form in (
        ExportFormat("a3m", ".a3m", True),
        ExportFormat("a2m", ".a2m", True),
        ExportFormat("sto", ".sto", True),
        ExportFormat("colabfold", ".a3m", True),
        ExportFormat("openproteinset", "", False, is_folder=True),
        ExportFormat("openfold-db", "", False, is_database=True),
        ExportFormat("alphafold3-json", ".json", True),
        ExportFormat("boltz-npz", ".npz", False),
        ExportFormat("chai-pqt", ".aligned.pqt", False),
        ExportFormat("alphafold2-npz", ".npz", False, has_structure=True),
        ExportFormat("mmcif", ".cif", True, has_structure=True, has_alignment=False),
    )
}

_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": functools.partial(gzip.compress, mtime=0),
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(level=9).compress,
    ".bz2": bz2.compress,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What the user may choose about an export.

    Attributes:
      form: one of `EXPORT_FORMATS`.
      max_rows: most rows, in rank order; all when None.
      chai_source: what databases that Chai does not know count as, for ``chai-pqt``.
    """

    form: str
    max_rows: int | None = None
    chai_source: str | None = None

    def __post_init__(self) -> None:
        if self.form not in EXPORT_FORMATS:
            raise ValueError(f"format {self.form!r} is not one of {', '.join(EXPORT_FORMATS)}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows {self.max_rows} must be at least 1: the query is a row")
        if self.max_rows is not None and not EXPORT_FORMATS[self.form].has_alignment:
            raise ValueError(f"max_rows {self.max_rows} has no effect on {self.form}, which has no rows")
        if self.chai_source is not None and (self.form != "chai-pqt" or self.chai_source not in CHAI_SOURCES):
            raise ValueError(
                f"chai_source is one of {', '.join(CHAI_SOURCES)} and goes with the format chai-pqt only"
            )


def export_record(record: Record, options: ExportOptions) -> bytes:
    """Returns a record of a store in another program's format, one that is a single file.

    Raises:
      ExportError: the format cannot hold it.
      CorruptDataError: a tile does not match its checksum.
    """
    return render(_rows(record, options), options)


def export_database(folder: Path, records: Iterable[Record], options: ExportOptions) -> int:
    """Writes records as one database; returns how many files it holds.

    Raises:
      FileExistsError: the folder has one.
      ExportError: the format cannot hold a record; nothing is published.
      CorruptDataError: a tile does not match its checksum; nothing is published.
    """
    assert EXPORT_FORMATS[options.form].is_database, options.form
    return write_openfold_db(folder, (_rows(record, options) for record in records))


def export_files(record: Record, options: ExportOptions, suffix: str = "") -> dict[str, bytes]:
    """Returns the files of a record in another program's format, by path in the folder of the export.

    Args:
      record: of a store.
      options: of the export.
      suffix: of a compression, e.g. ``.gz``; `write_file` does it.
    Raises:
      ExportError: the format cannot hold it.
      CorruptDataError: a tile does not match its checksum.
    """
    name = file_name(record.record_id, record.sequence, options)
    if not EXPORT_FORMATS[options.form].is_folder:
        return {name + suffix: export_record(record, options)}
    files = to_openproteinset(_rows(record, options))
    return {f"{name}/{file}{suffix}": data for file, data in files.items()}


def _rows(record: Record, options: ExportOptions) -> ExportRows:
    form = EXPORT_FORMATS[options.form]
    max_rows = options.max_rows if form.has_alignment else 1
    return rows_of_record(record, max_rows, form.has_structure)


def render(rows: ExportRows, options: ExportOptions) -> bytes:
    """Returns rows in a format that is a single file.

    Raises:
      ExportError: the format cannot hold them.
    """
    form = EXPORT_FORMATS[options.form]
    assert not form.is_folder and not form.is_database, options.form  # noqa: PT018
    if options.form == "chai-pqt":
        return to_chai_pqt(rows, options.chai_source)
    writers: dict[str, Callable[[ExportRows], bytes]] = {
        "a3m": to_a3m,
        "a2m": to_a2m,
        "sto": to_stockholm,
        "colabfold": to_colabfold,
        "alphafold3-json": to_alphafold3_json,
        "boltz-npz": to_boltz_npz,
        "alphafold2-npz": to_alphafold2_npz,
        "mmcif": to_mmcif,
    }
    return writers[options.form](rows)


def file_name(record_id: str, sequence: str, options: ExportOptions, suffix: str = "") -> str:
    """Returns what a record's file is called: its id, or for Chai the name that Chai looks for.

    AlphaFold 2's features are always called ``features.npz``, in a folder that says whose they are.
    Two ids that differ only in characters that a file name cannot hold (``|`` and ``:``) would meet, so those
    characters become their code: ``a|b`` gives ``a%7Cb.a3m``.

    Args:
      record_id: of the record.
      sequence: of the record.
      options: of the export.
      suffix: of a compression, e.g. ``.gz``.
    """
    if options.form == "chai-pqt":
        return chai_file_name(sequence) + suffix
    safe = _NOT_IN_FILE_NAMES.sub(lambda found: f"%{ord(found[0]):02X}", record_id)
    if options.form == "alphafold2-npz":
        return f"{safe}/features.npz{suffix}"
    return safe + EXPORT_FORMATS[options.form].extension + suffix


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Publishes bytes under a name, whole; compressed when the name ends in .gz, .xz, .zst or .bz2.

    Args:
      path: local path.
      data: of the file.
    Raises:
      StorageFullError: no space left; the name is unchanged.
      OSError: it cannot be written.
    """
    target = Path(path)
    compress = _COMPRESSORS.get(target.suffix.lower())
    open_blobs(target.parent).write_atomic(target.name, compress(data) if compress is not None else data)
