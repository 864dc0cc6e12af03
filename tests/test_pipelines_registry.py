"""Databases known by name: counts that are the tool's own, noticed changes, a registry that loses nothing."""

import gzip
import json
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner
from pipelines_data import GLOBINS, copy_databases, globins, needs_hhsuite, needs_hmmer, write_fasta

from foldfeed.feature_store import FeatureStore
from foldfeed.feature_store.cli.main import main
from foldfeed.pipelines import DatabaseSpec
from foldfeed.pipelines.databases import files as database_files
from foldfeed.pipelines.databases.files import count_fasta, make_manifest
from foldfeed.pipelines.databases.registry import Registry, database_of, default_path
from foldfeed.pipelines.databases.spec import database_digest
from foldfeed.pipelines.errors import ConfigError, DatabaseError, RegistryError
from foldfeed.pipelines.manifest import DatabaseManifest


def counted_by_hmmer(path: Path) -> tuple[int, int]:
    """What jackhmmer says that it searched."""
    query = path.with_name("query-of-count.fasta")
    query.write_text(">q\nACDEFGHIKLMNPQRSTVWY\n")
    words = ["jackhmmer", "-N", "1", "--noali", str(query), str(path)]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("Target sequences:")]
    numbers = line.partition(":")[2].replace("(", " ").split()
    return int(numbers[0]), int(numbers[1])


@pytest.mark.external_tool
@needs_hmmer
@pytest.mark.parametrize("seed", range(6))
def test_counts_are_what_jackhmmer_counts(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    # Chunks that end anywhere, as those of a file of gigabytes do.
    monkeypatch.setattr("foldfeed.pipelines.fasta.CHUNK_BYTES", rng.choice([1, 2, 7, 64, 1 << 20]))
    end = rng.choice(["\n", "\r\n"])
    text = rng.choice(["", end, " " + end])
    for number in range(rng.randint(1, 12)):
        text += f">s{number} it > holds a mark{end}"
        for _ in range(rng.randint(1, 4)):
            text += (
                "".join(rng.choices("ACDEFGHIKLMNPQRSTVWYXBZJOUacdx*.~_ ", k=rng.randint(0, 60))) + "A" + end
            )
    path = tmp_path / "u.fasta"
    path.write_text(text if rng.random() < 0.5 else text.rstrip())
    assert count_fasta("u", str(path)) == counted_by_hmmer(path)


@pytest.mark.external_tool
@needs_hmmer
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (">x\nAC1DE\n", "entry 'x' holds '1', which is no residue"),
        (">x\nACD\n>y z\nA-C\n", "entry 'y' holds '-', which is no residue"),
        (">x\nACD\n>\nACD\n", "entry 2 has no name"),
    ],
)
def test_what_jackhmmer_would_refuse_in_a_search_is_refused_when_added(tmp_path, text, words):
    path = tmp_path / "u.fasta"
    path.write_text(text)
    with pytest.raises(DatabaseError, match=words):
        count_fasta("u", str(path))
    with pytest.raises(subprocess.CalledProcessError):
        counted_by_hmmer(path)


def test_compressed_files_count_as_their_text_and_cut_ones_are_refused(tmp_path):
    text = "".join(f">{name}\n{residues}\n" for name, residues in globins(5).items()).encode()
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "u.fasta.gz").write_bytes(gzip.compress(text))
    (tmp_path / "u.fasta.zst").write_bytes(zstandard.compress(text))
    expected = (5, sum(map(len, globins(5).values())))
    for name in ("plain", "u.fasta.gz", "u.fasta.zst"):
        assert count_fasta("u", str(tmp_path / name)) == expected
    for name in ("u.fasta.gz", "u.fasta.zst"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-9])
        with pytest.raises(DatabaseError, match="cannot be unpacked"):
            database_files.unpack("u", str(tmp_path / name), None)
        (tmp_path / name).write_bytes(b"not compressed")
        with pytest.raises(DatabaseError, match="cannot be unpacked: its name ends in"):
            database_files.unpack("u", str(tmp_path / name), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "u.fasta.gz", "u.fasta.zst"]


