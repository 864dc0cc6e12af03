"""Going back to the last good version: what it takes out of sight is named, and can be brought back."""

import os
import shutil
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from records import make_record

from foldfeed.feature_store import CorruptDataError, FeatureStore, HistoryChangedError, write_part
from foldfeed.feature_store.care import roll_back as repair_rollback
from foldfeed.feature_store.care.garbage import DEFAULT_GRACE_S, collect_garbage
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.roll_back import roll_back
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.index.log import log_path
from foldfeed.feature_store.index.sealed import seal
from foldfeed.feature_store.index.table import IndexTable
from foldfeed.feature_store.index.tags import RETENTION_FILE, oldest_version, set_tag
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.storage import open_blobs

NEWEST = 4


def commit(store: FeatureStore, names: list[str], job: str, seed: int = 1, **options) -> None:
    records = [make_record(name, 3, 9 + seed, seed=seed) for name in names]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id=job, **options)


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    """Versions 1 to 3 add two records each; version 4 adds one and replaces one."""
    made = FeatureStore.create(tmp_path / "s")
    for number in range(3):
        commit(made, [f"r{number}a", f"r{number}b"], f"job-{number}", seed=number)
    commit(made, ["new", "r1a"], "job-3", seed=9, on_existing="replace")
    return made


def log_file(store: FeatureStore, version: int) -> Path:
    return Path(store.url, log_path(version))


def index_files(store: FeatureStore, version: int) -> list[Path]:
    """Index files that version added."""
    before = set(Index.open(store.url, version - 1).files)
    return [
        Path(store.url, "index", name) for name in Index.open(store.url, version).files if name not in before
    ]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"foldfeed.time") + 20] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "torn": lambda store: cut(log_file(store, NEWEST)),
    "empty": lambda store: log_file(store, NEWEST).write_bytes(b""),
    "zeros": lambda store: log_file(store, NEWEST).write_bytes(bytes(log_file(store, NEWEST).stat().st_size)),
    "flipped": lambda store: flip(log_file(store, NEWEST)),
    "data missing": lambda store: [path.unlink() for path in index_files(store, NEWEST)],
    "data torn": lambda store: [cut(path) for path in index_files(store, NEWEST)],
    "log and data": lambda store: [*map(cut, index_files(store, NEWEST)), flip(log_file(store, NEWEST))],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_last_good_version_is_back_and_what_is_gone_is_named(store, damage):
    good = FeatureStore.open(store.url, NEWEST - 1)
    before = (good.fingerprint, good.table().to_pylist())
    DAMAGES[damage](store)
    with pytest.raises(CorruptDataError):
        FeatureStore.open(store.url).table()
    assert repair(store.url).after.problems, "without the flag nothing goes back"
    planned = repair(store.url, roll_back_index=True, dry_run=True).rolled_back
    assert planned.new_version is None
    with pytest.raises(CorruptDataError):
        FeatureStore.open(store.url).table()

    report = repair(store.url, roll_back_index=True)
    assert report.after.problems == ()
    back = report.rolled_back
    assert (back.good_version, back.bad_versions) == (NEWEST - 1, (NEWEST,))
    assert (back.set_aside, back.lost, back.unreadable) == (
        planned.set_aside,
        planned.lost,
        planned.unreadable,
    )
    opened = FeatureStore.open(store.url)
    assert (opened.fingerprint, opened.table().to_pylist()) == before
    assert opened.version == back.new_version
    entry = opened.log()[0]
    assert entry.operation == "rollback"
    assert entry.message.startswith("version 4 cannot be read; back to version 3. No longer visible: ")
    assert entry.num_removed == len(back.lost)
    # Everything that was there is there: aside, or in its place.
    for path in back.set_aside:
        assert list(Path(store.url).glob(f"index.damaged-*/{path.removeprefix('index/')}"))
    if "data" in damage:
        assert back.lost == ()
        assert len(back.unreadable) == 1
    elif damage == "flipped":
        assert back.lost == ("new", "r1a")
        assert "new, r1a" in entry.message
    assert verify(store.url, level="deep").problems == ()
    # Life goes on.
    commit(opened, ["later"], "job-later")
    assert "later" in FeatureStore.open(store.url)


