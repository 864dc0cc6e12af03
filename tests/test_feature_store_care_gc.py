"""gc removes garbage and nothing else; tags and retention decide what is garbage."""

import os
import time
from pathlib import Path

import pytest
from crash_harness import files_of
from records import make_record

from foldfeed.feature_store import (
    CorruptDataError,
    FeatureStore,
    StoreSettings,
    TagError,
    garbage,
    write_part,
)
from foldfeed.feature_store.blobs import open_blobs
from foldfeed.feature_store.compact import compact
from foldfeed.feature_store.garbage import collect_garbage
from foldfeed.feature_store.versions import delete_tag, list_tags, set_tag

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
