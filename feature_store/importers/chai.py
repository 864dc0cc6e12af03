"""Chai's aligned Parquet (``.aligned.pqt``): one row per sequence, with its database.

``sequence`` is a row of A3M, ``source_database`` one of query, uniref90, mgnify, uniprot, bfd_uniclust,
...; ``comment`` begins with the name of the hit. The first row is the query. Each source becomes a database
of the record, in the order of first appearance, and rows keep the order of the file. A ``pairing_key`` that
is no number counts as the row's species where the name of the hit has none and 8 bytes hold it; every other
is kept as the row's pairing key, valid among the files of one folder, which is the ``assembly`` in the
records' ``extra``.

The record of a file that Chai named by a digest is called by the ``comment`` of its query, if that can be
an id.

The columns are read as dictionaries, so a file that repeats one long value a million times stays small, and
what they would unpack to is counted before anything does.

Source: Chai-1 ``data/parsing/msas/aligned_pqt.py``, ``data_source.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foldfeed.feature_store.errors import AlignmentParseError, FoldfeedError
from foldfeed.feature_store.exchange_errors import SourceFileError, SourceTooLargeError
from foldfeed.feature_store.format.columns import ASSEMBLY
from foldfeed.feature_store.format.record import RECORD_ID, MsaRecord
from foldfeed.feature_store.importers.rows import (
    DatabaseRows,
    ImportOptions,
    build_labelled_record,
    check_depth,
)
from foldfeed.feature_store.importers.sources import (
    Found,
    Reject,
    name_of_file,
    relative,
    source_of,
    walk_files,
)
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.feature_store.parsers.bounded_files import read_file
from foldfeed.feature_store.parsers.conventions import CHAI_QUERY
from foldfeed.feature_store.parsers.hit_names import (
    first_word,
    fit_pairing_key,
    fit_species,
    species_of,
)
from foldfeed.feature_store.storage.arrow_file import arrow_file

COLUMNS = ("sequence", "source_database", "pairing_key", "comment")
# How Chai calls the file of a sequence.
_DIGEST = re.compile(r"[0-9a-f]{64}")
SUFFIXES = (".pqt", ".parquet")
MAX_DATABASES = 1000


def scan_chai(root: Path, options: ImportOptions) -> Found:
    """Yields one source per Parquet file at or below ``root``."""
    for path in walk_files(root, SUFFIXES):
        where = relative(path, root)
        try:
            name = name_of_file(path, options).removesuffix(".aligned")
            if options.id_from == "auto" and _DIGEST.fullmatch(name):
                name = _name_of_query(path, where, options) or name
        except (FoldfeedError, OSError) as error:
            yield Reject("", where, str(error))
            continue
        yield source_of(name, where, functools.partial(_read, path, where, options))


def _read(path: Path, where: str, options: ImportOptions, record_id: str) -> MsaRecord:
    table = read_columns(read_file(path, options.max_bytes), where, options.max_bytes)
    labels = table["source_database"]
    if len(set(labels[1:])) > MAX_DATABASES:
        raise SourceFileError(where, f"it names more than {MAX_DATABASES} databases")
    rows = rows_of_chai(table, where)
    return build_labelled_record(
        record_id,
        rows,
        labels,
        drop_repeats=options.dedup == "rows",
        max_hits=options.max_hits,
        extra=_facts(path, where, rows),
    )


def _name_of_query(path: Path, where: str, options: ImportOptions) -> str:
    """Returns what the first row says it is called; Chai names files by a digest of the sequence."""
    try:
        file = pq.ParquetFile(path)
        _check_claims(file, where, options.max_bytes)
        batch = next(file.iter_batches(batch_size=1, columns=["comment"], use_threads=False), None)
        comment = batch.column(0)[0].as_py() if batch is not None and len(batch) else None
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise SourceFileError(where, f"it is no Parquet file with texts ({str(error)[:200]})") from error
    name = first_word(comment) if isinstance(comment, str) else ""
    return name if RECORD_ID.fullmatch(name) else ""


def _facts(path: Path, where: str, rows: DatabaseRows) -> dict[str, str]:
    facts = {"source": where, "source_format": "chai-pqt"}
    return facts | {ASSEMBLY: path.resolve().parent.name} if rows.pairing_keys else facts


def rows_of_chai(table: dict[str, list[str]], where: str) -> DatabaseRows:
    """Returns the rows of Chai's columns, the query first.

    Args:
      table: as `read_columns` returns it.
      where: for messages.
    Raises:
      SourceFileError: no rows, or the first is not the query.
      AlignmentParseError: a sequence is no row of A3M.
    """
    sequences = table["sequence"]
    if (
        not sequences
        or table["source_database"][0] != CHAI_QUERY
        or CHAI_QUERY in table["source_database"][1:]
    ):
        raise SourceFileError(where, "its first row, and no other, must have the source_database 'query'")
    alignment = parse_a3m(b"".join(b">r\n%s\n" % row.encode("utf-8", errors="replace") for row in sequences))
    if len(alignment.names) != len(sequences):
        raise AlignmentParseError("a sequence holds line breaks and '>'")
    hit_ids = [first_word(comment) for comment in table["comment"]]
    species = [
        species_of(hit_id) or ("" if key.isdecimal() else fit_species(key))
        for hit_id, key in zip(hit_ids, table["pairing_key"], strict=True)
    ]
    keys = [
        "" if key == name else fit_pairing_key(key)
        for key, name in zip(table["pairing_key"], species, strict=True)
    ]
    return DatabaseRows(
        name="chai",
        alignment=dataclasses.replace(alignment, names=table["comment"]),
        hit_ids=hit_ids,
        e_values=np.full(len(hit_ids), np.nan),
        bit_scores=np.full(len(hit_ids), np.nan, dtype=np.float32),
        species=species,
        pairing_keys=keys if any(keys) else (),
    )


def read_columns(data: bytes, where: str, max_bytes: int) -> dict[str, list[str]]:
    """Returns the text columns of a Parquet file by name.

    Raises:
      SourceTooLargeError: they would hold more than the limit.
      SourceFileError: not Parquet, a column missing, or one that is no text.
    """
    try:
        source = arrow_file(data)
        _check_claims(pq.ParquetFile(source), where, max_bytes)
        file = pq.ParquetFile(source, read_dictionary=list(COLUMNS))
        table = file.read(columns=list(COLUMNS), use_threads=False)
        return {name: _texts(table, name, where, max_bytes) for name in COLUMNS}
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise SourceFileError(
            where, f"it is no Parquet file with columns of text ({str(error)[:200]})"
        ) from error


def _check_claims(file: pq.ParquetFile, where: str, max_bytes: int) -> None:
    names = file.schema_arrow.names
    missing = [name for name in COLUMNS if names.count(name) != 1]
    if missing:
        raise SourceFileError(
            where, f"it has no column {missing[0]!r} (or several), only {', '.join(names[:20])}"
        )
    check_depth(file.metadata.num_rows, where)
    claimed = sum(
        file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups)
    )
    if claimed > max_bytes:
        raise SourceTooLargeError(
            where,
            f"it holds more than {max_bytes} bytes (decompressed); raise the limit if that is what you "
            "expect",
        )


def _texts(table: pa.Table, name: str, where: str, max_bytes: int) -> list[str]:
    column = table[name]
    kind = column.type
    if not pa.types.is_dictionary(kind) or not (
        pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
    ):
        raise SourceFileError(where, f"column {name!r} is {kind}, not text")
    if column.null_count:
        raise SourceFileError(where, f"column {name!r} has empty cells")
    values: list[str] = []
    total = 0
    for chunk in column.chunks:
        # Damaged pages may hold codes without a word, or words that are no text.
        chunk.validate(full=True)
        words = chunk.dictionary.to_pylist()
        codes = chunk.indices.to_numpy()
        sizes = np.array([len(word or "") for word in words], dtype=np.int64)
        total += int(sizes[codes].sum()) if len(codes) else 0
        if total > max_bytes:
            raise SourceTooLargeError(where, f"column {name!r} unpacks to more than {max_bytes} characters")
        values.extend(words[code] for code in codes.tolist())
    return values
