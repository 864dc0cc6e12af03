"""FASTA files of every kind become queries and dead letters, one per entry, and no entry is lost."""

import gzip
import random
import subprocess
import sys
import textwrap

import fsspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.pipelines import DeadLetter, QuerySequence
from foldfeed.pipelines.errors import QueryFileError
from foldfeed.pipelines.fasta import read_fasta

GOOD = ">a first one\nACDE\nFGHI\n>b\nKLMN\n"


def read(path, data: bytes | str, **options):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_fasta(str(path), **options))


def sequences(entries) -> dict[str, str]:
    return {entry.record_id: entry.sequence for entry in entries if isinstance(entry, QuerySequence)}


def reasons(entries) -> dict[str, str]:
    return {entry.record_id: entry.reason for entry in entries if isinstance(entry, DeadLetter)}


def test_plain_entries_with_description_place_and_line(tmp_path):
    first, second = read(tmp_path / "q.fa", GOOD, file_index=3)
    assert (first.record_id, first.description, first.sequence) == ("a", "first one", "ACDEFGHI")
    assert (first.file_index, first.item_index, first.line) == (3, 0, 1)
    assert (second.record_id, second.description, second.item_index, second.line) == ("b", "", 1, 4)


@pytest.mark.parametrize(
    "pack",
    [
        lambda data: data,
        gzip.compress,
        zstandard.ZstdCompressor().compress,
        lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]) + b"\x00" * 20,
        lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:]),
    ],
    ids=["plain", "gzip", "zstd", "two gzip members and padding", "two zstd frames"],
)
@pytest.mark.parametrize("name", ["q.fa", "q.fa.gz", "q.fa.zst"])
def test_compression_is_known_by_content(tmp_path, pack, name):
    packed = pack(GOOD.encode())
    entries = read(tmp_path / name, packed)
    if packed == GOOD.encode() and not name.endswith(".fa"):
        assert "its name ends in" in next(iter(reasons(entries).values()))
    else:
        assert sequences(entries) == {"a": "ACDEFGHI", "b": "KLMN"}


def test_any_fsspec_url(tmp_path):
    with fsspec.open("memory://pipelines/q.fa.gz", "wb") as file:
        file.write(gzip.compress(GOOD.encode()))
    assert sequences(read_fasta("memory://pipelines/q.fa.gz")) == {"a": "ACDEFGHI", "b": "KLMN"}


def test_lower_case_stop_white_space_and_line_ends(tmp_path):
    text = ">a\tx y\r\nacde fg\r\n  hiKL* \r\n\r\n>b\nAC**\n"
    assert sequences(read(tmp_path / "q.fa", text)) == {"a": "ACDEFGHIKL", "b": "AC"}


def test_ambiguous_letters_are_kept(tmp_path):
    assert sequences(read(tmp_path / "q.fa", ">a\nABZJOUXA\n")) == {"a": "ABZJOUXA"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("AC*DE", r"'*' at residue 3"),
        ("ACD4E", "'4' at residue 4"),
        ("AC\nD-E", "'-' at residue 4"),
        ("ACé", "'é' at residue 3"),
        ("", "no sequence"),
        ("***", "no sequence"),
        ("A" * 101, "101 residues; this build takes at most 100"),
    ],
)
def test_a_bad_entry_is_named_and_the_others_stay(tmp_path, body, reason):
    entries = read(tmp_path / "q.fa", f">x1\nAC\n>bad words\n{body}\n>x2\nDE\n", max_residues=100)
    assert sequences(entries) == {"x1": "AC", "x2": "DE"}
    (letter,) = [entry for entry in entries if isinstance(entry, DeadLetter)]
    assert letter.record_id == "bad"
    assert letter.line == 3
    assert reason in letter.reason


@pytest.mark.parametrize("header", [">", "> spaced", ">a/1-9", ">../up", ">" + "a" * 256])
def test_an_unusable_id_is_a_dead_letter_with_file_and_number(tmp_path, header):
    entries = read(tmp_path / "q.fa", f">ok\nAC\n{header}\nAC\n")
    assert sequences(entries).get("ok") == "AC"
    if header != "> spaced":
        assert "q.fa#1" in reasons(entries)
    else:
        assert sequences(entries) == {"ok": "AC", "spaced": "AC"}


def test_text_before_the_first_header_is_one_dead_letter(tmp_path):
    entries = read(tmp_path / "q.fa", "hello\nworld\n>a\nAC\n")
    assert sequences(entries) == {"a": "AC"}
    assert list(reasons(entries).values()) == ["text before the first '>' header: 'hello'"]


