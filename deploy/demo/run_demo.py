"""The main job in one command: real proteins in, a store, an answer, a picture, a trained model out.

Each step is a command that a user can type; it is printed before it runs. A step whose results are there
already is quick: searches are kept by content, a store keeps what it has, training compares fingerprints.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
QUESTION = (
    "select record_id, length, depth, round(1 - gap_fraction, 3) as coverage, "
    "[d.name || ': ' || d.num_rows for d in databases] as rows_by_database "
    "from records order by depth desc"
)

FULLEST = "select record_id from records order by depth * (1 - gap_fraction) desc, record_id limit 1"


def main() -> int:
    """Runs every step; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where everything goes")
    out: Path = parser.parse_args().output
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    store = out / "store"
    picture = out / "coverage.png"
    foldfeed = find_foldfeed()

    step(1, "databases from HMMER's tutorial, with decoys derived from it")
    run(sys.executable, HERE / "make_databases.py", out / "databases")

    tools = "JackHMMER and HHblits" if has_hhsuite(out / "databases") else "JackHMMER"
    step(2, f"search with {tools} on Beam; one query is bad on purpose")
    run(foldfeed, "build", *build_arguments(out / "databases", store))

    step(3, "a question about the store")
    run(foldfeed, "query", store, QUESTION)

    step(4, "a picture of the alignment with the most residues in its rows")
    fullest = ask(foldfeed, store, FULLEST)
    run(foldfeed, "plot", store, fullest, "--output", picture)

    step(5, "four torchrun ranks train on random crops; one is killed and the run resumes")
    run(sys.executable, HERE / "train_demo.py", "--store", store, "--output", out / "training")

    summary(out, store, picture, fullest, time.monotonic() - started)
    return 0


def has_hhsuite(databases: Path) -> bool:
    """Returns whether an HH-suite database could be made here."""
    return (databases / "hhsuite" / "db_hhm.ffdata").exists()


def build_arguments(databases: Path, store: Path) -> list[object]:
    """Returns the arguments of ``foldfeed build``."""
    uniclust = ["--database", f"uniclust30={databases / 'hhsuite' / 'db'}:hhblits"]
    return [
        *("--queries", databases / "queries.fasta"),
        *("--database", f"uniref90={databases / 'uniref90.fasta'}:jackhmmer"),
        *(uniclust if has_hhsuite(databases) else ()),
        *("--database", f"mgnify={databases / 'mgnify.fasta'}:jackhmmer"),
        *("--store", store),
    ]


def find_foldfeed() -> Path:
    """Returns the command line that belongs to this Python."""
    beside = BIN / "foldfeed"
    found = beside if beside.exists() else shutil.which("foldfeed")
    if found is None:
        sys.exit("demo: the command foldfeed is not installed; run `make demo`, which installs it")
    return Path(found)


def step(number: int, title: str) -> None:
    """Prints a heading."""
    print(f"\n== {number}. {title}", flush=True)


def run(*command: object) -> None:
    """Prints and runs a command; the demo ends with its exit code if that is not 0."""
    words = [str(word) for word in command]
    shown = [Path(words[0]).name, *words[1:]]
    print(f"$ {shlex.join(shown)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(words, check=False, env=environment()).returncode
    if code != 0:
        sys.exit(f"demo: that command ended with exit code {code}")
    print(f"({time.monotonic() - started:.1f} s)", flush=True)


def ask(foldfeed: Path, store: Path, sql: str) -> str:
    """Returns the single value that a query gives."""
    answer = subprocess.run(
        [str(foldfeed), "query", str(store), sql, "--format", "csv"],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    return answer.stdout.splitlines()[1]


def environment() -> dict[str, str]:
    """Returns the environment of the steps: this Python's commands first on PATH, no colours in logs."""
    return os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}


def summary(out: Path, store: Path, picture: Path, record_id: str, seconds: float) -> None:
    """Prints what was made, where it lies and what to try next."""
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\n== done in {seconds:.0f} s; the largest process took {peak_gib:.1f} GiB")
    print(f"databases and queries  {out / 'databases'}")
    print(f"feature store          {store}")
    print(f"search results, logs   {store}.results")
    print(f"picture                {picture}")
    print(f"training runs          {out / 'training'}")
    print("\nTry next:")
    print(f"  {BIN}/foldfeed show {store} {record_id}")
    print(f"  {BIN}/foldfeed crop {store} {record_id} --residues 0:60 --rows 0:12")
    print(f"  {BIN}/foldfeed log {store}")
    print(f"  {BIN}/tensorboard --logdir {out / 'training'}")
    print(f"  {BIN}/foldfeed build --queries YOURS.fasta --database uniref90=DB.fasta --store NEW_STORE")


if __name__ == "__main__":
    sys.exit(main())
