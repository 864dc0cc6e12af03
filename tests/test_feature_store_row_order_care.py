"""A store of row order `permuted` is made, checked, repaired, compacted and copied like any other."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, StoreSettingsError, write_part
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.cli.main import main

SETTINGS = StoreSettings(tile_rows=16, tile_cols=8, row_order="permuted", row_order_seed=4)
RECORDS = [make_record(f"r{n}", 20 + 31 * n, 9 + n, seed=n) for n in range(4)]


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    made = FeatureStore.create(tmp_path / "s", SETTINGS)
    for record in RECORDS:
        part = write_part(made.url, [record], made.settings)
        made.commit([part.part_id], job_id=record.record_id)
    return made


def assert_whole(url: str) -> None:
    found = FeatureStore.open(url)
    assert found.settings == SETTINGS
    assert found.ids == [record.record_id for record in RECORDS]
    for record in RECORDS:
        np.testing.assert_array_equal(found[record.record_id].msa(), record.msa)
        np.testing.assert_array_equal(found[record.record_id].deletions(), record.deletions)
        slab = found[record.record_id].slab(start=3, num_rows=9)
        np.testing.assert_array_equal(slab.msa, record.msa[slab.ranks])
    assert verify(url, level="deep").problems == ()


def test_compact_and_copy_keep_the_order(store, tmp_path):
    before = store.fingerprint
    assert compact(store.url).version == store.version + 1
    assert len(set(FeatureStore.open(store.url).table(["part_id"])["part_id"].to_pylist())) == 1
    assert FeatureStore.open(store.url).fingerprint == before
    assert_whole(store.url)
    copy_store(store.url, tmp_path / "copy")
    assert_whole(str(tmp_path / "copy"))


@pytest.mark.parametrize("lost", ["profile/c/0/0", "zarr.json", "msa/zarr.json"])
def test_derived_files_are_rebuilt_from_permuted_tiles(store, lost):
    part = Path(store.url, "parts", store.table(["part_id"])["part_id"][3].as_py())
    before = (part / lost).read_bytes()
    (part / lost).unlink()
    assert verify(store.url).problems
    assert repair(store.url).after.problems == ()
    assert (part / lost).read_bytes() == before
    assert_whole(store.url)


def test_a_lost_index_and_lost_settings_come_back_with_the_order(store):
    shutil.rmtree(Path(store.url, "index"))
    Path(store.url, "foldfeed.json").unlink()
    assert repair(store.url, rebuild_lost_index=True).after.problems == ()
    assert_whole(store.url)


def test_a_part_of_the_other_order_is_refused(store, tmp_path):
    """Readers go by the order that the store's settings say."""
    other = FeatureStore.create(tmp_path / "rank", StoreSettings(tile_rows=16, tile_cols=8))
    part = write_part(other.url, [make_record("r9", 50, 9)], other.settings)
    shutil.copytree(Path(other.url, "parts", part.part_id), Path(store.url, "parts", part.part_id))
    with pytest.raises(StoreSettingsError, match="rank"):
        store.commit([part.part_id], job_id="mixed")
    assert "r9" not in FeatureStore.open(store.url).ids


@pytest.fixture
def alignments(tmp_path) -> Path:
    folder = tmp_path / "alignments"
    folder.mkdir()
    rows = "".join(f">hit{n}\n{'ACDE'[n % 4]}CDEF\n" for n in range(30))
    for name in ("a", "b"):
        (folder / f"{name}.a3m").write_text(f">{name}\nACDEF\n{rows}")
    return folder


def run(*args: object):
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def test_ingest_makes_a_store_of_the_order_asked_for(alignments, tmp_path):
    url = tmp_path / "store"
    args = ("ingest", "--alignments", alignments, "--store", url)
    made = run(*args, "--row-order", "permuted", "--row-order-seed", "12")
    assert made.exit_code == 0, made.output
    found = FeatureStore.open(url)
    assert found.settings == StoreSettings.with_row_order("permuted", 12)
    assert "row order    permuted (seed 12): reads random samples of rows fast" in run("show", url).output
    # What the store has is enough, and what it does not have is refused.
    assert run(*args).exit_code == 0
    assert run(*args, "--row-order", "permuted").exit_code == 0
    for wrong in (("rank",), ("permuted", "--row-order-seed", "13")):
        refused = run(*args, "--row-order", *wrong)
        assert refused.exit_code == 1
        assert "exists with row order 'permuted' (seed 12), not" in refused.output
    for wrong in (("--row-order-seed", "3"), ("--row-order", "rank", "--row-order-seed", "3")):
        refused = run("ingest", "--alignments", alignments, "--store", tmp_path / "new", *wrong)
        assert refused.exit_code == 2
        assert "has no effect with" in refused.output
        assert not (tmp_path / "new").exists()


def test_build_knows_the_row_order():
    pytest.importorskip("foldfeed.pipelines.cli.build")
    text = run("build", "--help").output
    assert "--row-order" in text
    assert "--row-order-seed" in text
