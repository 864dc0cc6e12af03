"""Splits that no cluster straddles, and record sets that keep their meaning."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record

from foldfeed.feature_store import (
    CorruptDataError,
    FeatureStore,
    FormatVersionError,
    LeakageError,
    NameNotFoundError,
    NameTakenError,
    QueryError,
    RecordSetMismatchError,
    SplitError,
    write_part,
)
from foldfeed.feature_store.index import sealed
from foldfeed.feature_store.store import splits
from foldfeed.loader import CropLoader, Recipe

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
GOLDEN_PARTS = "rrarrrrerarr"


@pytest.fixture
def families(tmp_path):
    """A store of 60 records in 20 clusters of three."""
    store = FeatureStore.create(tmp_path / "families")
    records = [
        dataclasses.replace(make_record(f"p{n:02d}", 2, 30 + n, n), extra={"cluster": f"c{n % 20}"})
        for n in range(60)
    ]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="j")
    return store


@pytest.fixture
def cut(families):
    return families.save_split("by-cluster", "extra.cluster", fractions=FRACTIONS, seed=7)


def test_a_split_keeps_clusters_together(families, cut):
    assert families.split("by-cluster") == cut or families.split("by-cluster").table.equals(cut.table)
    answer = families.query(
        "select cluster_id, count(distinct part) as parts, count(*) as n from splits group by 1"
    )
    assert {(row["parts"], row["n"]) for row in answer.to_pylist()} == {(1, 3)}
    together = [name for part in FRACTIONS for name in cut.ids(part)]
    assert sorted(together) == families.ids
    with pytest.raises(SplitError, match="no part 'dev'"):
        cut.ids("dev")


def test_the_part_of_a_cluster_is_fixed_for_ever():
    """Golden values: another foldfeed must put a cluster where this one did."""
    parts = [splits.part_of_cluster(f"c{n}", 7, FRACTIONS) for n in range(12)]
    assert "".join(part[1] for part in parts) == GOLDEN_PARTS
    other = [splits.part_of_cluster(f"c{n}", 8, FRACTIONS) for n in range(12)]
    assert other != parts


def test_a_store_that_grows_keeps_the_parts_of_its_clusters(families, cut):
    more = [dataclasses.replace(make_record("q1", 2, 9), extra={"cluster": "c3"})]
    families.commit([write_part(families.url, more, families.settings).part_id], job_id="k")
    later = families.save_split("later", "extra.cluster", fractions=FRACTIONS, seed=7)
    old = dict(zip(cut.table["record_id"].to_pylist(), cut.table["part"].to_pylist(), strict=True))
    new = dict(zip(later.table["record_id"].to_pylist(), later.table["part"].to_pylist(), strict=True))
    assert {name: new[name] for name in old} == old
    assert new["q1"] == old["p03"]


@settings(max_examples=50, deadline=None)
@given(
    clusters=st.lists(st.text(max_size=4), min_size=1, max_size=60),
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(-(2**70), 2**70),
)
def test_every_split_of_anything_keeps_its_invariant(clusters, shares, seed):
    index = pa.table(
        {
            "record_id": [f"r{n:03d}" for n in range(len(clusters))],
            "sequence_sha256": [f"{n}" for n in range(len(clusters))],
        }
    )
    fractions = {f"p{n}": share / sum(shares) for n, share in enumerate(shares)}
    made = splits.make_split("x", index, clusters, seed=seed, fractions=fractions, source="")
    splits.check(made.table)
    parts: dict[str, set[str]] = {}
    for cluster, part in zip(clusters, made.table["part"].to_pylist(), strict=True):
        parts.setdefault(cluster, set()).add(part)
    assert all(len(found) == 1 for found in parts.values())


def test_parts_get_their_share_of_many_clusters():
    parts = [splits.part_of_cluster(str(n), 1, FRACTIONS) for n in range(20000)]
    shares = {part: parts.count(part) / len(parts) for part in FRACTIONS}
    # Five standard deviations of a binomial with n = 20,000 and p = 0.8 are 0.014.
    assert all(abs(shares[part] - share) < 0.015 for part, share in FRACTIONS.items())


@pytest.mark.parametrize(
    "fractions",
    [{}, {"train": 0.5}, {"train": 0.7, "test": 0.4}, {"train": 1.5, "test": -0.5}, {"a": float("nan")}],
)
def test_fractions_must_add_up(families, fractions):
    with pytest.raises(SplitError, match="add up to 1"):
        families.save_split("bad", "extra.cluster", fractions=fractions, seed=1)


def test_every_record_needs_a_cluster(families):
    with pytest.raises(SplitError, match=r"59 of 60 records have no cluster"):
        families.save_split("x", {"p05": "c"}, fractions=FRACTIONS, seed=1)
    with pytest.raises(SplitError, match="no column 'nothing'"):
        families.save_split("x", "nothing", fractions=FRACTIONS, seed=1)
    with pytest.raises(SplitError, match="member 'name' is not one of"):
        families.save_split("x", {}, member="name", fractions=FRACTIONS, seed=1)


def test_clusters_may_come_by_sequence_or_from_a_column_of_ones_own(families):
    rows = families.table(["record_id", "sequence", "sequence_sha256"]).to_pylist()
    tables = [
        families.save_split(
            f"by-{member}",
            {row[member]: f"c{int(row['record_id'][1:]) % 20}" for row in rows},
            member=member,
            fractions=FRACTIONS,
            seed=7,
        ).table
        for member in ("record_id", "sequence", "sequence_sha256")
    ]
    column = pa.table({"record_id": families.ids, "family": [f"c{n % 20}" for n in range(60)]})
    families.annotate(column, job_id="a")
    tables.append(families.save_split("by-column", "family", fractions=FRACTIONS, seed=7).table)
    assert all(table.equals(tables[0]) for table in tables)


def test_equal_sequences_cannot_be_in_two_parts(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    twin = make_record("a", 1, 30)
    records = [twin, dataclasses.replace(twin, record_id="b")]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="j")
    clusters = [{"a": f"{n}", "b": f"other {n}"} for n in range(100)]
    apart = next(
        pair
        for pair in clusters
        if len({splits.part_of_cluster(name, 1, FRACTIONS) for name in pair.values()}) == 2
    )
    with pytest.raises(LeakageError, match="sequences"):
        store.save_split("x", apart, fractions=FRACTIONS, seed=1)


def test_clusters_are_read_from_mmseqs_tables(tmp_path):
    path = tmp_path / "clusters.tsv"
    path.write_text("# made by hand\nrepA\trepA\nrepA\tb\n\nrepC\tc\r\n")
    assert splits.read_cluster_tsv(path) == {"repA": "repA", "b": "repA", "c": "repC"}
    path.write_text("b\trepA\n")
    assert splits.read_cluster_tsv(path, "member-cluster") == {"b": "repA"}
    for text, message in [
        ("a b\n", "line 1: 1 columns"),
        ("a\tb\tc\n", "line 1: 3 columns"),
        ("a\t\n", "line 1"),
        ("x\tm\ny\tm\n", "line 2: 'm' is in 'x' and 'y'"),
    ]:
        path.write_text(text)
        with pytest.raises(SplitError, match=message):
            splits.read_cluster_tsv(path)
    path.write_bytes(b"a\t\xff\xfe\n")
    with pytest.raises(SplitError, match="UTF-8"):
        splits.read_cluster_tsv(path)
    with pytest.raises(SplitError, match="layout 'csv'"):
        splits.read_cluster_tsv(path, "csv")


def test_a_set_is_what_the_query_said_when_it_was_saved(families):
    made = families.save_set("long", "select record_id from records where length >= 80 order by random()")
    assert made.ids == [f"p{n}" for n in range(50, 60)]
    view = families.subset("long")
    assert (view.ids, view.fingerprint, len(made)) == (made.ids, made.fingerprint, 10)
    assert families.set("long") == made
    assert families.set_names() == ["long"]
    more = [make_record("q9", 3, 99)]
    families.commit([write_part(families.url, more, families.settings).part_id], job_id="k")
    assert families.subset("long").ids == made.ids
    rows = families.query("select name, count(*) as n from sets group by 1").to_pylist()
    assert rows == [{"name": "long", "n": 10}]


def test_a_set_is_read_without_us(families):
    made = families.save_set("long", "from records where length >= 80")
    path = families._blobs.root / "sets" / "long.parquet"
    table = pq.read_table(path)
    assert table["record_id"].to_pylist() == made.ids
    about = json.loads(table.schema.metadata[b"foldfeed"])
    assert (about["format"], about["version"], about["name"], about["num_records"]) == (
        "record set",
        1,
        "long",
        10,
    )
    assert about["sql"] == "from records where length >= 80"
    assert about["store_version"] == 1


def test_fingerprints_are_those_of_the_specification(families, cut):
    """Computed from FORMAT.md's text, with pyarrow alone."""
    families.save_set("t", "from splits where part = 'train'", within=("by-cluster", "train"))
    root = families._blobs.root

    def read(path):
        table = pq.read_table(root / path)
        return table.to_pylist(), json.loads(table.schema.metadata[b"foldfeed"])

    rows, about = read("splits/by-cluster.parquet")
    digest = hashlib.sha256(json.dumps([about["seed"], about["fractions"]]).encode() + b"\n")
    for row in rows:
        digest.update(json.dumps([row["record_id"], row["cluster_id"], row["part"]]).encode() + b"\n")
        u = int.from_bytes(
            hashlib.sha256(json.dumps([about["seed"], row["cluster_id"]]).encode()).digest()[:8]
        )
        ends = itertools.accumulate(share for _, share in about["fractions"])
        want = [
            part
            for (part, _), end in zip(about["fractions"], ends, strict=True)
            if math.floor(end * 2**64) > u
        ]
        assert row["part"] == want[0]
    assert about["fingerprint"] == digest.hexdigest() == cut.fingerprint

    rows, about = read("sets/t.parquet")
    within = about["within"]
    assert within["fingerprint"] == cut.fingerprint
    digest = hashlib.sha256(
        json.dumps([within["split"], within["part"], within["fingerprint"]]).encode() + b"\n"
    )
    version = hashlib.sha256((root / "foldfeed.json").read_bytes())
    for row in rows:
        digest.update(f"{row['record_id']}\0{row['fingerprint']}\n".encode())
        version.update(f"{row['record_id']}\0{row['fingerprint']}\n".encode())
    assert about["fingerprint"] == digest.hexdigest()
    assert families.subset("t").fingerprint == version.hexdigest()


