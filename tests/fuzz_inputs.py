"""Inputs for fuzzing: small valid files of every format, and ways to change them by byte and by structure.

Owns what `fuzz_feature_store.py` feeds; runs nothing. Deterministic for a given random generator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import importlib.util
import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from mmcif_samples import sample
from records import make_record

from foldfeed.feature_store.exporters.formats import ExportOptions, render
from foldfeed.feature_store.exporters.rows import rows_of_msa

SEED_BYTES = 40_000

TOKENS = [
    b">",
    b"\n",
    b"-",
    b".",
    b"#",
    b"//",
    b"\0",
    b"# STOCKHOLM 1.0\n",
    b"#4\t1\n",
    b"x" * 100,
    b"A" * 100,
]
TOKENS += [
    b"\xff",
    b'"',
    b"{",
    b"[",
    b"null",
    b"1e999",
    b"\\u0000",
    b"PK\x01\x02",
    b"PAR1",
    b"\x80\x05",
    b"\x93NUMPY",
]
NUMBERS = [0, 1, -1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1]


@dataclasses.dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
      file: what the input is called.
      layout: to import it with.
      seeds: valid inputs.
      rebuild: changes the structure of a valid input; None where bytes are all there is.
    """

    file: str
    layout: str
    seeds: tuple[bytes, ...]
    rebuild: Callable[[random.Random, bytes], bytes] | None = None