@pytest.mark.parametrize("damage", ["torn", "data missing"])
def test_records_that_went_out_of_sight_come_back_from_their_parts(store, damage):
    DAMAGES[damage](store)
    report = repair(store.url, roll_back_index=True, add_missing=True)
    assert report.added == ("new",)
    opened = FeatureStore.open(store.url)
    assert opened["new"].fingerprint == make_record("new", 3, 18, seed=9).fingerprint
    # The replaced record is what it was before; its other content is in a part that nothing names.
    assert opened["r1a"].fingerprint == make_record("r1a", 3, 10, seed=1).fingerprint
    assert report.after.problems == ()


@pytest.mark.parametrize("damage", ["flipped", "data torn"])
def test_a_job_that_went_back_may_run_again(store, damage):
    fingerprint = store.fingerprint
    DAMAGES[damage](store)
    repair(store.url, roll_back_index=True)
    commit(FeatureStore.open(store.url), ["new", "r1a"], "job-3", seed=9, on_existing="replace")
    assert FeatureStore.open(store.url).fingerprint == fingerprint


def test_several_versions_go_back_when_the_damage_is_further_back(store):
    flip(log_file(store, 2))
    cut(log_file(store, NEWEST))
    report = repair(store.url, roll_back_index=True)
    back = report.rolled_back
    assert (back.good_version, back.bad_versions) == (1, (2, 3, 4))
    assert len(back.set_aside) == 3
    assert {"r1a", "r1b", "r2a", "r2b"} <= set(back.lost)
    assert FeatureStore.open(store.url).ids == ["r0a", "r0b"]
    assert (
        "versions 2 to 4 cannot be read; back to version 1" in FeatureStore.open(store.url).log()[0].message
    )
    # What the other versions added is still in the parts.
    again = repair(store.url, add_missing=True, on_ambiguous="newest")
    assert FeatureStore.open(store.url).ids == ["new", "r0a", "r0b", "r1a", "r1b", "r2a", "r2b"]
    assert again.after.problems == ()


def test_a_lost_file_of_an_older_commit_takes_back_what_stands_on_it(store):
    (path,) = index_files(store, 3)
    path.unlink()
    back = repair(store.url, roll_back_index=True).rolled_back
    assert (back.good_version, back.bad_versions, back.new_version) == (2, (3, 4), 3)
    assert back.unreadable == (f"index/{path.name}",)
    assert back.lost == ("new", "r1a")
    opened = FeatureStore.open(store.url)
    assert opened.ids == ["r0a", "r0b", "r1a", "r1b"]
    assert [entry.operation for entry in opened.log()] == ["rollback", "commit", "commit", "create"]


def test_a_readable_store_is_never_taken_back(store):
    assert repair(store.url, roll_back_index=True).rolled_back is None
    assert FeatureStore.open(store.url).version == NEWEST
    # Damage of an older log entry does not hinder readers of the newest version.
    flip(log_file(store, 2))
    assert repair(store.url, roll_back_index=True).rolled_back is None
    assert FeatureStore.open(store.url).version == NEWEST


def test_nothing_to_go_back_to_is_said(store):
    flip(log_file(store, 0))
    cut(log_file(store, NEWEST))
    report = repair(store.url, roll_back_index=True)
    assert report.rolled_back is None
    assert report.after.version is None
    with pytest.raises(ValueError, match="exclude each other"):
        repair(store.url, roll_back_index=True, rebuild_lost_index=True)


def test_a_checkpoint_of_a_bad_version_goes_aside(store):
    while not list(Path(store.url, "index/_delta_log").glob("*.checkpoint.parquet")):
        store.annotate(pa.table({"record_id": ["r0a"], "note": [str(store.version)]}))
    newest = store.version
    cut(log_file(store, newest))
    back = repair(store.url, roll_back_index=True).rolled_back
    assert back.good_version == newest - 1
    assert [path.rsplit("/")[-1] for path in back.set_aside] == [
        f"{newest:020}.checkpoint.parquet",
        f"{newest:020}.json",
        "_last_checkpoint",
    ]
    assert FeatureStore.open(store.url).table(["note"], "note is not null")["note"].to_pylist() == [
        str(newest - 2)
    ]
    assert verify(store.url).problems == ()