def test_whole_shares_come_back(families):
    families.save_split("one", "extra.cluster", fractions={"all": 1}, seed=1)
    assert families.split("one").ids("all") == families.ids


def test_a_name_never_changes_its_meaning(families):
    first = families.save_set("s", "select record_id from records limit 3")
    again = families.save_set("s", "select record_id from records order by record_id limit 3")
    assert again == first
    with pytest.raises(NameTakenError, match="record set 's' exists with other content"):
        families.save_set("s", "select record_id from records")
    families.save_split("x", "extra.cluster", fractions=FRACTIONS, seed=1)
    families.save_split("x", "extra.cluster", fractions=FRACTIONS, seed=1)
    with pytest.raises(NameTakenError, match="split 'x'"):
        families.save_split("x", "extra.cluster", fractions=FRACTIONS, seed=2)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", ".hidden", "-x", "a" * 101, "a b", "ä", "a\n"]
)
def test_names_cannot_leave_the_store(families, name):
    with pytest.raises(QueryError, match="cannot name a record set"):
        families.save_set(name, "from records")
    with pytest.raises(QueryError, match="cannot name a record set"):
        families.subset(name)
    with pytest.raises(QueryError, match="cannot name a split"):
        families.save_split(name, "extra.cluster", fractions=FRACTIONS, seed=1)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("select length from records", "needs a column 'record_id'"),
        ("select record_id from records where false", "0 record ids"),
        ("select 'nobody' as record_id", "1 record ids, of which 0"),
        ("select 5 as record_id", "record ids are text"),
        ("nonsense", "Parser Error"),
    ],
)
def test_what_cannot_be_a_set(families, sql, message):
    with pytest.raises(QueryError, match=message):
        families.save_set("s", sql)
    assert families.set_names() == []


