"""The formats that `store_peers.py` compares: one small class each, with the same four methods.

    write(records, folder)   stores msa and deletions of every record
    open(folder)             gets ready to read
    crop(place)              returns fresh (msa, deletions) of a window
    close()

Libraries are imported inside the methods, so that a missing one is reported and skipped.
"""

from __future__ import annotations

import gzip
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from our_readers import (
    Arrays,
    Ceiling,
    Foldfeed,
    FoldfeedSlab,
    Place,
    TensorStore,
    ZarrFused,
    ZarrPython,
    Zarrs,
    module,
)

from foldfeed.feature_store import MsaRecord
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.schema import DELETION_OVERFLOW


def cut(msa: np.ndarray, deletions: np.ndarray, place: Place) -> Arrays:
    window = place.rows, place.cols
    return msa[window].copy(), deletions[window].astype(np.int32)


CODES = {letter: code for code, letter in enumerate(alphabet.TOKENS)}
_encoded: dict[tuple[str, int], bytes] = {}


def once(record: MsaRecord, encode: Callable[[MsaRecord], bytes]) -> bytes:
    """Returns the encoded record; copies of an alignment share its array, and are encoded only once."""
    key = encode.__name__, id(record.msa)
    if key not in _encoded:
        _encoded[key] = encode(record)
    return _encoded[key]


class A3mGz:
    """Text, as OpenFold and Protenix read it: gunzip, parse, slice (our own vectorised parser)."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        for record in records:
            (folder / f"{record.record_id}.a3m.gz").write_bytes(once(record, a3m_gz))

    def open(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def crop(self, place: Place) -> tuple[np.ndarray, np.ndarray]:
        from foldfeed.feature_store.parsers.a3m import parse_a3m

        parsed = parse_a3m(gzip.decompress(self.files[place.number].read_bytes()))
        return cut(parsed.msa, parsed.deletions, place)

    def close(self) -> None:
        pass


class A3mGzPlain(A3mGz):
    """The same text read letter by letter, as AlphaFold 2's parser and its descendants do in Python."""

    def crop(self, place: Place) -> Arrays:
        lines = gzip.decompress(self.files[place.number].read_bytes()).decode().splitlines()
        msa, deletions = [], []
        for line in lines[1::2]:
            codes, counts, inserted = [], [], 0
            for letter in line:
                if letter.islower():
                    inserted += 1
                else:
                    codes.append(CODES[letter])
                    counts.append(inserted)
                    inserted = 0
            msa.append(codes)
            deletions.append(counts)
        return cut(np.array(msa, np.uint8), np.array(deletions, np.int32), place)


def a3m_gz(record: MsaRecord) -> bytes:
    return gzip.compress(a3m_text(record), 6)


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
            (folder / f"{record.record_id}.npz").write_bytes(once(record, npz))

    def open(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def crop(self, place: Place) -> Arrays:
        with np.load(self.files[place.number], allow_pickle=False) as data:
            return cut(data["msa"], data["deletions"], place)

    def close(self) -> None:
        pass


def npz(record: MsaRecord) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, msa=record.msa, deletions=record.deletions.astype(np.int16))
    return buffer.getvalue()


