"""Files of unknown origin: compression, npz and Parquet stay within the limit, whatever they claim."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from foldfeed.feature_store.exchange_errors import SourceFileError, SourceTooLargeError
from foldfeed.feature_store.importers.boltz import rows_of_boltz
from foldfeed.feature_store.importers.chai import read_columns
from foldfeed.feature_store.importers.layouts import AlignmentImport
from foldfeed.feature_store.importers.rows import ImportOptions
from foldfeed.feature_store.parsers.bounded_files import kind_of, read_file, read_head, read_range
from foldfeed.feature_store.parsers.npz import NpzFile

MIB = 1 << 20
COMPRESSORS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


class Peak:
    """Largest memory that Python and NumPy took inside a block."""

    def __enter__(self):
        tracemalloc.start()
        return self

    def __exit__(self, *_):
        self.num_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_bomb_is_refused_at_the_limit(tmp_path, suffix):
    path = tmp_path / f"x.a3m{suffix}"
    path.write_bytes(COMPRESSORS[suffix](bytes(64 * MIB)))
    assert path.stat().st_size < 1 * MIB
    with Peak() as peak, pytest.raises(SourceTooLargeError, match="more than 8388608 bytes"):
        read_file(path, 8 * MIB)
    assert peak.num_bytes < 48 * MIB
    with Peak() as peak:
        assert len(read_head(path, 1000)) == 1000
    assert peak.num_bytes < 24 * MIB


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_cut_and_changed_compression_is_a_typed_error(tmp_path, suffix):
    text = os.urandom(3000) + b"A" * 5000
    whole = COMPRESSORS[suffix](text)
    path = tmp_path / "x"
    path.write_bytes(whole)
    assert read_file(path) == text
    for cut in (*range(7, 40), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceFileError, match="damaged or cut off"):
            read_file(path)
    for at in range(8, len(whole), 97):
        changed = bytearray(whole)
        changed[at] ^= 0x55
        path.write_bytes(changed)
        with contextlib.suppress(SourceFileError):
            # Some bytes of headers are not checked; the content is never another one but for zstd, which has
            # no checksum here.
            assert read_file(path) == text or suffix == ".zst"


def test_xz_that_wants_much_memory_is_refused(tmp_path):
    path = tmp_path / "x.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    path.write_bytes(lzma.compress(b"A" * 10, filters=filters))
    with pytest.raises(SourceFileError, match=r"[Mm]emory"):
        read_file(path)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.a3m")
    with pytest.raises(SourceFileError, match="not a regular file"):
        read_file(tmp_path / "pipe.a3m")
    (tmp_path / "zero.a3m").symlink_to("/dev/zero")
    found = AlignmentImport(tmp_path, "a3m")
    assert list(found) == []
    assert [reject.reason.split(": ")[-1] for reject in found.rejects] == ["it is not a regular file"] * 2


def test_ranges_lie_inside_the_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abcdef")
    assert read_range(path, 2, 3, 100) == b"cde"
    for start, size in ((-1, 2), (5, 2), (7, 0), (0, -1)):
        with pytest.raises(SourceFileError, match="are not in a file of 6 bytes"):
            read_range(path, start, size, 100)
    with pytest.raises(SourceTooLargeError):
        read_range(path, 0, 1 << 60, 100)


def test_names_without_extensions(tmp_path):
    assert kind_of(tmp_path / "a.b.A3M.GZ") == ("a.b", ".a3m")
    assert kind_of(tmp_path / "a") == ("a", "")
    assert kind_of(tmp_path / ".gz") == (".gz", "")
    assert kind_of(tmp_path / ".a3m") == (".a3m", "")


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(header: str, body: bytes, version: int = 1) -> bytes:
    text = header.encode("latin-1") + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY" + bytes([version, 0]) + size + text + body)
    return file.getvalue()


def test_npz_arrays_come_back(tmp_path):
    arrays = {"a": np.arange(12).reshape(3, 4), "f": np.asfortranarray(np.eye(3)), "s": np.array(["x", "yz"])}
    arrays["e"] = np.zeros((0, 3))
    archive = NpzFile(npz(**arrays), "x", MIB)
    assert set(archive.names) == set(arrays)
    for name, want in arrays.items():
        np.testing.assert_array_equal(archive[name], want)
        assert archive[name].dtype == want.dtype
    with pytest.raises(SourceFileError, match="no array 'b'; it has 'a'"):
        archive["b"]


@pytest.mark.parametrize(
    ("header", "body", "reason"),
    [
        (
            "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,), }",
            b"abcd",
            "needs 4000000000000 bytes",
        ),
        ("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }", b"", "needs -4"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\x80\x04K\x01.", "pickled objects"),
        ("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }", b"12345678", "pickled objects"),
        ("{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }", b"abcd", "needs 8 bytes and has 4"),
        ("{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,), }", b"", "without a byte"),
        ("{'descr': '<U99999999', 'fortran_order': False, 'shape': (0,), }", b"", "without a byte"),
        ("__import__('os').system('true')", b"", "bad header"),
        ("{'descr': '<i4'}", b"", "bad header"),
        ("(" * 5000, b"", "bad header|damaged"),
        ("{'descr': 'M8[s', 'fortran_order': False, 'shape': (1,)}", b"", "bad header"),
    ],
)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_npy_headers_that_lie(header, body, reason, version):
    archive = NpzFile(npy(header, body, version), "x", MIB)
    with Peak() as peak, pytest.raises(SourceFileError, match=reason):
        archive["x"]
    assert peak.num_bytes < 4 * MIB


def test_npz_bombs():
    with Peak() as peak, pytest.raises(SourceTooLargeError, match="more than 1048576; raise the limit"):
        NpzFile(npz(x=np.zeros(100 * MIB, np.uint8)), "x", MIB)["x"]
    # The array itself is 100 MiB and was made here; reading it took little.
    assert peak.num_bytes < 230 * MIB
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(10_001):
            archive.writestr(str(number), b"")
    with pytest.raises(SourceFileError, match="more than 10000 members"):
        NpzFile(file.getvalue(), "x", MIB)
    with pytest.raises(SourceFileError, match="no npz file"):
        NpzFile(b"PK\x03\x04 nonsense", "x", MIB)


SEQUENCE = [("seq_idx", "<i2"), ("taxonomy", "<i4"), *((name, "<i4") for name in ("res_start", "res_end"))]
SEQUENCE += [("del_start", "<i4"), ("del_end", "<i4")]


def boltz(
    rows=((0, 9606, 0, 4, 0, 0), (1, -1, 4, 8, 0, 1)), tokens=(2, 3, 4, 5, 2, 1, 22, 5), cells=((1, 7),)
):
    return {
        "sequences": np.array(list(rows), dtype=SEQUENCE),
        "deletions": np.array(list(cells), dtype=[("res_idx", "<i2"), ("deletion", "<i2")]),
        "residues": np.array([(token,) for token in tokens], dtype=[("res_type", "i1")]),
    }


def test_boltz_arrays_become_rows():
    rows = rows_of_boltz(boltz(), "x")
    assert [row.tobytes() for row in rows.alignment.letters] == [b"ARND", b"A-XD"]
    assert rows.alignment.deletions.tolist() == [[0, 0, 0, 0], [0, 7, 0, 0]]
    assert list(rows.species) == ["9606", ""]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (boltz(rows=()), "its rows must be there"),
        (boltz(rows=((0, 0, 0, 4, 0, 0), (1, 0, 4, 7, 0, 0))), "as long as the query"),
        (boltz(rows=((0, 0, 0, 4, 0, 0), (1, 0, 6, 10, 0, 0))), "residues outside of 0 to 8"),
        (boltz(rows=((0, 0, 0, 4, 0, 0), (1, 0, -4, 0, 0, 0))), "residues outside of 0 to 8"),
        (boltz(rows=((0, 0, 0, 4, 0, 0),) * 3), "its rows overlap"),
        (boltz(rows=((0, 0, 0, 4, 0, 1), (1, 0, 4, 8, 0, 1))), "deletions of its rows overlap"),
        (boltz(rows=((0, 0, 0, 4, 0, 9),)), "deletions outside of 0 to 1"),
        (boltz(tokens=(2, 3, 4, 0, 2, 3, 4, 5)), "no amino acid"),
        (boltz(tokens=(2, 3, 4, 23, 2, 3, 4, 5)), "no amino acid"),
        (boltz(tokens=(2, 3, 4, -5, 2, 3, 4, 5)), "outside of Boltz's alphabet"),
        (boltz(cells=((4, 1),)), "outside of its row"),
        (boltz(cells=((0, -1),)), "impossible count"),
        (boltz() | {"residues": np.zeros(8, "i1")}, "'residues' must be a list of records"),
        (boltz() | {"residues": np.zeros(8, [("res_type", "f4")])}, "'residues' must be a list of records"),
        (
            boltz() | {"residues": np.zeros(8, [("res_type", "i1", 3)])},
            "'residues' must be a list of records",
        ),
    ],
)
def test_boltz_arrays_that_do_not_fit(arrays, reason):
    with pytest.raises(SourceFileError, match=reason):
        rows_of_boltz(arrays, "x")


def chai(**changes) -> dict[str, list]:
    made = {
        "sequence": ["ACDE", "AxC-E", "ACDE"],
        "source_database": ["query", "uniref90", "mgnify"],
        "pairing_key": ["", "HUMAN", "Homo sapiens"],
        "comment": ["q", "tr|A0A146SKV9|A0A146SKV9_FUNHE/1-9 [subseq from] x", ""],
    }
    made.update(changes)
    return {name: column for name, column in made.items() if column is not None}


def parquet(table: dict, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(table), file, **options)
    return file.getvalue()


def test_chai_parquet_becomes_a_record(tmp_path):
    path = tmp_path / "abc.aligned.pqt"
    path.write_bytes(parquet(chai()))
    (record,) = list(AlignmentImport(tmp_path))
    assert (record.record_id, record.sequence, record.depth) == ("abc", "ACDE", 3)
    assert record.deletions[1].tolist() == [0, 1, 0, 0]
    assert [use.name for use in record.databases] == ["uniref90", "mgnify"]
    assert record.rows.database.tolist() == [-1, 0, 1]
    assert record.rows.species == ["", "FUNHE", ""]
    (record,) = list(AlignmentImport(path, options=ImportOptions(dedup="rows")))
    assert record.depth == 2


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (chai(comment=None), "no column 'comment'"),
        (chai(comment=[1, 2, 3]), "not text"),
        (chai(comment=["", None, ""]), "empty cells"),
        (chai(source_database=["uniref90"] * 3), "its first row, and no other"),
        (chai(source_database=["query"] * 3), "its first row, and no other"),
        (chai(sequence=["ACDE", "ACD", "ACDE"]), "has 3 columns"),
        (chai(sequence=["ACDE", "A\n>x\nACDE", "ACDE"]), "columns"),
        (chai(sequence=["ACDE", "ACDE\n>x\nACDE", "ACDE"]), "line breaks"),
        (chai(sequence=["ACDE", "", "ACDE"]), "no residues"),
        (chai(sequence=["AC-E", "ACDE", "ACDE"]), "has '-' at residue 3"),
        ({name: [] for name in chai()}, "not text|its first row"),
    ],
)
def test_chai_parquet_that_cannot_be_used(tmp_path, table, reason):
    path = tmp_path / "x.pqt"
    path.write_bytes(parquet(table))
    found = AlignmentImport(path)
    assert list(found) == []
    assert found.rejects[0].reason
    assert re.search(reason, found.rejects[0].reason), found.rejects[0].reason


def test_parquet_bombs():
    once = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), ["A" * (MIB // 4)])
    repeated = parquet(dict.fromkeys(chai(), once))
    assert len(repeated) < 8 * MIB
    before = pa.total_allocated_bytes()
    with Peak() as peak, pytest.raises(SourceTooLargeError, match="unpacks to more than"):
        read_columns(repeated, "x", 64 * MIB)
    assert peak.num_bytes < 128 * MIB
    many = parquet({name: pa.array(["a"]).take(pa.array(np.zeros(3_000_000, int))) for name in chai()})
    assert len(many) < MIB
    with pytest.raises(SourceTooLargeError):
        read_columns(many, "x", MIB)
    assert pa.total_allocated_bytes() - before < 64 * MIB
    for data in (b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"):
        with pytest.raises(SourceFileError, match="no Parquet file"):
            read_columns(data, "x", MIB)
