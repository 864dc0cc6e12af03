"""Template hits of records: stored, read, asked by SQL, and nothing where no record has any."""

import dataclasses
import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from conformance_reader import ConformanceReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import make_record, make_templates
from test_feature_store_roundtrip import assert_equal, build

from foldfeed.feature_store import (
    FeatureStore,
    InvalidRecordError,
    MsaRecord,
    RowProvenance,
    StoreSettings,
    TemplateHit,
    Templates,
    write_part,
)
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.schema import TEMPLATE_ARRAYS
from foldfeed.feature_store.format.templates import pairs_of, runs_of
from foldfeed.feature_store.parts.template_scan import TEMPLATES_SCHEMA, template_batches
from foldfeed.feature_store.storage import open_blobs

SETTINGS = StoreSettings(tile_rows=8, tile_cols=8)


def with_templates(name: str, length: int, seed: int | None):
    found = None if seed is None else make_templates(length, seed)
    return dataclasses.replace(make_record(name, 4, length, 3), templates=found)


def arrays_of(store: FeatureStore) -> list[set[str]]:
    parts = sorted(Path(store.url, "parts").iterdir())
    return [
        set(json.loads((part / "zarr.json").read_text())["attributes"]["foldfeed"]["lengths"])
        for part in parts
    ]


def hit(sequence: str = "ACDEF", runs=((0, 0, 2), (3, 2, 3)), **facts) -> TemplateHit:
    fields = {"template_id": "4hhb_A", **facts}
    return TemplateHit(sequence=sequence, runs=np.array(runs, np.int32).reshape(-1, 3), **fields)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    drawn=st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=1, max_size=4), size=st.integers(1, 40)
)
def test_hits_come_back_whichever_records_have_them(tmp_path_factory, drawn, size):
    records = [with_templates(f"r{number}", size + number, seed) for number, seed in enumerate(drawn)]
    store = build(tmp_path_factory.mktemp("store") / "s", records, SETTINGS)
    for record in records:
        assert_equal(store[record.record_id], record)
    has_hits = any(record.templates is not None and record.templates.hits for record in records)
    assert arrays_of(store) == [
        {*arrays_of(store)[0] - set(TEMPLATE_ARRAYS), *(TEMPLATE_ARRAYS if has_hits else [])}
    ]
    other = ConformanceReader(store.url)
    for record in records:
        assert other.fingerprint(record.record_id) == record.fingerprint


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(0, 3)), max_size=8))
def test_runs_and_pairs_are_the_same_alignment(steps):
    """Any alignment: stretches of pairs, each behind a gap in the query, the template, or both."""
    pairs, query, template = [], 0, 0
    for size, query_gap, template_gap in steps:
        query, template = query + query_gap, template + template_gap
        pairs += [(query + at, template + at) for at in range(size)]
        query, template = query + size, template + size
    runs = runs_of(np.array(pairs, dtype=np.int64).reshape(-1, 2))
    assert pairs_of(runs).tolist() == [list(pair) for pair in pairs]
    if pairs:
        # As few runs as there are: neighbouring ones are apart somewhere.
        assert len(runs) <= len(steps)
        found = hit("A" * (template + 2), runs)
        assert found.index_map(query + 3).tolist() == [
            dict(pairs).get(position, -1) for position in range(query + 3)
        ]
        assert found.num_aligned == len(pairs)


def test_what_a_hit_tells_of_its_alignment():
    found = hit("WACDEF", ((0, 1, 2), (3, 3, 2)))
    assert found.pairs().tolist() == [[0, 1], [1, 2], [3, 3], [4, 4]]
    assert (found.entry_id, found.chain_id) == ("4hhb", "A")
    assert (found.query_span, found.template_span, found.matching_sequence) == ((0, 5), (1, 5), "ACDE")
    assert found.aligned_sequence(6) == "AC-DE-"
    assert found.identity("ACWWE") == 0.75
    assert found.coverage(8) == 0.5


def test_records_without_hits_and_without_a_search_are_told_apart(tmp_path):
    plain = with_templates("a", 9, None)
    nothing = dataclasses.replace(plain, record_id="b", templates=Templates(hits=(), source={"tool": "x"}))
    store = build(tmp_path / "s", [plain, nothing], SETTINGS)
    assert store["a"].templates() is None
    assert store["b"].templates().hits == ()
    assert dict(store["b"].templates().source) == {"tool": "x"}
    assert store.table(["num_templates"])["num_templates"].to_pylist() == [None, 0]
    assert arrays_of(store)[0].isdisjoint(TEMPLATE_ARRAYS)
    assert len(store.query("from templates")) == 0
    assert verify(store.url, level="deep").problems == ()


