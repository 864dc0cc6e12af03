"""What searches cost: measured on real children, kept beside the answers, summed once, foretold."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from pipelines_data import (
    GLOBINS,
    config_of,
    first_on_path,
    globins,
    needs_hmmer,
    stand_in,
    tree_bytes,
    write_fasta,
)

from foldfeed.feature_store.cli.main import main
from foldfeed.pipelines import run_build
from foldfeed.pipelines.building.job import forecast_build
from foldfeed.pipelines.costs import readable_bytes
from foldfeed.pipelines.programs.subprocess_runner import run_program
from foldfeed.pipelines.records.ledger import SCHEMA, costs, read_all
from foldfeed.pipelines.searches.results import ResultStore


def test_bytes_that_a_child_and_its_children_read_are_counted(tmp_path):
    (tmp_path / "data").write_bytes(bytes(3 << 20))
    code = f"open({str(tmp_path / 'data')!r}, 'rb', buffering=0).read()"
    nothing = run_program([sys.executable, "-c", "0"], folder=tmp_path, timeout_s=60).usage.bytes_read
    once = run_program([sys.executable, "-c", code], folder=tmp_path, timeout_s=60).usage.bytes_read
    assert 3 << 20 <= once - nothing < 4 << 20
    child = ["/bin/sh", "-c", f"cat {tmp_path}/data > /dev/null; exit 0"]
    assert run_program(child, folder=tmp_path, timeout_s=60).usage.bytes_read >= 3 << 20


@pytest.fixture
def built(tmp_path):
    """Two sequences under three names: configuration and report."""
    (name_a, a), (name_b, b) = globins(2).items()
    queries = write_fasta(tmp_path / "q.fasta", {name_a: a, "again": a, name_b: b})
    database = tmp_path / "u.fasta"
    shutil.copy(GLOBINS, database)
    config = config_of(tmp_path, queries, [f"uniref90={database}"], parts=3)
    return config, run_build(config)


@pytest.mark.external_tool
@needs_hmmer
def test_every_record_has_a_row_and_every_search_is_counted_once(built):
    config, report = built
    table = pq.read_table(report.ledger_path)
    assert table.schema.equals(SCHEMA)
    assert table["record_id"].to_pylist() == sorted([*globins(2), "again"])
    assert len(set(table["unit_id"].to_pylist())) == 2
    database = Path(config.databases[0].paths[0])
    for row in table.to_pylist():
        assert row["bytes_read"] >= database.stat().st_size
        assert row["cpu_s"] > 0
        assert row["max_rss_bytes"] > 1 << 20
        assert row["num_residues"] == len(globins(2).get(row["record_id"], next(iter(globins(1).values()))))
        assert row["num_hits"] > 30
        assert row["tool_version"][0] == "3"
    (cost,) = report.costs
    assert (cost.num_searches, cost.num_new) == (2, 2)
    by_unit = {row["unit_id"]: row for row in table.to_pylist()}
    assert cost.cpu_s == pytest.approx(sum(row["cpu_s"] for row in by_unit.values()))
    assert cost.new_cpu_s == pytest.approx(cost.cpu_s)
    again = run_build(config)
    assert not again.started_engine
    assert [dataclasses.replace(one, num_new=2, new_cpu_s=one.cpu_s) for one in again.costs] == [cost]


@pytest.mark.external_tool
@needs_hmmer
def test_new_searches_are_told_from_old_ones(built, tmp_path):
    config, _ = built
    more = write_fasta(tmp_path / "more.fasta", globins(3))
    (cost,) = run_build(dataclasses.replace(config, queries=(str(more),))).costs
    assert (cost.num_searches, cost.num_new) == (3, 1)
    assert 0 < cost.new_cpu_s < cost.cpu_s
    everything = read_all(config.results_url)
    # The rows of both jobs, those that they share once.
    assert sorted(everything["record_id"].to_pylist()) == sorted([*globins(3), "again"])


@pytest.mark.external_tool
@needs_hmmer
def test_costs_enter_no_answer_and_no_part(built, tmp_path):
    config, first = built
    other = dataclasses.replace(
        config, store=str(tmp_path / "other"), results=str(tmp_path / "other.results")
    )
    second = run_build(other)
    assert first.part_ids == second.part_ids
    assert tree_bytes(Path(config.results_url, "units"), "*.zst") == tree_bytes(
        Path(other.results_url, "units"), "*.zst"
    )
    assert pq.read_table(first.ledger_path)["run_id"] != pq.read_table(second.ledger_path)["run_id"]


@pytest.mark.external_tool
@needs_hmmer
def test_receipts_of_older_versions_are_read(built):
    config, report = built
    for path in Path(config.results_url, "units").rglob("*.json"):
        receipt = json.loads(path.read_text())
        del receipt["search"], receipt["usage"]["bytes_read"], receipt["usage"]["bytes_from_disk"]
        path.write_text(json.dumps(receipt))
    shutil.rmtree(config.store)
    again = run_build(config)
    assert (again.num_searched, again.part_ids) == (0, report.part_ids)
    assert [cost.num_searches for cost in again.costs] == [2]
    assert [cost.num_hits for cost in again.costs] == [0]


@pytest.mark.external_tool
@needs_hmmer
def test_a_dry_run_foretells_what_the_run_then_does(built, tmp_path):
    config, report = built
    more = write_fasta(tmp_path / "more.fasta", globins(5))
    planned = dataclasses.replace(config, queries=(str(more),))
    before = tree_bytes(Path(config.store)) | tree_bytes(Path(config.results_url))
    forecast = forecast_build(planned)
    assert tree_bytes(Path(config.store)) | tree_bytes(Path(config.results_url)) == before
    (one,) = forecast.databases
    assert (forecast.num_queries, forecast.is_finished) == (5, False)
    assert (one.num_searches, one.num_missing, one.num_receipts) == (5, 3, 2)
    assert one.missing_residues == sum(map(len, list(globins(5).values())[2:]))
    (cost,) = report.costs
    table = pq.read_table(report.ledger_path).to_pylist()
    residues = sum({row["unit_id"]: row["num_residues"] for row in table}.values())
    assert one.cpu_s == pytest.approx(cost.cpu_s / residues * one.missing_residues)
    done = run_build(planned)
    assert done.num_searched == one.num_missing
    assert forecast_build(planned).is_finished


@pytest.mark.external_tool
@needs_hmmer
def test_a_dry_run_without_receipts_makes_nothing_and_guesses_nothing(tmp_path):
    queries = write_fasta(tmp_path / "q.fasta", globins(2))
    config = config_of(tmp_path, queries, [f"uniref90={GLOBINS}"])
    (one,) = forecast_build(config).databases
    assert (one.num_missing, one.cpu_s, one.max_rss_bytes) == (2, None, None)
    assert not Path(config.store).exists()


@pytest.mark.external_tool
@needs_hmmer
def test_dead_letters_have_kinds_and_the_completeness_manifest_counts_them(tmp_path, monkeypatch):
    (name_a, a), (name_b, b) = globins(2).items()
    words = f'for f; do case "$f" in */query) if grep -q {a[:20]} "$f"; then exec sleep 60; fi;; esac; done\n'
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", words + f'exec {shutil.which("jackhmmer")} "$@"\n'))
    queries = write_fasta(tmp_path / "q.fasta", {name_a: a, name_b: b})
    with queries.open("a") as file:
        file.write(f">bad\nAC7\n>{name_b}\n{b}\n")
    report = run_build(config_of(tmp_path, queries, [f"uniref90={GLOBINS}"], timeout_s=8.0))
    found = {(letter.record_id, letter.kind, letter.retry) for letter in report.dead_letters}
    assert found == {
        (name_a, "ToolTimeoutError", "retryable"),
        ("bad", "BadEntry", "poison"),
        (name_b, "DuplicateId", "poison"),
    }
    said = json.loads(Path(report.dead_letters_path).with_name("completeness.json").read_text())
    assert (said["entries"], said["records"], said["complete"]) == (4, 1, False)
    assert said["searches"] == {"planned": 2, "answered": 1, "failed": 1}
    assert sum(entry["count"] for entry in said["dead_letters"]) == 3


@pytest.mark.external_tool
@needs_hmmer
def test_cli_prints_prices_answers_sql_and_plans(tmp_path):
    queries = write_fasta(tmp_path / "q.fasta", globins(2))
    build = [
        "build",
        "--queries",
        str(queries),
        "--database",
        f"uniref90={GLOBINS}",
        "--store",
        str(tmp_path / "s"),
    ]

    def said(*words: str) -> str:
        done = CliRunner().invoke(main, list(words))
        assert done.exit_code == 0, done.output
        return done.output

    assert "2 to do, cost unknown" in said(*build, "--dry-run")
    assert not (tmp_path / "s").exists()
    built = said(*build, "--price-per-cpu-hour", "1000")
    assert "uniref90 (jackhmmer): 2 searches (2 new)" in built
    assert "per MSA" in built
    assert "nothing to do" in said(*build, "--dry-run")
    ledger = ("ledger", str(tmp_path / "s"))
    assert "uniref90 (jackhmmer): 2 searches (0 new)" in said(*ledger)
    answer = said(*ledger, "select count(*) n, min(num_hits) > 0 found from searches", "--format", "json")
    assert json.loads(answer) == {"n": 2, "found": True}
    for words in (["--format", "csv"], ["select 1", "--price-per-cpu-hour", "1"]):
        assert CliRunner().invoke(main, [*ledger, *words]).exit_code == 2


def test_sums_of_nothing_and_words_for_bytes():
    assert costs(SCHEMA.empty_table(), None) == ()
    assert [readable_bytes(count) for count in (0, 999, 1000, 1.5e9, 2.5e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 GB",
        "2,500.0 TB",
    ]


def test_a_result_store_without_jobs_has_an_empty_ledger(tmp_path):
    assert read_all(str(tmp_path)).equals(pa.Table.from_pylist([], schema=SCHEMA))
    assert ResultStore(str(tmp_path)).sample(10) == []
