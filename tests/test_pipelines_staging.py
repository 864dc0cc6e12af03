"""Databases on a local disk: copied once per host, resumed after a kill, never a mixture, never a half."""

import contextlib
import dataclasses
import fcntl
import gzip
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner
from pipelines_data import globins, needs_hmmer, write_fasta
from range_server import range_server
from rich.console import Console

from foldfeed.feature_store import FeatureStore, StorageError
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.building.progress import byte_bars
from foldfeed.pipelines.databases.files import make_manifest
from foldfeed.pipelines.databases.registry import Registry
from foldfeed.pipelines.databases.spec import DatabaseSpec, database_digest
from foldfeed.pipelines.databases.staging import RECORD, StagedDatabase, stage
from foldfeed.pipelines.errors import ConfigError, StagingError, StagingFullError

# Pieces of 64 KiB and a note after each, so that files of a test have many of both.
SCRIPT = """
import sys
from foldfeed.pipelines.databases import staging
from foldfeed.pipelines.databases import staging_copy
staging_copy.PIECE_BYTES, staging_copy.NOTE_S, staging_copy.NUM_AHEAD = 1 << 16, 0.0, 1
def tell(stage, done, total):
    print(stage, done, total, flush=True)
found = staging.stage(sys.argv[1], sys.argv[2], name="u", tell=tell)
print("was there" if found.was_there else "copied", found.spec.paths[0], flush=True)
"""


def fasta(num_bytes: int, seed: int = 0) -> bytes:
    """A FASTA file of about that size."""
    rng, text = random.Random(seed), bytearray()
    while len(text) < num_bytes:
        text += f">s{len(text)}\n".encode() + bytes(rng.choices(b"ACDEFGHIKLMNPQRSTVWY", k=500)) + b"\n"
    return bytes(text)


def staging_process(url: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, url, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, wanted) -> str:
    """Reads lines of a process until one is wanted."""
    for line in process.stdout:
        if wanted(line.split()):
            return line
    raise AssertionError(process.stderr.read())


@pytest.fixture
def quick_notes(monkeypatch):
    monkeypatch.setattr("foldfeed.pipelines.databases.staging_copy.PIECE_BYTES", 1 << 16)
    monkeypatch.setattr("foldfeed.pipelines.databases.staging_copy.NOTE_S", 0.0)
    monkeypatch.setattr("foldfeed.pipelines.databases.staging_copy.NUM_AHEAD", 1)


def staged_and_told(url: str, folder: Path) -> tuple[StagedDatabase, list[int]]:
    """What `stage` returns, and the bytes that it told of."""
    told = []
    return stage(url, folder, name="u", tell=lambda _, done, __: told.append(done)), told


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_every_kind_of_source_is_copied_and_found_again(tmp_path):
    text = fasta(300_000)
    source = tmp_path / "source"
    source.mkdir()
    for name, data in (
        ("u.fasta", text),
        ("g.fasta.gz", gzip.compress(text)),
        ("z.fasta.zst", zstandard.compress(text)),
    ):
        (source / name).write_bytes(data)
    for number in range(3):
        (source / f"s-{number:05d}-of-00003").write_bytes(fasta(1000 * (number + 1), number))
    parts = [f"h_{part}.{kind}" for part in ("a3m", "cs219") for kind in ("ffdata", "ffindex")]
    for name in parts:
        (source / name).write_bytes(name.encode() * 99)
    with range_server(source, tags=True) as (url, requests):
        for root in (str(source), url):
            for name, expected in (
                ("u.fasta", {"u.fasta": text}),
                ("g.fasta.gz", {"g.fasta": text}),
                ("z.fasta.zst", {"z.fasta": text}),
                ("s@3", {f"s-{n:05d}-of-00003": fasta(1000 * (n + 1), n) for n in range(3)}),
                ("h", {name: name.encode() * 99 for name in parts}),
            ):
                folder = tmp_path / "to" / root[:4].strip("/") / name
                first = stage(f"{root}/{name}", folder, name="u")
                copy = Path(first.folder)
                assert {
                    path.name: path.read_bytes() for path in copy.iterdir() if path.name != RECORD
                } == expected
                assert first.spec.tool == ("hhblits" if name == "h" else "jackhmmer")
                assert first.digest == database_digest(first.spec)
                assert not first.was_there
                asked = len(requests)
                again = stage(f"{root}/{name}", folder, name="u")
                assert (again.was_there, again.spec) == (True, first.spec)
                # Looks at the source, and no reading.
                assert all(method == "HEAD" for method, _ in requests[asked:])
                assert visible(folder) == [copy.name]
                assert os.listdir(folder / ".foldfeed-staging" / "u") == ["lock"]