def test_a_tag_on_a_bad_version_does_not_move(store):
    set_tag(store.url, "paper")
    cut(log_file(store, NEWEST))
    report = repair(store.url, roll_back_index=True)
    (problem,) = report.after.problems
    assert problem.where == "tags/paper.json"
    with pytest.raises(CorruptDataError, match="set on another version 4"):
        FeatureStore.open(store.url, "paper")


def test_it_goes_on_after_an_interruption(store, monkeypatch):
    flip(log_file(store, 2))
    cut(log_file(store, NEWEST))
    blobs = open_blobs(store.url)
    deleted = []

    class StoppedError(Exception):
        pass

    class Stopping:
        def __getattr__(self, name):
            return getattr(blobs, name)

        def delete(self, path):
            if len(deleted) == 2:
                raise StoppedError
            deleted.append(path)
            blobs.delete(path)

    with pytest.raises(StoppedError):
        roll_back(Stopping(), dry_run=False)
    assert deleted == [log_path(4), log_path(3)]
    back = repair(store.url, roll_back_index=True).rolled_back
    assert (back.good_version, FeatureStore.open(store.url).ids) == (1, ["r0a", "r0b"])
    assert len(list(Path(store.url).glob("index.damaged-*/_delta_log/*.json"))) >= 3


def test_the_command_tells_what_goes(store):
    def run(*args: object):
        words = ["repair", store.url, *map(str, args)]
        return CliRunner().invoke(main, words, catch_exceptions=False)

    flip(log_file(store, NEWEST))
    assert "repair --roll-back goes back" in run().stdout
    planned = run("--roll-back", "--dry-run")
    assert "would be out of sight  new\n" in planned.stdout
    assert planned.exit_code == 1
    assert "before gc" not in planned.stdout
    done = run("--roll-back", "--add-missing")
    assert "before gc" not in done.stdout
    assert "out of sight  r1a\n" in done.stdout
    assert "added  new\n" in done.stdout
    assert done.exit_code == 0
    assert run("--roll-back", "--rebuild-index").exit_code == 2


def test_a_long_list_of_names_is_cut_in_the_log_only(monkeypatch):
    plan = repair_rollback.RollBack(
        good_version=3,
        bad_versions=(4, 5),
        set_aside=(),
        lost=tuple(f"r{number:02}" for number in range(30)),
        unreadable=("index/x",),
        new_version=None,
    )
    message = repair_rollback.message_of(plan)
    assert "r19 and 10 more; 1 index file(s) cannot be read" in message
    assert "r20" not in message


def lose_version_3(store: FeatureStore) -> None:
    """A power cut: an index file of version 3 is gone, and version 4 stands on it."""
    for path in index_files(store, 3):
        path.unlink()
    assert repair(store.url, roll_back_index=True).rolled_back.new_version < NEWEST


def lose_the_index(store: FeatureStore) -> None:
    shutil.rmtree(Path(store.url, "index"))
    assert repair(store.url, rebuild_lost_index=True, on_ambiguous="newest").index_rebuilt


@pytest.mark.parametrize("mend", [lose_version_3, lose_the_index])
@pytest.mark.parametrize("goes_on", [False, True])
def test_gc_after_a_repair_keeps_the_shorter_history(store, mend, goes_on):
    """Versions up to 3 were given up; then version numbers from below are given out again."""
    collect_garbage(store.url, grace_s=0, keep_days=0)
    assert oldest_version(open_blobs(store.url)) == NEWEST
    mend(store)
    opened = FeatureStore.open(store.url)
    if goes_on:
        commit(opened, ["later"], "job-later")
    before = FeatureStore.open(store.url)
    assert before.version < NEWEST + goes_on
    collect_garbage(store.url, grace_s=0)
    # By its number, as a worker process opens it again.
    after = FeatureStore.open(store.url, before.version)
    assert (after.fingerprint, after.ids) == (before.fingerprint, before.ids)
    assert verify(store.url, level="deep").problems == ()
    commit(after, ["last"], "job-last")
    collect_garbage(store.url, grace_s=0, keep_days=0)
    assert FeatureStore.open(store.url).ids == sorted([*before.ids, "last"])
    assert verify(store.url, level="deep").problems == ()


