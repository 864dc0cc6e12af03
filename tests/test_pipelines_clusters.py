"""MMseqs2 in databases of clusters, one after another and many queries in a run, as ColabFold searches."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from cluster_databases import entries, make_clusters, mmseqs
from pipelines_data import (
    GLOBINS,
    config_of,
    dead_letters_file,
    first_on_path,
    globins,
    is_there,
    tree_bytes,
    write_fasta,
)

from foldfeed.feature_store import FeatureStore
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines import BuildConfig, DatabaseSpec, run_build
from foldfeed.pipelines.building.array_task import search_share
from foldfeed.pipelines.building.job import forecast_build
from foldfeed.pipelines.building.tools import prepare_databases
from foldfeed.pipelines.databases.files import make_manifest
from foldfeed.pipelines.databases.registry import Registry, database_of
from foldfeed.pipelines.databases.staging import staged_database
from foldfeed.pipelines.errors import (
    ConfigError,
    DatabaseError,
    StagingError,
    ToolNotFoundError,
    ToolOutputError,
)
from foldfeed.pipelines.planning.share import Share
from foldfeed.pipelines.searches import together
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.tools.mmseqs import Mmseqs
from foldfeed.pipelines.tools.mmseqs_commands import MmseqsOptions
from foldfeed.pipelines.tools.search_tool import find_binary

HERE = is_there("mmseqs") and GLOBINS.exists()
REASON = "mmseqs or HMMER's tutorial not found; apt-get install mmseqs2 hmmer-examples"
needs_mmseqs = pytest.mark.skipif(not HERE, reason=REASON)
pytestmark = pytest.mark.external_tool

# The words of `colabfold_search -s 8 --threads 1` after `createdb`, as it logs them, without those that stand
# for a default: UniRef30 without an index, the environmental database with one and with the profile, then
# both in one file.
BY_HAND = """
search qdb uniref res tmp --threads 1 --num-iterations 3 --db-load-mode 0 -a -e 0.1 --max-seqs 10000 -s 8.0
mvdb tmp/latest/profile_1 prof_res
lndb qdb_h prof_res_h
expandaln qdb uniref_seq res uniref_aln res_exp --db-load-mode 0 --threads 1 --expansion-mode 0 -e inf \
 --expand-filter-clusters 1 --max-seq-id 0.95
align prof_res uniref_seq res_exp res_exp_realign --db-load-mode 0 -e 10 --max-accept 100000 --threads 1 \
 --alt-ali 10 -a
filterresult qdb uniref_seq res_exp_realign res_exp_realign_filter --db-load-mode 0 --qid 0 --qsc 0.8 \
 --diff 0 --threads 1 --max-seq-id 1.0 --filter-min-enable 100
result2msa qdb uniref_seq res_exp_realign_filter uniref.a3m --msa-format-mode 6 --db-load-mode 0 --threads 1 \
 --filter-msa 1 --filter-min-enable 1000 --diff 3000 --qid 0.0,0.2,0.4,0.6,0.8,1.0 --qsc 0 --max-seq-id 0.95
search prof_res env res_env tmp3 --threads 1 --num-iterations 3 --db-load-mode 2 -a -e 0.1 --max-seqs 10000 \
 -s 8.0
expandaln prof_res env.idx res_env env.idx res_env_exp -e inf --expansion-mode 0 --db-load-mode 2 --threads 1
align tmp3/latest/profile_1 env.idx res_env_exp res_env_exp_realign --db-load-mode 2 -e 10 \
 --max-accept 100000 --threads 1 --alt-ali 10 -a
filterresult qdb env.idx res_env_exp_realign res_env_exp_realign_filter --db-load-mode 2 --qid 0 --qsc 0.8 \
 --diff 0 --max-seq-id 1.0 --threads 1 --filter-min-enable 100
