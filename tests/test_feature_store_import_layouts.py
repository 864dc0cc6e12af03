"""Every layout that can be imported, made small here, against rows read letter by letter."""

import bz2
import dataclasses
import gzip
import json
import lzma

import numpy as np
import pytest
import zstandard
from import_reference import BFD, MGNIFY, UNIREF90, assert_rows, naive_merge, read_all

from foldfeed.feature_store import FeatureStore, InvalidRecordError
from foldfeed.feature_store.exchange_errors import LayoutError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.importers.into_store import import_into
from foldfeed.feature_store.importers.layouts import LAYOUTS, AlignmentImport, detect_layout
from foldfeed.feature_store.importers.rows import ImportOptions
from foldfeed.feature_store.parsers.hit_names import make_id, mmseqs_scores, species_of


@pytest.fixture
def chain(tmp_path):
    folder = tmp_path / "alignments" / "1abc_A"
    folder.mkdir(parents=True)
    (folder / "mgnify_hits.a3m").write_text(MGNIFY)
    (folder / "uniref90_hits.sto").write_text(UNIREF90)
    (folder / "bfd_uniclust_hits.a3m.gz").write_bytes(gzip.compress(BFD.encode()))
    (folder / "pdb70_hits.hhr").write_text("no alignment")
    (folder / "hmm_output.sto").write_text("not even Stockholm")
    (folder / "uniprot_hits.sto").write_text(UNIREF90.replace("UniRef90_X/3-9", "sp|P69905|HBA_HUMAN"))
    return folder


def test_a_folder_per_chain_merges_as_alphafold_2_does(chain):
    found, (record,) = read_all(chain.parent)
    assert (found.layout, record.record_id, found.rejects) == ("openproteinset", "1abc_A", [])
    assert_rows(record, naive_merge(UNIREF90, BFD, MGNIFY))
    # B and D are different letters, so ACBE of mgnify stays, although it encodes as ACDE; ACkkBE came first.
    assert [use.name for use in record.databases] == ["uniref90", "bfd_uniclust", "mgnify"]
    assert [(use.num_hits, use.num_rows) for use in record.databases] == [(2, 2), (3, 2), (2, 0)]
    assert (record.databases[0].tool, record.databases[0].tool_version) == ("jackhmmer", "3.3.2")
    assert record.rows.species[2] == "FUNHE"
    assert record.extra == {"source": "1abc_A", "source_format": "openproteinset"}


def test_options_choose_databases_caps_and_dedup(chain):
    (record,) = read_all(chain, dedup="none")[1]
    assert_rows(record, naive_merge(UNIREF90, BFD, MGNIFY, dedup=False))
    (record,) = read_all(chain, databases=("mgnify", "uniref90"))[1]
    assert_rows(record, naive_merge(MGNIFY, UNIREF90))
    (record,) = read_all(chain, max_hits={"uniref90": 2, "bfd_uniclust": 3})[1]
    assert record.rows.hit_id == ["1abc_A", "UniRef90_X/3-9", "hit1", "hit2", "MGYP1/1-4"]
    (record,) = read_all(chain, paired=True)[1]
    assert [use.name for use in record.databases] == ["uniref90", "bfd_uniclust", "mgnify", "uniprot"]


def test_the_bucket_layout_has_a_folder_more(chain):
    inner = chain / "a3m"
    inner.mkdir()
    (chain / "mgnify_hits.a3m").rename(inner / "mgnify_hits.a3m")
    assert_rows(read_all(chain.parent)[1][0], naive_merge(UNIREF90, BFD, MGNIFY))


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("mgnify_hits.a3m", "", "mgnify is empty"),
        (
            "mgnify_hits.a3m",
            ">q\nACDF\n",
            "first row of database 'mgnify' is not the query: they differ at residue 4",
        ),
        ("mgnify_hits.a3m", ">q\nACDEE\n", "5 columns for a query of 4"),
        ("mgnify_hits.a3m", UNIREF90, "mgnify_hits.a3m: line 5: text before the first"),
        ("mgnify_hits.sto", UNIREF90, "two files for database 'mgnify'"),
        ("uniref90_hits.sto", UNIREF90[:-4], "no closing"),
    ],
)
def test_a_bad_chain_is_rejected_and_the_others_go_on(chain, file, text, reason):
    good = chain.parent / "2xyz_B"
    good.mkdir()
    (good / "uniref90_hits.sto").write_text(UNIREF90)
    (chain / file).write_text(text)
    found, records = read_all(chain.parent)
    assert [record.record_id for record in records] == ["2xyz_B"]
    assert [reject.record_id for reject in found.rejects] == ["1abc_A"]
    assert reason in found.rejects[0].reason


