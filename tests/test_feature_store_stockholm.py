"""Stockholm text becomes the arrays that AlphaFold 2's own way of reading gives."""

import numpy as np
import pytest
from families import as_stockholm, family
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.feature_store import AlignmentParseError
from foldfeed.feature_store.parsers import stockholm as stockholm_module
from foldfeed.feature_store.parsers.stockholm import parse_stockholm

GAPS = "-._~"


def naive(text: str) -> tuple[list[str], list[str], list[list[int]]]:
    """Reads column by column, as AlphaFold 2's parse_stockholm does, with all gap characters equal."""
    rows: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() == "//":
            break
        if line.strip() and not line.startswith("#"):
            name, residues = line.split()
            rows[name] = rows.get(name, "") + residues
    query = next(iter(rows.values()))
    letters, deletions = [], []
    for row in rows.values():
        kept, counts, inserted = "", [], 0
        for letter, of_query in zip(row, query, strict=True):
            if of_query in GAPS:
                inserted += letter not in GAPS
            else:
                kept += "-" if letter in GAPS else letter.upper()
                counts.append(inserted)
                inserted = 0
        letters.append(kept)
        deletions.append(counts)
    return list(rows), letters, deletions


def assert_equals_naive(text: str) -> None:
    parsed = parse_stockholm(text)
    names, letters, deletions = naive(text)
    assert parsed.names == names
    assert [row.tobytes().decode() for row in parsed.letters] == letters
    np.testing.assert_array_equal(parsed.deletions, deletions)


def test_worked_example():
    parsed = parse_stockholm("# STOCKHOLM 1.0\n#=GF ID x\n\nq A-CD-\nh AkC-e\n#=GC RF xxxxx\n//\n")
    assert parsed.letters.tobytes() == b"ACDAC-"
    # The residue right of the last column is dropped, as AlphaFold 2 drops it.
    assert parsed.deletions.tolist() == [[0, 0, 0], [0, 1, 0]]


@st.composite
def stockholm_text(draw) -> str:
    width, depth = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    letter = st.sampled_from("ACDXabz" + GAPS)
    rows = [draw(st.lists(letter, min_size=width, max_size=width)) for _ in range(depth)]
    rows[0][draw(st.integers(0, width - 1))] = "A"
    cut = draw(st.integers(0, width - 1))
    blocks = []
    for first, last in ((0, cut), (cut, width)):
        if first < last:
            lines = [f"row{number}/1-9 {''.join(row[first:last])}" for number, row in enumerate(rows)]
            blocks.append("\n".join([*lines, f"#=GC RF {'x' * (last - first)}"]))
    return "# STOCKHOLM 1.0\n\n" + "\n\n".join(blocks) + "\n//\n"


@given(stockholm_text(), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_equals_column_by_column_reading_at_any_block_size(text, block):
    saved = stockholm_module.BLOCK_CHARACTERS
    try:
        stockholm_module.BLOCK_CHARACTERS = block
        assert_equals_naive(text)
    finally:
        stockholm_module.BLOCK_CHARACTERS = saved


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "empty"),
        (">q\nACD\n", 1, "not Stockholm"),
        ("# STOCKHOLM 1.0\nq ACD\n", None, "no closing '//'"),
        ("# STOCKHOLM 1.0\n//\n", None, "no row"),
        ("# STOCKHOLM 1.0\nq ACD\nh\n//\n", 3, "a name and aligned residues"),
        ("# STOCKHOLM 1.0\nq ACD\nh AC\n//\n", 3, "'h' has 2 columns, the first row has 3"),
        ("# STOCKHOLM 1.0\nq ---\nh ACD\n//\n", 2, "no residue"),
        ("# STOCKHOLM 1.0\nq ACD\nh A1D\n//\n", 3, "'1' at column 2 of row 'h'"),
    ],
)
def test_bad_text_is_refused_with_its_line(text, line, words):
    with pytest.raises(AlignmentParseError, match=words) as caught:
        parse_stockholm(text)
    assert caught.value.line == line


@pytest.mark.parametrize("block", [60, 200, 10_000])
def test_deep_interleaved_alignments_equal_column_by_column_reading(block):
    assert_equals_naive(as_stockholm(family(500, 91, max_insertion=4), block))


def test_real_files_equal_column_by_column_reading(real_file):
    for name in ("uniref90_hits.sto", "uniprot_hits.sto", "mgnify_hits.sto"):
        assert_equals_naive(real_file(f"msas/2q2k_A/{name}").read_text())


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 5))
@settings(deadline=None)
def test_rows_behind_a_number_are_counted_and_not_kept(keep, depth, seed):
    text = as_stockholm(family(depth, 30, seed))
    whole, some = parse_stockholm(text), parse_stockholm(text, keep_rows=keep)
    assert some.names == whole.names[:keep]
    assert some.letters.tobytes() == whole.letters[:keep].tobytes()
    np.testing.assert_array_equal(some.deletions, whole.deletions[:keep])
    assert (some.num_left_out, whole.num_left_out) == (max(0, depth - keep), 0)
    with pytest.raises(AlignmentParseError, match="no closing"):
        parse_stockholm(text.rstrip().removesuffix("//"), keep_rows=keep)
