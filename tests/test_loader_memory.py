"""A loader's memory stays as it is over many samples: a short run of `campaigns/loader_memory.py`."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def campaign():
    path = Path(__file__).parent / "campaigns" / "loader_memory.py"
    spec = importlib.util.spec_from_file_location("loader_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_descriptors_and_threads_stay_over_thousands_of_samples(campaign, tmp_path):
    faults, found = campaign.run(tmp_path, 4000, 800, 1)
    assert faults == []
    assert found["samples"][-1] >= 4000


def test_what_grows_is_a_fault(campaign):
    def note(mb, threads=9):
        return {"trainer": {"mb": mb, "descriptors": 5, "threads": threads}}

    samples = [50_000 * n for n in range(1, 21)]
    steady = [note(500.0)] + [note(700.0)] * 19
    assert campaign.faults_of(steady, samples) == []
    (grown,) = campaign.faults_of([note(500.0 + 2 * n) for n in range(20)], samples)
    assert grown == "trainer grew from 502.0 to 538.0 MB (14.4 allowed)"
    assert campaign.faults_of([*steady[:-1], note(700.0, 10)], samples) == [
        "trainer has 10 threads, 9 before"
    ]
    assert campaign.faults_of([*steady[:-1], {"reader 7": steady[0]["trainer"]}], samples) == [
        "reader 7 was started meanwhile"
    ]
