"""What goes into a store comes out of it, whole and in crops, for any size."""

import dataclasses
import shutil
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import make_record

from foldfeed.feature_store import (
    CropRequest,
    FeatureStore,
    InvalidRecordError,
    MsaRecord,
    StoreSettings,
    StoreSettingsError,
    write_part,
)
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.parts import writer

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
tiles = st.builds(StoreSettings, tile_rows=st.integers(1, 17), tile_cols=st.integers(1, 17))


def build(folder, records, store_settings=None) -> FeatureStore:
    store = FeatureStore.create(folder, store_settings)
    part = write_part(store.url, records, store.settings)
    store.commit([part.part_id], job_id=part.part_id)
    return store


def assert_equal(stored, record: MsaRecord) -> None:
    np.testing.assert_array_equal(stored.msa(), record.msa)
    np.testing.assert_array_equal(stored.deletions(), record.deletions)
    np.testing.assert_array_equal(stored.aatype(), record.msa[0])
    one_hot = np.eye(alphabet.NUM_TOKENS)[record.msa]
    np.testing.assert_allclose(stored.profile(), one_hot.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(stored.deletion_mean(), record.deletions.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(stored.gap_fraction(), (record.msa == alphabet.GAP).mean(axis=0), rtol=1e-6)
    assert_derived_and_atoms_equal(stored, record)
    table = stored.rows()
    assert table["hit_id"].to_pylist() == list(record.rows.hit_id)
    assert table["species"].to_pylist() == list(record.rows.species)
    assert table["pairing_key"].to_pylist() == list(record.rows.pairing_key or [""] * record.depth)
    names = [record.databases[code].name if code >= 0 else None for code in record.rows.database]
    assert table["database"].to_pylist() == names
    for column, values in (("e_value", record.rows.e_value), ("bit_score", record.rows.bit_score)):
        want = [None if np.isnan(value) else value for value in values.tolist()]
        assert table[column].to_pylist() == want
    assert_templates_equal(stored.templates(), record.templates)
    assert stored.fingerprint == record.fingerprint
    assert stored.sequence == record.sequence
    assert stored.extra == dict(record.extra)


def assert_templates_equal(stored, wanted) -> None:
    assert (stored is None) == (wanted is None)
    if wanted is None:
        return
    assert dict(stored.source) == dict(wanted.source)
    for one, other in zip(stored.hits, wanted.hits, strict=True):
        for name in one.__slots__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def assert_derived_and_atoms_equal(stored, record: MsaRecord) -> None:
    assert (stored.entropy() >= 0).all()
    assert stored.neff == (record.neff.total if record.neff else None)
    none = np.full(record.length, np.nan, np.float32)
    np.testing.assert_array_equal(stored.neff_per_residue(), record.neff.per_residue if record.neff else none)
    if record.structure is None:
        assert stored.structure() is None
        return
    assert dict(stored.structure().source) == dict(record.structure.source)
    window = slice(record.length // 3, record.length)
    for found, want in (
        (stored.structure(), record.structure),
        (stored.structure(window), record.structure.window(window.start, window.stop)),
    ):
        for name, values in want.arrays.items():
            np.testing.assert_array_equal(found.arrays[name], values)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(sizes, min_size=1, max_size=4), store_settings=tiles, data=st.data())
def test_records_and_crops_come_back_exactly(tmp_path_factory, shapes, store_settings, data):
    folder = tmp_path_factory.mktemp("roundtrip")
    records = [make_record(f"r{n}", *shape, seed=n) for n, shape in enumerate(shapes)]
    store = build(folder / "s", records, store_settings)
    for record in records:
        assert_equal(store[record.record_id], record)
        a = data.draw(st.integers(0, record.length - 1))
        b = data.draw(st.integers(a + 1, record.length))
        index = data.draw(st.lists(st.integers(0, record.depth - 1), min_size=1, max_size=60))
        top = data.draw(st.integers(0, record.depth - 1))
        bottom = data.draw(st.integers(top + 1, record.depth))
        for rows in (slice(top, bottom), np.array(index)):
            piece = store[record.record_id].crop(residues=slice(a, b), rows=rows)
            np.testing.assert_array_equal(piece.msa, record.msa[rows, a:b])
            np.testing.assert_array_equal(piece.deletions, record.deletions[rows, a:b])
            assert piece.msa.flags.writeable
            assert piece.deletions.dtype == np.int32
    shutil.rmtree(folder)


def test_many_records_cross_every_chunk_boundary_of_a_part(tmp_path):
    """Rows, residues, text and overflow each need more than one inner chunk here."""
    records = [make_record(f"r{n:02d}", 900, 97, seed=n) for n in range(8)]
    store = build(tmp_path / "s", records)
    for record in records:
        assert_equal(store[record.record_id], record)


@pytest.mark.parametrize(
    ("residues", "rows", "message"),
    [
        (slice(5, 5), None, "residues 5:5 is an empty window of 0:130"),
        (slice(130, 200), None, "residues 130:200 is an empty window of 0:130"),
        (slice(-3, 4), None, "residues -3:4 is an empty window of 0:130"),
        (slice(0, 10, 2), None, "residues 0:10:2 has a step; only whole windows a:b inside 0:130"),
        (slice(None, None, -1), None, "residues ::-1 has a step"),
        (130, None, r"residues 130 is outside 0\.\.129"),
        (None, 700, r"rows 700 is outside 0\.\.699"),
        (None, -701, r"rows -701 is outside 0\.\.699"),
        (None, np.array([0, 700]), r"row 700 is outside 0\.\.699"),
        (None, np.array([-701]), r"row -701 is outside 0\.\.699"),
        (None, np.array([], dtype=np.int64), "one or more integers"),
        (None, np.array([True, False]), "one or more integers"),
    ],
)
def test_a_window_that_cannot_be_meant_is_an_error_with_the_range(small_store, residues, rows, message):
    with pytest.raises(IndexError, match=message):
        small_store["b2"].crop(residues=residues, rows=rows)


def test_equal_records_give_equal_bytes_and_one_part(tmp_path):
    records = [make_record(f"r{n}", 30 + n, 50) for n in range(3)]
    parts = [write_part(tmp_path / name, iter(records), StoreSettings()) for name in ("x", "y")]
    assert parts[0] == parts[1]
    again = write_part(tmp_path / "x", records, StoreSettings())
    assert again == parts[0]
    files = {
        name: {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in sorted((tmp_path / name).rglob("*"))
            if path.is_file()
        }
        for name in ("x", "y")
    }
    assert files["x"] == files["y"]
    assert {path.parts[:2] for path in files["x"]} == {("parts", parts[0].part_id)}


def test_records_of_a_part_come_in_increasing_id_order(tmp_path):
    with pytest.raises(InvalidRecordError, match="strictly increasing"):
        write_part(tmp_path, [make_record("b", 1, 5), make_record("a", 1, 5)], StoreSettings())
    with pytest.raises(InvalidRecordError, match="strictly increasing"):
        write_part(tmp_path, [make_record("b", 1, 5), make_record("b", 1, 5)], StoreSettings())
    with pytest.raises(ValueError, match="at least one record"):
        write_part(tmp_path, [], StoreSettings())
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_producer_that_fails_leaves_nothing_behind(tmp_path):
    def records():
        yield make_record("a", 3, 5)
        raise RuntimeError("the producer broke")

    with pytest.raises(RuntimeError, match="the producer broke"):
        write_part(tmp_path, records(), StoreSettings())
    assert list((tmp_path / "parts").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record_id": "../../etc/passwd"}, "an id is"),
        ({"record_id": ""}, "an id is"),
        ({"record_id": "a" * 256}, "an id is"),
        ({"record_id": "a'b"}, "an id is"),
        ({"record_id": ".hidden"}, "an id is"),
        ({"sequence": ""}, "0 residues"),
        ({"msa": np.full((4, 6), 22, np.uint8)}, "holds code 22"),
        ({"msa": np.zeros((4, 5), np.uint8)}, "must both be"),
        ({"msa": np.zeros((4, 6), np.int8)}, "must be uint8"),
        ({"deletions": np.full((4, 6), -1, np.int32)}, "never negative"),
        ({"sequence": "AAAAAW"}, "not the query"),
        ({"databases": ()}, "rows.database"),
        ({"sequence": "A-AAAA", "msa": np.array([[0, 21, 0, 0, 0, 0]] * 4, np.uint8)}, "a gap at residue 2"),
    ],
)
def test_a_record_the_format_cannot_hold_is_refused_with_the_rule(change, message):
    good = make_record("good", 4, 6)
    with pytest.raises(InvalidRecordError, match=message):
        dataclasses.replace(good, **change)


def test_threads_may_read_one_store_together(small_store):
    want = {name: small_store[name].msa() for name in small_store.ids}
    problems = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            name = str(rng.choice(small_store.ids))
            a = int(rng.integers(0, want[name].shape[1]))
            rows = rng.integers(0, want[name].shape[0], 20)
            piece = small_store[name].crop(residues=slice(a, want[name].shape[1]), rows=rows)
            if not np.array_equal(piece.msa, want[name][rows, a:]):
                problems.append((name, a))

    fresh = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in fresh:
        thread.start()
    for thread in fresh:
        thread.join()
    assert problems == []


def test_a_crop_reads_only_the_tiles_it_touches(small_store):
    record = small_store["b2"]
    whole = record.crop_bytes()
    corner = record.crop_bytes(residues=slice(0, 64), rows=slice(0, 512))
    assert 0 < corner < whole / 2
    # 700 x 130 in tiles of 512 x 64 is 2 x 3 tiles; rows 511 and 512 lie in two of them.
    assert record.crop_bytes(residues=slice(63, 65), rows=slice(511, 513)) > corner


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.lists(names), st.lists(st.text("ABC/_-0 ", max_size=8))))
def test_names_in_ascii_take_a_short_way_to_the_same_bytes(some):
    sizes, text = writer.encode_names(some)
    assert sizes.tolist() == [len(name.encode()) for name in some]
    assert text == "".join(some).encode()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=8)))
