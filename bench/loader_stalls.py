"""Seconds that a training step waits for its batch: foldfeed beside other loaders, the same crops.

    python bench/loader_stalls.py [--copies N] [--only NAME ...] [--workers N ...] [--step-ms MS ...]

Crops of `crop_first` (256 residues, up to 1,152 rows of real alignments where there are some, rank order) are
drawn by our plans, one of every record; each way delivers all of them once, in batches of 8 padded arrays
(msa uint8, deletions int32), made by the same function. A consumer takes a batch and sleeps for some
milliseconds, as one whose accelerator is busy. Ways, each with 0 workers (in the consumer's process), 1, 2:

  foldfeed   reading processes into shared memory (two threads where there is none), steps kept ahead
  npz        torch DataLoader over one compressed .npz a record, as Boltz and OpenFold 3 keep alignments
  atomworks  torch DataLoader over AtomWorks' packed store, read as its own transform does
  litdata    StreamingDataset of one zstd value a record, StreamingDataLoader, in its own shuffled order
  grain      MapDataset over ArrayRecord of one zstd value a record, threads or mp_prefetch

A way that is not installed is reported and left out; formats are those of `peers`. Measured: seconds to the
first batch, seconds waited for all others, and CPU seconds of the process and its workers. A row is written
to results/.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import alignments
import numpy as np
import torch
from our_readers import Arrays, Place, module
from peers import PEERS
from rows import emit
from store_peers import replicate

from foldfeed.feature_store import FeatureStore, MsaRecord
from foldfeed.loader.meters.meters import Meters
from foldfeed.loader.prefetch import StepPrefetcher
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.reading.reading import OwnThreads, ReadingProcesses
from foldfeed.loader.recipe import Recipe

NAME = "loader_stalls"
RESULTS = Path(__file__).parent / "results"
BATCH, AHEAD_STEPS, MIN_DEPTH = 8, 4, 200
FORMATS = {
    "foldfeed": "foldfeed",
    "npz": "npz",
    "atomworks": "atomworks",
    "litdata": "litdata",
    "grain": "array_record",
}
Batch = dict[str, np.ndarray]
Steps = Iterator[Batch]


def collate(crops: Sequence[Arrays]) -> Batch:
    """Returns crops as padded arrays (batch, rows, residues)."""
    shape = len(crops), *(max(crop[0].shape[axis] for crop in crops) for axis in (0, 1))
    batch = {"msa": np.full(shape, 22, np.uint8), "deletions": np.zeros(shape, np.int32)}
    for slot, (msa, deletions) in enumerate(crops):
        window = slot, slice(0, msa.shape[0]), slice(0, msa.shape[1])
        batch["msa"][window], batch["deletions"][window] = msa, deletions
    return batch


class Crops:
    """The crops of an epoch as a map-style dataset; each thread opens the files when it first reads."""

    def __init__(self, name: str, folder: Path, places: Sequence[Place]) -> None:
        self._name, self._folder, self._places = name, folder, places
        self._peers: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Arrays:
        # A decompressor is for one thread at a time.
        peer = self._peers.get(threading.get_ident())
        if peer is None:
            peer = PEERS[self._name]()
            peer.open(self._folder)
            self._peers[threading.get_ident()] = peer
        found: Arrays = peer.crop(self._places[number])
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_peers": {}}


def foldfeed_steps(folder: Path, num_samples: int, workers: int) -> Steps:
    """Yields batches of our reading."""
    reader, meters = reader_of(folder), Meters()
    supply = (
        ReadingProcesses(reader, workers, 1, 256 << 20, meters) if workers else OwnThreads(reader, meters)
    )

    def tasks(step: int) -> list[Callable[[], Any]]:
        numbers = range(step * BATCH, min((step + 1) * BATCH, num_samples))
        ahead = range((step + AHEAD_STEPS) * BATCH, min((step + AHEAD_STEPS + 1) * BATCH, num_samples))
        supply.ask(ahead)
        return [functools.partial(supply.get, number) for number in numbers]

    def assemble(step: int, parts: list[Any]) -> Batch:
        if not parts:
            # Made ahead, after the last one.
            return {}
        batch = collate([(part.arrays.msa, part.arrays.deletions) for part in parts])
        for part in parts:
            part.release()
        return batch

    try:
        supply.ask(range(min(AHEAD_STEPS * BATCH, num_samples)))
        with StepPrefetcher(tasks, assemble, first_step=0, depth=AHEAD_STEPS, num_threads=2) as steps:
            for _ in range(num_samples // BATCH):
                yield steps.next()
    finally:
        supply.close()


def torch_steps(crops: Crops, workers: int) -> Steps:
    """Yields batches of torch's DataLoader."""
    options = {"prefetch_factor": AHEAD_STEPS, "multiprocessing_context": "fork"} if workers else {}
    loader = torch.utils.data.DataLoader(
        crops, batch_size=BATCH, num_workers=workers, collate_fn=collate, drop_last=True, **options
    )
    yield from loader


