"""``foldfeed ingest`` and ``foldfeed export`` as a person uses them: output, exit codes, one-line errors."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from foldfeed.feature_store import FeatureStore
from foldfeed.feature_store.cli.main import main

ALIGNMENT = ">query of interest\nACDE\n>UniRef90_A/1-4\nAxC-E\n>hit2\nACDE\n"


@pytest.fixture
def run():
    def call(*args: object):
        return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)

    return call


@pytest.fixture
def alignments(tmp_path):
    folder = tmp_path / "alignments"
    folder.mkdir()
    for name in ("p1", "p2"):
        (folder / f"{name}.a3m").write_text(ALIGNMENT)
    return folder


def test_ingest_then_query_then_export(run, alignments, tmp_path):
    store = tmp_path / "store"
    result = run("ingest", "--alignments", alignments, "--store", store)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:3] == [
        "layout     a3m",
        "read       2 records in 1 parts",
        "added      2, not needed 0",
    ]
    assert result.stderr == ""
    rows = run("query", store, "select record_id, depth from records order by record_id", "--format", "csv")
    assert rows.stdout == "record_id,depth\np1,3\np2,3\n"
    assert run("export", store, "p1").stdout == (
        ">p1 query of interest\nACDE\n>UniRef90_A/1-4\nAxC-E\n>hit2\nACDE\n"
    )
    again = run("ingest", "--alignments", alignments, "--store", store)
    assert again.exit_code == 0
    assert "added      0: this import was committed before" in again.stdout


def test_existing_ids_with_other_content(run, alignments, tmp_path):
    store = tmp_path / "store"
    run("ingest", "--alignments", alignments, "--store", store)
    (alignments / "p1.a3m").write_text(">query\nACDEF\n")
    refused = run("ingest", "--alignments", alignments, "--store", store)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ")
    assert "p1" in refused.stderr
    skipped = run("ingest", "--alignments", alignments, "--store", store, "--on-existing", "skip")
    assert (skipped.exit_code, FeatureStore.open(store)["p1"].length) == (0, 4)
    replaced = run("ingest", "--alignments", alignments, "--store", store, "--on-existing", "replace")
    assert (replaced.exit_code, FeatureStore.open(store)["p1"].length) == (0, 5)


def test_rejects_are_listed_and_written(run, alignments, tmp_path):
    for number in range(25):
        (alignments / f"bad{number:02}.a3m").write_text(">q\nACDE\n>h\nAC\n")
    arguments = ["ingest", "--alignments", alignments, "--store", tmp_path / "store"]
    result = run(*arguments, "--rejects", tmp_path / "rejects.jsonl")
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines[0] == "rejected   25"
    assert lines[1].startswith("  bad00 (bad00.a3m): line 3: the row has 2 columns")
    assert lines[-1] == "  ... and 5 more; --rejects FILE writes all"
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [one["record_id"] for one in written] == [f"bad{number:02}" for number in range(25)]
    assert set(written[0]) == {"record_id", "where", "reason"}
    assert run(*arguments, "--job-id", "again", "--fail-on-rejects").exit_code == 1


def test_nothing_imported_is_a_failure(run, tmp_path):
    (tmp_path / "bad.a3m").write_text("x")
    result = run("ingest", "--alignments", tmp_path, "--store", tmp_path / "store")
    assert result.exit_code == 1
    assert "text before the first '>' header" in result.stderr
    assert not (tmp_path / "store").exists()


def test_lower_case_queries_are_noted(run, tmp_path):
    (tmp_path / "p.a3m").write_text(">q\nACkkDE\n")
    result = run("ingest", "--alignments", tmp_path, "--store", tmp_path / "store")
    assert "note       1 queries have lower-case residues" in result.stdout


def test_options_reach_the_import(run, tmp_path):
    chain = tmp_path / "chains" / "1abc_A"
    chain.mkdir(parents=True)
    (chain / "uniref90_hits.a3m").write_text(ALIGNMENT)
    (chain / "mgnify_hits.a3m").write_text(">q\nACDE\n>m1\n-CDE\n>m2\n--DE\n")
    base = ["ingest", "--alignments", chain.parent, "--on-existing", "replace", "--store", tmp_path / "store"]

    def hits(*options: str) -> list[str]:
        result = run(*base, *options)
        assert result.exit_code == 0, result.output
        return FeatureStore.open(tmp_path / "store")["1abc_A"].rows()["hit_id"].to_pylist()[1:]

    assert hits() == ["UniRef90_A/1-4", "m1", "m2"]
    assert hits("--dedup", "none") == ["UniRef90_A/1-4", "hit2", "q", "m1", "m2"]
    assert hits("--databases", "mgnify,uniref90") == ["m1", "m2", "UniRef90_A/1-4"]
    assert hits("--max-hits", "mgnify=2") == ["UniRef90_A/1-4", "m1"]


@pytest.mark.parametrize(
    "form", ["a3m", "a2m", "sto", "colabfold", "alphafold3-json", "boltz-npz", "chai-pqt", "alphafold2-npz"]
)
def test_several_records_go_to_a_folder_and_come_back(run, small_store, tmp_path, form):
    # Stockholm has no place for residues inserted in the query, which these records have.
    records = ["c3", "a1", "c3"] if form != "sto" else ["a1"]
    result = run("export", small_store.url, *records, "--format", form, "--output", f"{tmp_path}/out/")
    if form == "sto" and small_store["a1"].deletions()[0].any():
        assert result.exit_code == 1
        return
    assert result.exit_code == 0, result.output
    assert f"{len(set(records))} files in" in result.stderr
    layout = {"alphafold2-npz": "alphafold2"}.get(form, form)
    for path in (tmp_path / "out").iterdir():
        back = run(
            "ingest", "--alignments", path, "--layout", layout, "--store", f"{tmp_path}/{path.name}.store"
        )
        assert back.exit_code == 0, back.output
        store = FeatureStore.open(f"{tmp_path}/{path.name}.store")
        (record_id,) = store.ids
        original = next(one for one in ("a1", "c3") if small_store[one].length == store[record_id].length)
        np.testing.assert_array_equal(store[record_id].msa(), small_store[original].msa())


@pytest.mark.parametrize("compression", [[], ["--compress", ".gz"], ["--compress", ".zst"]])
def test_features_of_several_records_come_back_in_one_ingest(run, small_store, tmp_path, compression):
    out, back = tmp_path / "out", tmp_path / "back"
    names = small_store.ids
    exported = run(
        "export", small_store.url, *names, "--format", "alphafold2-npz", "--output", out, *compression
    )
    assert exported.exit_code == 0, exported.output
    assert sorted(path.name for path in out.iterdir()) == names
    result = run("ingest", "--alignments", out, "--store", back)
    assert (result.exit_code, "layout     alphafold2" in result.output) == (0, True), result.output
    store = FeatureStore.open(back)
    assert store.ids == names
    for name in names:
        np.testing.assert_array_equal(store[name].msa(), small_store[name].msa())
        np.testing.assert_array_equal(store[name].deletions(), small_store[name].deletions())


def test_alignments_for_pairing_that_are_left_out_are_told(run, tmp_path):
    chains = tmp_path / "chains"
    for name in ("1abc_A", "1abc_B"):
        (chains / name).mkdir(parents=True)
        (chains / name / "uniref90_hits.a3m").write_text(ALIGNMENT)
        (chains / name / "uniprot_hits.a3m").write_text(ALIGNMENT)
    told = run("ingest", "--alignments", chains, "--store", tmp_path / "a")
    assert "left out   uniprot of 2 records: made for pairing chains (--paired takes them)" in told.output
    names = ["1abc_A", "1abc_B"]
    run("ingest", "--alignments", chains, "--store", tmp_path / "all", "--paired")
    run("export", tmp_path / "all", *names, "--format", "openfold-db", "--output", tmp_path / "db")
    again = run("ingest", "--alignments", tmp_path / "db", "--store", tmp_path / "b")
    assert "left out   uniprot of 2 records" in again.output, again.output
    for more in (["--paired"], ["--databases", "uniref90"]):
        said = run("ingest", "--alignments", chains, "--store", tmp_path / f"c{more[0]}", *more)
        assert (said.exit_code, "left out" in said.output) == (0, False)


def test_export_names_rows_and_compression(run, small_store, tmp_path):
    result = run(
        "export", small_store.url, "c3", "a1", "--output", tmp_path / "out", "--compress", ".gz", "--rows", 2
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a1.a3m.gz", "c3.a3m.gz"]
    assert run("export", small_store.url, "c3", "--rows", 2, "--output", "-").stdout.count(">") == 2


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["export", "STORE", "nobody"], 1, "error: no record 'nobody'"),
        (["export", "STORE", "a1", "nobody", "--output", "TMP/o"], 1, "error: no record 'nobody'"),
        (["export", "STORE", "a1", "c3"], 2, "need --output FOLDER"),
        (["export", "STORE"], 2, "nothing given; say which records"),
        (["export", "STORE", "a1", "--format", "x"], 2, "is not one of"),
        (["export", "STORE", "a1", "--chai-source", "mgnify"], 2, "goes with the format chai-pqt"),
        (["export", "STORE", "a1", "--compress", ".gz"], 2, "ends in .gz"),
        (["export", "STORE", "a1", "--version", "99"], 2, "version 99 does not exist"),
        (["export", "STORE", "b2", "--format", "sto"], 1, "its query has inserted residues"),
        (["ingest", "--store", "TMP/s"], 2, "Missing option '--alignments'"),
        (["ingest", "--alignments", "TMP/absent", "--store", "TMP/s"], 2, "does not exist"),
        (["ingest", "--alignments", "TMP", "--store", "TMP/s"], 1, "it holds no layout that is known"),
        (
            ["ingest", "--alignments", "TMP", "--store", "TMP/s", "--layout", "a3m"],
            1,
            "nothing of this layout",
        ),
        (["ingest", "--alignments", "TMP", "--store", "TMP/s", "--max-hits", "a"], 2, "is not NAME=N"),
    ],
)
def test_errors_are_short_and_have_the_right_exit_code(run, small_store, tmp_path, args, code, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    known = {"STORE": small_store.url}
    result = run(*[known.get(arg, arg.replace("TMP", str(empty))) for arg in args])
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (empty / "o").exists()


def test_help_has_examples(run):
    assert "foldfeed ingest --alignments" in run("ingest", "--help").stdout
    assert "foldfeed export my-store" in run("export", "--help").stdout


def names_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_many_records_are_chosen_by_all_a_condition_or_a_set(small_store, tmp_path):
    ids = list(small_store)
    deep = small_store.table(["record_id"], "depth > 100")["record_id"].to_pylist()
    assert 0 < len(deep) < len(ids)
    small_store.save_set("deep", "select record_id from records where depth > 100")
    for words, expected in (
        (["--all"], ids),
        (["--where", "depth > 100"], deep),
        (["--record-set", "deep"], deep),
        (["--where", "depth > 1000000"], []),
    ):
        output = tmp_path / "".join(words).replace(" ", "")
        done = CliRunner().invoke(main, ["export", small_store.url, *words, "--output", str(output)])
        assert done.exit_code == 0, done.output
        assert names_in(output) == [f"{name}.a3m" for name in expected]
        for name in expected:
            alone = CliRunner().invoke(main, ["export", small_store.url, name]).stdout_bytes
            assert (output / f"{name}.a3m").read_bytes() == alone


@pytest.mark.parametrize("form", ["a3m", "openproteinset", "alphafold2-npz"])
def test_an_export_goes_on_where_it_was_interrupted(small_store, tmp_path, form):
    whole, part = tmp_path / "whole", tmp_path / "part"
    words = ["export", small_store.url, "--all", "--format", form, "--resume", "--output"]
    done = CliRunner().invoke(main, [*words, str(whole)])
    assert done.exit_code == 0, done.output
    assert "(0 records were there already)" in done.output
    first = next(iter(small_store))
    for path in [path for path in whole.rglob("*") if path.is_file()]:
        if first in str(path.relative_to(whole)):
            (part / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
            (part / path.relative_to(whole)).write_bytes(path.read_bytes())
    kept = {path: path.stat().st_mtime_ns for path in part.rglob("*") if path.is_file()}
    assert kept
    done = CliRunner().invoke(main, [*words, str(part)])
    assert done.exit_code == 0, done.output
    assert "(1 records were there already)" in done.output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert names_in(part) == names_in(whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing given; say which records"),
        (["a1", "--all"], "--all and RECORD given"),
        (["--where", "depth > 1", "--record-set", "x"], "--where and --record-set given"),
        (["--all"], "--all may be many records; add --output FOLDER"),
        (["--all", "--format", "openfold-db", "--output", "o", "--resume"], "--resume has no effect"),
    ],
)
def test_which_records_is_asked_once(small_store, words, message):
    done = CliRunner().invoke(main, ["export", small_store.url, *words])
    assert done.exit_code == 2
    assert message in done.output
