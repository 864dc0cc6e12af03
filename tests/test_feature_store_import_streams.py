"""Texts are parsed as they come, in bounded memory, and limits hold while they are read."""

import gzip
import io
import lzma
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from import_reference import read_all
from test_feature_store_a3m import a3m_text

from foldfeed.feature_store import AlignmentParseError
from foldfeed.feature_store.exchange_errors import SourceTooLargeError
from foldfeed.feature_store.parsers import a3m, bounded_files, lines
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.feature_store.parsers.alignment import ParsedAlignment, SparseDeletions
from foldfeed.feature_store.parsers.bounded_files import EXPANSION_FREE_BYTES, read_file
from foldfeed.feature_store.parsers.npz import NpzFile
from foldfeed.feature_store.parsers.stockholm import parse_stockholm

MIB = 1 << 20
# A text of 24 million cells with insertions in every row.
DEEP = """
import sys
from pathlib import Path
from foldfeed.feature_store.importers.layouts import AlignmentImport
from foldfeed.feature_store.importers.rows import ImportOptions
from foldfeed.feature_store.importers.into_store import import_into

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

def load(path, store):
    found = AlignmentImport(path, options=ImportOptions(neff_max_rows=0))
    assert import_into(store, found).num_read == 1

load(sys.argv[1], sys.argv[2] + "-small")
before = peak()
load(sys.argv[3], sys.argv[2])
print(peak() - before)
"""


def blocks(data: bytes, sizes: list[int]):
    at = 0
    for size in sizes:
        yield data[at : at + size]
        at += size
    yield data[at:]


def assert_equal(one: ParsedAlignment, other: ParsedAlignment) -> None:
    assert one.names == other.names
    assert one.query_insertions == other.query_insertions
    np.testing.assert_array_equal(one.letters, other.letters)
    np.testing.assert_array_equal(one.deletions, other.deletions)


@given(a3m_text(), st.lists(st.integers(0, 9), max_size=40))
@settings(max_examples=150, deadline=None)
def test_blocks_of_any_size_give_what_the_whole_text_gives(text, sizes):
    whole = parse_a3m(text)
    assert_equal(parse_a3m(blocks(text.encode(), sizes)), whole)
    dense = ParsedAlignment.dense(whole.names, whole.letters, whole.deletions)
    np.testing.assert_array_equal(dense.deletions, whole.deletions)
    rows = "".join(f"r{number} {row.tobytes().decode()}\n" for number, row in enumerate(whole.letters))
    stockholm = f"# STOCKHOLM 1.0\n{rows}//\n"
    assert_equal(parse_stockholm(blocks(stockholm.encode(), sizes)), parse_stockholm(stockholm))


@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_sparse_counts_are_the_dense_ones(depth, length, random):
    dense = np.array(
        [[random.choice([0, 0, 0, 1, 255, 70_000]) for _ in range(length)] for _ in range(depth)],
        dtype=np.int32,
    )
    rows = np.array([random.randrange(depth) for _ in range(random.randrange(12))], dtype=np.int64)
    sparse = SparseDeletions.of(dense)
    out = np.zeros((len(rows), length), np.int32)
    sparse.write(rows, out)
    np.testing.assert_array_equal(out, dense[rows])
    again = np.zeros_like(out)
    sparse.take(rows).write(np.arange(len(rows)), again)
    np.testing.assert_array_equal(again, dense[rows])


@pytest.mark.parametrize(
    ("module", "limit", "text", "reason"),
    [
        (lines, "MAX_LINE_BYTES", b">q\nACDE\n>h\n" + b"A" * 300, "line 4: a line of more than 100 bytes"),
        (a3m, "MAX_ROW_CHARACTERS", b">q\nACDE\n>h\n" + b"kkkk\n" * 30, "'h' has more than 100 characters"),
    ],
)
def test_limits_hold_while_a_text_is_read(monkeypatch, module, limit, text, reason):
    monkeypatch.setattr(module, limit, 100)
    given_out = []

    def endless():
        for at in range(0, len(text), 16):
            given_out.append(at)
            yield text[at : at + 16]
        raise AssertionError("the whole text was read")

    with pytest.raises(AlignmentParseError, match=reason):
        parse_a3m(endless())
    assert len(given_out) < len(text) / 16


