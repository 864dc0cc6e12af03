"""What a part and the index hold: names, dtypes, chunk shapes, and the Zarr v3 metadata of each array.

This is the format in one place; FORMAT.md says the same in prose. Everything here is pure data and
arithmetic.
Invariant: the metadata is valid Zarr v3 core (``sharding_indexed`` over ``bytes``, ``zstd``, ``crc32c``), so
zarr-python, TensorStore and zarrs open a part without us; a test reads every array through zarr-python.

Source: Zarr v3 core specification; sharding codec v1.0 (ZEP 2).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from foldfeed.feature_store.format import alphabet, record, structure, templates
from foldfeed.feature_store.format.settings import FORMAT_NAME, FORMAT_VERSION, StoreSettings

ZSTD_LEVEL = 3
GROUP_FILE = "zarr.json"
ROW_CHUNK = 4096
RESIDUE_CHUNK = 512
# 22 numbers a residue: of real crops of 256, chunks of 512 residues were 40 % of all that was read. Chunks of
# 128 read a third of that, and take 12 % less space because fewer cells are padding.
PROFILE_CHUNK = 128
# Entries of a chunk of arrays in parts that do not say otherwise under "chunk_entries": parts from before
# these numbers changed.
FIRST_CHUNKS = {"profile": 512}
OVERFLOW_CHUNK = 1024
# A chain of atoms is read whole or by window: 64 residues of positions are 28 KB.
ATOM_CHUNK = 64
TEXT_CHUNK = 1 << 16
# A part has this array if and only if one of its rows has a key, so parts without are the same bytes as
# before it came.
PAIRING_KEY = "row_pairing_key"
# In the same way.
TAXONOMY = "row_taxonomy_id"
# A part has these arrays if and only if one of its records has a template hit, for the same reason. Entries
# of `TEMPLATE_AXIS` are hits; their names, sequences and runs lie one after the other.
TEMPLATE_AXIS = "template"
TEMPLATE_ARRAYS = (
    "template_id_bytes",
    "template_id",
    "template_num_residues",
    "template_sequence",
    "template_release_date",
    *templates.NUMBERS,
    "template_num_runs",
    "template_run",
)
TEMPLATE_CHUNK = 1024
RUN_CHUNK = 4096
# First axis of the arrays of a structure.
STRUCTURE_AXIS = "structure_residue"
# A deletion count from this on does not fit its cell; the cell holds it and the exact count is in the
# overflow.
DELETION_OVERFLOW = 255


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of a part.

    Attributes:
      name: of the array and its folder.
      dtype: NumPy dtype, little-endian.
      chunk: shape of an inner chunk; the first axis is the one that grows.
      fill: value of chunks that are not stored.
      dims: names of the axes.
    """

    name: str
    dtype: str
    chunk: tuple[int, ...]
    fill: int | str
    dims: tuple[str, ...]

    @property
    def shard_path(self) -> str:
        """The array's one shard object, relative to the part."""
        return "/".join((self.name, "c", *("0" for _ in self.chunk)))

    @property
    def chunk_bytes(self) -> int:
        """Size of a decoded chunk."""
        return math.prod(self.chunk) * np.dtype(self.dtype).itemsize

    @property
    def fill_value(self) -> float:
        """The fill value as a number."""
        return float(self.fill)

    def with_entries(self, entries: int) -> ArraySpec:
        """Returns the same array with so many entries of the first axis in a chunk."""
        return dataclasses.replace(self, chunk=(entries, *self.chunk[1:]))

    def num_chunks(self, length: int) -> int:
        """Number of inner chunks for that many entries on the first axis."""
        return -(-length // self.chunk[0])

    def metadata(self, length: int) -> bytes:
        """Returns the array's ``zarr.json``.

        Args:
          length: entries on the first axis.
        """
        # An empty array still needs a shard shape; one chunk, of which nothing is stored.
        shard = (max(1, self.num_chunks(length)) * self.chunk[0], *self.chunk[1:])
        return to_json_bytes(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [length, *self.chunk[1:]],
                "data_type": np.dtype(self.dtype).name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": self.fill,
                "codecs": [{"name": "sharding_indexed", "configuration": self._sharding()}],
                "dimension_names": list(self.dims),
                "attributes": {},
            }
        )

    def _sharding(self) -> dict[str, Any]:
        endian = {} if np.dtype(self.dtype).itemsize == 1 else {"configuration": {"endian": "little"}}
        return {
            "chunk_shape": list(self.chunk),
            "codecs": [
                {"name": "bytes", **endian},
                {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}},
                {"name": "crc32c"},
            ],
            "index_codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
            "index_location": "end",
        }


