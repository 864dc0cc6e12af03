"""The table `rows`: only what a question needs is read, piece by piece, and the answer is the same."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record
from sql_conditions import conditions

from foldfeed.feature_store import CorruptDataError, FeatureStore, QueryError, write_part
from foldfeed.feature_store.parts import row_scan
from foldfeed.feature_store.parts.row_scan import ROWS_SCHEMA, row_batches
from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.store import query_tables
from foldfeed.feature_store.store import questions as source
from foldfeed.feature_store.store.sql import sql

# Depths around the edges of a chunk of 4,096 rows, spread over two parts whose ids interleave.
DEPTHS = {"a": 1, "b": 4095, "c": 2, "d": 9000, "e": 37, "f": 4096, "g": 1, "h": 700, "i": 5, "j": 6000}


class CountingBlobs:
    """Files of a store, and which parts of them were read."""

    def __init__(self, blobs) -> None:
        self._blobs = blobs
        self.reads: list[tuple[str, int, int]] = []

    def __getattr__(self, name):
        return getattr(self._blobs, name)

    def open_range(self, path):
        read = self._blobs.open_range(path)

        def counted(start, size):
            self.reads.append((path, start, size))
            return read(start, size)

        return counted

    @property
    def arrays(self) -> set[str]:
        return {path.split("/")[2] for path, _, _ in self.reads}

    @property
    def parts(self) -> set[str]:
        return {path.split("/")[1] for path, _, _ in self.reads}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Ten records in two parts; one of each part is deleted, so that its rows lie between living ones."""
    store = FeatureStore.create(tmp_path_factory.mktemp("rows") / "store")
    for number in range(2):
        names = list(DEPTHS)[number::2]
        records = [make_record(name, DEPTHS[name], 3, seed=ord(name)) for name in names]
        part = write_part(store.url, records, store.settings)
        store.commit([part.part_id], job_id=f"job-{number}")
    store.delete(["d", "e"])
    return FeatureStore.open(store.url)


@pytest.fixture(scope="module")
def everything(store) -> pa.Table:
    """All rows, record by record, by the reader that serves single records."""
    tables = []
    for name in store.ids:
        rows = store[name].rows()
        tables.append(rows.add_column(0, "record_id", pa.repeat(name, len(rows))))
    return pa.concat_tables(tables).cast(ROWS_SCHEMA).combine_chunks()


@pytest.fixture
def counting(store, monkeypatch) -> CountingBlobs:
    blobs = CountingBlobs(open_blobs(store.url))
    monkeypatch.setattr(source, "open_blobs", lambda url: blobs)
    return blobs


@settings(max_examples=40, deadline=None)
@given(
    columns=st.lists(st.sampled_from(ROWS_SCHEMA.names), min_size=1, unique=True),
    names=st.sets(st.sampled_from([name for name in DEPTHS if name not in "de"])),
    batch_rows=st.sampled_from([1000, 4096, 5000, 1 << 16]),
)
def test_a_scan_gives_what_the_records_say(store, everything, columns, names, batch_rows):
    index = store.index_rows()
    index = index.filter(pa.array([name in names for name in index["record_id"].to_pylist()]))
    wanted = [*columns, *(name for name in ("record_id", "rank") if name not in columns)]
    batches = list(row_batches(open_blobs(store.url), index, wanted, batch_rows))
    assert all(0 < len(batch) <= batch_rows for batch in batches)
    schema = pa.schema([ROWS_SCHEMA.field(name) for name in wanted])
    found = pa.Table.from_batches(batches, schema).sort_by(
        [("record_id", "ascending"), ("rank", "ascending")]
    )
    chosen = everything.filter(pa.array([name in names for name in everything["record_id"].to_pylist()]))
    assert found.equals(chosen.select(wanted))


def test_long_names_end_a_batch_early(store, everything, monkeypatch):
    monkeypatch.setattr(row_scan, "BATCH_NAME_BYTES", 500)
    batches = list(
        row_batches(open_blobs(store.url), store.index_rows(), ["record_id", "hit_id", "rank"], 5000)
    )
    sizes = [sum(len(name.encode()) for name in batch["hit_id"].to_pylist()) for batch in batches]
    assert max(sizes) <= 500
    assert sum(map(len, batches)) == len(everything)
    # A name that is longer than the limit comes alone.
    monkeypatch.setattr(row_scan, "BATCH_NAME_BYTES", 1)
    index = store.index_rows().slice(0, 3)
    batches = list(row_batches(open_blobs(store.url), index, ["hit_id"], 5000))
    assert [len(batch) for batch in batches] == [1] * sum(index["depth"].to_pylist())


QUESTIONS = [
    ("select count(*) from rows", set()),
    ("select record_id, max(rank) from rows group by 1", set()),
    ("select database, count(*) from rows group by 1", {"row_database"}),
    ("select count(*) from rows where e_value < 0.5", {"row_e_value"}),
    (
        "select database, count(*) from rows where bit_score > 0.3 group by 1",
        {"row_database", "row_bit_score"},
    ),
    (
        "select database, species, avg(e_value) from rows where rank < 9 or e_value is null group by all",
        {"row_database", "row_species", "row_e_value"},
    ),
    ("select max(length(hit_id)) from rows", {"row_hit_id", "row_hit_id_bytes"}),
    (
        "select count(*) from rows join records using (record_id) where depth > 4000 and species = 'HUMAN'",
        {"row_species"},
    ),
]


