"""A small database of clusters as ColabFold prepares them, made of sequences by MMseqs2 itself.

The layout is that of ``mmseqs tsv2exprofiledb``, by which ColabFold's set-up script makes its databases from
tables: ``db`` holds a consensus of each cluster, ``db_seq`` all members, ``db_aln`` how the members align
with the consensus.
"""

import subprocess
from pathlib import Path


def mmseqs(binary: str, folder: Path, line: str) -> None:
    """Runs one command of MMseqs2 in a folder."""
    words = [binary, *line.split()]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def make_clusters(binary: str, folder: Path, fasta: Path, name: str, *, identity: float = 0.5) -> Path:
    """Makes a database of clusters from the sequences of a FASTA file; returns its prefix.

    Args:
      binary: of MMseqs2.
      folder: for the database, and for what is made on the way.
      fasta: the sequences.
      name: of the database.
      identity: least share of equal residues of members with the first of their cluster.
    """
    work = folder / f"{name}.work"
    work.mkdir()
    lines = (
        f"createdb {fasta} s --shuffle 0 -v 1",
        f"linclust s clu tmp --min-seq-id {identity} -c 0.6 --threads 1 -v 1",
        "align s s clu near -a -e inf --threads 1 -v 1",
        "result2profile s s near profile --threads 1 -v 1",
        "profile2consensus profile cons --threads 1 -v 1",
        # What a consensus says of its members, itself among them only if the tool finds it.
        "align cons s clu aln -a -e inf --threads 1 -v 1",
    )
    for line in lines:
        mmseqs(binary, work, line)
    for table, source in (("", "cons"), ("_seq", "s"), ("_h", "s_h"), ("_aln", "aln")):
        rows = [f"{key}\t{line}\n" for key, text in entries(work / source) for line in text.splitlines()]
        (work / f"{name}{table}.tsv").write_text("".join(rows))
    mmseqs(binary, work, f"tsv2exprofiledb {name} {folder / name} -v 1")
    return folder / name


def entries(path: Path) -> list[tuple[int, str]]:
    """Returns key and text of every entry of a database in one file, by key."""
    data = path.read_bytes()
    found = []
    for line in path.with_name(f"{path.name}.index").read_text().splitlines():
        key, start, length = map(int, line.split("\t"))
        found.append((key, data[start : start + length].rstrip(b"\0").decode()))
    return sorted(found)
