"""AlphaFold 3's JSON: chains with their alignments come in, everything else is a reject with a reason."""

import gzip
import json

import pytest
from import_reference import BFD, assert_rows, naive_merge, read_all

from foldfeed.feature_store.exchange_errors import SourceFileError, SourceTooLargeError


def af3_job(**protein):
    chain = {"id": ["A", "B"], "sequence": "ACDE", **protein}
    return {
        "name": "my job",
        "sequences": [{"protein": chain}, {"rna": {"id": "R", "sequence": "AC"}}],
        "version": 1,
    }


def test_alphafold_3_json(tmp_path):
    path = tmp_path / "job_data.json"
    path.write_text(
        json.dumps(af3_job(unpairedMsa=BFD, pairedMsa=">q\nACDE\n>sp|P69905|HBA_HUMAN/1-4\nAC--\n"))
    )
    (tmp_path / "ranking_scores.json").write_text('{"x": 1}')
    found, (record,) = read_all(tmp_path)
    assert (found.layout, record.record_id) == ("alphafold3-json", "my_job")
    assert_rows(record, naive_merge(BFD))
    (record,) = read_all(path, paired=True)[1]
    assert [use.name for use in record.databases] == ["unpaired", "paired"]
    assert record.rows.species[-1] == "HUMAN"
    (tmp_path / "msa.a3m.gz").write_bytes(gzip.compress(BFD.encode()))
    path.write_text(json.dumps(af3_job(unpairedMsaPath="msa.a3m.gz", pairedMsa="")))
    assert_rows(read_all(path)[1][0], naive_merge(BFD))
    path.write_text(json.dumps(af3_job(unpairedMsa="", pairedMsa="")))
    assert read_all(path)[1][0].depth == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (af3_job(), "it was not searched yet"),
        (af3_job(unpairedMsa=">q\nACDD\n"), "first row of database 'unpaired' is not the query"),
        (af3_job(unpairedMsa=7), "must be a text"),
        (af3_job(unpairedMsaPath="/etc/passwd"), "leads out of the folder"),
        (af3_job(unpairedMsaPath="../x.a3m"), "leads out of the folder"),
        (af3_job(unpairedMsaPath="x\0"), "cannot be followed"),
        (af3_job(unpairedMsaPath="absent.a3m"), "No such file"),
        (af3_job(sequence="AC-E", unpairedMsa=""), "has '-' at residue 3"),
        (af3_job(sequence="ACé", unpairedMsa=""), "at residue 3"),
        (af3_job(sequence="", unpairedMsa=""), "0 residues"),
        ([af3_job()], "job list of AlphaFold Server"),
        ({"sequences": 3}, "a list 'sequences'"),
        ({"sequences": [{"ligand": {}}]}, "no protein chain"),
        ({"sequences": [{"protein": {"id": "A"}}]}, "needs an 'id'"),
    ],
)
def test_alphafold_3_json_that_cannot_be_used(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    found, records = read_all(path, "alphafold3-json")
    assert records == []
    assert reason in found.rejects[0].reason


def test_bad_json_is_refused_before_it_is_built(tmp_path):
    path = tmp_path / "x.json"
    for text, error in (
        ("[" * 100_000, SourceFileError),
        ('{"sequences": [' + "[]," * 6_000_000 + "[]]}", SourceTooLargeError),
        ('"' + '\\"' * 2_000_000, SourceFileError),
        ('{"sequences": [', SourceFileError),
    ):
        path.write_text(text)
        found, records = read_all(path, "alphafold3-json")
        assert records == []
        assert len(found.rejects) == 1
        assert len(found.rejects[0].reason) < 500, error