result2msa qdb env.idx res_env_exp_realign_filter env.a3m --msa-format-mode 6 --db-load-mode 2 --threads 1 \
 --filter-msa 1 --filter-min-enable 1000 --diff 3000 --qid 0.0,0.2,0.4,0.6,0.8,1.0 --qsc 0 --max-seq-id 0.95
mergedbs qdb final.a3m uniref.a3m env.a3m
"""

# What MMseqs2 has no letter for, and nothing that it could find.
UNKNOWN = "X" * 40
QUERIES = {"unknown": UNKNOWN, "short": "MKVAAAKW"}
# An index that is mapped is read in part.
MAPPED = ",db-load-mode=2"


def queries() -> dict[str, str]:
    """Returns queries with many, some and no rows."""
    known = globins(40)
    base = known["HBB_MANSP"]
    return {"odd": f"{base[:20]}UOBZJX{base[20:]}", "last": list(known.values())[-1]} | QUERIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two databases of clusters, ``uniref`` and ``env``, of some common and some own sequences."""
    folder = tmp_path_factory.mktemp("clusters")
    known = list(globins(45).items())
    binary = find_binary("mmseqs")
    make_clusters(binary, folder, write_fasta(folder / "u.fasta", dict(known[:32])), "uniref")
    # Insertions and other residues: rows that UniRef does not give.
    other = {f"env{name}": f"{text[:50]}WWPW{text[55:]}" for name, text in known[14:]}
    make_clusters(binary, folder, write_fasta(folder / "e.fasta", other), "env")
    return folder


def with_index(folder: Path, target: Path, name: str) -> Path:
    """Gives the databases of a folder to another one, where one has an index of words of five letters.

    Such an index is made, and searched, quickly. Its hash is remembered: most of it is a table of scores.
    """
    for path in [*folder.glob("uniref*"), *folder.glob("env*")]:
        if not path.is_dir():
            (target / path.name).symlink_to(path)
    mmseqs(find_binary("mmseqs"), target, f"createindex {name} tmp --split 1 -k 5 --threads 1 -v 1")
    return target


@pytest.fixture(scope="module")
def half(tmp_path_factory, folder) -> Path:
    """The same databases, the second with an index."""
    return with_index(folder, tmp_path_factory.mktemp("half"), "env")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, half) -> Path:
    """The same databases, both with an index."""
    target = with_index(half, tmp_path_factory.mktemp("indexed"), "uniref")
    tools(target)
    return target


def build_in(place: Path, entries: dict[str, str], indexed: Path, **options) -> BuildConfig:
    """Returns a build that knows the hashes of the databases."""
    shutil.copytree(indexed / "known" / "digests", place / "store.results" / "digests")
    path = write_fasta(place / "q.fasta", entries)
    return config_of(place, path, pair(indexed, MAPPED), workers=1, **options)


def pair(folder: Path, options: str = "") -> list[str]:
    """Returns the databases as a person writes them."""
    return [f"env={folder}/env:mmseqs2,after=uniref{options}", f"uniref={folder}/uniref:mmseqs2{options}"]


def tools(folder: Path, cpus: int = 1, options: str = "") -> tuple[Mmseqs, Mmseqs]:
    """Returns what searches the first database, and the second after it."""
    specs = [DatabaseSpec.parse(text) for text in pair(folder, options)]
    known = open_blobs(str(folder / "known"))
    found = prepare_databases(specs, max_hits={}, cpus=cpus, timeout_s=60.0, digests=known)
    by_name = {database.name: database.tool for database in found}
    assert [database.after for database in found] == ["uniref", ""]
    return by_name["uniref"], by_name["env"]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory, half) -> dict[str, bytes]:
    """Runs ColabFold's commands as a person would; returns the rows of every query."""
    work = tmp_path_factory.mktemp("hand")
    for path in half.iterdir():
        (work / path.name).symlink_to(path)
    binary = find_binary("mmseqs")
    # ColabFold's own names of queries are numbers.
    write_fasta(work / "q.fasta", {str(101 + place): text for place, text in enumerate(queries().values())})
    mmseqs(binary, work, "createdb q.fasta qdb --shuffle 0 --dbtype 1")
    for line in BY_HAND.strip().splitlines():
        mmseqs(binary, work, line)
    final = dict(entries(work / "final.a3m"))
    return {name: final[place].encode() for place, name in enumerate(queries())}


