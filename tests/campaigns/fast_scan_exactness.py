"""Real queries in 200,000 targets: is the fast engine's answer jackhmmer's, byte for byte, in any shards?

Targets are all real sequences of the test data in a drawn order, filled up with shuffled ones, and some of 5
to 35,000 residues; queries are drawn from the real ones, odd ones follow (of titin's length, one letter, X
runs, repeats, 10 residues). With ``--scop`` they are those of the SCOP set. Each is searched by stock
jackhmmer and by the fast engine in the whole file and in 7 and 64 files. Alignments must be equal byte for
byte, tables word for word; as many targets must pass as HMMER says of its own first filter, and at most 10 %
more. Every answer is noted as it comes (WORK/*.jsonl): the command can be stopped and run again, and goes on;
jackhmmer's part is kept over commits.

    nice -n 19 python tests/campaigns/fast_scan_exactness.py --data DATA --work WORK --seconds 3600
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyhmmer

from foldfeed.pipelines.building.tools import find_sharded
from foldfeed.pipelines.fast_scan.choice import best_kernel
from foldfeed.pipelines.fast_scan.database import open_database
from foldfeed.pipelines.fast_scan.scan import profile_of
from foldfeed.pipelines.programs.subprocess_runner import require_success, run_program
from foldfeed.pipelines.search_speed import timed
from foldfeed.pipelines.tools.fast_jackhmmer import FastJackhmmer, passing_extents
from foldfeed.pipelines.tools.jackhmmer import FLAGS, Jackhmmer, read_table
from foldfeed.pipelines.tools.search_tool import Shard

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
TIMEOUT_S = 7200.0
SEED = 20
ROOT = Path(__file__).parents[2]
SCOP = "scop_benchmark"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the real test data")
    parser.add_argument("--work", type=Path, required=True, help="where files and notes are kept")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--targets", type=int, default=200_000)
    parser.add_argument("--scop", action="store_true", help="the SCOP set: all of its queries and targets")
    parser.add_argument("--shards", type=int, nargs="*", default=[7, 64])
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no query after so many")
    parser.add_argument("--stock", action="store_true", help="jackhmmer's part alone, while the code changes")
    options = parser.parse_args()
    started = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    database = options.work / ("scop.fasta" if options.scop else f"targets-{options.targets}.fasta")
    if not database.exists() and options.scop:
        database.write_bytes(lzma.decompress((options.data / SCOP / "scop_targets.fasta.xz").read_bytes()))
    elif not database.exists():
        write_targets(database, options.data, options.targets)
    if options.scop:
        queries = [(head.split()[0], text.upper()) for head, text in texts_of(scop_queries(options.data))]
    else:
        queries = queries_of(options.data, options.queries)
    text = database.read_bytes()
    digest, options.targets = hashlib.sha256(text).hexdigest(), text.count(b"\n>") + 1
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    engines = make_engines(database, options.shards)
    stock_notes = Notes(options.work / "jackhmmer.jsonl")
    fast_notes = Notes(options.work / "fast.jsonl")
    rows = []
    for name, query in queries:
        binary = engines["plain"].identity.binary_sha256
        stock_key = f"{digest} {binary} {hashlib.sha256(query.encode()).hexdigest()}"
        fast_key = f"{commit} {sorted(options.shards)} {stock_key}"
        late = time.monotonic() - started > options.seconds
        if late and not (stock_key in stock_notes and fast_key in fast_notes):
            continue
        one = {"query": name, "residues": len(query)}
        one["stock"] = stock_notes.of(stock_key, search_plain, engines["plain"], query)
        if not options.stock:
            one["fast"] = fast_notes.of(fast_key, search_fast, engines, query)
            rows.append(one)
    if options.stock:
        return 0
    return report(rows, options, commit, digest, time.monotonic() - started)


class Notes:
    """Answers by key in a file of JSON lines; what was torn at its end is done again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict] = {}
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if line.endswith(b"\n"):
                note = json.loads(line)
                self._known[note["key"]] = note["answer"]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def of(self, key: str, search: Callable[..., dict], *words) -> dict:
        if key not in self._known:
            self._known[key] = search(*words)
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "answer": self._known[key]}) + "\n")
        return self._known[key]