def test_a_bucket_tells_versions_of_equal_size_apart(tmp_path, s3):
    old, new = fasta(200_000), bytes(fasta(200_000)).replace(b"A", b"C")
    bucket, _, folder = s3.rpartition("/")
    blobs = open_blobs(bucket)
    for data in (old, new):
        blobs.write_atomic(f"{folder}/u.fasta", data)
        found = stage(f"{s3}/u.fasta", tmp_path / "to", name="u")
        assert not found.was_there
        assert Path(found.spec.paths[0]).read_bytes() == data
        assert stage(f"{s3}/u.fasta", tmp_path / "to", name="u").was_there
    assert len(visible(tmp_path / "to")) == 2


def test_a_killed_copy_goes_on_and_reads_only_the_rest(tmp_path):
    source, data, sent = tmp_path / "source", fasta(1_500_000), []
    source.mkdir()
    (source / "u.fasta").write_bytes(data)
    with range_server(source, tags=True, pause_s=0.02, sent=sent) as (url, _):
        before = set(threading.enumerate())
        process = staging_process(f"{url}/u.fasta", tmp_path / "to")
        with process:
            line = wait_for(process, lambda words: words[0] == "copying" and int(words[2]) > len(data) // 2)
            process.send_signal(signal.SIGKILL)
        assert visible(tmp_path / "to") == []
        kept = int(line.split()[2]) - (1 << 16)
        # An answer that was under way is counted late.
        deadline = time.monotonic() + 30
        while set(threading.enumerate()) - before:
            assert time.monotonic() < deadline, "the server still speaks to the process that was killed"
            time.sleep(0.01)
        # A write that the note does not vouch for.
        (part,) = (tmp_path / "to").rglob("parts/u.fasta")
        with part.open("ab") as file:
            file.write(b"torn")
        sent.clear()
        with staging_process(f"{url}/u.fasta", tmp_path / "to") as process:
            said = process.stdout.read()
            assert process.wait(60) == 0, process.stderr.read()
        assert sum(sent) <= len(data) - kept
        first = said.splitlines()[0].split()
        assert int(first[2]) == len(data) - sum(sent) > len(data) // 3
    (path,) = (tmp_path / "to").glob("u-*/u.fasta")
    assert path.read_bytes() == data


def test_processes_wait_for_the_one_that_copies_and_find_its_copy(tmp_path):
    source, data, sent = tmp_path / "source", fasta(400_000), []
    source.mkdir()
    (source / "u.fasta").write_bytes(data)
    lock = tmp_path / "to" / ".foldfeed-staging" / "u" / "lock"
    lock.parent.mkdir(parents=True)
    with (
        range_server(source, tags=True, pause_s=0.02, sent=sent) as (url, _),
        contextlib.ExitStack() as stack,
    ):
        with lock.open("w") as held:
            # As one that copies: both are at the lock before either can go on.
            fcntl.flock(held, fcntl.LOCK_EX)
            pair = [stack.enter_context(staging_process(f"{url}/u.fasta", tmp_path / "to")) for _ in range(2)]
            for process in pair:
                wait_for(process, lambda words: words[0] == "waiting")
            assert sent == []
        ends = [process.communicate(timeout=60)[0].splitlines()[-1] for process in pair]
    assert sorted(end.split(" /")[0] for end in ends) == ["copied", "was there"]
    assert sum(sent) == len(data)


@pytest.mark.parametrize("note_s", [0.0, 1000.0])
def test_a_server_that_stops_answering_costs_a_piece_and_not_the_copy(
    tmp_path, quick_notes, monkeypatch, note_s
):
    source, data = tmp_path / "source", fasta(400_000)
    source.mkdir()
    (source / "u.fasta").write_bytes(data)
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "1")
    monkeypatch.setattr("foldfeed.pipelines.databases.staging_copy.NOTE_S", note_s)
    with range_server(source, tags=True, absent=503) as (url, _):

        def stop(stage_name, done, total):
            if done > 200_000:
                (source / "u.fasta").rename(tmp_path / "away")

        with pytest.raises(StorageError, match="503"):
            stage(f"{url}/u.fasta", tmp_path / "to", name="u", tell=stop)
        (tmp_path / "away").rename(source / "u.fasta")
        found, told = staged_and_told(f"{url}/u.fasta", tmp_path / "to")
    # Without notes there is none: the source could not be seen any more to be the same.
    assert told[0] == (3 << 16 if note_s == 0.0 else 0)
    assert Path(found.spec.paths[0]).read_bytes() == data