@pytest.mark.parametrize(("text", "arrays"), QUESTIONS)
def test_arrays_that_a_question_does_not_need_are_not_read(store, everything, counting, text, arrays):
    got = store.query(text)
    assert counting.arrays == arrays
    want = sql({"records": store.index_rows(), "rows": everything}, text)
    order = [(name, "ascending") for name in want.column_names]
    close = [pa.types.is_floating(field.type) for field in want.schema]
    for column, is_close in zip(want.column_names, close, strict=True):
        a, b = (table.sort_by(order)[column].to_pylist() for table in (got, want))
        assert a == (pytest.approx(b) if is_close else b)


@pytest.mark.parametrize("name", ["a", "h", "j"])
def test_a_question_about_one_record_reads_that_record_alone(store, everything, counting, name):
    text = f"from rows where record_id = '{name}' order by rank"
    assert store.query(text).equals(sql({"rows": everything}, text))
    row = store.table(where=f"record_id = '{name}'").to_pylist()[0]
    assert counting.parts == {row["part_id"]}
    # A shard's index, then one run of neighbouring chunks: those that hold the record's rows.
    part = store._part(row["part_id"])
    allowed = {
        array: part.arrays[array].bytes_stored(
            range(row["first_row"] // 4096, (row["first_row"] + row["depth"] - 1) // 4096 + 1)
        )
        for array in ("row_database", "row_e_value", "row_bit_score", "row_species", "row_hit_id_bytes")
    }
    for array, limit in allowed.items():
        sizes = [size for path, _, size in counting.reads if path.split("/")[2] == array]
        assert len(sizes) == 2, array
        assert sizes[1] == limit, array


TERMS = [
    "record_id in ('a', 'h', 'd')",
    "r.record_id = 'h'",
    "rank between 3 and 40",
    "database = 'uniref90'",
    "database is null",
    "e_value > 0.25",
    "e_value is null",
    "bit_score <= 0.5",
    "hit_id like '%7/1-3%'",
    "hit_id = 'Hit_5/1-3·é'",
    "species in ('HUMAN', '9BACT')",
    "species <> ''",
    "rank % 7 = 3",
]


@settings(max_examples=60, deadline=None)
@given(
    condition=conditions(TERMS),
    columns=st.lists(st.sampled_from(ROWS_SCHEMA.names), min_size=1, unique=True),
)
def test_any_condition_gives_the_answer_of_the_whole_table(store, everything, condition, columns):
    text = f"select {', '.join(columns)} from rows r where {condition} order by record_id, rank"
    assert store.query(text).equals(sql({"rows": everything}, text))


def test_a_limit_ends_the_reading(store, counting):
    whole = sum(store.table(["depth"])["depth"].to_pylist())
    seen = []
    make = row_scan.row_batches

    def watched(*args):
        for batch in make(*args, 1000):
            seen.append(len(batch))
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query_tables, "row_batches", watched)
        assert len(store.query("select hit_id from rows limit 3")) == 3
    assert sum(seen) < whole / 2


def test_row_table_selects_columns_and_rows(store, everything):
    assert store.row_table().equals(everything)
    got = store.row_table(["hit_id", "rank"], "species = 'HUMAN' and e_value < 0.1")
    want = [
        {"hit_id": row["hit_id"], "rank": row["rank"]}
        for row in everything.to_pylist()
        if row["species"] == "HUMAN" and row["e_value"] is not None and row["e_value"] < 0.1
    ]
    assert got.to_pylist() == want
    assert len(want) > 100
    assert store.row_table(where="rank > 100000").schema == ROWS_SCHEMA
    view = store.view("depth < 10")
    assert view.row_table(["record_id"])["record_id"].to_pylist() == [
        name for name in view.ids for _ in range(DEPTHS[name])
    ]


def test_row_table_names_what_is_wrong(store):
    with pytest.raises(QueryError, match=r"no column 'score'; the table rows has record_id, rank, database"):
        store.row_table(["score"])
    with pytest.raises(QueryError, match="Referenced column"):
        store.row_table(where="score > 1")
    with pytest.raises(QueryError):
        store.row_table(where="true) union all (select 1")


def test_a_row_of_an_unknown_database_is_damage(store):
    index = store.index_rows()
    none = pa.array([[]] * len(index), index.schema.field("databases").type)
    index = index.set_column(index.column_names.index("databases"), "databases", none)
    with pytest.raises(CorruptDataError, match="row_database: a row names a database"):
        list(row_batches(open_blobs(store.url), index, ["database"]))


def test_names_that_are_no_text_are_damage(store, monkeypatch):
    read = row_scan.PartReader

    class Flipped(read):
        def __init__(self, blobs, part_id):
            super().__init__(blobs, part_id)
            names = self.arrays["row_hit_id"]
            whole = names.read

            def flipped(start, stop):
                text = whole(start, stop)
                return np.where(np.arange(len(text)) == len(text) // 2, 0xFF, text).astype(np.uint8)

            monkeypatch.setattr(names, "read", flipped)

    monkeypatch.setattr(row_scan, "PartReader", Flipped)
    with pytest.raises(CorruptDataError, match=r"row_hit_id: it is not UTF-8"):
        store.query("select max(hit_id) from rows")