@pytest.mark.external_tool
@needs_hhsuite
def test_an_hhsuite_database_counts_alignments_and_columns(tmp_path):
    prefix = copy_databases(tmp_path) / "hhsuite" / "db"
    manifest = make_manifest(DatabaseSpec.parse(f"bfd={prefix}"))
    entries = Path(f"{prefix}_a3m.ffdata").read_bytes().rstrip(b"\0").split(b"\0")
    assert manifest.num_sequences == len(entries)
    # A column of the model is an upper-case letter or a gap of the alignment's first sequence.
    lengths = 0
    for entry in entries:
        rows = [row for row in entry.split(b">")[1:] if not row.startswith((b"ss_", b"sa_", b"aa_"))]
        body = rows[0].partition(b"\n")[2].translate(None, b"\n")
        lengths += sum(65 <= letter <= 90 or letter == ord("-") for letter in body)
    assert manifest.num_residues == lengths
    assert manifest.digest == database_digest(DatabaseSpec.parse(f"bfd={prefix}"))


def manifest_of(folder: Path, name: str, entries: dict[str, str]) -> DatabaseManifest:
    path = write_fasta(folder / f"{name}.fasta", entries)
    return make_manifest(DatabaseSpec.parse(f"{name}={path}"), version="2026_03", licence="CC0")


def test_what_is_put_comes_back_and_other_data_needs_a_word(tmp_path):
    registry = Registry(tmp_path / "deep" / "databases.json")
    assert registry.load() == {}
    one = manifest_of(tmp_path, "u", {"x": "ACD"})
    registry.put(one, replace=False)
    registry.put(one, replace=False)
    assert registry.load() == {"u": one}
    other = manifest_of(tmp_path, "u", {"x": "ACDE"})
    with pytest.raises(RegistryError, match="'u' is there with other data"):
        registry.put(other, replace=False)
    registry.put(other, replace=True)
    assert registry.get("u") == other
    with pytest.raises(RegistryError, match=r"no database 'v' \(it has u\)"):
        registry.get("v")


def test_many_who_add_at_once_lose_nothing(tmp_path):
    manifests = [manifest_of(tmp_path, f"u{number}", {"x": "ACD"}) for number in range(12)]
    path = tmp_path / "databases.json"
    threads = [
        threading.Thread(target=lambda one=one: Registry(path).put(one, replace=False)) for one in manifests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Registry(path).load()) == {f"u{number}" for number in range(12)}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "databases": [{}]}'])
def test_a_file_that_is_no_registry_is_a_typed_error(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RegistryError, match=r"format|no registry"):
        Registry(tmp_path / "r.json").load()


def test_where_the_registry_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("FOLDFEED_DATABASES", str(tmp_path / "mine.json"))
    assert default_path() == tmp_path / "mine.json"
    monkeypatch.delenv("FOLDFEED_DATABASES")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "foldfeed" / "databases.json"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local" / "share" / "foldfeed" / "databases.json"


def test_names_and_paths_mean_the_same_database(tmp_path):
    registry = Registry(tmp_path / "r.json")
    manifest = manifest_of(tmp_path, "u", globins(3))
    registry.put(manifest, replace=False)
    by_name, by_path = database_of("u", registry), database_of(f"u={manifest.paths[0]}", registry)
    assert database_digest(by_name) == database_digest(by_path) == manifest.digest
    with pytest.raises(ConfigError, match=r"'w' must be NAME=PATH.*or a name in the registry .*it has u"):
        database_of("w", registry)


def test_a_known_database_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    registry = Registry(tmp_path / "r.json")
    registry.put(manifest_of(tmp_path, "u", globins(3)), replace=False)
    spec = database_of("u", registry)
    reads = []
    real = database_files.file_sha256
    monkeypatch.setattr(
        "foldfeed.pipelines.databases.spec.file_sha256", lambda file: reads.append(file) or real(file)
    )
    database_digest(spec)
    assert reads == []
    os.utime(spec.paths[0], ns=(1, 1))
    database_digest(spec)
    assert len(reads) == 1
    with open(spec.paths[0], "a") as file:
        file.write(">more\nACD\n")
    with pytest.raises(DatabaseError, match="its files are not those that were added"):
        database_digest(spec)


# The command line.


def invoke(*words: object):
    return CliRunner().invoke(main, [*map(str, words)])


