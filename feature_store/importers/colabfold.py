"""ColabFold's alignments of several chains: its merged A3M, and the raw files of an MSA server.

    x.a3m with '#110,85<tab>1,1'             records x_101, x_102: their own rows, and their parts of the
                                             paired ones
    JOB/uniref.a3m, bfd....a3m, pair.a3m     sections of several chains, divided by NUL bytes

Rows of different chains that the program paired get a common `RowProvenance.pairing_key`, the number of
their row, valid among records whose ``extra`` says the same ``assembly``. Paired rows come first, and no row
is dropped as a repetition unless `ImportOptions.dedup` says ``rows``. Does not own how rows become a record
(`rows`).

Source: ColabFold ``colabfold/batch.py`` msa_to_str, unserialize_msa; Boltz ``data/msa/mmseqs2.py``.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import AlignmentParseError, FoldfeedError
from foldfeed.feature_store.exchange_errors import SourceFileError, UnsupportedSourceError
from foldfeed.feature_store.format.columns import ASSEMBLY
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.importers.rows import (
    MAX_IMPORT_ROWS,
    DatabaseRows,
    ImportOptions,
    build_labelled_record,
    build_record,
    rows_of,
)
from foldfeed.feature_store.importers.sources import (
    Found,
    Reject,
    names_of_folders,
    plain_name,
    relative,
    source_of,
    walk_folders,
)
from foldfeed.feature_store.importers.texts import first_header, head_of
from foldfeed.feature_store.parsers.a3m import Row, a3m_rows, alignment_of, parse_a3m, shown
from foldfeed.feature_store.parsers.alignment import ParsedAlignment
from foldfeed.feature_store.parsers.bounded_files import kind_of, read_blocks, read_head, stem_of
from foldfeed.feature_store.parsers.conventions import PAIRED
from foldfeed.feature_store.parsers.hit_names import first_word, make_id

SERVER_FIRST, SERVER_PAIRED = "uniref", "pair"

# ColabFold numbers chains from here where the query has no names of its own.
_FIRST_CHAIN = 101
_MAX_CHAINS = 10_000


def is_server_folder(names: Iterable[str]) -> bool:
    """Returns whether names of files, without a compression's extension, are those of an MSA server."""
    return not {f"{SERVER_FIRST}.a3m", f"{SERVER_PAIRED}.a3m"}.isdisjoint(names)


def merged_chains(path: Path, where: str, name: str, lengths: list[int], options: ImportOptions) -> Found:
    """Yields one source per chain of a merged A3M.

    Args:
      path: the file.
      where: for messages.
      name: of the complex; a chain's record is called by it and the chain's number.
      lengths: of its chains, from the first line.
      options: of the import.
    """
    header = first_header(read_head(path), "a3m").split()
    numbers = [str(_FIRST_CHAIN + number) for number in range(len(lengths))]
    chains = header if len(header) == len(lengths) == len(set(header)) else numbers
    for number, chain in enumerate(chains):
        full = f"{name}_{chain}"
        read = functools.partial(_read_merged, path, where, name, number, chains, lengths, options)
        yield source_of(full, f"{where}:{chain}", read)


def _read_merged(
    path: Path,
    where: str,
    assembly: str,
    number: int,
    chains: list[str],
    lengths: list[int],
    options: ImportOptions,
    record_id: str,
) -> MsaRecord:
    edges = np.cumsum([0, *lengths])
    text = (block.replace(b"\0", b"") for block in read_blocks(path, options.max_bytes))
    keys: list[str] = []
    rows = _rows_of_chain(a3m_rows(text), edges, number, chains[number], keys)
    alignment = alignment_of(rows, MAX_IMPORT_ROWS)
    found = rows_of("colabfold", alignment, pairing_keys=keys)
    return build_labelled_record(
        record_id,
        found,
        [PAIRED if key else "colabfold" for key in keys],
        drop_repeats=options.dedup == "rows",
        max_hits=options.max_hits,
        extra={"source": f"{where}:{chains[number]}", "source_format": "colabfold", ASSEMBLY: assembly},
    )


def _rows_of_chain(
    rows: Iterable[Row], edges: NDArray[np.int64], number: int, chain: str, keys: list[str]
) -> Iterator[Row]:
    """Yields the rows that have a residue in one chain, cut to it; adds the key of each to ``keys``."""
    query: bytes | None = None
    for place, (header, row, line) in enumerate(rows):
        cuts = _cuts(row, edges, line)
        parts = [row[start:stop] for start, stop in itertools.pairwise(cuts)]
        present = [any(letter.isupper() for letter in part.decode("latin-1")) for part in parts]
        if query is None and not all(present):
            raise AlignmentParseError("the first row (the query) must have residues in every chain", line)
        is_paired = place > 0 and sum(present) > 1
        # Before a chain's own rows ColabFold puts its query once more.
        if not present[number] or (place and not is_paired and parts[number] == query):
            continue
        query = query or parts[number]
        keys.append(str(place) if is_paired else "")
        yield (
            (_header_of(header, len(parts), number) if is_paired else header if place else chain),
            (parts[number]),
            line,
        )