@pytest.fixture(scope="module")
def built(tmp_path_factory, half):
    work = tmp_path_factory.mktemp("build")
    path = write_fasta(work / "q.fasta", queries() | {"bad": "AC7"})
    config = config_of(work, path, pair(half), timeout_s=120.0, workers=1)
    return config, run_build(config)


def as_colabfold(name: str, alignments: bytes) -> bytes:
    """Returns rows as ColabFold writes them: the query named by number, without letters it does not know."""
    place = list(queries()).index(name)
    query = queries()[name]
    written = query.translate(str.maketrans("UOBZJ", "XXDEL"))
    return alignments.replace(f">query\n{query}\n".encode(), f">{101 + place}\n{written}\n".encode())


def answers(config) -> dict[str, list]:
    """Returns a build's stored results by record id, UniRef's first."""
    found: dict[str, list] = {}
    results = ResultStore(config.results_url)
    for path in Path(config.results_url).glob("units/*/*.json"):
        receipt, result = results.receipt(path.stem), results.get(path.stem)
        row = result.alignment.split(b"\n", 2)[1].decode()
        name = next(name for name, text in queries().items() if text == row)
        found.setdefault(name, []).append((receipt.facts.database != "uniref", receipt, result))
    return {
        name: [(receipt, result) for _, receipt, result in sorted(pairs, key=lambda one: one[0])]
        for name, pairs in found.items()
    }


@needs_mmseqs
def test_a_build_of_a_pair_equals_colabfolds_commands_by_hand(by_hand, built):
    config, report = built
    assert (report.num_records, report.num_searched, report.num_failed) == (4, 8, 0)
    found = answers(config)
    for name, rows in by_hand.items():
        assert as_colabfold(name, b"".join(result.alignment for _, result in found[name])) == rows, name
    depth = {name: rows.count(b">") for name, rows in by_hand.items()}
    assert depth["odd"] > 30
    assert depth["short"] == depth["unknown"] == 2
    assert b">env" in by_hand["odd"]
    (letter,) = dead_letters_file(report.dead_letters_path)
    assert (letter["record_id"], letter["retry"]) == ("bad", "poison")
    record = FeatureStore.open(config.store)["odd"]
    assert [use["name"] for use in record.databases] == ["env", "uniref"]
    assert {row["database"] for row in record.rows().to_pylist()[1:]} == {"env", "uniref"}


@needs_mmseqs
def test_receipts_share_a_runs_cost_and_a_second_build_searches_nothing(built):
    config, _ = built
    found = answers(config)
    for place in (0, 1):
        costs = {name: pairs[place][0].usage for name, pairs in found.items()}
        assert len({usage.max_rss_bytes for usage in costs.values()}) == 1
        ratio = costs["odd"].cpu_s / costs["short"].cpu_s
        assert ratio == pytest.approx(len(queries()["odd"]) / len(queries()["short"]))
    assert {pairs[0][0].facts.num_together for pairs in found.values()} == {4}
    again = run_build(config)
    assert (again.num_searched, again.num_reused) == (0, 8)
    forecast = forecast_build(
        dataclasses.replace(config, store=config.store + "2", results=config.results_url)
    )
    assert [(one.database, one.num_missing) for one in forecast.databases] == [("env", 0), ("uniref", 0)]
    question = "select num_together n, count(*) from searches group by 1"
    told = CliRunner().invoke(main, ["ledger", config.store, question, "--format", "csv"])
    assert told.output.splitlines()[1:] == ["4,8"], told.output


