"""Our part, read by our own reader and by others: foldfeed, a ceiling, zarr-python, zarrs, TensorStore.

The classes have the shape that `peers` describes. What somebody else's library cannot know (where the tiles
of a crop lie, exact counts above 254) is ours for all of them and is prepared outside the measured reads.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from foldfeed.feature_store import FeatureStore, MsaRecord, StoreSettings, write_part
from foldfeed.feature_store.format.grid import TileBox, grid_of, plan_crop
from foldfeed.feature_store.format.schema import DELETION_OVERFLOW

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a crop lies."""

    number: int
    rows: slice
    cols: slice


def module(name: str) -> Any:
    return importlib.import_module(name)


class Foldfeed:
    """Ours."""

    settings = StoreSettings()

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        # Written once for all that read it; each gets links of its own.
        shared = folder.parent / f"shared-{self.settings.row_order}"
        if not shared.exists():
            store = FeatureStore.create(shared, self.settings)
            part = write_part(store.url, records, store.settings)
            store.commit([part.part_id], job_id="bench")
        shutil.copytree(shared, folder / "s", copy_function=os.link)

    def open(self, folder: Path) -> None:
        self.store = FeatureStore.open(folder / "s")

    def crop(self, place: Place) -> Arrays:
        piece = self.store.at(place.number).crop(residues=place.cols, rows=place.rows)
        return piece.msa, piece.deletions

    def rows(self, place: Place) -> slice | np.ndarray:
        """Returns the ranks of the rows that the last crop holds."""
        return place.rows

    def close(self) -> None:
        pass


class FoldfeedSlab(Foldfeed):
    """Ours with permuted rows: as many rows as the others, the query and a run of hits in stored order."""

    settings = StoreSettings.with_row_order("permuted")

    def crop(self, place: Place) -> Arrays:
        record = self.store.at(place.number)
        start = min(place.rows.start, max(record.depth - 2, 0))
        self.last = record.slab(place.cols, start=start, num_rows=place.rows.stop - place.rows.start)
        return self.last.msa, self.last.deletions

    def rows(self, place: Place) -> np.ndarray:
        """Returns the ranks that the last crop holds."""
        return self.last.ranks


class OurArrays(Foldfeed):
    """Our part, read by something else: what that needs to know, prepared outside the measured reads."""

    def prepare(self, records: list[MsaRecord], places: list[Place]) -> None:
        """Finds the counts above 254 of the records that are going to be read."""
        by_array: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.overflow = {}
        for place in places:
            deletions = records[place.number].deletions
            found = by_array.get(id(deletions))
            if found is None:
                rows, cols = np.nonzero(deletions >= DELETION_OVERFLOW)
                found = by_array[id(deletions)] = (rows, cols, deletions[rows, cols])
            self.overflow[place.number] = found

    def locate(self, place: Place) -> tuple[str, list[TileBox], Arrays]:
        """Returns the part of a crop, the tiles that it reads, and fresh arrays for it."""
        record = self.store.at(place.number)
        at, part = record._at, record._part
        grid = grid_of(at.first_tile, at.depth, at.length, part.settings)
        boxes = plan_crop(grid, (place.cols.start, place.cols.stop), place.rows)
        shape = (place.rows.stop - place.rows.start, place.cols.stop - place.cols.start)
        return part.part_id, boxes, (np.empty(shape, np.uint8), np.empty(shape, np.int32))

    def restore(self, place: Place, deletions: np.ndarray) -> np.ndarray:
        """Puts counts above 254 where the tiles say 255."""
        rows, cols, counts = self.overflow[place.number]
        if len(rows):
            inside = (rows >= place.rows.start) & (rows < place.rows.stop)
            inside &= (cols >= place.cols.start) & (cols < place.cols.stop)
            deletions[rows[inside] - place.rows.start, cols[inside] - place.cols.start] = counts[inside]
        return deletions