def test_unknown_names_are_told_with_the_known_ones(families):
    with pytest.raises(NameNotFoundError, match="no record set 'x'; the store has none"):
        families.subset("x")
    families.save_set("s", "from records")
    with pytest.raises(NameNotFoundError, match="no record set 'x'; there are 's'"):
        families.set("x")
    with pytest.raises(NameNotFoundError, match="no split 'x'"):
        families.split("x")


def test_a_set_from_train_holds_no_record_of_a_held_out_cluster(families, cut):
    inside = "select record_id from splits where name = 'by-cluster' and part = 'train'"
    made = families.save_set("train", inside, within=("by-cluster", "train"))
    assert made.ids == cut.ids("train")
    assert families.set("train").within.fingerprint == cut.fingerprint
    leaked = cut.ids("test")[0]
    with pytest.raises(LeakageError, match="keeps out of 'train'") as caught:
        families.save_set("bad", f"{inside} union all select '{leaked}'", within=("by-cluster", "train"))
    assert caught.value.items == (leaked,)
    more = [make_record("q9", 3, 99)]
    families.commit([write_part(families.url, more, families.settings).part_id], job_id="k")
    with pytest.raises(LeakageError, match="does not know"):
        families.save_set("bad", "select 'q9' as record_id", within=("by-cluster", "train"))
    # The same records without the promise are another set.
    with pytest.raises(NameTakenError):
        families.save_set("train", inside)