def test_short_names_are_padded_with_zero_bytes(some):
    padded = writer.fixed_width(some, 8)
    assert [row.tobytes() for row in padded] == [name.encode().ljust(8, b"\0") for name in some]


def with_rows(record: MsaRecord, **changes) -> MsaRecord:
    return dataclasses.replace(record, rows=dataclasses.replace(record.rows, **changes))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("e_value", lambda values: values.astype(np.float32), r"must be float64 \(7,\), not float32"),
        ("e_value", lambda values: values.astype(">f8"), "must be float64"),
        ("e_value", lambda values: values[:, None], r"not float64 \(7, 1\)"),
        ("e_value", lambda values: values.tolist(), "not <class 'list'>"),
        ("bit_score", lambda values: values.astype(np.float64), "must be float32"),
        ("database", lambda values: values.astype(np.int64), "must be int16"),
        ("database", lambda values: np.zeros_like(values), "comes from none: -1"),
        ("species", lambda values: ["é", *values[1:]], "something else than ASCII"),
        ("species", lambda values: ["A\0", *values[1:]], "zero byte"),
        ("species", lambda values: ["ABCDEFGHI", *values[1:]], "longer than 8 bytes"),
        ("hit_id", lambda values: ["\udc80", *values[1:]], "cannot be written as UTF-8"),
    ],
)
def test_provenance_that_could_not_be_read_back_is_refused(name, change, says):
    record = make_record("a", 7, 9)
    with pytest.raises(InvalidRecordError, match=says):
        with_rows(record, **{name: change(getattr(record.rows, name))})


