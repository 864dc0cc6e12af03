"""Damage that older versions alone show: found, named with its versions, and repaired."""

import collections
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from records import make_record

from foldfeed.feature_store import (
    CorruptDataError,
    FeatureStore,
    NotAStoreError,
    StoreSettings,
    TagError,
    write_part,
)
from foldfeed.feature_store.care import verify as verify_module
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.garbage import collect_garbage
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.index.tags import set_tag
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.storage.local import LocalBlobs

SETTINGS = StoreSettings(tile_rows=16, tile_cols=8)
LEVELS = ("quick", "full", "deep")


def add(store: FeatureStore, names: list[str], job: str, seed: int = 1, **options) -> str:
    records = [make_record(name, 5 + 3 * seed, 19 + seed, seed=seed) for name in sorted(names)]
    part_id = write_part(store.url, records, store.settings).part_id
    store.commit([part_id], job_id=job, **options)
    return part_id


def history(url) -> tuple[FeatureStore, dict[str, str]]:
    """Eight versions, and the parts by what they brought; the newest shows two of the four.

    1: a, b.  2: c, d.  3: b replaced.  4, 5: a column.  6: a, c, d deleted.  7: e.
    """
    store = FeatureStore.create(url, SETTINGS)
    parts = {"ab": add(store, ["a", "b"], "1"), "cd": add(store, ["c", "d"], "2", seed=2)}
    parts["b2"] = add(store, ["b"], "3", seed=3, on_existing="replace")
    store.annotate(pa.table({"record_id": ["a", "b"], "year": [1999, 2000]}))
    store.delete(["a", "c", "d"])
    parts["e"] = add(store, ["e"], "6", seed=4)
    return store, parts


@pytest.fixture
def made(tmp_path) -> tuple[FeatureStore, dict[str, str]]:
    return history(tmp_path / "s")


def damage(path: Path, position: int = 5) -> bytes:
    """Flips a bit of a file; returns what it held."""
    good = path.read_bytes()
    path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
    return good


def shard(store: FeatureStore, part_id: str, array: str = "msa") -> Path:
    return next(path for path in Path(store.url, "parts", part_id, array, "c").rglob("*") if path.is_file())


@pytest.mark.parametrize("level", LEVELS)
def test_a_good_store_is_good_in_all_versions(made, level):
    report = verify(made[0].url, level=level, all_versions=True)
    assert (report.problems, report.stale_sets) == ((), ())
    assert (report.version, report.versions) == (7, tuple(range(8)))
    # a, two contents of b, c, d, e; the newest version has two of them.
    assert (report.num_records, report.num_parts) == (6, 4)
    plain = verify(made[0].url, level=level)
    assert (plain.version, plain.versions, plain.num_records, plain.num_parts) == (7, (7,), 2, 2)


@pytest.mark.parametrize(
    ("part", "versions", "names"),
    [("ab", (1, 5), ["a"]), ("cd", (2, 5), ["c"]), ("b2", (3, 7), ["b"]), ("e", (7, 7), ["e"])],
)
def test_damage_is_found_whoever_shows_it_and_says_who(made, part, versions, names):
    store, parts = made
    damage(shard(store, parts[part]))
    report = verify(store.url, all_versions=True)
    assert report.problems
    assert {problem.versions for problem in report.problems} == {versions}
    assert all(parts[part] in problem.where for problem in report.problems)
    assert report.damaged_records == names
    # One version alone tells exactly when it shows the part.
    for version in range(8):
        alone = verify(store.url, version=version)
        shown = parts[part] in set(FeatureStore.open(store.url, version).index_rows()["part_id"].to_pylist())
        assert bool(alone.problems) == shown == (versions[0] <= version <= versions[1])
        assert all(problem.versions is None for problem in alone.problems)


