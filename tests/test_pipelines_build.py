"""The main job on real proteins: what the store holds is what the tools print when run by hand."""

import dataclasses
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from pipelines_data import (
    GLOBINS,
    NO_HHSUITE,
    config_of,
    copy_databases,
    dead_letters_file,
    first_on_path,
    globins,
    needs_hhsuite,
    needs_hmmer,
    stand_in,
    tree_bytes,
    write_fasta,
)

from foldfeed.feature_store import CommitConflictError, FeatureStore
from foldfeed.feature_store.format import alphabet
from foldfeed.pipelines import run_build
from foldfeed.pipelines.planning.plan import make_plan
from foldfeed.pipelines.tools.search_tool import find_binary

pytestmark = [pytest.mark.external_tool, needs_hmmer]

JACKHMMER_FLAGS = (
    *("--noali", "--F1", "0.0005", "--F2", "0.00005", "--F3", "0.0000005"),
    *("--incE", "0.0001", "-E", "0.0001", "--cpu", "1", "-N", "1"),
)
HHBLITS_FLAGS = (
    *("-n", "3", "-e", "0.001", "-maxseq", "1000000", "-realign_max", "100000"),
    *("-maxfilt", "100000", "-min_prefilter_hits", "1000"),
)


# In the order in which they are merged; without HH-suite the demo has no database of it.
DATABASES = ("uniref90", *(() if NO_HHSUITE else ("uniclust30",)), "mgnify")
CAPS = {"uniref90": 10_000, "uniclust30": None, "mgnify": 501}


# Of 2,554: whole, as the demo searches it, it takes HHblits as long as all other queries together. Here is
# the part with the first fibronectin domains.
LONGEST, LONGEST_PART = "7LESS_DROME", slice(280, 580)


@pytest.fixture(scope="module")
def databases(tmp_path_factory) -> Path:
    """The demo's databases and its queries, the longest cut."""
    folder = copy_databases(tmp_path_factory.mktemp("demo"))
    queries = folder / "queries.fasta"
    entries = [entry.partition("\n") for entry in queries.read_text().split(">")[1:]]
    sequences = {name: "".join(body.split()) for name, _, body in entries}
    sequences[LONGEST] = sequences[LONGEST][LONGEST_PART]
    write_fasta(queries, sequences)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory, databases):
    """The demo's build: configuration and report."""
    places = {
        "mgnify": databases / "mgnify.fasta",
        "uniclust30": databases / "hhsuite" / "db",
        "uniref90": databases / "uniref90.fasta",
    }
    # Given in another order than they are merged in.
    given = [f"{name}={path}" for name, path in places.items() if name in DATABASES]
    folder = tmp_path_factory.mktemp("build")
    config = config_of(folder, databases / "queries.fasta", given, timeout_s=200.0)
    return config, run_build(config)


def run_by_hand(folder: Path, name: str, sequence: str, databases: Path) -> dict[str, Path]:
    """Runs the searches of a query as a person would and returns the files they wrote."""
    folder.mkdir()
    query = folder / "q.fasta"
    query.write_text(f">{name}\n{sequence}\n")
    files = {}
    for database in ("uniref90", "mgnify"):
        files[database] = folder / f"{database}.sto"
        table = ["--tblout", f"{files[database]}.tbl"]
        words = [
            find_binary("jackhmmer"),
            "-o",
            "/dev/null",
            "-A",
            str(files[database]),
            *JACKHMMER_FLAGS,
            *table,
        ]
        subprocess.run([*words, str(query), str(databases / f"{database}.fasta")], check=True)
    if "uniclust30" in DATABASES:
        files["uniclust30"] = folder / "uniclust30.a3m"
        words = ["hhblits", "-i", str(query), "-cpu", "1", "-oa3m", str(files["uniclust30"])]
        words += ["-o", "/dev/null", *HHBLITS_FLAGS, "-d", str(databases / "hhsuite" / "db")]
        subprocess.run(words, check=True, capture_output=True)
    return files


