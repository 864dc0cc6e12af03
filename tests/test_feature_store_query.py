"""SQL over records and over row provenance; views at a point in time; other libraries' forms."""

import dataclasses
import datetime
import json
import pickle
import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record
from sql_conditions import conditions

from foldfeed.feature_store import (
    CorruptDataError,
    FeatureStore,
    MissingExtraError,
    QueryError,
    RecordNotFoundError,
    write_part,
)
from foldfeed.feature_store.store.sql import LazyTable, sql

DATES = {"a1": "1999-12-31", "b2": "2021-09-30", "c3": "2021-10-01"}


@pytest.fixture
def dated_store(tmp_path):
    """Three records of known release dates and one without; one was searched in another database release."""
    store = FeatureStore.create(tmp_path / "dated")
    records = [
        dataclasses.replace(make_record(name, 3, 20, seed), extra={"release_date": date})
        for seed, (name, date) in enumerate(DATES.items())
    ]
    other = make_record("d4", 5, 7)
    uses = (dataclasses.replace(other.databases[0], digest="ab" * 32), other.databases[1])
    records.append(dataclasses.replace(other, databases=uses))
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="j")
    return store


def all_rows(store) -> list[dict]:
    return [{"record_id": name} | row for name in store.ids for row in store[name].rows().to_pylist()]


def test_rows_holds_every_row_of_every_record(small_store):
    assert small_store.query("from rows order by record_id, rank").to_pylist() == all_rows(small_store)
    counted = small_store.query(
        "select species, count(*) as n, min(e_value) as best from rows where database = 'uniref90' group by 1"
    )
    want: dict[str, list[float]] = {}
    for row in all_rows(small_store):
        if row["database"] == "uniref90":
            want.setdefault(row["species"], []).append(row["e_value"])
    assert {row["species"]: (row["n"], row["best"]) for row in counted.to_pylist()} == {
        name: (len(values), min(values)) for name, values in want.items()
    }


def test_rows_and_records_join(small_store):
    answer = small_store.query(
        "select record_id, depth, count(*) n from rows join records using (record_id) group by all order by 1"
    )
    assert answer.to_pylist() == [
        {"record_id": "a1", "depth": 1, "n": 1},
        {"record_id": "b2", "depth": 700, "n": 700},
        {"record_id": "c3", "depth": 37, "n": 37},
    ]
    both = small_store.query("select count(*) as n from rows a join rows b using (record_id, rank)")
    assert both.to_pylist() == [{"n": 738}]


def test_rows_of_a_condition(small_store):
    counts = small_store.query("select record_id, count(*) as n from rows group by 1", rows_of="depth < 100")
    assert sorted(counts["record_id"].to_pylist()) == ["a1", "c3"]
    with pytest.raises(QueryError, match="does not read the table 'rows'"):
        small_store.query("from records", rows_of="depth < 100")
    with pytest.raises(QueryError, match="Referenced column"):
        small_store.query("from rows", rows_of="deepness < 100")


def spy_tables(reads: list, num: int = 40):
    """A keyed lazy table of `num` keys with three rows each, that records what it was asked for."""
    schema = pa.schema([("record_id", pa.string()), ("rank", pa.int32()), ("score", pa.float64())])
    names = [f"r{number}" for number in range(num)]

    def make(only, columns):
        reads.append(only)
        for name in names:
            if only is None or name in only:
                whole = pa.record_batch(
                    {
                        "record_id": [name] * 3,
                        "rank": pa.array(range(3), pa.int32()),
                        "score": pa.array([0.5, None, float(len(name))]),
                    },
                    schema=schema,
                )
                yield whole.select(columns)

    records = pa.table({"record_id": names, "depth": list(range(num))})
    return {"records": records, "rows": LazyTable(schema, make, key="record_id")}, {
        "records": records,
        "rows": LazyTable(schema, make),
    }


