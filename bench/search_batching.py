"""Batching alone: many queries through HMMER's own filters at once, against AlphaFold's way.

    python bench/search_batching.py --targets 200000 --queries 128 --engines pyhmmer hmmpgmd

AlphaFold's way is one jackhmmer process per query and database, with its flags. The engines read or load the
database once for all queries, and stock jackhmmer then searches what they let through; all of that is
counted. CPU seconds are user plus system of this process and its children. The peer runs half of its queries
before each engine and half after it, because what else runs on the machine changes. Targets and queries are
those of `search_scan.py`; rows are compared byte for byte, the white space of the table apart (HMMER's
columns are as wide as the names among the targets that it was given).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from rows import emit
from search_scan import prepare

from foldfeed.pipelines.building.tools import find_sharded
from foldfeed.pipelines.fast_scan.database import ScanDatabase
from foldfeed.pipelines.fast_scan.kernels import kernels
from foldfeed.pipelines.search_speed import timed
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer
from foldfeed.pipelines.tools.search_tool import SearchResult, Shard

TIMEOUT_S = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--engines", nargs="+", default=["pyhmmer"], metavar="NAME")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "search_batching.jsonl"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        database = Path(name) / "targets.fasta"
        queries, source = prepare(database, options.targets, options.queries, np.random.default_rng(0))
        results = measure(str(database), queries, options.engines)
    config = {
        "targets": options.targets,
        "queries": len(queries),
        "median_query_residues": statistics.median(map(len, queries)),
        "sequences": source,
    }
    emit("search_batching", config, results, options.output)


def measure(path: str, queries: list[str], engines: list[str]) -> dict[str, object]:
    plain = Jackhmmer.find(database=path, cpus=1, timeout_s=TIMEOUT_S)
    # Once before, so that the file is in the page cache.
    plain.search(queries[0][:1])
    half = len(queries) // 2
    results: dict[str, object] = {}
    for engine in engines:
        first, first_s, _ = timed(lambda: [plain.search(query) for query in queries[:half]])
        found, row = measure_engine(path, queries, engine)
        second, second_s, _ = timed(lambda: [plain.search(query) for query in queries[half:]])
        pairs = list(zip(found, [*first, *second], strict=True))
        peer_s = first_s + second_s
        results[engine] = {
            "jackhmmer_cpu_s_per_query": round(peer_s / len(queries), 4),
            "times_less_cpu": round(peer_s / len(queries) / row["cpu_s_per_query"], 3),
            **row,
            "equal_alignments": sum(one.alignment == two.alignment for one, two in pairs),
            "equal_tables": sum(one.table.split() == two.table.split() for one, two in pairs),
            "rows": sum(two.table.count(b"\n") for _, two in pairs),
        }
    residues = sum(len(one.codes) for one in ScanDatabase(path, kernels()[0]).records())
    return {"residues": residues, "engines": results}


def measure_engine(
    path: str, queries: list[str], engine: str
) -> tuple[list[SearchResult], dict[str, float | str]]:
    shard = Shard(path=path, digest="")
    tool = find_sharded((shard,), cpus=1, timeout_s=TIMEOUT_S, engine=engine)
    candidates, scan_s, _ = timed(lambda: list(tool.scan_many(queries, 0)))
    found, join_s, _ = timed(
        lambda: [tool.join(query, [one]) for query, one in zip(queries, candidates, strict=True)]
    )
    number = len(queries)
    return found, {
        "scanner": tool.scanner.name_here,
        "cpu_s_per_query": round((scan_s + join_s) / number, 4),
        "of_it_candidates": round(scan_s / number, 4),
        "of_it_jackhmmer_on_candidates": round(join_s / number, 4),
        "candidates_per_query": round(sum(one.alignment.count(b">") for one in candidates) / number, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
