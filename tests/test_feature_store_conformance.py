"""FORMAT.md says what the code does: a reader written from its text agrees with ours on everything."""

import numpy as np
import pytest
from conformance_reader import ConformanceReader, permuted_ranks
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.feature_store.format.row_order import RowOrder

ORDERS = ({}, {"row_order": "permuted"}, {"row_order": "permuted", "row_order_seed": 2**53 - 1})


@pytest.mark.parametrize("order", ORDERS, ids=["rank", "permuted", "permuted-seed"])
@pytest.mark.parametrize("tile", [(512, 64), (7, 5), (1, 1)])
def test_a_reader_written_from_the_format_text_agrees(tmp_path, tile, order):
    settings = StoreSettings(tile_rows=tile[0], tile_cols=tile[1], **order)
    store = FeatureStore.create(tmp_path / "s", settings)
    first = [make_record("a", 1, 1), make_record("b", 23, 31), make_record("c", 40, 6)]
    second = [make_record("b", 9, 31, seed=4), make_record("d", 2, 17)]
    for number, records in enumerate((first, second)):
        part = write_part(store.url, records, store.settings)
        store.commit([part.part_id], job_id=str(number), on_existing="replace")
    other = ConformanceReader(store.url)
    assert sorted(other.rows) == store.ids == ["a", "b", "c", "d"]
    for name in store.ids:
        msa, deletions = other.alignment(name)
        np.testing.assert_array_equal(msa, store[name].msa())
        np.testing.assert_array_equal(deletions, store[name].deletions())
        assert other.fingerprint(name) == store[name].fingerprint
        for array, values in store[name].features().items():
            np.testing.assert_array_equal(other.per_residue(name, array), values)
        found = store[name].structure()
        assert (found is None) == (len(store[name].sequence) % 2 == 0)
        for array, values in (found.arrays if found else {}).items():
            np.testing.assert_array_equal(other.structure(name)[array], values)
    assert store["b"].depth == 9


def test_the_worked_example_of_the_format_text(tmp_path):
    """T = 2, C = 4, D = 3, L = 6: cell (2, 5) lies in tile 3 at (0, 1) and its number is 25."""
    record = make_record("x", 3, 6)
    record.deletions[:] = 0
    record.deletions[2, 5] = 300
    store = FeatureStore.create(tmp_path / "s", StoreSettings(tile_rows=2, tile_cols=4))
    part = write_part(store.url, [record], store.settings)
    store.commit([part.part_id], job_id="1")
    group = ConformanceReader(store.url).part(part.part_id)
    assert group["deletion"][3, 0, 1] == 255
    assert group["deletion_overflow"][:].tolist() == [[25, 300]]
    assert store["x"].deletions()[2, 5] == 300


def test_the_vectors_of_the_format_text(root):
    """Text, conformance reader and code say the same orders."""
    text = " ".join((root / "FORMAT.md").read_text().split())
    for seed, name, depth, num_first, num_last in (
        (0, "P69905", 6, 6, 0),
        (7, "P69905", 12, 12, 0),
        (7, "x", 1000, 8, 3),
    ):
        settings = StoreSettings.with_row_order("permuted", seed)
        ranks = RowOrder(settings, name, depth).ranks(np.arange(depth)).tolist()
        assert ranks == permuted_ranks(seed, name, depth)
        assert " ".join(map(str, ranks[:num_first])) in text
        assert " ".join(map(str, ranks[depth - num_last :])) in text
    assert "10153084231484037918" in text
