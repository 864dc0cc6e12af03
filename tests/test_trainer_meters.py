"""A run says what its loader did: scalars per step, a table, Prometheus while it lives, a trace."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from ports import free_port
from test_loader_meters import check_trace, parsed
from test_loader_stream import build_store
from test_trainer_cli import TINY

from foldfeed.trainer.cli import main
from foldfeed.trainer.config import DataConfig, RunConfig
from foldfeed.trainer.errors import TrainerConfigError

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def numerics():
    """A run changes torch's settings of this process."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def scrape(url: str, answers: list[str], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                answers.append(answer.read().decode())
        except (urllib.error.URLError, ConnectionError):
            # Not there yet, or not there any more.
            time.sleep(0.02)


def test_a_run_reports_its_loader_everywhere(tmp_path, capfd):
    store = build_store(tmp_path / "store")
    port, output, trace = free_port(), tmp_path / "run", tmp_path / "trace.json"
    answers: list[str] = []
    stop = threading.Event()
    scraper = threading.Thread(target=scrape, args=(f"http://127.0.0.1:{port}/metrics", answers, stop))
    # Which ones, not how many: those of other tests may end meanwhile.
    before = set(threading.enumerate())
    scraper.start()
    try:
        code = main(
            [
                *("--store", store.url, "--output", str(output), *TINY, "--steps", "6"),
                *("--metrics-port", str(port), "--loader-trace", str(trace)),
            ]
        )
    finally:
        stop.set()
        scraper.join()
    said = capfd.readouterr()
    assert code == 0, said.err
    left = set(threading.enumerate()) - before
    assert not left, f"a run left threads behind: {left}"

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert 0 < line["loader/busy_share/prepare"] <= 1
        assert line["loader/stall(s)"] > 0
    events = list((output / "tb").glob("events.*"))
    assert b"loader/stall(s)" in b"".join(path.read_bytes() for path in events)
    assert "loader: 18 samples in 6 steps; the consumer stood still for " in said.out
    assert "  sample_read " in said.out

    assert answers, "nobody answered while the run lived"
    read = [
        parsed(text)["foldfeed_loader_samples_total"][1]["foldfeed_loader_samples_total", (("rank", "0"),)]
        for text in answers
    ]
    assert read == sorted(read)
    assert read[-1] <= 18
    waits = [event for event in check_trace(trace) if event["name"] == "wait"]
    assert [event["args"]["step"] for event in waits] == list(range(6))


def test_a_port_that_is_taken_and_one_that_is_none_are_wrong_usage(tmp_path, capfd):
    store = build_store(tmp_path / "store")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("--store", store.url, "--output", str(tmp_path / "run"), *TINY)
        assert main([*words, "--metrics-port", str(port)]) == 2
    assert f"--metrics-port {port}: " in capfd.readouterr().err
    with pytest.raises(TrainerConfigError, match="metrics_port is 70000; it must be a port"):
        RunConfig(output="x", data=DataConfig(store="s"), metrics_port=70000)
