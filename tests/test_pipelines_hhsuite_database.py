"""HH-suite databases made from alignments: HHblits finds their entries, equal ones are equal bytes."""

import gzip
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from pipelines_data import (
    EXAMPLES,
    config_of,
    first_on_path,
    needs_hhsuite,
    stand_in,
    tree_bytes,
    write_fasta,
)

from foldfeed.feature_store import FeatureStore
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.parsers.stockholm import stockholm_as_a3m
from foldfeed.pipelines import run_build
from foldfeed.pipelines.errors import DatabaseError
from foldfeed.pipelines.hhsuite_database import make_hhsuite_database
from foldfeed.pipelines.search_tool import find_binary

pytestmark = [pytest.mark.external_tool, needs_hhsuite]
FAMILIES = ("globins4", "fn3")


@pytest.fixture(scope="module")
def alignments(tmp_path_factory) -> Path:
    """Two families, one of them as compressed A3M."""
    folder = tmp_path_factory.mktemp("alignments")
    for name in FAMILIES:
        path = EXAMPLES / "tutorial" / f"{name}.sto"
        text = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
        if name == "fn3":
            rows = "".join(f">{row}\n{letters.decode()}\n" for row, letters in stockholm_as_a3m(text))
            (folder / "deep").mkdir()
            (folder / "deep" / "fn3.a3m.gz").write_bytes(gzip.compress(rows.encode()))
        else:
            (folder / f"{name}.sto").write_bytes(text)
    return folder


def test_a_database_is_found_by_hhblits_and_made_again_byte_for_byte(tmp_path, monkeypatch, alignments):
    monkeypatch.setenv("FOLDFEED_DATABASES", str(tmp_path / "known.json"))
    words = ["database", "make", "mine", str(alignments), "--to", str(tmp_path / "db"), "--version", "1"]
    said = CliRunner().invoke(main, words, catch_exceptions=False)
    assert said.output.startswith("mine: 2 alignments, ")
    again = make_hhsuite_database("mine", alignments, tmp_path / "again")
    assert again.num_entries == 2
    first = tree_bytes(tmp_path / "db")
    assert len(first) == 6
    assert tree_bytes(tmp_path / "again") == first
    index = [line.split("\t") for line in (tmp_path / "db" / "mine_a3m.ffindex").read_text().splitlines()]
    data = (tmp_path / "db" / "mine_a3m.ffdata").read_bytes()
    assert [line[0] for line in index] == sorted(FAMILIES)
    for name, start, size in index:
        entry = data[int(start) : int(start) + int(size)]
        assert entry.startswith(f">{name} ".encode())
        assert entry.endswith(b"\n\0")
        assert entry.count(b">") > 3
    rows = stockholm_as_a3m((alignments / "globins4.sto").read_bytes())
    queries = write_fasta(tmp_path / "q.fasta", {"q": rows[0][1].decode()})
    config = config_of(tmp_path, queries, [f"mine={tmp_path / 'db' / 'mine'}"])
    report = run_build(config)
    # The family's other rows, as its own alignment has them.
    found = FeatureStore.open(report.store)["q"]
    assert found.depth == len(rows)


def test_the_profiles_are_those_of_hhmake_run_by_hand(tmp_path, alignments):
    make_hhsuite_database("mine", alignments, tmp_path)
    entries = {}
    for part in ("a3m", "hhm"):
        data = (tmp_path / f"mine_{part}.ffdata").read_bytes()
        for line in (tmp_path / f"mine_{part}.ffindex").read_text().splitlines():
            name, start, size = line.split("\t")
            entries[part, name] = data[int(start) : int(start) + int(size) - 1]
    for name in FAMILIES:
        words = [find_binary("hhmake"), "-i", "stdin", "-o", "stdout", "-v", "0"]
        done = subprocess.run(words, input=entries["a3m", name], check=True, capture_output=True)
        ours, theirs = (
            [line for line in text.splitlines() if not line.startswith((b"DATE", b"COM", b"FILE"))]
            for text in (entries["hhm", name], done.stdout)
        )
        assert ours == theirs


def test_what_cannot_be_an_entry_is_refused_and_nothing_is_left(tmp_path, alignments):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(DatabaseError, match=r"no file there ends in \.a3m, \.sto"):
        make_hhsuite_database("mine", folder, tmp_path / "db")
    (folder / "x.a3m").write_text(">q\nACD\n>h\nAC\n")
    (folder / "y.a3m").write_text("no alignment\n")
    with pytest.raises(DatabaseError, match=r"y\.a3m.*it is no alignment"):
        make_hhsuite_database("mine", folder, tmp_path / "db")
    (folder / "y.a3m").unlink()
    (folder / "x.sto").write_text("# STOCKHOLM 1.0\nq ACD\n//\n")
    with pytest.raises(DatabaseError, match="gives an entry of that name, too"):
        make_hhsuite_database("mine", folder, tmp_path / "db")
    assert not list((tmp_path / "db").iterdir())


def test_an_entry_that_hhmake_leaves_out_is_an_error(tmp_path, monkeypatch, alignments):
    real = find_binary("hhmake")
    script = f'cat > {tmp_path}/e; grep -q "^>fn3" {tmp_path}/e && exit 1; exec {real} "$@" < {tmp_path}/e\n'
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", script, "hhmake"))
    with pytest.raises(DatabaseError, match="made no hhm of this alignment"):
        make_hhsuite_database("mine", alignments, tmp_path / "db")
    assert not list((tmp_path / "db").iterdir())


def test_a_database_that_is_there_stays(tmp_path, alignments):
    (tmp_path / "mine_hhm.ffdata").write_bytes(b"x")
    with pytest.raises(DatabaseError, match="it exists"):
        make_hhsuite_database("mine", alignments, tmp_path)
    assert tree_bytes(tmp_path) == {"mine_hhm.ffdata": b"x"}
