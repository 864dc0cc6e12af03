"""The SQL tables `residues` and `structures`: values of records, no more read than a question needs."""

import dataclasses
import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record, make_structure
from sql_conditions import conditions
from test_feature_store_row_scan import CountingBlobs

from foldfeed.feature_store import CorruptDataError, FeatureStore, QueryError, write_part
from foldfeed.feature_store.format.alphabet import TOKENS
from foldfeed.feature_store.format.structure import NO_NUMBER
from foldfeed.feature_store.parts.residue_scan import RESIDUES_SCHEMA, residue_batches
from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.store import questions as source
from foldfeed.feature_store.store.sql import sql

# Lengths around the edges of a chunk of 512 residues; odd ones have a structure. Two parts, ids interleave.
LENGTHS = {"a": 1, "b": 511, "c": 2, "d": 1500, "e": 37, "f": 512, "g": 1, "h": 700, "i": 5, "j": 1023}
DELETED = "de"
FACTS = {
    "entry_id": "1ABC",
    "label_asym_id": "B",
    "auth_asym_id": "H",
    "method": "X-RAY DIFFRACTION",
    "resolution_angstrom": "1.85",
    "release_date": "2021-09-30",
}


def facts_record(name: str, length: int):
    record = make_record(name, 3 if name in "bfh" else 2, length, seed=ord(name))
    if name in "gij":
        record = dataclasses.replace(
            record, structure=dataclasses.replace(make_structure(length, ord(name)), source=FACTS)
        )
    return record


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Ten records in two parts; one of each part is deleted, so that its residues lie between living ones."""
    store = FeatureStore.create(tmp_path_factory.mktemp("residues") / "store")
    for number in range(2):
        records = [facts_record(name, LENGTHS[name]) for name in list(LENGTHS)[number::2]]
        store.commit([write_part(store.url, records, store.settings).part_id], job_id=f"job-{number}")
    store.delete(list(DELETED))
    return FeatureStore.open(store.url)


def number_or_none(value):
    return None if np.isnan(value) else value


def residues_of(record) -> list[dict]:
    """The table's rows of one record, by the methods of `Record`."""
    structure = record.structure()
    rows = []
    for at in range(record.length):
        row = {
            "record_id": record.record_id,
            "position": at,
            "letter": record.sequence[at],
            "profile": record.profile()[at].tolist(),
            "entropy": number_or_none(record.entropy()[at]),
            "gap_fraction": record.gap_fraction()[at],
            "deletion_mean": record.deletion_mean()[at],
            "neff": number_or_none(record.neff_per_residue()[at]),
            "observed": None if structure is None else bool(structure.observed[at]),
            "residue_number": None,
            "insertion_code": None,
        }
        if structure is not None:
            number, code = structure.residue_number[at], structure.insertion_code[at]
            row["residue_number"] = None if number == NO_NUMBER else int(number)
            row["insertion_code"] = chr(code) if code else None
        rows.append(row)
    return rows


def table_of(records) -> pa.Table:
    return pa.Table.from_pylist([row for record in records for row in residues_of(record)], RESIDUES_SCHEMA)


@pytest.fixture(scope="module")
def everything(store) -> pa.Table:
    return table_of(store[name] for name in store)


@pytest.fixture
def counting(store, monkeypatch) -> CountingBlobs:
    blobs = CountingBlobs(open_blobs(store.url))
    monkeypatch.setattr(source, "open_blobs", lambda url: blobs)
    return blobs


def test_residues_are_those_of_the_records(store, everything):
    got = store.query("from residues order by record_id, position")
    assert got.equals(everything)
    assert len(got) == sum(LENGTHS[name] for name in LENGTHS if name not in DELETED)
    nulls = {name: got[name].null_count for name in got.column_names}
    assert 0 < nulls["neff"] < len(got)
    assert 0 < nulls["observed"] < nulls["residue_number"] < len(got)
    assert 0 < nulls["insertion_code"] < len(got)
    assert nulls["entropy"] == 0