def test_an_empty_file_may_mean_no_hits(chain):
    (chain / "mgnify_hits.a3m").write_text("\n")
    (record,) = read_all(chain, empty_as_no_hits=True)[1]
    assert_rows(record, naive_merge(UNIREF90, BFD))
    assert record.extra["databases_without_hits"] == "mgnify"


@pytest.mark.parametrize("unified", [False, True])
def test_an_alignment_database(chain, tmp_path, unified):
    folder = tmp_path / "db"
    folder.mkdir()
    blob, index = b"junk", {}
    for name in ("1abc_A", "3def_C"):
        files = []
        for file, text in (("uniref90_hits.sto", UNIREF90), ("bfd_uniclust_hits.a3m", BFD), ("x.hhr", "no")):
            files.append([file, len(blob), len(text)])
            blob += text.encode()
        index[name] = {"db": "alignment_db_0.db", "files": files} if unified else files
    index["9zzz_A"] = {"db": "../alignment_db_0.db", "files": []}
    index["8zzz_A"] = {"db": "alignment_db_0.db", "files": [["a.a3m", len(blob), 5]]}
    (folder / "alignment_db_0.db").write_bytes(blob)
    (folder / ("super.index" if unified else "alignment_db_0.index")).write_text(json.dumps(index))
    found, records = read_all(folder)
    assert found.layout == "openfold-db"
    assert [record.record_id for record in records] == ["1abc_A", "3def_C"]
    assert_rows(records[1], naive_merge(UNIREF90, BFD))
    reasons = {reject.record_id: reject.reason for reject in found.rejects}
    assert "a file beside the index" in reasons["9zzz_A"]
    assert "are not in a file of" in reasons["8zzz_A"]


def test_alphafold_2_folders_of_monomers_and_multimers(tmp_path, chain):
    root = tmp_path / "af2"
    for target, chains in (("T1", [""]), ("T2", ["A", "B"])):
        for letter in chains:
            folder = root / target / "msas" / letter
            folder.mkdir(parents=True)
            (folder / "uniref90_hits.sto").write_text(UNIREF90)
            (folder / "bfd_uniref_hits.a3m").write_text(BFD)
            (folder / "pdb_hits.hhr").write_text("x")
    (root / "T2" / "msas" / "chain_id_map.json").write_text(
        '{"A": {"description": "first", "sequence": "ACDE"}}'
    )
    found, records = read_all(root)
    assert found.layout == "alphafold2"
    assert [record.record_id for record in records] == ["T1", "T2_A", "T2_B"]
    assert [record.description for record in records] == ["", "first", ""]
    assert_rows(records[0], naive_merge(UNIREF90, BFD))
    for path, ids in ((root / "T1", ["T1"]), (root / "T2" / "msas", ["T2_A", "T2_B"])):
        found, records = read_all(path)
        assert (found.layout, [record.record_id for record in records]) == ("alphafold2", ids)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".bz2", bz2.compress),
        (".zst", zstandard.ZstdCompressor().compress),
        (".gz", lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:])),
        (".xz", lambda data: lzma.compress(data[:20]) + b"\0" * 8 + lzma.compress(data[20:])),
    ],
)
@pytest.mark.parametrize("kind", ["a3m", "a2m", "sto"])
def test_single_files_plain_and_compressed(tmp_path, kind, suffix, compress):
    text = UNIREF90 if kind == "sto" else BFD
    path = tmp_path / f"my protein.{kind}{suffix}"
    path.write_bytes(compress(text.encode()))
    found, (record,) = read_all(path)
    assert (found.layout, record.record_id) == (kind, "my_protein")
    assert_rows(record, naive_merge(text))