def change(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Returns bytes changed in one to eight places."""
    text = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(text) + 1)
        span = slice(at, min(len(text), at + rng.choice((1, 1, 2, 4, 16, 300))))
        kind = rng.randrange(8)
        if kind == 0 and at < len(text):
            text[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(text):
            text[at] = rng.randrange(256)
        elif kind == 2:
            del text[span]
        elif kind == 3:
            text[at:at] = text[span] * rng.choice((1, 2, 20))
        elif kind == 4:
            text[at:at] = rng.choice(TOKENS)
        elif kind == 5:
            del text[at:]
        elif kind == 6:
            size = rng.choice((1, 2, 4, 8))
            text[at : at + size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(
                size, rng.choice(("little", "big"))
            )
        else:
            start = rng.randrange(len(other) + 1)
            text[span] = other[start : start + 64]
    return bytes(text)


def mutate(rng: random.Random, target: Target) -> bytes:
    """Returns a new input for a target."""
    data = rng.choice(target.seeds)
    if target.rebuild is not None and rng.random() < 0.6:
        with contextlib.suppress(ValueError, OverflowError, TypeError, pa.ArrowException, zipfile.BadZipFile):
            data = target.rebuild(rng, data)
        if rng.random() < 0.8:
            return data
    return change(rng, data, rng.choice(target.seeds))


def rebuild_compressed(rng: random.Random, data: bytes) -> bytes:
    """A change under the compression."""
    pack = rng.choice((gzip.compress, zstandard.ZstdCompressor().compress))
    return pack(change(rng, gzip.decompress(data), SMALL_A3M))


def rebuild_npz(rng: random.Random, data: bytes) -> bytes:
    """A change of one member, with the checksums right again; or of one array's values."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    if rng.random() < 0.5:
        array = np.load(io.BytesIO(members[name]), allow_pickle=False).copy()
        flat = array.reshape(-1).view(np.uint8)
        for _ in range(3):
            flat[rng.randrange(len(flat))] = rng.choice((0, 1, 127, 128, 255))
        file = io.BytesIO()
        np.save(file, array[: rng.randrange(len(array) + 1)] if array.ndim and rng.random() < 0.3 else array)
        members[name] = file.getvalue()
    else:
        members[name] = change(rng, members[name], members[rng.choice(sorted(members))])
    if rng.random() < 0.1:
        del members[name]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


def rebuild_json(rng: random.Random, data: bytes) -> bytes:
    """A change of nodes of the tree."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        node, key = {"": document}, ""
        while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.85:
            node = node[key]
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        odd = [
            None,
            True,
            0,
            -1,
            1.5,
            10**30,
            "",
            "x",
            "\ud800",
            [],
            {},
            [[]],
            SMALL_A3M.decode(),
            "../x",
            float("inf"),
        ]
        node[key] = rng.choice(odd)
    return json.dumps(document).encode()


def rebuild_parquet(rng: random.Random, data: bytes) -> bytes:
    """A change of columns: their cells, type, name, order or encoding."""
    columns = pq.read_table(io.BytesIO(data)).to_pydict()
    name = rng.choice(list(columns))
    cells = columns[name]
    for _ in range(rng.choice((1, 3))):
        odd = ["", "query", None, "AC\nDE", "acde", "é" * 50, "-" * 10, "uniref90", "\0"]
        cells[rng.randrange(len(cells))] = rng.choice(odd)
    arrays = {key: pa.array(value) for key, value in columns.items()}
    if rng.random() < 0.3:
        casts = [
            pa.binary(),
            pa.large_string(),
            pa.dictionary(pa.int8(), pa.string()),
            pa.list_(pa.string()),
            pa.int64(),
        ]
        arrays[name] = pa.array([None] * len(cells), type=rng.choice(casts))
    if rng.random() < 0.1:
        arrays[rng.choice(("Sequence", "comment"))] = arrays.pop(name)
    out = io.BytesIO()
    table = pa.table(arrays)
    compression = rng.choice(("none", "zstd", "gzip", "snappy"))
    pq.write_table(
        table,
        out,
        compression=compression,
        use_dictionary=rng.random() < 0.5,
        row_group_size=rng.choice((1, 2, 1000)),
    )
    return out.getvalue()


def rebuild_pickle(rng: random.Random, data: bytes) -> bytes:
    """A change of the objects in the dictionary."""
    features = pickle.loads(data)  # our own seed, made below
    name = rng.choice(list(features))
    odd: list[object] = [
        None,
        1,
        "x",
        b"x",
        [],
        [1, [2]],
        {},
        {1: 2},
        (),
        {1, 2},
        1j,
        range(3),
        np.zeros(0),
        np.array(3),
    ]
    odd += [
        np.zeros((2, 4)),
        np.zeros((2, 4), "M8[s]"),
        np.array([b"x", None], dtype=object),
        np.array(["\u0663"]),
    ]
    odd += [features[name].astype(rng.choice(("i1", "u8", "f4", "U5", "S5", "O")))]
    odd += [features[name][:1], features[name].T, np.asfortranarray(features[name]), np.float32(1), os.getcwd]
    features[name] = rng.choice(odd)
    return pickle.dumps(features, protocol=rng.randrange(6))


def rebuild_mmcif(rng: random.Random, data: bytes) -> bytes:
    """A change of cells, rows, items or whole tables of a text that stays CIF."""
    lines = data.decode().splitlines()
    rows = [at for at, line in enumerate(lines) if line.startswith(("ATOM", "HETATM", "1 "))]
    items = [at for at, line in enumerate(lines) if line.startswith("_")]
    odd = ["?", ".", "''", "0", "-1", "1e400", "nan", "1.5(3)", "99999999999", "x" * 300, "data_", "A", "MSE"]
    odd += ["GLY", "SE", "NH1", "2", "B", '";"', "_atom_site.x", "\n;text\n;\n", "7B", "2020-13-45"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.choice(rows), rng.randrange(7)
        cells = lines[at].split()
        if kind <= 2:
            cells[rng.randrange(len(cells))] = rng.choice(odd)
            lines[at] = " ".join(cells)
        elif kind == 3:
            lines[at] = lines[at] + "\n" + rng.choice([lines[at], lines[rng.choice(rows)]])
        elif kind == 4:
            other = rng.choice(rows)
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 5:
            lines[at] = ""
        else:
            item = rng.choice(items)
            name, _, value = lines[item].partition(" ")
            lines[item] = f"{name}{rng.choice(['', 'x'])} {rng.choice(odd) if value else ''}"
    return "\n".join(lines).encode() + b"\n"


SMALL_A3M = (
    b">q text\nACDE\n>tr|A0A146SKV9|A0A146SKV9_FUNHE/1-4\nAxxC-E\n>h\t9\t1\t1e-5\t0\t3\t4\t0\t3\t4\n-CDE\n"
)


def seed_inputs(form: str) -> bytes:
    """Returns one small valid file."""
    record = make_record("r", 6, 9, seed=5, big_deletions=False)
    record.deletions[0] = 0
    return render(rows_of_msa(record), ExportOptions(form=form))


def _pickles() -> tuple[bytes, ...]:
    with np.load(io.BytesIO(seed_inputs("alphafold2-npz"))) as arrays:
        features = {name: arrays[name] for name in arrays.files if name != "aatype"}
    for name in ("sequence", "domain_name", "msa_species_identifiers"):
        features[name] = features[name].astype(object)
    return tuple(pickle.dumps(features, protocol=protocol) for protocol in (0, 2, 4, 5))


def _index() -> bytes:
    files = [["uniref90_hits.a3m", 0, len(SMALL_A3M)], ["mgnify_hits.a3m", len(SMALL_A3M), len(SMALL_A3M)]]
    return json.dumps({"1abc_A": {"db": "x.db", "files": files}, "2def_B": files}).encode()


def targets(data: Path | None = None) -> dict[str, Target]:
    """Returns every parser with its seeds, real files among them where the shared test data is."""
    job, npz, pqt = (seed_inputs(form) for form in ("alphafold3-json", "boltz-npz", "chai-pqt"))
    made = {
        "a3m": Target("x.a3m", "a3m", (SMALL_A3M, seed_inputs("a3m"))),
        "a2m": Target("x.a2m", "a2m", (seed_inputs("a2m"),)),
        "sto": Target("x.sto", "sto", (seed_inputs("sto"),)),
        "colabfold": Target("x.a3m", "colabfold", (b"#4\t1\n" + SMALL_A3M + b"\0" + SMALL_A3M + b"\0",)),
        "compressed": Target("x.a3m.gz", "a3m", (gzip.compress(SMALL_A3M),), rebuild_compressed),
        "openfold-db": Target("x.index", "openfold-db", (_index(),), rebuild_json),
        "alphafold3-json": Target("x.json", "alphafold3-json", (job,), rebuild_json),
        "boltz-npz": Target("x.npz", "boltz-npz", (npz,), rebuild_npz),
        "features-npz": Target("features.npz", "alphafold2", (seed_inputs("alphafold2-npz"),), rebuild_npz),
        "features-pkl": Target("features.pkl", "alphafold2", _pickles(), rebuild_pickle),
        "chai-pqt": Target("x.pqt", "chai-pqt", (pqt,), rebuild_parquet),
    }
    if importlib.util.find_spec("gemmi") is not None:
        seeds = (sample("9ABC", {"A": "H", "B": "L"}), seed_inputs("mmcif"))
        made["mmcif"] = Target("x.cif", "mmcif", seeds, rebuild_mmcif)
    real = {"a3m": "msas/1psm_A/bfd_uniclust_hits.a3m", "sto": "golden/openfold_short/uniref90_hits.sto"}
    real |= {"colabfold": "msas/4OT_59/colabfold.a3m.gz", "a2m": "msas/PTEN_HUMAN/jackhmmer.a2m.gz"}
    real |= {"mmcif": "structures/5y2e.cif"}
    for name, file in real.items():
        if name in made and data is not None and (data / file).is_file():
            text = (data / file).read_bytes()
            whole = gzip.decompress(text) if file.endswith(".gz") else text
            made[name] = dataclasses.replace(made[name], seeds=(*made[name].seeds, whole[:SEED_BYTES]))
    return made
