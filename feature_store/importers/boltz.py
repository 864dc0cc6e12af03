"""Boltz's alignments: processed, ``.npz`` with ``sequences``, ``deletions`` and ``residues``; and CSV.

A CSV has the columns ``key`` and ``sequence`` (a row of A3M). Equal keys of different chains are a pair and
become the `RowProvenance.pairing_key` of their rows, valid among the files ``TARGET_0.csv``,
``TARGET_1.csv``, ... of one target, which is the ``assembly`` in the records' ``extra``.

In an ``.npz`` rows lie end to end in ``residues``; ``deletions`` lists (column, count) of the cells that
have any. Boltz keeps no names and no databases; its taxonomy id (an NCBI number) is kept as the species of
the row, as digits, which no UniProt mnemonic is. Boltz itself dropped rows with equal ungapped sequences
and cut at 16,384 rows when it wrote the file.

Source: Boltz ``data/types.py`` MSA, ``data/const.py`` tokens, ``data/parse/a3m.py``, ``data/parse/csv.py``.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import AlignmentParseError, FoldfeedError
from foldfeed.feature_store.exchange_errors import SourceFileError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.columns import ASSEMBLY
from foldfeed.feature_store.format.record import MAX_RESIDUES, MsaRecord
from foldfeed.feature_store.importers.rows import (
    MAX_IMPORT_ROWS,
    DatabaseRows,
    ImportOptions,
    build_record,
    check_depth,
    rows_of,
)
from foldfeed.feature_store.importers.sources import (
    Found,
    Reject,
    name_of_file,
    relative,
    source_of,
    walk_files,
)
from foldfeed.feature_store.parsers.a3m import Row, alignment_of, shown
from foldfeed.feature_store.parsers.alignment import ParsedAlignment
from foldfeed.feature_store.parsers.bounded_files import read_blocks, read_file, read_head, stem_of
from foldfeed.feature_store.parsers.conventions import FIRST_RESIDUE_TOKEN, GAP_TOKEN, UNKNOWN_TOKEN
from foldfeed.feature_store.parsers.hit_names import fit_species
from foldfeed.feature_store.parsers.lines import lines_of
from foldfeed.feature_store.parsers.npz import NpzFile

CSV_COLUMNS = ["key", "sequence"]
ARRAYS = ("sequences", "deletions", "residues")

LETTER_OF_TOKEN = np.zeros(256, dtype=np.uint8)
LETTER_OF_TOKEN[GAP_TOKEN] = ord("-")
LETTER_OF_TOKEN[FIRST_RESIDUE_TOKEN:UNKNOWN_TOKEN] = np.frombuffer(alphabet.RESIDUES.encode(), dtype=np.uint8)
LETTER_OF_TOKEN[UNKNOWN_TOKEN] = ord("X")

_NUMBERED = re.compile(r"(.+)_\d+")
_FIELDS = {
    "sequences": ("res_start", "res_end", "del_start", "del_end"),
    "deletions": ("res_idx", "deletion"),
    "residues": ("res_type",),
}


def scan_boltz(root: Path, options: ImportOptions) -> Found:
    """Yields one source per ``.npz`` at or below ``root``."""
    for path in walk_files(root, (".npz",)):
        where = relative(path, root)
        try:
            name = name_of_file(path, options)
        except (FoldfeedError, OSError) as error:
            yield Reject("", where, str(error))
            continue
        yield source_of(name, where, functools.partial(_read, path, where, options))


def _read(path: Path, where: str, options: ImportOptions, record_id: str) -> MsaRecord:
    archive = NpzFile(read_file(path, options.max_bytes), where, options.max_bytes)
    rows = rows_of_boltz({name: archive[name] for name in ARRAYS}, where)
    return build_record(
        record_id,
        [rows],
        drop_repeats=options.dedup == "rows",
        max_hits=options.max_hits,
        extra={"source": where, "source_format": "boltz-npz"},
    )


def rows_of_boltz(arrays: dict[str, NDArray[Any]], where: str) -> DatabaseRows:
    """Returns the rows in Boltz's arrays.

    Args:
      arrays: structured arrays by name: ``sequences`` (rows,), ``deletions`` (cells,), ``residues``
        (tokens,).
      where: for messages.
    Raises:
      SourceFileError: they do not fit together, or hold what is no protein.
    """
    for name, fields in _FIELDS.items():
        names = arrays[name].dtype.names or ()
        if arrays[name].ndim != 1 or any(
            field not in names
            or arrays[name].dtype[field].kind not in "iu"
            or arrays[name].dtype[field].shape
            for field in fields
        ):
            raise SourceFileError(
                where, f"array {name!r} must be a list of records with integers {', '.join(fields)}"
            )
    check_depth(len(arrays["sequences"]), where)
    table = {field: arrays["sequences"][field].astype(np.int64) for field in _FIELDS["sequences"]}
    tokens = arrays["residues"]["res_type"]
    starts, lengths = table["res_start"], table["res_end"] - table["res_start"]
    if not len(starts) or (lengths != lengths[0]).any() or not 1 <= lengths[0] <= MAX_RESIDUES:
        raise SourceFileError(
            where, f"its rows must be there and all as long as the query (1 to {MAX_RESIDUES})"
        )
    _check_inside("residues", starts, table["res_end"], len(tokens), where)
    # Rows may share residues; without this a small file could stand for a huge alignment.
    if int(lengths.sum()) > len(tokens):
        raise SourceFileError(where, "its rows overlap")
    columns = np.arange(int(lengths[0]))
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < 256:
        raise SourceFileError(where, "residues hold tokens outside of Boltz's alphabet")
    letters = LETTER_OF_TOKEN[tokens[starts[:, None] + columns]]
    if not letters.all():
        raise SourceFileError(
            where, "residues hold tokens that are no amino acid, X or gap (RNA, DNA or padding)"
        )
    deletions = _deletions(arrays["deletions"], table, letters.shape, where)
    depth = len(letters)
    return DatabaseRows(
        name="boltz",
        alignment=ParsedAlignment.dense([""] * depth, letters, deletions),
        hit_ids=[""] * depth,
        e_values=np.full(depth, np.nan),
        bit_scores=np.full(depth, np.nan, dtype=np.float32),
        species=_species(arrays["sequences"]),
    )


def _species(sequences: NDArray[Any]) -> list[str]:
    if "taxonomy" not in (sequences.dtype.names or ()):
        return [""] * len(sequences)
    taxonomy = sequences["taxonomy"]
    if taxonomy.ndim != 1 or taxonomy.dtype.kind not in "iu":
        return [""] * len(sequences)
    return [fit_species(str(number)) if number >= 0 else "" for number in taxonomy.tolist()]


def _check_inside(
    name: str, starts: NDArray[np.int64], ends: NDArray[np.int64], size: int, where: str
) -> None:
    if (starts < 0).any() or (ends < starts).any() or (ends > size).any():
        raise SourceFileError(where, f"a row refers to {name} outside of 0 to {size}")


def _deletions(
    cells: NDArray[Any], table: dict[str, NDArray[np.int64]], shape: tuple[int, ...], where: str
) -> NDArray[np.int32]:
    starts, ends = table["del_start"], table["del_end"]
    _check_inside("deletions", starts, ends, len(cells), where)
    counts = ends - starts
    if int(counts.sum()) > len(cells):
        raise SourceFileError(where, "the deletions of its rows overlap")
    rows = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = cells[np.repeat(starts, counts) + within]
    columns, values = chosen["res_idx"].astype(np.int64), chosen["deletion"].astype(np.int64)
    if len(rows) and (
        int(columns.min()) < 0
        or int(columns.max()) >= shape[1]
        or int(values.min()) < 0
        or int(values.max()) >= 2**31
    ):
        raise SourceFileError(where, "a deletion lies outside of its row or has an impossible count")
    deletions = np.zeros(shape, dtype=np.int32)
    deletions[rows, columns] = values
    return deletions


def is_boltz_csv(head: bytes) -> bool:
    """Returns whether a text begins with the two columns of Boltz's CSV, in any order."""
    first = head.removeprefix(b"\xef\xbb\xbf").partition(b"\n")[0].decode("utf-8", errors="replace")
    return sorted(name.strip().strip('"') for name in first.split(",")) == CSV_COLUMNS