@needs_mmseqs
def test_an_answer_does_not_depend_on_queries_beside_it_nor_on_threads(indexed):
    """Together, in another order, by two threads, read instead of mapped: each as alone."""
    texts = list(queries().values())
    first, second = tools(indexed, 1, MAPPED)
    alone = {}
    for text in texts[:3]:
        one = first.search(text)
        alone[text] = (one, second.search_many([text], [one])[0])
    for order, cpus, options in ((texts, 1, ""), (texts[::-1], 2, MAPPED)):
        first, second = tools(indexed, cpus, options)
        assert first.identity == tools(indexed)[0].identity
        earlier = first.search_many(order)
        later = second.search_many(order, earlier)
        found = dict(zip(order, zip(earlier, later, strict=True), strict=True))
        for text, want in alone.items():
            one, two = found[text]
            assert (one.alignment, one.table) == (want[0].alignment, want[0].table)
            assert (two.alignment, two.table) == (want[1].alignment, b"")
    assert min(one.alignment.count(b">") for one, _ in alone.values()) == 1
    assert max(two.alignment.count(b">") for _, two in alone.values()) > 20
    total = sum(one.usage.cpu_s for one in earlier)
    assert total == pytest.approx(earlier[0].usage.cpu_s / len(order[0]) * sum(map(len, order)))
    with_both = second.search(texts[2])
    assert with_both.alignment == alone[texts[2]][1].alignment


def few() -> dict[str, str]:
    """Returns three queries, the first with many rows."""
    return globins(2) | {"short": "MKVAAAKW"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, indexed) -> BuildConfig:
    """A build of `few` that was done."""
    config = build_in(tmp_path_factory.mktemp("whole"), few(), indexed, parts=2)
    report = run_build(config)
    assert (report.num_searched, report.num_records) == (6, 3)
    return config


@needs_mmseqs
def test_an_array_gives_the_parts_of_a_build(tmp_path, indexed, whole, monkeypatch):
    monkeypatch.setattr(together, "TOGETHER", 2)
    config = build_in(tmp_path, few(), indexed, parts=2)
    shares = [search_share(config, Share(task=task, tasks=2)) for task in (0, 1)]
    assert [share.failures for share in shares] == [(), ()]
    assert sum(share.num_items for share in shares) == 6
    assert not any(share.num_items % 2 for share in shares)
    report = run_build(config)
    assert (report.num_searched, report.num_records) == (0, 3)
    assert tree_bytes(Path(config.store) / "parts") == tree_bytes(Path(whole.store) / "parts")


def real_but(folder: Path, monkeypatch, script: str) -> None:
    """Puts a script around the real mmseqs, ``$REAL``, before it on PATH."""
    real = find_binary("mmseqs")
    folder.mkdir()
    program = folder / "mmseqs"
    program.write_text(f'#!/bin/sh\nREAL="{real}"\n{script}\nexec "$REAL" "$@"\n')
    program.chmod(0o755)
    first_on_path(monkeypatch, folder)


@needs_mmseqs
def test_a_poisoned_query_costs_no_other_one(tmp_path, indexed, monkeypatch):
    """A search dies wherever one query is among those of the run; in the second database, too."""
    known = globins(3)
    poison = list(known.values())[1]
    real_but(tmp_path / "bin", monkeypatch, f'[ "$1" = expandaln ] && grep -q {poison} query.fasta && exit 3')
    config = build_in(tmp_path, known | {"long": "A" * 65_536}, indexed, max_residues=70_000)
    report = run_build(config)
    assert (report.num_records, report.num_searched, report.num_failed) == (2, 4, 4)
    letter, long = report.dead_letters
    assert (long.record_id, long.retry, long.kind) == ("long", "poison", "QueryTooLongError")
    assert (letter.record_id, letter.retry, letter.kind) == (list(known)[1], "poison", "ToolFailedError")
    assert "exit code 3" in letter.reason
    assert "'env' after 'uniref'" in letter.reason
    (note,) = Path(config.results_url).glob("jobs/*/*/together/*.json")
    said = json.loads(note.read_text())
    assert (said["database"], len(said["unit_ids"]), said["kind"]) == ("uniref", 3, "ToolFailedError")
    together_of = [receipt.facts.num_together for receipt in ResultStore(config.results_url).sample(10)]
    # One by one in the database where it failed, together again in the other.
    assert sorted(together_of) == [1, 1, 2, 2]


