"""A build with nothing to do ends without an engine, and never when there is something to do."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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

from foldfeed.feature_store import FeatureStore, StoreSettingsError
from foldfeed.feature_store.care.repair import repair
from foldfeed.pipelines import run_build
from foldfeed.pipelines.errors import EngineError

pytestmark = [
    pytest.mark.external_tool,
    needs_hmmer,
]


@pytest.fixture
def built(tmp_path):
    """A build of three records and one dead letter: configuration and report."""
    queries = write_fasta(tmp_path / "q.fasta", globins(3))
    with queries.open("a") as file:
        file.write(">bad\nAC7\n")
    database = tmp_path / "u.fasta"
    shutil.copy(GLOBINS, database)
    config = config_of(tmp_path, queries, [f"uniref90={database}"])
    return config, run_build(config)


def marks(config) -> list[Path]:
    return sorted(Path(config.results_url).rglob("finished-*.json"))


def facts(report):
    """What two reports must agree in."""
    return dataclasses.replace(report, seconds=0.0, started_engine=True)


def test_the_second_run_loads_no_beam_starts_no_search_and_changes_no_byte(built):
    config, first = built
    assert first.started_engine
    before = tree_bytes(Path(config.store)) | tree_bytes(Path(config.results_url))
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("apache_beam", "pandas", "duckdb", "zarr"):
            raise AssertionError(f"{name} was loaded")
sys.meta_path.insert(0, Block())
from foldfeed.feature_store.cli.main import main
main()
"""
    words = ["build", "--queries", config.queries[0], "--store", config.store]
    words += ["--database", f"uniref90={config.databases[0].paths[0]}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "nothing to do: every search is done and the store has the commit" in done.stdout
    assert "3 records built" in done.stdout
    assert "searches: 0 done, 3 reused, 0 failed" in done.stdout
    assert "bad (" in done.stdout
    assert tree_bytes(Path(config.store)) | tree_bytes(Path(config.results_url)) == before


def test_the_short_way_reports_what_the_long_way_reports(built):
    config, _ = built
    short = run_build(config)
    assert not short.started_engine
    for mark in marks(config):
        mark.unlink()
    long = run_build(config)
    assert long.started_engine
    assert facts(short) == facts(long)
    assert not run_build(config).started_engine


def test_a_missing_answer_is_searched(built):
    config, _ = built
    unit = next(Path(config.results_url, "units").rglob("*.json"))
    unit.unlink()
    again = run_build(config)
    assert (again.started_engine, again.num_searched, again.num_reused) == (True, 1, 2)


@pytest.mark.parametrize("damage", ["no json", "{}", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_mark_is_no_mark(built, damage):
    config, _ = built
    (mark,) = marks(config)
    mark.write_text(damage)
    assert run_build(config).started_engine
    assert json.loads(mark.read_text())["format"] == 1


def test_a_store_that_is_gone_or_went_back_is_built_again(built):
    config, first = built
    shutil.rmtree(config.store)
    assert run_build(config).num_added == 3
    # The first version has no record; a store that was taken back there does not know the commit.
    log = sorted(Path(config.store, "index", "_delta_log").glob("*.json"))
    log[-1].write_text("cut")
    repair(config.store, roll_back_index=True)
    assert len(FeatureStore.open(config.store)) == 0
    again = run_build(config)
    assert (again.started_engine, again.num_added) == (True, 3)
    assert again.part_ids == first.part_ids


def test_another_store_with_the_same_results_gets_its_records(built, tmp_path):
    config, first = built
    other = dataclasses.replace(config, store=str(tmp_path / "other"), results=config.results_url)
    report = run_build(other)
    assert (report.started_engine, report.num_searched, report.num_added) == (True, 0, 3)
    assert report.part_ids == first.part_ids
    assert len(marks(config)) == 2
    assert not run_build(other).started_engine
    assert not run_build(config).started_engine


def test_a_failed_search_leaves_no_mark(tmp_path, monkeypatch):
    (name_a, a), (name_b, b) = globins(2).items()
    real = shutil.which("jackhmmer")
    slow = f'for f; do case "$f" in */query) if grep -q {a[:20]} "$f" && [ ! -e {tmp_path}/well ]; then '
    first_on_path(
        monkeypatch, stand_in(tmp_path / "bin", f'{slow}exit 3; fi;; esac; done\nexec {real} "$@"\n')
    )
    queries = write_fasta(tmp_path / "q.fasta", {name_a: a, name_b: b})
    config = config_of(tmp_path, queries, [f"uniref90={GLOBINS}"])
    report = run_build(config)
    assert (report.num_failed, report.num_records) == (1, 1)
    assert marks(config) == []
    (tmp_path / "well").touch()
    again = run_build(config)
    assert (again.num_searched, again.num_records, again.num_failed) == (1, 2, 0)
    assert not run_build(config).started_engine


def test_a_database_that_was_replaced_with_its_old_size_and_time_is_noticed(built):
    config, _ = built
    path = Path(config.databases[0].paths[0])
    stat = path.stat()
    text = path.read_text()
    other = path.with_name("other.fasta")
    other.write_text(text[:-2] + ("A" if text[-2] != "A" else "G") + "\n")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert run_build(dataclasses.replace(config, on_existing="skip")).num_searched == 3


def test_a_database_changed_in_place_is_found_when_asked_to_look(built):
    config, _ = built
    path = Path(config.databases[0].paths[0])
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] = ord("A") if data[-2] != ord("A") else ord("G")
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # Same path, size, time and inode: only reading can tell.
    assert not run_build(config).started_engine
    looking = dataclasses.replace(config, check_databases=True, on_existing="replace")
    assert run_build(looking).num_searched == 3
    assert not run_build(dataclasses.replace(looking, check_databases=False)).started_engine


def test_options_are_refused_with_nothing_to_do(built):
    config, _ = built
    with pytest.raises(EngineError, match="still reports success"):
        run_build(dataclasses.replace(config, runner="DaskRunner"))
    with pytest.raises(StoreSettingsError, match="exists with row order 'rank'"):
        run_build(dataclasses.replace(config, row_order="permuted"))
    assert not run_build(dataclasses.replace(config, row_order="rank")).started_engine