def scan_boltz_csv(root: Path, options: ImportOptions) -> Found:
    """Yields one source per CSV file at or below ``root``."""
    for path in walk_files(root, (".csv",)):
        where = relative(path, root)
        try:
            if path != root and not is_boltz_csv(read_head(path, 4096)):
                continue
            name = name_of_file(path, options)
        except (FoldfeedError, OSError) as error:
            yield Reject("", where, str(error))
            continue
        folder = path.resolve().parent
        numbered = _NUMBERED.fullmatch(stem_of(path))
        # Boltz writes TARGET_0.csv, TARGET_1.csv; other names say nothing, but their folder does.
        assembly = numbered[1] if numbered else folder.name
        if folder != root.resolve() and root.is_dir():
            assembly = f"{folder.relative_to(root.resolve()).as_posix()}/{assembly}"
        yield source_of(name, where, functools.partial(_read_boltz_csv, path, where, assembly, options))


def _read_boltz_csv(
    path: Path, where: str, assembly: str, options: ImportOptions, record_id: str
) -> MsaRecord:
    keys: list[str] = []
    alignment = alignment_of(_csv_rows(path, where, keys, options), MAX_IMPORT_ROWS)
    return build_record(
        record_id,
        [rows_of("boltz", alignment, pairing_keys=keys)],
        drop_repeats=options.dedup == "rows",
        max_hits=options.max_hits,
        extra={"source": where, "source_format": "boltz-csv", ASSEMBLY: assembly},
    )


def _csv_rows(path: Path, where: str, keys: list[str], options: ImportOptions) -> Iterator[Row]:
    lines = (
        line.decode("utf-8", errors="replace") for _, line in lines_of(read_blocks(path, options.max_bytes))
    )
    table = csv.reader(lines)
    try:
        columns = [name.strip() for name in next(table, [])]
        if sorted(columns) != CSV_COLUMNS:
            raise SourceFileError(
                where, f"its columns must be key and sequence, not {', '.join(columns)[:200]}"
            )
        key, sequence = columns.index("key"), columns.index("sequence")
        for cells in table:
            if len(cells) == 0 or (len(cells) == 2 and not cells[sequence].strip()):
                continue
            if len(cells) != 2:
                raise AlignmentParseError(f"it has {len(cells)} cells, not 2", table.line_num)
            keys.append(_pairing_key(cells[key], table.line_num))
            yield "", cells[sequence].strip().encode("utf-8"), table.line_num
    except csv.Error as error:
        raise AlignmentParseError(f"it is no CSV ({error})", table.line_num) from error


def _pairing_key(text: str, line: int) -> str:
    """Returns a row's key, "" where it has none; 7.0 is 7, as pandas writes it beside empty cells."""
    text = text.strip()
    if text.lower() in ("", "nan", "-1", "-1.0"):
        return ""
    number = text.removesuffix(".0")
    if not number.isdecimal() or not number.isascii() or len(number) > 20:
        raise AlignmentParseError(f"key {shown(text)} is no whole number; -1 is a row without partners", line)
    return number
