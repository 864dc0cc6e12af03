"""What is drawn: block deletion, rows, crops, masking; evenly, and from length and depth alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.loader import LoaderConfigError, Recipe
from foldfeed.loader.order.counter_rng import Purpose, stream
from foldfeed.loader.order.order import SampleAddress
from foldfeed.loader.reading.plan import (
    FROM_PROFILE,
    NOT_MASKED,
    SAME,
    delete_blocks,
    draw_crop,
    draw_masking,
    draw_rows,
    make_plan,
)

MASK = 22


def address(sample: int) -> SampleAddress:
    return SampleAddress(sample=sample, epoch=0, position=sample, record=0)


def even(counts: np.ndarray) -> bool:
    """Chi-square against even counts within 4.5 sigma."""
    expected = counts.sum() / counts.size
    free = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - free) / np.sqrt(2 * free) < 4.5


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(["af2", "crop_first"]),
    length=st.integers(1, 80),
    depth=st.integers(1, 300),
    sample=st.integers(0, 2**40),
    num_clusters=st.integers(1, 20),
    num_extra=st.integers(0, 40),
    block_delete=st.booleans(),
)
def test_a_plan_is_consistent(name, length, depth, sample, num_clusters, num_extra, block_delete):
    recipe = Recipe.named(
        name,
        crop_residues=32,
        num_clusters=num_clusters,
        num_extra=num_extra,
        block_delete=block_delete,
    )
    plan = make_plan(recipe, 3, address(sample), length, depth)
    start, stop = plan.crop
    assert 0 <= start < stop <= length
    assert stop - start == min(length, 32)
    assert plan.columns == ((0, length) if name == "af2" else plan.crop)
    assert plan.rows[0] == 0
    assert np.all(np.diff(plan.rows) > 0)
    assert plan.rows[-1] < depth
    assert plan.centres[0] == 0
    used = np.concatenate([plan.centres, plan.extras])
    assert len(np.unique(used)) == len(used)
    assert np.isin(used, plan.rows).all()
    survivors = draw_rows(recipe, 3, sample, depth)[0]
    assert len(plan.centres) == min(num_clusters, len(survivors))
    assert len(plan.extras) == min(num_extra, len(survivors) - len(plan.centres))
    assert len(plan.rows) == (len(survivors) if name == "af2" else len(used))
    if not block_delete:
        assert len(survivors) == depth
    assert plan.num_cells == len(plan.rows) * (plan.columns[1] - plan.columns[0])
    assert plan.masking.action.shape == (len(plan.centres), plan.columns[1] - plan.columns[0])
    again = make_plan(recipe, 3, address(sample), length, depth)
    assert np.array_equal(again.rows, plan.rows)
    assert np.array_equal(again.masking.action, plan.masking.action)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 10, 101])
def test_block_deletion_equals_its_definition(depth):
    recipe = Recipe()
    for sample in range(50):
        starts = stream(0, sample, Purpose.BLOCK_DELETE).integers(depth, 5).tolist()
        size = int(np.floor(np.float32(depth) * np.float32(0.3)))
        deleted = {min(start + i, depth - 1) for start in starts for i in range(size)}
        want = [0, *(row for row in range(1, depth) if row not in deleted)]
        assert delete_blocks(recipe, stream(0, sample, Purpose.BLOCK_DELETE), depth).tolist() == want


def test_block_deletion_keeps_about_26_percent_of_many_rows():
    kept = [len(delete_blocks(Recipe(), stream(1, g, Purpose.BLOCK_DELETE), 5000)) / 5000 for g in range(600)]
    # Integral of (1 - min(x, 0.3))**5 over 0..1 = 0.265; the standard deviation of one draw is about 0.11.
    assert abs(np.mean(kept) - 0.265) < 4.5 * np.std(kept) / np.sqrt(len(kept))


def test_every_row_is_as_often_centre_or_extra_as_any_other():
    recipe = Recipe(num_clusters=4, num_extra=5, block_delete=False)
    centre_counts, extra_counts = np.zeros(20), np.zeros(20)
    for sample in range(3000):
        _, centres, extras = draw_rows(recipe, 0, sample, 20)
        centre_counts[centres] += 1
        extra_counts[extras] += 1
    assert centre_counts[0] == 3000
    assert extra_counts[0] == 0
    assert even(centre_counts[1:])
    assert even(extra_counts[1:])


def test_crops_start_evenly_and_the_unclamped_rule_prefers_the_start():
    starts = [draw_crop(Recipe(crop_residues=10), stream(0, g, Purpose.CROP), 30)[0][0] for g in range(4000)]
    assert even(np.bincount(starts, minlength=21))
    assert max(starts) == 20
    recipe = Recipe(crop_residues=10, unclamped_fraction=1.0)
    starts = [draw_crop(recipe, stream(0, g, Purpose.CROP), 30)[0][0] for g in range(4000)]
    # E[start] = E[(n - x) / 2] = n / 4 with x uniform in 0..n.
    assert abs(np.mean(starts) - 5) < 4.5 * np.std(starts) / np.sqrt(4000)
    assert draw_crop(recipe, stream(0, 1, Purpose.CROP), 10)[0] == (0, 10)
    assert draw_crop(recipe, stream(0, 1, Purpose.CROP), 3)[0] == (0, 3)


def masking_counts(recipe: Recipe) -> tuple[np.ndarray, int]:
    counts = np.zeros(256)
    total = 0
    for sample in range(20):
        draw = draw_masking(recipe, stream(0, sample, Purpose.MASKING), 50, 200, (0, 200))
        counts += np.bincount(draw.action.reshape(-1), minlength=256)
        total += draw.action.size
    return counts, total


def test_masking_has_af2s_fractions():
    counts, total = masking_counts(Recipe())
    masked = total - counts[NOT_MASKED]
    assert abs(masked / total - 0.15) < 4.5 * np.sqrt(0.15 * 0.85 / total)
    for codes, share in ((slice(0, 20), 0.1), (FROM_PROFILE, 0.1), (SAME, 0.1), (MASK, 0.7)):
        assert abs(counts[codes].sum() / masked - share) < 4.5 * np.sqrt(share * (1 - share) / masked), codes
    assert even(counts[:20])
    assert counts[[20, 21, 23]].sum() == 0


def test_masking_follows_other_fractions_to_their_ends():
    counts, total = masking_counts(
        Recipe(masked_fraction=1.0, uniform_prob=0.0, profile_prob=0.0, same_prob=1.0)
    )
    assert counts[SAME] == total
    counts, total = masking_counts(Recipe(masked_fraction=0.0))
    assert counts[NOT_MASKED] == total
    counts, total = masking_counts(
        Recipe(masked_fraction=1.0, uniform_prob=1.0, profile_prob=0.0, same_prob=0.0)
    )
    assert counts[:20].sum() == total
    assert even(counts[:20])


def test_masking_of_a_window_is_the_window_of_the_masking():
    recipe = Recipe(masked_fraction=0.5, profile_prob=0.5)
    whole = draw_masking(recipe, stream(0, 1, Purpose.MASKING), 7, 40, (0, 40))
    part = draw_masking(recipe, stream(0, 1, Purpose.MASKING), 7, 40, (11, 30))
    assert np.array_equal(part.action, whole.action[:, 11:30])
    u_whole = np.full(whole.action.size, np.nan)
    u_whole[whole.profile_at] = whole.profile_u
    u_part = np.full(part.action.size, np.nan)
    u_part[part.profile_at] = part.profile_u
    assert np.array_equal(u_part.reshape(7, 19), u_whole.reshape(7, 40)[:, 11:30], equal_nan=True)
    assert whole.profile_u.size
    assert whole.profile_u.min() >= 0
    assert whole.profile_u.max() < 1


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": "af9"}, "name"),
        ({"crop_residues": 0}, "crop_residues"),
        ({"num_clusters": 0}, "num_clusters"),
        ({"num_extra": -1}, "num_extra"),
        ({"num_clusters": 2.0}, "num_clusters"),
        ({"masked_fraction": 1.5}, "masked_fraction"),
        ({"masked_fraction": float("nan")}, "masked_fraction"),
        ({"same_prob": 0.9}, "same_prob"),
        ({"block_delete": 1}, "block_delete"),
    ],
)
def test_a_recipe_that_cannot_work_names_the_value(values, field):
    with pytest.raises(LoaderConfigError, match=field):
        Recipe(**values)


def test_named_recipes_and_their_digests():
    assert Recipe.named("af2") == Recipe()
    assert Recipe.named("af2").digest != Recipe.named("crop_first").digest
    assert Recipe.named("af2", masked_fraction=0).digest == Recipe.named("af2", masked_fraction=0.0).digest
    assert Recipe.named("af2", num_extra=5).digest != Recipe.named("af2").digest
    with pytest.raises(LoaderConfigError, match="has no such value"):
        Recipe.named("af2", crop=3)
