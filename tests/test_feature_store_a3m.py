"""A3M text becomes the arrays that an independent, letter-by-letter reading gives."""

import gzip

import numpy as np
import pytest
from families import as_a3m, family
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.feature_store import AlignmentParseError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.parsers import a3m as a3m_module
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.feature_store.parsers.stockholm import parse_stockholm


def naive(text: str) -> tuple[list[str], list[str], list[list[int]]]:
    """Reads one letter after the other, as AlphaFold 2's parser does."""
    names, rows, deletions = [], [], []
    for entry in text.split(">")[1:]:
        header, _, body = entry.partition("\n")
        letters, counts, inserted = "", [], 0
        for letter in "".join(body.split()):
            if letter.islower():
                inserted += 1
            elif letter != ".":
                letters += letter
                counts.append(inserted)
                inserted = 0
        names.append(header.strip())
        rows.append(letters)
        deletions.append(counts)
    return names, rows, deletions


def assert_equals_naive(text: str) -> None:
    parsed = parse_a3m(text)
    names, rows, deletions = naive(text)
    assert parsed.names == names
    assert [row.tobytes().decode() for row in parsed.letters] == rows
    np.testing.assert_array_equal(parsed.deletions, deletions)
    assert parsed.deletions.dtype == np.int32
    np.testing.assert_array_equal(parsed.msa, [alphabet.encode(row) for row in rows])


def test_worked_example():
    parsed = parse_a3m(">q the query\nACD\n>h\nA-kkD\n>e\naAcC.dDe\n")
    assert parsed.names == ["q the query", "h", "e"]
    assert parsed.letters.tobytes() == b"ACDA-DACD"
    assert parsed.deletions.tolist() == [[0, 0, 0], [0, 0, 2], [1, 1, 1]]
    assert parsed.msa.tolist()[1] == [0, 21, 3]


@st.composite
def a3m_text(draw) -> str:
    length = draw(st.integers(1, 9))
    insertion = st.text("acdy.", max_size=4)
    lines = []
    for number in range(draw(st.integers(1, 12))):
        columns = draw(
            st.lists(
                st.sampled_from("ACDXBZ" if number == 0 else "ACDXBZ-"), min_size=length, max_size=length
            )
        )
        row = draw(insertion) + "".join(column + draw(insertion) for column in columns)
        cut = draw(st.integers(0, len(row)))
        lines += [f">row {number}", row[:cut], row[cut:]]
    return "\n".join(lines) + draw(st.sampled_from(["", "\n", "\r\n", "\n\x00"]))


@given(a3m_text(), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_equals_letter_by_letter_reading_at_any_block_size(text, block):
    saved = a3m_module.BLOCK_CHARACTERS
    try:
        a3m_module.BLOCK_CHARACTERS = block
        assert_equals_naive(text.rstrip("\x00"))
        assert parse_a3m(text).names
    finally:
        a3m_module.BLOCK_CHARACTERS = saved


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "no row"),
        ("# only a comment\n", None, "no row"),
        ("ACD\n>q\nACD\n", 1, "before the first"),
        (">q\nACD\n>h\n\n>i\nACD\n", 3, "no residues"),
        (">q\nACD\n>h\nAC\n", 3, "2 columns.*has 3"),
        (">q\nACD\n>h\nACD\n>i\nACDE\n", 5, "4 columns.*has 3"),
        (">q\nACD\n>h\nA*D\n", 3, r"'\*' at position 2"),
        (">q\nACD\n>h\nAC1D\n", 3, "'1' at position 3"),
        (">q\nacd\n>h\nACD\n", 1, "no upper-case"),
    ],
)
def test_bad_text_is_refused_with_its_line(text, line, words):
    with pytest.raises(AlignmentParseError, match=words) as caught:
        parse_a3m(text)
    assert caught.value.line == line


def test_comments_and_annotation_rows_are_skipped():
    text = "#A3M#\n#3\t1\n>ss_pred PSIPRED\nHHH\n>ss_conf\n999\n>q\nACD\n>ss_dssp\nCCCHH\n>h\nAC-\n"
    assert parse_a3m(text).names == ["q", "h"]


@pytest.mark.parametrize("width", [60, 10**9])
def test_deep_alignments_equal_letter_by_letter_reading(width):
    assert_equals_naive(as_a3m(family(1500, 143, max_insertion=120), width))


def test_merge_of_real_parses_equals_openfolds_features(real_file):
    # The three files in this order, aligned rows that repeat dropped, give exactly expected.npz, in HHblits'
    # residue codes.
    folder = real_file("golden/openfold_short")
    expected = np.load(folder / "expected.npz")
    parsed = [
        parse_stockholm((folder / "uniref90_hits.sto").read_bytes()),
        parse_a3m(gzip.decompress((folder / "bfd_uniclust_hits.a3m.gz").read_bytes())),
        parse_stockholm((folder / "mgnify_hits.sto").read_bytes()),
    ]
    seen: dict[bytes, np.ndarray] = {}
    for alignment in parsed:
        for letters, deletions in zip(alignment.letters, alignment.deletions, strict=True):
            seen.setdefault(letters.tobytes(), deletions)
    codes = {letter: code for code, letter in enumerate("ACDEFGHIKLMNPQRSTVWYX-")}
    codes |= {"B": 2, "J": 20, "O": 20, "U": 1, "Z": 3}
    msa = [[codes[letter] for letter in row.decode()] for row in seen]
    np.testing.assert_array_equal(msa, expected["msa"])
    np.testing.assert_array_equal(list(seen.values()), expected["deletion_matrix_int"])
