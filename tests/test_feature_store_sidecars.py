"""Sidecars of an alignment against plain loops, and N_eff on its way from the maker of a record to SQL."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record

from foldfeed.feature_store import (
    EffectiveRows,
    FeatureStore,
    InvalidRecordError,
    measure_effective_rows,
    write_part,
)
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.sidecars import column_entropy, exact_log2, summarise


@st.composite
def alignments(draw):
    depth, length = draw(st.integers(1, 30)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    family = rng.integers(0, 22, length)
    changed = rng.random((depth, length)) < rng.choice([0.0, 0.1, 0.25, 0.9])
    return np.where(changed, rng.integers(0, 22, (depth, length)), family).astype(np.uint8)


def similar(a: list[int], b: list[int]) -> bool:
    columns = [(x, y) for x, y in zip(a, b, strict=True) if x != alphabet.GAP or y != alphabet.GAP]
    return not columns or Fraction(sum(x == y for x, y in columns), len(columns)) >= Fraction(4, 5)


@settings(max_examples=60, deadline=None)
@given(alignments())
def test_neff_by_column_is_the_sum_of_the_weights_of_its_residues(msa):
    rows = msa.tolist()
    weights = [Fraction(1, sum(similar(row, other) for other in rows)) for row in rows]
    found = measure_effective_rows(msa)
    assert found.total == pytest.approx(float(sum(weights)), rel=1e-14)
    for column in range(msa.shape[1]):
        share = [w for w, row in zip(weights, rows, strict=True) if row[column] != alphabet.GAP]
        assert found.per_residue[column] == np.float32(float(sum(share, Fraction(0))))
    # The order of the rows cannot matter, down to the last bit.
    again = measure_effective_rows(msa[np.random.default_rng(1).permutation(len(msa))])
    assert again.total == found.total
    np.testing.assert_array_equal(again.per_residue, found.per_residue)


@settings(max_examples=60, deadline=None)
@given(alignments())
def test_entropy_is_that_of_the_residues_of_the_column(msa):
    found = summarise(msa, np.zeros(msa.shape, np.int32)).entropy
    for column in range(msa.shape[1]):
        residues = [int(code) for code in msa[:, column] if code < 20]
        shares = [residues.count(code) / len(residues) for code in set(residues)]
        assert found[column] == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-6)
        if len(set(residues)) <= 1:
            assert found[column] == 0.0


def test_entropy_of_known_columns():
    counts = np.array([[2, 1, 1, 0], [4, 0, 0, 0], [0, 0, 0, 0], [7, 7, 7, 7]])
    np.testing.assert_allclose(column_entropy(counts), [1.5, 0.0, 0.0, 2.0], rtol=1e-15)


def test_the_logarithm_is_exact_for_powers_of_two_and_close_everywhere():
    powers = 2.0 ** np.arange(-300, 300)
    np.testing.assert_array_equal(exact_log2(powers), np.arange(-300, 300))
    values = np.concatenate([np.arange(1.0, 50_000.0), np.random.default_rng(3).uniform(0, 2**40, 50_000)])
    np.testing.assert_allclose(exact_log2(values), np.log2(values), rtol=4e-16, atol=4e-16)


def test_neff_travels_from_the_record_to_sql_and_does_not_change_what_it_says(tmp_path):
    plain = dataclasses.replace(make_record("a", 20, 40), neff=None)
    counted = plain.with_neff()
    assert counted.neff.total == measure_effective_rows(plain.msa).total
    assert counted.fingerprint == plain.fingerprint
    assert plain.with_neff(19) is plain
    assert counted.with_neff() is counted
    store = FeatureStore.create(tmp_path / "s")
    part = write_part(store.url, [counted, dataclasses.replace(plain, record_id="b")], store.settings)
    store.commit([part.part_id], job_id="1")
    assert store.query("select record_id, neff from records order by 1").to_pylist() == [
        {"record_id": "a", "neff": counted.neff.total},
        {"record_id": "b", "neff": None},
    ]
    np.testing.assert_array_equal(store["a"].neff_per_residue(), counted.neff.per_residue)
    assert np.isnan(store["b"].neff_per_residue()).all()


@pytest.mark.parametrize(
    ("total", "per_residue", "says"),
    [
        (1.0, np.ones(39, np.float32), r"must be float32 \(40,\)"),
        (1.0, np.ones(40, np.float64), "not float64"),
        (0.0, np.ones(40, np.float32), "not above 0"),
        (21.0, np.ones(40, np.float32), "at most its 20 rows"),
        (1.0, np.full(40, 21, np.float32), "at most its 20 rows"),
        (1.0, np.full(40, np.nan, np.float32), "not above 0"),
    ],
)
def test_an_impossible_neff_is_refused(total, per_residue, says):
    with pytest.raises(InvalidRecordError, match=says):
        dataclasses.replace(
            make_record("a", 20, 40), neff=EffectiveRows(total=total, per_residue=per_residue)
        )


def test_a_deep_verify_finds_a_neff_that_is_not_that_of_the_alignment(tmp_path):
    record = make_record("a", 20, 40).with_neff()
    wrong = record.neff.per_residue.copy()
    wrong[7] /= 2
    store = FeatureStore.create(tmp_path / "s")
    for name, neff in (("a", record.neff), ("b", EffectiveRows(total=record.neff.total, per_residue=wrong))):
        part = write_part(store.url, [dataclasses.replace(record, record_id=name, neff=neff)], store.settings)
        store.commit([part.part_id], job_id=name)
    assert verify(store.url, level="full").problems == ()
    (problem,) = verify(store.url, level="deep").problems
    assert problem.record_ids == ("b",)
    assert "N_eff" in problem.reason
