"""Sets, splits and tags are cared for like records: damage is found, and copies take them along."""

import dataclasses
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from records import make_record

from foldfeed.feature_store import FeatureStore, NameTakenError, write_part
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.care.verify_index import check_names
from foldfeed.feature_store.errors import CorruptDataError, FoldfeedError, TagError
from foldfeed.feature_store.index.tags import list_tags, read_tag, set_tag
from foldfeed.feature_store.storage import open_blobs

NAMES = ("sets/deep.parquet", "sets/train.parquet", "splits/cut.parquet", "tags/paper.json", "tags/old.json")


@pytest.fixture
def store(tmp_path):
    """Four records, two versions with a tag each, a split, a set and a set that promises a part."""
    store = FeatureStore.create(tmp_path / "source")
    for number in range(2):
        names = [f"r{number}{letter}" for letter in "ab"]
        records = [
            dataclasses.replace(make_record(n, 5, 9, 10 * ord(n[-1]) + number), extra={"family": n})
            for n in names
        ]
        store.commit([write_part(store.url, records, store.settings).part_id], job_id=f"job-{number}")
        set_tag(store.url, ("old", "paper")[number], message=f"tag {number}")
    store.save_split("cut", "extra.family", fractions={"train": 0.5, "test": 0.5}, seed=0)
    part = next(part for part in ("train", "test") if store.split("cut").ids(part))
    store.save_set("deep", "from records where depth = 5")
    store.save_set("train", f"from splits where part = '{part}'", within=("cut", part))
    return store


def meaning(url) -> list:
    """All that readers get from the names of a store."""
    store = FeatureStore.open(url)
    sets = [store.set(name) for name in store.set_names()]
    cuts = [store.split(name) for name in store.split_names()]
    tables = [(one.name, one.fingerprint, one.table.to_pylist()) for one in (*sets, *cuts)]
    facts = [(one.sql, one.store_version, one.within) for one in sets]
    return [*tables, *facts, [(cut.seed, dict(cut.fractions), cut.source) for cut in cuts]]


