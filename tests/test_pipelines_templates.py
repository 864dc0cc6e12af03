"""Template search on real programs: a record's hits are those that hmmsearch prints when run by hand."""

import dataclasses
import datetime
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from mmcif_samples import sample
from pipelines_data import (
    config_of,
    first_on_path,
    globins,
    needs_hmmer,
    stand_in,
    write_fasta,
)

from foldfeed.feature_store import FeatureStore
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.parsers.release_dates import parse_release_dates
from foldfeed.feature_store.parsers.stockholm import stockholm_as_a3m
from foldfeed.pipelines import run_build
from foldfeed.pipelines.building.array_task import search_share
from foldfeed.pipelines.building.job import forecast_build, planned
from foldfeed.pipelines.building.run import context_of
from foldfeed.pipelines.databases.files import make_manifest
from foldfeed.pipelines.databases.registry import Registry
from foldfeed.pipelines.databases.registry import templates_of as templates_named
from foldfeed.pipelines.databases.spec import DatabaseSpec
from foldfeed.pipelines.databases.template_database import make_template_files
from foldfeed.pipelines.errors import ConfigError, DatabaseError
from foldfeed.pipelines.fasta import read_fasta
from foldfeed.pipelines.planning.forecast import lines_of
from foldfeed.pipelines.planning.share import Share
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.searches.template_search import (
    search_template_unit,
    template_unit,
    template_unit_id,
    templates_of,
)
from foldfeed.pipelines.tools.search_tool import find_binary
from foldfeed.pipelines.tools.template_profile import to_stockholm

pytestmark = [pytest.mark.external_tool, needs_hmmer]

FLAGS = ["--noali", "--cpu", "1", "--F1", "0.1", "--F2", "0.1", "--F3", "0.1"]
FLAGS += ["-E", "100", "--incE", "100", "--domE", "100", "--incdomE", "100"]
# Runs the program, and finds what it wrote.
AFTER = """
"$REAL" "$@"
while [ $# -gt 1 ]; do case "$1" in -A) hits=$2;; --domtblout) table=$2;; esac; shift; done
"""
# The first is a query, too; the last is far from all others.
NAMES = ["1aaa_A", "2bbb_B", "3ccc_AA", "4ddd_A", "5eee_A", "6fff_X"]
DATES = ["1984-07-17", "2017-01-02", "2018-04-30", "2018-05-01", None, "2021-12-31"]


