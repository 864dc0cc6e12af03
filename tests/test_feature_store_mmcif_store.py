"""Structures in a store: `ingest --layout mmcif`, `structures` by id and by sequence, refusals."""

import dataclasses
import datetime
import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from families import as_stockholm, family
from mmcif_samples import HEAD, sample
from records import make_record, make_structure

from foldfeed.feature_store import FeatureStore, MsaRecord, StoreSettings, import_into, write_part
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.exporters.mmcif import to_mmcif
from foldfeed.feature_store.exporters.rows import rows_of_msa
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.importers.attach_structures import AttachOptions, attach_structures
from foldfeed.feature_store.importers.layouts import AlignmentImport, detect_layout
from foldfeed.feature_store.importers.rows import ImportOptions
from foldfeed.feature_store.parsers.mmcif.entry import load_mmcif, read_mmcif

pytest.importorskip("gemmi", reason="gemmi is not installed; pip install 'foldfeed[structures]'")


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def aligned(record_id: str, sequence: str, depth: int = 4) -> MsaRecord:
    """A record with an alignment and provenance of its own for a sequence."""
    record = make_record(record_id, depth, len(sequence), seed=len(record_id))
    record.msa[0] = alphabet.encode(sequence)
    return dataclasses.replace(record, sequence=sequence, structure=None)


@pytest.fixture
def entries(tmp_path):
    """Two entries; 9abc has chains A and B of one sequence, B with one residue less observed."""
    folder = tmp_path / "mmcif"
    (folder / "ab").mkdir(parents=True)
    (folder / "ab" / "9abc.cif.gz").write_bytes(
        gzip.compress(sample("9ABC", {"A": "H", "B": "L"}, skip={"B": 2}))
    )
    (folder / "9xyz.cif").write_bytes(sample("9XYZ", {"A": "A"}, date="1999-12-31", shift=5))
    (folder / "broken.cif").write_bytes(HEAD.encode())
    return folder


@pytest.fixture
def store(tmp_path):
    store = FeatureStore.create(tmp_path / "store")
    records = [
        aligned("9abc_H", "AGMSP"),
        aligned("9abc_L", "AGMXP"),
        aligned("other", "AGMSP", 600),
        aligned("zzz", "WWW"),
    ]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="msas")
    return store


def test_every_chain_of_every_entry_becomes_a_record(entries, tmp_path):
    assert detect_layout(entries) == "mmcif"
    found = AlignmentImport(entries)
    report = import_into(tmp_path / "made", found)
    assert (report.num_added, [reject.where for reject in report.rejects]) == (3, ["broken.cif"])
    store = FeatureStore.open(tmp_path / "made")
    assert store.ids == ["9abc_H", "9abc_L", "9xyz_A"]
    for record_id, label, file in (("9abc_H", "A", "ab/9abc.cif.gz"), ("9abc_L", "B", "ab/9abc.cif.gz")):
        record = store[record_id]
        chain = read_mmcif(gzip.decompress((entries / file).read_bytes())).chain(label)
        assert record.structure().fingerprint == chain.structure.fingerprint
        assert (record.sequence, record.depth, record.description) == ("AGMSP", 1, "A small protein")
        assert record.extra == {"source": file, "source_format": "mmcif", "release_date": "2020-02-01"}
    assert store.as_of(datetime.date(2000, 1, 1)).ids == ["9xyz_A"]
    again = import_into(tmp_path / "made", AlignmentImport(entries))
    assert (again.already_done, FeatureStore.open(tmp_path / "made").version) == (True, store.version)
    assert verify(tmp_path / "made", level="deep").problems == ()