def test_every_nan_is_the_same(tmp_path):
    """0.0 / 0.0 has its sign bit set on x86; a record must not be another one for that."""
    record = make_record("a", 7, 9)
    unknown = np.full(7, np.nan)
    other = np.full(7, 0xFFF8_0000_0000_0001, np.uint64).view(np.float64)
    one, two = with_rows(record, e_value=unknown), with_rows(record, e_value=other)
    assert one.fingerprint == two.fingerprint
    store = build(tmp_path / "s", [two])
    assert (
        write_part(store.url, [one], store.settings).part_id
        == write_part(store.url, [two], store.settings).part_id
    )
    assert verify(store.url, level="deep").problems == ()


def test_a_part_of_other_settings_is_refused_and_found_and_mended(tmp_path, monkeypatch):
    store = FeatureStore.create(tmp_path / "s", StoreSettings.with_row_order("permuted", 3))
    records = [make_record(name, 40, 9) for name in ("a", "b")]
    wrong = write_part(store.url, records[:1], StoreSettings())
    with pytest.raises(StoreSettingsError, match=r"was written with .*rank.*store.settings"):
        store.commit([wrong.part_id], job_id="1")
    assert len(FeatureStore.open(store.url)) == 0
    good = write_part(store.url, records[1:], store.settings)
    store.commit([good.part_id], job_id="2")
    # As a store may look that was committed to before this was refused.
    monkeypatch.setattr(store, "settings", StoreSettings())
    store.commit([wrong.part_id], job_id="3")
    (problem,) = verify(store.url).problems
    assert wrong.part_id in problem.where
    assert "`compact` writes it anew" in problem.reason
    compact(store.url, part_ids=[wrong.part_id])
    assert verify(store.url, level="deep").problems == ()
    after = FeatureStore.open(store.url)
    for record in records:
        np.testing.assert_array_equal(after[record.record_id].msa(), record.msa)
    assert after["a"].slab(start=0, num_rows=10).ranks.tolist() != list(range(10))


