"""Samplings: which records they choose, with what chance, and what binds a saved position to them."""

import dataclasses
import json
import math
import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from records import make_record, make_structure

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.feature_store.format import alphabet
from foldfeed.loader import (
    AF2_FILTERS,
    Component,
    CropLoader,
    LoaderConfigError,
    Recipe,
    Sampling,
    StateMismatchError,
)
from foldfeed.loader.order.selection import Selection

RECIPE = Recipe.named("crop_first", crop_residues=8, num_clusters=2, num_extra=2)
LENGTHS = (100, 255, 256, 257, 400, 512, 513, 600, 40, 40, 41, 43)
NUM_DRAWS = 400_000


def build_store(url, lengths=LENGTHS, *, prefix="r", clusters=3, seed=1) -> FeatureStore:
    """Records of given lengths; record n is of cluster c(n mod clusters) and has the extra fact 'group'."""
    store = FeatureStore.create(url, StoreSettings(tile_rows=16, tile_cols=64))
    records = [
        dataclasses.replace(
            make_record(f"{prefix}{n:02}", 2, length, seed=seed + n), extra={"group": f"c{n % clusters}"}
        )
        for n, length in enumerate(lengths)
    ]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


@pytest.fixture(scope="module")
def pdb(tmp_path_factory) -> FeatureStore:
    return build_store(tmp_path_factory.mktemp("sampling") / "pdb")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> FeatureStore:
    return build_store(tmp_path_factory.mktemp("sampling") / "distilled", (30,) * 7, prefix="d")


def weighted(*components, **values) -> Sampling:
    return Sampling(kind="weighted", components=components or (Component(),), **values)


def make_loader(store, sampling, **values) -> CropLoader:
    return CropLoader(store, RECIPE, sampling=sampling, **({"seed": 3, "global_batch": 4} | values))


def chosen_ids(selection: Selection) -> list[str]:
    return [store.ids[position] for store, position in map(selection.place, range(len(selection)))]


def assert_drawn_as(order, expected: dict[int, float]) -> None:
    """Chi-square of many draws against the chances that plain arithmetic gives."""
    counts = np.bincount(order.records(np.arange(NUM_DRAWS)), minlength=order.num_records)
    chances = np.array([expected[number] for number in range(order.num_records)])
    assert math.isclose(chances.sum(), 1, abs_tol=1e-12)
    mean = chances * NUM_DRAWS
    assert counts[mean == 0].sum() == 0
    counts, mean = counts[mean > 0], mean[mean > 0]
    free = len(mean) - 1
    assert abs((((counts - mean) ** 2 / mean).sum() - free) / math.sqrt(2 * free)) < 4.5


def test_the_default_draws_what_a_loader_always_drew(pdb):
    with CropLoader(pdb, RECIPE, seed=3, global_batch=4) as loader, make_loader(pdb, Sampling()) as same:
        assert loader.state_dict() == same.state_dict()
        assert set(loader.state_dict()) == OLD_STATE
        assert [loader.order.locate(g).record for g in range(24)] == FIRST_TWO_EPOCHS
        assert same.order.records(np.arange(24)).tolist() == FIRST_TWO_EPOCHS


@pytest.mark.parametrize("seed", [0, 9])
def test_alphafold_weights_are_length_term_by_cluster_size(pdb, seed):
    component = Component(length_term=True, clusters="extra.group")
    with make_loader(pdb, weighted(component), seed=seed) as loader:
        sizes = Counter(n % 3 for n in range(len(LENGTHS)))
        weights = [max(min(length, 512), 256) / 512 / sizes[n % 3] for n, length in enumerate(LENGTHS)]
        expected = {n: weight / sum(weights) for n, weight in enumerate(weights)}
        assert np.allclose(loader.order.table.probabilities, list(expected.values()), rtol=1e-12, atol=0)
        assert_drawn_as(loader.order, expected)


