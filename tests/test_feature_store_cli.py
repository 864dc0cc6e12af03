"""The command line as a person uses it: output, exit codes, one-line errors."""

import io
import json
import subprocess
import sys

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from records import make_record

from foldfeed.feature_store import write_part
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.looking.plots import coverage_image


@pytest.fixture
def run():
    def call(*args: object):
        return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)

    return call


def test_query_in_every_format(run, small_store, tmp_path):
    sql = "select record_id, depth from records order by depth"
    lines = run("query", small_store.url, sql).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["record_id", "depth"],
        ["a1", "1"],
        ["c3", "37"],
        ["b2", "700"],
    ]
    assert (
        run("query", small_store.url, sql, "--format", "csv").stdout
        == "record_id,depth\na1,1\nc3,37\nb2,700\n"
    )
    rows = [
        json.loads(line)
        for line in run("query", small_store.url, sql, "--format", "json").stdout.splitlines()
    ]
    assert rows[2] == {"record_id": "b2", "depth": 700}
    path = tmp_path / "answer.parquet"
    assert run("query", small_store.url, sql, "--format", "parquet", "--output", path).exit_code == 0
    assert pq.read_table(path)["depth"].to_pylist() == [1, 37, 700]
    assert duckdb.sql(f"select max(depth) from '{path}'").fetchall() == [(700,)]


def test_show_store_and_record(run, small_store):
    shown = run("show", small_store.url).stdout
    assert "records      3" in shown
    assert "row order    rank: reads the best hits (rows 0:N) and runs of ranks fast" in shown
    out = run("show", small_store.url, "b2", "--rows", 3).stdout
    assert "depth        700" in out
    assert small_store["b2"].sequence in out
    assert out.count("Hit_") == 2
    assert "N_eff" not in out
    assert "structure" not in out
    whole = small_store["c3"].structure()
    shown = run("show", small_store.url, "c3").stdout
    assert f"structure    {whole.observed.sum()} of 65 residues observed; entry_id 1ABC" in shown
    part = write_part(small_store.url, [make_record("d4", 6, 4)], small_store.settings)
    small_store.commit([part.part_id], job_id="with N_eff")
    assert f"N_eff        {small_store['d4'].neff:.1f} " in run("show", small_store.url, "d4").stdout
    assert "structures   2" in run("show", small_store.url).stdout


def test_crop_prints_and_saves_what_the_api_reads(run, small_store):
    want = small_store["b2"].crop(residues=slice(60, 70), rows=slice(510, 514))
    lines = run("crop", small_store.url, "b2", "--residues", "60:70", "--rows", "510:514").stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("    510  ")
    out = run("crop", small_store.url, "b2", "--residues", "60:70", "--rows", "510:514", "--format", "npz")
    with np.load(io.BytesIO(out.stdout_bytes)) as saved:
        np.testing.assert_array_equal(saved["msa"], want.msa)
        np.testing.assert_array_equal(saved["deletions"], want.deletions)


def test_plot_writes_a_picture(run, small_store, tmp_path):
    for name, magic in (("x.png", b"\x89PNG"), ("x.svg", b"<?xml")):
        result = run("plot", small_store.url, "b2", "--output", tmp_path / name)
        assert result.exit_code == 0
        assert (tmp_path / name).read_bytes().startswith(magic)
    assert run("plot", small_store.url, "b2", "--output", tmp_path / "x.gif").exit_code == 2


def test_the_picture_shows_coverage_and_identity():
    msa = np.array([[0, 1, 2, 3], [0, 1, 21, 21], [5, 5, 5, 21], [0, 1, 2, 3]], dtype=np.uint8)
    picture = coverage_image(msa)
    assert picture.coverage.tolist() == [4, 4, 3, 2]
    np.testing.assert_array_equal(
        picture.identity,
        np.array([[0, 0, 0, np.nan], [0.5, 0.5, np.nan, np.nan], [1, 1, 1, 1], [1, 1, 1, 1]], np.float32),
    )
    deep = coverage_image(np.zeros((5000, 3), np.uint8))
    assert deep.identity.shape == (1200, 3)
    assert (deep.row_numbers[0], deep.row_numbers[-1], deep.depth) == (0, 4999, 5000)


def test_query_reads_rows(run, small_store):
    sql = "select record_id, count(*) as n from rows group by 1 order by 1"
    assert (
        run("query", small_store.url, sql, "--format", "csv").stdout == "record_id,n\na1,1\nb2,700\nc3,37\n"
    )
    out = run("query", small_store.url, sql, "--format", "csv", "--rows-of", "depth < 100").stdout
    assert out == "record_id,n\na1,1\nc3,37\n"


