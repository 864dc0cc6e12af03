"""Parameters and the time limit of a query: values stay values, and what takes too long is stopped."""

import threading
import time

import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_feature_store_query import spy_tables

from foldfeed.feature_store import QueryError, QueryTimeoutError
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.store.sql import LazyTable, sql
from foldfeed.feature_store.store.time_limit import TimeLimit

HOSTILE = [
    "x' or '1'='1",
    "'; drop table records; --",
    '"records"',
    "$other",
    "?",
    "a1\n' union all select 1",
    "\\'",
    "1e10",
    "null",
    "é\u202e{}%s",
]
# Each would run for minutes at the least.
ENDLESS = [
    "select count(*) from range(1000000) a, range(1000000) b where a.range * b.range % 7 = 3",
    "with recursive t(x) as (select 1 union all select x + 1 from t) select max(x) from t",
    "select count(*) from residues a, residues b, residues c, residues d, rows e"
    " where a.entropy + b.entropy + c.entropy + d.entropy > 99",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_parameter_is_a_value_whatever_it_says(small_store, text):
    for sql_text, params in (("select ? as v", [text]), ("select $x as v", {"x": text})):
        assert small_store.query(sql_text, params=params).to_pylist() == [{"v": text}]
    for table in ("records", "rows", "residues", "structures"):
        found = small_store.query(f"from {table} where record_id = $x", params={"x": text})
        assert len(found) == 0
        assert len(small_store.query(f"from {table} where record_id in $x", params={"x": [text]})) == 0
    assert small_store.query("select count(*) as n from records")["n"].to_pylist() == [3]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_comes_back(text):
    assert sql({}, "select $x as v, length($x) as n", {"x": text}).to_pylist() == [
        {"v": text, "n": len(text)}
    ]


def test_texts_are_cast_where_they_meet_numbers_and_dates(small_store):
    answer = small_store.query(
        "select record_id from records where depth > $d order by 1", params={"d": "36"}
    )
    assert answer["record_id"].to_pylist() == ["b2", "c3"]
    assert small_store.query(
        "select date '2020-02-01' > $d as late", params={"d": "2020-01-31"}
    ).to_pylist() == [{"late": True}]
    with pytest.raises(QueryError, match="Could not convert string 'deep'"):
        small_store.query("from records where depth > $d", params={"d": "deep"})


@pytest.mark.parametrize(
    ("text", "params", "message"),
    [
        ("from records where record_id = $x", None, r"no value for \$x: params={'x': ...}"),
        ("from records where record_id = $x", {}, r"no value for \$x"),
        ("from records where record_id = $x limit $N", {"x": "a"}, r"no value for \$N"),
        ("from records where record_id = ? limit ?", ["a"], r"no value for \? number 2: params=\["),
        ("from records where record_id = $x", {"x": "a", "y": 1}, "excess parameters: y"),
        ("from records where record_id = ?", ["a", "b"], "excess parameters: 2"),
        ("from records where record_id = ?", "a1", "'a1' is neither a list"),
        ("from records where record_id = ?", 3, "3 is neither a list"),
        ("from records where record_id = ?", [object()], "Unable to transform python value"),
        ("select $x; select $x", {"x": 1}, "holds 2 statements"),
        ("from $x", {"x": "records"}, "Parser Error"),
    ],
)
def test_parameters_that_do_not_fit_are_named(small_store, text, params, message):
    with pytest.raises(QueryError, match=message):
        small_store.query(text, params=params)


PARAMETERS = [
    ("select * from rows where record_id = ?", ["r7"], {"r7"}),
    ("select * from rows where rank >= ? and record_id in (?, 'r2', ?)", [1, "r7", "r9"], {"r7", "r2", "r9"}),
    ("from rows r where $id = r.record_id", {"id": "r7"}, {"r7"}),
    ("from rows r where $ID = r.record_id", {"id": "r7"}, {"r7"}),
    ("from rows where record_id in $ids and score is null", {"ids": ["r7", "no"]}, {"r7", "no"}),
    ("from rows where contains($ids, record_id)", {"ids": ("r7",)}, {"r7"}),
    ("from rows where record_id in $ids", {"ids": []}, set()),
    ("from rows where contains($id, record_id)", {"id": "r7 r8"}, None),
    ("from rows where record_id in $ids", {"ids": ["r7", None]}, None),
    ("from rows where record_id = $id or rank = $n", {"id": "r7", "n": 1}, None),
    ("from rows where record_id = $id", {"id": None}, None),
    ("from rows where record_id in ($a, $b)", {"a": "r7", "b": None}, None),
    ("from rows where record_id = $id || ''", {"id": "r7"}, None),
]


@pytest.mark.parametrize(("text", "params", "keys"), PARAMETERS)
def test_a_parameter_on_the_key_is_read_off_and_never_changes_an_answer(text, params, keys):
    reads: list = []
    fast, full = spy_tables(reads)
    got = sql(fast, text, params)
    asked = set(reads)
    want = sql(full, text, params)
    assert got.sort_by([("record_id", "ascending"), ("rank", "ascending")]).equals(
        want.sort_by([("record_id", "ascending"), ("rank", "ascending")])
    )
    assert asked <= {None if keys is None else frozenset(keys)}
    # DuckDB itself sees that null and an empty list keep nothing.
    assert asked or not len(want)


@pytest.mark.parametrize("params", [None, {"x": "1"}])
@pytest.mark.parametrize("text", ENDLESS)
def test_what_takes_too_long_is_stopped(small_store, text, params):
    if params:
        text = f"select * from ({text}) where 1 = $x"
    threads = set(threading.enumerate())
    started = time.monotonic()
    with pytest.raises(
        QueryTimeoutError, match=r"after its limit of 0.2 s; ask about fewer records"
    ) as caught:
        small_store.query(text, params=params, timeout_s=0.2)
    assert caught.value.timeout_s == 0.2
    assert 0.2 <= time.monotonic() - started < 20
    assert set(threading.enumerate()) == threads
    # DuckDB's own threads are not Python's; what they did would show in the time of this process.
    used = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - used < 0.15
    assert small_store.query("select count(*) as n from records")["n"].to_pylist() == [3]


def test_the_condition_of_rows_of_is_within_the_limit(small_store):
    with pytest.raises(QueryTimeoutError):
        small_store.query("from rows", rows_of=f"({ENDLESS[0]}) > 0", timeout_s=0.2)


def test_reading_that_keeps_nothing_is_stopped_between_batches():
    schema = pa.schema([("record_id", pa.string()), ("rank", pa.int64())])
    began, ended = threading.Event(), threading.Event()

    def make(only, columns):
        began.set()
        try:
            while True:
                yield pa.record_batch({"record_id": ["a"], "rank": [1]}, schema=schema).select(columns)
        finally:
            ended.set()

    seconds = 0.2
    while not began.is_set():
        # A busy machine may not even begin to read in that time.
        with pytest.raises(QueryTimeoutError):
            sql({"rows": LazyTable(schema, make)}, "from rows where rank = 7", limit=TimeLimit(seconds))
        seconds *= 2
    assert ended.is_set()


def test_a_limit_that_is_not_reached_changes_nothing(small_store):
    threads = set(threading.enumerate())
    text = "from residues order by record_id, position"
    assert small_store.query(text, timeout_s=600).equals(small_store.query(text))
    with pytest.raises(QueryError, match="Parser Error"):
        small_store.query("selec", timeout_s=600)
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_limit_must_be_one(small_store, limit):
    with pytest.raises(QueryError, match="must be above 0 and finite"):
        small_store.query("from records", timeout_s=limit)


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def test_the_command_binds_parameters_as_text(small_store):
    text = "select record_id, $note as note from records where depth > $d order by depth"
    out = run(
        "query", small_store.url, text, "--format", "csv", "--param", "d=36", "--param", "note=a=b'; --"
    )
    assert out.stdout == "record_id,note\nc3,a=b'; --\nb2,a=b'; --\n"
    # What looks like a number stays the text that an id is.
    out = run(
        "query", small_store.url, "select $id as v, typeof($id) as t", "--param", "id=1e10", "--format", "csv"
    )
    assert out.stdout == "v,t\n1e10,VARCHAR\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--param", "d"], 2, "'d' is not NAME=VALUE"),
        (["--param", "=3"], 2, "'=3' is not NAME=VALUE"),
        (["--param", "d=1", "--param", "D=2"], 2, "'D' is given twice"),
        (["--param", "other=1"], 1, "no value for $d: params={'d': ...}, or --param NAME=VALUE"),
        (["--param", "d=deep"], 1, "Could not convert string 'deep'"),
        (["--param", "d=1", "--timeout", "0"], 2, "--timeout"),
    ],
)
def test_wrong_options_are_named(small_store, args, code, message):
    result = run("query", small_store.url, "from records where depth > $d", *args)
    assert (result.exit_code, "Traceback" in result.output) == (code, False)
    assert message in result.stderr


def test_the_command_stops_a_query(small_store):
    result = run("query", small_store.url, ENDLESS[0], "--timeout", "0.2")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: the query was stopped after its limit of 0.2 s")
