"""Meters: seconds add up to lifetimes, bytes to what was read; text and trace are what others read."""

import itertools
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader_stream import build_store, make_loader, take

from foldfeed.loader import LoaderConfigError, LoaderUseError, Recipe
from foldfeed.loader.meters.histogram import RELATIVE_ERROR, SMALLEST_S, LatencyHistogram
from foldfeed.loader.meters.meters import Meters
from foldfeed.loader.meters.reports import CONTENT_TYPE, prometheus_text, scalars, table
from foldfeed.loader.meters.server import MetricsServer
from foldfeed.loader.meters.trace import Tracer
from foldfeed.loader.reading.reader import SampleReader

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("meters") / "store")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(2 * SMALLEST_S, 1000), min_size=1, max_size=300))
def test_quantiles_are_off_by_the_stated_error_at_most(durations):
    histogram = LatencyHistogram()
    for seconds in durations:
        histogram.add(seconds)
    ordered = sorted(durations)
    for share in (0.0, 0.5, 0.9, 0.99, 0.999, 1.0):
        exact = ordered[max(1, math.ceil(share * len(ordered))) - 1]
        assert abs(histogram.quantile(share) - exact) <= RELATIVE_ERROR * exact * (1 + 1e-9)
    assert histogram.count == len(ordered)
    assert math.isclose(histogram.sum_s, sum(ordered), rel_tol=1e-9)
    assert (histogram.min_s, histogram.max_s) == (ordered[0], ordered[-1])


def test_a_histogram_takes_what_is_outside_its_range_and_does_not_grow():
    histogram = LatencyHistogram()
    assert histogram.quantile(0.5) == 0.0
    assert histogram.summary() | {"min_s": 0.0} == histogram.summary()
    for seconds in (0.0, 1e-9, 1e9):
        histogram.add(seconds)
    assert (histogram.min_s, histogram.max_s, histogram.count) == (0.0, 1e9, 3)
    assert histogram.quantile(0.1) <= SMALLEST_S
    assert histogram.quantile(1.0) > 1000
    before = len(pickle.dumps([getattr(histogram, name) for name in LatencyHistogram.__slots__]))
    for exponent in range(-9, 9):
        for _ in range(200):
            histogram.add(10.0**exponent)
    after = len(pickle.dumps([getattr(histogram, name) for name in LatencyHistogram.__slots__]))
    assert histogram.count == 3603
    # Larger numbers in as many buckets.
    assert after < before + 8 * 20


def test_busy_and_waiting_of_a_stage_are_its_threads_lives():
    """Measured by the threads themselves: what they slept busy, what they slept idle, how long they lived."""
    meters = Meters()
    stage = meters.stage("prepare")
    lives, busy, idle = [], [], []

    def work(number: int) -> None:
        began = time.perf_counter()
        stage.join()
        for round_ in range(3):
            with stage.doing("prepare" if round_ else "fetch"):
                started = time.perf_counter()
                time.sleep(0.005 * (number + 1))
                busy.append(time.perf_counter() - started)
            started = time.perf_counter()
            time.sleep(0.01)
            idle.append(time.perf_counter() - started)
        lives.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = meters.report()["stages"]["prepare"]
    assert found["num_workers"] == 4
    assert math.isclose(found["busy_s"] + found["waiting_s"], found["lifetime_s"], rel_tol=1e-9)
    assert found["busy_s"] >= sum(busy)
    assert found["waiting_s"] >= sum(idle)
    assert found["lifetime_s"] >= sum(lives)
    assert {name: spent["count"] for name, spent in found["activities"].items()} == {"fetch": 4, "prepare": 8}
    meters.leave()
    ended = meters.report()["stages"]["prepare"]
    assert ended["num_workers"] == 0
    time.sleep(0.02)
    assert meters.report()["stages"]["prepare"] == ended


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("foldfeed")]


def check_stages(found: dict) -> None:
    for name, stage in found["stages"].items():
        assert math.isclose(stage["busy_s"] + stage["waiting_s"], stage["lifetime_s"], rel_tol=1e-6), name
        assert stage["busy_s"] == sum(spent["seconds"] for spent in stage["activities"].values())


def sizes_of(planned) -> np.ndarray:
    """Bytes stored, decoded, used, from the plan alone."""
    plan = planned.plan
    tiles = planned.record.plan(slice(*plan.columns), plan.selection)
    cells = (len(tiles.msa_tiles) + len(tiles.deletion_tiles)) * 16 * 8
    tokens, counts = (len(plan.rows) * (window[1] - window[0]) for window in (plan.columns, plan.crop))
    return np.array([tiles.num_bytes, cells, tokens + counts])


def counted(found: dict) -> np.ndarray:
    return np.array([found[name] for name in ("stored_bytes", "decoded_bytes", "used_bytes")])