def test_clusters_come_from_a_split_too(tmp_path):
    store = build_store(tmp_path / "store")
    big = {name: "big" if n < 9 else name for n, name in enumerate(store.ids)}
    store.save_split("mm40", big, fractions={"train": 1.0}, seed=0)
    selection = Selection(store, weighted(Component(clusters="splits/mm40")))
    # Four clusters, each as likely as the others.
    assert np.allclose(selection.table.probabilities, [1 / 36] * 9 + [1 / 4] * 3)
    # Sizes are counted among the records chosen.
    some = Selection(store, weighted(Component(clusters="splits/mm40", where=("record_id >= 'r08'",))))
    assert np.allclose(some.table.probabilities, [1 / 4] * 4)


def test_weights_from_a_column(tmp_path):
    store = build_store(tmp_path / "store")
    values = [0.5 * n for n in range(len(LENGTHS))]
    store.annotate(pa.table({"record_id": store.ids, "w": values}))
    with make_loader(store, weighted(Component(column="w"))) as loader:
        assert_drawn_as(loader.order, {n: value / sum(values) for n, value in enumerate(values)})


def test_a_mixture_of_stores_has_its_shares_in_every_stretch(pdb, distilled):
    sampling = weighted(
        Component(store="distilled", share=0.75),
        Component(store="pdb", share=0.25, length_term=True, where=("length < 500",)),
    )
    with make_loader({"pdb": pdb, "distilled": distilled}, sampling, num_threads=1) as loader:
        kept = [length for length in LENGTHS if length < 500]
        weights = [max(length, 256) for length in kept]
        expected = dict(enumerate([0.75 / 7] * 7 + [0.25 * weight / sum(weights) for weight in weights]))
        assert_drawn_as(loader.order, expected)
        # The second half of a run is drawn alike: chances do not depend on what came before.
        late = loader.order.records(np.arange(10**12, 10**12 + 100_000)) < 7
        assert abs(late.mean() - 0.75) < 4.5 * math.sqrt(0.75 * 0.25 / 100_000)
        selection = Selection({"pdb": pdb, "distilled": distilled}, sampling)
        small = [name for name, length in zip(pdb.ids, LENGTHS, strict=True) if length < 500]
        assert chosen_ids(selection) == [*distilled.ids, *small]
        # Samples are really read from the store that they belong to.
        for batch in (next(loader), next(loader)):
            for shard in batch.shards:
                for g in shard.samples:
                    store, position = selection.place(loader.order.locate(g).record)
                    plan = loader.plan(g)
                    assert (plan.length, plan.depth) == (store.at(position).length, store.at(position).depth)


def test_conditions_sets_and_views_choose_records(tmp_path, pdb):
    store = build_store(tmp_path / "store")
    store.save_set("short", "select record_id from records where length < 257")
    where = ("length > 40", "extra->>'group' <> 'c1'")
    for kind in ("once", "weighted"):
        component = Component(record_set="short", where=where)
        selection = Selection(store, Sampling(kind=kind, components=(component,)))
        wanted = [
            name
            for n, (name, length) in enumerate(zip(store.ids, LENGTHS, strict=True))
            if 40 < length < 257 and n % 3 != 1
        ]
        assert chosen_ids(selection) == wanted
        through_view = Selection(
            store.view("length < 257"), Sampling(kind=kind, components=(Component(where=where),))
        )
        assert chosen_ids(through_view) == wanted
    # Once an epoch, over two sets of records.
    parts = (Component(store="a", where=("length > 300",)), Component(store="b", record_set="short"))
    with make_loader({"a": pdb, "b": store}, Sampling(components=parts)) as loader:
        count = loader.order.num_records
        assert count == 4 + 7
        for epoch in (0, 5):
            visited = loader.order.records(np.arange(epoch * count, (epoch + 1) * count))
            assert sorted(visited.tolist()) == list(range(count))


def record_of(name, sequence, resolution):
    record = make_record(name, 1, len(sequence))
    codes = np.array([[alphabet.TOKENS.index(letter) for letter in sequence]], dtype=np.uint8)
    structure = None
    if resolution is not None:
        structure = make_structure(len(sequence))
        structure = dataclasses.replace(structure, source={**structure.source, **resolution})
    return dataclasses.replace(record, sequence=sequence, msa=codes, structure=structure, neff=None)