def test_a_retention_beyond_the_newest_version_costs_nothing(store):
    """What a repair by an earlier release left."""
    Path(store.url, RETENTION_FILE).write_bytes(seal({"oldest_version": 99}))
    before = store.fingerprint
    collect_garbage(store.url, grace_s=0)
    assert FeatureStore.open(store.url).fingerprint == before
    (path,) = index_files(store, NEWEST)
    path.unlink()
    assert f"index/{path.name}" in {problem.where for problem in verify(store.url).problems}


@pytest.mark.parametrize("where", ["disk", "objects"])
@pytest.mark.parametrize("lost", [NEWEST, NEWEST - 1])
def test_who_had_the_store_open_before_it_went_back_changes_nothing(tmp_path, where, lost):
    """Else the log gets a gap, or a version whose parent is not there: nobody could open the store again."""
    url = str(tmp_path / "s") if where == "disk" else f"memory://{uuid.uuid4().hex}"
    writer = FeatureStore.create(url)
    for number in range(NEWEST):
        commit(writer, [f"r{number}"], f"job-{number}", seed=number)
    assert len(writer) == writer.version == NEWEST
    blobs = open_blobs(url)
    for name in set(Index.open(url, lost).files) - set(Index.open(url, lost - 1).files):
        blobs.delete(f"index/{name}")
    assert repair(url, roll_back_index=True).rolled_back.new_version == lost
    before = FeatureStore.open(url)
    seen, log = before.fingerprint, blobs.list("index/_delta_log")
    for change in (
        # The job whose commit went back: the writer remembers it as done.
        lambda: commit(writer, [f"r{NEWEST - 1}"], f"job-{NEWEST - 1}", seed=NEWEST - 1),
        lambda: commit(writer, ["late"], "job-late"),
        lambda: writer.delete(["r0"]),
        lambda: writer.annotate(pa.table({"record_id": ["r0"], "mine": ["x"]})),
    ):
        with pytest.raises(HistoryChangedError, match=f"version {NEWEST}, .* open the store again"):
            change()
    assert blobs.list("index/_delta_log") == log
    again = FeatureStore.open(url)
    assert (again.version, again.fingerprint) == (lost, seen)
    commit(again, [f"r{NEWEST - 1}"], f"job-{NEWEST - 1}", seed=NEWEST - 1)
    assert f"r{NEWEST - 1}" in FeatureStore.open(url)
    assert verify(url).problems == ()


def test_a_repair_between_the_look_and_the_write_is_noticed(store, monkeypatch):
    """Most of a commit's time lies between the two: it encodes and uploads rows there."""
    writer = FeatureStore.open(store.url)
    (path,) = index_files(store, NEWEST)
    original = IndexTable.try_commit

    def slow(self, *args):
        monkeypatch.undo()
        path.unlink()
        repair(store.url, roll_back_index=True)
        return original(self, *args)

    monkeypatch.setattr(IndexTable, "try_commit", slow)
    with pytest.raises(HistoryChangedError):
        commit(writer, ["late"], "job-late")
    assert FeatureStore.open(store.url).version == NEWEST
    assert "late" not in FeatureStore.open(store.url)


@pytest.mark.parametrize("damage", ["torn", "data torn"])
def test_gc_leaves_time_to_bring_lost_records_back(store, damage):
    """Their parts are old, and nothing names them any more."""
    old = time.time() - 2 * DEFAULT_GRACE_S
    for path in Path(store.url, "parts").rglob("*"):
        os.utime(path, (old, old))
    DAMAGES[damage](store)
    done = CliRunner().invoke(main, ["repair", store.url, "--roll-back"], catch_exceptions=False)
    assert "run repair --add-missing before gc" in done.stdout
    assert "new" not in FeatureStore.open(store.url)
    assert [item.kind for item in collect_garbage(store.url).removed if item.kind == "part"] == []
    assert repair(store.url, add_missing=True).added == ("new",)
    assert FeatureStore.open(store.url)["new"].msa().shape == (3, 18)
