"""How fast a store is written and looked after, and what an index of a million records costs.

Run: python bench/care.py [--copies 12] [--records 1000000] [--repeat 5] [--work DIR] [--index-only]

The real alignments (or synthetic ones) are replicated under new names and written as parts of 105 records,
in one process and one thread; verify and copy use their own two threads. The page cache is warm, files are
forced to the disk as always. A token is one cell of an alignment, one byte; "stored" are the bytes of the
parts. Each number is the median of --repeat runs.

The index is synthetic: --records rows with sequences of 250 residues, digests of random bytes and three
databases each, all pointing into one real part. It is opened in fresh processes; the time is that of
``FeatureStore.open`` and ``len``, imports excluded; the memory is the highest resident set of the process,
imports included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import alignments
import numpy as np
import pyarrow as pa
import rows

from foldfeed.feature_store import DatabaseUse, FeatureStore, MsaRecord, RowProvenance, write_part
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.index.transactions import Index

OUTPUT = Path(__file__).parent / "results" / "care.jsonl"
RECORDS_PER_PART = 105
LENGTH = 250
DEPTH = 512
BLOCK = 1 << 17
LOOKUPS = 2000


def replicate(copies: int) -> list[MsaRecord]:
    """Returns the records under new ids, in order; the arrays are shared."""
    base = list(alignments.records())
    return [
        dataclasses.replace(record, record_id=f"{record.record_id}c{copy:04d}")
        for record in base
        for copy in range(copies)
    ]


def write_store(folder: Path, records: Sequence[MsaRecord]) -> tuple[float, float]:
    """Writes parts and commits them; returns wall and CPU seconds."""
    store = FeatureStore.create(folder)
    wall, cpu = time.perf_counter(), time.process_time()
    parts = [
        write_part(store.url, records[start : start + RECORDS_PER_PART], store.settings).part_id
        for start in range(0, len(records), RECORDS_PER_PART)
    ]
    store.commit(parts, job_id="bench")
    return time.perf_counter() - wall, time.process_time() - cpu


def medians(work: Path, repeat: int, run: Callable[[Path], tuple[float, ...]]) -> tuple[float, ...]:
    """Returns the median of each number over runs with a folder of their own."""
    found = []
    for number in range(repeat):
        folder = work / f"run-{number}"
        found.append(run(folder))
        shutil.rmtree(folder, ignore_errors=True)
    return tuple(map(statistics.median, zip(*found, strict=True)))


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_care(work: Path, copies: int, repeat: int) -> dict[str, float]:
    """Returns megabytes per second of writing, verify, copy and compact, and of a question about rows."""
    records = replicate(copies)
    tokens = sum(record.msa.size for record in records) / 1e6
    num_rows = sum(record.depth for record in records)
    wall, cpu = medians(work, repeat, lambda folder: write_store(folder, records))
    source = work / "source"
    write_store(source, records)
    store = FeatureStore.open(source)
    stored = sum(file.num_bytes for file in store._files().walk("parts")) / 1e6

    def compacted(folder: Path) -> tuple[float]:
        shutil.copytree(source, folder)
        seconds = timed(lambda: compact(folder, target_bytes=1 << 30))
        assert len(FeatureStore.open(folder).table(["part_id"])["part_id"].unique()) == 1
        return (seconds,)

    (full,) = medians(work, repeat, lambda _: (timed(lambda: verify(source)),))
    (deep,) = medians(work, repeat, lambda _: (timed(lambda: verify(source, level="deep")),))
    (copied,) = medians(work, repeat, lambda folder: (timed(lambda: copy_store(source, folder)),))
    (moved,) = medians(work, repeat, compacted)
    question = "select database, count(*) from rows group by 1"
    (asked,) = medians(work, repeat, lambda _: (timed(lambda: store.query(question)),))
    return {
        "num_records": len(records),
        "tokens_mb": tokens,
        "stored_mb": stored,
        "write_tokens_mb_per_cpu_s": tokens / cpu,
        "write_tokens_mb_per_s": tokens / wall,
        "verify_stored_mb_per_s": stored / full,
        "verify_tokens_mb_per_s": tokens / full,
        "verify_deep_stored_mb_per_s": stored / deep,
        "verify_deep_tokens_mb_per_s": tokens / deep,
        "copy_stored_mb_per_s": stored / copied,
        "copy_tokens_mb_per_s": tokens / copied,
        "compact_stored_mb_per_s": stored / moved,
        "compact_tokens_mb_per_s": tokens / moved,
        "query_million_rows_per_s": num_rows / 1e6 / asked,
    }


def one_record() -> MsaRecord:
    """Returns the record to which every row of the synthetic index points."""
    rng = np.random.default_rng(0)
    msa = rng.integers(0, alphabet.NUM_TOKENS, (DEPTH, LENGTH)).astype(np.uint8)
    msa[0] %= 20
    return MsaRecord(
        record_id="r0",
        description="",
        sequence=alphabet.decode(msa[0]),
        msa=msa,
        deletions=np.zeros(msa.shape, np.int32),
        rows=RowProvenance(
            database=np.full(DEPTH, -1, np.int16),
            e_value=np.full(DEPTH, np.nan),
            bit_score=np.full(DEPTH, np.nan, np.float32),
            hit_id=[f"hit{row}" for row in range(DEPTH)],
            species=[""] * DEPTH,
        ),
        databases=(DatabaseUse(name="x", digest="", tool="", tool_version="", num_hits=0, num_rows=0),),
    )


def fixed_texts(data: bytes, size: int) -> pa.Array:
    """Returns text cut into pieces of one size."""
    offsets = np.arange(0, len(data) + 1, size, dtype=np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def index_block(start: int, stop: int, place: dict[str, object]) -> pa.Table:
    """Returns rows of a synthetic index; ids are like ``r0000042_A``."""
    count, rng = stop - start, np.random.default_rng(start)
    letters = np.frombuffer(alphabet.RESIDUES.encode(), np.uint8)
    digests = [fixed_texts(rng.bytes(32 * count).hex().encode(), 64) for _ in range(2)]
    use_type = INDEX_SCHEMA.field("databases").type.value_type
    use = {"digest": "ab" * 32, "tool": "jackhmmer", "tool_version": "3.4", "num_hits": 900, "num_rows": 300}
    uses = [{"name": name} | use for name in ("uniref90", "mgnify", "bfd_uniclust")]
    databases = pa.ListArray.from_arrays(
        pa.array(np.arange(0, 3 * count + 1, 3, dtype=np.int32)),
        pa.array(uses, use_type).take(pa.array(np.tile(np.arange(3), count))),
    )
    found = {
        "record_id": fixed_texts("".join(f"r{n:07d}_A" for n in range(start, stop)).encode(), 10),
        "sequence": fixed_texts(letters[rng.integers(0, 20, count * LENGTH)].tobytes(), LENGTH),
        "sequence_sha256": digests[0],
        "fingerprint": digests[1],
        "databases": databases.cast(INDEX_SCHEMA.field("databases").type),
    }
    columns = [
        found[field.name]
        if field.name in found
        else pa.repeat(pa.scalar(place[field.name], field.type), count)
        for field in INDEX_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=INDEX_SCHEMA)


def make_index(folder: Path, num_records: int) -> None:
    """Makes a store whose index has so many rows and which has one part."""
    store = FeatureStore.create(folder)
    part = write_part(store.url, [one_record()], store.settings)
    (place,) = store._part(part.part_id).index_rows()
    place |= {"part_id": part.part_id, "job_id": "bench"}
    blocks = [
        index_block(start, min(start + BLOCK, num_records), place) for start in range(0, num_records, BLOCK)
    ]
    Index.open(store.url, None).commit(pa.concat_tables(blocks), job_id="b", message="", on_existing="error")


def measure_open_index(folder: str) -> dict[str, float]:
    """Returns what this fresh process needs for opening, finding and planning."""
    before = resident_mb()
    start = time.perf_counter()
    store = FeatureStore.open(folder)
    count = len(store)
    opened = time.perf_counter() - start
    peak = resident_mb()
    rng = np.random.default_rng(1)
    names = [f"r{n:07d}_A" for n in rng.integers(0, count, 6 * LOOKUPS).tolist()]
    windows = [slice(a, a + 128) for a in rng.integers(0, LENGTH - 128, LOOKUPS).tolist()]
    lookups, plans = [], []
    for number in range(0, len(names), LOOKUPS):
        some = names[number : number + LOOKUPS]
        lookups.append(timed(lambda some=some: [store[name] for name in some]) / LOOKUPS)  # type: ignore[misc]
        found = [store[name] for name in some]
        asked = list(zip(found, windows, strict=True))
        plans.append(
            timed(lambda asked=asked: [one.plan(window, slice(0, DEPTH)) for one, window in asked])  # type: ignore[misc]
            / LOOKUPS
        )
    return {
        "index_records": count,
        "open_s": opened,
        "open_peak_mb": peak,
        "imports_mb": before,
        "lookup_us": statistics.median(lookups) * 1e6,
        "plan_us": statistics.median(plans) * 1e6,
    }


def resident_mb() -> float:
    """Returns the highest resident set of this process so far, in MB (1e6 bytes).

    Not ``ru_maxrss``: a child inherits that of the process that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def measure_index(folder: Path, num_records: int, repeat: int) -> dict[str, float]:
    """Returns medians over fresh processes, and the size of the index."""
    make_index(folder, num_records)
    command = [sys.executable, __file__, "--measure", str(folder)]
    runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(repeat)]
    size = sum(file.stat().st_size for file in (folder / "index").glob("*.parquet")) / 1e6
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {"index_mb": size}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--index-only", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure_open_index(chosen.measure)))
        return
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        work = Path(folder)
        results = measure_index(work / "index-store", chosen.records, chosen.repeat)
        if not chosen.index_only:
            results = measure_care(work, chosen.copies, chosen.repeat) | results
    real = bool(alignments.a3m_files())
    config = {
        "alignments": "real" if real else "synthetic",
        "copies": chosen.copies,
        "records_per_part": RECORDS_PER_PART,
        "repeat": chosen.repeat,
        "statistic": "median",
    }
    rows.emit("care", config, {name: round(value, 3) for name, value in results.items()}, OUTPUT)


if __name__ == "__main__":
    main()