def chunk_entries_of(specs: Mapping[str, ArraySpec]) -> dict[str, int]:
    """Returns what a part must say about its chunks: those that differ from `FIRST_CHUNKS`."""
    return {
        name: specs[name].chunk[0]
        for name, entries in FIRST_CHUNKS.items()
        if specs[name].chunk[0] != entries
    }


def stored_specs(settings: StoreSettings, chunk_entries: Mapping[str, int]) -> dict[str, ArraySpec]:
    """Returns the arrays of a part as they were written.

    Args:
      settings: of the part.
      chunk_entries: what the part says about its chunks.
    """
    entries = FIRST_CHUNKS | dict(chunk_entries)
    return {
        name: spec.with_entries(entries.get(name, spec.chunk[0]))
        for name, spec in array_specs(settings).items()
    }


def array_specs(settings: StoreSettings) -> dict[str, ArraySpec]:
    """Returns the arrays of a part by name, as this release writes them."""
    tile = (1, settings.tile_rows, settings.tile_cols)
    tile_dims = ("tile", "tile_row", "tile_col")
    specs = (
        ArraySpec(name="msa", dtype="|u1", chunk=tile, fill=alphabet.PADDING, dims=tile_dims),
        ArraySpec(name="deletion", dtype="|u1", chunk=tile, fill=0, dims=tile_dims),
        ArraySpec(
            name="deletion_overflow",
            dtype="<i8",
            chunk=(OVERFLOW_CHUNK, 2),
            fill=0,
            dims=("overflow", "cell_and_count"),
        ),
        ArraySpec(name="row_database", dtype="<i2", chunk=(ROW_CHUNK,), fill=-1, dims=("row",)),
        ArraySpec(name="row_e_value", dtype="<f8", chunk=(ROW_CHUNK,), fill="NaN", dims=("row",)),
        ArraySpec(name="row_bit_score", dtype="<f4", chunk=(ROW_CHUNK,), fill="NaN", dims=("row",)),
        ArraySpec(
            name="row_species",
            dtype="|u1",
            chunk=(ROW_CHUNK, record.SPECIES_BYTES),
            fill=0,
            dims=("row", "species_byte"),
        ),
        ArraySpec(
            name=PAIRING_KEY,
            dtype="|u1",
            chunk=(ROW_CHUNK, record.PAIRING_KEY_BYTES),
            fill=0,
            dims=("row", "pairing_key_byte"),
        ),
        ArraySpec(name=TAXONOMY, dtype="<i4", chunk=(ROW_CHUNK,), fill=0, dims=("row",)),
        ArraySpec(name="row_hit_id_bytes", dtype="<i4", chunk=(ROW_CHUNK,), fill=0, dims=("row",)),
        ArraySpec(name="row_hit_id", dtype="|u1", chunk=(TEXT_CHUNK,), fill=0, dims=("hit_id_byte",)),
        # The index rows of the part's records as JSON lines (UTF-8): a lost index can be rebuilt from its
        # parts.
        ArraySpec(name="record_json", dtype="|u1", chunk=(TEXT_CHUNK,), fill=0, dims=("json_byte",)),
        ArraySpec(name="aatype", dtype="|u1", chunk=(RESIDUE_CHUNK,), fill=0, dims=("residue",)),
        ArraySpec(
            name="profile",
            dtype="<f4",
            chunk=(PROFILE_CHUNK, alphabet.NUM_TOKENS),
            fill="NaN",
            dims=("residue", "token"),
        ),
        ArraySpec(name="deletion_mean", dtype="<f4", chunk=(RESIDUE_CHUNK,), fill="NaN", dims=("residue",)),
        ArraySpec(name="gap_fraction", dtype="<f4", chunk=(RESIDUE_CHUNK,), fill="NaN", dims=("residue",)),
        ArraySpec(name="entropy", dtype="<f4", chunk=(RESIDUE_CHUNK,), fill="NaN", dims=("residue",)),
        ArraySpec(name="neff", dtype="<f4", chunk=(RESIDUE_CHUNK,), fill="NaN", dims=("residue",)),
        *_structure_specs(),
        *_template_specs(),
    )
    return {spec.name: spec for spec in specs}


def _structure_specs() -> list[ArraySpec]:
    """Returns the arrays of `structure.ARRAYS`; only records with a structure take entries of them."""
    axes = {(): (), (structure.NUM_ATOMS,): ("atom",), (structure.NUM_ATOMS, 3): ("atom", "xyz")}
    return [
        ArraySpec(
            name=name,
            dtype=dtype,
            chunk=(ATOM_CHUNK if shape else RESIDUE_CHUNK, *shape),
            fill=0,
            dims=(STRUCTURE_AXIS, *axes[shape]),
        )
        for name, (dtype, shape) in structure.ARRAYS.items()
    ]