@pytest.mark.parametrize("what", ["content", "gone", "shorter"])
def test_a_source_that_changes_meanwhile_is_an_error_and_never_a_mixture(tmp_path, quick_notes, what):
    source, old, new = tmp_path / "source", fasta(300_000), fasta(300_000, seed=1)
    source.mkdir()
    (source / "u.fasta").write_bytes(old)

    def change(stage_name, done, total):
        if 100_000 < done < 200_000:
            if what == "gone":
                (source / "u.fasta").unlink(missing_ok=True)
            else:
                (source / "u.fasta").write_bytes(new[: 150_000 if what == "shorter" else None])

    with range_server(source, tags=True) as (url, _):
        for root in (str(source), url):
            (source / "u.fasta").write_bytes(old)
            with pytest.raises(StagingError, match="changed while it was copied"):
                stage(f"{root}/u.fasta", tmp_path / "to", name="u", tell=change)
            assert visible(tmp_path / "to") == []
            # What was begun of the old version is no part of the new one.
            (source / "u.fasta").write_bytes(new)
            found = stage(f"{root}/u.fasta", tmp_path / "to", name="u")
            assert Path(found.spec.paths[0]).read_bytes() == new
            shutil.rmtree(tmp_path / "to")


def test_a_part_of_another_version_or_with_other_bytes_is_not_gone_on_with(tmp_path, quick_notes):
    source, data = tmp_path / "u.fasta", fasta(300_000)
    source.write_bytes(data)

    def stop(stage_name, done, total):
        if done > 150_000:
            raise KeyboardInterrupt

    for damage in (False, True):
        with pytest.raises(KeyboardInterrupt):
            stage(str(source), tmp_path / "to", name="u", tell=stop)
        (part,) = (tmp_path / "to").rglob("parts/u.fasta")
        if damage:
            with part.open("r+b") as file:
                file.write(b"rotten")
        else:
            data = fasta(300_000, seed=2)
            source.write_bytes(data)
        found, told = staged_and_told(str(source), tmp_path / "to")
        assert told[0] == 0
        assert Path(found.spec.paths[0]).read_bytes() == data
        shutil.rmtree(tmp_path / "to")