def texts_of(path: Path) -> Iterator[tuple[str, str]]:
    data = path.read_bytes()
    openers = {".xz": lzma.decompress, ".gz": gzip.decompress}
    text = openers.get(path.suffix, bytes)(data).decode()
    for entry in text.split(">")[1:]:
        head, _, body = entry.partition("\n")
        yield head, "".join(body.split())


def scop_queries(data: Path) -> Path:
    return data / SCOP / "scop_queries.fasta"


def write_targets(path: Path, data: Path, number: int) -> None:
    files = [*sorted((data / "searchdb").glob("*.xz")), data / SCOP / "scop_targets.fasta.xz"]
    files += [
        file for file in sorted((data / "searchdb" / "af3_mini").glob("*.gz")) if "seqres" not in file.name
    ]
    files += [data / "queries" / "mmseqs_500.fasta.gz", data / "queries" / "odd" / "titin_34350aa.fasta"]
    random = np.random.default_rng(SEED)
    targets = [entry for file in files for entry in texts_of(file)]
    real = len(targets)
    for residues in (5, 6, 8, 10, 20, 12_000, 35_000):
        targets.append((f"drawn{residues}", "".join(random.choice(list(RESIDUES), residues))))
    for serial in range(max(0, number - len(targets))):
        letters = np.frombuffer(targets[int(random.integers(real))][1].encode(), dtype="S1")
        targets.append((f"shuffled{serial}", random.permutation(letters).tobytes().decode()))
    order = random.permutation(len(targets))[:number]
    temporary = path.with_suffix(".part")
    with temporary.open("w") as file:
        for place in order:
            head, text = targets[place]
            file.write(f">{head}\n{text}\n")
    temporary.rename(path)


def queries_of(data: Path, number: int) -> list[tuple[str, str]]:
    real = [
        *texts_of(data / "queries" / "mmseqs_500.fasta.gz"),
        *texts_of(scop_queries(data)),
    ]
    chosen = [real[int(place)] for place in np.random.default_rng(SEED).permutation(len(real))[:number]]
    globin = next(texts_of(data / "queries" / "HBB_HUMAN.fa"))[1]
    odd = [
        ("one letter", "A" * 120),
        ("costly letter", "W" * 60),
        ("X run", globin[:60] + "X" * 40 + globin[60:]),
        ("low complexity", "QQQQQQQPQPQPQQQQAQAQAQPPPPPQQQQ" * 4),
        ("collagen", "GPPGAPGPK" * 30),
        ("unusual letters", "BZJUOX" * 3 + globin),
        ("1 residue", "M"),
    ]
    odd += texts_of(data / "queries" / "colabfold_5AWL_10aa.fasta")
    odd += texts_of(data / "queries" / "odd" / "lowercase_inside.fasta")
    # Titin itself is a target, and two of its length want more memory of jackhmmer than most machines have.
    titin = next(texts_of(data / "queries" / "odd" / "titin_34350aa.fasta"))[1]
    odd.append(("titin from its end", titin[::-1]))
    named = [(head.split()[0], text.upper()) for head, text in chosen]
    return named + [(f"odd: {head}", text.upper().rstrip("*")) for head, text in odd]


def make_engines(database: Path, shards: list[int]) -> dict:
    words = {"cpus": 1, "timeout_s": TIMEOUT_S}
    engines = {
        "plain": Jackhmmer.find(database=str(database), **words),
        "1": FastJackhmmer.find(database=str(database), **words),
    }
    for number in shards:
        files = split(database, number)
        engines[str(number)] = find_sharded(files, engine="fast", **words)
    return engines


