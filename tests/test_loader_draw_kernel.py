"""The compiled form of random words, orders and masking gives the numbers that NumPy gives."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.feature_store.compiled import functions_of
from foldfeed.loader import Recipe
from foldfeed.loader.order import draw_kernel
from foldfeed.loader.order.counter_rng import Purpose, Stream, _order_by_numpy, stream, words_by_numpy
from foldfeed.loader.order.order import SampleAddress
from foldfeed.loader.reading.plan import count_kept, delete_blocks, draw_masking, make_plan

compiled = pytest.mark.skipif(not draw_kernel.is_usable(), reason="installed without it (no C compiler)")
KEYS = st.integers(0, 2**128 - 1)


@pytest.fixture
def without(monkeypatch):
    """Turns the compiled form off when called."""
    return lambda: monkeypatch.setattr(draw_kernel, "_functions", lambda: None)


@compiled
@settings(max_examples=60, deadline=None)
@given(
    key=KEYS, first=st.integers(0, 2**40), count=st.sampled_from((0, 1, 3, 4, 5, 511, 512, 513, 1027, 1600))
)
def test_compiled_words_are_numpys(key, first, count):
    halves = Stream(key).key
    expected = words_by_numpy(halves, first, count)
    assert np.array_equal(draw_kernel.words(halves, first, count), expected)
    few = Stream(key)
    few.skip(first)
    assert few.few_words(count) == expected.tolist()
    few = Stream(key)
    few.skip(first)
    assert few.few_integers(1000, count) == ((expected >> 32) * 1000 >> 32).tolist()


@compiled
@settings(max_examples=60, deadline=None)
@given(key=KEYS, count=st.integers(0, 5000), bits=st.sampled_from((64, 12, 1)), data=st.data())
def test_compiled_orders_are_those_of_a_stable_sort(key, count, bits, data):
    """Also of words that are often equal, or all in one bucket."""
    words = Stream(key).words(min(count, 300 if bits == 1 else count)) >> np.uint64(64 - bits)
    if data.draw(st.booleans()):
        words <<= np.uint64(64 - bits)
    expected = np.argsort(words, kind="stable")
    for found in (draw_kernel.order(words), _order_by_numpy(words)):
        assert found.dtype == np.int64
        assert np.array_equal(found, expected)
    limit = data.draw(st.integers(0, count + 1))
    found = draw_kernel.order(words, limit, 7)
    assert found.dtype == np.int64
    assert np.array_equal(found, 7 + expected[:limit])


@settings(max_examples=60, deadline=None)
@given(key=KEYS, count=st.integers(0, 600), first_item=st.integers(0, 3), data=st.data())
def test_the_head_of_an_order_is_the_whole_ones(key, count, first_item, data):
    limit = data.draw(st.integers(0, count))
    expected = first_item + Stream(key).order(count)[:limit]
    assert np.array_equal(Stream(key).order(count, limit, first_item), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_kernel, "_functions", lambda: None)
        assert np.array_equal(Stream(key).order(count, limit, first_item), expected)


@settings(max_examples=100, deadline=None)
@given(
    sample=st.integers(0, 2**40),
    depth=st.integers(1, 3000),
    blocks=st.integers(0, 400),
    fraction=st.floats(0, 1),
)
def test_survivors_of_block_deletion_are_counted_without_making_them(sample, depth, blocks, fraction):
    recipe = Recipe.named("af2", num_blocks=blocks, block_fraction=fraction)
    made, counted = (stream(5, sample, Purpose.BLOCK_DELETE) for _ in range(2))
    assert count_kept(recipe, counted, depth) == len(delete_blocks(recipe, made, depth))
    assert counted.few_words(2) == made.few_words(2)


@compiled
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    centres=st.integers(0, 9),
    length=st.integers(1, 1300),
    masked=st.sampled_from((1e-9, 0.15, 0.5, 1.0)),
    shares=st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any),
    data=st.data(),
)
def test_compiled_masking_is_numpys(seed, centres, length, masked, shares, data):
    uniform, profile, same, _ = (share / sum(shares) for share in shares)
    probs = {"uniform_prob": uniform, "profile_prob": profile, "same_prob": same}
    recipe = Recipe.named("af2", masked_fraction=masked, **probs)
    start = data.draw(st.integers(0, length - 1))
    columns = start, data.draw(st.integers(start, length))
    one, other = (stream(seed, 1, Purpose.MASKING) for _ in range(2))
    # Not always from the stream's beginning.
    for random in (one, other):
        random.words(seed % 6)
    drawn = draw_masking(recipe, one, centres, length, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_kernel, "_functions", lambda: None)
        expected = draw_masking(recipe, other, centres, length, columns)
    for name in ("action", "profile_at", "profile_u"):
        found, wanted = getattr(drawn, name), getattr(expected, name)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert np.array_equal(found, wanted)
    assert np.array_equal(one.words(3), other.words(3))


@compiled
def test_a_form_of_another_version_is_left_aside_and_told(caplog):
    module = "foldfeed.loader.order._draw"
    assert functions_of(module, ("few_2", "few_of_a_later_version")) is None
    assert "another version" in caplog.text
    assert "foldfeed again" in caplog.text
    caplog.clear()
    assert functions_of(module, ("few_2",)) is not None
    assert functions_of(module + "_that_nobody_built", ("few_2",)) is None
    assert caplog.text == ""


@compiled
def test_threads_draw_what_one_does():
    """The compiled form runs without the interpreter's lock, and others change what memory was given back."""
    recipes = [
        Recipe.named("af2", uniform_prob=u, profile_prob=0.3 - u, same_prob=0.1) for u in (0.0, 0.1, 0.2)
    ]

    def drawn(sample):
        found = draw_masking(recipes[sample % 3], stream(1, sample, Purpose.MASKING), 9, 20, (0, 20))
        return found.action.tobytes() + found.profile_u.tobytes()

    expected = [drawn(sample) for sample in range(3000)]
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(drawn, range(3000)))
    finally:
        sys.setswitchinterval(interval)
    assert found == expected


@compiled
@pytest.mark.parametrize("name", ["af2", "crop_first", "af3", "masked_lm"])
@pytest.mark.parametrize("row_order", ["rank", "permuted"])
def test_without_the_compiled_form_plans_are_the_same(without, name, row_order):
    def plans():
        recipe = Recipe.named(name)
        addresses = [SampleAddress(sample=s, epoch=0, position=s, record=s) for s in range(6)]
        sizes = [(137, 1), (1, 40), (300, 1500), (429, 6000), (64, 33_000), (900, 700)]
        return [
            make_plan(recipe, 5, address, *size, row_order)
            for address, size in zip(addresses, sizes, strict=True)
        ]

    drawn = plans()
    without()
    for plan, wanted in zip(drawn, plans(), strict=True):
        assert (plan.crop, plan.columns, plan.slab) == (wanted.crop, wanted.columns, wanted.slab)
        for found, expected in (
            *((getattr(plan, field), getattr(wanted, field)) for field in ("rows", "centres", "extras")),
            *(
                (getattr(plan.masking, field), getattr(wanted.masking, field))
                for field in ("action", "profile_at", "profile_u")
            ),
        ):
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected)


@compiled
def test_a_form_that_another_thread_is_loading_is_found(monkeypatch):
    """The interpreter enters a compiled module before it has its spec, and find_spec refuses such a one."""
    module = "foldfeed.loader.order._draw"
    functions_of(module, ("few_2",))
    monkeypatch.setattr(sys.modules[module], "__spec__", None)
    assert functions_of(module, ("few_2",)) is not None
