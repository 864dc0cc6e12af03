"""Which files an MMseqs2 database has, and what of it can be searched here.

Owns the checks on disk, the counts, and reading the entries of small tables. Does not own searching
(`tools.mmseqs`). Invariant: the files that are returned are all that a search reads, so equal
files give equal answers.

A database is one of sequences, or one of clusters as ColabFold prepares them (``mmseqs tsv2exprofiledb``):

    DB, DB_h            consensus of every cluster, what is searched; the names of all sequences
    DB_seq, DB_seq_h    all sequences, what the answer is made of
    DB_aln              how the sequences of a cluster align with its consensus
    DB.idx              where it was indexed (``mmseqs createindex``), all of these once more but for names

Source: MMseqs2 user guide, "MMseqs2 database format"; ``src/commons/Parameters.h`` (types of databases);
``data/workflow/tsv2exprofiledb.sh``; ColabFold ``setup_databases.sh``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from foldfeed.pipelines.errors import DatabaseError

NAME = "mmseqs2"

# A FASTA file is made a database in the folder of every search, 2.2 s for one of 257 MiB where it was
# measured (two shared cores). Larger ones are made a database once, by hand.
MAX_FASTA_BYTES = 256 << 20

_AMINO_ACIDS = 0
_ALIGNMENTS = 5
# Set where the entries are compressed, which the tool reads as it does others.
_COMPRESSED = 1 << 31
MEMBERS, ALIGNMENTS, INDEX = "_seq", "_aln", ".idx"
# What a database may consist of, beside its name.
TABLES = ("", "_h", MEMBERS, f"{MEMBERS}_h", ALIGNMENTS, INDEX)


def is_database(path: str) -> bool:
    """Returns whether a path is that of an MMseqs2 database."""
    return os.path.exists(f"{path}.dbtype")


def has_clusters(path: str) -> bool:
    """Returns whether a database is one of clusters; half of one counts, and `mmseqs_files` refuses it."""
    return any(os.path.exists(f"{path}{ending}.dbtype") for ending in (MEMBERS, ALIGNMENTS))


def has_index(path: str) -> bool:
    """Returns whether a database was indexed."""
    return os.path.exists(f"{path}{INDEX}.dbtype")


def mmseqs_files(name: str, path: str) -> tuple[str, ...]:
    """Returns the files of a database that a search reads, an index of its words (``.idx``) among them.

    Raises:
      DatabaseError: missing, empty, cut, or no database of proteins.
    """
    parts = _parts(name, path) + _parts(name, f"{path}_h")
    _require_kind(name, path, _AMINO_ACIDS, "it holds no protein sequences")
    if has_clusters(path):
        for ending in (MEMBERS, ALIGNMENTS):
            if not os.path.exists(f"{path}{ending}.dbtype"):
                raise DatabaseError(
                    name,
                    path,
                    f"{f'{path}{ending}.dbtype'!r} does not exist: of a database of clusters, as ColabFold "
                    "prepares them, both DB_seq and DB_aln must be there",
                )
            parts += _parts(name, path + ending)
        parts += _parts(name, f"{path}{MEMBERS}_h")
        _require_kind(name, path + MEMBERS, _AMINO_ACIDS, "it holds no protein sequences")
        _require_kind(name, path + ALIGNMENTS, _ALIGNMENTS, "it holds no alignments")
    if has_index(path):
        parts += _parts(name, path + INDEX)
        # Of few entries; of the others `count_mmseqs` says it, which reads whole indexes anyway.
        _require_whole(name, path + INDEX)
    return tuple(parts)


def check_fasta_size(name: str, path: str) -> None:
    """Returns if a FASTA file is small enough to become a database in every search.

    Raises:
      DatabaseError: it is not; the message names the command.
    """
    size = os.path.getsize(path)
    if size > MAX_FASTA_BYTES:
        raise DatabaseError(
            name,
            path,
            f"MMseqs2 would make a database of its {size} bytes in every search (at most {MAX_FASTA_BYTES}); "
            f"run `mmseqs createdb {path} DB --dbtype 1` once and give {name}=DB:{NAME}",
        )


def count_mmseqs(name: str, path: str) -> tuple[int, int]:
    """Returns sequences and residues, of all members in a database of clusters.

    An entry's length counts its line break and its NUL byte.

    Raises:
      DatabaseError: an index is no index, or tells of more than its data hold.
    """
    if has_clusters(path):
        for table in (path, path + ALIGNMENTS):
            _require_whole(name, table)
        path += MEMBERS
    num_sequences, num_bytes = _require_whole(name, path)
    return num_sequences, num_bytes - 2 * num_sequences


def read_entries(path: Path) -> dict[int, bytes] | None:
    """Returns the entries of a table by key, each with its NUL byte, or None if that is not what is there.

    Every byte of the data must belong to exactly one entry, and every entry must end with a NUL byte: a table
    that was cut has neither.
    """
    index = path.with_name(f"{path.name}.index")
    data = b"".join(Path(file).read_bytes() for file in _data_files(str(path)) if os.path.exists(file))
    lines = index.read_bytes().splitlines() if index.exists() else []
    try:
        rows = sorted((int(start), int(length), int(key)) for key, start, length in map(bytes.split, lines))
    except ValueError:
        return None
    end, found = 0, {}
    for start, length, key in rows:
        entry = data[start : start + length]
        if start != end or not entry.endswith(b"\0") or key in found:
            return None
        end, found[key] = start + length, entry
    return found if end == len(data) else None


def write_entries(path: Path, entries: Sequence[bytes], kind: bytes) -> None:
    """Writes a table with the keys 0, 1, ...

    Args:
      path: of its data.
      entries: each with its NUL byte.
      kind: the bytes of its ``.dbtype``.
    """
    path.write_bytes(b"".join(entries))
    lines, start = [], 0
    for key, entry in enumerate(entries):
        lines.append(f"{key}\t{start}\t{len(entry)}\n")
        start += len(entry)
    path.with_name(f"{path.name}.index").write_text("".join(lines), encoding="ascii")
    path.with_name(f"{path.name}.dbtype").write_bytes(kind)


def _require_kind(name: str, path: str, wanted: int, otherwise: str) -> None:
    kind = int.from_bytes(Path(f"{path}.dbtype").read_bytes()[:4], "little") & ~_COMPRESSED
    if kind != wanted:
        raise DatabaseError(name, path, f"its type is {kind}, not {wanted}: {otherwise}")


def _require_whole(name: str, path: str) -> tuple[int, int]:
    """Returns entries of a table and their bytes as the index tells them, which the data must hold.

    Raises:
      DatabaseError: they do not, or a line is no entry of an index.
    """
    kind = int.from_bytes(Path(f"{path}.dbtype").read_bytes()[:4], "little")
    num_entries = num_bytes = end = 0
    with open(f"{path}.index", "rb") as file:
        for number, line in enumerate(file, start=1):
            words = line.split(b"\t")
            if len(words) != 3 or not all(word.strip().isdigit() for word in words):
                raise DatabaseError(
                    name, f"{path}.index", f"line {number} is no entry of an index: key, start, length"
                )
            num_entries += 1
            num_bytes += int(words[2])
            # Of a compressed entry the index tells the length that it has unpacked.
            end = max(end, int(words[1]) + (1 if kind & _COMPRESSED else int(words[2])))
    there = sum(map(os.path.getsize, _data_files(path)))
    if end > there:
        raise DatabaseError(
            name,
            path,
            f"its index tells of {end} bytes or more, but it has {there}: it was cut; copy it again",
        )
    return num_entries, num_bytes


def _data_files(path: str) -> list[str]:
    """Returns the data of one table, whole or in numbered parts; the path itself where there are none."""
    data = [path] if os.path.exists(path) else []
    while not os.path.exists(path) and os.path.exists(f"{path}.{len(data)}"):
        data.append(f"{path}.{len(data)}")
    return data or [path]


def _parts(name: str, path: str) -> list[str]:
    """Returns the files of one table: its data, whole or in numbered parts, its index and its type."""
    files = [*_data_files(path), f"{path}.index", f"{path}.dbtype"]
    for file in files:
        if not os.path.exists(file):
            raise DatabaseError(name, path, f"no MMseqs2 database: {file!r} does not exist")
        if not os.path.isfile(file) or not os.access(file, os.R_OK):
            raise DatabaseError(name, file, "it is not a readable file")
        if os.path.getsize(file) == 0:
            raise DatabaseError(name, path, f"{os.path.basename(file)!r} is empty")
    return files
