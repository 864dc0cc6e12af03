"""Pairing keys of rows: stored, part of what a record says, and nothing where no row has one."""

import dataclasses
import json
from pathlib import Path

import pytest
from conformance_reader import ConformanceReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import make_record
from test_feature_store_roundtrip import assert_equal, build

from foldfeed.feature_store import FeatureStore, InvalidRecordError, MsaRecord, StoreSettings, write_part
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.format.record import PAIRING_KEY_BYTES

ARRAY = "row_pairing_key"
SETTINGS = StoreSettings(tile_rows=8, tile_cols=8)
keys = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=PAIRING_KEY_BYTES)


def with_keys(record: MsaRecord, values: list[str]) -> MsaRecord:
    return dataclasses.replace(record, rows=dataclasses.replace(record.rows, pairing_key=values))


def arrays_of(store: FeatureStore) -> list[set[str]]:
    parts = sorted(Path(store.url, "parts").iterdir())
    return [
        set(json.loads((part / "zarr.json").read_text())["attributes"]["foldfeed"]["lengths"])
        for part in parts
    ]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(drawn=st.lists(st.lists(keys, min_size=0, max_size=9), min_size=1, max_size=4))
def test_keys_come_back_whichever_records_have_them(tmp_path_factory, drawn):
    records = [
        with_keys(make_record(f"r{number}", 1 + len(row_keys), 5, number), ["", *row_keys])
        for number, row_keys in enumerate(drawn)
    ]
    store = build(tmp_path_factory.mktemp("store") / "s", records, SETTINGS)
    for record in records:
        assert_equal(store[record.record_id], record)
    assert arrays_of(store) == [{*arrays_of(store)[0] - {ARRAY}, *([ARRAY] if any(map(any, drawn)) else [])}]
    other = ConformanceReader(store.url)
    for record in records:
        assert other.fingerprint(record.record_id) == record.fingerprint


def test_parts_without_keys_have_no_such_array_and_the_same_name_as_without_the_field(tmp_path):
    record = make_record("x", 9, 12)
    plain, empty = record, with_keys(record, [""] * 9)
    assert plain.fingerprint == empty.fingerprint
    stores = [build(tmp_path / name, [one], SETTINGS) for name, one in (("a", plain), ("b", empty))]
    assert [one.name for one in Path(stores[0].url, "parts").iterdir()] == [
        one.name for one in Path(stores[1].url, "parts").iterdir()
    ]
    assert ARRAY not in arrays_of(stores[0])[0]


def test_keys_belong_to_what_a_record_says():
    record = make_record("x", 9, 12)
    first = with_keys(record, ["", "1", *[""] * 7])
    moved = with_keys(record, ["", "", "1", *[""] * 6])
    assert len({record.fingerprint, first.fingerprint, moved.fingerprint}) == 3


def test_compacting_parts_of_which_some_have_keys_keeps_them(tmp_path):
    made = [make_record(f"r{depth}", depth, 11, depth) for depth in (5, 6, 9, 10, 13)]
    store = FeatureStore.create(tmp_path / "s", SETTINGS)
    for record in made:
        part = write_part(store.url, [record], store.settings)
        store.commit([part.part_id], job_id=record.record_id)
    before = {record.record_id: record.fingerprint for record in made}
    compact(store.url)
    after = FeatureStore.open(store.url)
    assert {name: after[name].fingerprint for name in after.ids} == before
    for record in made:
        assert_equal(after[record.record_id], record)
    assert verify(after.url, level="deep").problems == ()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (["", "x" * (PAIRING_KEY_BYTES + 1), ""], "pairing key is longer than 32 bytes"),
        (["", "é", ""], "pairing key holds something else than ASCII"),
        (["", "1"], "rows.pairing_key has 2 entries for 3 rows"),
    ],
)
def test_keys_that_the_format_cannot_hold_are_refused(bad, reason):
    with pytest.raises(InvalidRecordError, match=reason):
        with_keys(make_record("x", 3, 5), bad)
