"""Which files an MMseqs2 database has, and what of it can be searched here.

Owns the checks on disk and the counts. Does not own searching (`foldfeed.pipelines.mmseqs`). Invariant: the
files that are returned are all that a search reads, so equal files give equal answers.

Source: MMseqs2 user guide, "MMseqs2 database format"; ``src/commons/Parameters.h`` (types of databases).
"""

from __future__ import annotations

import os
from pathlib import Path

from foldfeed.pipelines.errors import DatabaseError

NAME = "mmseqs2"

# A FASTA file is made a database in the folder of every search, 2.2 s for one of 257 MiB where it was
# measured (two shared cores). Larger ones are made a database once, by hand.
MAX_FASTA_BYTES = 256 << 20

_AMINO_ACIDS = 0
# Set where the entries are compressed, which the tool reads as it does others.
_COMPRESSED = 1 << 31
_PREPARED = ("_seq.dbtype", "_aln.dbtype")


def is_database(path: str) -> bool:
    """Returns whether a path is that of an MMseqs2 database."""
    return os.path.exists(f"{path}.dbtype")


def mmseqs_files(name: str, path: str) -> tuple[str, ...]:
    """Returns the files of a database that a search reads, an index of its words (``.idx``) among them.

    Raises:
      DatabaseError: missing, empty, no database of proteins, or one of ColabFold's with clusters.
    """
    parts = _parts(name, path) + _parts(name, f"{path}_h")
    if any(os.path.exists(path + ending) for ending in _PREPARED):
        raise DatabaseError(
            name,
            path,
            "it is a database of clusters as ColabFold prepares them (DB_seq and DB_aln); the step that "
            "reads their members (expandaln) is not done here. Give a database of `mmseqs createdb`",
        )
    kind = int.from_bytes(Path(f"{path}.dbtype").read_bytes()[:4], "little")
    if kind & ~_COMPRESSED != _AMINO_ACIDS:
        raise DatabaseError(
            name,
            path,
            f"its type is {kind & ~_COMPRESSED}, not {_AMINO_ACIDS}: it holds no protein sequences",
        )
    if os.path.exists(f"{path}.idx.dbtype"):
        parts += _parts(name, f"{path}.idx")
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
    """Returns sequences and residues: an entry's length counts its line break and its NUL byte."""
    num_sequences = num_residues = 0
    with open(f"{path}.index", "rb") as file:
        for number, line in enumerate(file, start=1):
            words = line.split(b"\t")
            if len(words) != 3 or not words[2].strip().isdigit():
                raise DatabaseError(
                    name, f"{path}.index", f"line {number} is no entry of an index: key, start, length"
                )
            num_sequences += 1
            num_residues += int(words[2]) - 2
    return num_sequences, num_residues


def _parts(name: str, path: str) -> list[str]:
    """Returns the files of one table: its data, whole or in numbered parts, its index and its type."""
    data = [path] if os.path.exists(path) else []
    while not os.path.exists(path) and os.path.exists(f"{path}.{len(data)}"):
        data.append(f"{path}.{len(data)}")
    files = [*(data or [path]), f"{path}.index", f"{path}.dbtype"]
    for file in files:
        if not os.path.exists(file):
            raise DatabaseError(name, path, f"no MMseqs2 database: {file!r} does not exist")
        if not os.path.isfile(file) or not os.access(file, os.R_OK):
            raise DatabaseError(name, file, "it is not a readable file")
        if os.path.getsize(file) == 0:
            raise DatabaseError(name, path, f"{os.path.basename(file)!r} is empty")
    return files