class PickleGz(Npz):
    """Gzip pickle per record with sparse deletions, as Uni-Fold."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        for record in records:
            (folder / f"{record.record_id}.pkl.gz").write_bytes(once(record, pickle_gz))

    def crop(self, place: Place) -> Arrays:
        data = gzip.decompress(self.files[place.number].read_bytes())
        msa, shape, where, values = pickle.loads(data)
        deletions = np.zeros(shape, np.int32)
        deletions[where] = values
        return cut(msa, deletions, place)


def pickle_gz(record: MsaRecord) -> bytes:
    where = np.nonzero(record.deletions)
    content = (record.msa, record.deletions.shape, where, record.deletions[where].astype(np.int16))
    return gzip.compress(pickle.dumps(content, 5), 6)


def zstd_packed(record: MsaRecord) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(packed(record))


def packed(record: MsaRecord) -> bytes:
    """Returns shape, msa, deletions as uint8 and exact counts above 254 as raw bytes.

    Tuned for the peers: dense int16 deletions made their values larger and their crops up to twice as slow.
    """
    rows, cols = np.nonzero(record.deletions >= DELETION_OVERFLOW)
    overflow = np.stack([rows, cols, record.deletions[rows, cols]]).astype(np.int64)
    head = np.array([*record.msa.shape, len(rows)], np.int64).tobytes()
    clipped = np.minimum(record.deletions, DELETION_OVERFLOW).astype(np.uint8)
    return head + overflow.tobytes() + record.msa.tobytes() + clipped.tobytes()


def unpacked(data: bytes, place: Place) -> Arrays:
    depth, length, num_overflow = np.frombuffer(data, np.int64, 3).tolist()
    start, size = 24 * (1 + num_overflow), depth * length
    msa = np.frombuffer(data, np.uint8, size, start).reshape(depth, length)
    deletions = np.frombuffer(data, np.uint8, size, start + size).reshape(depth, length)
    found = cut(msa, deletions, place)
    if num_overflow:
        rows, cols, counts = np.frombuffer(data, np.int64, 3 * num_overflow, 24).reshape(3, num_overflow)
        inside = (rows >= place.rows.start) & (rows < place.rows.stop)
        inside &= (cols >= place.cols.start) & (cols < place.cols.stop)
        found[1][rows[inside] - place.rows.start, cols[inside] - place.cols.start] = counts[inside]
    return found


class Lmdb:
    """LMDB, one zstd value per record."""

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        with module("lmdb").open(str(folder), map_size=64 << 30) as env:
            for start in range(0, len(records), 200):
                with env.begin(write=True) as txn:
                    for number in range(start, min(start + 200, len(records))):
                        txn.put(b"%08d" % number, once(records[number], zstd_packed))

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
        schema = pa.schema([pa.field("data", pa.large_binary())])

        def batches() -> Any:
            for start in range(0, len(records), 64):
                values = [once(record, zstd_packed) for record in records[start : start + 64]]
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
        writer = array_record.ArrayRecordWriter(str(folder / "a"), "group_size:1,uncompressed")
        for record in records:
            writer.write(once(record, zstd_packed))
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
        writer = module("streaming").MDSWriter(out=str(folder / "mds"), columns={"data": "bytes"})
        with writer as out:
            for record in records:
                out.write({"data": once(record, zstd_packed)})

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
        module("litdata")
        cache = module("litdata.streaming.cache").Cache(str(folder), chunk_bytes="64MB")
        for number, record in enumerate(records):
            cache._add_item(number, {"data": once(record, zstd_packed)})
        cache.done()
        cache.merge()

    def open(self, folder: Path) -> None:
        self.data = module("litdata").StreamingDataset(str(folder), shuffle=False)
        self.decompress = zstandard.ZstdDecompressor().decompress

    def crop(self, place: Place) -> Arrays:
        return unpacked(self.decompress(self.data[place.number]["data"]), place)

    def close(self) -> None:
        pass


class AtomWorks:
    """AtomWorks' packed MSA store, read as its `LoadPolymerMSAs` does, but without its limit of 10,000 rows.

    A3M text, one zstd frame per record in .bin shards, an index in Parquet that is held as a dictionary. The
    package reads this layout and has no writer of it. Keys are hashes of a sequence; here of the record's
    number, because the alignments of this benchmark share queries.
    """

    shard_bytes = 256 << 20

    def write(self, records: list[MsaRecord], folder: Path) -> None:
        store, pa = module("atomworks.ml.transforms.msa.msa_store"), module("pyarrow")
        (folder / "data").mkdir()
        table: dict[str, list[Any]] = {"hash": [], "shard": [], "offset": [], "length": []}
        offset, shard = 0, 0
        for number, record in enumerate(records):
            frame = once(record, a3m_zst)
            if offset + len(frame) > self.shard_bytes:
                offset, shard = 0, shard + 1
            with (folder / "data" / f"{shard:05d}.bin").open("ab") as file:
                file.write(frame)
            key = store.hash_sequence(f"{number:08d}", length=store.MSA_KEY_LEN)
            for name, value in zip(table, (key, f"{shard:05d}.bin", offset, len(frame)), strict=True):
                table[name].append(value)
            offset += len(frame)
        module("pyarrow.parquet").write_table(pa.table(table), folder / "index.parquet")

    def open(self, folder: Path) -> None:
        self.store = module("atomworks.ml.transforms.msa.msa_store").PackedMsaStore(str(folder))
        self.loading = module("atomworks.ml.transforms.msa._msa_loading_utils")
        self.protein = module("atomworks.enums").ChainType.POLYPEPTIDE_L
        theirs = module("atomworks.ml.transforms.msa._msa_constants").AMINO_ACID_ONE_LETTER_TO_INT
        self.codes = alphabet.encode("".join(sorted(theirs, key=theirs.__getitem__)))

    def crop(self, place: Place) -> Arrays:
        text = self.store.get_bytes_for_seq(f"{place.number:08d}")
        found = self.loading.load_msa(text, self.protein, max_msa_sequences=sys.maxsize)
        window = place.rows, place.cols
        return self.codes[found["msa"][window]], found["ins"][window].astype(np.int32)

    def close(self) -> None:
        pass


class AtomWorksTuned(AtomWorks):
    """The same store; its parser stops after the crop's last row, and only the crop becomes codes."""

    def crop(self, place: Place) -> Arrays:
        text = self.store.get_bytes_for_seq(f"{place.number:08d}").decode()
        letters, inserted, _ = self.loading.parse_a3m(io.StringIO(text), maxseq=place.rows.stop)
        window = place.rows, place.cols
        return alphabet.ENCODE[letters[window].view(np.uint8)], inserted[window].astype(np.int32)


def a3m_zst(record: MsaRecord) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(a3m_text(record))


PEERS: dict[str, type] = {
    "foldfeed": Foldfeed,
    "foldfeed permuted slab": FoldfeedSlab,
    "ceiling": Ceiling,
    "zarr-python": ZarrPython,
    "zarr-python fused": ZarrFused,
    "zarrs": Zarrs,
    "tensorstore": TensorStore,
    "a3m.gz": A3mGz,
    "a3m.gz plain Python": A3mGzPlain,
    "npz": Npz,
    "pickle.gz": PickleGz,
    "lmdb+zstd": Lmdb,
    "hdf5": Hdf5,
    "lance": Lance,
    "array_record": ArrayRecord,
    "mosaicml-streaming": Streaming,
    "litdata": LitData,
    "atomworks": AtomWorks,
    "atomworks tuned": AtomWorksTuned,
}