def test_real_alignments_get_the_structures_of_their_chains(real_file, tmp_path):
    (tmp_path / "msas").mkdir()
    (tmp_path / "msas" / "2q2k_A").symlink_to(real_file("msas/2q2k_A"))
    (tmp_path / "msas" / "1a02_F").mkdir()
    (tmp_path / "msas" / "1a02_F" / "uniref90_hits.sto").write_text(as_stockholm(family(30, 56)))
    import_into(
        tmp_path / "store",
        AlignmentImport(tmp_path / "msas", "openproteinset", ImportOptions(neff_max_rows=0)),
    )
    before = FeatureStore.open(tmp_path / "store")
    entries = tmp_path / "structures"
    (entries / "odd").mkdir(parents=True)
    for name in ("2q2k", "7rye"):
        (entries / f"{name}.cif.gz").symlink_to(real_file(f"structures/{name}.cif.gz"))
    (entries / "odd" / "cut.cif").write_text("data_x\n_entry.id x\n")
    report = attach_structures(tmp_path / "store", entries)
    assert (report.num_files, report.num_matched, report.num_attached) == (3, 1, 1)
    assert [reject.where for reject in report.rejects] == ["odd/cut.cif"]
    after = FeatureStore.open(tmp_path / "store")
    entry = load_mmcif(entries / "2q2k.cif.gz")
    (chain,) = [chain for chain in entry if chain.auth_asym_id == "A"]
    assert after["2q2k_A"].structure().fingerprint == chain.structure.fingerprint
    assert after["2q2k_A"].sequence == chain.sequence
    assert after["2q2k_A"].depth == before["2q2k_A"].depth > 1
    assert after["1a02_F"].fingerprint == before["1a02_F"].fingerprint
    assert after.as_of("2009-01-01", undated="drop").ids == ["2q2k_A"]
    assert after.as_of("2006-01-01", undated="drop").ids == []


def test_chains_that_share_the_author_s_name_get_both_names(tmp_path):
    (tmp_path / "x.cif").write_bytes(sample("AF-Q9-F1", {"A": "Z", "B": "Z", "C": "Y"}))
    found = AlignmentImport(tmp_path, "mmcif")
    assert [source.record_id for source in found.sources] == ["AF-Q9-F1_Y", "AF-Q9-F1_Z.A", "AF-Q9-F1_Z.B"]


def test_alignments_with_structures_beside_them_are_alignments(entries):
    (entries / "x.a3m").write_text(">x\nACDE\n")
    assert detect_layout(entries) == "a3m"


def test_options_of_structures_have_no_effect_elsewhere(entries):
    (entries / "x.a3m").write_text(">x\nACDE\n")
    for options in (ImportOptions(modified="X"), ImportOptions(model=2)):
        with pytest.raises(ValueError, match="has no effect on the layout a3m, only on mmcif"):
            AlignmentImport(entries, "a3m", options)


def test_by_id_records_get_their_chain_and_keep_everything_else(store, entries):
    before = {name: store[name] for name in store.ids}
    done = run("structures", store.url, "--from", entries)
    assert done.exit_code == 0, done.output
    assert "read       3 protein chains of 3 files\nmatched    2 records\nattached   2" in done.output
    assert "broken.cif" in done.output
    after = FeatureStore.open(store.url)
    for name, label in (("9abc_H", "A"), ("9abc_L", "B")):
        record, old = after[name], before[name]
        assert record.structure().source["label_asym_id"] == label
        np.testing.assert_array_equal(record.msa(), old.msa())
        np.testing.assert_array_equal(record.deletions(), old.deletions())
        assert record.rows().equals(old.rows())
        assert record.extra == old.extra | {"release_date": "2020-02-01"}
        assert record.sequence == old.sequence
    assert after["other"].fingerprint == before["other"].fingerprint
    assert after["other"].structure() is None
    newest = after.log()[0]
    assert (newest.operation, newest.num_added, newest.num_removed) == ("replace", 2, 0)
    assert verify(store.url, level="deep").problems == ()
    assert FeatureStore.open(store.url, store.version)["9abc_H"].structure() is None, "the version before"
    again = run("structures", store.url, "--from", entries)
    assert (again.exit_code, FeatureStore.open(store.url).version) == (0, after.version)
    assert "attached   0, not needed 2" in again.output


def test_by_sequence_every_record_gets_the_best_chain_of_its_sequence(store, entries):
    report = attach_structures(store.url, entries, AttachOptions(by="sequence"))
    # 9abc_L says X where the chains say S: not exactly their sequence.
    assert (report.num_matched, report.num_attached) == (2, 2)
    store = FeatureStore.open(store.url)
    for name in ("9abc_H", "other"):
        source = store[name].structure().source
        assert (source["entry_id"], source["label_asym_id"]) == ("9ABC", "A"), (
            "most residues, then first by id"
        )


def exported(folder, record, structure) -> None:
    """Writes an entry whose only chain has the sequence of a record."""
    rows = rows_of_msa(dataclasses.replace(record, structure=structure))
    (folder / f"{record.record_id}.cif").write_bytes(to_mmcif(rows))


def assert_attached(store, records, structures) -> None:
    for record in records:
        found = store[record.record_id]
        np.testing.assert_array_equal(found.msa(), record.msa)
        np.testing.assert_array_equal(found.deletions(), record.deletions)
        assert found.rows()["hit_id"].to_pylist() == list(record.rows.hit_id)
        for name, array in structures[record.record_id].arrays.items():
            np.testing.assert_array_equal(getattr(found.structure(), name), array)
    assert verify(store.url, level="deep").problems == ()