@needs_mmseqs
def test_lost_answers_and_profiles_are_made_again(tmp_path, whole):
    shutil.copytree(whole.results_url, tmp_path / "results")
    results = ResultStore(str(tmp_path / "results"))
    before = tree_bytes(tmp_path / "results" / "units", "*.zst")
    for path in sorted((tmp_path / "results").glob("units/*/*.json")):
        receipt = results.receipt(path.stem)
        if receipt.facts.database == "env":
            path.unlink()
            path.with_suffix(".zst").unlink()
        elif receipt.facts.num_residues == len("MKVAAAKW"):
            path.with_suffix(".zst").write_bytes(b"damaged")
    config = dataclasses.replace(whole, store=str(tmp_path / "store"), results=results.url)
    report = run_build(config)
    assert (report.num_records, report.num_failed) == (3, 0)
    assert tree_bytes(tmp_path / "results" / "units", "*.zst") == before
    assert tree_bytes(tmp_path / "store" / "parts") == tree_bytes(Path(whole.store) / "parts")


@needs_mmseqs
def test_an_earlier_result_without_a_profile_is_no_answer(indexed):
    first, second = tools(indexed, 1, MAPPED)
    found = first.search("MKVAAAKW")
    for table in (b"", found.table[:-1], found.table[:4]):
        with pytest.raises(ToolOutputError, match="kept no profile of every query"):
            second.search_many(["MKVAAAKW"], [dataclasses.replace(found, table=table)])


@needs_mmseqs
def test_an_mmseqs_that_cannot_expand_is_refused(tmp_path, folder, monkeypatch):
    real_but(tmp_path / "bin", monkeypatch, '[ "$1" = expandaln ] && { echo "Invalid Command: $1"; exit 1; }')
    spec = DatabaseSpec.parse(f"u={folder}/uniref:mmseqs2")
    with pytest.raises(ToolNotFoundError, match=r"no 'expandaln --expand-filter-clusters'.*release 14"):
        prepare_databases([spec], max_hits={}, cpus=1, timeout_s=60.0, digests=None)


@needs_mmseqs
def test_the_members_of_clusters_are_counted_and_known(tmp_path, folder, indexed):
    counts = [make_manifest(DatabaseSpec.parse(text)) for text in (pair(folder)[1], pair(indexed)[1])]
    assert counts[0].num_sequences == counts[1].num_sequences == 32
    assert counts[0].num_residues == sum(map(len, list(globins(45).values())[:32]))
    names = {Path(file.path).name for file in counts[1].files} - {
        Path(file.path).name for file in counts[0].files
    }
    assert names == {"uniref.idx", "uniref.idx.index", "uniref.idx.dbtype"}
    assert counts[0].digest != counts[1].digest
    registry = Registry(tmp_path / "r.json")
    registry.put(dataclasses.replace(counts[0], name="uniref"), replace=False)
    assert database_of("uniref,after=other,s=7.5", registry).options == MmseqsOptions(
        after="other", sensitivity=7.5
    )
    with pytest.raises(ConfigError, match="'what=1' of mmseqs2 is unknown"):
        database_of("uniref,what=1", registry)