RESTRICTED = [
    ("select * from rows where record_id = 'r7'", {"r7"}),
    ("select * from rows where 'r7' = record_id and rank > 1", {"r7"}),
    ("from rows r where r.record_id in ('r7', 'r11', 'none') order by all", {"r7", "r11", "none"}),
    ("select * from rows where record_id in ('r1','r2') and (record_id = 'r2' and rank = 0)", {"r2"}),
    ("select depth, score from rows join records using (record_id) where record_id = 'r3'", {"r3"}),
    (
        "select count(*) from records x join rows y on x.record_id = y.record_id where y.record_id = 'r3'",
        {"r3"},
    ),
    ("with t as (select * from ROWS where Record_ID = 'r9') select count(*) from t, t as u", {"r9"}),
    ("select * from records where depth in (select rank from rows where record_id = 'r1')", {"r1"}),
]
UNRESTRICTED = [
    "select * from rows",
    "select * from rows where record_id = 'r7' or rank = 0",
    "select * from rows where not (record_id = 'r7')",
    "select * from rows where record_id = 'r7' || ''",
    "select * from rows where record_id like 'r1%'",
    "select * from rows where record_id = (select max(record_id) from records)",
    "select * from rows where record_id not in ('r1')",
    "select * from rows where record_id in ('r1', null)",
    "select count(*) from rows a, rows b where a.record_id = 'r1' and b.record_id = 'r2'",
    "select x.record_id, y.rank from records x left join rows y on x.record_id = y.record_id"
    " where x.record_id = 'r3'",
    "select count(*) from records x left join rows y using (record_id) where record_id = 'r3'",
    "select rank, score from records x positional join rows y where y.record_id = 'r3'",
    "select record_id, count(*) filter (record_id = 'r3') from rows group by 1",
    "select record_id, count(*) from rows group by 1 having record_id = 'r3'",
    "with rows as (select 'r1' as record_id) select * from rows where record_id = 'r1'",
    "select * from rows as r(a, record_id, b) where a = 'r1'",
    "select * from rows where record_id = 5::varchar",
    "pivot (from rows) on rank using count(*)",
]


@pytest.mark.parametrize(("text", "keys"), RESTRICTED)
def test_a_condition_on_the_key_is_read_off_the_query(text, keys):
    reads: list = []
    fast, _ = spy_tables(reads)
    sql(fast, text)
    assert [set(only) for only in reads] == [keys] * len(reads)
    assert reads


@pytest.mark.parametrize("text", [text for text, _ in RESTRICTED] + UNRESTRICTED)
def test_reading_less_never_changes_an_answer(text):
    reads: list = []
    fast, full = spy_tables(reads)
    got, want = sql(fast, text), sql(full, text)
    order = [(name, "ascending") for name in want.column_names]
    assert got.sort_by(order).equals(want.sort_by(order))
    if text in UNRESTRICTED:
        assert set(reads) <= {None}


TERMS = [
    "record_id = 'r1'",
    "r.record_id in ('r1', 'r2', 'r3')",
    "'r2' = r.record_id",
    "record_id > 'r1'",
    "rank = 1",
    "score is null",
    "r.record_id <> 'r2'",
]


@settings(max_examples=60, deadline=None)
@given(
    condition=conditions(TERMS),
    source=st.sampled_from(["rows r", "rows r join records using (record_id)", "(from rows) r"]),
)
def test_any_condition_gives_the_answer_of_the_whole_table(condition, source):
    fast, full = spy_tables([], num=5)
    text = f"select r.record_id, rank, score from {source} where {condition} order by all"
    assert sql(fast, text).equals(sql(full, text))


def test_a_query_that_never_names_rows_reads_none():
    reads: list = []
    fast, _ = spy_tables(reads)
    sql(fast, "select sum(depth) over (order by depth rows between 1 preceding and current row) from records")
    assert reads == []


