"""Features against a plain-loop reference, odd shapes, the two recipes against each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_reference import assert_same_features, nearest, reference_sample
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.loader import CropLoader, Recipe
from foldfeed.loader.features import bit_counters, clusters
from foldfeed.loader.features.clusters import _count_in_place
from foldfeed.loader.features.featurise import deletion_value, replace_masked
from foldfeed.loader.reading import plan

# (depth, length): one row, one residue, fewer rows than clusters, shorter and longer than the crop.
SHAPES = [(1, 1), (1, 23), (2, 5), (5, 40), (23, 17), (61, 37), (97, 12)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    url = tmp_path_factory.mktemp("features") / "store"
    store = FeatureStore.create(url, StoreSettings(tile_rows=16, tile_cols=8))
    records = [make_record(f"r{n}", *shape, seed=n) for n, shape in enumerate(SHAPES)]
    part = write_part(store.url, records, store.settings)
    store.commit([part.part_id], job_id="1")
    return store


def small(name: str, **values) -> Recipe:
    return Recipe.named(
        name, **({"crop_residues": 16, "num_clusters": 6, "num_extra": 9, "masked_fraction": 0.4} | values)
    )


def open_loader(store, recipe, seed=5) -> CropLoader:
    return CropLoader(store, recipe, seed=seed, global_batch=1)


@pytest.mark.parametrize("name", ["af2", "crop_first"])
@pytest.mark.parametrize("block_delete", [True, False])
def test_features_equal_the_plain_reference(store, name, block_delete):
    recipe = small(name, block_delete=block_delete)
    loader = open_loader(store, recipe)
    seen = set()
    for g in range(2 * len(store)):
        drawn = loader.plan(g)
        record = store.at(drawn.address.record)
        want = reference_sample(record.msa(), record.deletions(), drawn, recipe)
        have = loader.sample(g)
        assert have.keys() == want.keys()
        for key, tensor in have.items():
            array = tensor.numpy()
            assert array.dtype == want[key].dtype, key
            assert array.shape == want[key].shape, key
            np.testing.assert_allclose(array, want[key], rtol=1e-6, atol=0, err_msg=f"{key} of sample {g}")
            if key not in ("msa_feat", "extra_deletion_value"):
                assert np.array_equal(array, want[key]), key
        # Everything but the two arc tangents is equal to the last bit.
        exact = [*range(24), *range(25, 48)]
        assert np.array_equal(have["msa_feat"].numpy()[..., exact], want["msa_feat"][..., exact])
        seen.add((record.depth, record.length))
    assert seen == set(SHAPES)


def test_no_extra_rows_can_be_asked_for(store):
    features = open_loader(store, small("af2", num_extra=0)).sample(3)
    assert features["extra_msa"].shape == (0, 16)
    only_centre = open_loader(store, small("crop_first", num_clusters=1)).sample(3)
    assert only_centre["msa_feat"].shape == (1, 16, 49)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_assignment_equals_loops_with_ties_to_the_first(num_members, num_centres, width, seed):
    rng = np.random.default_rng(seed)
    # Few letters make many ties; gaps and masks must count for nothing.
    alphabet = rng.choice([0, 1, 20, 21, 22], size=3)
    members = rng.choice(alphabet[alphabet < 22] if (alphabet < 22).any() else [0], (num_members, width))
    centres = rng.choice(alphabet, (num_centres, width))
    have = clusters.assign(
        torch.from_numpy(members.astype(np.uint8)), torch.from_numpy(centres.astype(np.uint8))
    )
    assert have.tolist() == [nearest(list(member), centres.tolist()) for member in members]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 150),
    st.integers(1, 17),
    st.integers(1, 200),
    st.integers(1, 23),
    st.integers(0, 2**32 - 1),
)
def test_the_nearest_centre_by_counters_of_bits_is_that_by_one_hot(members, centres, width, letters, seed):
    rng = np.random.default_rng(seed)
    alphabet = rng.choice(23, letters, replace=False)
    member_codes = rng.choice(alphabet, (members, width)).astype(np.uint8)
    centre_codes = rng.choice(alphabet, (centres, width)).astype(np.uint8)
    want = clusters.assign(torch.from_numpy(member_codes), torch.from_numpy(centre_codes))
    have = bit_counters.nearest(member_codes, centre_codes)
    assert have.dtype == np.int64
    assert have.tolist() == want.tolist()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 63, 64, 133, 255, 256])
def test_rows_that_agree_everywhere_reach_the_last_bit_of_the_counters(width):
    codes = np.zeros((70, width), np.uint8)
    assert bit_counters.nearest(codes, codes[:3]).tolist() == [0] * 70
    centres = np.full((3, width), 22, np.uint8)
    centres[1] = 0
    assert bit_counters.nearest(codes, centres).tolist() == [1] * 70


@pytest.mark.parametrize(
    ("module", "size", "value"),
    [
        (clusters, "ONE_HOT_BLOCK_BYTES", 4 * 21 * 133 * 10),
        (bit_counters, "PLANES_BLOCK_BYTES", 8 * 22 * 133),
        (bit_counters, "SUM_BLOCK_BYTES", 8 * 133 * 2 * 3),
    ],
)
def test_rows_in_blocks_are_given_the_same_centres(monkeypatch, module, size, value):
    rng = np.random.default_rng(1)
    members = rng.integers(0, 22, (101, 133)).astype(np.uint8)
    centres = rng.integers(0, 23, (7, 133)).astype(np.uint8)

    def both():
        plain = clusters.assign(torch.from_numpy(members), torch.from_numpy(centres))
        return plain.tolist(), bit_counters.nearest(members, centres).tolist()

    whole = both()
    monkeypatch.setattr(module, size, value)
    assert both() == whole
    assert whole[0] == whole[1]


def test_clusters_summed_in_blocks_equal_clusters_summed_at_once(monkeypatch):
    rng = np.random.default_rng(2)
    members, centres = (torch.from_numpy(rng.integers(0, 22, (n, 19)).astype(np.uint8)) for n in (53, 4))
    deleted, own = (torch.from_numpy(rng.integers(0, 2**30, (n, 19)).astype(np.int32)) for n in (53, 4))
    assignment = clusters.assign(members, centres)
    whole = clusters.summarise(centres, own, members, deleted, assignment)
    monkeypatch.setattr(clusters, "SUMMARY_BLOCK_ROWS", 10)
    blocks = clusters.summarise(centres, own, members, deleted, assignment)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks, strict=True))
    # Sums of large counts do not overflow: the mean stays between its smallest and largest member.
    assert float(whole[1].max()) <= 2**30
    assert float(whole[1].min()) >= 0


def test_features_do_not_depend_on_the_number_of_torch_threads(store):
    before = torch.get_num_threads()
    loader = open_loader(store, Recipe.named("af2", crop_residues=37, num_clusters=40, num_extra=60))
    try:
        torch.set_num_threads(1)
        one = [loader.sample(g) for g in range(len(store))]
        torch.set_num_threads(3)
        three = [loader.sample(g) for g in range(len(store))]
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, three, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_recipes_share_every_draw_and_differ_in_cluster_statistics_only(store):
    af2, crop_first = open_loader(store, small("af2")), open_loader(store, small("crop_first"))
    differing = 0
    for g in range(3 * len(store)):
        a, b = af2.sample(g), crop_first.sample(g)
        assert all(torch.equal(a[key], b[key]) for key in a if key != "msa_feat")
        assert torch.equal(a["msa_feat"][..., :25], b["msa_feat"][..., :25])
        differing += not torch.equal(a["msa_feat"], b["msa_feat"])
    assert differing > 0


def test_recipes_are_equal_where_crop_and_rows_cover_what_af2_reads(store):
    values = {"crop_residues": 40, "num_clusters": 6, "num_extra": 97}
    af2, crop_first = (open_loader(store, small(name, **values)) for name in ("af2", "crop_first"))
    for g in range(2 * len(store)):
        a, b = af2.sample(g), crop_first.sample(g)
        assert all(torch.equal(a[key], b[key]) for key in a), g


def test_tokens_drawn_from_the_profile_follow_it():
    profile = np.zeros((2, 22), np.float32)
    profile[0, [3, 7, 21]] = [0.5, 0.25, 0.25]
    profile[1, 20] = 1.0
    num = 20_000
    codes = torch.zeros((num, 2), dtype=torch.uint8)
    action = torch.full((num, 2), plan.FROM_PROFILE, dtype=torch.uint8)
    u = torch.from_numpy(np.random.default_rng(3).random(2 * num))
    out = replace_masked(codes, action, torch.from_numpy(profile), torch.arange(2 * num), u).numpy()
    counts = np.bincount(out[:, 0], minlength=22)
    assert set(np.flatnonzero(counts)) == {3, 7, 21}
    assert abs(counts[3] / num - 0.5) < 4.5 * 0.5 / np.sqrt(num)
    assert np.all(out[:, 1] == 20)


def test_the_ends_of_u_never_give_a_token_that_does_not_occur():
    profile = torch.zeros((1, 22))
    profile[0, 4:7] = 1 / 3
    codes = torch.zeros((2, 1), dtype=torch.uint8)
    action = torch.full((2, 1), plan.FROM_PROFILE, dtype=torch.uint8)
    u = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert replace_masked(codes, action, profile, torch.arange(2), u).flatten().tolist() == [4, 6]


def test_deletion_value_is_the_formula_rounded_once():
    counts = torch.arange(0, 5000, dtype=torch.int32)
    want = (2 / np.pi * np.arctan(np.arange(5000) / 3.0)).astype(np.float32)
    np.testing.assert_allclose(deletion_value(counts).numpy(), want, rtol=1.2e-7)
    # The value of a count does not depend on where it stands in a tensor.
    for shift in range(1, 20):
        assert torch.equal(deletion_value(counts[shift:]), deletion_value(counts)[shift:])


@pytest.mark.parametrize("size", [1, 7, 64])
def test_counting_without_waiting_gives_what_bincount_gives(size):
    generator = torch.Generator().manual_seed(size)
    for shape in ((0,), (1,), (50, 3)):
        for dtype in (torch.int64, torch.uint8):
            values = torch.randint(0, size, shape, generator=generator).to(dtype)
            want = torch.bincount(values.reshape(-1), minlength=size)
            have = _count_in_place(values.reshape(-1), size)
            assert have.dtype == want.dtype
            assert torch.equal(have, want)


@pytest.mark.parametrize("fault", ["missing", "additional", "dtype", "shape", "nan", "both nan", "value"])
def test_the_comparison_of_features_sees(fault):
    want = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}
    have = {key: tensor.clone() for key, tensor in want.items()}
    assert_same_features(have, want)
    if fault == "missing":
        del have["b"]
    elif fault == "additional":
        have["c"] = torch.zeros(1)
    elif fault == "dtype":
        have["b"] = have["b"].int()
    elif fault == "shape":
        have["b"] = torch.tensor([3, 3])
    elif fault == "value":
        have["a"][1] += 1e-3
    else:
        have["a"][0] = torch.nan
    if fault == "both nan":
        want["a"][0] = torch.nan
    with pytest.raises(AssertionError, match=r"a: |b: |\['b'\]|\['c'\]"):
        assert_same_features(have, want)