def split(database: Path, number: int) -> tuple[Shard, ...]:
    folder = database.with_suffix(f".{number}")
    folder.mkdir(exist_ok=True)
    records = database.read_bytes().split(b"\n>")
    ends = [len(records) * place // number for place in range(number + 1)]
    shards = []
    for place in range(number):
        text = b"\n>".join(records[ends[place] : ends[place + 1]])
        path = folder / f"shard-{place:05d}-of-{number:05d}"
        whole = text.strip(b"\n") + b"\n"
        path.write_bytes(whole if whole.startswith(b">") else b">" + whole)
        shards.append(Shard(path=str(path), digest=hashlib.sha256(whole).hexdigest()))
    return tuple(shards)


def answer_of(alignment: bytes, table: bytes) -> dict:
    words = b"\n".join(b" ".join(line.split()) for line in table.splitlines())
    return {
        "alignment": hashlib.sha256(alignment).hexdigest(),
        "table": hashlib.sha256(words).hexdigest(),
        "rows": table.count(b"\n"),
    }


def search_plain(tool: Jackhmmer, query: str) -> dict:
    """jackhmmer with the engine's flags, its report beside the answer: it says how many targets passed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {key: str(folder / key) for key in ("query", "alignment", "table", "report")}
        Path(paths["query"]).write_text(f">query\n{query}\n")
        flags = [{"/dev/null": paths["report"]}.get(flag, flag) for flag in FLAGS]
        argv = [flag.format(cpus=1, database=tool.database, **paths) for flag in flags]
        done = run_program([tool.binary, *argv], folder=folder, timeout_s=TIMEOUT_S)
        require_success("jackhmmer", done, folder)
        alignment = Path(paths["alignment"]).read_bytes()
        if not alignment.strip():
            alignment = f"# STOCKHOLM 1.0\n\nquery {query}\n//\n".encode()
        passed = int(re.search(r"Passed MSV filter:\s+(\d+)", Path(paths["report"]).read_text())[1])
        answer = answer_of(alignment, read_table(Path(paths["table"])))
    return answer | {"passed": passed, "cpu_s": done.usage.cpu_s}


def search_fast(engines: dict, query: str) -> dict:
    """The fast engine's answers by the number of files, and how many targets its scan lets through."""
    answers, seconds = {}, {}
    for name, tool in engines.items():
        if name != "plain":
            found, seconds[name], _ = timed(lambda tool=tool: tool.search(query))
            answers[name] = answer_of(found.alignment, found.table)
    database = open_database(engines["1"].database)
    (passing,) = passing_extents([profile_of(query)], database, threads=1)
    return {"answers": answers, "passed": len(passing), "cpu_s": seconds}


def environment() -> str:
    return (
        f"{platform.machine()} {platform.system()}, CPython {platform.python_version()}, "
        f"pyhmmer {pyhmmer.__version__}, kernel {best_kernel().name}"
    )


def report(rows: list[dict], options: argparse.Namespace, commit: str, digest: str, wall_s: float) -> int:
    def same(one: dict) -> bool:
        stock = {key: one["stock"][key] for key in ("alignment", "table", "rows")}
        return all(answer == stock for answer in one["fast"]["answers"].values())

    different = [one["query"] for one in rows if not same(one)]
    missed = [one["query"] for one in rows if one["fast"]["passed"] < one["stock"]["passed"]]
    passed, through = (sum(one[which]["passed"] for one in rows) for which in ("stock", "fast"))
    ordinary = [one for one in rows if not one["query"].startswith("odd: ")]
    number = max(1, len(ordinary))
    evidence = json.dumps(
        [[one["query"], one["stock"], one["fast"]["answers"]] for one in rows], sort_keys=True
    )
    print(
        json.dumps(
            {
                "commit": commit,
                "environment": environment(),
                "database_sha256": digest,
                "targets": options.targets,
                "files": [1, *options.shards],
                "queries_done": len(ordinary),
                "odd_queries_done": len(rows) - len(ordinary),
                "median_residues": float(np.median([one["residues"] for one in ordinary] or [0])),
                "rows": sum(one["stock"]["rows"] for one in rows),
                "different": different,
                "fewer_than_hmmer_lets_through": missed,
                "let_through_by_hmmer": passed,
                "let_through_here": through,
                "cpu_s_per_query_jackhmmer": round(
                    sum(one["stock"]["cpu_s"] for one in ordinary) / number, 3
                ),
                "cpu_s_per_query_fast": round(sum(one["fast"]["cpu_s"]["1"] for one in ordinary) / number, 3),
                "evidence_sha256": hashlib.sha256(evidence.encode()).hexdigest(),
                "wall_s": round(wall_s),
            },
            indent=1,
        )
    )
    return 1 if different or missed or through > 1.1 * passed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