def test_a_query_that_no_record_holds_is_refused_before_its_rows_are_read():
    def endless():
        yield b">q\n" + b"A" * 100_001 + b"\n>h\n"
        raise AssertionError("more was read")

    # The first row is whole when the header behind it was read.
    with pytest.raises(
        AlignmentParseError, match="line 1: the query has 100001 residues; a record holds at most"
    ):
        parse_a3m(endless())
    text = "# STOCKHOLM 1.0\nq " + "A" * 100_001 + "\n//\n"
    with pytest.raises(AlignmentParseError, match="line 2: the query has 100001 residues"):
        parse_stockholm(text)


def test_rows_are_counted_while_they_are_read():
    def endless():
        yield b">q\nACDE\n"
        while True:
            yield b">h\nACDE\n"

    with pytest.raises(AlignmentParseError, match="line 21: the alignment has more than 10 rows"):
        parse_a3m(endless(), max_rows=10)
    with pytest.raises(AlignmentParseError, match="line 12: the alignment has more than 10 rows"):
        parse_stockholm(
            iter([b"# STOCKHOLM 1.0\n", *(b"r%d ACDE\n" % row for row in range(99))]), max_rows=10
        )


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_what_unpacks_to_far_too_much_is_refused_early(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(bounded_files, "MAX_EXPANSION", 100)
    monkeypatch.setattr(bounded_files, "EXPANSION_FREE_BYTES", 2 * MIB)
    path = tmp_path / "x.a3m"
    path.write_bytes(pack(b">q\n" + b"A" * 100 + b"\n" + (b">h\n" + b"-" * 100 + b"\n") * 200_000))
    with pytest.raises(SourceTooLargeError, match=r"more than 100 times as much.*import the plain file"):
        read_file(path)
    # A small text may be as regular as it likes, and so may a plain one.
    path.write_bytes(pack(b">q\n" + b"A" * MIB))
    assert len(read_file(path)) == MIB + 3
    path.write_bytes(b">q\n" + b"A" * (4 * MIB))
    assert len(read_file(path)) == 4 * MIB + 3
    assert EXPANSION_FREE_BYTES > MIB


def test_an_npz_that_announces_too_much_is_refused_before_it_is_unpacked(monkeypatch):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "ab":
            archive.writestr(f"{name}.npy", bytes(3 * MIB))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(
        SourceTooLargeError, match="its arrays have 6291456 bytes unpacked, more than 4194304"
    ):
        NpzFile(file.getvalue(), "x", 4 * MIB)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("pack", [None, gzip.compress])
def test_an_import_needs_at_most_four_times_what_it_stores(tmp_path, pack):
    length, depth = 300, 80_000
    rng = np.random.default_rng(3)
    pool = []
    for _ in range(100):
        row = np.array(list("ACDEFGHIKLMNPQRSTVWY-"))[rng.integers(0, 21, length)].tolist()
        for column in rng.integers(0, length, 6):
            row[column] = "k" + row[column]
        pool.append("".join(row))
    query = "A" * length
    rows = "".join(f">UniRef100_{row}\n{pool[row % 100]}\n" for row in range(depth))
    data = f">q\n{query}\n{rows}".encode()
    for name, text in (("small", b">q\nA\n>h\nC\n"), ("deep", data)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.a3m").write_bytes(text if pack is None else pack(text, 1))
    done = subprocess.run(
        [sys.executable, "-c", DEEP, tmp_path / "small", tmp_path / "store", tmp_path / "deep"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # Tokens and deletion counts are stored as a byte each.
    assert int(done.stdout) * 1024 <= 4 * 2 * depth * length


def test_the_message_of_an_import_says_where(tmp_path):
    (tmp_path / "x.a3m").write_bytes(b">q\nACDE\n>h\nACD\n")
    found, records = read_all(tmp_path)
    assert records == []
    assert found.rejects[0].reason == "line 3: the row has 3 columns (upper case and '-'), the query has 4"
