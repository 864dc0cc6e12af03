"""The formats that `store_peers.py` compares: one small class each, with the same four methods.

    write(records, folder)   stores msa and deletions of every record
    open(folder)             gets ready to read
    crop(place)              returns fresh (msa, deletions) of a window; deletions may be None where only text
    exists close()

Libraries are imported inside the methods, so that a missing one is reported and skipped.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from foldfeed.feature_store import FeatureStore, MsaRecord, alphabet, write_part
from foldfeed.feature_store.layout import grid_of, plan_crop

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a crop lies."""

    number: int
    rows: slice
    cols: slice


def module(name: str) -> Any:
    return importlib.import_module(name)


def cut(msa: np.ndarray, deletions: np.ndarray, place: Place) -> Arrays:
    window = place.rows, place.cols
    return msa[window].copy(), deletions[window].astype(np.int32)


class Foldfeed:
    """Ours."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        store = FeatureStore.create(folder / "s")
        part = write_part(store.url, records, store.settings)
        store.commit([part.part_id], job_id="bench")

    def open(self, folder: Path) -> None:
        self.store = FeatureStore.open(folder / "s")

    def crop(self, place: Place) -> Arrays:
        piece = self.store.at(place.number).crop(residues=place.cols, rows=place.rows)
        return piece.msa, piece.deletions

    def close(self) -> None:
        pass


class Ceiling(Foldfeed):
    """The same tiles by plain pread + libzstd + copy: no checksum, and the plans are made before."""

    def open(self, folder: Path) -> None:
        super().open(folder)
        self.plans: dict[tuple[int, ...], list[tuple[Any, ...]]] = {}
        self.decompress = zstandard.ZstdDecompressor().decompress

    def plan(self, place: Place) -> list[tuple[Any, ...]]:
        record = self.store.at(place.number)
        part, at = record._part, record._at
        grid = grid_of(at.first_tile, at.depth, at.length, part.settings)
        steps = []
        for name in ("msa", "deletion"):
            shard = part.arrays[name]
            _, index = shard._open()
            handle = self._handle(shard._blobs.root / shard._path)
            for box in plan_crop(grid, (place.cols.start, place.cols.stop), place.rows):
                offset, size = (int(value) for value in index[box.tile])
                if offset != 2**64 - 1:
                    steps.append((name, handle, offset, size - 4, box, shard.spec.chunk[1:]))
        return steps

    def _handle(self, path: Path) -> int:
        handles = self.__dict__.setdefault("handles", {})
        return handles.setdefault(path, handles.get(path) or os.open(path, os.O_RDONLY))

    def crop(self, place: Place) -> Arrays:
        key = place.number, place.rows.start, place.cols.start, place.rows.stop, place.cols.stop
        steps = self.plans.get(key)
        if steps is None:
            steps = self.plans[key] = self.plan(place)
        shape = (place.rows.stop - place.rows.start, place.cols.stop - place.cols.start)
        msa, deletions = np.empty(shape, np.uint8), np.zeros(shape, np.int32)
        for name, handle, offset, size, box, tile_shape in steps:
            raw = self.decompress(os.pread(handle, size, offset))
            tile = np.frombuffer(raw, np.uint8).reshape(tile_shape)[box.tile_rows, box.tile_cols]
            (msa if name == "msa" else deletions)[box.out_rows, box.out_cols] = tile
        if self.store.at(place.number)._at.num_overflow:
            deletions = self.store.at(place.number).crop(residues=place.cols, rows=place.rows).deletions
        return msa, deletions

    def close(self) -> None:
        for handle in self.__dict__.get("handles", {}).values():
            os.close(handle)


class ZarrPython(Foldfeed):
    """Our part through zarr-python, one orthogonal selection of tiles per array."""

    def open(self, folder: Path) -> None:
        super().open(folder)
        zarr = module("zarr")
        self.groups = {
            part: zarr.open_group(f"{self.store.url}/parts/{part}", mode="r")
            for part in set(self.store.table(["part_id"])["part_id"].to_pylist())
        }
        self.arrays = {part: (group["msa"], group["deletion"]) for part, group in self.groups.items()}
        self.configure(zarr)

    def configure(self, zarr: Any) -> None:
        pass

    def crop(self, place: Place) -> Arrays:
        record = self.store.at(place.number)
        at, part = record._at, record._part
        grid = grid_of(at.first_tile, at.depth, at.length, part.settings)
        boxes = plan_crop(grid, (place.cols.start, place.cols.stop), place.rows)
        shape = (place.rows.stop - place.rows.start, place.cols.stop - place.cols.start)
        out = (np.empty(shape, np.uint8), np.empty(shape, np.int32))
        numbers = [box.tile for box in boxes]
        for array, values in zip(self.arrays[part.part_id], out, strict=True):
            tiles = array.oindex[numbers]
            for box, tile in zip(boxes, tiles, strict=True):
                values[box.out_rows, box.out_cols] = tile[box.tile_rows, box.tile_cols]
        if at.num_overflow:
            return out[0], record.crop(residues=place.cols, rows=place.rows).deletions
        return out


class Zarrs(ZarrPython):
    """Our part through zarr-python with the zarrs (Rust) pipeline."""

    def configure(self, zarr: Any) -> None:
        module("zarrs")
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        self.arrays = {
            part: (zarr.open_group(f"{self.store.url}/parts/{part}", mode="r")["msa"],
                   zarr.open_group(f"{self.store.url}/parts/{part}", mode="r")["deletion"])
            for part in self.groups
        }  # fmt: skip

    def close(self) -> None:
        module("zarr").config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"})


class TensorStore(ZarrPython):
    """Our part through TensorStore: a cache pool that holds every shard index, a crop's reads in flight."""

    def open(self, folder: Path) -> None:
        Foldfeed.open(self, folder)
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
        record = self.store.at(place.number)
        at, part = record._at, record._part
        grid = grid_of(at.first_tile, at.depth, at.length, part.settings)
        boxes = plan_crop(grid, (place.cols.start, place.cols.stop), place.rows)
        shape = (place.rows.stop - place.rows.start, place.cols.stop - place.cols.start)
        out = (np.empty(shape, np.uint8), np.empty(shape, np.int32))
        reads = [[(box, tensor[box.tile].read()) for box in boxes] for tensor in self.tensors[part.part_id]]
        for values, read in zip(out, reads, strict=True):
            for box, future in read:
                values[box.out_rows, box.out_cols] = future.result()[box.tile_rows, box.tile_cols]
        if at.num_overflow:
            return out[0], record.crop(residues=place.cols, rows=place.rows).deletions
        return out