class Ceiling(OurArrays):
    """The same tiles by plain pread + libzstd + copy: no checksum, and the plans are made before."""

    def open(self, folder: Path) -> None:
        super().open(folder)
        self.decompress = zstandard.ZstdDecompressor().decompress

    def prepare(self, records: list[MsaRecord], places: list[Place]) -> None:
        super().prepare(records, places)
        self.plans = {id(place): self.plan(place) for place in places}

    def plan(self, place: Place) -> list[tuple[Any, ...]]:
        record = self.store.at(place.number)
        part, at = record._part, record._at
        grid = grid_of(at.first_tile, at.depth, at.length, part.settings)
        steps = []
        for name in ("msa", "deletion"):
            shard = part.arrays[name]
            _, index = shard._open()
            handle = self._handle(shard._blobs.root / shard.path)
            for box in plan_crop(grid, (place.cols.start, place.cols.stop), place.rows):
                offset, size = (int(value) for value in index[box.tile])
                if offset != 2**64 - 1:
                    steps.append((name, handle, offset, size - 4, box, shard.spec.chunk[1:]))
        return steps

    def _handle(self, path: Path) -> int:
        handles = self.__dict__.setdefault("handles", {})
        return handles.setdefault(path, handles.get(path) or os.open(path, os.O_RDONLY))

    def crop(self, place: Place) -> Arrays:
        shape = (place.rows.stop - place.rows.start, place.cols.stop - place.cols.start)
        msa, deletions = np.empty(shape, np.uint8), np.zeros(shape, np.int32)
        for name, handle, offset, size, box, tile_shape in self.plans[id(place)]:
            raw = self.decompress(os.pread(handle, size, offset))
            tile = np.frombuffer(raw, np.uint8).reshape(tile_shape)[box.tile_rows, box.tile_cols]
            (msa if name == "msa" else deletions)[box.out_rows, box.out_cols] = tile
        return msa, self.restore(place, deletions)

    def close(self) -> None:
        for handle in self.__dict__.get("handles", {}).values():
            os.close(handle)


class ZarrPython(OurArrays):
    """Our part through zarr-python, one orthogonal selection of tiles per array."""

    def open(self, folder: Path) -> None:
        super().open(folder)
        zarr = module("zarr")
        self.arrays = self._open_arrays(zarr)
        self.configure(zarr)

    def _open_arrays(self, zarr: Any) -> dict[str, tuple[Any, Any]]:
        groups = {
            part: zarr.open_group(f"{self.store.url}/parts/{part}", mode="r")
            for part in set(self.store.table(["part_id"])["part_id"].to_pylist())
        }
        return {part: (group["msa"], group["deletion"]) for part, group in groups.items()}

    def configure(self, zarr: Any) -> None:
        pass

    def crop(self, place: Place) -> Arrays:
        part_id, boxes, out = self.locate(place)
        numbers = [box.tile for box in boxes]
        for array, values in zip(self.arrays[part_id], out, strict=True):
            tiles = array.oindex[numbers]
            for box, tile in zip(boxes, tiles, strict=True):
                values[box.out_rows, box.out_cols] = tile[box.tile_rows, box.tile_cols]
        return out[0], self.restore(place, out[1])


class Zarrs(ZarrPython):
    """Our part through zarr-python with the zarrs (Rust) pipeline."""

    def configure(self, zarr: Any) -> None:
        module("zarrs")
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        self.arrays = self._open_arrays(zarr)

    def close(self) -> None:
        module("zarr").config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"})


class ZarrFused(ZarrPython):
    """Our part through zarr-python 3.2 or newer with its synchronous pipeline (FusedCodecPipeline)."""

    def configure(self, zarr: Any) -> None:
        if not hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
            raise ImportError("zarr has no FusedCodecPipeline (needs Python 3.12)", name="zarr>3.1")
        zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"})
        self.arrays = self._open_arrays(zarr)

    def close(self) -> None:
        module("zarr").config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"})


class TensorStore(OurArrays):
    """Our part through TensorStore: a cache pool that holds every shard index, a crop's reads in flight."""

    def open(self, folder: Path) -> None:
        super().open(folder)
        tensorstore = module("tensorstore")
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 512 << 20}})
        self.tensors = {
            part: tuple(
                tensorstore.open(
                    {
                        "driver": "zarr3",
                        "kvstore": {"driver": "file", "path": f"{self.store.url}/parts/{part}/{name}/"},
                        "recheck_cached_data": "open",
                    },
                    context=context,
                    read=True,
                ).result()
                for name in ("msa", "deletion")
            )
            for part in set(self.store.table(["part_id"])["part_id"].to_pylist())
        }

    def crop(self, place: Place) -> Arrays:
        part_id, boxes, out = self.locate(place)
        reads = [[(box, tensor[box.tile].read()) for box in boxes] for tensor in self.tensors[part_id]]
        for values, read in zip(out, reads, strict=True):
            for box, future in read:
                values[box.out_rows, box.out_cols] = future.result()[box.tile_rows, box.tile_cols]
        return out[0], self.restore(place, out[1])