def _template_specs() -> list[ArraySpec]:
    """Returns the arrays of `TEMPLATE_ARRAYS`; only records with template hits take entries of them."""
    counts = ("template_id_bytes", "template_num_residues", "template_num_runs")
    found = [
        ArraySpec(name=name, dtype="<i4", chunk=(TEMPLATE_CHUNK,), fill=0, dims=(TEMPLATE_AXIS,))
        for name in counts
    ]
    found += [
        ArraySpec(name=name, dtype="|u1", chunk=(TEXT_CHUNK,), fill=0, dims=(f"{name}_byte",))
        for name in ("template_id", "template_sequence")
    ]
    found += [
        ArraySpec(name=name, dtype="<f8", chunk=(TEMPLATE_CHUNK,), fill="NaN", dims=(TEMPLATE_AXIS,))
        for name in templates.NUMBERS
    ]
    found += [
        ArraySpec(
            name="template_release_date",
            dtype="<i4",
            chunk=(TEMPLATE_CHUNK,),
            fill=templates.NO_DATE,
            dims=(TEMPLATE_AXIS,),
        ),
        ArraySpec(
            name="template_run",
            dtype="<i4",
            chunk=(RUN_CHUNK, 3),
            fill=0,
            dims=("template_run", "query_template_pairs"),
        ),
    ]
    return found


def fill_chunk(spec: ArraySpec) -> np.ndarray:
    """Returns a chunk full of the array's fill value, a fresh array."""
    return np.full(spec.chunk, spec.fill_value, dtype=spec.dtype)


def group_metadata(
    settings: StoreSettings,
    lengths: dict[str, int],
    files: dict[str, dict[str, Any]],
    num_records: int,
    chunk_entries: dict[str, int],
) -> bytes:
    """Returns the part's own ``zarr.json``: a Zarr group that names the size and sha256 of every other file.

    The part's id is the hash of these bytes, so the id vouches for all of them.

    Args:
      settings: of the store.
      lengths: entries on the first axis of each array, so that a reader opens one file instead of thirteen.
      files: ``{"bytes": size, "sha256": hex}`` by path.
      num_records: records in the part.
      chunk_entries: entries of a chunk of those arrays that `FIRST_CHUNKS` says otherwise about.
    """
    about: dict[str, Any] = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "settings": settings.to_dict(),
        "alphabet": alphabet.TOKENS,
        "num_records": num_records,
        "lengths": lengths,
        "files": files,
    }
    if chunk_entries:
        about["chunk_entries"] = chunk_entries
    return to_json_bytes({"zarr_format": 3, "node_type": "group", "attributes": {"foldfeed": about}})


def to_json_bytes(document: dict[str, Any]) -> bytes:
    """Returns canonical JSON: sorted keys, no spaces, one line; equal documents give equal bytes."""
    return (json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode()


# One row of the index describes one record. `first_*` point into the arrays of its part.
INDEX_SCHEMA = pa.schema(
    [
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("description", pa.string(), nullable=False),
        pa.field("sequence", pa.string(), nullable=False),
        pa.field("sequence_sha256", pa.string(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("depth", pa.int32(), nullable=False),
        pa.field("gap_fraction", pa.float64(), nullable=False),
        pa.field(
            "databases",
            pa.list_(
                pa.struct(
                    [
                        pa.field("name", pa.string()),
                        pa.field("digest", pa.string()),
                        pa.field("tool", pa.string()),
                        pa.field("tool_version", pa.string()),
                        pa.field("num_hits", pa.int32()),
                        pa.field("num_rows", pa.int32()),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("extra", pa.string(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("part_id", pa.string(), nullable=False),
        pa.field("first_tile", pa.int64(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("first_hit_id_byte", pa.int64(), nullable=False),
        pa.field("first_residue", pa.int64(), nullable=False),
        pa.field("first_overflow", pa.int64(), nullable=False),
        pa.field("num_overflow", pa.int64(), nullable=False),
        pa.field("job_id", pa.string(), nullable=False),
        # Null: not computed, no structure, or written before the column came.
        pa.field("neff", pa.float64(), nullable=True),
        pa.field("structure", pa.string(), nullable=True),
        pa.field("first_structure_residue", pa.int64(), nullable=True),
        # Null: templates were not searched.
        pa.field("templates", pa.string(), nullable=True),
        pa.field("num_templates", pa.int32(), nullable=True),
        pa.field("first_template", pa.int64(), nullable=True),
        pa.field("first_template_id_byte", pa.int64(), nullable=True),
        pa.field("first_template_residue", pa.int64(), nullable=True),
        pa.field("first_template_run", pa.int64(), nullable=True),
    ]
)