@pytest.mark.parametrize("name", ["af2", "crop_first"])
def test_bytes_are_those_of_what_was_really_read(store, monkeypatch, name):
    read = SampleReader.fetch
    seen = []

    def noted(self, planned, room=None):
        arrays = read(self, planned, room)
        seen.append(sizes_of(planned))
        return arrays

    monkeypatch.setattr(SampleReader, "fetch", noted)
    recipe = Recipe.named(name, crop_residues=12, num_clusters=5, num_extra=7)
    with make_loader(store, recipe, num_threads=3) as loader:
        take(loader, 4)
        loader._stop()
        found = loader.meters()
        assert found["samples_read"] == len(seen) == found["latencies"]["sample_read"]["count"]
        np.testing.assert_array_equal(counted(found), np.sum(seen, axis=0))
        assert (found["steps"], found["samples"]) == (4, 32)
        check_stages(found)
        assert found["stages"].keys() == {"prepare", "assemble", "train"}
        assert found["stages"]["prepare"]["activities"].keys() == {"plan", "fetch", "prepare"}
        # They go on where the loader goes on, and every thread that was there has gone.
        assert {stage["num_workers"] for stage in found["stages"].values()} == {0}
        assert loader_threads() == []
        take(loader, 2)
        later = loader.meters()
        assert (later["steps"], later["latencies"]["step_wait"]["count"]) == (6, 6)
        assert later["stages"]["prepare"]["num_workers"] == 3
        for stage, before in found["stages"].items():
            assert later["stages"][stage]["lifetime_s"] > before["lifetime_s"]
    assert loader.meters()["steps"] == 6
    assert loader_threads() == []


def test_meters_of_reading_processes_are_merged(store, tmp_path):
    with make_loader(store, num_processes=2, num_threads=2, trace=tmp_path / "trace.json") as loader:
        take(loader, 3)
        time.sleep(0.3)
        found = loader.meters()
        pids = loader._supply.pids
        # All that was asked for has been read by now or has no room; all was counted once.
        assert found["queues"]["samples_read_ahead"] <= found["queues"]["samples_asked"]
        assert found["reading_processes"] == 2
        check_stages(found)
        assert found["stages"]["plan"]["num_workers"] == 2
        assert 2 <= found["stages"]["fetch"]["num_workers"] <= 4
        assert found["stages"]["prepare"]["activities"].keys() == {"prepare"}
        assert found["samples_read"] >= 24
    ended = loader.meters()
    assert ended["reading_processes"] == ended["stages"]["fetch"]["num_workers"] == 0
    done = ended["stages"]["fetch"]["activities"]["fetch"]["count"]
    assert ended["samples_read"] == ended["latencies"]["sample_read"]["count"] >= 24
    # A piece is told with the time of all threads of its process: each of the four may have more of a step's
    # eight samples behind it, or be about to leave the last one.
    assert abs(ended["samples_read"] - done) <= 4 * 8
    # Whatever was read, each sample at most once: its sizes are those of that many of the first samples.
    events = check_trace(tmp_path / "trace.json")
    fetched = sorted(e["args"]["sample"] for e in events if e["name"] == "fetch")
    assert len(fetched) == len(set(fetched)) == ended["samples_read"]
    sizes = sum(sizes_of(loader._reader.planned(sample)) for sample in fetched)
    np.testing.assert_array_equal(counted(ended), sizes)
    assert {e["pid"] for e in events if e["name"] in ("plan", "fetch")} == set(pids)


def check_trace(path) -> list[dict]:
    """Returns the complete events of a trace, once it is what the format says."""
    events = json.loads(path.read_text())
    assert {event["ph"] for event in events} <= {"X", "M", "i"}
    named = set()
    for event in events:
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert event["args"].keys() == {"name"}
            named.add((event["pid"], event["tid"]))
        assert type(event["pid"]) is type(event["tid"]) is int
    complete = [event for event in events if event["ph"] == "X"]
    by_thread: dict[tuple[int, int], list[dict]] = {}
    for event in complete:
        assert event.keys() == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert (event["pid"], event["tid"]) in named
        by_thread.setdefault((event["pid"], event["tid"]), []).append(event)
    for mine in by_thread.values():
        mine.sort(key=lambda event: event["ts"])
        # Microseconds with three digits: neighbours may touch.
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.002 for a, b in itertools.pairwise(mine))
    return complete