@pytest.mark.parametrize("data", [b"", b"\n\n  \n", gzip.compress(b"", mtime=0)])
def test_an_empty_file_is_a_dead_letter(tmp_path, data):
    assert reasons(read(tmp_path / "q.fa", data)) == {"q.fa#0": "the file holds no FASTA entry"}


def test_a_binary_file_is_one_dead_letter(tmp_path):
    entries = read(tmp_path / "q.fa", b"\x7fELF\x02\x01\x00\x00" + random.Random(1).randbytes(5000))
    assert len(entries) == 1
    assert "binary file" in entries[0].reason


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
def test_a_cut_stream_keeps_whole_entries_and_drops_the_cut_one(tmp_path, pack):
    rng = random.Random(2)
    entries = {f"p{number}": "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=500)) for number in range(2000)}
    packed = pack("".join(f">{name}\n{residues}\n" for name, residues in entries.items()).encode())
    got = read(tmp_path / "q.fa.gz", packed[: len(packed) * 2 // 3])
    kept = sequences(got)
    assert 0 < len(kept) < 2000
    assert all(entries[name] == residues for name, residues in kept.items())
    (reason,) = reasons(got).values()
    assert "cannot be read on" in reason
    assert "ends in the middle" in reason


def test_a_damaged_stream_is_a_dead_letter(tmp_path):
    packed = bytearray(gzip.compress(random.Random(3).randbytes(4000).hex().encode()))
    packed[200:260] = b"\xff" * 60
    got = read(tmp_path / "q.fa.gz", bytes(packed))
    assert "cannot be read on" in "".join(reasons(got).values())


@pytest.mark.parametrize("url", ["/nowhere/q.fa", "memory://nowhere/q.fa", "noprotocol://x/q.fa"])
def test_a_missing_file_is_a_typed_error(url):
    with pytest.raises(QueryFileError, match="cannot read queries from") as caught:
        list(read_fasta(url))
    assert caught.value.url == url


def test_a_protein_as_long_as_titin(tmp_path):
    residues = "MTTQAPTFTQPLQSVVVLEG" * 1717 + "ACDEFGHIKL"
    path = tmp_path / "titin.fasta"
    text = f">titin\n{textwrap.fill(residues, 60)}\n"
    (titin,) = read(path, text, max_residues=50_000)
    assert (titin.sequence, len(titin.sequence)) == (residues, 34_350)
    (refused,) = read(path, text, max_residues=10_000)
    assert "34350 residues" in refused.reason


@given(
    st.lists(
        st.tuples(st.text("abcXYZ019_", min_size=1, max_size=5), st.text("ACDEFGHIK", min_size=1)), max_size=6
    ),
    st.integers(1, 7),
    st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=100, deadline=None)
def test_every_entry_comes_back_however_lines_are_wrapped(tmp_path_factory, entries, width, newline):
    path = tmp_path_factory.mktemp("fasta") / "q.fa"
    lines = []
    for name, residues in entries:
        lines += [f">{name}", *(residues[at : at + width] for at in range(0, len(residues), width))]
    got = read(path, newline.join(lines))
    assert [(entry.record_id, entry.sequence) for entry in got if isinstance(entry, QuerySequence)] == entries
    assert [(entry.file_index, entry.item_index) for entry in got] == [(0, k) for k in range(len(got))]


def test_the_package_imports_without_beam():
    code = (
        "import sys, foldfeed.pipelines, foldfeed.pipelines.cli.build; sys.exit('apache_beam' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_line_ends_and_marks_of_other_systems(tmp_path, monkeypatch, chunk_bytes, end, mark):
    monkeypatch.setattr("foldfeed.pipelines.fasta.CHUNK_BYTES", chunk_bytes)
    data = mark + GOOD.replace("\n", end).encode() + b">c" + end.encode()
    entries = read(tmp_path / "q.fa", data)
    assert sequences(entries) == {"a": "ACDEFGHI", "b": "KLMN"}
    assert [entry.line for entry in entries] == [1, 4, 6]
    assert reasons(entries) == {"c": "the header has no sequence"}


def test_letters_that_are_no_ascii_are_not_changed_into_residues(tmp_path):
    entries = read(tmp_path / "latin.fa", b">a\nAC\xdfDE\n>b\nAC\xc3\x89D\n>c\nACDE\n")
    assert sequences(entries) == {"c": "ACDE"}
    assert reasons(entries) == {
        "a": "'\ufffd' at residue 3 is no amino acid letter",
        "b": "'\u00c9' at residue 3 is no amino acid letter",
    }
