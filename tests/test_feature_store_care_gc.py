"""gc removes garbage and nothing else; tags and retention decide what is garbage."""

import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
from crash_harness import files_of
from records import make_record

from foldfeed.feature_store import CorruptDataError, FeatureStore, StoreSettings, TagError, write_part
from foldfeed.feature_store.care import garbage
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_part, copy_store
from foldfeed.feature_store.care.garbage import collect_garbage
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.index.tags import delete_tag, list_tags, set_tag
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.storage import open_blobs

SETTINGS = StoreSettings(tile_rows=16, tile_cols=8)


def commit(store: FeatureStore, name: str, job: str, seed: int = 1, **options) -> str:
    part = write_part(store.url, [make_record(name, 4, 9, seed=seed)], store.settings)
    store.commit([part.part_id], job_id=job, **options)
    return part.part_id


def kinds(things) -> list[str]:
    return sorted(item.kind for item in things)


def parts(store: FeatureStore) -> set[str]:
    return set(os.listdir(Path(store.url, "parts")))


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    made = FeatureStore.create(tmp_path / "s", SETTINGS)
    commit(made, "a", "1")
    commit(made, "b", "2")
    return made


def test_a_store_without_garbage_stays_as_it_is(store):
    before = files_of(Path(store.url))
    report = collect_garbage(store.url, grace_s=0)
    assert (report.removed, report.spared, report.oldest_version) == ((), (), 0)
    assert files_of(Path(store.url)) == before


def test_replaced_and_deleted_records_are_kept_for_old_versions(store):
    commit(store, "a", "3", seed=2, on_existing="replace")
    store.delete(["b"])
    assert collect_garbage(store.url, grace_s=0).removed == ()
    assert FeatureStore.open(store.url, version=2)["b"].msa().shape == (4, 9)
    report = collect_garbage(store.url, grace_s=0, keep_days=0)
    assert kinds(report.removed) == ["index file"] * 2 + ["part"] * 2
    assert (report.oldest_version, len(parts(store))) == (4, 1)
    with pytest.raises(
        ValueError, match="version 2 is no longer kept: gc removed what only versions before 4"
    ):
        FeatureStore.open(store.url, version=2)
    assert FeatureStore.open(store.url, version=4).ids == ["a"]
    with pytest.raises(ValueError, match="no longer kept"):
        set_tag(store.url, "late", 2)


def test_keep_days_goes_by_when_a_version_was_superseded(store):
    commit(store, "a", "3", seed=2, on_existing="replace")
    assert collect_garbage(store.url, grace_s=0, keep_days=1).oldest_version == 0
    assert FeatureStore.open(store.url, version=2)["a"].depth == 4


def test_a_part_without_a_commit_is_spared_while_it_is_young(store):
    part = write_part(store.url, [make_record("x", 3, 5)], store.settings)
    report = collect_garbage(store.url)
    assert (kinds(report.spared), report.removed) == (["part"], ())
    old = time.time() - 2 * garbage.DEFAULT_GRACE_S
    os.utime(Path(store.url, "parts", part.part_id, "zarr.json"), (old, old))
    # Its other files are young still: an upload may be under way.
    assert kinds(collect_garbage(store.url).spared) == ["part"]
    for path in Path(store.url, "parts", part.part_id).rglob("*"):
        os.utime(path, (old, old))
    dry = collect_garbage(store.url, dry_run=True)
    assert (kinds(dry.removed), part.part_id in parts(store)) == (["part"], True)
    # To write it again, or to be about to commit it, makes it young again.
    write_part(store.url, [make_record("x", 3, 5)], store.settings)
    assert kinds(collect_garbage(store.url).spared) == ["part"]
    report = collect_garbage(store.url, grace_s=0)
    assert (kinds(report.removed), part.part_id in parts(store)) == (["part"], False)
    assert report.num_bytes == part.num_bytes


def test_a_writer_at_work_is_never_disturbed(store):
    blobs = open_blobs(store.url)
    with blobs.staging_folder() as folder:
        (folder / "half").write_bytes(b"x")
        report = collect_garbage(store.url, grace_s=0)
        assert (kinds(report.spared), report.removed) == (["leftover"], ())
        assert (folder / "half").exists()
    left = Path(store.url, "parts", ".tmp-left")
    left.mkdir()
    assert kinds(collect_garbage(store.url, grace_s=0).removed) == ["leftover"]