@needs_mmseqs
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda path: path("_aln.dbtype").unlink(),
            r"uniref_aln.dbtype' does not exist: of a database of clusters",
        ),
        (lambda path: path("_seq.index").unlink(), r"uniref_seq.index' does not exist"),
        (
            lambda path: path("_aln.dbtype").write_bytes(bytes(4)),
            "its type is 0, not 5: it holds no alignments",
        ),
        (lambda path: path(".idx").write_bytes(b"cut"), "its index tells of .* it was cut; copy it again"),
    ],
)
def test_half_a_database_of_clusters_is_refused(tmp_path, indexed, change, said):
    for path in indexed.glob("uniref*"):
        if path.is_file():
            (tmp_path / path.name).symlink_to(path.resolve())

    def own(ending: str) -> Path:
        path = tmp_path / f"uniref{ending}"
        path.unlink()
        path.write_bytes(b"")
        return path

    change(own)
    with pytest.raises(DatabaseError, match=said):
        DatabaseSpec.parse(f"u={tmp_path}/uniref:mmseqs2").files()


@needs_mmseqs
def test_a_cut_table_is_refused_when_it_is_counted(tmp_path, folder):
    for path in folder.glob("uniref*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    data = next(
        path for path in sorted(tmp_path.glob("uniref_aln*")) if not path.suffix or path.suffix == ".0"
    )
    data.write_bytes(data.read_bytes()[:20])
    with pytest.raises(DatabaseError, match=r"uniref_aln.*it was cut"):
        make_manifest(DatabaseSpec.parse(f"u={tmp_path}/uniref:mmseqs2"))


@needs_mmseqs
def test_databases_of_clusters_and_fasta_files_are_staged(tmp_path, folder):
    registry = Registry(tmp_path / "r.json")
    specs = [staged_database(text, registry, tmp_path / "copies") for text in pair(folder)]
    assert [spec.options.after for spec in specs] == ["uniref", ""]
    for spec, text in zip(specs, pair(folder), strict=True):
        assert spec.tool == "mmseqs2"
        assert Path(spec.paths[0]).is_relative_to(tmp_path / "copies")
        assert make_manifest(spec).digest == make_manifest(DatabaseSpec.parse(text)).digest
    fasta = staged_database(f"u={folder}/u.fasta:mmseqs2,s=5", registry, tmp_path / "copies")
    assert (fasta.tool, fasta.options.sensitivity) == ("mmseqs2", 5)
    whole = DatabaseSpec.parse(pair(folder)[1])
    registry.put(make_manifest(whole), replace=False)
    known = staged_database("uniref,filter=0", registry, tmp_path / "others")
    assert (known.tool, known.options.filter, known.name) == ("mmseqs2", False, "uniref")
    with pytest.raises(StagingError, match="searches one database at a time"):
        staged_database(f"u={folder}/uniref,{folder}/env", registry, tmp_path / "copies")


@needs_mmseqs
def test_a_database_after_another_one_needs_that_one(tmp_path, folder):
    plain = tmp_path / "plain"
    subprocess.run(
        ["mmseqs", "createdb", str(folder / "u.fasta"), str(plain), "-v", "1"],
        check=True,
        capture_output=True,
    )
    fasta = f"f={folder}/u.fasta"
    for texts, kind, said in (
        (pair(folder)[:1], ConfigError, "after 'uniref', which is no database of this build"),
        ([*pair(folder), f"x={folder}/env:mmseqs2,after=env"], ConfigError, "'env', which is searched after"),
        ([fasta, f"x={folder}/env:mmseqs2,after=f"], ConfigError, "'f', which is searched by jackhmmer"),
        ([f"p={plain}:mmseqs2", f"x={folder}/env:mmseqs2,after=p"], DatabaseError, "no database of clusters"),
        ([*pair(folder)[1:], f"p={plain}:mmseqs2,after=uniref"], DatabaseError, "no database of clusters"),
    ):
        with pytest.raises(kind, match=said):
            prepare_databases(
                [DatabaseSpec.parse(text) for text in texts], max_hits={}, cpus=1, timeout_s=60, digests=None
            )