def test_a_trace_holds_what_was_done_while_it_was_written(store, tmp_path):
    path = tmp_path / "trace.json"
    with make_loader(store, num_threads=2) as loader:
        take(loader, 1)
        with loader.tracing(path):
            take(loader, 3)
            with (
                pytest.raises(LoaderUseError, match=r"trace is written to .*trace\.json already"),
                loader.tracing(path),
            ):
                pass
            # A run that was killed leaves all but the bracket.
            torn = path.read_text()
            assert json.loads(torn + "]")
        take(loader, 1)
        loader._stop()
    events = check_trace(path)
    waits = [event for event in events if event["name"] == "wait"]
    assert [event["args"]["step"] for event in waits] == [1, 2, 3]
    assert {event["name"] for event in events} == {"plan", "fetch", "prepare", "assemble", "wait"}
    assert len({event["tid"] for event in events if event["name"] == "prepare"}) <= 2
    with pytest.raises(FileNotFoundError):
        make_loader(store, trace=tmp_path / "no" / "trace.json")
    with (
        make_loader(store) as loader,
        pytest.raises(FileNotFoundError),
        loader.tracing(tmp_path / "no" / "t"),
    ):
        pass


def test_a_trace_is_bounded_and_says_what_it_left_out(tmp_path):
    tracer = Tracer(tmp_path / "t.json", max_events=3)
    for sample in range(8):
        tracer.event("fetch", time.perf_counter(), 0.0, {"sample": sample})
    tracer.close()
    tracer.close()
    tracer.event("fetch", 0.0, 1.0, {})
    assert [event["args"]["sample"] for event in check_trace(tmp_path / "t.json")] == [0, 1, 2]
    assert json.loads((tmp_path / "t.json").read_text())[-1]["args"] == {"left_out": 5}


FULL_DISK = """
import os, resource, sys
from foldfeed.loader import CropLoader, FeatureStore, Recipe

recipe = Recipe.named("crop_first", crop_residues=8, num_clusters=4, num_extra=4)
store = FeatureStore.open(sys.argv[1])
loader = CropLoader(store, recipe, seed=1, global_batch=8, num_processes=1, trace=sys.argv[2])
next(loader)
# As if the disk had no more room: the trace may grow by 10 kB more.
limit = os.path.getsize(sys.argv[2]) + 10_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for _ in range(40):
    batch = next(loader)
pids = loader._supply.pids
try:
    loader.close()
except OSError as error:
    assert loader._closed
    print(limit)
    print(batch.step, loader.meters()["samples_read"] >= 328, error)
loader.close()
"""


def test_a_full_disk_ends_the_trace_and_nothing_else(store, tmp_path):
    path = tmp_path / "trace.json"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, store.url, str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    limit, said = done.stdout.split("\n", 1)
    assert said == f"40 True [Errno 27] the trace is cut short (File too large): '{path}'\n"
    assert done.stderr == ""
    text = path.read_text()
    assert int(limit) - 1000 < len(text) <= int(limit)
    # All whole lines are events.
    assert len(json.loads(text.rpartition(",\n")[0] + "]")) > 100


def test_a_consumer_that_computes_is_busy_and_one_that_starves_waits(store, monkeypatch):
    with make_loader(store, prefetch_steps=1) as loader:
        take(loader, 1)
        started = time.perf_counter()
        for _ in range(3):
            time.sleep(0.05)
            next(loader)
        passed = time.perf_counter() - started
        found = loader.meters()
        train = found["stages"]["train"]
        assert train["busy_s"] >= 0.15
        assert train["lifetime_s"] >= passed
        assert math.isclose(found["wait_s"], found["stall_s"])
        assert found["wait_s"] == found["latencies"]["step_wait"]["sum_s"]
        assert loader.stats["wait_s"] <= found["wait_s"] <= train["waiting_s"] * (1 + 1e-9)
    read = SampleReader.fetch

    def slow(self, planned, room=None):
        time.sleep(0.02)
        return read(self, planned, room)

    monkeypatch.setattr(SampleReader, "fetch", slow)
    with make_loader(store, num_threads=1) as loader:
        take(loader, 2)
        found = loader.meters()
    assert found["stages"]["train"]["waiting_s"] > 0.3
    assert found["latencies"]["sample_read"]["p50_s"] > 0.02 * (1 - RELATIVE_ERROR)


SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')


def parsed(text: str) -> dict[str, tuple[str, dict]]:
    """Reads Prometheus' text format 0.0.4 strictly; returns type and values by (name, labels) of families."""
    assert text.endswith("\n")
    families: dict[str, tuple[str, dict]] = {}
    name = kind = ""
    helped = ""
    for line in text.splitlines():
        assert line == line.strip()
        if line.startswith("# HELP "):
            helped, words = line[7:].split(" ", 1)
            assert helped not in families
            assert words
        elif line.startswith("# TYPE "):
            name, kind = line[7:].split(" ")
            assert name == helped
            assert kind in ("counter", "gauge", "summary")
            families[name] = (kind, {})
        else:
            full, labels, value = SAMPLE.fullmatch(line).groups()
            assert full in ([name, f"{name}_sum", f"{name}_count"] if kind == "summary" else [name])
            pairs, rest = [], labels or ""
            while rest:
                match = LABEL.match(rest)
                assert match, rest
                pairs.append(match.groups())
                rest = rest[match.end() :]
            assert len({key for key, _ in pairs}) == len(pairs)
            assert (kind == "summary" and full == name) == any(key == "quantile" for key, _ in pairs)
            key = (full, tuple(sorted(pairs)))
            assert key not in families[name][1]
            families[name][1][key] = float(value)
    return families


