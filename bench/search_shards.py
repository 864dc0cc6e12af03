"""A database in several files against the same in one: CPU and wall seconds of a search, and equal bytes.

    python bench/search_shards.py --shards 8 --queries 12

Targets and queries are real proteins where FOLDFEED_TEST_DATA points to some, homologs of the queries among
them; without it they are drawn (and then find nothing but themselves). ``whole`` is jackhmmer on one file;
``sharded`` searches every shard and then the candidates of all; both also behind the fast scan. ``wall_2``
searches shards two at a time, which a single file does not allow (jackhmmer --cpu 1). The ceiling of a
sharded search is the whole's time divided by the workers; what it costs above is what reported targets cost
twice.
"""

from __future__ import annotations

import argparse
import lzma
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rows import emit
from search_scan import entries, prepare

from foldfeed.pipelines.building.tools import find_sharded
from foldfeed.pipelines.search_speed import timed
from foldfeed.pipelines.tools.fast_jackhmmer import FastJackhmmer
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer, run_jackhmmer
from foldfeed.pipelines.tools.search_tool import SearchResult, SearchTool, Shard
from foldfeed.pipelines.tools.sharded_jackhmmer import ShardedJackhmmer

TIMEOUT_S = 3600.0
MANY_HITS = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, default=100_000, help="beside homologs of the queries")
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "search_shards.jsonl"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = folder / "whole.fasta"
        queries, source = prepare(whole, options.targets, options.queries, np.random.default_rng(0))
        relatives = homologs()
        if relatives:
            # Queries that find hundreds to thousands: parts of them enter the output, and so cost twice.
            step = max(1, len(relatives) // (options.queries // 2))
            queries = [*queries[options.queries // 2 :], *relatives[::step]][: options.queries]
            with whole.open("a") as file:
                file.writelines(f">h{number}\n{text}\n" for number, text in enumerate(relatives))
        texts = [f">{entry}" for entry in whole.read_text().split(">")[1:]]
        # Homologs everywhere, as in a real database.
        np.random.default_rng(1).shuffle(texts)
        whole.write_text("".join(texts))
        paths = split(texts, options.shards, folder)
        results = measure(whole, paths, queries, options.rounds)
    config = {
        "targets": options.targets,
        "homologs": len(relatives),
        "queries": len(queries),
        "shards": options.shards,
        "rounds": options.rounds,
        "sequences": source,
        "median_query_residues": statistics.median(map(len, queries)),
    }
    emit("search_shards", config, results, options.output)


def homologs() -> list[str]:
    path = Path(os.environ.get("FOLDFEED_TEST_DATA", "")) / "searchdb" / "homologs.fasta.xz"
    if not os.environ.get("FOLDFEED_TEST_DATA") or not path.exists():
        return []
    return [text for text in entries(lzma.decompress(path.read_bytes()).decode()) if len(text) >= 60]


def split(texts: list[str], number: int, folder: Path) -> list[Path]:
    paths = []
    for at in range(number):
        path = folder / f"shard-{at:05d}-of-{number:05d}"
        path.write_text("".join(texts[len(texts) * at // number : len(texts) * (at + 1) // number]))
        paths.append(path)
    return paths


def two_at_a_time(tool: ShardedJackhmmer, query: str) -> SearchResult:
    with ThreadPoolExecutor(2) as threads:
        parts = list(threads.map(lambda number: tool.scan(query, number), range(len(tool.shards))))
    return tool.join(query, parts)


def measure(whole: Path, paths: list[Path], queries: list[str], rounds: int) -> dict[str, object]:
    words = {"cpus": 1, "timeout_s": TIMEOUT_S}
    plain = Jackhmmer.find(database=str(whole), **words)
    shards = tuple(Shard(path=str(path), digest="") for path in paths)
    tools = {
        "whole": plain,
        "sharded": find_sharded(shards, engine="binary", **words),
        "whole_fast": FastJackhmmer.find(database=str(whole), **words),
        "sharded_fast": find_sharded(shards, engine="fast", **words),
    }
    number = sum(path.read_bytes().count(b">") for path in paths)
    # Databases into memory and the page cache first.
    answers = {name: [tool.search(query) for query in queries] for name, tool in tools.items()}
    with tempfile.TemporaryDirectory() as name:
        expected = [
            run_jackhmmer(plain, query, folder=Path(name), extra_flags=("-Z", str(number)))
            for query in queries
        ]
    hits = [one.table.count(b"\n") for one in expected]
    groups = {
        "few_hits": [query for query, count in zip(queries, hits, strict=True) if count < MANY_HITS],
        "many_hits": [query for query, count in zip(queries, hits, strict=True) if count >= MANY_HITS],
    }
    return {
        "hits_per_query": hits,
        "equal_alignments": {
            name: sum(found.alignment == want.alignment for found, want in zip(all_of, expected, strict=True))
            for name, all_of in answers.items()
        },
        "equal_tables": {
            name: sum(found.table == want.table for found, want in zip(all_of, expected, strict=True))
            for name, all_of in answers.items()
            if name != "whole"
        },
        **{name: times(tools, group, rounds) for name, group in groups.items() if group},
    }


def times(tools: dict[str, SearchTool], queries: list[str], rounds: int) -> dict[str, object]:
    """Returns medians over the rounds, in seconds per query, and their ratios."""
    cpu_s: dict[str, list[float]] = {name: [] for name in tools}
    wall_s: dict[str, list[float]] = {name: [] for name in (*tools, "sharded_wall_2")}
    for _ in range(rounds):
        for name, tool in tools.items():
            _, cpu, wall = timed(lambda tool=tool: [tool.search(query) for query in queries])
            wall_s[name].append(wall / len(queries))
            cpu_s[name].append(cpu / len(queries))
        tool = tools["sharded"]
        _, _, wall = timed(lambda tool=tool: [two_at_a_time(tool, query) for query in queries])
        wall_s["sharded_wall_2"].append(wall / len(queries))
    median = {name: statistics.median(values) for name, values in cpu_s.items()}
    walls = {name: statistics.median(values) for name, values in wall_s.items()}
    return {
        "queries": len(queries),
        "cpu_s_per_query": {name: round(value, 4) for name, value in median.items()},
        "wall_s_per_query": {name: round(value, 4) for name, value in walls.items()},
        "sharded_cpu_ratio": round(median["sharded"] / median["whole"], 3),
        "sharded_fast_cpu_ratio": round(median["sharded_fast"] / median["whole_fast"], 3),
        "share_of_ceiling_two_workers": round(walls["whole"] / 2 / walls["sharded_wall_2"], 3),
    }


if __name__ == "__main__":
    sys.exit(main())