def read_stockholm(path: Path) -> list[tuple[str, str, list[int]]]:
    """Letter by letter: name, residues in query columns, insertions left of each."""
    rows: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "//")):
            name, residues = line.split()
            rows[name] = rows.get(name, "") + residues
    query = next(iter(rows.values()))
    parsed = []
    for name, row in rows.items():
        letters, counts, inserted = "", [], 0
        for letter, of_query in zip(row, query, strict=True):
            if of_query == "-":
                inserted += letter != "-"
            else:
                letters, inserted = letters + letter, counts.append(inserted) or 0
        parsed.append((name, letters, counts))
    return parsed


def read_a3m(path: Path) -> list[tuple[str, str, list[int]]]:
    parsed = []
    for entry in path.read_text().split(">")[1:]:
        header, _, body = entry.partition("\n")
        letters, counts, inserted = "", [], 0
        for letter in body.replace("\n", ""):
            if letter.islower():
                inserted += 1
            else:
                letters, inserted = letters + letter, counts.append(inserted) or 0
        parsed.append((header.split()[0], letters, counts))
    return parsed


def read_table(path: Path) -> dict[str, tuple[float, float]]:
    scores: dict[str, tuple[float, float]] = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            fields = line.split()
            scores.setdefault(fields[0], (float(fields[4]), float(fields[5])))
    return scores


def merge_by_hand(files: dict[str, Path], name: str, sequence: str):
    """AlphaFold 2's order, caps and de-duplication, one row after the other."""
    rows = [(sequence, [0] * len(sequence), name, -1, np.nan, np.nan)]
    seen = {sequence}
    for index, name in enumerate(DATABASES):
        is_stockholm = files[name].suffix == ".sto"
        scores = read_table(Path(f"{files[name]}.tbl")) if is_stockholm else {}
        parsed = read_stockholm(files[name]) if is_stockholm else read_a3m(files[name])
        for hit, letters, counts in parsed[: CAPS[name]]:
            if letters not in seen:
                seen.add(letters)
                score = scores.get(hit.rsplit("/", 1)[0], (np.nan, np.nan))
                rows.append((letters, counts, hit, index, *score))
    return rows