def test_a_server_that_tells_no_version_is_refused_unless_the_digest_is_known(tmp_path, monkeypatch):
    source, data = tmp_path / "u.fasta", fasta(50_000)
    source.write_bytes(data)
    with range_server(tmp_path) as (url, requests):
        with pytest.raises(StagingError, match="neither an ETag nor a time"):
            stage(f"{url}/u.fasta", tmp_path / "to", name="u")
        manifest = make_manifest(DatabaseSpec.parse(f"u={source}"), source=f"{url}/u.fasta")
        # As on another host, which has the URL and not the file.
        source.rename(tmp_path / "v.fasta")
        with pytest.raises(StagingError, match="no such file"):
            stage("", tmp_path / "to", name="u", manifest=manifest)
        (tmp_path / "moved").mkdir()
        os.link(tmp_path / "v.fasta", tmp_path / "moved" / "u.fasta")
    with range_server(tmp_path / "moved", tags=True) as (url, requests):
        manifest = dataclasses.replace(manifest, source=f"{url}/u.fasta")
        found = stage("", tmp_path / "to", name="u", manifest=manifest)
        assert found.digest == manifest.digest == database_digest(found.spec)
        requests.clear()
        with monkeypatch.context() as patched:
            # Neither the source nor the copy is read again.
            patched.setattr("foldfeed.pipelines.databases.spec.file_sha256", None)
            patched.setattr("foldfeed.pipelines.databases.staging.file_sha256", None)
            again = stage("", tmp_path / "to", name="u", manifest=manifest)
            assert (again.was_there, database_digest(again.spec)) == (True, manifest.digest)
        assert requests == []
        # Another release behind the same URL.
        shutil.rmtree(tmp_path / "to")
        (tmp_path / "moved" / "u.fasta").unlink()
        (tmp_path / "moved" / "u.fasta").write_bytes(data[:-1] + b"A")
        with pytest.raises(StagingError, match="has not the digest"):
            stage("", tmp_path / "to", name="u", manifest=manifest)
        assert visible(tmp_path / "to") == []
        assert os.listdir(tmp_path / "to" / ".foldfeed-staging" / "u") == ["lock"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"<html>no</html>", "does not start with '>'"), (b"", "is empty"), (None, "no such file, and no HH")],
)
def test_what_is_no_database_is_not_published(tmp_path, content, words):
    # A folder is no file, even if it is there.
    (tmp_path / "u").mkdir() if content is None else (tmp_path / "u").write_bytes(content)
    with pytest.raises(StagingError, match=words):
        stage(str(tmp_path / "u"), tmp_path / "to", name="u")
    assert visible(tmp_path / "to") == []


def test_a_terminal_shows_bytes_and_their_rate():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with byte_bars(console) as tell:
        for done in (5_000_000, 7_000_000, 9_000_000):
            tell("copying u", done, 9_000_000)
            time.sleep(0.01)
    shown = console.file.getvalue()
    assert "copying u" in shown
    assert "9.0/9.0 MB" in shown
    assert "MB/s" in shown


def test_a_copy_that_was_changed_is_not_used(tmp_path):
    (tmp_path / "u.fasta").write_bytes(fasta(9000))
    found = stage(str(tmp_path / "u.fasta"), tmp_path / "to", name="u")
    copy = Path(found.spec.paths[0])
    # Touched, and read once because of that: it is as it was.
    os.utime(copy)
    assert stage(str(tmp_path / "u.fasta"), tmp_path / "to", name="u").was_there
    copy.write_bytes(copy.read_bytes()[:-2] + b"A\n")
    with pytest.raises(StagingError, match="changed after it was made"):
        stage(str(tmp_path / "u.fasta"), tmp_path / "to", name="u")


