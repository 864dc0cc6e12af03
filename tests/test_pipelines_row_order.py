"""A real build into a store of row order `permuted` says what the one in rank order says."""

import pytest
from pipelines_data import config_of, copy_databases, globins, needs_hmmer, write_fasta

from foldfeed.feature_store import FeatureStore, StoreSettings, StoreSettingsError
from foldfeed.pipelines import run_build
from foldfeed.pipelines.errors import ConfigError

pytestmark = [pytest.mark.external_tool, needs_hmmer]


def test_a_build_into_a_permuted_store(tmp_path):
    databases = copy_databases(tmp_path / "databases")
    queries = write_fasta(tmp_path / "q.fasta", globins(2))
    given = [f"uniref90={databases / 'uniref90.fasta'}"]
    # Both find the same results, so the second one searches nothing.
    results = str(tmp_path / "results")
    plain = run_build(config_of(tmp_path / "rank", queries, given, results=results))
    config = config_of(
        tmp_path / "permuted", queries, given, results=results, row_order="permuted", row_order_seed=3
    )
    report = run_build(config)
    assert (report.num_searched, report.num_added) == (0, 2)
    assert run_build(config).num_added == 0
    a, b = FeatureStore.open(plain.store), FeatureStore.open(report.store)
    assert b.settings == StoreSettings.with_row_order("permuted", 3)
    assert a.ids == b.ids
    for name in a.ids:
        assert a[name].depth > 2
        assert a[name].fingerprint == b[name].fingerprint
        assert (a[name].msa() == b[name].msa()).all()
    # The store keeps the order it was made with, and says so before anything is searched.
    assert run_build(config_of(tmp_path / "permuted", queries, given, results=results)).num_added == 0
    with pytest.raises(StoreSettingsError, match=r"row order 'permuted' \(seed 3\), not 'rank'"):
        run_build(config_of(tmp_path / "permuted", queries, given, results=results, row_order="rank"))
    with pytest.raises(ConfigError, match="row_order_seed 4 has no effect without"):
        run_build(config_of(tmp_path / "new", queries, given, results=results, row_order_seed=4))