@pytest.mark.parametrize("settings", [StoreSettings(), StoreSettings(row_order="permuted", tile_rows=16)])
def test_alignments_of_any_store_stay_what_they_are(tmp_path, settings):
    store = FeatureStore.create(tmp_path / "store", settings)
    records = [make_record(f"r{number}", 30 + number, 9 + number, seed=number) for number in range(6)]
    records = [dataclasses.replace(record, structure=None) for record in records]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="msas")
    (tmp_path / "cif").mkdir()
    wanted = {record.record_id: make_structure(record.length, seed=7) for record in records}
    for record in records:
        exported(tmp_path / "cif", record, wanted[record.record_id])
    report = attach_structures(store.url, tmp_path / "cif", AttachOptions(by="sequence"))
    assert (report.num_attached, report.rejects) == (6, ())
    assert_attached(FeatureStore.open(store.url), records, wanted)


def test_a_store_from_before_structures_gets_some(tmp_path):
    archive = Path(__file__).parent / "data" / "store_before_structures.zip"
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "older")
    record = dataclasses.replace(make_record("b", 20, 12), structure=None, neff=None)
    (tmp_path / "cif").mkdir()
    wanted = {"b": make_structure(12, seed=3)}
    exported(tmp_path / "cif", record, wanted["b"])
    report = attach_structures(tmp_path / "older", tmp_path / "cif", AttachOptions(by="sequence"))
    assert (report.num_attached, report.rejects) == (1, ())
    store = FeatureStore.open(tmp_path / "older")
    assert_attached(store, [record], wanted)
    assert store["a"].structure() is None


def test_columns_of_one_s_own_stay(store, entries):
    import pyarrow as pa

    store.annotate(pa.table({"record_id": ["9abc_H", "zzz"], "fold": ["a.1", "b.2"]}))
    attach_structures(store.url, entries)
    rows = FeatureStore.open(store.url).table(["record_id", "fold"]).to_pylist()
    assert {row["record_id"]: row["fold"] for row in rows if row["fold"]} == {"9abc_H": "a.1", "zzz": "b.2"}


@pytest.mark.parametrize(
    ("sequence", "reason"),
    [
        ("AGMS", "it has 5 residues and the record 4; a structure goes with the whole sequence"),
        ("AGCSW", None),
        ("AXXXX", None),
        ("AGMTP", "residue 4 is S in the chain and T in the record"),
    ],
)
def test_letters_must_agree_but_for_x_and_modified_residues(tmp_path, entries, sequence, reason):
    store = FeatureStore.create(tmp_path / "one")
    store.commit([write_part(store.url, [aligned("9abc_H", sequence)], store.settings).part_id], job_id="1")
    report = attach_structures(store.url, entries)
    messages = [reject.reason for reject in report.rejects if reject.record_id == "9abc_H"]
    assert report.num_attached == (reason is None)
    assert len(messages) == (reason is not None)
    assert reason is None or reason in messages[0]


def test_another_structure_is_refused_replaced_or_kept_as_asked(store, entries, tmp_path):
    attach_structures(store.url, entries)
    other = tmp_path / "other"
    other.mkdir()
    (other / "9abc.cif").write_bytes(sample("9ABC", {"A": "H", "B": "L"}, shift=1))
    first = FeatureStore.open(store.url)
    refused = run(
        "structures", store.url, "--from", other, "--fail-on-rejects", "--rejects", tmp_path / "r.jsonl"
    )
    assert refused.exit_code == 1
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["record_id"] for line in lines] == ["9abc_H", "9abc_L"]
    assert (
        "another structure (entry_id 9ABC, label_asym_id A, model 1, not entry_id 9ABC" in lines[0]["reason"]
    )
    kept = attach_structures(store.url, other, AttachOptions(on_existing="skip"))
    assert (kept.num_unchanged, kept.version) == (2, None)
    assert FeatureStore.open(store.url).fingerprint == first.fingerprint
    assert attach_structures(store.url, other, AttachOptions(on_existing="replace")).num_attached == 2
    moved = FeatureStore.open(store.url)["9abc_H"].structure()
    assert (moved.atom_positions - first["9abc_H"].structure().atom_positions).max() == 1