def make_files(folder: Path) -> dict[str, Path]:
    """Two queries, a database of globins for their alignments, and one of templates with their dates."""
    folder.mkdir(exist_ok=True)
    entries = globins(30)
    names = list(entries)
    chains = {
        f"{chain} mol:protein length:{len(entries[name])}  {name}": entries[name]
        for chain, name in zip(NAMES, (names[0], *names[20:24]), strict=False)
    }
    # Twice the same domain, in one chain: two hits.
    double = entries[names[24]][:120] + "GSGSGSGS" + entries[names[25]][:130]
    chains |= {
        f"{NAMES[5]} mol:protein length:{len(double)}": double,
        "7rna_R mol:na length:30": "ACGU" * 7 + "AC",
    }
    lines = [
        f"{chain[:4]}\t{date}\t{number + 1.5}"
        for number, (chain, date) in enumerate(zip(NAMES, DATES, strict=False))
        if date
    ]
    (folder / "dates.tsv").write_text("\n".join(["entry\trelease_date\tresolution_angstrom", *lines]) + "\n")
    return {
        "queries": write_fasta(folder / "q.fasta", {f"q{n}": entries[names[n]] for n in range(2)}),
        "database": write_fasta(folder / "u.fasta", {name: entries[name] for name in names[2:20]}),
        "templates": write_fasta(folder / "t.fasta", chains),
        "dates": folder / "dates.tsv",
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return make_files(tmp_path_factory.mktemp("files"))


def with_templates(folder: Path, files: dict[str, Path], **options):
    spec = DatabaseSpec.parse_templates(f"pdb={files['templates']},{files['dates']}")
    return config_of(folder, files["queries"], [f"uniref90={files['database']}"], templates=spec, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory, files):
    config = with_templates(tmp_path_factory.mktemp("build"), files)
    return config, run_build(config)


def rows_of_stockholm(path: Path) -> tuple[dict[str, str], str]:
    rows: dict[str, str] = {}
    reference = ""
    for line in path.read_text().splitlines():
        if line.startswith("#=GC RF"):
            reference += line.split()[2]
        elif line and not line.startswith(("#", "//")):
            name, residues = line.split()
            rows[name] = rows.get(name, "") + residues
    return rows, reference


def by_hand(folder: Path, name: str, sequence: str, files: dict[str, Path]) -> list[dict]:
    """As AlphaFold 2's multimer pipeline: jackhmmer's own alignment, its query's columns as reference."""
    folder.mkdir()
    query = write_fasta(folder / "q.fasta", {name: sequence})
    flags = ["--noali", "--F1", "0.0005", "--F2", "0.00005", "--F3", "0.0000005", "--cpu", "1"]
    flags += ["--incE", "0.0001", "-E", "0.0001", "-N", "1"]
    words = [find_binary("jackhmmer"), "-o", "/dev/null", "-A", str(folder / "a.sto"), *flags]
    subprocess.run([*words, str(query), str(files["database"])], check=True)
    rows, _ = rows_of_stockholm(folder / "a.sto")
    reference = "".join("x" if letter not in "-." else "." for letter in rows[name])
    text = "".join(f"{row} {letters}\n" for row, letters in rows.items())
    (folder / "b.sto").write_text(f"# STOCKHOLM 1.0\n{text}#=GC RF {reference}\n//\n")
    hmm, hits, table = folder / "x.hmm", folder / "hits.sto", folder / "table"
    words = [find_binary("hmmbuild"), "-o", "/dev/null", "--hand", "--amino", "-n", "query", str(hmm)]
    subprocess.run([*words, str(folder / "b.sto")], check=True)
    words = [find_binary("hmmsearch"), "-o", "/dev/null", *FLAGS, "-A", str(hits), "--domtblout", str(table)]
    subprocess.run([*words, str(hmm), str(files["templates"])], check=True)
    rows, reference = rows_of_stockholm(hits)
    lines = [line.split() for line in table.read_text().splitlines() if not line.startswith("#")]
    found = []
    for (row, letters), line in zip(rows.items(), lines, strict=True):
        target, first, last = re.fullmatch(r"(.+)/(\d+)-(\d+)", row).groups()
        pairs, at, column = [], int(first) - 1, 0
        for letter, mark in zip(letters, reference, strict=True):
            if letter.isalpha() and mark == "x":
                pairs.append([column, at])
            at += letter.isalpha()
            column += mark == "x"
        assert (at, column) == (int(last), len(sequence))
        found.append({"id": target, "pairs": pairs, "e_value": float(line[12]), "score": float(line[13])})
    return [hit for hit in found if hit["id"] != "7rna_R"]


def test_hits_are_what_the_programs_print_when_run_by_hand(tmp_path, files, built):
    config, _ = built
    store = FeatureStore.open(config.store)
    chains = {
        entry.split()[0]: "".join(entry.split("\n")[1:])
        for entry in files["templates"].read_text().split(">")[1:]
    }
    for name in ("q0", "q1"):
        record = store[name]
        wanted = by_hand(tmp_path / name, name, record.sequence, files)
        found = record.templates()
        assert [hit.template_id for hit in found.hits] == [hit["id"] for hit in wanted]
        for hit, want in zip(found.hits, wanted, strict=True):
            assert hit.pairs().tolist() == want["pairs"]
            assert (hit.e_value, hit.score) == (want["e_value"], want["score"])
            assert hit.sequence == chains[hit.template_id]
            number = NAMES.index(hit.template_id)
            assert hit.release_date == (DATES[number] and datetime.date.fromisoformat(DATES[number]))
            assert hit.resolution_angstrom == (number + 1.5 if DATES[number] else None)
        assert len(found.hits) > len(NAMES)
        assert (found.source["database"], found.source["tool"], found.source["msa"]) == (
            "pdb",
            "hmmsearch",
            "all",
        )
    (itself,) = (hit for hit in store["q0"].templates().hits if hit.template_id == "1aaa_A")
    assert itself.identity(store["q0"].sequence) == 1
    assert verify(store.url, level="deep").problems == ()


def test_hits_are_those_of_pyhmmer(files, built):
    """Another program around HMMER's code: its own profile of the same alignment, its own alignments."""
    pyhmmer = pytest.importorskip("pyhmmer")
    config, _ = built
    amino = pyhmmer.easel.Alphabet.amino()
    with pyhmmer.easel.SequenceFile(files["templates"], digital=True, alphabet=amino) as file:
        targets = file.read_block()
    record = FeatureStore.open(config.store)["q1"]
    rows = rows_of_record(record)
    path = Path(config.store).parent / "profile.sto"
    path.write_bytes(to_stockholm(rows))
    with pyhmmer.easel.MSAFile(path, digital=True, alphabet=amino, format="stockholm") as file:
        msa = file.read()
    builder = pyhmmer.plan7.Builder(amino, architecture="hand")
    hmm, _, _ = builder.build_msa(msa, pyhmmer.plan7.Background(amino))
    options = {"F1": 0.1, "F2": 0.1, "F3": 0.1, "E": 100, "incE": 100, "domE": 100, "incdomE": 100}
    (hits,) = pyhmmer.hmmsearch(hmm, targets, cpus=1, **options)
    wanted = {}
    for hit in hits:
        for domain in hit.domains.included:
            ali = domain.alignment
            target, query = ali.target_from - 1, ali.hmm_from - 1
            pairs = []
            for a, b in zip(ali.hmm_sequence, ali.target_sequence, strict=True):
                if a != "." and b != "-":
                    pairs.append([query, target])
                query, target = query + (a != "."), target + (b != "-")
            name = hit.name if isinstance(hit.name, str) else hit.name.decode()
            wanted[name, pairs[0][1]] = (pairs, domain.i_evalue, domain.score)
    found = {(hit.template_id, hit.template_span[0]): hit for hit in record.templates().hits}
    assert found.keys() == {key for key in wanted if key[0] != "7rna_R"}
    for key, hit in found.items():
        pairs, e_value, score = wanted[key]
        assert hit.pairs().tolist() == pairs
        # The table prints two digits of an E-value and one behind the point of a score.
        assert hit.e_value == pytest.approx(e_value, rel=0.06)
        assert hit.score == pytest.approx(score, abs=0.051)


def rows_of_record(record) -> list[bytes]:
    """The alignment of a record from its result: letters between columns are no part of a record."""
    results = ResultStore(str(Path(record.part.blobs.url).parent / "store.results"))
    for receipt in results.sample(100):
        answer = results.get(receipt.unit_id)
        rows = (
            [row for _, row in stockholm_as_a3m(answer.alignment)] if receipt.tool.name == "jackhmmer" else []
        )
        if rows and rows[0].decode() == record.sequence:
            return list(dict.fromkeys(rows))
    raise AssertionError("no answer")


def test_a_second_build_searches_nothing_and_another_number_of_workers_gives_the_same_bytes(
    tmp_path, files, built
):
    config, report = built
    assert (report.num_searched, report.num_failed) == (4, 0)
    assert [cost.database for cost in report.costs] == ["uniref90", "pdb"]
    again = run_build(config)
    assert (again.started_engine, again.num_searched, again.num_reused) == (False, 0, 4)
    other = run_build(with_templates(tmp_path, files, workers=1, results=config.results_url))
    assert (other.num_searched, other.num_reused, other.part_ids) == (0, 4, report.part_ids)


def test_what_a_record_keeps_is_chosen_without_a_search(tmp_path, files, built):
    config, _ = built
    options = {"results": config.results_url, "max_template_hits": 2, "max_template_date": "2018-04-30"}
    chosen = with_templates(tmp_path, files, **options)
    databases, plan, job_id, _ = planned(chosen)
    assert job_id != planned(config)[2]
    record = FeatureStore.open(config.store)["q0"]
    name = template_unit_id(record.sequence, databases, plan.templates)
    kept = templates_of(ResultStore(config.results_url).get(name), record.sequence, plan.templates)
    wanted = record.templates(max_date="2018-04-30", max_hits=2)
    assert [hit.template_id for hit in kept.hits] == [hit.template_id for hit in wanted.hits]
    assert (kept.source["max_date"], kept.source["max_hits"]) == ("2018-04-30", "2")


def test_a_build_without_templates_is_what_it_was(tmp_path, files, built):
    config, report = built
    plain = run_build(
        config_of(tmp_path, files["queries"], [f"uniref90={files['database']}"], results=config.results_url)
    )
    assert plain.num_searched == 0
    assert plain.part_ids != report.part_ids
    assert FeatureStore.open(plain.store)["q0"].templates() is None
    (part,) = Path(plain.store, "parts").iterdir()
    assert "template" not in (part / "zarr.json").read_text()


@pytest.mark.parametrize(
    ("program", "script", "kind", "words"),
    [
        ("hmmsearch", "exit 3\n", "ToolFailedError", "exit code 3"),
        ("hmmbuild", "exit 3\n", "ToolFailedError", "exit code 3"),
        ("hmmsearch", "kill -9 $$\n", "ToolFailedError", "killed by signal 9"),
        ("hmmsearch", "sleep 60\n", "ToolTimeoutError", "1"),
        ("hmmsearch", "exit 0\n", "ToolOutputError", "does not end with '# [ok]'"),
        ("hmmsearch", f"{AFTER}truncate -s -40 $hits\n", "ToolOutputError", "was cut off"),
        ("hmmsearch", f"{AFTER}: > $hits\n", "ToolOutputError", "0 rows is not that of its table"),
        ("hmmsearch", f"{AFTER}sed -i s/1aaa/9zzz/ $hits\n", "ToolOutputError", "is not that of"),
        ("hmmsearch", f"{AFTER}sed -i /1aaa/d $table\n", "ToolOutputError", "is not that of"),
    ],
)
def test_a_fault_of_a_program_is_no_answer(tmp_path, monkeypatch, files, built, program, script, kind, words):
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", f"REAL={find_binary(program)}\n{script}", program))
    timeout_s = 1.0 if "sleep" in script else 60.0
    config = with_templates(tmp_path, files, results=built[0].results_url, timeout_s=timeout_s)
    context = context_of(config, *planned(config))
    (query, _) = read_fasta(str(files["queries"]), file_index=0, max_residues=1000)
    unit = template_unit(query, context)
    status = "retryable" if "kill" in script or "sleep" in script else "poison"
    receipt = search_template_unit(unit, context)
    assert (receipt.kind, receipt.status) == (kind, status)
    assert "search in 'pdb'" in receipt.reason
    assert words in receipt.reason
    assert not ResultStore(context.results_url).shows(unit.unit_id)


def test_a_search_that_fails_is_a_dead_letter_and_the_next_run_makes_only_it(
    tmp_path, monkeypatch, files, built
):
    script = f'if mkdir {tmp_path}/first; then exit 3; fi\nexec {find_binary("hmmsearch")} "$@"\n'
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", script, "hmmsearch"))
    config = with_templates(tmp_path, files, workers=1)
    report = run_build(config)
    (letter,) = report.dead_letters
    assert (letter.stage, letter.kind, letter.retry) == ("search", "ToolFailedError", "poison")
    assert FeatureStore.open(report.store).ids == sorted({"q0", "q1"} - {letter.record_id})
    again = run_build(config)
    assert (again.num_searched, again.num_reused, again.dead_letters) == (1, 3, ())
    wanted, stored = (FeatureStore.open(one.store) for one in (built[1], again))
    for name in ("q0", "q1"):
        pairs = [[hit.pairs().tolist() for hit in store[name].templates().hits] for store in (wanted, stored)]
        assert pairs[0] == pairs[1]


def test_a_database_that_changes_under_a_search_gives_no_answer(tmp_path, monkeypatch, built):
    mine = make_files(tmp_path / "files")
    script = f'echo ">late_A\nMVLSPADKTNVKAAW" >> {mine["templates"]}\nexec {find_binary("hmmsearch")} "$@"\n'
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", script, "hmmsearch"))
    config = with_templates(tmp_path, mine, results=built[0].results_url)
    context = context_of(config, *planned(config))
    (query, _) = read_fasta(str(mine["queries"]), file_index=0, max_residues=1000)
    for words in ("was changed while it was searched", "holds something else"):
        receipt = search_template_unit(template_unit(query, context), context)
        assert (receipt.kind, receipt.status) == ("DatabaseChangedError", "retryable")
        assert words in receipt.reason


def test_new_release_dates_are_a_new_database(tmp_path, files, built):
    mine = dict(files, dates=tmp_path / "dates.tsv")
    mine["dates"].write_text(files["dates"].read_text().replace("1984-07-17", "1990-01-01"))
    config = with_templates(tmp_path, mine, results=built[0].results_url)
    context = context_of(config, *planned(config))
    (query, _) = read_fasta(str(files["queries"]), file_index=0, max_residues=1000)
    unit = template_unit(query, context)
    assert not ResultStore(context.results_url).shows(unit.unit_id)
    assert search_template_unit(unit, context).status == "ok"
    answer = ResultStore(context.results_url).get(unit.unit_id)
    hits = templates_of(answer, query.sequence, context.templates).hits
    dates = {hit.template_id: hit.release_date for hit in hits}
    assert dates["1aaa_A"] == datetime.date(1990, 1, 1)


def test_tasks_of_an_array_search_templates_when_the_alignments_are_there(tmp_path, files, built):
    config = with_templates(tmp_path, files)
    reports = [search_share(config, Share(task=task, tasks=3)) for task in range(3)]
    assert sum(report.num_searched for report in reports) == 2
    assert sum(report.num_templates for report in reports) == 2
    assert (reports[-1].num_planned, reports[-1].num_answered) == (4, 4)
    final = run_build(config)
    assert (final.num_searched, final.part_ids) == (0, built[1].part_ids)


def test_a_dry_run_counts_templates(tmp_path, files, built):
    fresh = lines_of(forecast_build(with_templates(tmp_path, files)), None)
    assert any("pdb (hmmsearch): 0 searches reused, 2 to do" in line for line in fresh)
    known = with_templates(tmp_path, files, results=built[0].results_url, template_msa="uniref90")
    # The whole alignment is that of its one database.
    assert any(
        "pdb (hmmsearch): 2 searches reused, 0 to do" in line
        for line in lines_of(forecast_build(known), None)
    )


def test_a_database_is_made_of_mmcif_files(tmp_path, monkeypatch):
    pytest.importorskip("gemmi")
    folder = tmp_path / "cif"
    (folder / "ab").mkdir(parents=True)
    (folder / "ab" / "1abc.cif").write_bytes(sample("1ABC", {"A": "A", "B": "B"}, date="2001-02-03"))
    (folder / "2abc.cif").write_bytes(sample("2ABC", {"C": "X"}, date="2020-02-01"))
    (folder / "bad.cif").write_text("data_x\n")
    monkeypatch.setattr("foldfeed.pipelines.databases.template_database._BATCH", 1)
    for processes in (1, 2):
        made = make_template_files("pdb", folder, tmp_path / f"db{processes}", num_processes=processes)
        assert (made.num_chains, made.num_entries, len(made.rejects)) == (3, 2, 1)
        assert made.rejects[0][0] == "bad.cif"
    assert Path(made.fasta).read_bytes() == (tmp_path / "db1" / "pdb.fasta").read_bytes()
    headers = [line for line in Path(made.fasta).read_text().splitlines() if line.startswith(">")]
    assert [header.split()[0] for header in headers] == [">2abc_X", ">1abc_A", ">1abc_B"]
    assert headers[0] == ">2abc_X mol:protein length:5  A small protein"
    releases = parse_release_dates(Path(made.dates).read_bytes())
    assert releases["1abc"] == (datetime.date(2001, 2, 3), 1.5)
    monkeypatch.setenv("FOLDFEED_DATABASES", str(tmp_path / "known.json"))
    runner = CliRunner()
    words = [
        "database",
        "add",
        "pdb",
        str(folder),
        "--tool",
        "hmmsearch",
        "--unpack-to",
        str(tmp_path / "db"),
    ]
    said = runner.invoke(main, words, catch_exceptions=False)
    assert said.exit_code == 0
    assert "3 chains of 2 entries, 0 of these without a release date; 1 files left out" in said.output
    assert "pdb: 3 of 3 sequences have a release date" in said.output
    assert runner.invoke(main, ["database", "verify"]).exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"templates": None, "max_template_date": "2018-04-30"}, "have no effect without templates"),
        ({"templates": None, "max_template_hits": 3}, "have no effect without templates"),
        ({"template_msa": "mgnify"}, "template_msa is 'mgnify', which is no database of this build"),
        ({"max_template_date": "2018"}, "'2018' is no date"),
        ({"max_template_hits": 0}, "max_template_hits is 0; it must be greater than 0"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, files, options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        dataclasses.replace(with_templates(tmp_path, files), **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pdb", "templates 'pdb' must be NAME=FASTA,DATES"),
        ("pdb=a.fasta", "give a FASTA file and a table of release dates"),
        ("pdb=a.fasta,b.tsv:jackhmmer", "jackhmmer searches no templates"),
        ("pdb=s3://b/a.fasta,b", "must be a local path, not the URL"),
    ],
)
def test_templates_that_cannot_be_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        DatabaseSpec.parse_templates(text)


