"""Merging follows AlphaFold 2: order, caps, first occurrence of letters, deletions left aside."""

import dataclasses
import gzip
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines_data import globins, needs_hmmer, write_fasta

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.parsers import alignment as parsed_alignment
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.feature_store.parsers.hit_names import species_of
from foldfeed.pipelines import SearchResult, ToolIdentity
from foldfeed.pipelines.errors import ToolOutputError
from foldfeed.pipelines.programs.subprocess_runner import Usage
from foldfeed.pipelines.records.msa import merge
from foldfeed.pipelines.searches.hits import DatabaseHits, read_hits
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer

TOOL = ToolIdentity(name="tool", version="1", binary_sha256="0" * 64, argv_template=())
USAGE = Usage(wall_s=0, cpu_s=0, max_rss_bytes=0)


def hits_of(text: str) -> DatabaseHits:
    alignment = parse_a3m(text)
    nans = np.full(len(alignment.names), np.nan)
    return DatabaseHits(
        alignment=alignment,
        hit_ids=alignment.names,
        e_values=nans,
        bit_scores=nans.astype(np.float32),
        taxonomy_ids=np.zeros(len(alignment.names), dtype=np.int32),
    )


def result_of(alignment: str, table: str = "", form: str = "stockholm") -> SearchResult:
    return SearchResult(
        tool=TOOL, format=form, alignment=alignment.encode(), table=table.encode(), usage=USAGE
    )


def test_first_occurrence_wins_and_letters_not_deletions_decide():
    one = hits_of(">query\nACD\n>a\nA-D\n>b\nAkkBD\n")
    two = hits_of(">query\nACD\n>c\nAyy-D\n>d\nADD\n>e\nACD\n")
    merged = merge("ACD", [one, two], [None, None])
    assert merged.rows.hit_id == ["query", "a", "b", "d"]
    # B and D encode alike but are different letters, so both rows stay.
    assert merged.msa.tolist() == [[0, 4, 3], [0, 21, 3], [0, 3, 3], [0, 3, 3]]
    assert merged.deletions.tolist() == [[0, 0, 0], [0, 0, 0], [0, 2, 0], [0, 0, 0]]
    assert merged.rows.database.tolist() == [-1, 0, 0, 1]
    assert merged.num_rows == (2, 1)


def test_caps_count_the_query_and_apply_before_merging():
    text = ">query\nAC\n" + "".join(f">h{k}\n{a}{b}\n" for k, (a, b) in enumerate(["AC", "DE", "FG", "HI"]))
    merged = merge("AC", [hits_of(text)], [3])
    # Rows query, h0, h1 are taken; h0 repeats the query.
    assert merged.rows.hit_id == ["query", "h1"]
    assert merge("AC", [hits_of(text)], [1]).msa.shape == (1, 2)


@given(
    st.integers(1, 4),
    st.lists(st.lists(st.text("AB-d", min_size=1, max_size=9), max_size=8), min_size=1, max_size=3),
    st.one_of(st.none(), st.integers(1, 5)),
)
@settings(max_examples=150, deadline=None)
def test_equals_a_naive_merge(length, databases, cap):
    query = "A" * length
    fitted = [[row for row in rows if sum(letter in "AB-" for letter in row) == length] for rows in databases]
    texts = [
        f">query\n{query}\n" + "".join(f">{n}\n{row}\n" for n, row in enumerate(rows)) for rows in fitted
    ]
    merged = merge(query, [hits_of(text) for text in texts], [cap] * len(texts))
    expected = [query]
    for rows in fitted:
        for row in [query, *rows][:cap]:
            letters = "".join(letter for letter in row if not letter.islower())
            if letters not in expected:
                expected.append(letters)
    np.testing.assert_array_equal(merged.msa, [alphabet.encode(row) for row in expected])
    assert sum(merged.num_rows) == len(expected) - 1


def test_scores_come_from_the_table_by_target_name():
    alignment = "# STOCKHOLM 1.0\nquery ACD\nt1/1-3 ACD\nt1/5-7 A-D\nt/2/1-3 AAA\nquery/1-3 CCC\n//\n"
    table = (
        "t1 - query - 2e-5 30.5 0 x\nt/2 - query - 0.01 10 0 x\nquery - query - 1 5 0 x\nt1 - query - 9 9 0\n"
    )
    hits = read_hits(result_of(alignment, table), "ACD")
    np.testing.assert_array_equal(hits.e_values, [np.nan, 2e-5, 2e-5, 0.01, 1])
    np.testing.assert_array_equal(hits.bit_scores, np.float32([np.nan, 30.5, 30.5, 10, 5]))