def _cuts(row: bytes, edges: NDArray[np.int64], line: int) -> list[int]:
    """Returns where in a row its chains begin and end; insertions belong to the column right of them."""
    width = int(edges[-1])
    if len(row) == width and row.isupper() and b"." not in row:
        return edges.tolist()
    characters = np.frombuffer(row, dtype=np.uint8)
    is_column = ((characters >= ord("A")) & (characters <= ord("Z"))) | (characters == ord("-"))
    ends = np.flatnonzero(is_column) + 1
    if len(ends) != width:
        raise AlignmentParseError(
            f"the row has {len(ends)} columns (upper case and '-'), the first line announces {width}", line
        )
    return [0, *ends[edges[1:] - 1].tolist()]


def _header_of(header: str, num_chains: int, number: int) -> str:
    """Returns the part of a paired row's header that belongs to a chain; all of it when it has no parts."""
    fields = header.split("\t")
    if len(fields) % num_chains:
        return header
    size = len(fields) // num_chains
    return "\t".join(fields[number * size : (number + 1) * size])


def scan_server(root: Path, options: ImportOptions) -> Found:
    """Yields one source per chain of the folders at or below ``root`` that hold an MSA server's files."""
    folders = [
        (folder, names) for folder, names in walk_folders(root) if is_server_folder(map(plain_name, names))
    ]
    for name, (folder, names) in zip(
        names_of_folders([folder for folder, _ in folders]), folders, strict=True
    ):
        where = relative(folder, root)
        try:
            files = _server_files(folder, names, options)
            chains = list(
                dict.fromkeys(itertools.chain(*(_section_ids(path, options) for path in files.values())))
            )
        except (FoldfeedError, OSError) as error:
            yield Reject(make_id(name), where, str(error))
            continue
        left_out = (
            () if options.paired or f"{SERVER_PAIRED}.a3m" not in map(plain_name, names) else (SERVER_PAIRED,)
        )
        for chain in chains:
            full = name if len(chains) == 1 else f"{name}_{chain}"
            read = functools.partial(_read_server, files, where, name, chain, options)
            yield source_of(full, f"{where}:{chain}", read, left_out)


def _server_files(folder: Path, names: list[str], options: ImportOptions) -> dict[str, Path]:
    """Returns the files to read by database: the paired first, uniref, then the others by name."""
    known = {stem_of(Path(name)): folder / name for name in names if kind_of(Path(name))[1] == ".a3m"}
    if options.databases:
        missing = [name for name in options.databases if name not in known]
        if missing:
            raise UnsupportedSourceError(f"it has no {missing[0]!r}, only {', '.join(sorted(known))}")
        return {name: known[name] for name in options.databases}
    order = sorted(known, key=lambda name: (name != SERVER_PAIRED, name != SERVER_FIRST, name))
    usable = [name for name in order if options.paired or name != SERVER_PAIRED]
    if not usable:
        raise UnsupportedSourceError(
            f"it has only {SERVER_PAIRED}.a3m, which the option for paired rows takes"
        )
    return {name: known[name] for name in usable}


def _sections(path: Path, options: ImportOptions) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yields id and text of each section of a server's file, in order; none is held as a whole."""

    def pieces() -> Iterator[tuple[int, bytes]]:
        number = 0
        for block in read_blocks(path, options.max_bytes):
            first, *others = block.split(b"\0")
            yield number, first
            for piece in others:
                number += 1
                yield number, piece

    for _, group in itertools.groupby(pieces(), key=lambda piece: piece[0]):
        head, blocks = head_of(piece for _, piece in group)
        if head.strip():
            yield first_word(first_header(head, "a3m")), blocks


def _section_ids(path: Path, options: ImportOptions) -> list[str]:
    found = [chain for chain, _ in _sections(path, options)]
    if len(found) > _MAX_CHAINS:
        raise SourceFileError(path.name, f"it has more than {_MAX_CHAINS} sections")
    twice = [chain for chain, times in Counter(found).items() if times > 1 or not chain]
    if twice:
        raise SourceFileError(path.name, f"section {shown(twice[0])} is there twice or has no name")
    return found


def _read_server(
    files: dict[str, Path], where: str, assembly: str, chain: str, options: ImportOptions, record_id: str
) -> MsaRecord:
    databases = []
    for name, path in files.items():
        for found, blocks in _sections(path, options):
            if found != chain:
                continue
            try:
                alignment = parse_a3m(blocks, MAX_IMPORT_ROWS)
            except AlignmentParseError as error:
                raise SourceFileError(f"{path.name}, section {shown(chain)}", str(error)) from error
            databases.append(_paired_rows(alignment) if name == SERVER_PAIRED else rows_of(name, alignment))
    return build_record(
        record_id,
        databases,
        drop_repeats=options.dedup == "rows",
        keep_query_rows=False,
        max_hits=options.max_hits,
        extra={"source": f"{where}:{chain}", "source_format": "msa-server", ASSEMBLY: assembly},
    )


def _paired_rows(alignment: ParsedAlignment) -> DatabaseRows:
    """Returns the rows of a paired section: row i belongs to row i of the others; rows of gaps go."""
    kept = np.flatnonzero((alignment.letters != ord("-")).any(axis=1))
    keys = [str(row) if row else "" for row in kept.tolist()]
    return rows_of(PAIRED, alignment.take(kept), pairing_keys=keys)
