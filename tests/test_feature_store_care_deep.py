"""A deep verify: what checksums cannot see, because it was written so."""

import dataclasses

import pytest
from records import make_record

from foldfeed.feature_store import FeatureStore, MsaRecord, write_part
from foldfeed.feature_store.care import verify_parts
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.parts import shard_writer, writer


def store_of(url, names=("a", "b", "c")) -> FeatureStore:
    store = FeatureStore.create(url)
    records = [make_record(name, 40, 30, seed=number) for number, name in enumerate(names)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="j")
    return store


def test_sidecars_that_were_computed_wrongly_are_found(tmp_path, monkeypatch):
    right = writer.summarise

    def wrong(msa, deletions):
        found = right(msa, deletions)
        return dataclasses.replace(found, gap_fraction=found.gap_fraction + 1)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "summarise", wrong)
        store = store_of(tmp_path / "s")
    assert verify(store.url).problems == ()
    problems = verify(store.url, level="deep").problems
    # The record's own line repeats the mean of the gaps, which was right.
    assert [problem.where.split("/")[-1] for problem in problems] == ["gap_fraction, chunk 0"]
    assert problems[0].record_ids == ("a", "b", "c")
    assert "derived anew" in problems[0].reason


def test_every_record_that_says_something_else_is_named(tmp_path, monkeypatch):
    right = MsaRecord.fingerprint.fget
    assert right is not None
    with monkeypatch.context() as patch:
        patch.setattr(
            MsaRecord,
            "fingerprint",
            property(lambda self: "0" * 64 if self.record_id != "b" else right(self)),
        )
        store = store_of(tmp_path / "s")
    assert verify(store.url).problems == ()
    report = verify(store.url, level="deep")
    assert report.damaged_records == ["a", "c"]
    assert all("does not match its fingerprint" in problem.reason for problem in report.problems)
    # A record that nobody sees is reported and blamed on nobody.
    store.delete(["a"])
    report = verify(store.url, level="deep")
    assert report.damaged_records == ["c"]
    assert len(report.problems) == 2


@pytest.mark.parametrize("level", [1, 19])
def test_another_compression_of_the_same_values_is_no_damage(tmp_path, monkeypatch, level):
    store = store_of(tmp_path / "s")
    compared = []
    compare = verify_parts._compare

    def watched(*args):
        compared.append(args[1].spec.name)
        return compare(*args)

    monkeypatch.setattr(verify_parts, "_compare", watched)
    assert verify(store.url, level="deep").problems == ()
    assert compared == [], "the part was written again bit for bit"
    # As a release with another zstd would write it.
    monkeypatch.setattr(shard_writer, "ZSTD_LEVEL", level)
    assert verify(store.url, level="deep").problems == ()
    assert {"msa", "profile", "row_hit_id"} <= set(compared)