@settings(max_examples=40, deadline=None)
@given(
    columns=st.lists(st.sampled_from(RESIDUES_SCHEMA.names), min_size=1, unique=True),
    names=st.sets(st.sampled_from([name for name in LENGTHS if name not in DELETED])),
    size=st.sampled_from([1, 100, 512, 513, 1 << 16]),
)
def test_a_scan_gives_what_the_records_say(store, everything, columns, names, size):
    names |= {"a"} if size == 1 else set()
    if size == 1:
        names = {name for name in names if LENGTHS[name] < 10}
    index = store.index_rows()
    index = index.filter(pa.array([name in names for name in index["record_id"].to_pylist()]))
    wanted = list(dict.fromkeys([*columns, "record_id", "position"]))
    batches = list(residue_batches(open_blobs(store.url), index, wanted, size))
    assert all(0 < len(batch) <= size for batch in batches)
    schema = pa.schema([RESIDUES_SCHEMA.field(name) for name in wanted])
    order = [("record_id", "ascending"), ("position", "ascending")]
    found = pa.Table.from_batches(batches, schema).sort_by(order)
    chosen = everything.filter(pa.array([name in names for name in everything["record_id"].to_pylist()]))
    assert found.equals(chosen.select(wanted))


QUESTIONS = [
    ("select count(*) from residues", set()),
    ("select letter, max(position) from residues group by 1", set()),
    ("select count(*) from residues where entropy < 1.5", {"entropy"}),
    ("select record_id, max(gap_fraction) from residues where neff > 1 group by 1", {"gap_fraction", "neff"}),
    (
        f"select record_id, max(profile[instr('{TOKENS}', 'W')]) from residues group by 1",
        {"profile"},
    ),
    ("select sum(deletion_mean) from residues where position < 7", {"deletion_mean"}),
    ("select count(*) from residues where not observed", {"atom_mask"}),
    ("select min(residue_number), max(insertion_code) from residues", {"residue_number", "insertion_code"}),
    ("select count(*) from structures where resolution_angstrom < 2", set()),
    ("select release_date, count(*) from structures group by 1", set()),
    ("select record_id, num_observed from structures", {"atom_mask"}),
    (
        "select count(*) from residues join structures using (record_id) where entropy > 1 and model is null",
        {"entropy"},
    ),
]


@pytest.mark.parametrize(("text", "arrays"), QUESTIONS)
def test_arrays_that_a_question_does_not_need_are_not_read(store, everything, counting, text, arrays):
    got = store.query(text)
    assert counting.arrays == arrays
    structures = FeatureStore.open(store.url).query("from structures")
    want = sql({"records": store.index_rows(), "residues": everything, "structures": structures}, text)
    order = [(name, "ascending") for name in want.column_names]
    assert len(want)
    for name in want.column_names:
        a, b = (table.sort_by(order)[name].to_pylist() for table in (got, want))
        close = pa.types.is_floating(want.schema.field(name).type)
        assert a == (pytest.approx(b) if close else b)


@pytest.mark.parametrize(
    "text", ["record_id = 'j'", "record_id = $id", "record_id in $ids", "record_id in ($id)"]
)
@pytest.mark.parametrize("table", ["residues", "rows"])
def test_a_question_about_one_record_reads_its_part_alone(store, counting, table, text):
    params = {"id": "j"} if "$id" in text and "$ids" not in text else {"ids": ["j"]} if "$" in text else None
    array = {"residues": "entropy", "rows": "e_value"}[table]
    got = store.query(f"select record_id, {array} from {table} where {text}", params=params)
    assert len(got) == {"residues": LENGTHS["j"], "rows": store["j"].depth}[table]
    row = store.table(where="record_id = 'j'").to_pylist()[0]
    assert counting.parts == {row["part_id"]}
    if table == "residues":
        # The shard's index, then the chunks that hold the record's residues and no others.
        first, last = row["first_residue"] // 512, (row["first_residue"] + row["length"] - 1) // 512
        stored = store._part(row["part_id"]).arrays["entropy"].bytes_stored(range(first, last + 1))
        assert [size for _, _, size in counting.reads][1:] == [stored]


def test_rows_of_holds_for_what_lies_beside_a_record(store):
    for table in ("residues", "structures"):
        got = store.query(f"select distinct record_id from {table} order by 1", rows_of="length > 600")
        assert got["record_id"].to_pylist() == (["h", "j"] if table == "residues" else ["j"])
    with pytest.raises(QueryError, match="does not read the table 'rows' or 'residues' or 'structures'"):
        store.query("from records", rows_of="length > 600")