@pytest.mark.parametrize("path", NAMES)
def test_a_flipped_byte_is_found_wherever_it_lies(store, path):
    file = Path(store.url, path)
    good = file.read_bytes()
    blobs, truth = open_blobs(store.url), meaning(store.url)
    step = 3 if path.startswith("tags/") else 23
    found = 0
    for at in range(0, len(good), step):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        problems = check_names(blobs, store.settings)
        if problems:
            found += 1
            continue
        # Parquet has bytes that nothing reads, e.g. the name of the program that wrote it; never a tag.
        assert not path.startswith("tags/"), at
        assert meaning(store.url) == truth, at
    assert found > (len(good) // step) * (0.99 if path.startswith("tags/") else 0.5)
    file.write_bytes(good)
    assert check_names(blobs, store.settings) == []


@pytest.mark.parametrize("path", NAMES)
def test_verify_names_the_damaged_file(store, path):
    file = Path(store.url, path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    problems = verify(store.url, level="quick").problems
    assert any(path.removesuffix(".parquet") in problem.where for problem in problems), problems
    assert all(problem.record_ids == () for problem in problems)


def test_verify_holds_a_set_to_its_promise(store):
    path = Path(store.url, "splits/cut.parquet")
    path.unlink()
    store.save_split("cut", "extra.family", fractions={"train": 0.5, "test": 0.5}, seed=7, source="x")
    (problem, *_) = verify(store.url, level="quick").problems
    assert "train" in problem.where + problem.reason
    path.unlink()
    (problem,) = verify(store.url, level="quick").problems
    assert "no split" in problem.reason


def test_a_copy_has_all_names(store, tmp_path):
    target = tmp_path / "copy"
    report = copy_store(store.url, target)
    assert set(report.names_copied) == set(NAMES) - {"tags/old.json"}
    assert report.tags_left == ()
    assert meaning(target) == meaning(store.url)
    for path in NAMES[:3]:
        assert (target / path).read_bytes() == Path(store.url, path).read_bytes()
    (tag,) = list_tags(target)
    assert (tag.name, tag.message, tag.version) == ("paper", "tag 1", report.version)
    assert FeatureStore.open(target, "paper").fingerprint == store.fingerprint
    assert FeatureStore.open(target).subset("train").fingerprint == store.subset("train").fingerprint
    assert verify(target, level="deep").problems == ()
    again = copy_store(store.url, target)
    assert (again.names_copied, again.num_added, again.version) == ((), 0, report.version)


def test_a_copy_of_an_older_version_has_that_version_s_tag(store, tmp_path):
    report = copy_store(store.url, tmp_path / "copy", version="old")
    assert [tag.name for tag in list_tags(tmp_path / "copy")] == ["old"]
    assert FeatureStore.open(tmp_path / "copy", "old").ids == ["r0a", "r0b"]
    # Sets belong to no version; one that needs records which are not there says so when it is used.
    assert "sets/deep.parquet" in report.names_copied
    with pytest.raises(FoldfeedError, match="r1a"):
        FeatureStore.open(tmp_path / "copy").subset("deep")
    later = copy_store(store.url, tmp_path / "copy")
    assert later.names_copied == ("tags/paper.json",)
    assert FeatureStore.open(tmp_path / "copy").subset("deep").ids == store.ids


def test_names_resume_after_an_interruption(store, tmp_path, monkeypatch):
    from foldfeed.feature_store.care import copy_names

    class StoppedError(Exception):
        pass

    def stop(*_args, **_options):
        raise StoppedError

    target = tmp_path / "copy"
    with monkeypatch.context() as patch:
        patch.setattr(copy_names.versions, "set_tag", stop)
        with pytest.raises(StoppedError):
            copy_store(store.url, target)
    assert list_tags(target) == []
    (target / "sets" / "train.parquet").unlink()
    report = copy_store(store.url, target)
    assert set(report.names_copied) == {"sets/train.parquet", "tags/paper.json"}
    assert (report.parts_copied, report.num_added) == (0, 0)
    assert meaning(target) == meaning(store.url)


def test_names_that_clash_stop_a_copy_before_it_starts(store, tmp_path):
    other = FeatureStore.create(tmp_path / "other")
    other.commit([write_part(other.url, [make_record("mine", 2, 9)], other.settings).part_id], job_id="j")
    other.save_set("deep", "from records")
    for choice in ("error", "replace"):
        with pytest.raises(NameTakenError, match="'deep'"):
            copy_store(store.url, other.url, on_existing=choice)
        assert FeatureStore.open(other.url).ids == ["mine"]
        assert len(open_blobs(other.url).list("parts")) == 1
    report = copy_store(store.url, other.url, on_existing="skip")
    assert FeatureStore.open(other.url).set("deep").ids == ["mine"]
    assert "sets/train.parquet" in report.names_copied
    # The copy holds one more record than the version that the tag names.
    assert report.tags_left == ("paper",)
    assert list_tags(other.url) == []


def test_equal_names_of_other_stores_are_no_clash(store, tmp_path):
    twin = tmp_path / "twin"
    copy_store(store.url, twin)
    (twin / "sets/deep.parquet").unlink()
    FeatureStore.open(twin).save_set("deep", "select record_id from records where length = 9")
    assert (twin / "sets/deep.parquet").read_bytes() != Path(store.url, "sets/deep.parquet").read_bytes()
    assert copy_store(store.url, twin).names_copied == ()


def test_a_tag_of_the_target_is_not_moved(store, tmp_path):
    target = tmp_path / "copy"
    copy_store(store.url, target)
    FeatureStore.open(store.url).annotate(pa.table({"record_id": ["r0a"], "note": ["x"]}))
    set_tag(store.url, "paper", move=True)
    before = read_tag(open_blobs(target), "paper")
    FeatureStore.open(target).delete(["r0a"])
    with pytest.raises(TagError, match="'paper' exists already"):
        copy_store(store.url, target)
    assert read_tag(open_blobs(target), "paper") == before


@pytest.mark.parametrize("path", NAMES[:4])
def test_a_damaged_name_is_not_copied(store, tmp_path, path):
    file = Path(store.url, path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(CorruptDataError):
        copy_store(store.url, tmp_path / "copy")
    assert FeatureStore.open(tmp_path / "copy").ids == []
    shutil.rmtree(tmp_path / "copy")
