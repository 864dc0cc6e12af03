"""How large tiles should be, in which order their cells, and with which codec; what samples of rows read.

Measures size, decode time and bytes read per crop; then, for stores of both row orders, what the loader's own
plans of the recipe `crop_first` read, and the tiles that a random sample of a deep alignment touches.
Run: python bench/tile_layout.py [--output bench/results/tile_layout.jsonl]
Prints tables and one JSON row. Times are medians of CPU time on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alignments
import numcodecs
import numpy as np
import rows
import zstandard
from remote_reads import Late

from foldfeed.feature_store import FeatureStore, MsaRecord, StoredRun, StoreSettings, write_part
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.grid import RecordGrid, plan_crop, plan_run
from foldfeed.feature_store.format.permutation import KeyedPermutation
from foldfeed.loader import CropLoader, Recipe
from foldfeed.loader.reading.fetch import fetch

SHAPES = ((64, 64), (128, 64), (256, 64), (512, 32), (512, 64), (512, 128), (1024, 64), (2048, 32))
CROPS = {"256x512": (256, 512), "384x5120": (384, 5120)}
NUM_CROPS = 300
SLAB_SHAPES = ((64, 64), (128, 64), (256, 64), (512, 64), (128, 32))
NUM_SAMPLES = 1000


def zstd(level: int) -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    return zstandard.ZstdCompressor(level=level).compress, zstandard.ZstdDecompressor().decompress


def blosc(name: str, shuffle: int) -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    codec = numcodecs.Blosc(cname=name, clevel=5, shuffle=shuffle)
    return codec.encode, codec.decode


CODECS = {
    "zstd-1": zstd(1),
    "zstd-3": zstd(3),
    "zstd-9": zstd(9),
    "zstd-15": zstd(15),
    "blosc-lz4-bitshuffle": blosc("lz4", numcodecs.Blosc.BITSHUFFLE),
    "blosc-zstd-bitshuffle": blosc("zstd", numcodecs.Blosc.BITSHUFFLE),
}


def tiles_of(msa: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns (row tiles, col tiles, tile_rows, tile_cols)."""
    bands, across = -(-msa.shape[0] // shape[0]), -(-msa.shape[1] // shape[1])
    padded = np.full((bands * shape[0], across * shape[1]), alphabet.PADDING, np.uint8)
    padded[: msa.shape[0], : msa.shape[1]] = msa
    return np.ascontiguousarray(padded.reshape(bands, shape[0], across, shape[1]).swapaxes(1, 2))


def permute(msa: np.ndarray, seed: int) -> np.ndarray:
    depth = len(msa)
    if depth < 3:
        return msa
    return np.concatenate(
        [msa[:1], msa[1 + KeyedPermutation(depth - 1, (seed,)).forward(np.arange(depth - 1))]]
    )


def measure(msas: list[np.ndarray], shape: tuple[int, int], cell_order: str, codec: str) -> dict[str, float]:
    encode, decode = CODECS[codec]
    stored = tokens = cells = 0
    encoded, sizes = [], []
    for msa in msas:
        tiles = tiles_of(msa, shape)
        if cell_order == "column":
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        blobs = [bytes(encode(tile.tobytes())) for tile in tiles.reshape(-1, shape[0], shape[1])]
        encoded += blobs
        sizes.append(np.array([len(blob) for blob in blobs]).reshape(tiles.shape[:2]))
        stored += sum(map(len, blobs))
        tokens += msa.size
        cells += tiles.size
    times = []
    for _ in range(3):
        started = time.process_time()
        for blob in encoded:
            decode(blob)
        times.append(time.process_time() - started)
    result = {
        "ratio": tokens / stored,
        "padding": cells / tokens,
        "decode_mb_per_s": cells / statistics.median(times) / 1e6,
    }
    rng = np.random.default_rng(1)
    for name, (length, depth) in CROPS.items():
        read = used = 0
        for _ in range(NUM_CROPS):
            number = int(rng.integers(len(msas)))
            rows_, cols = msas[number].shape
            take_rows, take_cols = min(rows_, depth), min(cols, length)
            top, left = int(rng.integers(rows_ - take_rows + 1)), int(rng.integers(cols - take_cols + 1))
            bands = slice(top // shape[0], -(-(top + take_rows) // shape[0]))
            across = slice(left // shape[1], -(-(left + take_cols) // shape[1]))
            read += int(sizes[number][bands, across].sum())
            # What the same tokens cost at this layout's own compression: the waste is what tiles add.
            used += take_rows * take_cols * sizes[number].sum() / (rows_ * cols)
        result[f"read_over_used_{name}"] = read / float(used)
    return result


def sample_reads(records: list[MsaRecord], settings: StoreSettings, recipe: Recipe) -> dict[str, float]:
    """Returns what the loader's plans read of a store, and what their tokens cost at its own compression.

    Per sample: tiles of `msa` and bytes of the tiles of both arrays, from the plan; bytes of everything a
    sample reads (also sidecars, and gaps between tiles), counted as they are read.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = FeatureStore.create(f"{folder}/s", settings)
        part = write_part(made.url, records, settings)
        made.commit([part.part_id], job_id="bench")
        store = FeatureStore.open(made.url)
        late = store._blobs = Late(store._blobs, 0.0)
        loader = CropLoader(store, recipe, seed=0, global_batch=1)
        whole = {name: store[name].crop_bytes() for name in store.ids}
        tiles, read, used = [], [], []
        for sample in range(NUM_SAMPLES):
            plan = loader.plan(sample)
            record = store.at(plan.address.record)
            found = record.plan(slice(*plan.columns), plan.selection)
            tiles.append(len(found.msa_tiles))
            read.append(found.num_bytes)
            share = plan.num_cells / (record.depth * record.length)
            used.append(share * whole[record.record_id])
        late.num_bytes = 0
        for sample in range(NUM_SAMPLES // 5):
            plan = loader.plan(sample)
            fetch(store.at(plan.address.record), plan)
        all_bytes = late.num_bytes / (NUM_SAMPLES // 5)
    shares = np.array(read) / np.array(used)
    return {
        "store_bytes_per_token": sum(whole.values()) / sum(record.msa.size for record in records),
        "msa_tiles": float(np.mean(tiles)),
        "kb_read": float(np.mean(read)) / 1e3,
        "kb_used": float(np.mean(used)) / 1e3,
        "read_over_used": sum(read) / float(sum(used)),
        "median_over_samples": float(np.median(shares)),
        "kb_with_sidecars": all_bytes / 1e3,
    }


def deep_tiles(tile_rows: int, depth: int = 16384, num_rows: int = 512) -> dict[str, float]:
    """Returns which share of a deep alignment's bands of tiles a random sample of rows touches."""
    rng = np.random.default_rng(2)
    grid = RecordGrid(first_tile=0, depth=depth, length=64, tile_rows=tile_rows, tile_cols=64)
    slabs, ranks = [], []
    for _ in range(200):
        run = StoredRun(int(rng.integers(depth - 1)), num_rows)
        slabs.append(len({box.tile for box in plan_run(grid, (0, 64), run)[0]}))
        hits = np.sort(1 + rng.choice(depth - 1, num_rows - 1, replace=False))
        ranks.append(len(plan_crop(grid, (0, 64), np.concatenate([[0], hits]))))
    return {"bands": grid.row_tiles, "touched_by_slab": np.mean(slabs), "touched_by_ranks": np.mean(ranks)}


def sample_table() -> list[dict[str, Any]]:
    """Returns `sample_reads` and `deep_tiles` of stores that differ in row order and tile."""
    records = list(alignments.records())
    table = []
    for row_order, shapes in (("rank", ((512, 64),)), ("permuted", SLAB_SHAPES)):
        for tile_rows, tile_cols in shapes:
            settings = StoreSettings(tile_rows=tile_rows, tile_cols=tile_cols, row_order=row_order)
            for block_delete in (True, False):
                recipe = Recipe.named("crop_first", block_delete=block_delete)
                row = {"tile": f"{tile_rows}x{tile_cols}", "rows": row_order, "block_delete": block_delete}
                table.append(row | sample_reads(records, settings, recipe) | deep_tiles(tile_rows))
    return table


def show(table: list[dict[str, Any]]) -> None:
    names = list(table[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for entry in table:
        values = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in entry.values()]
        lines.append("| " + " | ".join(values) + " |")
    print("\n".join(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "tile_layout.jsonl"
    )
    options = parser.parse_args()
    msas = [record.msa for record in alignments.records()]
    orders = {"rank": msas, "permuted": [permute(msa, seed) for seed, msa in enumerate(msas)]}
    plan = [(shape, "rank", "row", "zstd-3") for shape in SHAPES]
    plan += [(shape, "permuted", "row", "zstd-3") for shape in ((128, 64), (512, 64))]
    plan += [((512, 64), "rank", "column", "zstd-3"), ((128, 64), "rank", "column", "zstd-3")]
    plan += [((512, 64), "rank", "row", codec) for codec in CODECS if codec != "zstd-3"]
    table = []
    for shape, row_order, cell_order, codec in plan:
        result = measure(orders[row_order], shape, cell_order, codec)
        table.append(
            {"tile": f"{shape[0]}x{shape[1]}", "rows": row_order, "cells": cell_order, "codec": codec}
            | result
        )
    show(table)
    samples = sample_table()
    show(samples)
    tokens = sum(msa.size for msa in msas)
    config = {
        "num_msas": len(msas),
        "tokens": tokens,
        "real": bool(alignments.a3m_files()),
        "crops": NUM_CROPS,
        "samples": NUM_SAMPLES,
    }
    rows.emit("tile_layout", config, {"table": table, "samples": samples}, options.output)


if __name__ == "__main__":
    main()
