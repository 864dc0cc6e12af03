"""Databases: what users write, what is checked before a run, and when two are the same."""

import os

import pytest

from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines import DatabaseSpec
from foldfeed.pipelines.databases import spec as databases
from foldfeed.pipelines.databases.spec import database_digest, file_sha256, in_merge_order, shard_digests
from foldfeed.pipelines.errors import ConfigError, DatabaseError


def make_hh(folder, name="db"):
    for part in ("a3m", "hhm", "cs219"):
        for kind in ("ffdata", "ffindex"):
            (folder / f"{name}_{part}.{kind}").write_text(f"{part} {kind}")
    return str(folder / name)


def test_tool_is_named_or_found_from_the_files(tmp_path):
    prefix = make_hh(tmp_path)
    assert DatabaseSpec.parse(f"u={tmp_path}/x.fasta").tool == "jackhmmer"
    assert DatabaseSpec.parse(f"bfd={prefix}").tool == "hhblits"
    assert DatabaseSpec.parse(f"bfd={prefix}:jackhmmer").tool == "jackhmmer"
    both = DatabaseSpec.parse(f"bfd={prefix},{prefix}:hhblits")
    assert both.paths == (prefix, prefix)
    assert DatabaseSpec.parse("u=/a:b/c.fasta").paths == ("/a:b/c.fasta",)


def test_several_fasta_files_are_shards_in_order_and_a_file_that_exists_is_itself(tmp_path):
    assert DatabaseSpec.parse("u=/d/b.fasta,/d/a.fasta").paths == ("/d/b.fasta", "/d/a.fasta")
    assert DatabaseSpec.parse("u=/d/u@3:jackhmmer").paths == tuple(f"/d/u-0000{n}-of-00003" for n in range(3))
    assert DatabaseSpec.parse("u=/d/u@2,/d/new").paths == (
        "/d/u-00000-of-00002",
        "/d/u-00001-of-00002",
        "/d/new",
    )
    assert DatabaseSpec.parse("u=/d/u@0").paths == ("/d/u@0",)
    for name in ("a,b.fasta", "u@3"):
        (tmp_path / name).write_text(">x\nAC\n")
        assert DatabaseSpec.parse(f"u={tmp_path / name}").paths == (str(tmp_path / name),)
    with pytest.raises(ConfigError, match="names 99999999999 files; a database has at most 99999"):
        DatabaseSpec.parse("u=/d/u@99999999999")
    with pytest.raises(ConfigError, match="'/d/a' is given twice; its hits would be, too"):
        DatabaseSpec.parse("u=/d/a,/d/b,/d/a")
    (tmp_path / "v-00000-of-00002").write_text(">x\nAC\n")
    with pytest.raises(DatabaseError, match=r"v-00001-of-00002.*no such file"):
        DatabaseSpec.parse(f"u={tmp_path}/v@2").files()


def test_a_shard_is_known_by_its_content_and_a_database_by_its_files_in_order(tmp_path):
    for name, text in (("a", ">x\nAC\n"), ("b", ">y\nAC\n"), ("c", ">x\nAC\n")):
        (tmp_path / name).write_text(text)
    spec, turned, renamed = (
        DatabaseSpec.parse("u=" + ",".join(f"{tmp_path}/{name}" for name in names))
        for names in ("ab", "ba", "cb")
    )
    assert database_digest(spec) != database_digest(turned)
    assert shard_digests(spec) == shard_digests(renamed) == shard_digests(turned)[::-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no-equals", "must be NAME=PATH"),
        ("=/x", "database name ''"),
        ("a b=/x", "database name 'a b'"),
        ("a=", "path is empty"),
        ("a=:hhblits", "path is empty"),
    ],
)
def test_bad_text_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        DatabaseSpec.parse(text)


def test_merge_order_and_caps_are_alphafolds():
    names = ["other2", "mgnify", "small_bfd", "other1", "UniRef90", "uniclust30"]
    specs = [DatabaseSpec(name=name, paths=("/x",), tool="jackhmmer") for name in names]
    ordered = in_merge_order(specs)
    assert [spec.name for spec in ordered] == [
        *("UniRef90", "small_bfd", "uniclust30", "mgnify", "other2", "other1")
    ]
    assert [spec.default_max_hits for spec in ordered] == [10_000, None, None, 501, None, None]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x1f\x8b\x08junk", "compressed"),
        (b"# STOCKHOLM 1.0\n", "no FASTA"),
    ],
)
def test_a_bad_fasta_database_is_a_typed_error(tmp_path, content, words):
    path = tmp_path / "u.fasta"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatabaseError, match=words) as caught:
        DatabaseSpec.parse(f"u={path}").files()
    assert caught.value.path == str(path)


def test_a_folder_is_no_database(tmp_path):
    with pytest.raises(DatabaseError, match="not a readable file"):
        DatabaseSpec.parse(f"u={tmp_path}").files()


def test_a_bad_hhsuite_database_is_a_typed_error(tmp_path):
    prefix = make_hh(tmp_path)
    spec = DatabaseSpec.parse(f"u={prefix}")
    assert len(spec.files()) == 6
    (tmp_path / "db_hhm.ffdata").write_bytes(b"")
    with pytest.raises(DatabaseError, match=r"'db_hhm\.ffdata' is empty"):
        spec.files()
    (tmp_path / "db_cs219.ffdata").unlink()
    with pytest.raises(DatabaseError, match=r"db_cs219\.ffdata' does not exist"):
        spec.files()


def test_digest_follows_content_and_not_place(tmp_path):
    def make(folder, content):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "u.fasta").write_text(content)
        return DatabaseSpec.parse(f"u={tmp_path / folder / 'u.fasta'}")

    one, copy, other = make("a", ">x\nAC\n"), make("b", ">x\nAC\n"), make("c", ">x\nAD\n")
    assert database_digest(one) == database_digest(copy) != database_digest(other)


def test_content_hashes_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "u.fasta"
    path.write_text(">x\nAC\n")
    spec, cache = DatabaseSpec.parse(f"u={path}"), open_blobs(tmp_path / "results")
    first = database_digest(spec, cache)
    reads = []
    monkeypatch.setattr(databases, "file_sha256", lambda file: reads.append(file) or file_sha256(file))
    assert database_digest(spec, cache) == first
    assert reads == []
    path.write_text(">x\nAD\n")
    os.utime(path, ns=(1, 1))
    assert database_digest(spec, cache) != first
    assert len(reads) == 1


def test_large_files_are_sampled_at_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(databases, "WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(databases, "NUM_SAMPLES", 5)
    monkeypatch.setattr(databases, "SAMPLE_BYTES", 10)
    path = tmp_path / "big"
    path.write_bytes(bytes(2000))
    base = file_sha256(path)
    for position in (0, 1999):
        changed = bytearray(2000)
        changed[position] = 1
        path.write_bytes(changed)
        assert file_sha256(path) != base
    path.write_bytes(bytes(2001))
    assert file_sha256(path) != base