def test_two_files_for_one_record_take_the_first_and_report_the_other(store, entries):
    (entries / "ab" / "z.cif").write_bytes(sample("9ABC", {"A": "H"}, shift=1))
    report = attach_structures(store.url, entries)
    assert report.num_attached == 2
    (reject,) = [reject for reject in report.rejects if reject.where == "ab/z.cif"]
    assert reject.record_id == "9abc_H"
    assert "already gets the structure of ab/9abc.cif.gz" in reject.reason


def test_a_record_that_others_change_meanwhile_is_left_to_them(store, entries, monkeypatch):
    from foldfeed.feature_store.importers import attach_structures as import_mmcif_attach

    newer = dataclasses.replace(aligned("9abc_H", "AGMSP"), description="newer")

    def overtaken(url, parts):
        other = FeatureStore.open(url)
        part = write_part(url, [newer], other.settings).part_id
        other.commit([part], job_id="meanwhile", on_existing="replace")

    monkeypatch.setattr(import_mmcif_attach, "mark_wanted", overtaken)
    report = attach_structures(store.url, entries)
    assert report.num_attached == 1
    assert "run this again" in {reject.record_id: reject.reason for reject in report.rejects}["9abc_H"]
    now = FeatureStore.open(store.url)
    assert (now["9abc_H"].description, now["9abc_H"].structure()) == ("newer", None)
    assert now["9abc_L"].structure() is not None


def test_a_job_that_was_committed_before_adds_nothing_and_says_so(store, entries):
    assert attach_structures(store.url, entries, job_id="mine").num_attached == 2
    back = FeatureStore.open(store.url)
    plain = write_part(back.url, [aligned("9abc_H", "AGMSP")], back.settings)
    back.commit([plain.part_id], job_id="back", on_existing="replace")
    again = attach_structures(store.url, entries, job_id="mine")
    assert (again.already_done, again.num_attached, again.num_unchanged) == (True, 0, 1)
    assert FeatureStore.open(store.url)["9abc_H"].structure() is None
    said = run("structures", store.url, "--from", entries, "--job-id", "mine")
    assert "attached   0: this was committed before (job mine)" in said.output
    # Without a name of its own the job is another one, because the records are others.
    assert attach_structures(store.url, entries).num_attached == 1
    assert FeatureStore.open(store.url)["9abc_H"].structure() is not None


def test_nothing_found_is_said_with_exit_code_1(store, tmp_path):
    (tmp_path / "x.cif").write_bytes(sample("8ABC", {"A": "A"}))
    missed = run("structures", store.url, "--from", tmp_path / "x.cif")
    assert missed.exit_code == 1
    assert "matched    0 records" in missed.output
    empty = run("structures", store.url, "--from", (tmp_path / "store"))
    assert empty.exit_code == 1
    assert "it holds no *.cif file" in empty.output


def test_ingest_takes_the_options_of_structures(entries, tmp_path):
    done = run(
        "ingest", "--alignments", entries, "--layout", "mmcif", "--modified", "X", "--store", tmp_path / "x"
    )
    assert done.exit_code == 0, done.output
    assert FeatureStore.open(tmp_path / "x")["9abc_H"].sequence == "AGMSX"
    missing = run("ingest", "--alignments", entries, "--model", 7, "--store", tmp_path / "x")
    assert missing.exit_code == 1
    assert "there is no model 7; the models are 1" in missing.output


def test_another_release_of_the_parser_gives_the_same_structure(store, entries, monkeypatch):
    import gemmi

    before = read_mmcif(sample("9ABC", {"A": "H"})).chain("A").structure
    attach_structures(store.url, entries)
    version = FeatureStore.open(store.url).version
    monkeypatch.setattr(gemmi, "__version__", "99.9")
    assert read_mmcif(sample("9ABC", {"A": "H"})).chain("A").structure.fingerprint == before.fingerprint
    again = attach_structures(store.url, entries)
    assert (again.num_attached, again.num_unchanged, again.version) == (0, 2, None)
    assert FeatureStore.open(store.url).version == version


def test_a_structure_of_a_store_that_named_its_parser_is_the_same(tmp_path, entries):
    store = FeatureStore.create(tmp_path / "early")
    structure = read_mmcif(sample("9ABC", {"A": "H"})).chain("A").structure
    facts = {**structure.source, "parser": "gemmi 0.1", "num_models": "7"}
    early = dataclasses.replace(structure, source=facts)
    record = dataclasses.replace(
        aligned("9abc_H", "AGMSP"), structure=early, extra={"release_date": "2020-02-01"}
    )
    store.commit([write_part(store.url, [record], store.settings).part_id], job_id="early")
    report = attach_structures(store.url, entries)
    assert (report.num_matched, report.num_unchanged, report.version) == (1, 1, None)