@pytest.mark.parametrize("what", ["zarr.json", "folder"])
def test_a_part_that_is_missing_is_found(made, what):
    store, parts = made
    folder = Path(store.url, "parts", parts["cd"])
    shutil.rmtree(folder) if what == "folder" else (folder / what).unlink()
    assert verify(store.url).problems == ()
    (problem,) = verify(store.url, all_versions=True).problems
    assert (problem.versions, problem.record_ids) == ((2, 5), ("c", "d"))


def test_all_versions_find_what_each_version_finds(made):
    """Any flipped byte of any file of a part: the same problems, in the versions in which they are."""
    store, _ = made
    files = sorted(path for path in Path(store.url, "parts").rglob("*") if path.is_file())
    rng = random.Random(7)
    for path in rng.sample(files, 6):
        good = damage(path, rng.randrange(path.stat().st_size))
        alone = {version: verify(store.url, version=version).problems for version in range(8)}
        shown = [version for version, problems in alone.items() if problems]
        together = verify(store.url, all_versions=True).problems
        assert together, path
        assert {problem.versions for problem in together} == {(shown[0], shown[-1])}
        assert {problem.where for problem in together} == {
            problem.where for problems in alone.values() for problem in problems
        }
        path.write_bytes(good)
    assert verify(store.url, all_versions=True).problems == ()


def reads_of(monkeypatch, work) -> collections.Counter:
    """How often each file of a part was opened or read whole, and parts were checked."""
    counts: collections.Counter = collections.Counter()
    with monkeypatch.context() as patch:
        for name in ("read", "open_range", "info"):
            honest = getattr(LocalBlobs, name)

            def counted(self, path, *args, honest=honest, name=name):
                if path.startswith("parts/"):
                    counts[name, path] += 1
                return honest(self, path, *args)

            patch.setattr(LocalBlobs, name, counted)
        work()
    return counts


@pytest.mark.parametrize("level", LEVELS)
def test_each_part_is_read_once_however_many_versions_show_it(made, monkeypatch, level):
    """As often as one version alone reads it, which is once for each check."""
    store, parts = made
    all_at_once = reads_of(monkeypatch, lambda: verify(store.url, level=level, all_versions=True))
    alone: collections.Counter = collections.Counter()
    for version, shown in ((2, ("ab", "cd")), (7, ("b2", "e"))):
        found = reads_of(monkeypatch, lambda version=version: verify(store.url, level=level, version=version))
        ids = {parts[name] for name in shown}
        alone.update({key: count for key, count in found.items() if key[1].split("/")[1] in ids})
    assert set(all_at_once) == set(alone)
    assert all_at_once == alone
    checked = collections.Counter()
    honest = verify_module.check_part
    monkeypatch.setattr(verify_module, "check_part", lambda *args: checked.update([args[1]]) or honest(*args))
    verify(store.url, level=level, all_versions=True)
    assert checked == dict.fromkeys(parts.values(), 1)


def test_versions_that_were_given_up_are_left_out_and_tagged_ones_are_not(made):
    store, parts = made
    set_tag(store.url, "paper", 1)
    collect_garbage(store.url, grace_s=0, keep_days=0)
    # Version 1 needs part ab, the newest b2 and e; cd is gone.
    assert not Path(store.url, "parts", parts["cd"]).exists()
    report = verify(store.url, level="deep", all_versions=True)
    assert (report.problems, report.versions, report.num_parts) == ((), (1, 7), 3)
    damage(shard(store, parts["ab"]))
    assert {p.versions for p in verify(store.url, all_versions=True).problems} == {(1, 1)}
    assert verify(store.url).problems == ()


def test_a_compacted_store_still_owes_its_old_parts(made):
    store, parts = made
    add(store, ["f"], "8", seed=5)
    compact(store.url)
    newest = FeatureStore.open(store.url)
    damage(shard(store, parts["e"]))
    assert verify(store.url).problems == ()
    report = verify(store.url, all_versions=True)
    assert {problem.versions for problem in report.problems} == {(7, 8)}
    # The records lie in two parts each and count once.
    assert report.num_records == 7
    assert report.version == newest.version
    collect_garbage(store.url, grace_s=0, keep_days=0)
    assert verify(store.url, all_versions=True).problems == ()