@pytest.mark.external_tool
@needs_hmmer
def test_cli_a_packed_database_is_added_listed_searched_and_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDFEED_DATABASES", str(tmp_path / "r.json"))
    packed = tmp_path / "uniref90.fasta.gz"
    packed.write_bytes(gzip.compress(GLOBINS.read_bytes()))
    words = ("--version", "2026_03", "--date", "2026-03-01", "--licence", "CC-BY-4.0")
    added = invoke("database", "add", "uniref90", packed, "--unpack-to", tmp_path / "scratch", *words)
    assert added.exit_code == 0, added.output
    plain = tmp_path / "scratch" / "uniref90.fasta"
    assert plain.read_bytes() == GLOBINS.read_bytes()
    assert "uniref90: 45 sequences, 6,519 residues" in added.output
    listed = invoke("database", "list", "--format", "json")
    row = json.loads(listed.output)
    assert (row["name"], row["num_sequences"], row["version"]) == ("uniref90", 45, "2026_03")
    assert "CC-BY-4.0" in invoke("database", "list").output
    queries = write_fasta(tmp_path / "q.fasta", globins(1))
    words = ("build", "--queries", queries, "--store", tmp_path / "s", "--database")
    built = invoke(*words, "uniref90")
    assert built.exit_code == 0, built.output
    assert FeatureStore.open(tmp_path / "s").ids == list(globins(1))
    # By path it is the same database, so there is nothing left to do.
    assert "nothing to do" in invoke(*words, f"uniref90={plain}").output
    assert "unchanged since" in invoke("database", "verify").output
    with plain.open("a") as file:
        file.write(">more\nACD\n")
    found = invoke("database", "verify", "--quick")
    assert found.exit_code == 1
    assert f"uniref90: {plain} has" in found.output
    refused = invoke(*words, "uniref90")
    assert refused.exit_code == 1
    assert "its files are not those that were added" in refused.output
    assert invoke("database", "add", "uniref90", plain).exit_code == 1
    assert invoke("database", "add", "uniref90", plain, "--replace").exit_code == 0
    assert invoke("database", "verify", "uniref90").exit_code == 0


def test_cli_verify_reads_what_only_looks_unchanged(tmp_path):
    path = tmp_path / "u.fasta"
    shutil.copy(GLOBINS, path)
    where = ("--registry", tmp_path / "r.json")
    assert invoke("database", "add", "u", path, *where).exit_code == 0
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"W")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert invoke("database", "verify", "--quick", *where).exit_code == 0
    done = invoke("database", "verify", *where)
    assert done.exit_code == 1
    assert "has another content" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["u", "x.fasta", "--date", "2026-13-01"], "is no date"),
        (["u", "x.fasta", "--unpack-to", "d"], "has no effect"),
        (["u", "x.fasta", "x.fasta"], "is given twice"),
        (["u", "x.fasta", "y,z.fasta"], "a path with a comma cannot be one of several"),
        (["u", "x.fasta", "y.fasta.gz"], "of several files each must be plain FASTA"),
        (["a b", "x.fasta"], "database name 'a b'"),
    ],
)
def test_cli_bad_usage_exits_with_2(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = invoke("database", "add", *words, "--registry", tmp_path / "r.json")
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not (tmp_path / "r.json").exists()


def test_several_files_are_one_database(tmp_path):
    for name, text in (("u-00000-of-00002", ">a\nACD\n"), ("u-00001-of-00002", ">b\nAC\n>c\nA\n")):
        (tmp_path / name).write_text(text)
    where = ("--registry", tmp_path / "r.json")
    assert invoke("database", "add", "u", f"{tmp_path}/u@2", *where).exit_code == 0
    manifest = Registry(tmp_path / "r.json").get("u")
    assert (manifest.num_sequences, manifest.num_residues, len(manifest.files)) == (3, 6, 2)
    spec = database_of("u", Registry(tmp_path / "r.json"))
    assert spec.paths == DatabaseSpec.parse(f"u={tmp_path}/u@2").paths
    assert database_digest(spec) == manifest.digest
    (tmp_path / "u-00001-of-00002").write_text(">b\nAC\n")
    done = invoke("database", "verify", "u", *where)
    assert done.exit_code == 1
    assert "u-00001-of-00002" in done.output
