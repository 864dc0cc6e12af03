"""Imports equal the reference features of other programs, number by number."""

import gzip
import shutil

import numpy as np
import pytest
from families import as_a2m, as_a3m, as_stockholm, family

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


def test_openfold_short_merges_to_the_expected_features(real_file):
    folder = real_file("golden/openfold_short")
    record = only(folder)
    with np.load(folder / "expected.npz") as expected:
        assert_features(record, expected)
    assert [use.name for use in record.databases] == ["uniref90", "bfd_uniclust", "mgnify"]


def test_the_original_pickle_is_read_without_unpickling(real_file, tmp_path):
    source = real_file("golden/openfold_short/alphafold_feature_dict.pickle.gz")
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


def test_features_that_helixfold_wrote(real_file):
    file = real_file("msas/T1026/features.npz")
    with np.load(file) as features:
        record = only(file)
        assert_features(record, features)
        assert record.rows.species[1:] == features["msa_species_identifiers"][1:].tolist()


@pytest.mark.parametrize("integers", [np.int32, np.int64])
@pytest.mark.parametrize("text", [np.str_, np.bytes_])
@pytest.mark.parametrize("species", [False, True])
def test_features_as_the_pipelines_of_alphafold_2_write_them(tmp_path, integers, text, species):
    """Monomers have no species; forks keep bytes or text, and 32 or 64 bits."""
    codes, deletions = naive_a3m(as_a3m(family(700, 143)))
    depth, length = len(codes), len(codes[0])
    sequence = "".join("ACDEFGHIKLMNPQRSTVWY"[code] for code in codes[0])
    names = np.array(["", *(["HUMAN", "9BACT", ""][number % 3] for number in range(depth - 1))]).astype(text)
    features = {
        "msa": np.array(codes, integers),
        "deletion_matrix_int": np.array(deletions, integers),
        "aatype": np.eye(21, dtype=integers)[MAP_HHBLITS_AATYPE_TO_OUR_AATYPE[codes[0]]],
        "sequence": np.array([sequence]).astype(text),
        "num_alignments": np.full(length, depth, integers),
        "residue_index": np.arange(length, dtype=integers),
        "domain_name": np.array(["x"]).astype(text),
    } | ({"msa_species_identifiers": names} if species else {})
    np.savez(tmp_path / "features.npz", **features)
    record = only(tmp_path / "features.npz")
    assert_features(record, features | {"sequence": [sequence]})
    if species:
        assert record.rows.species[1:] == names.astype(str)[1:].tolist()


def test_openfold_3_keeps_every_row(real_file):
    record = only(
        real_file("msas/ubiquitin"),
        "openproteinset",
        dedup="none",
        databases=("uniref", "bfd.mgnify30.metaeuk30.smag30"),
    )
    with np.load(real_file("golden/of3_ubiquitin/expected.npz")) as expected:
        letters = expected["msa"].view(np.uint32).reshape(expected["msa"].shape).astype(np.uint8)
        np.testing.assert_array_equal(record.msa, alphabet.ENCODE[letters])
        np.testing.assert_array_equal(record.deletions, expected["deletion_matrix"])
        names = [line.split("\t")[0] for line in expected["metadata"].tolist()]
    assert record.rows.hit_id[1:] == names[1:]


def test_chai_parquet_equals_its_own_alignment(real_file):
    folder = real_file("msas/B2M_99")
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


def assert_equals_naive(path, text: str) -> None:
    codes, deletions = naive_a3m(text)
    record = only(path)
    np.testing.assert_array_equal(record.msa, MAP_HHBLITS_AATYPE_TO_OUR_AATYPE[np.array(codes)])
    np.testing.assert_array_equal(record.deletions, np.array(deletions))


# What tools put around the rows: MMseqs2 names its sizes first, HHblits predicted structure, HMMER pads rows.
FORMS = {
    "a3m": as_a3m,
    "a3m, lines of 80": lambda rows: as_a3m(rows, 80),
    "a3m of ColabFold": lambda rows: f"#{len(rows[0][1]) - 1}\t1\n" + as_a3m(rows),
    "a3m with predicted structure": lambda rows: (
        f">ss_pred PSIPRED\n{'CHE' * 40}\n>ss_conf PSIPRED\n{'905' * 40}\n" + as_a3m(rows)
    ),
    "a2m": as_a2m,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_single_alignments_as_tools_write_them(tmp_path, form, compress):
    text = FORMS[form](family(300, 120, seed=len(form)))
    path = tmp_path / f"x.{form[:3]}{'.gz' if compress is gzip.compress else ''}"
    path.write_bytes(compress(text.encode()))
    assert_equals_naive(path, text)


def test_single_alignments_of_six_tools(real_file):
    for name in (
        "2JP1_lymphotactin/colabfold.a3m.gz",
        "4OT_59/colabfold.a3m.gz",
        "7r6r_1/pairing.a3m.gz",
        "PTEN_HUMAN/jackhmmer.a2m.gz",
        "T1078/with_ss_rows.a3m.gz",
        "UniRef50_UPI0003108055/msa.a3m.gz",
        "boltz_seq1/msa.a3m.gz",
    ):
        path = real_file(f"msas/{name}")
        assert_equals_naive(path, gzip.decompress(path.read_bytes()).decode())


def test_every_folder_with_known_databases_imports(tmp_path):
    """Nothing is dropped in silence: each folder with alignments is a record or a reject."""
    rows = family(200, 56)
    files = {
        "1a02_F": {"uniref90_hits.sto": as_stockholm(rows), "bfd_uniclust_hits.a3m": as_a3m(rows[:60])},
        "1psm_A": {"mgnify_hits.sto": as_stockholm(rows[:9])},
        "2q2k_A": {
            "uniref90_hits.a3m": as_a3m(rows[:3]),
            "hmm_output.sto": "templates",
            "x.hhr": "templates",
        },
        "cut": {"uniref90_hits.sto": as_stockholm(rows)[:-40]},
        "one_name_nobody_knows": {"colabfold.a3m": as_a3m(rows)},
        "two_queries": {"uniref90_hits.a3m": as_a3m(rows), "mgnify_hits.a3m": as_a3m(family(4, 20))},
    }
    for folder, texts in files.items():
        (tmp_path / folder).mkdir()
        for name, text in texts.items():
            (tmp_path / folder / name).write_text(text)
    (tmp_path / "without_alignment").mkdir()
    (tmp_path / "without_alignment" / "notes.txt").write_text("nothing")
    found = AlignmentImport(tmp_path, "openproteinset")
    depths = {record.record_id: record.depth for record in found}
    assert set(depths) == {"1a02_F", "1psm_A", "2q2k_A", "one_name_nobody_knows"}
    assert depths["1a02_F"] > 100
    assert {reject.record_id for reject in found.rejects} == {"cut", "two_queries"}