def litdata_steps(folder: Path, places: Sequence[Place], workers: int) -> Steps:
    """Yields batches of LitData's loader, in its own order."""
    litdata, unpacked = module("litdata"), module("peers").unpacked
    decompress = module("zstandard").ZstdDecompressor().decompress
    by_record = {place.number: place for place in places}

    class Cropped(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Arrays:
            found: Arrays = unpacked(
                decompress(super().__getitem__(index)["data"]), by_record[_number(index)]
            )
            return found

    def _number(index: Any) -> int:
        return int(index if isinstance(index, int) else index.index)

    options = {"prefetch_factor": AHEAD_STEPS, "multiprocessing_context": "fork"} if workers else {}
    data = Cropped(str(folder), shuffle=True, drop_last=True)
    yield from litdata.StreamingDataLoader(
        data, batch_size=BATCH, num_workers=workers, collate_fn=collate, drop_last=True, **options
    )


def grain_steps(crops: Crops, workers: int) -> Steps:
    """Yields batches of Grain."""
    grain = module("grain")
    data = grain.MapDataset.source(crops).batch(BATCH, drop_remainder=True, batch_fn=collate)
    threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=AHEAD_STEPS)
    steps = data.to_iter_dataset(threads)
    if workers:
        steps = steps.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD_STEPS)
        )
    yield from steps


def cpu_s() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def consume(steps: Steps, step_s: float) -> dict[str, float]:
    """Returns what a consumer saw that takes so long for a step."""
    started, cpu = time.perf_counter(), cpu_s()
    waits, cells = [], 0
    before = started
    for batch in steps:
        waits.append(time.perf_counter() - before)
        cells += int((batch["msa"] != 22).sum()) + int(batch["deletions"].sum())
        time.sleep(step_s)
        before = time.perf_counter()
    return {
        "steps": len(waits),
        "first_s": waits[0],
        "stall_s": sum(waits[1:]),
        # Workers that have ended are counted; those of every way end with it.
        "cpu_s": cpu_s() - cpu,
        "checksum": cells,
    }


def measure(make: Callable[[int], Steps], cases: list[tuple[int, float]], answers: Any) -> None:
    """Sends `consume` of each case, or why there is none; the program of a process of its own for a way."""
    torch.set_num_threads(1)
    try:
        for workers, step_s in cases:
            answers.send(consume(make(workers), step_s))
    except ImportError as error:
        answers.send(f"not installed: {error.name}")
    except Exception as error:  # noqa: BLE001  a way of others that fails is a result
        answers.send(f"{type(error).__name__}: {error}")
    answers.close()


def reader_of(folder: Path) -> SampleReader:
    store = FeatureStore.open(folder / "s")
    recipe = Recipe.named("crop_first")
    return SampleReader(store, recipe, None, seed=1, global_batch=BATCH, virtual_shards=BATCH)


def draw_places(folder: Path, records: Sequence[MsaRecord]) -> list[Place]:
    """Returns the crops of one epoch of ours: rows, window and the number of the record as it was written."""
    numbers = {record.record_id: number for number, record in enumerate(records)}
    planned = map(reader_of(folder).planned, range(len(records)))
    return [
        Place(numbers[one.record.record_id], one.plan.rows, slice(*one.plan.columns))  # type: ignore[arg-type]
        for one in planned
    ]


def measured(
    name: str, folder: Path, places: Sequence[Place], cases: list[tuple[int, float]]
) -> Iterator[dict[str, float] | str]:
    """Yields what a consumer saw in each case, from a process that is fresh for this way."""
    crops = Crops(FORMATS[name], folder, places)
    make = {
        "foldfeed": functools.partial(foldfeed_steps, folder, len(places)),
        "litdata": functools.partial(litdata_steps, folder, places),
        "grain": functools.partial(grain_steps, crops),
    }.get(name, functools.partial(torch_steps, crops))
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measure, args=(make, cases, there))
    process.start()
    there.close()
    for _ in cases:
        try:
            yield here.recv()
        except EOFError:
            return
    process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=8, help="of each alignment")
    parser.add_argument("--only", nargs="*", default=list(FORMATS))
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0, 20, 100])
    parser.add_argument("--minutes", type=float, default=60.0, help="no way is begun after that")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = [record for record in replicate(options.copies) if record.depth >= MIN_DEPTH]
    records = sorted(records[: len(records) // BATCH * BATCH], key=lambda record: record.record_id)
    results: dict[str, Any] = {}
    stop = time.monotonic() + 60 * options.minutes
    whole = Path(tempfile.mkdtemp(prefix="foldfeed-stalls-", dir=options.work))
    # The readers' writer keeps what they share beside this folder.
    work = whole / "ours"
    work.mkdir()
    try:
        PEERS["foldfeed"]().write(records, work)
        places = draw_places(work, records)
        for name in options.only:
            if time.monotonic() > stop:
                results[name] = "not measured: no time was left"
                continue
            folder = work / f"of-{name}"
            folder.mkdir()
            try:
                PEERS[FORMATS[name]]().write(records, folder)
            except ImportError as error:
                results[name] = f"not installed: {error.name}"
                print(name, results[name], flush=True)
                continue
            cases = [(workers, step_ms / 1e3) for workers in options.workers for step_ms in options.step_ms]
            for (workers, step_s), found in zip(cases, measured(name, folder, places, cases), strict=False):
                results[f"{name}, {workers} workers, {1e3 * step_s:g} ms"] = found
                print(name, workers, step_s, found, flush=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(whole)
    config = {"records": len(records), "batch": BATCH, "ahead_steps": AHEAD_STEPS, "recipe": "crop_first"}
    emit(NAME, config | {"real": bool(alignments.a3m_files())}, results, options.output)


if __name__ == "__main__":
    main()
