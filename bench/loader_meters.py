"""What a loader's meters cost: their work for one sample against the time of a sample.

    python bench/loader_meters.py [--samples N] [--min-depth D] [--device cuda]

For each recipe the same samples are planned, read and made into features, one at a time on one thread; then
only what the meters do for them is done: the clocks of three activities, two histograms, the counters and the
sizes of what is read; with reading processes also its share of the note that travels beside some samples and
of that one's way into the meters here; and a trace's three events. Medians over samples. With a CUDA device
also what its stall costs a step: the two events on the consumer's stream (`stall_us`). A row is written to
results/.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import loader_store
import torch
from rows import emit

from foldfeed.feature_store.parts.tiles import sizes_of
from foldfeed.loader.features.host_features import host_features
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.meters.meters import FETCH, PLAN, PREPARE, Meters
from foldfeed.loader.meters.stall import DeviceStall
from foldfeed.loader.notes import PieceNote
from foldfeed.loader.reading.reader import PlannedSample, SampleReader
from foldfeed.loader.reading.reading import GROUP_SAMPLES
from foldfeed.loader.recipe import Recipe

NAME = "loader_meters"
RESULTS = Path(__file__).parent / "results"
RECIPES = ("crop_first", "af2")


def median_s(work: Callable[[PlannedSample], object], planned: Sequence[PlannedSample]) -> float:
    times = []
    for one in planned:
        started = time.perf_counter()
        work(one)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(reader: SampleReader, num_samples: int, trace: Path) -> dict[str, float]:
    planned = [reader.planned(sample) for sample in range(num_samples)]

    def sample(one: PlannedSample) -> None:
        host_features(RawSample.of(reader.fetch(reader.planned(one.number)).arrays), reader.recipe)

    def reading(one: PlannedSample) -> None:
        reader.fetch(reader.planned(one.number))

    reads = {}
    for one in planned:
        shape = one.record.resolve(slice(*one.plan.columns), one.plan.selection)
        part, tiled = one.record.part, one.record.tiled
        job = part.tiles.job(tiled, shape.window, shape.rows)
        reads[one.number] = part.tiles.reads([job], part.max_read_bytes), tiled.grid
    no_sizes = dict.fromkeys(("stored_bytes", "decoded_bytes", "used_bytes"), 1)

    def sizes(one: PlannedSample) -> None:
        # What reading a crop does for the meters, besides.
        sizes_of(*reads[one.number])

    def threads(one: PlannedSample) -> None:
        for activity in (PLAN, FETCH, PREPARE):
            with stage.doing(activity, sample=one.sample):
                pass
        sizes(one)
        meters.read(1e-3, no_sizes)
        meters.took("sample_prepare", 1e-3)

    def note(one: PlannedSample) -> None:
        # Of a whole group.
        spans = [
            (activity, 1, 1.0, 1.0, sample) for sample in range(GROUP_SAMPLES) for activity in (PLAN, FETCH)
        ]
        facts = json.dumps({"spans": spans, "times": meters.times()}).encode()
        now, numbers, read_s = time.perf_counter(), list(range(GROUP_SAMPLES)), [1e-3] * GROUP_SAMPLES
        written = PieceNote(0, 1, numbers, read_s, 1, (1, 1, 1), now, facts).pack()
        meters.heard(1, PieceNote.unpack(written))

    for one in planned[:3]:
        sample(one)
    sample_s, reading_s = median_s(sample, planned), median_s(reading, planned)
    meters = Meters()
    stage = meters.stage(PREPARE)
    found = {
        "sample_ms": 1e3 * sample_s,
        "reading_ms": 1e3 * reading_s,
        "meters_us": 1e6 * median_s(threads, planned),
        "sizes_us": 1e6 * median_s(sizes, planned),
        "note_us": 1e6 * median_s(note, planned) / GROUP_SAMPLES,
    }
    with meters.tracing(trace):
        found["meters_and_trace_us"] = 1e6 * median_s(threads, planned)
    found["report_us"] = 1e6 * median_s(lambda _: meters.report(), planned[:20])
    return found | {
        "share_of_sample": found["meters_us"] * 1e-6 / sample_s,
        "share_of_sample_with_processes": (found["meters_us"] + found["note_us"]) * 1e-6 / sample_s,
        "share_of_reading": found["meters_us"] * 1e-6 / reading_s,
    }


def stall_us(device: torch.device, steps: int) -> float:
    """Returns microseconds of the host for the events of a step."""
    stall, times = DeviceStall(device), []
    for _ in range(steps + 10):
        started = time.perf_counter()
        stall.asked()
        stall.arrived()
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize(device)
    assert stall.seconds >= 0
    return 1e6 * statistics.median(times[10:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--min-depth", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store, about = loader_store.build(f"{folder}/store", arguments.min_depth)
        for name in RECIPES:
            recipe = Recipe.named(name)
            reader = SampleReader(store, recipe, None, seed=0, global_batch=8, virtual_shards=8)
            results[name] = measure(reader, arguments.samples, Path(folder) / "trace.json")
            print(name, {key: round(value, 4) for key, value in results[name].items()}, flush=True)
    if arguments.device != "cpu":
        results["step"] = {"stall_us": stall_us(torch.device(arguments.device), 10 * arguments.samples)}
        print("step", results["step"], flush=True)
    config = {"samples": arguments.samples, "device": arguments.device}
    emit(NAME, config | about, results, arguments.output)


if __name__ == "__main__":
    main()