TERMS = [
    "record_id in ('a', 'h', 'd')",
    "r.record_id = 'h'",
    "position between 3 and 40",
    "letter = 'W'",
    "entropy > 1",
    "neff is null",
    "neff > 1.5",
    "gap_fraction <= 0.5",
    "profile[1] > 0",
    "observed",
    "residue_number % 2 = 1",
    "insertion_code is not null",
]


@settings(max_examples=40, deadline=None)
@given(
    condition=conditions(TERMS),
    columns=st.lists(st.sampled_from(RESIDUES_SCHEMA.names), min_size=1, unique=True),
)
def test_any_condition_gives_the_answer_of_the_whole_table(store, everything, condition, columns):
    text = f"select {', '.join(columns)} from residues r where {condition} order by record_id, position"
    assert store.query(text).equals(sql({"residues": everything}, text))


def test_structures_have_typed_facts(store):
    got = {row["record_id"]: row for row in store.query("from structures").to_pylist()}
    assert sorted(got) == [name for name in store if store[name].structure() is not None]
    for name, row in got.items():
        structure = store[name].structure()
        assert (row["num_residues"], row["num_observed"]) == (structure.length, int(structure.observed.sum()))
        assert row["entry_id"] == structure.source["entry_id"]
    want = FACTS | {"resolution_angstrom": 1.85, "release_date": datetime.date(2021, 9, 30)}
    assert {name: got["j"][name] for name in want} == want
    assert got["b"]["release_date"] is None
    assert got["b"]["model"] == "1"


@pytest.mark.parametrize(
    ("fact", "text"),
    [("resolution_angstrom", "1e400"), ("resolution_angstrom", "high"), ("release_date", "20210101")],
)
def test_a_fact_that_cannot_be_read_names_its_record(tmp_path, fact, text):
    store = FeatureStore.create(tmp_path / "s")
    structure = dataclasses.replace(make_structure(9), source={fact: text, "entry_id": "x"})
    record = dataclasses.replace(make_record("r1", 2, 9), structure=structure)
    store.commit([write_part(store.url, [record], store.settings).part_id], job_id="j")
    with pytest.raises(QueryError, match=f"{fact} of the structure of 'r1' is '{text}'.*->>'{fact}'"):
        store.query(f"select {fact} from structures")
    assert store.query("select entry_id from structures")["entry_id"].to_pylist() == ["x"]
    assert store.query(f"select structure->>'{fact}' as f from records")["f"].to_pylist() == [text]


def test_a_version_and_a_view_show_their_own_values(store, tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    old, new = make_record("x", 3, 21), make_record("x", 5, 21, seed=7)
    other = make_record("y", 2, 8)
    for job, records in (("one", [old]), ("two", [new, other])):
        part = write_part(store.url, records, store.settings).part_id
        store.commit([part], job_id=job, on_existing="replace")
    first, second = (FeatureStore.open(store.url, version) for version in (1, 2))
    text = "from residues order by record_id, position"
    assert first.query(text).equals(table_of([first["x"]]))
    assert second.query(text).equals(table_of([second["x"], second["y"]]))
    assert second.view("length < 10").query(text).equals(table_of([second["y"]]))
    assert not first.query(text).equals(second.view("record_id = 'x'").query(text))


def test_a_store_without_records_or_structures_answers_with_none(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    assert store.query("from residues").schema.names == RESIDUES_SCHEMA.names
    assert len(store.query("from residues")) == len(store.query("from structures")) == 0


def test_damage_found_by_a_question_keeps_its_own_error(small_store):
    shard = next((small_store._blobs.root / "parts").glob("*/entropy/c/0"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    store = FeatureStore.open(small_store.url)
    assert len(store.query("select gap_fraction from residues")) == 9 + 130 + 65
    with pytest.raises(CorruptDataError, match="entropy"):
        store.query("select max(entropy) from residues")


def test_a_limit_ends_the_reading(store, counting):
    assert len(store.query("select profile from residues limit 3")) == 3
    assert len(counting.parts) == 1
