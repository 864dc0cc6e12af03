"""CPU seconds per query of MMseqs2 with 1, 8 and 64 queries in a run, with an index and without; jackhmmer's.

    FOLDFEED_TEST_DATA=... python bench/search_mmseqs.py

The database is ``searchdb/homologs.fasta.xz`` of the test data (116,864 real sequences), the queries the
first of ``queries/mmseqs_500.fasta.gz``. Smaller runs are the first queries of the larger ones. The ceiling
is what a further query costs in a run, from the runs of 8 and 64: no size of run makes a query cheaper.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import os
import subprocess
import tempfile
from pathlib import Path

from rows import NOTHING_TO_MEASURE, emit

from foldfeed.pipelines.tools.jackhmmer import Jackhmmer
from foldfeed.pipelines.tools.mmseqs import Mmseqs
from foldfeed.pipelines.tools.search_tool import SearchResult, find_binary

TIMEOUT_S = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 64], help="queries of a run")
    parser.add_argument("--jackhmmer", type=int, default=8, help="queries that jackhmmer searches")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "search_mmseqs.jsonl"
    )
    options = parser.parse_args()
    if not os.environ.get("FOLDFEED_TEST_DATA"):
        print("search_mmseqs: nothing is measured, FOLDFEED_TEST_DATA names no folder of real sequences")
        raise SystemExit(NOTHING_TO_MEASURE)
    data = Path(os.environ["FOLDFEED_TEST_DATA"])
    text = gzip.decompress((data / "queries" / "mmseqs_500.fasta.gz").read_bytes()).decode()
    queries = ["".join(entry.split("\n")[1:]) for entry in text.split(">")[1:]][: max(options.sizes)]
    with tempfile.TemporaryDirectory() as name:
        fasta = Path(name) / "homologs.fasta"
        fasta.write_bytes(lzma.decompress((data / "searchdb" / "homologs.fasta.xz").read_bytes()))
        results = measure(Path(name), fasta, queries, options.sizes, options.jackhmmer)
        config = {
            "targets": fasta.read_bytes().count(b">"),
            "queries": "mmseqs_500.fasta",
            "sizes": options.sizes,
            "residues": {size: sum(map(len, queries[:size])) for size in options.sizes},
        }
    emit("search_mmseqs", config, results, options.output)


def measure(
    folder: Path, fasta: Path, queries: list[str], sizes: list[int], num_jackhmmer: int
) -> dict[str, object]:
    """Returns CPU seconds per query of every way, and how many answers are those of runs of one query."""
    binary = find_binary("mmseqs")
    run(binary, "createdb", str(fasta), str(folder / "plain"), "--dbtype", "1", "-v", "1")
    run(binary, "createdb", str(fasta), str(folder / "indexed"), "--dbtype", "1", "-v", "1")
    command = ("createindex", str(folder / "indexed"), str(folder / "tmp"), "--split", "1", "--threads", "1")
    run(binary, *command, "-v", "1")
    found: dict[str, object] = {}
    for name in ("plain", "indexed"):
        tool = Mmseqs.find(database=str(folder / name), timeout_s=TIMEOUT_S)
        by_size = {size: tool.search_many(queries[:size]) for size in sizes}
        found[f"{name}_cpu_s_per_query"] = {size: per_query(many) for size, many in by_size.items()}
        *_, smaller, larger = sorted(sizes)
        cpu_s = {size: sum(one.usage.cpu_s for one in many) for size, many in by_size.items()}
        found[f"{name}_cpu_s_of_a_further_query"] = round(
            (cpu_s[larger] - cpu_s[smaller]) / (larger - smaller), 3
        )
        found[f"{name}_rss_mb"] = {
            size: round(many[0].usage.max_rss_bytes / 1e6) for size, many in by_size.items()
        }
        whole = by_size[max(sizes)]
        found[f"{name}_equal_alignments"] = {
            size: sum(one.alignment == two.alignment for one, two in zip(many, whole, strict=False))
            for size, many in by_size.items()
        }
        found["mmseqs2"] = tool.identity.version
    jackhmmer = Jackhmmer.find(database=str(fasta), cpus=1, timeout_s=TIMEOUT_S)
    answers = [jackhmmer.search(query) for query in queries[:num_jackhmmer]]
    found["jackhmmer_cpu_s_per_query"] = per_query(answers)
    found["jackhmmer_queries"] = num_jackhmmer
    found["jackhmmer"] = jackhmmer.identity.version
    return found


def per_query(answers: list[SearchResult]) -> float:
    """Returns the mean of the CPU seconds, of which each answer of a run has its share."""
    return round(sum(one.usage.cpu_s for one in answers) / len(answers), 3)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


if __name__ == "__main__":
    main()