def test_alphafold_filters(tmp_path):
    store = FeatureStore.create(tmp_path / "store")
    mixed = "ACDEFGHIKL"
    records = [
        record_of("a_9A", mixed, {"resolution_angstrom": "9.0"}),
        record_of("b_8.99A", mixed, {"resolution_angstrom": "8.99"}),
        record_of("c_nmr", mixed, {}),
        record_of("d_none", mixed, None),
        record_of("e_80", "A" * 8 + "CD", None),
        record_of("f_90", "A" * 9 + "C", None),
        record_of("g_X", "X" * 9 + "C", None),
        record_of("h_20A", mixed, {"resolution_angstrom": "20"}),
    ]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    kept = chosen_ids(Selection(store, Sampling(components=(Component(where=AF2_FILTERS),))))
    assert kept == ["b_8.99A", "c_nmr", "d_none", "e_80"]
    assert Component.af2(clusters="splits/x", share=0.25) == Component(
        clusters="splits/x", share=0.25, length_term=True, where=AF2_FILTERS
    )


def test_a_sampling_is_json_and_its_digest_its_identity(pdb):
    sampling = weighted(
        Component.af2(store="pdb", share=1, clusters="splits/mm40"),
        Component(store="d", share=0.75, record_set="s", column="w"),
        epoch_samples=1000,
        epoch_end="short",
    )
    again = Sampling.from_dict(json.loads(json.dumps(sampling.to_dict())))
    assert again == sampling
    assert again.digest == sampling.digest
    assert (
        dataclasses.replace(
            sampling,
            components=(dataclasses.replace(sampling.components[0], share=1.0), sampling.components[1]),
        ).digest
        == sampling.digest
    )
    others = [
        dataclasses.replace(sampling, epoch_samples=1001),
        dataclasses.replace(sampling, epoch_end="join"),
        dataclasses.replace(sampling, components=sampling.components[::-1]),
        *(
            dataclasses.replace(
                sampling,
                components=(dataclasses.replace(sampling.components[0], **change), sampling.components[1]),
            )
            for change in (
                {"share": 0.5},
                {"where": ()},
                {"clusters": "x"},
                {"length_term": False},
                {"store": "q"},
            )
        ),
    ]
    assert len({other.digest for other in (*others, sampling)}) == len(others) + 1
    assert Sampling.from_dict({}) == Sampling()
    for bad in (
        {"order": 1},
        {"components": [{"shares": 1}]},
        {"components": 3},
        {"components": [3]},
        {"components": [{"where": "length > 3"}]},
    ):
        with pytest.raises(LoaderConfigError):
            Sampling.from_dict(bad)


def test_a_position_belongs_to_sampling_records_and_stores(tmp_path, pdb, distilled):
    sampling = weighted(Component(share=1.0))
    with make_loader(pdb, sampling) as loader:
        next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        loader.load_state_dict(state)
    assert state["format"] == 2
    assert len(json.dumps(state)) < 600
    other = weighted(Component(share=1.0, length_term=True))
    for wanted, field in ((other, "sampling_digest"), (None, "sampling_digest")):
        with make_loader(pdb, wanted) as loader, pytest.raises(StateMismatchError) as caught:
            loader.load_state_dict(state)
        assert caught.value.field == field
        assert caught.value.found == state[field]
        assert repr(state[field]) in str(caught.value)
        assert repr(caught.value.expected) in str(caught.value)
        assert pickle.loads(pickle.dumps(caught.value)).expected == caught.value.expected
    # A state from before there were samplings is one of the default sampling only.
    with make_loader(pdb, None) as plain:
        old = plain.state_dict()
        assert old["format"] == 1
    with make_loader(pdb, sampling) as loader, pytest.raises(StateMismatchError, match="sampling_digest"):
        loader.load_state_dict(old)
    # Two stores: the error shows the fingerprints by name.
    mixture = weighted(Component(store="a", share=3), Component(store="b", share=1))
    with make_loader({"a": distilled, "b": pdb}, mixture) as loader:
        state = loader.state_dict()
    with make_loader({"a": distilled, "b": build_store(tmp_path / "b", seed=50)}, mixture) as loader:
        with pytest.raises(StateMismatchError) as caught:
            loader.load_state_dict(state)
        assert caught.value.field == "store_fingerprint"
        assert f"b={pdb.fingerprint}" in str(caught.value)
        assert f"a={distilled.fingerprint}" in caught.value.expected