def test_index_files_say_whom_they_concern(made):
    store, _ = made
    old = set(Index.open(store.url, 1).files) - set(Index.open(store.url, 7).files)
    (name,) = old
    good = damage(Path(store.url, "index", name))
    for level in LEVELS:
        report = verify(store.url, level=level, all_versions=True)
        (problem,) = report.problems
        assert (problem.where, problem.versions) == (f"index/{name}", (1, 2))
        assert report.versions == tuple(range(8))
    Path(store.url, "index", name).write_bytes(good)
    assert verify(store.url, all_versions=True).problems == ()


def test_a_log_file_that_is_no_json_is_named_though_delta_rs_names_none(made):
    store, _ = made
    name = "index/_delta_log/00000000000000000003.json"
    damage(Path(store.url, name), 0)
    problems = verify(store.url).problems
    assert [problem.where for problem in problems] == ["index/_delta_log", name]


@pytest.mark.parametrize("kind", ["set", "split", "tag", "retention", "log"])
def test_damage_beside_the_parts_is_found_in_all_versions(made, kind):
    store, _ = made
    store.save_set("deep", "from records where depth > 1")
    store.save_split("cut", {"b": "x", "e": "y"}, fractions={"train": 0.5, "test": 0.5}, seed=0)
    set_tag(store.url, "paper", 2)
    collect_garbage(store.url, grace_s=0, keep_days=0)
    path = {
        "set": "sets/deep.parquet",
        "split": "splits/cut.parquet",
        "tag": "tags/paper.json",
        "retention": "retention.json",
        "log": "index/_delta_log/00000000000000000003.json",
    }[kind]
    assert verify(store.url, all_versions=True).problems == ()
    file = Path(store.url, path)
    damage(file, len(file.read_bytes()) // 2)
    problems = verify(store.url, all_versions=True).problems
    assert any(path.removesuffix(".parquet") in problem.where for problem in problems), problems


def test_sets_that_no_version_has_any_more_are_named_and_are_no_damage(made):
    store, _ = made
    FeatureStore.open(store.url, 2).save_set("old", "from records")
    store.save_set("new", "from records")
    assert verify(store.url, all_versions=True).stale_sets == ()
    collect_garbage(store.url, grace_s=0, keep_days=0)
    report = verify(store.url, all_versions=True)
    assert (report.problems, report.stale_sets) == ((), ("old",))
    out = CliRunner().invoke(main, ["verify", store.url, "--all-versions"])
    assert (out.exit_code, "note     record set old: no version" in out.stdout) == (0, True)


def test_a_damaged_newest_index_file_leaves_all_parts_to_be_checked(made):
    store, parts = made
    damage(Path(store.url, "index", Index.open(store.url, 7).files[0]))
    damage(shard(store, parts["cd"]))
    report = verify(store.url, all_versions=True)
    assert (report.version, report.versions, report.num_parts) == (None, (), 4)
    assert any(parts["cd"] in problem.where for problem in report.problems)


def test_an_empty_store_has_nothing_to_check(tmp_path):
    store = FeatureStore.create(tmp_path / "s", SETTINGS)
    report = verify(store.url, all_versions=True)
    assert (report.problems, report.versions, report.num_records, report.num_parts) == ((), (0,), 0, 0)


def test_many_files_of_the_index_are_joined_in_pieces(made, monkeypatch):
    from foldfeed.feature_store.care import verify_versions

    whole = verify(made[0].url, all_versions=True)
    monkeypatch.setattr(verify_versions, "_COMPARED_ROWS", 1)
    pieces = verify(made[0].url, all_versions=True)
    assert (pieces.num_records, pieces.num_parts, pieces.num_files) == (6, 4, whole.num_files)


def test_one_version_and_all_exclude_each_other(made):
    with pytest.raises(ValueError, match="exclude each other"):
        verify(made[0].url, version=1, all_versions=True)


def test_the_command_line_tells_which_versions(made):
    store, parts = made
    damage(shard(store, parts["ab"]))
    run = CliRunner().invoke
    assert run(main, ["verify", store.url]).exit_code == 0
    result = run(main, ["verify", store.url, "--all-versions"])
    assert result.exit_code == 1
    assert "(versions 1 to 5)" in result.stdout
    assert "8 versions from 0 to 7: 6 records, 4 parts" in result.stdout
    result = run(main, ["verify", store.url, "--all-versions", "--version", "2"])
    assert (result.exit_code, "give one of them" in result.stderr) == (2, True)


def test_a_version_is_repaired_from_what_the_part_still_holds(made):
    store, parts = made
    before = {path: path.read_bytes() for path in Path(store.url).rglob("*") if path.is_file()}
    damage(shard(store, parts["cd"], "profile"))
    Path(store.url, "parts", parts["cd"], "msa/zarr.json").unlink()
    # The newest version needs nothing of it.
    assert repair(store.url).restored == ()
    assert verify(store.url, all_versions=True).problems
    dry = repair(store.url, version=3, dry_run=True)
    assert len(dry.restored) == 2
    assert dry.after.problems
    report = repair(store.url, version=3)
    assert sorted(report.restored) == sorted(dry.restored)
    assert (report.before.version, report.after.version, report.after.problems) == (3, 3, ())
    # Whoever else shows the part has it back, and nothing was committed.
    assert verify(store.url, level="deep", all_versions=True).problems == ()
    assert {path: path.read_bytes() for path in Path(store.url).rglob("*") if path.is_file()} == before


def test_a_version_is_repaired_from_a_copy(made, tmp_path):
    store, parts = made
    set_tag(store.url, "paper", 2)
    copy_store(store.url, tmp_path / "copy", version=2)
    damage(shard(store, parts["ab"]))
    shutil.rmtree(Path(store.url, "parts", parts["cd"]))
    damage(shard(store, parts["e"]))
    stuck = repair(store.url, version="paper")
    assert stuck.after.damaged_records == ["a", "c", "d"]
    report = repair(store.url, version="paper", source_url=tmp_path / "copy")
    assert report.after.problems == ()
    assert verify(store.url, version=2, level="deep").problems == ()
    # Another version's damage is another repair's.
    assert not any(parts["e"] in path for path in report.restored)
    assert verify(store.url).damaged_records == ["e"]


def test_index_files_of_older_versions_come_from_a_copy_of_the_files(made, tmp_path):
    store, _ = made
    twin = tmp_path / "twin"
    shutil.copytree(store.url, twin)
    copy_store(store.url, tmp_path / "copy", version=2)
    (old,) = set(Index.open(store.url, 1).files) - set(Index.open(store.url, 7).files)
    path = Path(store.url, "index", old)
    good = damage(path)
    with pytest.raises(CorruptDataError):
        FeatureStore.open(store.url, 1).index_rows()
    assert repair(store.url, version=1).after.problems
    # A copy by `foldfeed copy` has an index of its own: here one file for what came in two.
    assert f"index/{old}" not in repair(store.url, version=1, source_url=tmp_path / "copy").restored
    damage(twin / "index" / old)
    assert repair(store.url, version=1, source_url=twin).restored == (), "a damaged copy is no help"
    (twin / "index" / old).write_bytes(good)
    assert repair(store.url, version=1, source_url=twin, dry_run=True).restored == (f"index/{old}",)
    assert path.read_bytes() != good
    report = repair(store.url, version=1, source_url=twin)
    assert (report.restored, report.after.problems) == ((f"index/{old}",), ())
    assert path.read_bytes() == good
    path.unlink()
    assert repair(store.url, source_url=twin).restored == (f"index/{old}",)
    newest = Path(store.url, "index", Index.open(store.url, 7).files[0])
    newest.unlink()
    report = repair(store.url, source_url=twin, roll_back_index=True)
    assert (report.rolled_back, report.after.problems) == (None, ()), "nothing had to be given up"


@pytest.mark.parametrize("name", ["quarantine", "roll_back_index", "rebuild_lost_index", "add_missing"])
def test_a_version_never_changes(made, name):
    store, parts = made
    damage(shard(store, parts["cd"]))
    with pytest.raises(ValueError, match=f"{name} would change the newest version, and version 2 was asked"):
        repair(store.url, version=2, **{name: True})
    assert FeatureStore.open(store.url).version == 7


def test_a_version_that_is_not_there_is_not_repaired(made):
    store, parts = made
    path = shard(store, parts["b2"], "profile")
    damage(path)
    held = path.read_bytes()
    with pytest.raises(ValueError, match="version 9 does not exist"):
        repair(store.url, version=9)
    with pytest.raises(TagError, match="no tag 'nine'"):
        repair(store.url, version="nine")
    collect_garbage(store.url, grace_s=0, keep_days=0)
    with pytest.raises(ValueError, match="version 2 is no longer kept"):
        repair(store.url, version=2)
    assert path.read_bytes() == held


def test_a_copy_that_is_none_is_said(made, tmp_path):
    with pytest.raises(NotAStoreError, match="nothing of a store that files could be taken from"):
        repair(made[0].url, version=2, source_url=tmp_path / "typo")


def test_a_part_that_gc_had_set_aside_comes_back_for_its_version(made):
    store, parts = made
    folder = Path(store.url, "parts", parts["cd"])
    folder.rename(folder.parent / f".tmp-gc-{parts['cd']}")
    assert repair(store.url).after.problems == ()
    assert not folder.exists()
    assert repair(store.url, version=2).after.problems == ()
    assert folder.exists()


def test_repair_of_a_version_from_the_command_line(made, tmp_path):
    store, parts = made
    copy_store(store.url, tmp_path / "copy", version=2)
    damage(shard(store, parts["cd"]))
    run = CliRunner().invoke
    assert run(main, ["repair", store.url]).exit_code == 0
    result = run(main, ["repair", store.url, "--version", "2"])
    assert result.exit_code == 1
    assert "version 2: restore what is damaged from a copy (--from)" in result.stdout
    result = run(main, ["repair", store.url, "--version", "2", "--from", str(tmp_path / "copy")])
    assert (result.exit_code, "restored  parts/" in result.stdout) == (0, True), result.output
    assert "version 2: 4 records, 2 parts" in result.stdout
    for words, message in (
        (["--quarantine"], "--quarantine would change the newest version"),
        (["--add-missing", "--roll-back"], "--roll-back and --add-missing would change"),
    ):
        result = run(main, ["repair", store.url, "--version", "2", *words])
        assert (result.exit_code, message in result.stderr) == (2, True)
    result = run(main, ["repair", store.url, "--version", "77"])
    assert (result.exit_code, "version 77 does not exist" in result.stderr) == (2, True)


def test_in_a_bucket(s3):
    store, parts = history(s3)
    blobs = open_blobs(store.url)
    assert verify(store.url, level="deep", all_versions=True).problems == ()
    path = next(file.path for file in blobs.walk(f"parts/{parts['cd']}") if "msa/c" in file.path)
    whole = blobs.read(path)
    blobs.write_atomic(path, whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    assert verify(store.url).problems == ()
    report = verify(store.url, all_versions=True)
    assert {problem.versions for problem in report.problems} == {(2, 5)}
    blobs.delete(f"parts/{parts['cd']}/profile/zarr.json")
    copy_store(store.url, f"{s3}-copy", version=1)
    assert len(repair(store.url, version=2).restored) == 1
    blobs.write_atomic(path, whole)
    assert verify(store.url, all_versions=True).problems == ()