@pytest.mark.slow
def test_every_demo_query_equals_what_the_tools_print_by_hand(tmp_path, databases, demo):
    store = FeatureStore.open(demo[0].store)
    assert len(store) == 13
    files: dict[str, dict[str, Path]] = {}

    def run(names: list[str]) -> None:
        for name in names:
            files[name] = run_by_hand(tmp_path / name, name, store[name].sequence, databases)

    # The longest query first and alone on one of two threads.
    ordered = sorted(store.ids, key=lambda name: -store[name].length)
    threads = [threading.Thread(target=run, args=(share,)) for share in (ordered[:1], ordered[1:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    depths = []
    for name in store.ids:
        record = store[name]
        expected = merge_by_hand(files[name], name, record.sequence)
        np.testing.assert_array_equal(record.msa(), [alphabet.encode(row[0]) for row in expected])
        np.testing.assert_array_equal(record.deletions(), [row[1] for row in expected])
        rows = record.rows().to_pylist()
        for got, want in zip(rows[1:], expected[1:], strict=True):
            assert (got["hit_id"], got["database"]) == (want[2], DATABASES[want[3]])
        for column, field in (("e_value", 4), ("bit_score", 5)):
            got = [np.nan if row[column] is None else row[column] for row in rows]
            np.testing.assert_allclose(got, [row[field] for row in expected], rtol=1e-6)
        depths.append(record.depth)
    # The globins and fibronectin domains have relatives in these databases; nothing here is a one-row MSA.
    assert max(depths) > 50
    assert min(depths) > 1
    assert any(store[name].deletions().any() for name in store.ids)


def test_the_report_and_the_bad_record(demo):
    _, report = demo
    assert (report.num_records, report.num_added, report.num_searched, report.num_reused) == (
        *(13, 13, 13 * len(DATABASES), 0),
    )
    (letter,) = report.dead_letters
    assert letter.record_id == "BAD_DIGITS"
    assert letter.reason == "'9' at residue 10 is no amino acid letter"
    assert dead_letters_file(report.dead_letters_path) == [letter.to_json()]


def test_the_store_says_which_data_and_tools_were_used(demo):
    store = FeatureStore.open(demo[0].store)
    used = store["HBB_HUMAN"].databases
    assert [entry["name"] for entry in used] == list(DATABASES)
    assert {entry["tool"] for entry in used if entry["name"] != "uniclust30"} == {"jackhmmer"}
    assert all(len(entry["digest"]) == 64 and entry["tool_version"] for entry in used)
    assert store["HBB_HUMAN"].depth == 1 + sum(entry["num_rows"] for entry in used)


@needs_hhsuite
def test_hhblits_rows_stand_between_those_of_jackhmmer(demo):
    store = FeatureStore.open(demo[0].store)
    assert [entry["tool"] for entry in store["HBB_HUMAN"].databases] == ["jackhmmer", "hhblits", "jackhmmer"]
    # It finds rows that UniRef90 did not give.
    assert sum(store[name].databases[1]["num_rows"] for name in store.ids) > 0


def test_a_second_run_searches_nothing_and_commits_nothing(demo):
    config, first = demo
    version = FeatureStore.open(config.store).version
    before = tree_bytes(Path(config.store))
    again = run_build(config)
    assert (again.num_searched, again.num_reused, again.num_failed) == (0, 13 * len(DATABASES), 0)
    assert (again.num_added, again.num_unchanged, again.num_records) == (0, 13, 13)
    assert again.part_ids == first.part_ids
    assert again.version == version
    assert tree_bytes(Path(config.store)) == before


def test_one_or_four_workers_write_the_same_bytes(tmp_path):
    queries = write_fasta(tmp_path / "q.fasta", globins(17))
    reports = {}
    for workers in (1, 4):
        folder = tmp_path / str(workers)
        config = config_of(folder, queries, [f"uniref90={GLOBINS}"], workers=workers, parts=3)
        reports[workers] = run_build(config)
    assert reports[1].part_ids == reports[4].part_ids
    assert len(reports[1].part_ids) == 3
    assert tree_bytes(tmp_path / "1/store/parts") == tree_bytes(tmp_path / "4/store/parts")
    frames = [tree_bytes(tmp_path / workers / "store.results/units", "*.zst") for workers in "14"]
    assert frames[0] == frames[1]
    assert len(frames[0]) == 17


def counting_jackhmmer(folder: Path, before: str = "") -> Path:
    """A jackhmmer on PATH that notes every search and then is the real one."""
    real = find_binary("jackhmmer")
    return stand_in(folder / "bin", f'{before}echo x >> {folder}/searches\nexec {real} "$@"\n')


def num_searches(folder: Path) -> int:
    path = folder / "searches"
    return len(path.read_text().split()) if path.exists() else 0


def test_equal_sequences_are_searched_once_and_duplicate_ids_are_resolved(tmp_path, monkeypatch):
    first_on_path(monkeypatch, counting_jackhmmer(tmp_path))
    (name_a, a), (name_b, b) = globins(2).items()
    files = [tmp_path / "1.fasta", tmp_path / "2.fasta"]
    write_fasta(files[0], {"x": a, "same_as_x": a, "y": b})
    # x again with other residues, y again with the same, and x's residues in lower case under a third name.
    files[1].write_text(f">x\n{b}\n>y\n{b}\n>third\n{a.lower()}*\n")
    report = run_build(config_of(tmp_path, files, [f"uniref90={GLOBINS}"], parts=5))
    assert num_searches(tmp_path) == 2
    store = FeatureStore.open(report.store)
    assert store.ids == ["same_as_x", "third", "x", "y"]
    assert store["x"].sequence == store["third"].sequence == a
    assert [(letter.record_id, letter.line) for letter in report.dead_letters] == [("x", 1), ("y", 3)]
    assert "with another sequence" in report.dead_letters[0].reason
    assert "with the same sequence" in report.dead_letters[1].reason
    assert str(files[0]) in report.dead_letters[0].reason
    assert len({name_a, name_b}) == 2


def test_new_queries_search_only_what_is_new(tmp_path, monkeypatch):
    first_on_path(monkeypatch, counting_jackhmmer(tmp_path))
    few = write_fasta(tmp_path / "few.fasta", globins(2))
    more = write_fasta(tmp_path / "more.fasta", globins(4))
    first = run_build(config_of(tmp_path, few, [f"uniref90={GLOBINS}"]))
    second = run_build(config_of(tmp_path, more, [f"uniref90={GLOBINS}"]))
    assert num_searches(tmp_path) == 4
    assert (second.num_searched, second.num_reused) == (2, 2)
    assert (second.num_added, second.num_unchanged) == (2, 2)
    assert second.version > first.version
    assert len(FeatureStore.open(second.store)) == 4


def test_a_newer_database_replaces_records_only_when_told_to(tmp_path):
    queries = write_fasta(tmp_path / "q.fasta", globins(2))
    newer = tmp_path / "newer.fasta"
    newer.write_text("".join(Path(GLOBINS).read_text().partition("\n>")[0:1]) + "\n")
    old = run_build(config_of(tmp_path, queries, [f"uniref90={GLOBINS}"]))
    depths = {name: FeatureStore.open(old.store)[name].depth for name in globins(2)}
    with pytest.raises(CommitConflictError, match="other content"):
        run_build(config_of(tmp_path, queries, [f"uniref90={newer}"]))
    skipped = run_build(config_of(tmp_path, queries, [f"uniref90={newer}"], on_existing="skip"))
    assert (skipped.version, skipped.num_added, skipped.num_reused) == (old.version, 0, 2)
    replaced = run_build(config_of(tmp_path, queries, [f"uniref90={newer}"], on_existing="replace"))
    assert (replaced.version, replaced.num_added, replaced.num_reused) == (old.version + 1, 2, 2)
    now = FeatureStore.open(old.store)
    assert all(now[name].depth < depths[name] for name in depths)
    assert FeatureStore.open(old.store, version=old.version)[next(iter(depths))].depth in depths.values()


def test_a_protein_without_relatives_is_a_record_of_one_row(tmp_path):
    queries = write_fasta(tmp_path / "q.fasta", {"alone": "MKWWWWWPPPPPCCCCCYYYYY"})
    report = run_build(config_of(tmp_path, queries, [f"uniref90={GLOBINS}"]))
    record = FeatureStore.open(report.store)["alone"]
    assert record.depth == 1
    assert record.databases[0]["num_hits"] == 0
    assert report.dead_letters == ()


def test_caps_can_be_set_and_leave_the_search_alone(tmp_path):
    queries = write_fasta(tmp_path / "q.fasta", globins(1))
    full = run_build(config_of(tmp_path, queries, [f"uniref90={GLOBINS}"], store=str(tmp_path / "full")))
    capped = run_build(
        config_of(
            tmp_path,
            queries,
            [f"uniref90={GLOBINS}"],
            store=str(tmp_path / "capped"),
            results=full.results,
            max_hits={"uniref90": 6},
        )
    )
    assert (capped.num_searched, capped.num_reused) == (0, 1)
    (name,) = globins(1)
    deep, shallow = FeatureStore.open(full.store)[name], FeatureStore.open(capped.store)[name]
    assert shallow.depth <= 6 < deep.depth
    np.testing.assert_array_equal(deep.msa()[: shallow.depth], shallow.msa())
    assert shallow.databases[0]["num_hits"] == deep.databases[0]["num_hits"]


def test_relative_paths_are_those_of_the_folder_where_the_build_was_started(tmp_path, monkeypatch):
    """Workers of Spark or a cluster run in folders of their own."""
    from foldfeed.pipelines.beam.graph import ReadFile
    from foldfeed.pipelines.building.run import context_of

    (tmp_path / "here").mkdir()
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_fasta(Path("q.fasta"), {"a": "ACDEFGHIKL"})
    write_fasta(Path("u.fasta"), {"b": "ACDEFGHIKL"})
    config = dataclasses.replace(
        config_of(Path(), Path("q.fasta"), ["u=u.fasta"]), store="store", results="kept"
    )
    step = ReadFile(config.max_residues)
    context = context_of(config, (), make_plan(config.queries, (), 100), "job", 1)
    monkeypatch.chdir(tmp_path / "worker")
    here = tmp_path / "here"
    monkeypatch.setenv("HOME", str(here))
    for url in (
        "q.fasta",
        str(here / "q.fasta"),
        "~/q.fasta",
        f"file:{here}/q.fasta",
        f"file://{here}/q.fasta",
    ):
        (entry,) = step.process((0, url))
        assert (entry.record_id, entry.source) == ("a", url)
    assert (context.store_url, context.results_url) == (str(here / "store"), str(here / "kept"))
    assert config.databases[0].paths == (str(here / "u.fasta"),)
