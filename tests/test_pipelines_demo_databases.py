"""The demo's databases: the same bytes every time, quick when they are there, real residues only."""

from collections import Counter

import pytest
from pipelines_data import copy_databases, make_databases, needs_hhsuite, needs_hmmer, tree_bytes

from foldfeed.pipelines import DatabaseSpec, DeadLetter
from foldfeed.pipelines.fasta import read_fasta

pytestmark = [pytest.mark.external_tool, needs_hmmer]


def test_same_bytes_twice_and_nothing_done_when_up_to_date(tmp_path):
    # One of another process, time and folder.
    one, two = copy_databases(tmp_path / "one"), make_databases(tmp_path / "two")
    assert tree_bytes(one) == tree_bytes(two)
    times = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    make_databases(one)
    assert {path: path.stat().st_mtime_ns for path in one.rglob("*")} == times
    (one / "uniref90.fasta").write_text("damaged")
    make_databases(one)
    assert tree_bytes(one) == tree_bytes(two)


def test_what_is_in_them(tmp_path):
    folder = copy_databases(tmp_path)
    for name in ("uniref90.fasta", "mgnify.fasta"):
        assert DatabaseSpec.parse(f"u={folder / name}").files()
    entries = list(read_fasta(str(folder / "queries.fasta")))
    assert [entry.record_id for entry in entries if isinstance(entry, DeadLetter)] == ["BAD_DIGITS"]
    assert len(entries) == 14
    searched = {
        line: body.replace("\n", "")
        for line, _, body in (
            entry.partition("\n") for entry in (folder / "uniref90.fasta").read_text().split(">")[1:]
        )
    }
    real = {name: residues for name, residues in searched.items() if not name.startswith("decoy")}
    assert (len(real), len(searched) - len(real)) == (328, 3000)
    compositions = {tuple(sorted(Counter(residues).items())) for residues in real.values()}
    decoys = [residues for name, residues in searched.items() if name.startswith("decoy")]
    assert all(tuple(sorted(Counter(residues).items())) in compositions for residues in decoys)


@needs_hhsuite
def test_the_hhsuite_database_is_one_that_a_build_takes(tmp_path):
    database = DatabaseSpec.parse(f"u={copy_databases(tmp_path) / 'hhsuite' / 'db'}")
    assert database.tool == "hhblits"
    assert database.files()