def test_damage_found_by_a_query_keeps_its_own_error(small_store):
    shard = next((small_store._blobs.root / "parts").glob("*/row_hit_id/c/0"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    assert FeatureStore.open(small_store.url).query("select count(*) as n from records")["n"].to_pylist() == [
        3
    ]
    with pytest.raises(CorruptDataError, match="row_hit_id"):
        FeatureStore.open(small_store.url).query("select max(hit_id) from rows")


@pytest.mark.parametrize(
    "text",
    [
        "select * from read_csv('/etc/passwd')",
        "copy records to '/tmp/x.csv'",
        "attach '/tmp/x.db'",
        "set enable_external_access = true",
        "select * from small_store",
        "insert into records values (1)",
        "select * from 'x.parquet'",
        "install httpfs",
    ],
)
def test_a_query_reaches_nothing_but_its_tables(small_store, text):
    with pytest.raises(QueryError):
        small_store.query(text)


def test_errors_name_the_tables(small_store):
    with pytest.raises(QueryError, match=r"'rows' with columns record_id, rank, database.*'splits' with"):
        small_store.query("select nothing from rows")
    with pytest.raises(QueryError, match="not a query"):
        small_store.query("")


def test_threads_ask_at_once(small_store):
    answers: list[int] = []

    def ask():
        answers.extend(small_store.query("select count(*) as n from rows")["n"].to_pylist())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [738] * 8


def test_as_of_a_date_keeps_what_was_public_then(dated_store):
    assert dated_store.as_of("2021-09-30", undated="drop").ids == ["a1", "b2"]
    assert dated_store.as_of(datetime.date(2021, 10, 1), undated="keep").ids == ["a1", "b2", "c3", "d4"]
    assert dated_store.as_of("1900-01-01", undated="drop").ids == []
    with pytest.raises(QueryError, match=r"1 of 4 records have no extra.release_date, e.g. 'd4'"):
        dated_store.as_of("2021-09-30")
    with pytest.raises(QueryError, match="YYYY-MM-DD"):
        dated_store.as_of("30.9.2021", undated="drop")
    with pytest.raises(QueryError, match="undated 'ignore' is not one of"):
        dated_store.as_of("2021-09-30", undated="ignore")


def test_dates_may_stand_in_a_column_of_ones_own(dated_store):
    days = [datetime.date(2000, 1, 1), datetime.date(2030, 1, 1)]
    columns = pa.table(
        {"record_id": ["a1", "d4"], "release_date": days, "seen": ["2030-01-01", "2000-01-01"]}
    )
    dated_store.annotate(columns, job_id="dates")
    assert dated_store.as_of("2021-09-30", undated="drop").ids == ["a1"]
    assert dated_store.as_of("2021-09-30", column="seen", undated="drop").ids == ["d4"]
    assert dated_store.as_of("2021-09-30", column="extra.release_date", undated="drop").ids == ["a1", "b2"]


def test_the_sql_recipe_agrees_with_as_of(dated_store):
    text = "select record_id from records where extra->>'release_date' <= '2021-09-30' order by 1"
    assert (
        dated_store.query(text)["record_id"].to_pylist()
        == dated_store.as_of("2021-09-30", undated="drop").ids
    )


def test_a_record_with_an_impossible_date_is_named(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    bad = dataclasses.replace(make_record("x", 2, 5), extra={"release_date": "soon"})
    store.commit([write_part(store.url, [bad], store.settings).part_id], job_id="j")
    with pytest.raises(QueryError, match=r"extra.release_date of 'x' is 'soon'"):
        store.as_of("2020-01-01")


def test_records_searched_with_one_release_of_a_database(dated_store):
    assert dated_store.searched_with("uniref90", "abababab").ids == ["d4"]
    assert dated_store.searched_with("mgnify", "0" * 64).ids == ["a1", "b2", "c3", "d4"]
    with pytest.raises(QueryError, match="8 hex digits"):
        dated_store.searched_with("uniref90", "ab")


def test_a_view_is_a_store_of_its_records(small_store):
    view = small_store.view("depth > 1")
    assert (len(view), view.ids, view.version) == (2, ["b2", "c3"], 1)
    assert list(view) == view.ids
    assert list(small_store) == small_store.ids == ["a1", "b2", "c3"]
    assert {name: view[name].length for name in view} == {name: small_store[name].length for name in view}
    assert "b2" in view
    assert "a1" not in view
    np.testing.assert_array_equal(view.at(1).msa(), small_store["c3"].msa())
    assert view["b2"].fingerprint == small_store["b2"].fingerprint
    with pytest.raises(RecordNotFoundError, match="a1"):
        view["a1"]
    with pytest.raises(IndexError, match=r"position 2 is outside 0\.\.1"):
        view.at(2)
    assert view.query("select distinct record_id from rows order by 1")["record_id"].to_pylist() == [
        "b2",
        "c3",
    ]
    assert view.table(["record_id"], "length < 100")["record_id"].to_pylist() == ["c3"]
    assert view.view("length < 100").ids == ["c3"]


def test_a_view_has_the_fingerprint_of_a_store_with_those_records(small_store, tmp_path):
    assert small_store.view("true").fingerprint == small_store.fingerprint
    other = FeatureStore.create(tmp_path / "other")
    part = write_part(other.url, [make_record("c3", 37, 65, seed=3)], other.settings)
    other.commit([part.part_id], job_id="x")
    assert small_store.view("record_id = 'c3'").fingerprint == other.fingerprint


def test_a_view_stays_what_it_was_when_the_store_moves_on(small_store):
    view = small_store.view("depth > 1")
    before = view.fingerprint
    part = write_part(small_store.url, [make_record("b2", 4, 130, seed=9)], small_store.settings)
    small_store.commit([part.part_id], job_id="job-2", on_existing="replace")
    assert small_store["b2"].depth == 4
    assert view["b2"].depth == 700
    copy = pickle.loads(pickle.dumps(view))
    assert (copy.fingerprint, copy.ids, copy["b2"].depth) == (before, ["b2", "c3"], 700)


def test_a_record_stays_what_it_was_when_its_store_moves_on(small_store):
    record = small_store["b2"]
    part = write_part(small_store.url, [make_record("a2", 4, 11, seed=9)], small_store.settings)
    small_store.commit([part.part_id], job_id="job-2")
    assert (record.record_id, record.description, record.length) == ("b2", "record b2", len(record.sequence))


def test_other_libraries_get_the_same_table(small_store):
    polars = pytest.importorskip("polars", reason="polars is not installed")
    frame = small_store.to_polars(["record_id", "depth"], "depth > 1")
    assert isinstance(frame, polars.DataFrame)
    assert frame.rows() == [("b2", 700), ("c3", 37)]
    pytest.importorskip("pandas", reason="pandas is not installed")
    assert small_store.to_pandas(["depth"])["depth"].tolist() == [1, 700, 37]


def test_features_of_a_record(small_store):
    record = small_store["c3"]
    found = record.features()
    assert {name: (array.shape, str(array.dtype)) for name, array in found.items()} == {
        "aatype": ((65,), "uint8"),
        "profile": ((65, 22), "float32"),
        "deletion_mean": ((65,), "float32"),
        "gap_fraction": ((65,), "float32"),
        "entropy": ((65,), "float32"),
        "neff": ((65,), "float32"),
    }
    full = record.features(msa=True)
    np.testing.assert_array_equal(full["msa"], record.msa())
    np.testing.assert_array_equal(full["deletions"], record.deletions())


def test_every_per_residue_array_is_read_in_one_way(small_store):
    part = write_part(small_store.url, [make_record("d4", 6, 700)], small_store.settings)
    small_store.commit([part.part_id], job_id="with N_eff")
    for name in ("c3", "d4"):
        record = small_store[name]
        methods = {
            "aatype": record.aatype,
            "profile": record.profile,
            "deletion_mean": record.deletion_mean,
            "gap_fraction": record.gap_fraction,
            "entropy": record.entropy_per_residue,
            "neff": record.neff_per_residue,
        }
        found = record.features()
        assert list(found) == list(methods)
        for array, method in methods.items():
            np.testing.assert_array_equal(method(), found[array])
            for window in (slice(3, 60), slice(-5, None), 7):
                ends = slice(7, 8) if window == 7 else window
                np.testing.assert_array_equal(method(window), found[array][ends])
                np.testing.assert_array_equal(record.per_residue(array, window), found[array][ends])
        np.testing.assert_array_equal(record.entropy(slice(3, 60)), found["entropy"][3:60])
    with pytest.raises(ValueError, match="no per-residue array 'msa'; there are aatype, profile"):
        record.per_residue("msa")
    with pytest.raises(IndexError):
        record.entropy(700)


def test_an_xarray_dataset_of_a_record(small_store):
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    record = small_store["c3"]
    data = record.to_xarray(msa=True)
    assert isinstance(data, xarray.Dataset)
    assert dict(data.sizes) == {"residue": 65, "token": 22, "row": 37}
    assert data.attrs["record_id"] == "c3"
    assert json.loads(data.attrs["databases"]) == record.databases
    assert "".join(data["amino_acid"].values) == record.sequence
    np.testing.assert_array_equal(data["msa"].sel(row=5), record.msa()[5])
    assert float(data["profile"].sel(token="-", residue=3)) == record.gap_fraction()[3]
    assert "row" not in record.to_xarray().sizes


def test_a_missing_library_is_named_with_the_extra_that_brings_it(small_store, monkeypatch):
    # None in sys.modules makes an import fail as it does where the library is not installed.
    for name in ("pandas", "polars", "xarray"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for call in (small_store.to_pandas, small_store.to_polars, small_store["c3"].to_xarray):
        with pytest.raises(MissingExtraError, match=r"pip install 'foldfeed\[analysis\]'"):
            call()


@pytest.mark.parametrize(
    "text", ["select 1; select 2", "select 1;;select 2;", "create table x(a int); select 1"]
)
def test_several_statements_are_refused_and_not_half_answered(small_store, text):
    with pytest.raises(QueryError, match="holds 2 statements; give one SELECT"):
        small_store.query(text)


def test_a_semicolon_behind_or_inside_one_statement_is_none_of_several(small_store):
    assert small_store.query("select 'a;b' as text; -- done; really").to_pylist() == [{"text": "a;b"}]