@pytest.mark.parametrize("wrong", [512.0, True, "64"])
def test_the_sides_of_a_tile_are_integers(wrong):
    with pytest.raises(ValueError, match="is not possible; it is an integer"):
        StoreSettings(tile_rows=wrong)


@pytest.mark.parametrize("form", ["record", "batch"])
def test_windows_mean_what_numpy_means_by_them(small_store, form):
    """A window that asks for more than there is was refused; everybody who knows NumPy stumbled over that."""
    record = small_store["b2"]
    depth, length = record.depth, record.length
    msa = record.msa()
    ends = (None, -length - 9, -length, -7, -1, 0, 3, 64, length - 1, length, length + 9)
    windows = [slice(a, b) for a in ends for b in ends] + [0, 5, -1, length - 1, -length, np.int64(7)]
    checked = 0
    for window in windows:
        expected = msa[:, window] if isinstance(window, slice) else msa[:, [window]]
        if expected.size == 0:
            continue
        checked += 1
        request = CropRequest("b2", window, slice(0, 9))
        piece = small_store.crops([request])[0] if form == "batch" else record.crop(window, slice(0, 9))
        np.testing.assert_array_equal(piece.msa, expected[:9])
        np.testing.assert_array_equal(record.aatype(window), record.aatype()[window].reshape(-1))
    assert checked > 40
    for rows in (slice(0, depth + 500), slice(-3, None), 5, -1, np.array([0, -1, 2]), [-depth]):
        expected = msa[[rows]] if isinstance(rows, int) else msa[rows]
        piece = (
            small_store.crops([CropRequest("b2", None, rows)])[0]
            if form == "batch"
            else record.crop(rows=rows)
        )
        np.testing.assert_array_equal(piece.msa, expected)
        assert record.plan(rows=rows).num_bytes > 0


def test_nothing_is_rounded_in_a_crop(tmp_path):
    record = build(tmp_path / "s", [make_record("a", 7, 9)])["a"]
    for wrong in (
        lambda: record.crop(slice(0.5, 2.9)),
        lambda: record.crop(rows=slice(0.0, 2)),
        lambda: record.crop(5.0),
        lambda: record.crop("5"),
        lambda: record.crop(slice("a", 3)),
        lambda: record.slab(start=2.9, num_rows=3),
        lambda: record.slab(start=2, num_rows=3.7),
    ):
        with pytest.raises(IndexError, match="no integer"):
            wrong()
