"""Real alignments for benchmarks: all A3M files of the test data; synthetic ones where there are none."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from foldfeed.feature_store import DatabaseUse, MsaRecord, RowProvenance
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.parsers.a3m import parse_a3m

ROOT = Path(__file__).parents[1]


def data_folder() -> Path | None:
    """Returns the folder of the test data, or None."""
    path = Path(os.environ.get("FOLDFEED_TEST_DATA", ROOT.parent / "shared" / "data"))
    return path if path.is_dir() else None


def a3m_files() -> list[Path]:
    """Returns the plain and gzipped A3M files of the test data whose first row is the query."""
    folder = data_folder()
    files = sorted(folder.glob("msas/*/*.a3m*")) if folder else []
    return [path for path in files if "hmmsearch" not in path.name and "ss_rows" not in path.name]


def read_text(path: Path) -> bytes:
    """Returns the text of an alignment file."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def records() -> Iterator[MsaRecord]:
    """Yields real records, or synthetic ones where there is no test data; ids increase."""
    for number, path in enumerate(a3m_files()):
        parsed = parse_a3m(read_text(path))
        yield _record(f"msa{number:04d}", parsed.msa, parsed.deletions, list(parsed.names))
    if not a3m_files():
        rng = np.random.default_rng(0)
        for number, depth in enumerate((40, 388, 1200, 4400, 9000)):
            length = 60 + 45 * number
            query = rng.integers(0, 20, length)
            keep = rng.random((depth, length)) < rng.uniform(0.2, 0.9, (depth, 1))
            msa = np.where(keep, query, rng.integers(0, 22, (depth, length))).astype(np.uint8)
            msa[0] = query
            deletions = np.where(rng.random((depth, length)) < 0.01, 3, 0).astype(np.int32)
            yield _record(f"msa{number:04d}", msa, deletions, [f"hit{row}" for row in range(depth)])


def _record(name: str, msa: np.ndarray, deletions: np.ndarray, names: list[str]) -> MsaRecord:
    depth = len(msa)
    return MsaRecord(
        record_id=name,
        description="",
        sequence=alphabet.decode(msa[0]),
        msa=msa,
        deletions=deletions,
        rows=RowProvenance(
            database=np.concatenate([[-1], np.zeros(depth - 1)]).astype(np.int16),
            e_value=np.full(depth, np.nan),
            bit_score=np.full(depth, np.nan, np.float32),
            hit_id=[(text.split() or [""])[0] for text in names],
            species=[""] * depth,
        ),
        databases=(
            DatabaseUse(
                name="bench",
                digest="",
                tool="import",
                tool_version="",
                num_hits=depth - 1,
                num_rows=depth - 1,
            ),
        ),
    )
