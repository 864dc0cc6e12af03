"""Imports equal the reference features of other programs, number by number, on real proteins."""

import gzip
import shutil

import numpy as np
import pytest

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.importers.layouts import AlignmentImport
from foldfeed.feature_store.importers.rows import ImportOptions

# AlphaFold 2 and OpenFold write codes by one-letter order; written here a second time, from their tables.
HHBLITS_AA_TO_ID = {letter: code for code, letter in enumerate("ACDEFGHIKLMNPQRSTVWYX-")} | {
    "B": 2,
    "J": 20,
    "O": 20,
    "U": 1,
    "Z": 3,
}
MAP_HHBLITS_AATYPE_TO_OUR_AATYPE = np.array(
    [0, 4, 3, 6, 13, 7, 8, 9, 11, 10, 12, 2, 14, 5, 1, 15, 16, 19, 17, 18, 20, 21], dtype=np.uint8
)


def only(path, layout="auto", **options):
    found = AlignmentImport(path, layout, ImportOptions(**options))
    (record,) = list(found)
    assert found.rejects == []
    return record


def assert_features(record, features) -> None:
    """msa, deletion_matrix_int, aatype and sequence of AlphaFold 2's dictionary."""
    np.testing.assert_array_equal(record.msa, MAP_HHBLITS_AATYPE_TO_OUR_AATYPE[features["msa"]])
    np.testing.assert_array_equal(record.deletions, features["deletion_matrix_int"])
    np.testing.assert_array_equal(record.msa[0], features["aatype"].argmax(axis=1))
    assert record.sequence == features["sequence"][0]
    assert record.depth == features["num_alignments"][0]


def test_openfold_short_merges_to_the_expected_features(shared_data):
    folder = shared_data / "golden" / "openfold_short"
    record = only(folder)
    with np.load(folder / "expected.npz") as expected:
        assert_features(record, expected)
    assert [use.name for use in record.databases] == ["uniref90", "bfd_uniclust", "mgnify"]


def test_the_original_pickle_is_read_without_unpickling(shared_data, tmp_path):
    source = shared_data / "golden" / "openfold_short" / "alphafold_feature_dict.pickle.gz"
    (tmp_path / "query").mkdir()
    shutil.copy(source, tmp_path / "query" / "features.pkl.gz")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "features.pkl").write_bytes(gzip.decompress(source.read_bytes()))
    found = AlignmentImport(tmp_path)
    records = list(found)
    assert (found.layout, found.rejects) == ("alphafold2", [])
    assert [record.record_id for record in records] == ["plain", "query"]
    with np.load(source.parent / "expected.npz") as expected:
        for record in records:
            assert_features(record, expected)


@pytest.mark.parametrize(
    "folder",
    [
        "golden/helixfold_102l_A",
        "msas/4OT_59",
        "msas/T1026",
        "msas/T1065s1",
        "msas/T1065s2",
        "msas/X8FLY0",
        "msas/X8FMJ8",
        "msas/Y0KK22",
    ],
)
def test_feature_files_of_three_programs(shared_data, folder):
    with np.load(shared_data / folder / "features.npz") as features:
        record = only(shared_data / folder / "features.npz")
        assert_features(record, features)
        if "msa_species_identifiers" in features:
            assert record.rows.species[1:] == features["msa_species_identifiers"][1:].tolist()


def test_openfold_3_keeps_every_row(shared_data):
    record = only(
        shared_data / "msas" / "ubiquitin",
        "openproteinset",
        dedup="none",
        databases=("uniref", "bfd.mgnify30.metaeuk30.smag30"),
    )
    with np.load(shared_data / "golden" / "of3_ubiquitin" / "expected.npz") as expected:
        letters = expected["msa"].view(np.uint32).reshape(expected["msa"].shape).astype(np.uint8)
        np.testing.assert_array_equal(record.msa, alphabet.ENCODE[letters])
        np.testing.assert_array_equal(record.deletions, expected["deletion_matrix"])
        names = [line.split("\t")[0] for line in expected["metadata"].tolist()]
    assert record.rows.hit_id[1:] == names[1:]


def test_chai_parquet_equals_its_own_alignment(shared_data):
    folder = shared_data / "msas" / "B2M_99"
    record = only(folder / "chai_aligned.parquet")
    text = only(folder / "chai_aligned.a3m.gz")
    np.testing.assert_array_equal(record.msa, text.msa)
    np.testing.assert_array_equal(record.deletions, text.deletions)
    assert {use.name: use.num_rows for use in record.databases} == {
        "mgnify": 88,
        "uniprot": 22978,
        "uniref90": 10223,
    }
    names = [name.split("|")[0] for name in text.rows.hit_id[1:]]
    assert [record.databases[code].name for code in record.rows.database[1:]] == names
    assert record.rows.species.count("HUMAN") > 100


def naive_a3m(text: str) -> tuple[list[list[int]], list[list[int]]]:
    codes, deletions = [], []
    for entry in text.split(">")[1:]:
        header, _, rows = entry.partition("\n")
        if header.split(" ")[0] in ("ss_pred", "ss_conf"):
            continue
        row, counts, seen = [], [], 0
        for letter in rows.replace("\n", "").replace(".", ""):
            if letter.islower():
                seen += 1
            else:
                row.append(HHBLITS_AA_TO_ID[letter])
                counts.append(seen)
                seen = 0
        codes.append(row)
        deletions.append(counts)
    return codes, deletions


@pytest.mark.parametrize(
    "file",
    [
        "2JP1_lymphotactin/colabfold.a3m.gz",
        "4OT_59/colabfold.a3m.gz",
        "7r6r_1/pairing.a3m.gz",
        "PTEN_HUMAN/jackhmmer.a2m.gz",
        "T1078/with_ss_rows.a3m.gz",
        "UniRef50_UPI0003108055/msa.a3m.gz",
        "boltz_seq1/msa.a3m.gz",
    ],
)
def test_single_alignments_of_six_tools(shared_data, file):
    path = shared_data / "msas" / file
    codes, deletions = naive_a3m(gzip.decompress(path.read_bytes()).decode())
    record = only(path)
    np.testing.assert_array_equal(record.msa, MAP_HHBLITS_AATYPE_TO_OUR_AATYPE[np.array(codes)])
    np.testing.assert_array_equal(record.deletions, np.array(deletions))


def test_every_folder_with_known_databases_imports(shared_data):
    found = AlignmentImport(shared_data / "msas", "openproteinset")
    depths = {record.record_id: record.depth for record in found}
    assert depths["1a02_F"] > 1000
    assert {"1psm_A", "2crb_A", "4zey_A", "6KWC_1"} <= set(depths)
    # Nothing is dropped in silence: each folder with alignments is a record or a reject.
    folders = {
        path.parent.name
        for pattern in ("*.a3m*", "*.sto*")
        for path in (shared_data / "msas").glob(f"*/{pattern}")
    }
    assert set(depths) | {reject.record_id for reject in found.rejects} == folders