def test_sets_and_splits_are_saved_and_listed(run, small_store, tmp_path):
    table = tmp_path / "c_cluster.tsv"
    table.write_text("a1\ta1\na1\tb2\nc3\tc3\n")
    result = run(
        *("save-split", small_store.url, "cut", "--clusters", table, "--seed", 3),
        *("--part", "train=0.5", "--part", "test=0.5"),
    )
    assert result.exit_code == 0, result.output
    parts = {part: small_store.split("cut").ids(part) for part in ("train", "test")}
    assert result.stdout == "".join(f"{part}: {len(ids)} records\n" for part, ids in parts.items())
    sql = "select record_id from splits where part = 'train'"
    result = run("save-set", small_store.url, "t", sql, "--within", "cut/train")
    made = small_store.set("t")
    assert result.stdout == f"t: {len(made)} records, fingerprint {made.fingerprint}\n"
    rows = [json.loads(line) for line in run("sets", small_store.url, "--format", "json").stdout.splitlines()]
    assert [(row["kind"], row["name"], row["records"], row["parts"]) for row in rows] == [
        ("set", "t", len(made), "cut/train"),
        ("split", "cut", 3, "train=0.5, test=0.5"),
    ]
    assert rows[0]["made_from"] == sql
    assert run("save-set", small_store.url, "bad", "from records", "--within", "cut/train").exit_code == 1


def test_log_lists_versions(run, small_store):
    rows = [json.loads(line) for line in run("log", small_store.url, "--format", "json").stdout.splitlines()]
    assert [(row["version"], row["records"], row["message"]) for row in rows] == [(1, 3, "first"), (0, 0, "")]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["show", "STORE", "nobody"], 1, "error: no record 'nobody'"),
        (["show", "/absent"], 1, "error: '/absent' is not a foldfeed store"),
        (["query", "STORE", "selec"], 1, "error: Parser Error"),
        (["query", "STORE"], 2, "Missing argument 'SQL'"),
        (["crop", "STORE", "b2", "--residues", "200:500"], 2, "200:500 is an empty window of 0:130"),
        (["crop", "STORE", "b2", "--rows", "x"], 2, "no window"),
        (["show", "STORE", "--version", "9"], 2, "version 9 does not exist"),
        (["plot", "STORE", "b2", "--output", "/absent/x.png"], 1, "/absent/x.png"),
        (["nonsense"], 2, "No such command"),
        (["save-set", "STORE", "x/y", "from records"], 1, "cannot name a record set"),
        (["save-set", "STORE", "x", "from records", "--within", "cut"], 2, "is not SPLIT/PART"),
        (["save-set", "STORE", "x", "from records", "--within", "cut/train"], 1, "no split 'cut'"),
        (["save-split", "STORE", "x", "--part", "train=1"], 2, "Give the clusters once"),
        (["save-split", "STORE", "x", "--part", "train=1", "--column", "extra.no"], 1, "have no cluster"),
        (["save-split", "STORE", "x", "--part", "train", "--column", "c"], 2, "is not NAME=SHARE"),
        (
            ["save-split", "STORE", "x", "--part", "a=1", "--column", "c", "--member", "sequence"],
            2,
            "--member",
        ),
        (["save-split", "STORE", "x", "--part", "a=.5", "--part", "a=.5", "--column", "c"], 2, "given twice"),
        (["query", "STORE", "from records", "--rows-of", "depth > 1"], 1, "does not read the table 'rows'"),
        (["query", "STORE", "from records", "--output", "/absent/x"], 1, "/absent/x"),
    ],
)
def test_errors_are_short_and_have_the_right_exit_code(run, small_store, args, code, message):
    result = run(*[small_store.url if arg == "STORE" else arg for arg in args])
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    if code == 1:
        assert len(result.stderr.splitlines()) <= 2


def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "foldfeed.feature_store.cli.main", "--debug", "show", "/absent"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "NotAStoreError" in result.stderr


def test_help_has_examples_for_every_command(run):
    for name in ("query", "show", "crop", "plot", "log", "diff", "report", "sets", "save-set", "save-split"):
        assert f"foldfeed {name} my-store" in run(name, "--help").stdout
    assert "foldfeed, version" in run("--version").stdout
