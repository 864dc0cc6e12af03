"""The commands that look after a store, as a person runs them."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from records import make_record

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.feature_store.cli.main import main


@pytest.fixture
def run():
    def call(*args: object):
        return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)

    return call


def damage(store: FeatureStore, record_id: str) -> Path:
    part_id = store.table(["part_id"], f"record_id = '{record_id}'")["part_id"][0].as_py()
    path = Path(store.url, "parts", part_id, "msa", "c", "0", "0", "0")
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))
    return path


def test_verify_says_what_it_looked_at_and_finds_damage(run, small_store):
    result = run("verify", small_store.url)
    assert result.exit_code == 0
    assert "version 1: 3 records, 1 parts" in result.stdout
    assert "no damage found (full," in result.stdout
    assert result.stderr == ""
    assert run("verify", small_store.url, "--deep", "--version", "1").exit_code == 0
    damage(small_store, "a1")
    assert "no damage found (quick," in run("verify", small_store.url, "--quick").stdout
    result = run("verify", small_store.url)
    assert result.exit_code == 1
    assert "damaged  parts/" in result.stdout
    assert "[a1]" in result.stdout
    assert "problems (full," in result.stdout
    assert run("verify", small_store.url, "--version", "nine").exit_code == 1
    assert run("verify", small_store.url, "--version", "9").exit_code == 2


def test_repair_tells_what_is_left_to_do(run, small_store):
    shutil.copytree(small_store.url, f"{small_store.url}-copy")
    damage(small_store, "a1")
    result = run("repair", small_store.url)
    assert result.exit_code == 1
    assert "take the damaged records out of sight (--quarantine)" in result.stdout
    result = run("repair", small_store.url, "--quarantine", "--dry-run")
    assert "would be quarantined  a1" in result.stdout
    result = run("repair", small_store.url, "--from", f"{small_store.url}-copy")
    assert (result.exit_code, "restored  parts/" in result.stdout) == (0, True)
    damage(small_store, "a1")
    result = run("repair", small_store.url, "--quarantine")
    assert "quarantined  a1" in result.stdout
    assert "compact --part ID" in result.stdout
    part_id = small_store.table(["part_id"])["part_id"][0].as_py()
    assert run("compact", small_store.url, "--part", part_id).exit_code == 0
    assert run("verify", small_store.url).exit_code == 0


def test_repair_rebuilds_a_lost_index(run, small_store):
    shutil.rmtree(Path(small_store.url, "index"))
    result = run("verify", small_store.url)
    assert (result.exit_code, "no readable index" in result.stdout) == (1, True)
    assert "--rebuild-index" in run("repair", small_store.url).stdout
    result = run("repair", small_store.url, "--rebuild-index")
    assert (result.exit_code, "rebuilt  index" in result.stdout) == (0, True)
    assert run("query", small_store.url, "select count(*) n from records").exit_code == 0


def test_compact_gc_and_log_tell_one_story(run, small_store):
    part = write_part(small_store.url, [make_record("d4", 3, 9)], small_store.settings)
    small_store.commit([part.part_id], job_id="2")
    out = run("compact", small_store.url, "--dry-run").stdout
    assert "would have 1" in out
    out = run("compact", small_store.url, "--target-size", "1GiB").stdout
    assert "moved    4 records" in out
    assert "parts    2; now it has 1" in out
    out = run("gc", small_store.url, "--keep-days", "0", "--grace-hours", "0", "--dry-run").stdout
    assert out.count("would remove  parts/") == 2
    out = run("gc", small_store.url, "--keep-days", "0", "--grace-hours", "0").stdout
    assert out.count("removed  parts/") == 2
    assert "versions from 3 on are readable" in out
    assert "compact" in run("log", small_store.url).stdout
    assert run("verify", small_store.url, "--deep").exit_code == 0


def test_copy_twice(run, small_store, tmp_path):
    out = run("copy", small_store.url, tmp_path / "copy").stdout
    assert "parts    1 copied" in out
    assert "records  3 added" in out
    out = run("copy", small_store.url, tmp_path / "copy").stdout
    assert "0 copied (0 B), 1 were there" in out
    assert FeatureStore.open(tmp_path / "copy").fingerprint == small_store.fingerprint


def test_tags_from_the_command_line(run, small_store):
    assert run("tag", small_store.url, "paper", "--message", "as sent").stdout == "paper is version 1\n"
    small_store.annotate(pa.table({"record_id": ["a1"], "year": [1999]}))
    assert "1  paper" in run("tag", small_store.url).stdout
    assert run("verify", small_store.url, "--version", "paper").exit_code == 0
    result = run("tag", small_store.url, "paper")
    assert (result.exit_code, "exists already" in result.stderr) == (1, True)
    assert run("tag", small_store.url, "paper", "--move").exit_code == 0
    assert run("tag", small_store.url, "x", "--version", "77").exit_code == 2
    assert run("tag", small_store.url, "paper", "--delete").exit_code == 0
    assert run("tag", small_store.url).stdout == ""


def test_delete_from_arguments_and_files(run, small_store, tmp_path):
    (tmp_path / "names.txt").write_text("b2\n")
    result = run("delete", small_store.url, "a1", "--from-file", tmp_path / "names.txt", "--message", "wrong")
    assert result.stdout == "deleted 2 records; this is version 2\n"
    assert FeatureStore.open(small_store.url).ids == ["c3"]
    result = run("delete", small_store.url, "a1")
    assert (result.exit_code, result.stderr) == (1, "error: no record 'a1' in this store.\n")
    assert run("delete", small_store.url).exit_code == 2


@pytest.mark.parametrize("name", ["verify", "repair", "compact", "gc", "copy", "tag", "delete"])
def test_every_command_has_help_with_examples_and_refuses_what_is_no_store(run, tmp_path, name):
    text = run(name, "--help").stdout
    assert "Examples:" in text
    assert f"foldfeed {name} my-store" in text
    more = {"copy": [tmp_path / "x"], "delete": ["a"]}.get(name, [])
    result = run(name, tmp_path / "absent", *more)
    assert result.exit_code == 1
    assert "not a foldfeed store" in result.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "code"), [("12", 0), ("1MiB", 0), ("2g", 0), ("x", 2), ("0", 2), ("-5M", 2)]
)
def test_sizes(run, small_store, text, code):
    assert run("compact", small_store.url, "--dry-run", f"--target-size={text}").exit_code == code


def test_log_shows_tags_and_commands_take_them(run, small_store):
    run("tag", small_store.url, "paper")
    run("delete", small_store.url, "a1")
    lines = run("log", small_store.url, "--format", "csv").stdout.splitlines()
    assert lines[0] == "version,time,operation,records,removed,tags,job_id,message"
    assert [line.split(",")[4:6] for line in lines[1:]] == [["1", ""], ["0", "paper"], ["0", ""]]
    counted = "select count(*) as n from records"
    out = [
        run("query", small_store.url, counted, "--format", "csv", *more).stdout
        for more in ([], ["--version", "paper"])
    ]
    assert out == ["n\n2\n", "n\n3\n"]
    result = run("show", small_store.url, "--version", "papers")
    assert (result.exit_code, "no tag 'papers'; the tags of this store are: paper" in result.stderr) == (
        2,
        True,
    )
