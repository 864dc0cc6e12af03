"""Fuzzing of everything that reads other programs' files: typed errors only, no hang, bounded memory.

The short version runs in the suite (`test_feature_store_fuzz.py`). A campaign:

    python tests/fuzz_feature_store.py --seconds 600
    python tests/fuzz_feature_store.py --seconds 600 --targets chai-pqt,features-pkl --seed 7
    python tests/fuzz_feature_store.py --seconds 600 --coverage --targets a3m      # with `pip install
    atheris`

Inputs are small files of every format, made here and cut from the shared test data where it is, changed byte
by byte (flips, cuts, splices, boundary numbers) and structure by structure (arrays inside a zip with a right
checksum, nodes of JSON, columns of Parquet, objects of a pickle). A worker process runs them under a memory
limit; what kills it, takes longer than `LIMIT_S` or raises anything but a `FoldfeedError` is a finding.
Findings are kept as files in --keep and printed; the exit code is 1 if there is one. --coverage lets atheris
choose the changes by the branches they reach (libFuzzer), one target at a time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from fuzz_inputs import SMALL_A3M, Target, mutate, targets

from foldfeed.feature_store import FoldfeedError
from foldfeed.feature_store.importers.layouts import AlignmentImport
from foldfeed.feature_store.importers.rows import ImportOptions

LIMIT_S = 10.0
# What a file may unpack to in a campaign; memory beyond the start may reach MEMORY_BYTES.
MAX_BYTES = 8 << 20
MEMORY_BYTES = 2 << 30


class Finding(AssertionError):
    """An input that broke a promise."""


def attempt(target: Target, data: bytes, folder: Path) -> str:
    """Reads one input; returns ``accepted`` or the beginning of the reason it was rejected for.

    Raises:
      Finding: anything else happened.
    """
    path = folder / target.file
    path.write_bytes(data)
    if target.layout == "openfold-db":
        path.with_suffix(".db").write_bytes(SMALL_A3M * 20)
    started = time.monotonic()
    try:
        with _alarm():
            paired = target.layout in ("openfold-db", "alphafold2", "alphafold3-json")
            found = AlignmentImport(path, target.layout, ImportOptions(max_bytes=MAX_BYTES, paired=paired))
            depths = [record.depth for record in found]
            reasons = [reject.reason for reject in found.rejects]
    except FoldfeedError as error:
        depths, reasons = [], [str(error)]
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
    if time.monotonic() - started > LIMIT_S:
        raise Finding(f"it took {time.monotonic() - started:.1f} s")
    if any(len(reason) > 5000 for reason in reasons):
        raise Finding("a reason of more than 5000 characters")
    return "accepted" if depths else reasons[0][:40] if reasons else "nothing"


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError(f"no answer after {2 * LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 2 * LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def work(
    names: list[str], seed: int, seconds: float, folder: Path, data: Path | None
) -> dict[str, collections.Counter[str]]:
    """Runs inputs until the time is over; the input at hand lies in ``folder`` under ``last``."""
    known = targets(data)
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        name = names[number % len(names)]
        data_in = mutate(random.Random(f"{seed}-{number}"), known[name])
        (folder / "last").write_bytes(data_in)
        (folder / "last.name").write_text(f"{name}-{seed}-{number}")
        try:
            counts[name][attempt(known[name], data_in, folder)] += 1
        except Finding as finding:
            raise Finding(f"{name}, seed {seed}, input {number}: {finding}") from finding
        number += 1
    return counts


def _limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))


def campaign(arguments: argparse.Namespace) -> int:
    """Starts workers until the time is over and keeps what broke one; returns the number of findings."""
    arguments.keep.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    num_findings, seed = 0, arguments.seed
    total: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    while (left := end - time.monotonic()) > 1:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                __file__,
                "--worker",
                folder,
                "--seed",
                str(seed),
                "--seconds",
                str(min(left, 60)),
            ]
            command += [
                "--targets",
                ",".join(arguments.targets),
                *(["--data", str(arguments.data)] if arguments.data else []),
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                for name, counts in json.loads(result.stdout.splitlines()[-1]).items():
                    total[name].update(counts)
            else:
                num_findings += 1
                kept = arguments.keep / (
                    Path(folder, "last.name").read_text() if Path(folder, "last.name").exists() else "start"
                )
                if Path(folder, "last").exists():
                    kept.write_bytes(Path(folder, "last").read_bytes())
                print(f"FINDING {kept} (exit {result.returncode})\n{result.stderr[-3000:]}", flush=True)
        seed += 1
    for name, counts in sorted(total.items()):
        print(
            f"{name:16} {sum(counts.values()):8} inputs, {counts['accepted']:7} accepted, "
            f"{len(counts)} kinds of answers"
        )
    print(f"{sum(sum(counts.values()) for counts in total.values())} inputs, {num_findings} findings")
    return num_findings


def by_coverage(name: str, seconds: int, keep: Path, data: Path | None) -> None:
    """Hands one target to atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["foldfeed.feature_store"]):
        for module in [module for module in sys.modules if module.startswith("foldfeed.feature_store.")]:
            del sys.modules[module]
        global AlignmentImport, ImportOptions, FoldfeedError
        from foldfeed.feature_store.errors import FoldfeedError
        from foldfeed.feature_store.importers.layouts import AlignmentImport
        from foldfeed.feature_store.importers.rows import ImportOptions
    target = targets(data)[name]
    corpus = keep / f"corpus-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(target.seeds):
        (corpus / f"seed{number}").write_bytes(text)
    folder = Path(tempfile.mkdtemp())

    def custom(text: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if target.rebuild is not None and rng.random() < 0.3:
            return mutate(rng, target)[:max_size]
        return atheris.Mutate(text, max_size)

    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={keep}/",
        f"-timeout={int(LIMIT_S)}",
        "-rss_limit_mb=3000",
    ]
    atheris.Setup(
        [sys.argv[0], *options, "-max_len=65536", str(corpus)],
        lambda text: attempt(target, text, folder),
        custom_mutator=custom,
    )
    atheris.Fuzz()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--targets", type=lambda text: text.split(","), default=sorted(targets()))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    shared = Path(os.environ.get("FOLDFEED_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared if shared.is_dir() else None)
    parser.add_argument("--coverage", action="store_true", help="use atheris")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        _limit_memory()
        counts = work(arguments.targets, arguments.seed, arguments.seconds, arguments.worker, arguments.data)
        print(json.dumps(counts))
    elif arguments.coverage:
        by_coverage(arguments.targets[0], int(arguments.seconds), arguments.keep, arguments.data)
    else:
        sys.exit(1 if campaign(arguments) else 0)


if __name__ == "__main__":
    main()
