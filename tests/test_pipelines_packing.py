"""Threads that do common work: each piece once, the costliest first, nobody idle while there is work."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines_data import GLOBINS, config_of, first_on_path, globins, needs_hmmer, stand_in, write_fasta

from foldfeed.pipelines import run_build
from foldfeed.pipelines.planning.packing import CommonWork, predicted_cost
from foldfeed.pipelines.tools.search_tool import find_binary

pytestmark = pytest.mark.timeout(120)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=5))
def test_every_piece_is_done_once_and_its_owner_gets_the_answer(batches):
    common, done, lock = CommonWork(), [], threading.Lock()

    def piece(name):
        with lock:
            done.append(name)
        return name

    work = [
        [(cost, lambda name=(owner, place): piece(name)) for place, cost in enumerate(costs)]
        for owner, costs in enumerate(batches)
    ]
    with ThreadPoolExecutor(len(batches)) as threads:
        answers = list(threads.map(common.do, work))
    assert answers == [[(owner, place) for place in range(len(one))] for owner, one in enumerate(batches)]
    assert sorted(done) == sorted(name for one in answers for name in one)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=20))
def test_one_thread_does_the_costliest_first(costs):
    order = []
    CommonWork().do([(cost, lambda cost=cost: order.append(cost)) for cost in costs])
    assert order == sorted(costs, reverse=True)


def test_a_thread_without_work_helps_one_that_is_busy_with_a_giant():
    """The giant ends only when all others are done, so whoever begins it cannot do any of them."""
    common, left, begun = CommonWork(), threading.Semaphore(0), threading.Event()
    small = [(1, left.release) for _ in range(20)]

    def giant():
        begun.set()
        for _ in range(len(small) + 1):
            assert left.acquire(timeout=60)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(common.do, [*small, (1000, giant)])
        assert begun.wait(60)
        second = threads.submit(common.do, [(9, left.release)])
        assert len(first.result()) == len(small) + 1
        assert second.result() == [None]


def test_an_error_reaches_its_owner_alone_whoever_meets_it():
    common, begun = CommonWork(), threading.Barrier(2)

    def fails():
        raise OSError("no such thing")

    def waits():
        begun.wait(60)

    with ThreadPoolExecutor(2) as threads:
        bad = threads.submit(common.do, [(9, waits), (5, fails), (0, fails)])
        good = threads.submit(common.do, [(9, waits), (4, int), (3, int)])
        assert good.result() == [None, 0, 0]
        with pytest.raises(OSError, match="no such thing"):
            bad.result()


def test_a_longer_query_and_a_larger_file_cost_more():
    assert predicted_cost(500, 1000) > predicted_cost(100, 1000) > predicted_cost(100, 999)
    assert predicted_cost(100, 0) > 0


@pytest.mark.external_tool
@needs_hmmer
def test_a_giant_query_stalls_no_other(tmp_path, monkeypatch):
    """The search of the giant, last in the file, ends only when all others have their results."""
    others = globins(7)
    giant = next(iter(others.values())) * 3
    script = f"""
for word in "$@"; do case "$word" in */query) query=$word;; esac; done
if grep -q {giant} "$query"; then
    for look in $(seq 300); do
        [ "$(find {tmp_path}/store.results/units -name '*.json' | wc -l)" = 7 ] && break
        [ "$look" = 300 ] && exit 9
        sleep 0.1
    done
fi
exec "{find_binary("jackhmmer")}" "$@"
"""
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", script))
    queries = write_fasta(tmp_path / "q.fasta", {**others, "giant": giant})
    report = run_build(config_of(tmp_path, queries, [f"uniref90={GLOBINS}"]))
    assert (report.num_records, report.num_searched, report.num_failed) == (8, 8, 0), report.dead_letters