def test_numbers_that_hmmer_puts_before_repeated_names_are_taken_off():
    note = '# WARNING: seq names have been made unique by adding a prefix of "<seq#>|"\n'
    rows = "0|query ACD\n1|t1/1-3 AC-\n2|t1/1-3 A-D\n//\n"
    table = "t1 - query - 2e-5 30.5 0 x\n"
    hits = read_hits(result_of("# STOCKHOLM 1.0\n" + note + rows, table), "ACD")
    assert hits.hit_ids == ["query", "t1/1-3", "t1/1-3"]
    assert hits.e_values[1] == 2e-5
    plain = read_hits(result_of("# STOCKHOLM 1.0\nquery ACD\n7|t1/1-3 AC-\n//\n", table), "ACD")
    assert plain.hit_ids[1] == "7|t1/1-3"


def test_an_alignment_of_another_query_is_refused():
    with pytest.raises(ToolOutputError, match=r"\(2 columns\) is not the query \(3 residues\)"):
        read_hits(result_of(">query\nAC\n", form="a3m"), "ACD")


@pytest.mark.parametrize(
    ("name", "species"),
    [
        ("tr|A0A146SKV9|A0A146SKV9_FUNHE", "FUNHE"),
        ("sp|P0C2L1|A3X1_LOXLA/1-90", "LOXLA"),
        ("sp|P0C2L1_1|A3X1_1_LOXLA_7/1-90", "LOXLA"),
        ("HBB_HUMAN/1-146", "HUMAN"),
        ("CDC15_YEAST/25-272/3-200", "YEAST"),
        ("A0A146SKV9_9BACT", "9BACT"),
        ("UniRef90_P69905/1-140", ""),
        ("MGYP000406148242/1-68", ""),
        ("1ABC_A", ""),
        ("SRR_12345", ""),
        ("decoy_uniref90_00001/1-9", ""),
        ("query", ""),
    ],
)
def test_species(name, species):
    assert species_of(name) == species


def test_openfolds_features_from_results(real_file):
    folder = real_file("golden/openfold_short")
    expected = np.load(folder / "expected.npz")
    a3m = gzip.decompress((folder / "bfd_uniclust_hits.a3m.gz").read_bytes()).decode()
    sequence = "".join((folder / "short.fasta").read_text().split("\n")[1:]).strip()
    results = [
        result_of((folder / "uniref90_hits.sto").read_text()),
        result_of(a3m, form="a3m"),
        result_of((folder / "mgnify_hits.sto").read_text()),
    ]
    hits = [read_hits(result, sequence) for result in results]
    merged = merge(sequence, hits, [10_000, None, 501])
    # AlphaFold 2's own map from HHblits' order of residues to this alphabet.
    ours = np.array([0, 4, 3, 6, 13, 7, 8, 9, 11, 10, 12, 2, 14, 5, 1, 15, 16, 19, 17, 18, 20, 21])
    np.testing.assert_array_equal(merged.msa, ours[expected["msa"]])
    np.testing.assert_array_equal(merged.deletions, expected["deletion_matrix_int"])


def test_a_cap_bounds_what_a_family_with_many_relatives_takes(monkeypatch):
    """5,000 rows of 1,000 columns, of which 20 are kept; names of the others are all that is held of them."""
    # Room that is not touched before it is filled; tracemalloc counts it all the same.
    monkeypatch.setattr(parsed_alignment, "_CHUNK_BYTES", 1 << 16)
    query, other = "ACDEFGHIKL" * 100, "MNPQRSTVWY" * 100
    lines = [f"h{number}/1-1000 {other}" for number in range(5_000)]
    text = "\n".join(["# STOCKHOLM 1.0", f"query {query}", *lines, "//", ""])
    table = "".join(f"h{number} - q - {number}e-9 1 0 0 1 0 1 1 0 0 0 1 1 1 -\n" for number in range(5_000))
    result = result_of(text, table)

    def peak(cap):
        tracemalloc.start()
        hits = read_hits(result, query, cap)
        assert hits.num_hits == 5_000
        taken = merge(query, [hits], [cap])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, taken

    (bounded, some), (whole, all_of_them) = peak(20), peak(None)
    assert bounded < 0.4 * whole
    assert some.num_rows == merge(query, [read_hits(result, query)], [20]).num_rows == (1,)
    assert all_of_them.num_rows == (1,)


@pytest.mark.external_tool
@needs_hmmer
def test_a_cap_takes_the_best_rows_wherever_they_stand_in_the_database(tmp_path):
    names = list(globins(12))
    query = globins(1)[names[0]]
    best = Jackhmmer.find(database=str(write_fasta(tmp_path / "a", globins(12))), cpus=1, timeout_s=60)
    turned = write_fasta(tmp_path / "b", dict(reversed(globins(12).items())))
    for tool in (best, dataclasses.replace(best, database=str(turned))):
        hits = read_hits(tool.search(query), query, 4)
        # The query finds itself; of the others the three with the smallest E-values.
        assert hits.hit_ids[1].startswith(names[0])
        every = read_hits(tool.search(query), query)
        assert hits.e_values[1:].tolist() == sorted(every.e_values[1:].tolist())[:3]
        assert hits.num_hits == every.num_hits > 3