def test_a_part_that_is_committed_while_gc_looks_stays(store, monkeypatch):
    part = write_part(store.url, [make_record("x", 3, 5)], store.settings)
    original = garbage._part_garbage

    def slow(*args):
        found = original(*args)
        FeatureStore.open(store.url).commit([part.part_id], job_id="meanwhile")
        return found

    monkeypatch.setattr(garbage, "_part_garbage", slow)
    report = collect_garbage(store.url, grace_s=0)
    assert part.part_id not in {item.path for item in report.removed}
    assert FeatureStore.open(store.url)["x"].msa().shape == (3, 5)


def age(root: Path) -> None:
    old = time.time() - 2 * garbage.DEFAULT_GRACE_S
    for path in root.rglob("*"):
        os.utime(path, (old, old))


@pytest.mark.parametrize("grace_s", [0, garbage.DEFAULT_GRACE_S])
def test_an_index_file_that_is_wanted_again_while_gc_looks_stays(store, monkeypatch, grace_s):
    """Index files are named by content: what a version held before may come again."""

    def annotate(value: str) -> None:
        FeatureStore.open(store.url).annotate(pa.table({"record_id": ["a"], "mine": [value]}))

    annotate("x")
    (again,) = set(Index.open(store.url, None).files) - set(Index.open(store.url, 2).files)
    annotate("y")
    age(Path(store.url, "index"))
    original = garbage._remove

    def late(*args):
        annotate("x")
        if grace_s == 0:
            # And it is the newest no more.
            annotate("z")
        return original(*args)

    monkeypatch.setattr(garbage, "_remove", late)
    report = collect_garbage(store.url, grace_s=grace_s, keep_days=0)
    assert f"index/{again}" not in {item.path for item in report.removed}
    assert f"index/{again}" in {item.path for item in report.spared}
    versions = range(report.oldest_version, FeatureStore.open(store.url).version + 1)
    tables = [FeatureStore.open(store.url, number).table(["mine"], "record_id = 'a'") for number in versions]
    values = [table["mine"][0].as_py() for table in tables]
    assert values == (["y", "x", "z"] if grace_s == 0 else ["y", "x"])


def test_an_index_file_that_is_about_to_be_committed_stays(store, monkeypatch):
    """It was written anew, so it is young, though no version names it yet."""
    store.annotate(pa.table({"record_id": ["a"], "mine": ["x"]}))
    age(Path(store.url, "index"))
    original = garbage._remove

    def late(blobs, due, *args):
        for item in due:
            if item.kind == "index file":
                blobs.write_atomic(item.path, blobs.read(item.path))
        return original(blobs, due, *args)

    with monkeypatch.context() as patch:
        patch.setattr(garbage, "_remove", late)
        assert collect_garbage(store.url, keep_days=0).removed == ()
    age(Path(store.url, "index"))
    assert set(kinds(collect_garbage(store.url, keep_days=0).removed)) == {"index file"}


@pytest.mark.parametrize("grace_s", [0, garbage.DEFAULT_GRACE_S])
def test_a_copy_that_goes_on_keeps_its_old_parts_from_gc(store, tmp_path, grace_s):
    """An earlier copy left its parts, which have grown old; gc runs elsewhere while the copy goes on.

    Without a grace period gc removes even what was just marked as wanted: then the copy must notice.
    """
    target = FeatureStore.create(tmp_path / "copy", store.settings)
    for part_id in parts(store):
        copy_part(open_blobs(store.url), open_blobs(target.url), part_id)
    age(Path(target.url, "parts"))
    removed = []

    def progress(what, number, total):
        if what == "copying parts" and number == (1 if grace_s else total):
            removed.extend(collect_garbage(target.url, grace_s=grace_s).removed)

    report = copy_store(store.url, target.url, progress=progress)
    assert grace_s or len(removed) == report.parts_copied == 2
    assert report.parts_copied + report.parts_skipped == 2
    assert verify(target.url, level="deep").problems == ()
    assert FeatureStore.open(target.url).fingerprint == store.fingerprint


