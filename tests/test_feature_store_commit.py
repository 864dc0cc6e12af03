"""Commits: one transaction, once per job, old versions stay, foreign folders are left alone."""

import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from records import make_record

from foldfeed.feature_store import (
    CommitConflictError,
    CorruptDataError,
    FeatureStore,
    FormatVersionError,
    NotAStoreError,
    QueryError,
    RecordNotFoundError,
    StoreSettings,
    StoreSettingsError,
    write_part,
)


def test_a_job_commits_once_and_all_its_parts_together(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    parts = [write_part(store.url, [make_record(name, 3, 7)], store.settings).part_id for name in "ab"]
    reader = FeatureStore.open(store.url)
    first = store.commit(parts, job_id="job", message="two parts")
    assert (first.version, first.num_added, first.already_done) == (1, 2, False)
    again = store.commit(parts, job_id="job")
    assert (again.version, again.num_added, again.already_done) == (1, 0, True)
    other = store.commit(parts, job_id="another job with the same records")
    assert (other.version, other.num_added, other.num_unchanged) == (1, 0, 2)
    # A store object is a snapshot: it does not change under its owner.
    assert len(reader) == 0
    assert FeatureStore.open(store.url).ids == ["a", "b"]
    newest = store.log()[0]
    assert (newest.job_id, newest.message, newest.num_added) == ("job", "two parts", 2)


REFUSED = {
    "commit": lambda store: store.commit(
        [write_part(store.url, [make_record("r0", 2, 30)], store.settings).part_id], job_id="refused"
    ),
    "delete": lambda store: store.delete(["absent"]),
    "annotate": lambda store: store.annotate(pa.table({"record_id": ["absent"], "mine": ["x"]})),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_refused_change_leaves_no_mixture_of_two_versions(tmp_path, change):
    """The record that another process added sorts first, so every position means another record then."""
    store = FeatureStore.create(tmp_path / "s")
    wanted = {f"r{number}": make_record(f"r{number}", 3, 9 + number, seed=number) for number in range(3)}
    wanted["a0"] = make_record("a0", 3, 40, seed=7)
    parts = {name: write_part(store.url, [record], store.settings) for name, record in wanted.items()}
    store.commit([parts[f"r{number}"].part_id for number in range(3)], job_id="1")
    # All that a store object remembers of its version is in use.
    assert (store.ids, len(store.index_rows()), store["r1"].description) == (
        ["r0", "r1", "r2"],
        3,
        "record r1",
    )
    old = store.fingerprint
    FeatureStore.open(store.url).commit([parts["a0"].part_id], job_id="2")
    with pytest.raises((CommitConflictError, RecordNotFoundError)):
        REFUSED[change](store)
    assert store.ids == sorted(wanted)
    assert store.fingerprint == FeatureStore.open(store.url, store.version).fingerprint != old
    for name, record in wanted.items():
        assert (store[name].fingerprint, store[name].sequence) == (record.fingerprint, record.sequence)
        np.testing.assert_array_equal(store[name].msa(), record.msa)


def test_an_id_with_other_content_is_a_conflict_unless_told_otherwise(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    old, new = make_record("x", 4, 9, seed=1), make_record("x", 5, 9, seed=2)
    beside = make_record("y", 2, 9)
    store.commit([write_part(store.url, [old], store.settings).part_id], job_id="1")
    part = write_part(store.url, [new, beside], store.settings).part_id
    with pytest.raises(CommitConflictError, match=r"e\.g\. 'x'.*'replace'"):
        store.commit([part], job_id="2")
    assert store.ids == ["x"]
    kept = store.commit([part], job_id="3", on_existing="skip")
    assert (kept.num_added, store["x"].depth, store.ids) == (1, 4, ["x", "y"])
    replaced = store.commit([part], job_id="4", on_existing="replace")
    assert (replaced.num_added, store["x"].depth, len(store)) == (1, 5, 2)
    np.testing.assert_array_equal(FeatureStore.open(store.url, version=1)["x"].msa(), old.msa)
    with pytest.raises(ValueError, match="'maybe' is not one of"):
        store.commit([part], job_id="5", on_existing="maybe")


def test_the_same_id_in_two_parts_of_one_commit_is_refused(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    parts = [write_part(store.url, [make_record("x", depth, 9)], store.settings).part_id for depth in (2, 3)]
    with pytest.raises(CommitConflictError, match="'x' occurs more than once"):
        store.commit(parts, job_id="1")
    assert store.version == 0


def test_a_missing_part_cannot_be_committed(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    with pytest.raises(CorruptDataError, match="missing"):
        store.commit(["0" * 40], job_id="1")
    assert FeatureStore.open(store.url).version == 0


def test_fingerprint_depends_on_records_alone(tmp_path):
    records = [make_record(name, 3, 8) for name in "abc"]
    one = FeatureStore.create(tmp_path / "one")
    one.commit([write_part(one.url, records, one.settings).part_id], job_id="1")
    three = FeatureStore.create(tmp_path / "three")
    for number in (2, 0, 1):
        part = write_part(three.url, [records[number]], three.settings)
        three.commit([part.part_id], job_id=str(number))
    assert one.fingerprint == three.fingerprint
    assert one.fingerprint != FeatureStore.open(three.url, version=2).fingerprint


def test_a_store_travels_to_another_process_as_the_same_version(small_store):
    copy = pickle.loads(pickle.dumps(small_store))
    part = write_part(small_store.url, [make_record("new", 2, 5)], small_store.settings)
    small_store.commit([part.part_id], job_id="2")
    assert (copy.version, len(copy), len(small_store)) == (1, 3, 4)


def test_places_that_are_no_store(tmp_path):
    with pytest.raises(NotAStoreError, match="nothing at that path"):
        FeatureStore.open(tmp_path / "absent")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(NotAStoreError, match=r"no foldfeed\.json"):
        FeatureStore.open(tmp_path / "notes")
    with pytest.raises(NotAStoreError, match=r"holds other things, e\.g\. 'a\.txt'"):
        FeatureStore.create(tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]
    with pytest.raises(NotAStoreError):
        FeatureStore.open(tmp_path / "notes" / "a.txt")
    with pytest.raises(NotAStoreError, match="it is a file"):
        FeatureStore.create(tmp_path / "notes" / "a.txt")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", NotAStoreError, "not JSON"),
        ("[]", NotAStoreError, "does not say"),
        ('{"format": "foldfeed", "version": 2}', FormatVersionError, r"version 2; this foldfeed reads \[1\]"),
        ('{"format": "foldfeed", "version": 1}', NotAStoreError, "settings this release cannot read"),
        (
            '{"format": "foldfeed", "version": 1, "settings": {"row_order": "x"}}',
            NotAStoreError,
            "row_order 'x'",
        ),
    ],
)
def test_a_settings_file_that_cannot_be_read(small_store, content, error, message):
    Path(small_store.url, "foldfeed.json").write_text(content)
    with pytest.raises(error, match=message):
        FeatureStore.open(small_store.url)


def test_a_store_keeps_its_settings(small_store):
    FeatureStore.create(small_store.url, StoreSettings())
    with pytest.raises(StoreSettingsError, match="tile_rows=99"):
        FeatureStore.create(small_store.url, StoreSettings(tile_rows=99))


def test_an_interrupted_creation_is_finished_by_the_next_one(tmp_path):
    FeatureStore.create(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "index")
    with pytest.raises(NotAStoreError, match="creation was interrupted"):
        FeatureStore.open(tmp_path / "s")
    assert len(FeatureStore.create(tmp_path / "s")) == 0


def test_questions(small_store):
    answer = small_store.query("select record_id from records where depth > 1 order by depth")
    assert answer["record_id"].to_pylist() == ["c3", "b2"]
    assert small_store.table(["record_id", "length"], "length > 9").to_pylist() == [
        {"record_id": "b2", "length": 130},
        {"record_id": "c3", "length": 65},
    ]
    hits = small_store.query("select record_id, unnest(databases).num_rows n from records where depth = 700")
    assert sum(hits["n"].to_pylist()) == 699
    for wrong in ("select nonsense from records", "drop table records", "select 1 from small_store", ""):
        with pytest.raises(QueryError):
            small_store.query(wrong)
    with pytest.raises(QueryError, match="no column 'x'; the index has record_id"):
        small_store.table(["x"])
    with pytest.raises(QueryError, match="disabled"):
        small_store.query("select * from read_text('/etc/hostname')")
    with pytest.raises(RecordNotFoundError, match="no record 'b' in this store"):
        small_store["b"]
    with pytest.raises(RecordNotFoundError, match="Did you mean 'b2'"):
        small_store["b22"]
    with pytest.raises(ValueError, match="version 7 does not exist"):
        FeatureStore.open(small_store.url, version=7)
    with pytest.raises(IndexError, match=r"position 3 is outside 0\.\.2"):
        small_store.at(3)


def _commit_some(url: str, worker: int, count: int) -> None:
    for number in range(count):
        store = FeatureStore.open(url)
        record = make_record(f"w{worker}_{number}", 2, 6, seed=worker * 100 + number)
        part = write_part(url, [record], store.settings)
        store.commit([part.part_id], job_id=f"{worker}-{number}")


def test_concurrent_committers_lose_nothing(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_commit_some, args=(store.url, n, 6)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    after = FeatureStore.open(store.url)
    assert after.ids == sorted(f"w{a}_{b}" for a in range(4) for b in range(6))
    assert after.version == 24


class StoreAgainstDict(RuleBasedStateMachine):
    """Any order of commits equals a dictionary that sees the same ones, in every version."""

    names = st.sampled_from(["a", "b", "c", "d"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(self._new_folder())
        self.store = FeatureStore.create(self.folder / "s", StoreSettings(tile_rows=3, tile_cols=4))
        self.versions: list[dict[str, int]] = [{}]
        self.jobs = 0

    @staticmethod
    def _new_folder() -> str:
        import tempfile

        return tempfile.mkdtemp(prefix="foldfeed-state-")

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(
        content=st.dictionaries(names, st.integers(1, 9), min_size=1),
        on_existing=st.sampled_from(["error", "replace", "skip"]),
    )
    def commit(self, content, on_existing):
        now = self.versions[-1]
        records = [make_record(name, depth, 5, seed=depth) for name, depth in sorted(content.items())]
        part = write_part(self.store.url, records, self.store.settings)
        self.jobs += 1
        changed = {name for name in content if name in now and now[name] != content[name]}
        if changed and on_existing == "error":
            with pytest.raises(CommitConflictError):
                self.store.commit([part.part_id], job_id=str(self.jobs), on_existing=on_existing)
            return
        result = self.store.commit([part.part_id], job_id=str(self.jobs), on_existing=on_existing)
        added = {name: depth for name, depth in content.items() if now.get(name) != depth}
        if on_existing == "skip":
            added = {name: depth for name, depth in added.items() if name not in now}
        assert result.num_added == len(added)
        if added:
            self.versions.append(now | added)

    @rule(data=st.data())
    def look_back(self, data):
        version = data.draw(st.integers(0, len(self.versions) - 1))
        then = FeatureStore.open(self.store.url, version=version)
        assert {name: then[name].depth for name in then.ids} == self.versions[version]
        for name in then.ids:
            want = make_record(name, then[name].depth, 5, seed=then[name].depth)
            np.testing.assert_array_equal(then[name].deletions(), want.deletions)

    @invariant()
    def newest_is_the_model(self):
        assert self.store.version == len(self.versions) - 1
        assert self.store.ids == sorted(self.versions[-1])


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(max_examples=12, stateful_step_count=8, deadline=None)