def without_date(data: bytes) -> bytes:
    return b"".join(line for line in data.splitlines(True) if b"revision_date" not in line)


def test_a_date_goes_with_its_structure(store, entries, tmp_path):
    attach_structures(store.url, entries)
    undated = tmp_path / "undated"
    undated.mkdir()
    (undated / "9abc.cif").write_bytes(without_date(sample("9ABC", {"A": "H", "B": "L"}, skip={"B": 2})))
    refused = attach_structures(store.url, undated)
    assert [reject.record_id for reject in refused.rejects] == ["9abc_H", "9abc_L"]
    assert all("they differ in release_date (2020-02-01, not none)" in one.reason for one in refused.rejects)
    assert attach_structures(store.url, undated, AttachOptions(on_existing="replace")).num_attached == 2
    now = FeatureStore.open(store.url)
    assert "release_date" not in now["9abc_H"].structure().source
    assert "release_date" not in now["9abc_H"].extra
    assert "9abc_H" not in now.as_of("2021-01-01", undated="drop")


def test_a_date_of_another_origin_stays(tmp_path, entries):
    store = FeatureStore.create(tmp_path / "dated")
    old = read_mmcif(sample("9ABC", {"A": "H"}, date="2001-01-01")).chain("A").structure
    record = dataclasses.replace(
        aligned("9abc_H", "AGMSP"), structure=old, extra={"release_date": "1990-01-01"}
    )
    store.commit([write_part(store.url, [record], store.settings).part_id], job_id="dated")
    file = tmp_path / "9abc.cif"
    file.write_bytes(without_date(sample("9ABC", {"A": "H"}, shift=1)))
    assert attach_structures(store.url, file, AttachOptions(on_existing="replace")).num_attached == 1
    assert FeatureStore.open(store.url)["9abc_H"].extra["release_date"] == "1990-01-01"


def test_a_refusal_says_in_what_structures_of_one_name_differ(store, entries, tmp_path):
    attach_structures(store.url, entries)
    file = tmp_path / "9abc.cif"
    file.write_bytes(sample("9ABC", {"A": "H"}, shift=1))
    (reject,) = attach_structures(store.url, file).rejects
    assert "they differ in atom_positions (of 4 residues, first 1)" in reject.reason


@pytest.mark.parametrize("by", ["id", "sequence"])
def test_a_bad_chain_costs_no_other_chain(store, tmp_path, by):
    file = tmp_path / "9abc.cif"
    # The first chain contradicts its sequence.
    text = sample("9ABC", {"A": "H", "B": "L", "C": "N"}, shift=1).replace(b" ALA A 1 1 ", b" TRP A 1 1 ")
    file.write_bytes(text)
    report = attach_structures(store.url, file, AttachOptions(by=by))
    assert report.num_chains == 3
    (reject,) = report.rejects
    assert reject.record_id == ("9abc_H" if by == "id" else "")
    assert reject.reason.startswith("chain 9abc_H cannot be read: 9abc.cif, _atom_site row 1: residue 1")
    now = FeatureStore.open(store.url)
    wanted = {"9abc_L"} if by == "id" else {"9abc_H", "other"}
    assert {name for name in now.ids if now[name].structure() is not None} == wanted
    assert all(now[name].structure().source["label_asym_id"] == "B" for name in wanted)


def test_a_bad_chain_that_nobody_asks_for_is_left_alone(store, tmp_path):
    file = tmp_path / "9abc.cif"
    file.write_bytes(sample("9ABC", {"A": "N", "B": "L"}).replace(b" ALA A 1 1 ", b" TRP A 1 1 "))
    report = attach_structures(store.url, file)
    assert (report.num_chains, report.num_attached, report.rejects) == (2, 1, ())


def test_no_match_names_an_id_of_either_side_and_the_other_way(store, tmp_path):
    (tmp_path / "x.cif").write_bytes(sample("8ABC", {"A": "A"}))
    said = run("structures", store.url, "--from", tmp_path / "x.cif")
    assert said.exit_code == 1
    assert "one is 8abc_A, and a record of the store is 9abc_H" in said.output
    assert "--by sequence" in said.output
    FeatureStore.create(tmp_path / "empty")
    assert "has no records" in run("structures", tmp_path / "empty", "--from", tmp_path / "x.cif").output
