"""The prefetcher: order, bounds, errors and an end without leftovers."""

import functools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_until

from foldfeed.loader import LoaderConfigError, LoaderUseError
from foldfeed.loader.prefetch import StepPrefetcher
from foldfeed.loader.reading.early_start import SlowFirst


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("foldfeed-")]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 3])
def test_steps_come_in_order_whatever_task_is_slow(num_threads, depth):
    rng = random.Random(num_threads)
    delays = {(step, part): rng.choice([0, 0, 0.004]) for step in range(40) for part in range(3)}

    def task(step, part):
        time.sleep(delays.get((step, part), 0))
        return step, part

    with StepPrefetcher(
        lambda step: [lambda part=part: task(step, part) for part in range(3)],
        lambda step, parts: (step, parts),
        first_step=5,
        depth=depth,
        num_threads=num_threads,
    ) as steps:
        for step in range(5, 30):
            assert steps.next() == (step, [(step, part) for part in range(3)])
    assert loader_threads() == []


def test_no_more_than_depth_steps_are_made_ahead():
    begun = []
    with StepPrefetcher(
        lambda step: [lambda: begun.append(step)],
        lambda step, parts: step,
        first_step=0,
        depth=3,
        num_threads=4,
    ) as steps:
        wait_until(lambda: len(begun) == 3)
        time.sleep(0.05)
        assert sorted(begun) == [0, 1, 2]
        steps.next()
        wait_until(lambda: len(begun) == 4)
        time.sleep(0.05)
        assert sorted(begun) == [0, 1, 2, 3]


@pytest.mark.parametrize("where", ["task", "assemble"])
def test_an_error_arrives_at_its_step_after_the_steps_before_it(where):
    def fail_at_four(step, place):
        if step == 4 and place == where:
            raise ZeroDivisionError(f"step {step}")
        return step

    steps = StepPrefetcher(
        lambda step: [lambda: fail_at_four(step, "task"), lambda: 0],
        lambda step, parts: fail_at_four(step, "assemble"),
        first_step=0,
        depth=6,
        num_threads=3,
    )
    assert [steps.next() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError, match="step 4"):
        steps.next()
    with pytest.raises(LoaderUseError, match="closed"):
        steps.next()
    assert loader_threads() == []


def test_close_ends_all_threads_with_tasks_queued_and_running():
    gate = threading.Event()
    steps = StepPrefetcher(
        lambda step: [lambda: gate.wait(20) for _ in range(4)],
        lambda step, parts: step,
        first_step=0,
        depth=4,
        num_threads=2,
    )
    wait_until(lambda: len(loader_threads()) == 3)
    threading.Timer(0.05, gate.set).start()
    steps.close()
    steps.close()
    assert loader_threads() == []


def test_an_interrupted_consumer_leaves_no_threads(monkeypatch):
    steps = StepPrefetcher(
        lambda step: [lambda: step], lambda step, parts: step, first_step=0, depth=2, num_threads=1
    )

    class Interrupted:
        def result(self):
            raise KeyboardInterrupt

    steps._ahead[0] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        steps.next()
    assert loader_threads() == []


def test_waiting_is_measured():
    with StepPrefetcher(
        lambda step: [lambda: time.sleep(0.1)],
        lambda step, parts: step,
        first_step=0,
        depth=1,
        num_threads=1,
    ) as steps:
        for _ in range(3):
            steps.next()
        assert 0.06 < steps.wait_s < 5


def test_bounds_are_checked():
    for values, field in (({"depth": 0}, "prefetch_steps"), ({"num_threads": 0}, "num_threads")):
        with pytest.raises(LoaderConfigError, match=field):
            StepPrefetcher(
                lambda step: [],
                lambda step, parts: step,
                **({"first_step": 0, "depth": 1, "num_threads": 1} | values),
            )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 7))
def test_slow_tasks_begin_first_and_overtake_by_less_than_a_window(costs, window):
    started: list[int] = []
    gate = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(gate.wait)
        tasks = SlowFirst(threads, window)
        for number, cost in enumerate(costs):
            tasks.submit(cost, functools.partial(started.append, number))
        gate.set()
    assert sorted(started) == list(range(len(costs)))
    for place, number in enumerate(started):
        later = [other for other in started[:place] if other > number]
        assert len(later) < window
        assert all(costs[other] > costs[number] for other in later)


def test_the_dearest_task_of_a_step_begins_first_and_results_keep_their_order():
    started: list[tuple[int, int]] = []

    def tasks(step: int):
        return [functools.partial(run, step, number) for number in range(4)]

    def run(step: int, number: int) -> int:
        started.append((step, number))
        return 10 * step + number

    with StepPrefetcher(
        tasks,
        lambda step, parts: parts,
        first_step=0,
        depth=1,
        num_threads=1,
        costs=lambda step: [3, 7, 7, 9],
    ) as steps:
        assert [steps.next() for _ in range(2)] == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert started[:8] == [(0, 3), (0, 1), (0, 2), (0, 0), (1, 3), (1, 1), (1, 2), (1, 0)]