def test_a_position_is_refused_when_weights_change_under_it(tmp_path):
    """A column of one's own is no part of what a record says, so the store's fingerprint stays."""
    store = build_store(tmp_path / "store")
    store.annotate(pa.table({"record_id": store.ids, "w": [1.0] * len(LENGTHS)}))
    sampling = weighted(Component(column="w"))
    with make_loader(store, sampling) as loader:
        state = loader.state_dict()
    store.annotate(pa.table({"record_id": store.ids[:1], "w": [2.0]}))
    with make_loader(store, sampling) as loader:
        assert loader.state_dict()["store_fingerprint"] == state["store_fingerprint"]
        with pytest.raises(StateMismatchError, match="selection_fingerprint"):
            loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (Component(where=("length > 10000",)), "keeps none of 12 records"),
        (Component(where=("lengthy > 3",)), "lengthy"),
        (Component(record_set="nobody"), "nobody"),
        (Component(clusters="splits/nobody"), "nobody"),
        (Component(clusters="nothing"), "no column 'nothing'"),
        (Component(clusters="extra.nothing"), "12 of 12 records have none, e.g. 'r00'"),
        (Component(column="record_id"), "no column of numbers"),
        (Component(column="neff"), "records have none"),
        (Component(store="other"), "not among the stores"),
    ],
)
def test_components_that_cannot_be_had_are_named(pdb, component, message):
    with pytest.raises(LoaderConfigError, match=message):
        make_loader(pdb, weighted(component))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sampling(kind="random"),
        lambda: Sampling(epoch_end="drop"),
        lambda: Sampling(components=()),
        lambda: Sampling(components=[Component()]),
        lambda: Sampling(components=(Component(share=1.0),)),
        lambda: Sampling(components=(Component(length_term=True),)),
        lambda: Sampling(epoch_samples=5),
        lambda: weighted(epoch_samples=0),
        lambda: weighted(Component(share=0.5), Component()),
        lambda: Component(share=0.0),
        lambda: Component(share=math.nan),
        lambda: Component(where="length > 3"),
        lambda: Component(where=(" ",)),
        lambda: Component(clusters=None),
        lambda: Component(length_term=1),
    ],
)
def test_samplings_that_cannot_work_are_refused(make):
    with pytest.raises(LoaderConfigError):
        make()


def test_stores_that_do_not_fit_are_refused(pdb, distilled):
    two = Sampling(components=(Component(store="a"), Component(store="b")))
    with pytest.raises(LoaderConfigError, match="no component"):
        make_loader({"a": pdb, "b": distilled, "c": pdb}, two)
    with pytest.raises(LoaderConfigError, match="share records"):
        make_loader(pdb, Sampling(components=(Component(where=("length > 300",)), Component())))
    with pytest.raises(LoaderConfigError, match="no store"):
        make_loader({"a": pdb.url, "b": pdb}, two)
    with pytest.raises(LoaderConfigError, match="no sampling"):
        make_loader(pdb, {"kind": "once"})


OLD_STATE = {"format", "step", "seed", "global_batch", "recipe_digest", "store_fingerprint"}
FIRST_TWO_EPOCHS = [1, 8, 7, 3, 0, 6, 11, 5, 4, 10, 2, 9, 6, 10, 4, 1, 3, 9, 7, 11, 5, 8, 0, 2]