def test_files_that_cannot_be_are_refused_before_any_search(tmp_path, files):
    registry = Registry(tmp_path / "known.json")
    with pytest.raises(ConfigError, match=r"templates 'nope' must be NAME=FASTA,DATES.*it has none"):
        templates_named("nope", registry)
    bad = tmp_path / "bad.tsv"
    for data, words in (("1abc\tbad\n", "'bad' is no date"), ("1abc 2018-01-02\n", "expected entry, tab")):
        bad.write_text(data)
        with pytest.raises(DatabaseError, match=f"no table of release dates: .*{words}"):
            DatabaseSpec.parse_templates(f"pdb={files['templates']},{bad}").files()
    bad.unlink()
    with pytest.raises(DatabaseError, match="no such file"):
        DatabaseSpec.parse_templates(f"pdb={files['templates']},{bad}").files()
    # Only the head is read: a line that is cut there is none.
    bad.write_text("".join(f"{number:05}\t2018-01-02\t1.5\n" for number in range(9999)))
    assert len(DatabaseSpec.parse_templates(f"pdb={files['templates']},{bad}").files()) == 2


def test_a_template_database_without_dates_is_refused_when_added(tmp_path, files):
    empty = tmp_path / "dates.tsv"
    empty.write_text("entry\trelease_date\n")
    spec = DatabaseSpec.parse_templates(f"pdb={files['templates']},{empty}")
    with pytest.raises(DatabaseError, match="it has no release date"):
        make_manifest(spec)
