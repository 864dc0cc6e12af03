"""Single-byte flips and cuts of every kind of file: a short form of campaigns/feature_store_damage.py."""

from pathlib import Path

import pytest
from damage import Damage, campaign, files_of, kind_of, make_store, outcome_of, read_everything

from foldfeed.feature_store.care.verify import verify

# How often a file is met that no part holds.
NUM_TURNS = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("damage") / "s")


def test_the_store_has_every_kind_of_file(store):
    kinds = {kind_of(path) for path in files_of(Path(store.url))}
    assert kinds == {
        "checkpoint (_last_checkpoint)",
        "checkpoint (parquet)",
        "commit log",
        "foldfeed.json",
        "index file",
        "part metadata",
        "part shard",
        "retention.json",
        "sets/deep.parquet",
        "tags/paper.json",
    }
    assert verify(store.url, level="deep").problems == ()


@pytest.mark.slow
def test_damage_is_an_error_or_changes_nothing(store):
    root = Path(store.url)
    others = [path for path in files_of(root) if not path.startswith("parts/")]
    # Of three parts, whose files are alike, all arrays of one.
    part = min(path.split("/")[1] for path in files_of(root) if path.startswith("parts/"))
    paths = [*others * NUM_TURNS, *(path for path in files_of(root) if path.startswith(f"parts/{part}/"))]
    assert len(paths) > 80
    report = campaign(root, len(paths), seed=3, paths=paths)
    assert report["faults"] == []
    # Nothing of these can change without being seen.
    for kind in (
        "foldfeed.json",
        "index file",
        "retention.json",
        "tags/paper.json",
        "part metadata",
        "part shard",
    ):
        assert "harmless" not in report["counts"].get(kind, {}), kind


def test_any_flip_in_an_index_file_or_an_older_commit_is_seen_by_the_first_reader(store):
    """Byte by byte in steps, not drawn: a row that is read is a row that was committed."""
    root = Path(store.url)
    truth = read_everything(root)
    index_file = root / "index" / store._index.files[0]
    for path, step in ((index_file, 97), (root / "index/_delta_log/00000000000000000004.json", 41)):
        name = str(path.relative_to(root))
        for start in range(0, path.stat().st_size, step):
            assert outcome_of(root, Damage(path=name, start=start, mask=1), truth) == "read"
