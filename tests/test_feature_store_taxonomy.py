"""Taxonomy ids of rows: stored, part of what a record says, and nothing where no row has one."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conformance_reader import ConformanceReader
from pipelines_data import config_of, globins, needs_hmmer, write_fasta
from records import make_record
from test_feature_store_pairing import arrays_of, with_keys
from test_feature_store_roundtrip import assert_equal, build

from foldfeed.feature_store import FeatureStore, InvalidRecordError, MsaRecord, StoreSettings, write_part
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.parsers.hit_names import taxonomy_id_of
from foldfeed.pipelines import run_build

ARRAY = "row_taxonomy_id"
SETTINGS = StoreSettings(tile_rows=8, tile_cols=8)


def with_ids(record: MsaRecord, ids: list[int] | None) -> MsaRecord:
    values = None if ids is None else np.array(ids, dtype=np.int32)
    return dataclasses.replace(record, rows=dataclasses.replace(record.rows, taxonomy_id=values))


def ids_of(store: FeatureStore, name: str) -> list[int | None]:
    return store[name].rows()["taxonomy_id"].to_pylist()


def test_ids_come_back_whichever_records_have_them(tmp_path):
    """Before, between and behind records with ids others have none, or nothing but zeros."""
    drawn = [None, [0, 9606, 0], None, [0, 0, 0], [0, 0, 562], None]
    records = [with_ids(make_record(f"r{n}", 3, 5, n), ids) for n, ids in enumerate(drawn)]
    records[2] = with_keys(records[2], ["", "1", ""])
    store = FeatureStore.create(tmp_path / "s", SETTINGS)
    for some in (records[:3], records[3:]):
        store.commit([write_part(store.url, some, store.settings).part_id], job_id=some[0].record_id)
    other = ConformanceReader(store.url)
    for _ in range(2):
        for record, ids in zip(records, drawn, strict=True):
            assert ids_of(store, record.record_id) == [one or None for one in ids or [0] * 3]
            assert_equal(store[record.record_id], record)
            assert other.fingerprint(record.record_id) == record.fingerprint
        sql = "select record_id, rank, taxonomy_id from rows where taxonomy_id is not null order by 1"
        assert store.query(sql).to_pylist() == [
            {"record_id": "r1", "rank": 1, "taxonomy_id": 9606},
            {"record_id": "r4", "rank": 2, "taxonomy_id": 562},
        ]
        assert verify(store.url, level="deep").problems == ()
        compact(store.url)
        store = FeatureStore.open(store.url)
    assert store.table(["part_id"])["part_id"].unique().to_pylist() == [store["r0"].part.part_id]


def test_parts_without_ids_are_the_same_bytes(tmp_path):
    record = make_record("x", 9, 12)
    stores = [
        build(tmp_path / name, [one], SETTINGS)
        for name, one in (("a", record), ("b", with_ids(record, [0] * 9)), ("c", with_ids(record, [7] * 9)))
    ]
    ids = [store["x"].part.part_id for store in stores]
    assert ids[0] == ids[1] != ids[2]
    assert len({store["x"].fingerprint for store in stores}) == 2
    assert [ARRAY in arrays_of(store)[0] for store in stores] == [False, False, True]


@pytest.mark.parametrize("bad", [np.zeros(2, np.int32), np.zeros(3, np.int64), np.full(3, -1, np.int32)])
def test_ids_that_cannot_be_are_refused(bad):
    record = make_record("x", 3, 5)
    with pytest.raises(InvalidRecordError, match=r"rows.taxonomy_id must be int32 \(3,\), 0 or more"):
        dataclasses.replace(record, rows=dataclasses.replace(record.rows, taxonomy_id=bad))


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (
            "UniRef90_A0A8C0C0Z5 x n=1 Tax=Buteo japonicus TaxID=224669 RepID=A0A8C0C0Z5_9AVES",
            224669,
        ),
        ("sp|Q8VCQ3|NRBF2_MOUSE/4-88 [subseq from] Factor 2 OS=Mus musculus OX=10090 GN=Nrbf2", 10090),
        ("UniRef100_A n=1 Tax=x TaxID=9606", 9606),
        ("UniRef100_A n=1 Tax=unknown TaxID= RepID=A", 0),
        ("TaxID=9606", 0),
        ("x BOX=9606", 0),
        ("x OX=9606a", 0),
        ("x OX=1234567890", 0),
        ("", 0),
    ],
)
def test_what_a_description_tells(header, wanted):
    assert taxonomy_id_of(header) == wanted


@pytest.mark.external_tool
@needs_hmmer
def test_a_build_keeps_the_ids_of_its_rows_when_it_is_told_to(tmp_path):
    entries = globins(6)
    queries = write_fasta(tmp_path / "q.fasta", {"q": next(iter(entries.values()))})
    told = {name: 9600 + number if number % 2 else 0 for number, name in enumerate(entries)}
    headed = {
        f"{name} globin n=1 Tax=Any {f'TaxID={told[name]} ' if told[name] else ''}RepID=X": residues
        for name, residues in entries.items()
    }
    database = write_fasta(tmp_path / "u.fasta", headed)
    plain = run_build(config_of(tmp_path / "plain", queries, [f"uniref90={database}"]))
    options = {"taxonomy_ids": True, "results": plain.results}
    report = run_build(config_of(tmp_path, queries, [f"uniref90={database}"], **options))
    assert (report.num_searched, report.job_id != plain.job_id) == (0, True)
    rows = FeatureStore.open(report.store)["q"].rows().to_pylist()
    assert len(rows) > 3
    for row in rows[1:]:
        assert (row["taxonomy_id"] or 0) == told[row["hit_id"].split("/")[0]]
    assert rows[0]["taxonomy_id"] is None
    assert set(ids_of(FeatureStore.open(plain.store), "q")) == {None}
    assert json.dumps(ARRAY) not in (next(Path(plain.store, "parts").iterdir()) / "zarr.json").read_text()
