"""How large tiles should be, in which order their cells, and with which codec.

Measures size, decode time and bytes read per crop.
Run: python bench/tile_layout.py [--output bench/results/tile_layout.jsonl]
Prints a table and one JSON row. Times are medians of CPU time on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import alignments
import numcodecs
import numpy as np
import rows
import zstandard

from foldfeed.feature_store import alphabet
from foldfeed.feature_store.permutation import KeyedPermutation

SHAPES = ((64, 64), (128, 64), (256, 64), (512, 32), (512, 64), (512, 128), (1024, 64), (2048, 32))
CROPS = {"256x512": (256, 512), "384x5120": (384, 5120)}
NUM_CROPS = 300


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
    names = list(table[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for entry in table:
        values = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in entry.values()]
        lines.append("| " + " | ".join(values) + " |")
    print("\n".join(lines))
    tokens = sum(msa.size for msa in msas)
    config = {
        "num_msas": len(msas),
        "tokens": tokens,
        "real": bool(alignments.a3m_files()),
        "crops": NUM_CROPS,
    }
    rows.emit("tile_layout", config, {"table": table}, options.output)


if __name__ == "__main__":
    main()