def test_a_set_from_another_version_says_so(families):
    families.save_set("all", "from records")
    changed = [make_record("p00", 5, 31, seed=77)]
    part = write_part(families.url, changed, families.settings)
    families.commit([part.part_id], job_id="k", on_existing="replace")
    families.delete(["p01"], job_id="d")
    with pytest.raises(
        RecordSetMismatchError, match=r"1 of its records are missing and 1 have other"
    ) as caught:
        families.subset("all")
    assert (caught.value.missing, caught.value.changed) == (("p01",), ("p00",))
    assert len(FeatureStore.open(families.url, version=1).subset("all")) == 60
    error = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.changed) == (str(caught.value), ("p00",))


def rewritten(path, change):
    """Writes a named table again after a change to (table, description)."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"foldfeed"])
    table, about = change(table, about)
    if about:
        rest = {key: value for key, value in about.items() if key != sealed.KEY}
        about = rest | {sealed.KEY: sealed.digest(rest)}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"foldfeed": json.dumps(about)}), buffer)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, a: (t.slice(1), a), CorruptDataError, "do not match their fingerprint"),
        (lambda t, a: (t, a | {"fingerprint": "0" * 64}), CorruptDataError, "do not match"),
        (lambda t, a: (t, a | {"name": "other"}), CorruptDataError, "'other'"),
        (lambda t, a: (t, a | {"version": 2}), FormatVersionError, "version 2"),
        (lambda t, a: (t, {}), CorruptDataError, "is no record set"),
        (lambda t, a: (t, []), CorruptDataError, "is no record set"),
        (lambda t, a: (t, a | {"within": 5}), CorruptDataError, "description is damaged"),
        (lambda t, a: (t, a | {"within": {"split": "x"}}), CorruptDataError, "description is damaged"),
        (lambda t, a: (t.append_column("x", [["1"] * len(t)]), a), CorruptDataError, "its columns are"),
        (lambda t, a: (pa.concat_tables([t, t]), a), CorruptDataError, "do not match"),
    ],
)
def test_a_set_that_was_tampered_with_is_refused(families, change, error, message):
    families.save_set("s", "from records")
    rewritten(families._blobs.root / "sets" / "s.parquet", change)
    with pytest.raises(error, match=message):
        families.subset("s")


def test_damaged_files_of_sets_are_typed_errors(families):
    families.save_set("s", "from records")
    path = families._blobs.root / "sets" / "s.parquet"
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    good = families.subset("s").fingerprint
    for _ in range(150):
        data = bytearray(whole)
        if rng.random() < 0.3:
            data = data[: rng.integers(len(data))]
        else:
            data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        with contextlib.suppress(CorruptDataError, FormatVersionError):
            assert families.subset("s").fingerprint == good


def test_a_split_in_which_a_cluster_is_in_two_parts_is_refused(families, cut):
    path = families._blobs.root / "splits" / "by-cluster.parquet"

    def move_one(table, about):
        part = pc.if_else(pc.equal(table["record_id"], cut.ids("train")[0]), "test", table["part"])
        table = table.set_column(2, table.schema.field("part"), part)
        digest = splits._fingerprint(
            table.replace_schema_metadata(None), about["seed"], dict(about["fractions"])
        )
        return table, about | {"fingerprint": digest}

    rewritten(path, move_one)
    with pytest.raises(LeakageError, match="clusters in more than one part"):
        families.split("by-cluster")


def test_a_loader_takes_a_subset_in_place_of_a_store(families):
    families.save_set("long", "from records where length >= 80")
    view = families.subset("long")
    recipe = Recipe.named("crop_first", crop_residues=16, num_clusters=4, num_extra=4)
    with CropLoader(view, recipe, seed=1, global_batch=2, num_threads=1) as loader:
        step = next(iter(loader))
        state = loader.state_dict()
    assert state["store_fingerprint"] == view.fingerprint
    assert step.shards[0].features["aatype"].shape[-1] == 16