def test_a_part_that_a_killed_gc_had_set_aside_comes_back(store):
    part_id = store.table(["part_id"])["part_id"][0].as_py()
    aside = Path(store.url, "parts", garbage.ASIDE_PREFIX + part_id)
    Path(store.url, "parts", part_id).rename(aside)
    with pytest.raises(CorruptDataError):
        FeatureStore.open(store.url)["a"].msa()
    assert collect_garbage(store.url, grace_s=0, dry_run=True).removed == ()
    assert collect_garbage(store.url, grace_s=0).removed == ()
    assert FeatureStore.open(store.url)["a"].msa().shape == (4, 9)


def test_nothing_is_removed_when_the_log_is_damaged(store):
    write_part(store.url, [make_record("x", 3, 5)], store.settings)
    log = Path(store.url, "index/_delta_log/00000000000000000001.json")
    damaged = log.read_bytes().replace(b'numRecords\\": 1', b'numRecords\\": 2')
    assert damaged != log.read_bytes()
    log.write_bytes(damaged)
    before = files_of(Path(store.url))
    with pytest.raises(CorruptDataError):
        collect_garbage(store.url, grace_s=0, keep_days=0)
    assert files_of(Path(store.url)) == before


def test_compacted_away_parts_go_with_their_versions(store):
    old = parts(store)
    compact(store.url)
    assert collect_garbage(store.url, grace_s=0).removed == ()
    report = collect_garbage(store.url, grace_s=0, keep_days=0)
    assert {item.path for item in report.removed if item.kind == "part"} == {f"parts/{name}" for name in old}
    assert FeatureStore.open(store.url).ids == ["a", "b"]


def test_tags_name_versions_and_keep_them(store):
    tag = set_tag(store.url, "paper-1", 1, message="as printed")
    assert (tag.version, tag.message) == (1, "as printed")
    commit(store, "a", "3", seed=2, on_existing="replace")
    collect_garbage(store.url, grace_s=0, keep_days=0)
    then = FeatureStore.open(store.url, "paper-1")
    assert (then.ids, then["a"].depth, then.version) == (["a"], 4, 1)
    assert FeatureStore.open(store.url, version=1).ids == ["a"]
    assert FeatureStore.open(store.url, "3").version == 3
    assert [entry.tags for entry in FeatureStore.open(store.url).log()] == [(), (), ("paper-1",), ()]
    with pytest.raises(ValueError, match="version 2 is no longer kept"):
        FeatureStore.open(store.url, 2)
    delete_tag(store.url, "paper-1")
    assert kinds(collect_garbage(store.url, grace_s=0).removed) == ["index file", "part"]


def test_a_tag_does_not_change_its_meaning_by_accident(store):
    first = set_tag(store.url, "v", 1)
    assert set_tag(store.url, "v", 1) == first
    with pytest.raises(TagError, match="exists already, for another version"):
        set_tag(store.url, "v", 2)
    assert set_tag(store.url, "v", 2, move=True).version == 2
    assert [tag.version for tag in list_tags(store.url)] == [2]
    with pytest.raises(TagError, match="no tag 'w'; the tags of this store are: v"):
        FeatureStore.open(store.url, "w")
    with pytest.raises(TagError, match="no tag 'w'"):
        delete_tag(store.url, "w")
    with pytest.raises(ValueError, match="version 9 does not exist"):
        set_tag(store.url, "x", 9)


@pytest.mark.parametrize("name", ["3", "../x", "", "a/b", ".hidden", "a" * 200, "-x"])
def test_a_tag_cannot_walk_out_of_its_folder_or_look_like_a_number(store, name):
    with pytest.raises(TagError, match="cannot be a tag"):
        set_tag(store.url, name)
    with pytest.raises(ValueError, match=r"no tag|does not exist"):
        FeatureStore.open(store.url, name if name != "3" else "99")


def test_a_tag_of_another_history_is_refused(store):
    set_tag(store.url, "v", 1)
    other = FeatureStore.create(Path(store.url).parent / "other", SETTINGS)
    commit(other, "z", "1")
    for path in Path(store.url, "tags").iterdir():
        open_blobs(other.url).write_atomic(f"tags/{path.name}", path.read_bytes())
    with pytest.raises(CorruptDataError, match="another version 1"):
        FeatureStore.open(other.url, "v")
