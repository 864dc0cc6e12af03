"""The files in examples/ run, and what they print is the stream that the loader promises."""

import ast
import importlib.util
import tempfile
from pathlib import Path

import pytest
from records import make_record
from warm_python import run_module

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part

NUM_RECORDS = 11


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """11 records, which batches of 4 do not divide."""
    store = FeatureStore.create(tmp_path_factory.mktemp("examples") / "store", StoreSettings(tile_rows=16))
    records = [make_record(f"r{n:02}", 3 + n, 20 + 3 * n, seed=n) for n in range(NUM_RECORDS)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


def run(root, name, *arguments, **environment) -> list[str]:
    """Runs an example and returns its lines."""
    with tempfile.TemporaryDirectory() as folder:
        place = str(root / "examples" / name)
        done = run_module(place, arguments, Path(folder), timeout_s=240, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def samples_of(lines) -> list[list[int]]:
    """The sample numbers of each line ``STEP [[...], ...] LOSS``."""
    found = [ast.literal_eval(line[line.index("[") : line.rindex("]") + 1]) for line in lines]
    return [[g for shard in shards for g in shard] for shards in found]


def test_a_plain_loop_goes_on_where_it_was_stopped(root, store, tmp_path):
    whole = run(root, "plain_torch.py", store.url, "--epochs", 2)
    assert samples_of(whole) == [
        list(range(first, min(first + 4, end))) for end in (11, 22) for first in range(end - 11, end, 4)
    ]
    state = ("--state", tmp_path / "state.json")
    parts = run(root, "plain_torch.py", store.url, "--epochs", 1, *state, "--max-steps", 2)
    # Another world goes on: two ranks share the rest of the epoch.
    position = (tmp_path / "state.json").read_bytes()
    rest = []
    for rank in ("0", "1"):
        (tmp_path / "state.json").write_bytes(position)
        rest.append(run(root, "plain_torch.py", store.url, *state, RANK=rank, WORLD_SIZE="2"))
    assert samples_of(parts) == samples_of(whole)[:2]
    assert [a + b for a, b in zip(*map(samples_of, rest), strict=True)] == samples_of(whole)[2:3]


def test_a_grain_style_source_shares_an_epoch_among_readers(root, store):
    lines = run(root, "grain_style_source.py", store.url)
    assert [int(line.split()[2]) for line in lines] == [4, 2, 4, 1]
    assert all(int(line.split()[4]) > 0 for line in lines)


@pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="no lightning: pip install lightning"
)
def test_lightning_resumes_in_the_middle_of_an_epoch(root, store, tmp_path):
    """Three steps an epoch; the run is stopped after the fourth."""
    whole = run(root, "with_lightning.py", store.url, "--max-steps", 9, "--output", tmp_path / "whole")
    output = ("--output", tmp_path / "parts")
    parts = run(root, "with_lightning.py", store.url, "--max-steps", 4, *output)
    parts += run(root, "with_lightning.py", store.url, "--max-steps", 9, *output, "--resume")
    assert samples_of(whole) == [list(range(4 * step, 4 * step + 4)) for step in range(9)]
    # Losses too: weights, optimizer and samples went on together.
    assert parts == whole