def test_where_ids_come_from(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.a3m").write_text(f"# a comment\n>ss_pred\nHHHH\n>sp|P1|{name} text\nACDE\n")
    found, records = read_all(tmp_path, id_from="folder")
    assert [record.record_id for record in records] == ["a", "b"]
    assert [record.description for record in records] == ["sp|P1|a text", "sp|P1|b text"]
    assert [record.record_id for record in read_all(tmp_path, id_from="header")[1]] == ["sp|P1|a", "sp|P1|b"]
    assert [record.record_id for record in read_all(tmp_path)[1]] == ["a", "b"]
    found, records = read_all(tmp_path, id_from="file")
    assert [record.record_id for record in records] == ["x"]
    assert "already that of a/x.a3m" in found.rejects[0].reason


def test_a2m_columns_of_the_model_or_of_the_query(tmp_path):
    path = tmp_path / "x.a2m"
    path.write_text(">q\nAcC.DE\n>h\nA.CxDE\n>i\n-k-.-E\n")
    (record,) = read_all(path)[1]
    assert (record.sequence, record.extra["query_insertions"]) == ("ACDE", "1")
    assert record.deletions.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    (record,) = read_all(path, a2m_columns="query")[1]
    assert record.sequence == "ACCDE"
    assert [alphabet.decode(row) for row in record.msa] == ["ACCDE", "A-CDE", "-K--E"]
    assert record.deletions.tolist() == [[0] * 5, [0, 0, 0, 1, 0], [0] * 5]


@pytest.mark.parametrize("header", ["ss_pred2", "ss_predx text", ">", "", "aa"])
def test_headers_that_only_look_like_annotations(tmp_path, header):
    path = tmp_path / "x.a3m"
    path.write_text(f">ss_pred\nHHHH\n> {header}\nAkCDE\n>ss_dssp x\nHHHH\n")
    (record,) = read_all(path)[1]
    assert (record.depth, record.extra["query_insertions"]) == (1, "1")


def test_an_alignment_of_too_many_rows_is_refused(tmp_path, monkeypatch):
    for module in ("rows", "texts"):
        monkeypatch.setattr(f"foldfeed.feature_store.importers.{module}.MAX_IMPORT_ROWS", 100)
    (tmp_path / "a.a3m").write_text(">\nA\n" * 102)
    (tmp_path / "b.a3m").write_text(">\nA\n" + "\n" * 2000)
    (tmp_path / "c.a3m").write_text(">\nA\n" * 100)
    found, records = read_all(tmp_path)
    assert [record.record_id for record in records] == ["b", "c"]
    assert "line 201: the alignment has more than 100 rows" in found.rejects[0].reason


@pytest.mark.parametrize(
    ("layout", "option"),
    [
        ("openproteinset", {"id_from": "folder"}),
        ("a3m", {"databases": ("a",)}),
        ("a3m", {"paired": True}),
        ("sto", {"a2m_columns": "query"}),
        ("chai-pqt", {"empty_as_no_hits": True}),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, layout, option):
    with pytest.raises(ValueError, match=f"has no effect on the layout {layout}"):
        AlignmentImport(tmp_path, layout, ImportOptions(**option))


def test_residues_of_the_query_that_are_no_columns_are_told(tmp_path):
    path = tmp_path / "x.a3m"
    path.write_text(">q\nAkCDE\nkkk\n>h\nACDE\n")
    (record,) = read_all(path)[1]
    assert record.extra["query_insertions"] == "4"


def test_colabfold(tmp_path):
    header = "#4\t1\n"
    rows = ">101\nACDE\n>UniRef100_A\t90\t0.5\t5.4E-19\t0\t3\t4\t1\t4\t63\nAxC-E\n\0>101\nACDE\n>B\nACDE\n\0"
    (tmp_path / "job.a3m").write_text(header + rows)
    found, (record,) = read_all(tmp_path)
    assert (found.layout, record.record_id, record.depth) == ("colabfold", "job", 4)
    assert record.rows.e_value[1] == 5.4e-19
    assert record.rows.bit_score[1] == 90
    assert np.isnan(record.rows.e_value[[0, 2, 3]]).all()
    assert record.extra["colabfold_copies"] == "1"
    assert read_all(tmp_path, dedup="rows")[1][0].depth == 2
    (tmp_path / "complex.a3m").write_text("#4,5\t1,1\n>101\t102\nACDEACDEF\n")
    (tmp_path / "wrong.a3m").write_text("#5\t1\n>101\nACDE\n")
    found, records = read_all(tmp_path, "colabfold")
    assert [record.record_id for record in records] == ["complex_101", "complex_102", "job"]
    assert "announces 5 residues, the query has 4" in found.rejects[0].reason


def test_detection_says_what_it_looked_for(tmp_path):
    with pytest.raises(LayoutError, match="there is nothing at that path"):
        AlignmentImport(tmp_path / "absent")
    with pytest.raises(LayoutError) as caught:
        AlignmentImport(tmp_path)
    for layout in LAYOUTS.values():
        assert layout.looks_for in str(caught.value)
    (tmp_path / "x.a3m").write_text(BFD)
    (tmp_path / "y.sto").write_text(UNIREF90)
    with pytest.raises(LayoutError, match=r"several layouts; give --layout") as caught:
        detect_layout(tmp_path)
    assert caught.value.looked_for == ("a3m: e.g. x.a3m", "sto: e.g. y.sto")
    with pytest.raises(LayoutError, match="nothing of this layout"):
        AlignmentImport(tmp_path, "boltz-npz")
    with pytest.raises(ValueError, match="not one of auto, a3m"):
        AlignmentImport(tmp_path, "nonsense")


def test_links_and_odd_names_do_no_harm(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "...a3m").write_text(BFD)
    (tmp_path / "a" / "é.a3m").write_text(BFD)
    _, records = read_all(tmp_path, "a3m")
    assert [record.record_id for record in records] == ["_"]
    for name, want in (
        ("../../etc", "_.._.._etc"),
        ("a/b", "a_b"),
        ("", ""),
        ("x" * 300, "x" * 255),
        ("-a", "_-a"),
    ):
        assert make_id(name).startswith(want[:3])
        assert "/" not in make_id(name)


def test_species_of_hits():
    assert species_of("tr|A0A146SKV9|A0A146SKV9_FUNHE/1-90") == "FUNHE"
    assert species_of("HBB_HUMAN/1-146") == "HUMAN"
    assert species_of("UniRef90_P69905/3-140") == ""
    assert species_of("sp|P0C2L1|A3X1_LOXLA_1") == "LOXLA"


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ("267\t0.926\t1.483E-77\t1\t205\t206\t0\t204\t205", (1.483e-77, 267.0)),
        ("267\t0.926\t1.483E-77", (np.nan, np.nan)),
        ("x\t0\t1\t1\t2\t3\t0\t2\t2", (np.nan, np.nan)),
        ("1e300\t0\t1\t1\t2\t3\t0\t2\t2", (np.nan, np.nan)),
        ("9\t0\t-1\t1\t2\t3\t0\t2\t2", (np.nan, np.nan)),
        ("9\t0\tinf\t1\t2\t3\t0\t2\t2", (np.nan, np.nan)),
    ],
)
def test_scores_of_mmseqs_headers(fields, want):
    np.testing.assert_equal(mmseqs_scores(f"UniRef100_A\t{fields}"), want)