class A3mGz:
    """Text, as OpenFold and Protenix read it: gunzip, parse, slice (our own vectorised parser)."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        for record in records:
            (folder / f"{record.record_id}.a3m.gz").write_bytes(gzip.compress(a3m_text(record), 6))

    def open(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def crop(self, place: Place) -> tuple[np.ndarray, np.ndarray]:
        from foldfeed.feature_store.a3m import parse_a3m

        parsed = parse_a3m(gzip.decompress(self.files[place.number].read_bytes()))
        return cut(parsed.msa, parsed.deletions, place)

    def close(self) -> None:
        pass


def a3m_text(record: MsaRecord) -> bytes:
    """Returns A3M text with as many lower-case letters as the deletion counts say."""
    letters = np.frombuffer((alphabet.TOKENS).encode(), np.uint8)[record.msa]
    lines = []
    for name, row, counts in zip(record.rows.hit_id, letters, record.deletions, strict=True):
        text = row.tobytes()
        places = np.flatnonzero(counts)
        if places.size:
            pieces, last = [], 0
            for place in places.tolist():
                pieces += [text[last:place], b"x" * int(counts[place])]
                last = place
            text = b"".join([*pieces, text[last:]])
        lines.append(b">" + name.encode() + b"\n" + text + b"\n")
    return b"".join(lines)


class Npz:
    """One compressed npz per record, as Boltz and OpenFold 3; deletions as int16, dense."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        for record in records:
            arrays = {"msa": record.msa, "deletions": record.deletions.astype(np.int16)}
            np.savez_compressed(folder / f"{record.record_id}.npz", **arrays)

    def open(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def crop(self, place: Place) -> Arrays:
        with np.load(self.files[place.number], allow_pickle=False) as data:
            return cut(data["msa"], data["deletions"], place)

    def close(self) -> None:
        pass


class PickleGz(Npz):
    """Gzip pickle per record with sparse deletions, as Uni-Fold."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        for record in records:
            where = np.nonzero(record.deletions)
            content = (record.msa, record.deletions.shape, where, record.deletions[where].astype(np.int16))
            (folder / f"{record.record_id}.pkl.gz").write_bytes(gzip.compress(pickle.dumps(content, 5), 6))

    def crop(self, place: Place) -> Arrays:
        data = gzip.decompress(self.files[place.number].read_bytes())
        msa, shape, where, values = pickle.loads(data)
        deletions = np.zeros(shape, np.int32)
        deletions[where] = values
        return cut(msa, deletions, place)


def packed(record: MsaRecord) -> bytes:
    """Returns shape, msa and deletions (uint8 clipped at 255 would lose counts, so int16) as raw bytes."""
    head = np.array(record.msa.shape, np.int64).tobytes()
    return head + record.msa.tobytes() + record.deletions.astype(np.int16).tobytes()


def unpacked(data: bytes, place: Place) -> Arrays:
    depth, length = np.frombuffer(data, np.int64, 2)
    size = int(depth * length)
    msa = np.frombuffer(data, np.uint8, size, 16).reshape(depth, length)
    deletions = np.frombuffer(data, np.int16, size, 16 + size).reshape(depth, length)
    return cut(msa, deletions, place)


class Lmdb:
    """LMDB, one zstd value per record."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        compress = zstandard.ZstdCompressor(level=3).compress
        with module("lmdb").open(str(folder), map_size=64 << 30) as env:
            for start in range(0, len(records), 200):
                with env.begin(write=True) as txn:
                    for number in range(start, min(start + 200, len(records))):
                        txn.put(b"%08d" % number, compress(packed(records[number])))

    def open(self, folder: Path) -> None:
        self.env = module("lmdb").open(str(folder), readonly=True, lock=False, readahead=False)
        self.decompress = zstandard.ZstdDecompressor().decompress

    def crop(self, place: Place) -> Arrays:
        with self.env.begin(buffers=True) as txn:
            return unpacked(self.decompress(txn.get(b"%08d" % place.number)), place)

    def close(self) -> None:
        self.env.close()


class Hdf5:
    """HDF5, a group per record, chunks of 512 x 64, LZF (the fastest filter h5py brings)."""

    chunk = (512, 64)

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        with module("h5py").File(folder / "all.h5", "w", libver="latest") as file:
            for number, record in enumerate(records):
                chunks = tuple(min(a, b) for a, b in zip(self.chunk, record.msa.shape, strict=True))
                for name, values in (("msa", record.msa), ("deletions", record.deletions.astype(np.int16))):
                    file.create_dataset(
                        f"{number:08d}/{name}", data=values, chunks=chunks, compression="lzf", shuffle=False
                    )

    def open(self, folder: Path) -> None:
        self.file = module("h5py").File(folder / "all.h5", "r", rdcc_nbytes=0)

    def crop(self, place: Place) -> Arrays:
        group = self.file[f"{place.number:08d}"]
        window = place.rows, place.cols
        return group["msa"][window], group["deletions"][window].astype(np.int32)

    def close(self) -> None:
        self.file.close()


class Lance:
    """Lance, one row per record with large binary columns, zstd in the values; `take` of one row."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        lance, pa = module("lance"), module("pyarrow")
        compress = zstandard.ZstdCompressor(level=3).compress
        schema = pa.schema([pa.field("data", pa.large_binary())])

        def batches() -> Any:
            for start in range(0, len(records), 64):
                values = [compress(packed(record)) for record in records[start : start + 64]]
                yield pa.record_batch([pa.array(values, pa.large_binary())], schema=schema)

        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(folder / "d.lance"))

    def open(self, folder: Path) -> None:
        self.data = module("lance").dataset(str(folder / "d.lance"))
        self.decompress = zstandard.ZstdDecompressor().decompress

    def crop(self, place: Place) -> Arrays:
        value = self.data.take([place.number], columns=["data"])["data"][0].as_buffer()
        return unpacked(self.decompress(value), place)

    def close(self) -> None:
        pass


class ArrayRecord:
    """ArrayRecord with group_size 1; records are zstd themselves; random access by index."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        array_record = module("array_record.python.array_record_module")
        compress = zstandard.ZstdCompressor(level=3).compress
        writer = array_record.ArrayRecordWriter(str(folder / "a"), "group_size:1,uncompressed")
        for record in records:
            writer.write(compress(packed(record)))
        writer.close()

    def open(self, folder: Path) -> None:
        array_record = module("array_record.python.array_record_module")
        self.reader = array_record.ArrayRecordReader(
            str(folder / "a"), options="readahead_buffer_size:0,max_parallelism:0"
        )
        self.decompress = zstandard.ZstdDecompressor().decompress

    def crop(self, place: Place) -> Arrays:
        (value,) = self.reader.read([place.number])
        return unpacked(self.decompress(value), place)

    def close(self) -> None:
        self.reader.close()


class Streaming:
    """MosaicML streaming: MDS shards of 64 MB, one zstd value per sample, local, random access by index."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        compress = zstandard.ZstdCompressor(level=3).compress
        writer = module("streaming").MDSWriter(out=str(folder / "mds"), columns={"data": "bytes"})
        with writer as out:
            for record in records:
                out.write({"data": compress(packed(record))})

    def open(self, folder: Path) -> None:
        streaming = module("streaming")
        streaming.base.util.clean_stale_shared_memory()
        self.data = streaming.LocalDataset(local=str(folder / "mds"))
        self.decompress = zstandard.ZstdDecompressor().decompress

    def crop(self, place: Place) -> Arrays:
        return unpacked(self.decompress(self.data[place.number]["data"]), place)

    def close(self) -> None:
        pass


class LitData:
    """LitData: chunks of 64 MB, one zstd value per sample, local, random access by index."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        compress = zstandard.ZstdCompressor(level=3).compress
        module("litdata")
        cache = module("litdata.streaming.cache").Cache(str(folder), chunk_bytes="64MB")
        for number, record in enumerate(records):
            cache._add_item(number, {"data": compress(packed(record))})
        cache.done()
        cache.merge()

    def open(self, folder: Path) -> None:
        self.data = module("litdata").StreamingDataset(str(folder), shuffle=False)
        self.decompress = zstandard.ZstdDecompressor().decompress

    def crop(self, place: Place) -> Arrays:
        return unpacked(self.decompress(self.data[place.number]["data"]), place)

    def close(self) -> None:
        pass


PEERS: dict[str, type] = {
    "foldfeed": Foldfeed,
    "ceiling": Ceiling,
    "zarr-python": ZarrPython,
    "zarrs": Zarrs,
    "tensorstore": TensorStore,
    "a3m.gz": A3mGz,
    "npz": Npz,
    "pickle.gz": PickleGz,
    "lmdb+zstd": Lmdb,
    "hdf5": Hdf5,
    "lance": Lance,
    "array_record": ArrayRecord,
    "mosaicml-streaming": Streaming,
    "litdata": LitData,
}
