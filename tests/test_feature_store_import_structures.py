"""Alignments that are imported again into a store whose records got structures meanwhile."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from mmcif_samples import sample

from foldfeed.feature_store import CommitConflictError, FeatureStore, import_into
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.importers.attach_structures import attach_structures
from foldfeed.feature_store.importers.layouts import AlignmentImport

pytest.importorskip("gemmi", reason="gemmi is not installed; pip install 'foldfeed[structures]'")


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def entries(tmp_path):
    """An entry with chains H and L of one sequence."""
    folder = tmp_path / "mmcif"
    folder.mkdir()
    (folder / "9abc.cif").write_bytes(sample("9ABC", {"A": "H", "B": "L"}, skip={"B": 2}))
    return folder


def folder_of_a3m(folder, records: dict[str, str]) -> Path:
    """Writes one file per record of the query and a row that equals it."""
    folder.mkdir(exist_ok=True)
    for name, sequence in records.items():
        (folder / f"{name}.a3m").write_text(f">{name}\n{sequence}\n>hit\n{sequence}\n")
    return folder


@pytest.fixture
def ingested(tmp_path, entries):
    """Alignments that were ingested and got structures, and the folder that they came from."""
    folder = folder_of_a3m(tmp_path / "alone", {"9abc_H": "AGMSP", "9abc_L": "AGMSP", "zzz": "WWW"})
    done = run("ingest", "--alignments", folder, "--store", tmp_path / "s")
    assert done.exit_code == 0, (done.output, done.exception)
    assert attach_structures(tmp_path / "s", entries).num_attached == 2
    return tmp_path / "s", folder


@pytest.mark.parametrize("on_existing", ["error", "replace", "skip"])
def test_the_same_alignments_again_change_nothing_and_keep_the_structures(ingested, on_existing):
    url, folder = ingested
    before = FeatureStore.open(url)
    for name in (None, "a name of its own"):
        report = import_into(url, AlignmentImport(folder), on_existing=on_existing, job_id=name)
        assert (report.num_added, report.kept_structures, report.lost_structures) == (0, (), ())
    after = FeatureStore.open(url)
    assert after.fingerprint == before.fingerprint
    assert after["9abc_H"].structure() is not None


def test_an_import_that_was_done_is_still_known_after_structures_came(ingested):
    url, folder = ingested
    store = FeatureStore.open(url)
    store.delete(["zzz"])
    assert import_into(url, AlignmentImport(folder)).already_done
    assert "zzz" not in FeatureStore.open(url)


def test_a_new_alignment_keeps_structure_and_release_date_and_a_new_sequence_loses_them_aloud(ingested):
    url, folder = ingested
    before = FeatureStore.open(url)
    (folder / "9abc_H.a3m").write_text(">9abc_H\nAGMSP\n>hit\nAGM-P\n>hit2\nAGWSP\n")
    (folder / "9abc_L.a3m").write_text(">9abc_L\nAGMS\n>hit\nAGM-\n")
    refused = run("ingest", "--alignments", folder, "--store", url)
    assert refused.exit_code == 1
    assert FeatureStore.open(url).fingerprint == before.fingerprint
    done = run("ingest", "--alignments", folder, "--store", url, "--on-existing", "replace")
    assert done.exit_code == 0, done.output
    assert "kept structures of 1 records" in done.output
    assert "dropped structures of 1 records, whose sequence is another one now: 9abc_L" in done.output
    after = FeatureStore.open(url)
    assert after["9abc_H"].depth == 3
    assert after["9abc_H"].structure().fingerprint == before["9abc_H"].structure().fingerprint
    assert after["9abc_H"].extra["release_date"] == "2020-02-01"
    assert after["9abc_L"].structure() is None
    assert "release_date" not in after["9abc_L"].extra
    assert after.as_of("2019-01-01", undated="keep").ids == ["9abc_L", "zzz"]
    assert verify(url, level="deep").problems == ()
    again = run("ingest", "--alignments", folder, "--store", url, "--on-existing", "replace")
    assert "added      0" in again.output
    assert FeatureStore.open(url).version == after.version


def test_a_structure_that_comes_while_an_import_runs_is_not_lost(tmp_path, entries):
    folder = folder_of_a3m(tmp_path / "alone", {"9abc_H": "AGMSP", "zzz": "WWW"})
    url = tmp_path / "s"
    import_into(url, AlignmentImport(folder))
    (folder / "9abc_H.a3m").write_text(">9abc_H\nAGMSP\n>hit\nAGM-P\n")

    def meanwhile() -> None:
        attach_structures(url, entries)

    with pytest.raises(CommitConflictError, match="'9abc_H' got a structure while this import ran"):
        import_into(url, AlignmentImport(folder), on_existing="replace", on_record=meanwhile)
    assert FeatureStore.open(url)["9abc_H"].structure() is not None
    report = import_into(url, AlignmentImport(folder), on_existing="replace", on_record=meanwhile)
    assert (report.num_added, report.kept_structures) == (1, ("9abc_H",))
    assert FeatureStore.open(url)["9abc_H"].structure() is not None
