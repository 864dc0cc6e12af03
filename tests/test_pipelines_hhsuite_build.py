"""HH-suite databases made of alignments: hhblits finds their members, equal alignments give equal bytes."""

import gzip
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from pipelines_data import globins, needs_hhsuite, tree_bytes
from records import make_record

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.pipelines.databases import hhsuite_build
from foldfeed.pipelines.databases.files import make_manifest
from foldfeed.pipelines.databases.hhsuite_build import NamedAlignment, alignments_of_folder, build_hhsuite
from foldfeed.pipelines.databases.spec import DatabaseSpec
from foldfeed.pipelines.errors import DatabaseError, SearchError, ToolNotFoundError, ToolOutputError
from foldfeed.pipelines.tools.hhblits import Hhblits
from foldfeed.pipelines.tools.search_tool import find_binary

pytestmark = [pytest.mark.external_tool, needs_hhsuite]


def alignments() -> list[NamedAlignment]:
    """Returns a family of two rows with an insertion, a single row, and one with a long name."""
    known = globins(45)
    beta, other = known["HBB_MANSP"], list(known.values())[-1]
    family = f">family\n{beta}\n>row|2 text\n{beta[:40]}gg{beta[40:70]}---{beta[73:]}\n"
    return [
        NamedAlignment(name="family", text=family.encode()),
        NamedAlignment(name="single", text=f">single\n{other}\n".encode()),
        NamedAlignment(name="a" * 90, text=f">{'a' * 90}\n{'MKVLAAGIVWTRDEFGHH' * 3}\n".encode()),
    ]


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("db") / "mine"
    assert build_hhsuite(alignments(), prefix) == 3
    return prefix


def names_found(prefix: Path, sequence: str) -> list[str]:
    """Returns the entries that hhblits lists, best first; its alignment leaves out what is the query."""
    folder = prefix.parent.with_name(f"{prefix.parent.name}-search")
    folder.mkdir(exist_ok=True)
    (folder / "q.fasta").write_text(f">query\n{sequence}\n")
    words = ["-i", "q.fasta", "-d", str(prefix), "-o", "out.hhr", "-n", "1", "-cpu", "1", "-v", "0"]
    subprocess.run([find_binary("hhblits"), *words], cwd=folder, check=True, capture_output=True)
    table = (folder / "out.hhr").read_text().split(" No Hit", 1)[1].split("\n\n", 1)[0]
    return [line.split()[1] for line in table.splitlines()[1:]]


def test_hhblits_finds_the_members(database):
    known = globins(45)
    assert names_found(database, known["HBB_MANSP"])[0] == "family"
    assert names_found(database, list(known.values())[-1])[0] == "single"
    # The table of hits cuts the name.
    found = names_found(database, "MKVLAAGIVWTRDEFGHH" * 3)[0]
    assert found == "a" * len(found)
    assert len(found) > 20
    tool = Hhblits.find(databases=(str(database),), cpus=1, timeout_s=60.0)
    answer = tool.search(list(known.values())[-1]).alignment
    assert {"family", "row|2"} & {name.split()[0] for name in parse_a3m(answer).names}
    manifest = make_manifest(DatabaseSpec.parse(f"mine={database}"))
    assert (manifest.tool, manifest.num_sequences) == ("hhblits", 3)
    assert manifest.num_residues == sum(len(one.text.split(b"\n")[1]) for one in alignments())


def test_bytes_depend_on_the_alignments_alone(tmp_path, database, monkeypatch):
    monkeypatch.setattr(hhsuite_build, "PIECE", 1)
    build_hhsuite(iter(alignments()), tmp_path / "mine", cpus=2)
    assert tree_bytes(tmp_path) == tree_bytes(database.parent)
    assert len(tree_bytes(tmp_path)) == 6


def test_a_folder_of_files_and_a_store_give_databases(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    family, single, _ = alignments()
    (folder / "family.a3m.gz").write_bytes(
        gzip.compress(b"#1\t1\n" + family.text.replace(b">family", b">101"))
    )
    query = single.text.split(b"\n")[1].decode()
    (folder / "single.sto").write_text(
        f"# STOCKHOLM 1.0\n\nq {query[:20]}-{query[20:]}\nr {query[:20]}W{query[20:]}\n//\n"
    )
    (folder / "notes.txt").write_text("nothing")
    found = list(alignments_of_folder(folder))
    assert [one.name for one in found] == ["family", "single"]
    assert found[0].text == family.text
    assert found[1].text == f">single\n{query}\n>r\n{query[:20]}x{query[20:]}\n".encode()
    store = FeatureStore.create(str(tmp_path / "store"))
    records = [make_record(name, 5, 60) for name in ("one", "two")]
    part = write_part(store.url, iter(sorted(records, key=lambda record: record.record_id)), store.settings)
    store.commit([part.part_id], job_id="job")
    runner = CliRunner()
    words = ["database", "build-hhsuite", f"{tmp_path}/s", "--store", str(tmp_path / "store")]
    done = runner.invoke(
        main, [*words, "--where", "record_id = 'two'", "--name", "mine", "--registry", f"{tmp_path}/r.json"]
    )
    assert done.exit_code == 0, done.output
    assert "1 alignments: " in done.output
    assert f"mine: 1 alignments, {len(records[1].sequence)} columns" in done.output
    again = runner.invoke(main, words)
    assert again.exit_code == 1
    assert "'s_a3m.ffdata' is there; choose another prefix" in again.output
    for words, said in (
        (["x"], "either --store or --folder"),
        (["x", "--folder", "/nowhere"], "is no folder"),
        (["x", "--folder", str(folder), "--where", "1"], "--where has no effect"),
    ):
        assert said in runner.invoke(main, ["database", "build-hhsuite", *words]).output


def test_what_cannot_be_a_database_is_refused(tmp_path, monkeypatch):
    with pytest.raises(DatabaseError, match="no alignment to make"):
        build_hhsuite([], tmp_path / "x")
    with pytest.raises(DatabaseError, match="20000 columns; HH-suite cuts"):
        build_hhsuite([NamedAlignment(name="t", text=b">t\n" + b"A" * 20_000 + b"\n")], tmp_path / "x")
    with pytest.raises(DatabaseError, match="no file that ends in"):
        list(alignments_of_folder(tmp_path))
    (tmp_path / "a.a3m").write_text(">a\nMKV\n>b\nMK\n")
    with pytest.raises(DatabaseError, match=r"a\.a3m"):
        list(alignments_of_folder(tmp_path))
    (tmp_path / "a.sto").write_text("")
    with pytest.raises(DatabaseError, match="would be one entry"):
        list(alignments_of_folder(tmp_path))
    for name in ("a.a3m", "a.sto"):
        (tmp_path / name).unlink()

    def programs(**other: str):
        real = hhsuite_build.HhPrograms.find()
        fields = {"hhmake": real.hhmake, "ffindex_apply": real.ffindex_apply}
        fields |= {"cstranslate": real.cstranslate, "library": real.library}
        return lambda: hhsuite_build.HhPrograms(**(fields | other))

    for other, error, said in (
        ({"hhmake": "/bin/true"}, ToolOutputError, "made nothing of alignment 'family'"),
        ({"cstranslate": "/bin/false"}, SearchError, "exit code 1"),
    ):
        monkeypatch.setattr(hhsuite_build.HhPrograms, "find", programs(**other))
        with pytest.raises(error, match=said):
            build_hhsuite(alignments(), tmp_path / "x")
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolNotFoundError, match="apt-get install hhsuite"):
        build_hhsuite(alignments(), tmp_path / "x")