def test_an_import_is_one_commit_and_done_once(tmp_path, chain):
    store_url = tmp_path / "store"
    report = import_into(store_url, AlignmentImport(chain.parent))
    assert (report.num_read, report.num_added, report.version, report.already_done) == (1, 1, 1, False)
    again = import_into(store_url, AlignmentImport(chain.parent))
    assert (again.already_done, again.job_id) == (True, report.job_id)
    assert_rows_of_store = FeatureStore.open(store_url)["1abc_A"]
    want = read_all(chain.parent)[1][0]
    assert np.array_equal(assert_rows_of_store.msa(), want.msa)
    assert np.array_equal(assert_rows_of_store.deletions(), want.deletions)
    assert assert_rows_of_store.fingerprint == want.fingerprint
    (chain / "mgnify_hits.a3m").unlink()
    replaced = import_into(store_url, AlignmentImport(chain.parent), on_existing="replace")
    assert (replaced.num_added, replaced.version) == (1, 2)


def test_many_records_go_to_several_parts_and_one_version(tmp_path, monkeypatch):
    for number in range(7):
        (tmp_path / f"r{number}.a3m").write_text(BFD)
    (tmp_path / "bad.a3m").write_text("nothing")
    monkeypatch.setattr("foldfeed.feature_store.importers.into_store.MAX_PART_RECORDS", 3)
    report = import_into(tmp_path / "store", AlignmentImport(tmp_path, "a3m"))
    assert (report.num_parts, report.num_added, report.version, len(report.rejects)) == (3, 7, 1, 1)
    assert FeatureStore.open(tmp_path / "store").ids == [f"r{number}" for number in range(7)]


def test_nothing_is_made_when_nothing_can_be_read(tmp_path):
    (tmp_path / "bad.a3m").write_text("nothing")
    report = import_into(tmp_path / "store", AlignmentImport(tmp_path))
    assert (report.num_read, report.version, len(report.rejects)) == (0, None, 1)
    assert not (tmp_path / "store").exists()


def test_options_that_make_no_sense_are_refused():
    for wrong in (
        {"dedup": "x"},
        {"id_from": "x"},
        {"max_bytes": 0},
        {"max_hits": {"a": 0}},
        {"a2m_columns": "x"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ImportOptions(**wrong)
    assert dataclasses.replace(ImportOptions(), dedup="none").dedup == "none"
    assert issubclass(InvalidRecordError, ValueError)