def test_a_part_without_templates_says_nothing_of_them(tmp_path):
    """So it is the same bytes, and has the same name, as before they came."""
    store = build(tmp_path / "s", [with_templates("a", 12, None)], SETTINGS)
    assert arrays_of(store)[0].isdisjoint(TEMPLATE_ARRAYS)
    (part,) = Path(store.url, "parts").iterdir()
    assert "template" not in (part / "zarr.json").read_text()
    (row,) = store["a"].part.index_rows()
    stored = store["a"].part.arrays["record_json"]
    assert b"template" not in stored.read(0, stored.length).tobytes()
    assert row["templates"] is None
    assert row["first_template"] is None


def test_hits_belong_to_what_a_record_says():
    record = with_templates("x", 11, 1)
    other = dataclasses.replace(
        record.templates, hits=(dataclasses.replace(record.templates.hits[0], score=1.0),)
    )
    said = [
        record,
        *(dataclasses.replace(record, templates=one) for one in (None, other, Templates(hits=()))),
    ]
    assert len({one.fingerprint for one in said}) == 4


DATED = [
    hit("ACDEFGHIKL", ((0, 0, 10),), template_id="1abc_A", release_date=datetime.date(2017, 5, 1)),
    hit("ACDEFGHIKL", ((0, 0, 10),), template_id="2abc_B", release_date=datetime.date(2018, 4, 30)),
    hit("WWDEFWWWWW", ((0, 0, 10),), template_id="3abc_C", release_date=datetime.date(2018, 5, 1)),
    hit("ACDWWWWWWW", ((0, 0, 3),), template_id="4abc_D", release_date=None),
    hit("ACDEFGHIKW", ((0, 0, 10),), template_id="5abc_E", release_date=datetime.date(2020, 1, 1)),
]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, "12345"),
        ({"max_date": "2018-04-30"}, "12"),
        ({"max_date": datetime.date(2018, 5, 1)}, "123"),
        ({"max_date": "2100-01-01"}, "1235"),
        ({"max_hits": 2}, "12"),
        ({"max_hits": 0}, ""),
        ({"max_date": "2018-05-01", "max_hits": 2}, "12"),
        ({"min_residues": 4}, "1235"),
        ({"min_aligned_ratio": 0.3}, "1235"),
        ({"distinct": True}, "1345"),
        ({"max_subsequence_ratio": 0.95}, "345"),
        ({"max_subsequence_ratio": 0.95, "distinct": True, "max_hits": 2}, "34"),
    ],
)
def test_which_hits_rules_keep(rules, kept):
    found = Templates(hits=tuple(DATED)).select("ACDEFGHIKL", **rules)
    assert "".join(one.template_id[0] for one in found.hits) == kept


def record_of(sequence: str, hits) -> MsaRecord:
    return MsaRecord(
        record_id="r",
        description="",
        sequence=sequence,
        msa=alphabet.encode(sequence)[None],
        deletions=np.zeros((1, len(sequence)), np.int32),
        rows=RowProvenance(
            database=np.full(1, -1, np.int16),
            e_value=np.full(1, np.nan),
            bit_score=np.full(1, np.nan, np.float32),
            hit_id=["r"],
            species=[""],
        ),
        databases=(),
        templates=Templates(hits=tuple(hits)),
    )


def test_sql_sees_the_hits_that_records_give(tmp_path):
    """The table against a loop over the hits, column by column, also in tiny batches."""
    records = [with_templates(f"r{seed:02}", 5 + seed, seed) for seed in range(12)]
    store = build(tmp_path / "s", records[:7], SETTINGS)
    part = write_part(store.url, records[7:], store.settings)
    store.commit([part.part_id], job_id="second")
    store.delete(["r03", "r08"])
    wanted = [
        {
            "record_id": record.record_id,
            "rank": rank,
            **{name: getattr(one, name) for name in ("template_id", "entry_id", "chain_id", "release_date")},
            **{name: getattr(one, name) for name in ("resolution_angstrom", "e_value", "score")},
            **{name: getattr(one, name) for name in ("probability", "sum_probs", "num_aligned", "sequence")},
            "num_residues": len(one.sequence),
            "identity": one.identity(record.sequence),
            "coverage": one.coverage(record.length),
        }
        for record in records
        if record.record_id not in ("r03", "r08")
        for rank, one in enumerate(record.templates.hits)
    ]
    found = store.query("from templates order by record_id, rank").to_pylist()
    assert found == [{name: one[name] for name in found[0]} for one in wanted]
    for name in found[0]:
        alone = store.query(f"select {name} from templates order by record_id, rank")[name].to_pylist()
        assert alone == [one[name] for one in wanted]
    early = store.query("select template_id from templates where release_date < '1985-01-01'")
    assert len(early) == sum(
        one["release_date"] is not None and one["release_date"].year < 1985 for one in wanted
    )
    mine = store.query("select count(*) as n from templates", rows_of="record_id = 'r05'")
    assert mine["n"].to_pylist() == [sum(one["record_id"] == "r05" for one in wanted)]