def test_text_for_prometheus_follows_its_grammar_and_says_what_was_counted(store):
    with make_loader(store, num_threads=2) as loader:
        take(loader, 3)
        found = loader.meters()
        found["cache"] = {"memory_hits": 3.0}
        odd = 'a"b\\c\nd'
        families = parsed(prometheus_text(found, {"rank": "1", "run": odd}))
    for name, (kind, samples) in families.items():
        assert name.startswith("foldfeed_loader_")
        assert name.endswith("_total") == (kind == "counter")
        assert samples
        for (_, labels), value in samples.items():
            assert ("rank", "1") in labels
            assert ("run", r"a\"b\\c\nd") in labels
            assert value >= 0

    def value(name: str, **labels: str) -> float:
        family = name.removesuffix("_count").removesuffix("_sum")
        pairs = {"rank": "1", "run": r"a\"b\\c\nd"} | labels
        return families[f"foldfeed_loader_{family}"][1][
            f"foldfeed_loader_{name}", tuple(sorted(pairs.items()))
        ]

    assert value("samples_total") == found["samples"] == 24
    assert value("stored_bytes_total") == found["stored_bytes"] > 0
    assert value("stage_busy_seconds_total", stage="prepare") == found["stages"]["prepare"]["busy_s"]
    assert value("activity_seconds_total", stage="prepare", activity="fetch") > 0
    assert value("sample_read_seconds", quantile="0.99") == found["latencies"]["sample_read"]["p99_s"]
    assert value("sample_read_seconds_count") == found["samples_read"]
    assert value("cache_total", event="memory_hits") == 3
    for bad in ("ra-nk", "0rank", "__rank", "räng", ""):
        with pytest.raises(ValueError, match="label"):
            prometheus_text(found, {bad: "1"})


def test_tables_and_scalars_are_of_the_same_numbers(store):
    with make_loader(store) as loader:
        assert len(table(loader.meters())) > 4, "before anything happened"
        assert all(math.isfinite(number) for number in scalars(loader.meters()).values())
        take(loader, 2)
        found = json.loads(json.dumps(loader.meters()))
    lines = table(found)
    assert lines[0].startswith("loader: 16 samples in 2 steps; the consumer stood still for ")
    assert [line.split()[0] for line in lines if line.endswith("s") and "busy" not in line][-3:] == [
        "sample_read",
        "sample_prepare",
        "step_wait",
    ]
    assert any(line.startswith("  prepare") and "fetch" in line for line in lines)
    numbers = scalars(found)
    assert numbers["loader/stall(s)"] == found["stall_s"]
    assert 0 < numbers["loader/busy_share/prepare"] <= 1
    assert all(isinstance(number, float) for number in numbers.values())


def test_the_server_answers_on_loopback_until_it_is_closed(store):
    with make_loader(store) as loader:
        take(loader, 1)
        with MetricsServer(lambda: prometheus_text(loader.meters()), 0) as server:
            url = f"http://127.0.0.1:{server.port}"
            for path in ("/metrics", "/metrics?x=1"):
                with urllib.request.urlopen(url + path, timeout=20) as answer:
                    assert answer.headers["Content-Type"] == CONTENT_TYPE
                    assert parsed(answer.read().decode())
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url + "/", timeout=20)
            # A client that hangs up in the middle does not end it.
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
                client.sendall(b"GET /metr")
            with urllib.request.urlopen(url + "/metrics", timeout=20) as answer:
                assert answer.status == 200
            with pytest.raises(LoaderConfigError, match=f"port={server.port}: cannot be listened on"):
                MetricsServer(str, server.port)
        server.close()
        assert "foldfeed-metrics" not in loader_threads()
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url + "/metrics", timeout=20)
        MetricsServer(str, server.port).close()
    for port in (-1, 65536, True, "80"):
        with pytest.raises(LoaderConfigError, match="port"):
            MetricsServer(str, port)


def test_a_process_that_is_killed_leaves_the_meters_whole(store):
    with make_loader(store, num_processes=1, read_ahead_bytes=30_000) as loader:
        take(loader, 1)
        os.kill(loader._supply.pids[0], signal.SIGKILL)
        take(loader, 4)
        found = loader.meters()
    check_stages(found)
    assert found["reading_processes"] == 1
    assert found["stages"]["plan"]["num_workers"] == 1
    assert found["samples_read"] >= 40
