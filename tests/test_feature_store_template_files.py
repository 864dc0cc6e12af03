"""Results of template searches, read: against other programs' own reading of them, and cut or wrong ones."""

import gzip
import json
import random
import re

import numpy as np
import pytest
from fuzz_inputs import change

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.parsers.hhr import parse_hhr
from foldfeed.feature_store.parsers.hmmsearch import is_of, parse_domains, parse_hmmsearch
from foldfeed.feature_store.parsers.release_dates import parse_release_dates
from foldfeed.feature_store.parsers.stockholm import stockholm_as_a3m

# Two hits of a query of six residues; the second has a residue before the first column.
STOCKHOLM = b"""# STOCKHOLM 1.0
#=GF ID query

#=GS 1abc_A/3-7 DE [subseq from] mol:protein length:9  First
#=GS 2abc_B/1-5 DE [subseq from] mol:protein length:5

1abc_A/3-7         .ACD.EF-
2abc_B/1-5         kA--wEF.
#=GC RF            .xxx.xxx
//
"""
TABLE = b"""# comment
1abc_A - 9 query - 6 1e-9 30.0 0.1 1 1 1e-10 2e-9 29.5 0.1 1 5 3 7 3 7 0.99 mol:protein length:9
2abc_B - 5 query - 6 1e-3 10.0 0.1 1 1 1e-4 2e-3 9.5 0.1 1 5 1 5 1 5 0.90 -
# [ok]
"""


def laid_on_query(hit, length: int) -> str:
    letters = ["-"] * length
    for query, template, size in hit.runs.tolist():
        for step in range(size):
            letters[query + step] = hit.residues[template + step - hit.first]
    return "".join(letters)


def test_rows_and_table_of_hmmsearch():
    chains, domains = parse_hmmsearch(STOCKHOLM, 6), parse_domains(TABLE)
    assert [chain.target for chain in chains] == ["1abc_A", "2abc_B"]
    assert [chain.description for chain in chains] == ["mol:protein length:9  First", "mol:protein length:5"]
    assert [chain.runs.tolist() for chain in chains] == [[[0, 2, 5]], [[0, 1, 1], [3, 3, 2]]]
    assert [chain.residues for chain in chains] == ["ACDEF", "KAWEF"]
    assert all(map(is_of, chains, domains))
    assert [(domain.e_value, domain.score, domain.num_residues) for domain in domains] == [
        (2e-9, 29.5, 9),
        (2e-3, 9.5, 5),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-4], "no closing '//'"),
        (lambda text: text[:-20], "no closing '//'"),
        (lambda text: text + b"# STOCKHOLM 1.0\n//\n", "a second alignment"),
        (lambda text: text.replace(b".xxx.xxx", b".xxx.xx."), "its RF line has 5 columns and the query 6"),
        (lambda text: text.replace(b".xxx.xxx", b"xxx.xxx"), "has 8 columns, the RF line 7"),
        (lambda text: text.replace(b"1abc_A/3-7  ", b"1abc_A/3-8  "), "holds 5 residues"),
        (lambda text: text.replace(b"2abc_B/1-5  ", b"2abc_B  "), "does not end in /first-last"),
        (lambda text: text.replace(b"kA--wEF.", b"kA--wEF. x"), "expected a name"),
        (lambda text: b"garbage\n" + text, "not Stockholm"),
    ],
)
def test_alignments_that_cannot_be_are_refused(change, words):
    with pytest.raises(AlignmentParseError, match=re.escape(words)):
        parse_hmmsearch(change(STOCKHOLM), 6)


def test_a_line_that_is_no_domain_is_refused():
    with pytest.raises(AlignmentParseError, match="no line of a table of domains"):
        parse_domains(TABLE.replace(b"2e-9", b"good"))


def test_an_empty_alignment_has_no_rows():
    assert parse_hmmsearch(b"", 6) == []


def test_real_rows_of_hmmsearch_name_their_own_residues(real_file):
    """1psm_A among the templates of 1psm_A: itself comes first, residue beside residue."""
    text = gzip.decompress(real_file("msas/1psm_A/hmm_output.sto.gz").read_bytes())
    chains = parse_hmmsearch(text, 38)
    assert len(chains) == 445
    assert (chains[0].target, chains[0].runs.tolist()) == ("1psm_A", [[0, 0, 38]])
    for chain in chains:
        if len(chain.runs):
            assert chain.runs[0, 1] >= chain.first
            assert chain.runs[-1, 1] + chain.runs[-1, 2] <= chain.first + len(chain.residues)
            assert chain.runs[-1, 0] + chain.runs[-1, 2] <= 38


