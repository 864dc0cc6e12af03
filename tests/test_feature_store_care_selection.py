"""Copies of some records: a condition, a set, or names choose them; nothing else goes along."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from range_server import range_server
from records import make_record

from foldfeed.feature_store import (
    CommitConflictError,
    CorruptDataError,
    FeatureStore,
    NameNotFoundError,
    QueryError,
    RecordNotFoundError,
    RecordSetMismatchError,
    StoreSettings,
    write_part,
)
from foldfeed.feature_store.care import rewrite
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.index.tags import list_tags, set_tag
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.storage import open_blobs

SETTINGS = StoreSettings(tile_rows=16, tile_cols=8)
# Parts of 1, 3 and 4 records; depths and lengths differ, and so do what a record has besides.
PARTS = (("a",), ("b", "c", "d"), ("e", "f", "g", "h"))
NAMES = sorted(name for names in PARTS for name in names)


def filled(url) -> FeatureStore:
    store = FeatureStore.create(url, SETTINGS)
    for number, names in enumerate(PARTS):
        records = [
            make_record(name, 2 + 3 * ord(name) % 17, 8 + ord(name) % 9, seed=ord(name)) for name in names
        ]
        store.commit([write_part(store.url, records, SETTINGS).part_id], job_id=f"job-{number}")
    store.annotate(pa.table({"record_id": ["b", "h"], "year": [1999, 2024]}))
    return store


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return filled(tmp_path / "source")


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory) -> FeatureStore:
    """For tests that only read it."""
    return filled(tmp_path_factory.mktemp("shared") / "source")


def condition(names) -> str:
    return f"record_id in ({', '.join(map(repr, names))})" if names else "false"


def same_records(copy: FeatureStore, source: FeatureStore, names: list[str]) -> None:
    assert copy.ids == names
    for name in names:
        left, right = copy[name], source[name]
        assert left.fingerprint == right.fingerprint
        np.testing.assert_array_equal(left.msa(), right.msa())
        np.testing.assert_array_equal(left.deletions(), right.deletions())
        assert left.rows().equals(right.rows())
    columns = [name for name in source.table().column_names if not name.startswith(("first_", "part_id"))]
    expected = source.table(columns, condition(names))
    assert copy.table(columns).to_pylist() == expected.to_pylist()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.sets(st.sampled_from(NAMES)),
    second=st.sets(st.sampled_from(NAMES)),
    size=st.sampled_from([1, 2000, 1 << 28]),
)
def test_a_copy_of_chosen_records_is_those_records(shared_store, tmp_path_factory, first, second, size):
    """Any choice, then any other into the same place, in parts of any size; each of them twice."""
    target = tmp_path_factory.mktemp("copy") / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foldfeed.feature_store.care.copy.DEFAULT_TARGET_BYTES", size)
        chosen: set[str] = set()
        for names in (first, second):
            before = chosen
            chosen = chosen | names
            report = copy_store(shared_store.url, target, where=condition(names))
            copy = FeatureStore.open(target)
            view = shared_store.view(condition(chosen))
            assert (copy.fingerprint, len(copy)) == (view.fingerprint, len(view))
            assert (report.num_chosen, report.num_added) == (len(names), len(names - before))
            again = copy_store(shared_store.url, target, where=condition(names))
            assert (again.num_chosen, again.num_added, again.parts_copied) == (len(names), 0, 0)
            assert again.version == report.version == copy.version
    same_records(FeatureStore.open(target), shared_store, sorted(chosen))
    assert verify(target, level="deep", all_versions=True).problems == ()


def test_nothing_of_other_records_is_copied(store, tmp_path):
    report = copy_store(store.url, tmp_path / "t", where="record_id in ('a', 'c', 'f')")
    assert (report.num_chosen, report.num_added) == (3, 3)
    # The part of a holds nothing else and is copied as it is; c and f share a new one.
    assert (report.parts_copied, report.parts_rewritten, report.parts_skipped) == (2, 1, 0)
    blobs = open_blobs(str(tmp_path / "t"))
    held = {row["record_id"] for part in blobs.list("parts") for row in PartReader(blobs, part).index_rows()}
    assert held == {"a", "c", "f"}
    assert store.table(["part_id"], "record_id = 'a'")["part_id"][0].as_py() in blobs.list("parts")
    assert report.bytes_copied == sum(file.num_bytes for file in blobs.walk("parts"))
    (entry, *_) = FeatureStore.open(tmp_path / "t").log()
    assert entry.message == f"copy of {store.url}, version 5, where record_id in ('a', 'c', 'f')"


def test_a_condition_that_keeps_all_is_a_whole_copy(store, tmp_path):
    set_tag(store.url, "paper")
    whole = copy_store(store.url, tmp_path / "whole")
    chosen = copy_store(store.url, tmp_path / "chosen", where="depth > 0")
    assert (whole.num_chosen, chosen.num_chosen, chosen.parts_rewritten) == (8, 8, 0)
    parts = [open_blobs(str(tmp_path / name)).list("parts") for name in ("whole", "chosen")]
    assert parts[0] == parts[1]
    assert [tag.name for tag in list_tags(str(tmp_path / "chosen"))] == ["paper"]


def test_a_set_is_copied_and_can_be_used_there(store, tmp_path):
    set_tag(store.url, "paper")
    saved = store.save_set("some", "select record_id from records where record_id in ('a', 'b', 'h')")
    store.save_set("others", "select record_id from records where record_id = 'c'")
    report = copy_store(store.url, tmp_path / "t", record_set="some")
    copy = FeatureStore.open(tmp_path / "t")
    assert copy.fingerprint == saved.fingerprint == copy.subset("some").fingerprint
    assert (report.num_chosen, report.tags_left) == (3, ("paper",))
    with pytest.raises(RecordSetMismatchError, match="'c'"):
        copy.subset("others")
    assert copy_store(store.url, tmp_path / "t", record_set="some").num_added == 0


def test_an_older_version_is_chosen_from(store, tmp_path):
    report = copy_store(store.url, tmp_path / "t", version=2, where="depth > 0")
    assert (report.num_chosen, report.source_version) == (4, 2)
    assert FeatureStore.open(tmp_path / "t").ids == ["a", "b", "c", "d"]


def test_named_records_are_copied(store, tmp_path):
    report = copy_store(store.url, tmp_path / "t", record_ids=["h", "b", "h"])
    assert (report.num_chosen, report.num_added) == (2, 2)
    same_records(FeatureStore.open(tmp_path / "t"), store, ["b", "h"])
    # An empty list is no record, and not all of them.
    assert copy_store(store.url, tmp_path / "none", record_ids=[]).num_chosen == 0
    assert FeatureStore.open(tmp_path / "none").ids == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"where": "depht > 1"}, QueryError, "depht"),
        ({"record_set": "absent"}, NameNotFoundError, "'absent'"),
        ({"record_ids": ["a", "zz"]}, RecordNotFoundError, "'zz'"),
        ({"record_ids": ["a"], "where": "true"}, ValueError, "record_ids and where exclude each other"),
        ({"record_set": "x", "where": "true"}, ValueError, "where and record_set exclude each other"),
    ],
)
def test_what_cannot_be_chosen_makes_no_store(store, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        copy_store(store.url, tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_records_that_differ_there_are_a_decision(store, tmp_path):
    other = FeatureStore.create(tmp_path / "t", SETTINGS)
    part = write_part(other.url, [make_record("c", 9, 9, seed=99)], SETTINGS)
    other.commit([part.part_id], job_id="1")
    mine = other["c"].fingerprint
    with pytest.raises(CommitConflictError, match="'c'"):
        copy_store(store.url, other.url, where="record_id in ('b', 'c')")
    assert FeatureStore.open(other.url).ids == ["c"]
    skipped = copy_store(store.url, other.url, where="record_id in ('b', 'c')", on_existing="skip")
    assert (skipped.num_chosen, skipped.num_added) == (2, 1)
    assert FeatureStore.open(other.url)["c"].fingerprint == mine
    replaced = copy_store(store.url, other.url, where="record_id in ('b', 'c')", on_existing="replace")
    assert replaced.num_added == 1
    same_records(FeatureStore.open(other.url), store, ["b", "c"])


def test_damage_to_a_chosen_record_is_not_copied_and_to_another_one_does_not_matter(store, tmp_path):
    part_id = store.table(["part_id"], "record_id = 'f'")["part_id"][0].as_py()
    path = Path(store.url, "parts", part_id, "msa", "c", "0", "0", "0")
    data = bytearray(path.read_bytes())
    # The first record of the part is e.
    data[3] ^= 1
    path.write_bytes(bytes(data))
    assert copy_store(store.url, tmp_path / "t", where="record_id = 'f'").num_added == 1
    with pytest.raises(CorruptDataError):
        copy_store(store.url, tmp_path / "t", where="record_id in ('e', 'f')")
    assert FeatureStore.open(tmp_path / "t").ids == ["f"]


def test_an_interrupted_copy_goes_on(store, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    honest, calls = rewrite.load_record, []

    def stop(part, row):
        calls.append(row["record_id"])
        if len(calls) == 2:
            raise StoppedError
        return honest(part, row)

    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "load_record", stop)
        with pytest.raises(StoppedError):
            copy_store(store.url, tmp_path / "t", where="record_id in ('a', 'c', 'f')")
    assert FeatureStore.open(tmp_path / "t").ids == []
    report = copy_store(store.url, tmp_path / "t", where="record_id in ('a', 'c', 'f')")
    assert (report.num_added, report.parts_skipped) == (3, 1)
    same_records(FeatureStore.open(tmp_path / "t"), store, ["a", "c", "f"])


def test_a_part_that_gc_takes_meanwhile_is_written_again(store, tmp_path, monkeypatch):
    from foldfeed.feature_store.care import copy as module

    honest, taken = module.mark_wanted, []

    def late(url, part_ids):
        blobs = open_blobs(url)
        if len(part_ids) > 1 and not taken:
            taken.extend(part_ids)
            for part_id in part_ids:
                blobs.delete(f"parts/{part_id}")
        return honest(url, part_ids)

    monkeypatch.setattr(module, "mark_wanted", late)
    copy_store(store.url, tmp_path / "t", where="record_id in ('a', 'c', 'f')")
    assert len(taken) == 2
    same_records(FeatureStore.open(tmp_path / "t"), store, ["a", "c", "f"])
    assert verify(tmp_path / "t").problems == ()


def test_the_command_line_chooses_as_export_does(store, tmp_path):
    store.save_set("some", "select record_id from records where record_id in ('b', 'h')")

    def run(*words):
        return CliRunner().invoke(main, ["copy", store.url, *map(str, words)])

    result = run(tmp_path / "t", "--where", "record_id in ('b', 'c')")
    assert result.exit_code == 0, result.output
    assert "records  2 added of 2 chosen" in result.stdout
    assert "1 of them written anew, 0 were there" in result.stdout
    assert "records  0 added of 2 chosen" in run(tmp_path / "t", "--where", "record_id in ('b', 'c')").stdout
    assert "records  1 added of 2 chosen" in run(tmp_path / "t", "--record-set", "some").stdout
    assert "records  1 added of 2 chosen" in run(tmp_path / "t", "a", "b").stdout
    assert "records  4 added\n" in run(tmp_path / "t").stdout
    for words, message in (
        (["--where", "true", "--record-set", "some"], "--where and --record-set given; say in one way"),
        (["a", "--where", "true"], "--where and RECORD given"),
    ):
        result = run(tmp_path / "u", *words)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    result = run(tmp_path / "u", "--where", "depht > 3")
    assert (result.exit_code, "--version" in result.stderr, "depht" in result.stderr) == (1, False, True)
    assert run(tmp_path / "u", "--where", "").exit_code != 0
    assert not (tmp_path / "u").exists()


def test_to_a_bucket_and_back(store, s3, tmp_path):
    report = copy_store(store.url, s3, where="record_id in ('a', 'c', 'f')")
    assert (report.num_chosen, report.num_added, report.parts_rewritten) == (3, 3, 1)
    assert copy_store(store.url, s3, where="record_id in ('a', 'c', 'f')").num_added == 0
    assert copy_store(s3, tmp_path / "back", where="record_id in ('c', 'f')").num_chosen == 2
    same_records(FeatureStore.open(tmp_path / "back"), store, ["c", "f"])


def test_from_a_web_server(store, tmp_path):
    store.save_set("some", "select record_id from records where record_id in ('b', 'h')")
    with range_server(tmp_path) as (address, _):
        report = copy_store(f"{address}/source", tmp_path / "t", record_set="some")
        assert (report.num_chosen, report.names_known) == (2, False)
        assert copy_store(f"{address}/source", tmp_path / "t", where="record_id = 'c'").num_added == 1
    same_records(FeatureStore.open(tmp_path / "t"), store, ["b", "c", "h"])