@pytest.mark.parametrize("name", ["u.fasta", "u.fasta.gz"])
def test_a_copy_that_was_not_published_is_published_without_another_reading(tmp_path, name):
    data = fasta(90_000)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    first = stage(str(tmp_path / name), tmp_path / "elsewhere", name="u")
    in_the_way = tmp_path / "to" / Path(first.folder).name
    in_the_way.mkdir(parents=True)
    with pytest.raises(StagingError, match="is no staged database"):
        stage(str(tmp_path / name), tmp_path / "to", name="u")
    in_the_way.rmdir()
    # As far as a kill may have come: the files are there, perhaps in part, and the record is not.
    (made,) = (tmp_path / "to").rglob(f"files/{RECORD}")
    made.unlink()
    found, told = staged_and_told(str(tmp_path / name), tmp_path / "to")
    assert told[0] == (tmp_path / name).stat().st_size
    assert (found.digest, Path(found.spec.paths[0]).read_bytes()) == (first.digest, data)
    assert os.listdir(found.folder + "/../.foldfeed-staging/u") == ["lock"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 512 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_and_what_was_copied_is_kept(tmp_path, small_disk, quick_notes, monkeypatch):
    source, data = tmp_path / "u.fasta", fasta(300_000)
    source.write_bytes(fasta(600_000))
    with pytest.raises(StagingFullError, match="Free some space") as caught:
        stage(str(source), small_disk, name="u")
    assert (caught.value.num_missing, list(small_disk.rglob("parts/*"))) == (source.stat().st_size, [])
    source.write_bytes(data)

    def fill(stage_name, done, total):
        if done > 100_000 and not (small_disk / "filler").exists():
            (small_disk / "filler").write_bytes(bytes(300_000))

    # No note but that of the last moment.
    monkeypatch.setattr("foldfeed.pipelines.databases.staging_copy.NOTE_S", 1000.0)
    with pytest.raises(StagingFullError, match="what was copied is kept") as caught:
        stage(str(source), small_disk, name="u", tell=fill)
    assert 0 < caught.value.num_missing < len(data) - 100_000
    assert visible(small_disk) == ["filler"]
    (small_disk / "filler").unlink()
    found, told = staged_and_told(str(source), small_disk)
    assert told[0] == len(data) - caught.value.num_missing
    assert Path(found.spec.paths[0]).read_bytes() == data


def test_cli_stages_names_and_urls(tmp_path):
    source, registry = tmp_path / "source", str(tmp_path / "r.json")
    source.mkdir()
    data = fasta(20_000)
    (source / "u.fasta.gz").write_bytes(gzip.compress(data))

    def say(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(main, ["database", *words, "--registry", registry])
        assert done.exit_code == code, done.output
        return done.output

    with range_server(source, tags=True) as (url, requests):
        address = f"{url}/u.fasta.gz"
        said = say("stage", address, "--to", str(tmp_path / "a"), "--name", "uniref90", "--version", "7")
        (path,) = (tmp_path / "a").glob("uniref90-*/u.fasta")
        assert f"copied, {len(data):,} bytes: uniref90={path}:jackhmmer" in said
        manifest = Registry(registry).get("uniref90")
        assert (manifest.source, manifest.version, manifest.num_bytes) == (address, "7", len(data))
        assert manifest.num_sequences == data.count(b">")
        requests.clear()
        assert "was there" in say("stage", "uniref90", "--to", str(tmp_path / "a"))
        assert requests == []
        # On another host: the registry is there, and the copy is not.
        shutil.rmtree(tmp_path / "a")
        assert "copied" in say("stage", "uniref90", "--to", str(tmp_path / "b"))
        (path,) = (tmp_path / "b").glob("uniref90-*/u.fasta")
        assert path.read_bytes() == data
        assert "was there" in say("stage", address, "--to", str(tmp_path / "b"), "--name", "uniref90")
        assert "unchanged" in say("verify", "uniref90")
        assert "no effect without --name" in say("stage", address, "--to", "x", "--version", "7", code=2)
        assert "leave --name out" in say("stage", "uniref90", "--to", "x", "--name", "y", code=2)
        assert "copy and add it with" in say("add", "u", address, code=2)
        with pytest.raises(ConfigError, match="is a URL; copy it with"):
            DatabaseSpec.parse(f"u={url}/u.fasta")


@pytest.mark.external_tool
@needs_hmmer
def test_a_build_stages_and_its_results_are_those_of_the_same_files_elsewhere(tmp_path):
    entries = globins(6)
    queries = write_fasta(tmp_path / "q.fasta", dict(list(entries.items())[:1]))
    source = tmp_path / "source"
    source.mkdir()
    for number, names in enumerate((list(entries)[:3], list(entries)[3:])):
        write_fasta(source / f"u-{number:05d}-of-00002", {name: entries[name] for name in names})

    def build(store: str, database: str, *more: str) -> str:
        words = ["--queries", str(queries), "--store", str(tmp_path / store), "--database", database, *more]
        done = CliRunner().invoke(main, ["build", *words, "--results", str(tmp_path / "results")])
        assert done.exit_code == 0, done.output
        return done.output

    with range_server(source, tags=True) as (url, _):
        said = build("a", f"uniref90={url}/u@2", "--stage-databases", str(tmp_path / "to"))
        assert "1 done, 0 reused" in said
    assert "0 done, 1 reused" in build("b", f"uniref90={source}/u@2")
    stores = [FeatureStore.open(tmp_path / name) for name in ("a", "b")]
    assert stores[0].fingerprint == stores[1].fingerprint
