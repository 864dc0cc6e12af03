"""Crops per second from the same alignments in every format that training code reads today.

Run: python bench/store_peers.py [--copies 104] [--seconds 5] [--cold | --cpu-time] [--only NAME ...]

The real alignments (or synthetic ones) are replicated under new names. Every peer stores the same msa (uint8)
and deletions, and gives back the same crop as two fresh arrays, which is checked against the source. Two
crops: 256 residues x up to 512 rows, and 384 x up to 5,120, at the same random places for everybody. One
process, one thread, warm page cache unless --cold (then the page cache is dropped before each pass; needs
root). The ceiling reads the very bytes of the tiles with pread, decodes them with libzstd and copies
them, without any arithmetic of ours.

Peers that are not installed are named and skipped. See bench/README.md for what was tuned.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import alignments
import numpy as np
import rows
from our_readers import Foldfeed, OurArrays, Place
from peers import PEERS

from foldfeed.feature_store import MsaRecord

CROPS = {"256x512": (256, 512), "384x5120": (384, 5120)}
DEEP_ROWS = 4000


def replicate(copies: int) -> list[MsaRecord]:
    """Returns the records under new ids; the arrays are shared, so memory stays small."""
    base = list(alignments.records())
    return [_renamed(record, f"{record.record_id}c{copy:04d}") for record in base for copy in range(copies)]


def _renamed(record: MsaRecord, name: str) -> MsaRecord:
    return dataclasses.replace(record, record_id=name)


def draw_places(records: list[MsaRecord], size: tuple[int, int], count: int, deep: bool) -> list[Place]:
    rng = np.random.default_rng(11)
    numbers = [n for n, record in enumerate(records) if not deep or record.depth > DEEP_ROWS]
    places = []
    for _ in range(count):
        number = int(rng.choice(numbers))
        record = records[number]
        cols, depth = min(size[0], record.length), min(size[1], record.depth)
        left, top = int(rng.integers(record.length - cols + 1)), int(rng.integers(record.depth - depth + 1))
        places.append(Place(number=number, rows=slice(top, top + depth), cols=slice(left, left + cols)))
    return places


def drop_page_cache() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def check(peer: object, records: list[MsaRecord], places: list[Place]) -> None:
    for place in places:
        msa, deletions = peer.crop(place)
        record = records[place.number]
        rows = peer.rows(place) if isinstance(peer, Foldfeed) else place.rows
        np.testing.assert_array_equal(msa, record.msa[rows, place.cols])
        np.testing.assert_array_equal(deletions, record.deletions[rows, place.cols])


def crops_per_second(
    peer: object, places: list[Place], seconds: float, cold: bool, clock: Callable[[], float]
) -> float:
    """Returns the median of three passes, each over as many of the places as fit in the time."""
    rates = []
    for _ in range(3):
        if cold:
            drop_page_cache()
        count, started = 0, clock()
        for place in places:
            peer.crop(place)
            count += 1
            if clock() - started > seconds / 3:
                break
        rates.append(count / (clock() - started))
    return sorted(rates)[1]


def measure(
    name: str, records: list[MsaRecord], folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    peer = PEERS[name]()
    peer.write(records, folder)
    result: dict[str, float] = {}
    result["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peer.open(folder)
    for crop, size in CROPS.items():
        for kind in ("mixed", "deep"):
            places = draw_places(records, size, options.crops, kind == "deep")
            if isinstance(peer, OurArrays):
                peer.prepare(records, places)
            check(peer, records, places[:3])
            clock = time.process_time if options.cpu_time else time.perf_counter
            rate = crops_per_second(peer, places, options.seconds, options.cold, clock)
            result[f"{crop}_{kind}_crops_per_s"] = rate
    peer.close()
    return result


def print_ratios(results: dict[str, dict[str, float] | str]) -> None:
    """Prints how many times as many crops per second foldfeed gives as each peer, and the sizes of files."""
    ours = results.get("foldfeed")
    for name, theirs in results.items():
        if isinstance(ours, dict) and isinstance(theirs, dict):
            ratios = {
                key.removesuffix("_crops_per_s"): round(ours[key] / value, 2)
                for key, value in theirs.items()
                if key != "bytes"
            }
            print(f"foldfeed / {name}: {ratios}, size of {name} / ours {theirs['bytes'] / ours['bytes']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--copies", type=int, default=4, help="copies of each alignment; 104 give 2 GB of tokens"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--crops", type=int, default=4000, help="places drawn per measurement")
    parser.add_argument("--cold", action="store_true", help="drop the page cache first (root)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of this process's CPU time: for a busy machine, warm"
    )
    parser.add_argument("--only", nargs="*", default=list(PEERS))
    parser.add_argument(
        "--work", type=Path, default=None, help="where the files go; a temporary folder by default"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "store_peers.jsonl"
    )
    options = parser.parse_args()
    if options.cold and options.cpu_time:
        parser.error("--cpu-time does not count the time that cold reads wait for the disk; leave one out")
    records = replicate(options.copies)
    tokens = sum(record.msa.size for record in records)
    work = Path(tempfile.mkdtemp(prefix="foldfeed-peers-", dir=options.work))
    results: dict[str, dict[str, float] | str] = {}
    try:
        for name in options.only:
            folder = work / name
            folder.mkdir()
            try:
                results[name] = measure(name, records, folder, options)
            except ImportError as error:
                results[name] = f"not installed: {error.name}"
            print(name, results[name], flush=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work)
    print_ratios(results)
    config = {
        "records": len(records),
        "tokens": tokens,
        "real": bool(alignments.a3m_files()),
        "cold": options.cold,
        "seconds": options.seconds,
        "cpu_time": options.cpu_time,
    }
    rows.emit("store_peers", config, results, options.output)


if __name__ == "__main__":
    main()
