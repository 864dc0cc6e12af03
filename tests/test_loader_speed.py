"""`foldfeed bench loader`: what is measured, and what a person reads."""

import json
import time

import pytest
from click.testing import CliRunner
from test_loader_stream import RECIPE, build_store, make_loader

from foldfeed.feature_store.cli.main import main
from foldfeed.loader import SampleError
from foldfeed.loader.speed import TOLERATED_LOSS, LoaderSpeed, measure_speed


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("speed") / "store")


def run(*words) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["bench", "loader", *map(str, words)], prog_name="foldfeed")
    return done.exit_code, done.output


TINY = ("--crop-residues", 12, "--num-clusters", 5, "--num-extra", 7, "--seconds", 0.6)


def test_a_slow_consumer_hides_the_loader_and_a_slow_loader_is_found(store, monkeypatch):
    with make_loader(store) as loader:
        fast = measure_speed(loader, step_s=0.15, seconds=1.5)
    assert fast.num_samples == 8
    assert 0 < fast.alone_s < 0.15 <= fast.cached_s
    assert fast.fetch_s > 0
    assert fast.prepare_s > 0
    assert fast.sample_bytes > 0
    assert fast.waits_s == tuple(sorted(fast.waits_s))
    # A store that takes 40 ms a sample: a step of 8 on 2 threads takes 160 ms, the consumer's 20.
    read = type(loader._reader).fetch

    def slow(self, planned, room=None):
        time.sleep(0.04)
        return read(self, planned, room)

    monkeypatch.setattr(type(loader._reader), "fetch", slow)
    with make_loader(store) as loader:
        starved = measure_speed(loader, step_s=0.02, seconds=2.0)
    # Samples are counted when they are received and seconds when they are read, so at the edges of the
    # measurement some count on one side only.
    assert starved.fetch_s > 0.03
    assert starved.bottleneck == "loader"
    assert starved.loss > 1
    assert starved.wait_s(0.5) > 0.05
    assert loader.recipe == RECIPE


def test_the_verdict_is_arithmetic():
    values = {
        "num_samples": 4,
        "alone_s": 0.01,
        "fetch_s": 0.001,
        "prepare_s": 0.001,
        "sample_bytes": 1.0,
        "step_s": 0.03,
        "cached_s": 0.030,
        "waits_s": (0.0, 0.001, 0.5),
    }
    tolerated = LoaderSpeed(**values, streamed_s=0.030 * (1 + TOLERATED_LOSS) - 1e-9)
    assert tolerated.bottleneck == "accelerator"
    assert LoaderSpeed(**values, streamed_s=0.031).bottleneck == "loader"
    assert LoaderSpeed(**values, streamed_s=0.029).loss == 0
    assert [tolerated.wait_s(share) for share in (0.0, 0.5, 0.99, 1.0)] == [0.0, 0.001, 0.5, 0.5]


def test_a_sample_that_cannot_be_read_ends_it(tmp_path):
    store = build_store(tmp_path / "store")
    for shard in (tmp_path / "store" / "parts").glob("*/msa/c/0/0/0"):
        data = bytearray(shard.read_bytes())
        data[: len(data) // 2] = bytes(len(data) // 2)
        shard.write_bytes(data)
    with make_loader(store) as loader, pytest.raises(SampleError):
        measure_speed(loader, step_s=0.0, seconds=0.5)
    code, said = run(store.url, *TINY)
    assert code == 1
    assert said.startswith("error: sample ")


def test_the_command(store, tmp_path):
    code, said = run(store.url, *TINY, "--step-ms", 20, "--batch", 4)
    assert code == 0, said
    assert said.startswith("crop_first, 12 residues x 5 rows and 7 extra, 4 samples a step\nloader alone: ")
    assert "beside steps of 20.0 ms: " in said
    assert "the bottleneck is the " in said
    assert "the consumer stood still for " in said
    code, said = run(
        store.url, "--recipe", "masked_lm", "--labels", "--crop-residues", 12, "--num-clusters", 5
    )
    assert code == 0, said
    assert said.startswith("masked_lm, 12 residues x 5 rows, 8 samples a step\n")
    trace = tmp_path / "trace.json"
    code, said = run(store.url, *TINY, "--processes", 1, "--json", "--trace", trace)
    assert code == 0, said
    found = json.loads(said)
    assert found["recipe"]["name"] == "crop_first"
    assert found["bottleneck"] in ("loader", "accelerator")
    assert found["processes"] == 1
    assert found["meters"]["samples"] >= found["num_samples"]
    assert {event["ph"] for event in json.loads(trace.read_text())} == {"X", "M", "i"}
    assert len(found["waits_s"]) >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipe", "af9"), "is no recipe"),
        (("--step-ms", -1), "must be a number above 0"),
        (("--seconds", 0), "must be a number above 0"),
        (("--batch", 0), "global_batch"),
        (("--threads", 0), "num_threads"),
        (("--device", "tpu"), "device"),
        (("--recipe", "af3", "--num-extra", 3), "num_extra"),
    ],
)
def test_values_that_cannot_work_are_wrong_usage(store, words, message):
    code, said = run(store.url, *words)
    assert code == 2, said
    assert message in said