def test_hits_of_hhsearch_are_those_that_alphafold_took(real_file):
    """Sequences in the query's columns and Sum_probs of the eight templates that AlphaFold 2 made of them."""
    folder = real_file("golden/openfold_short/pdb70_hits.hhr").parent
    hits = parse_hhr((folder / "pdb70_hits.hhr").read_bytes(), 73)
    assert len(hits) == 10
    expected = np.load(folder / "expected.npz")
    by_name = {hit.target.lower(): hit for hit in hits}
    for name, sequence, (sum_probs,) in zip(
        *(expected[f"template_{what}"] for what in ("domain_names", "sequence", "sum_probs")), strict=True
    ):
        hit = by_name[name.lower()]
        assert laid_on_query(hit, 73) == sequence
        assert hit.sum_probs == pytest.approx(sum_probs)
    assert (hits[0].probability, hits[0].e_value, hits[0].score) == (7.51, 3.8e2, 16.19)
    assert (hits[0].num_residues, hits[0].first) == (41, 9)


def test_a_result_of_hhsearch_agrees_with_its_own_table(real_file):
    """The table at the top tells the ranges of every hit once more."""
    text = real_file("golden/hhr/2uvo_hhblits.hhr").read_text()
    hits = parse_hhr(text, 171)
    lines = re.findall(
        r"^ *\d+ .{30} *[\d.]+ .* (\d+)  +(\d+)-(\d+) +(\d+)-(\d+) +\((\d+)\)$", text, re.MULTILINE
    )
    assert len(lines) == len(hits) == 32
    for hit, line in zip(hits, lines, strict=True):
        runs = hit.runs
        found = (runs[:, 2].sum(), runs[0, 0] + 1, runs[-1, 0] + runs[-1, 2], runs[0, 1] + 1)
        assert (*found, runs[-1, 1] + runs[-1, 2], hit.num_residues) == tuple(map(int, line))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_a_result_of_hhsearch_that_was_cut_is_refused(real_file, share):
    data = real_file("golden/openfold_short/pdb70_hits.hhr").read_bytes()
    body = data[: data.rindex(b"Q query")] if share == 0.99 else data[: int(len(data) * share)]
    with pytest.raises(AlignmentParseError):
        parse_hhr(body, 73)


def test_a_result_of_another_query_is_refused(real_file):
    data = real_file("golden/openfold_short/pdb70_hits.hhr").read_bytes()
    with pytest.raises(AlignmentParseError, match="is of a query of 73 residues, not 74"):
        parse_hhr(data, 74)
    with pytest.raises(AlignmentParseError, match="expected 'Query' first"):
        parse_hhr(b"# STOCKHOLM 1.0\n", 74)


HHR = b"""Query         query
Match_columns 6

 No Hit                             Prob E-value P-value  Score    SS Cols Query HMM  Template HMM
  1 1ABC_A Something                 7.5 3.8E+02  0.0047   16.2   0.0    3    2-5     10-12  (41)

No 1
>1ABC_A Something
Probab=7.51  E-value=3.8e+02  Score=16.19  Aligned_cols=3  Identities=23%  Similarity=0.398  Sum_probs=2.1

Q query             2 ACDE    5 (6)
Q Consensus         2 acde    5 (6)
T 1ABC_A           10 A-DE   12 (41)


"""
CACHE = b'{"1abc": {"release_date": "2018-04-01", "resolution": 1.5}, "2abc": "2019-01-02"}'


@pytest.mark.parametrize(
    ("text", "parse"),
    [
        (STOCKHOLM, lambda data: parse_hmmsearch(data, 6)),
        (STOCKHOLM, stockholm_as_a3m),
        (TABLE, parse_domains),
        (HHR, lambda data: parse_hhr(data, 6)),
        (b"1abc\t2018-04-01\t1.5\n2abc\t2019-04-01\t\n", parse_release_dates),
        (CACHE, parse_release_dates),
    ],
)
def test_changed_bytes_are_a_typed_error_or_another_text(text, parse):
    assert parse(text)
    rng = random.Random(11)
    for _ in range(300):
        data = text
        for _ in range(rng.randint(1, 4)):
            data = change(rng, data, text)
        try:
            parse(data)
        except AlignmentParseError:
            continue
    with pytest.raises(AlignmentParseError):
        parse(b"{" * 100_000)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1abc\t2018-4-1\n", "'1abc': '2018-4-1' is no date"),
        ("1abc 2018-04-01\n", "expected entry, tab"),
        ("1abc\t2018-04-01\n1ABC\t2019-04-01\n", "has two dates"),
        ("1abc\t2018-04-01\tgood\n", "'good' is no number"),
        ('{"1abc": {"resolution": 2}}', "'1abc' has no release_date"),
        ("{", "no JSON"),
    ],
)
def test_tables_of_dates_that_cannot_be_are_refused(tmp_path, text, words):
    with pytest.raises(AlignmentParseError, match=words):
        parse_release_dates(text.encode())


def test_both_spellings_of_a_table_say_the_same():
    table = (
        "# of 2020\nentry\trelease_date\tresolution_angstrom\n1ABC\t2018-04-01\t1.5\r\n2abc\t2019-04-01\t\n"
    )
    cache = {
        "1abc": {"release_date": "2018-04-01", "resolution": 1.5, "seqs": ["A"]},
        "2abc": {"release_date": "2019-04-01", "resolution": 0.0},
    }
    assert parse_release_dates(table.encode()) == parse_release_dates(json.dumps(cache).encode())