def test_batches_of_any_size_hold_the_same_hits(tmp_path):
    records = [with_templates(f"r{seed:02}", 5 + seed, seed) for seed in range(9)]
    store = build(tmp_path / "s", records, SETTINGS)
    index, names = store.index_rows(), TEMPLATES_SCHEMA.names
    whole, *others = (
        [
            row
            for batch in template_batches(open_blobs(store.url), index, names, most)
            for row in batch.to_pylist()
        ]
        for most in (1 << 14, 1, 4)
    )
    assert whole
    assert others == [whole, whole]


def test_care_keeps_templates(tmp_path):
    made = [with_templates(f"r{seed}", 7 + seed, None if seed % 3 == 0 else seed) for seed in range(7)]
    store = FeatureStore.create(tmp_path / "s", SETTINGS)
    for record in made:
        part = write_part(store.url, [record], store.settings)
        store.commit([part.part_id], job_id=record.record_id)
    compact(store.url)
    copy_store(store.url, tmp_path / "copy")
    for url in (store.url, str(tmp_path / "copy")):
        after = FeatureStore.open(url)
        for record in made:
            assert_equal(after[record.record_id], record)
        assert verify(url, level="deep").problems == ()


def test_a_difference_in_templates_is_named(tmp_path):
    first, second = with_templates("r", 9, 1), with_templates("r", 9, 2)
    store = build(tmp_path / "s", [first], SETTINGS)
    for number, record in enumerate((second, dataclasses.replace(second, templates=None))):
        part = write_part(store.url, [record], store.settings)
        store.commit([part.part_id], job_id=str(number), on_existing="replace")
    why = [store.diff(version).table["why"].to_pylist() for version in range(1, store.version + 1)]
    assert [["templates"]] in why
    assert why[0] == [["templates"]]


@pytest.mark.parametrize("array", ["template_id", "template_run", "template_sequence", "template_e_value"])
def test_a_flipped_byte_is_found_and_never_read(tmp_path, array):
    store = build(tmp_path / "s", [with_templates("r", 30, 1), with_templates("s", 30, None)], SETTINGS)
    (part,) = Path(store.url, "parts").iterdir()
    shard = next(path for path in (part / array / "c").rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    problems = verify(store.url, level="full").problems
    assert any(array in problem.where for problem in problems)
    assert {name for problem in problems for name in problem.record_ids} == {"r"}
    with pytest.raises(Exception, match=array):
        FeatureStore.open(store.url)["r"].templates()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"template_id": ""}, "its name must be 1 to 255 bytes"),
        ({"template_id": "4hhb A"}, "a space"),
        ({"sequence": "ACdEF"}, "upper-case letters"),
        ({"sequence": ""}, "upper-case letters"),
        ({"runs": ()}, "runs must be int32"),
        ({"runs": ((0, 0, 0),)}, "positive length"),
        ({"runs": ((0, 0, 2), (1, 2, 1))}, "increase in query and template"),
        ({"runs": ((0, 0, 2), (2, 1, 1))}, "increase in query and template"),
        ({"runs": ((-1, 0, 2),)}, "positive length and increase"),
        ({"runs": ((0, 4, 2),)}, "aligns residue 6 of a template of 5"),
        ({"runs": ((0, 0, 2**31 - 1), (2**31 - 1, 2**31 - 1, 2**31 - 1))}, "aligns residue 4294967294"),
        ({"score": float("nan")}, "not finite"),
        ({"resolution_angstrom": float("inf")}, "not finite"),
    ],
)
def test_hits_that_cannot_be_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        hit(**change)


def test_an_alignment_beyond_the_query_is_refused():
    with pytest.raises(InvalidRecordError, match="aligned with its residue 6 of 5"):
        record_of("ACDEF", [hit("ACDEFG", ((0, 0, 6),))])


def test_a_cut_off_is_a_question(tmp_path):
    store = build(tmp_path / "s", [record_of("ACDEFGHIKL", DATED)], SETTINGS)
    kept = [one.template_id for one in store["r"].templates(max_date="2018-04-30", max_hits=9).hits]
    sql = "select template_id from templates where release_date <= '2018-04-30' order by rank"
    assert store.query(sql)["template_id"].to_pylist() == kept == ["1abc_A", "2abc_B"]
    with pytest.raises(ValueError, match="'2018' is no date; write YYYY-MM-DD"):
        store["r"].templates(max_date="2018")
