"""A database of several files: sharded equals unsharded, byte for byte, and nothing is searched twice."""

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines_data import GLOBINS, config_of, globins, needs_hmmer, write_fasta

from foldfeed.feature_store import FeatureStore
from foldfeed.pipelines import DatabaseSpec, run_build
from foldfeed.pipelines.building.tools import find_sharded, find_tool
from foldfeed.pipelines.errors import ConfigError, ToolOutputError
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan.names import copy_named
from foldfeed.pipelines.searches.hits import read_hits
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.tools import jackhmmer_scanner, sharded_jackhmmer
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer, run_jackhmmer
from foldfeed.pipelines.tools.jackhmmer_scanner import num_targets_of
from foldfeed.pipelines.tools.search_tool import Shard
from foldfeed.pipelines.tools.sharded_jackhmmer import ShardedJackhmmer

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
TIMEOUT_S = 250.0


def has_fast_scan() -> bool:
    try:
        import pyhmmer  # noqa: F401
    except ImportError:
        return False
    return scan_kernels.library_path() is not None


no_fast_scan = pytest.mark.skipif(not has_fast_scan(), reason="pip install 'foldfeed[fast]'")
ENGINES = ["binary", pytest.param("fast", marks=no_fast_scan)]


def split(folder: Path, entries: list[str], number: int) -> list[Path]:
    """Writes consecutive runs of entries, of uneven size, some empty ones left out."""
    folder.mkdir()
    edges = [round(len(entries) * (at / number) ** 1.3) for at in range(number + 1)]
    paths = []
    for start, stop in itertools.pairwise(edges):
        if start < stop:
            path = folder / f"shard-{len(paths):03}"
            path.write_text("".join(entries[start:stop]))
            paths.append(path)
    return paths


def sharded(paths: list[Path], engine: str = "binary") -> ShardedJackhmmer:
    shards = tuple(Shard(path=str(path), digest=path.name) for path in paths)
    return find_sharded(shards, cpus=1, timeout_s=TIMEOUT_S, engine=engine)


def assert_equal_to_whole(entries: list[str], query: str, number: int, engine: str, folder: Path) -> int:
    """Compares with jackhmmer on all entries in one file; returns the rows."""
    whole = folder / "whole.fasta"
    whole.write_text("".join(entries))
    plain = Jackhmmer.find(database=str(whole), cpus=1, timeout_s=TIMEOUT_S)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    expected = plain.search(query)
    found = sharded(split(folder / f"{engine}-{number}", entries, number), engine).search(query)
    assert found.alignment == expected.alignment
    # White space of the table is HMMER's only with the same -Z, see scan.py.
    same_z = run_jackhmmer(plain, query, folder=work, extra_flags=("-Z", str(len(entries))))
    assert same_z.alignment == expected.alignment
    assert found.table == same_z.table
    return found.table.count(b"\n")


@pytest.fixture(scope="module")
def two_domains() -> tuple[str, list[str]]:
    """A domain, and targets with one clear and one doubtful copy of it among unrelated ones.

    Whether the doubtful copy enters the alignment depends on how many targets are reported in all (domZ).
    """
    random = np.random.default_rng(3)

    def drawn(length: int) -> str:
        return "".join(random.choice(list(RESIDUES), length))

    def mutated(text: str, share: float) -> str:
        return "".join(drawn(1) if random.random() < share else letter for letter in text)

    domain = drawn(150)
    entries = []
    for number in range(400):
        body = drawn(300)
        if number % 2:
            doubtful = mutated(domain, random.uniform(0.6, 0.95))
            body = drawn(20) + mutated(domain, 0.3) + drawn(40) + doubtful + drawn(20)
        entries.append(f">t{number:04} of a test\n{body}\n")
    return domain, entries


@pytest.mark.external_tool
@needs_hmmer
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [1, 4, 7, 16, 64])
def test_domains_that_depend_on_all_reported_targets(tmp_path, two_domains, number, engine):
    domain, entries = two_domains
    rows = assert_equal_to_whole(entries, domain, number, engine, tmp_path)
    assert rows == 200
    if number == 16 and engine == "binary":
        # The input does provoke it: shards that are searched with the right Z alone give other rows.
        plain = Jackhmmer.find(database=str(tmp_path / "whole.fasta"), cpus=1, timeout_s=TIMEOUT_S)
        flags = ("-Z", str(len(entries)))
        apart = [
            run_jackhmmer(plain, domain, folder=tmp_path, database=str(path), extra_flags=flags)
            for path in sorted((tmp_path / "binary-16").iterdir())
        ]
        included = sum(int(line.split()[17]) for one in apart for line in one.table.splitlines())
        together = run_jackhmmer(plain, domain, folder=tmp_path, extra_flags=flags)
        assert included > sum(int(line.split()[17]) for line in together.table.splitlines())


@pytest.mark.external_tool
@needs_hmmer
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [4, 7, 45])
def test_real_proteins_and_odd_entries(tmp_path, number, engine):
    entries = [f">{entry}" for entry in GLOBINS.read_text().split(">")[1:]]
    # Equal names, an entry twice, one without residues, lower case, blanks, no line feed at a file's end.
    entries[7] = entries[3]
    entries[20] = re.sub(r"^>\S+", ">same", entries[20])
    entries[40] = re.sub(r"^>\S+", ">same", entries[40])
    entries[12] = ">nothing in it\n"
    entries[30] = entries[30].lower().replace("\n", " \n")
    entries[-1] = entries[-1].rstrip("\n")
    queries = list(globins(2).values())
    for at, query in enumerate([*queries, "W" * 70, queries[0][:12]]):
        folder = tmp_path / str(at)
        folder.mkdir()
        rows = assert_equal_to_whole(entries, query, number, engine, folder)
        assert (rows > 30) == (at < 2)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([">", "a", "b", "ab", " ", "\n", "\r", "\t", "AC", "\n>", "\x01", "#"]), max_size=40
    ),
    st.sets(st.sampled_from(["a", "b", "ab", "AC", "aAC", "#a"])),
    st.sampled_from([1, 2, 7, 1000]),
    st.booleans(),
)
def test_records_are_copied_by_name(tmp_path_factory, pieces, names, block_bytes, compiled):
    """As HMMER divides a file: a header ends with its line, and behind it any '>' begins a record."""
    text = "".join(pieces)
    path = tmp_path_factory.mktemp("copy") / "x.fasta"
    path.write_bytes((text or "\n").encode())
    out = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(scan_kernels, "library_path", lambda: None)
        patch.setattr(scan_kernels, "_FOUND_AT_ONCE", 2)
        found = copy_named(str(path), {name.encode() for name in names}, out, block_bytes=block_bytes)
    expected, seen = [], set()
    for header, body in re.findall(r">([^\n\r]*)([^>]*)", text):
        name = (header.split() or [""])[0]
        if name in names:
            seen.add(name)
            expected.append(f">{header}{body}")
    whole = "".join(one if one.endswith(("\n", "\r")) else one + "\n" for one in expected)
    assert out.getvalue().decode() == whole
    assert {name.decode() for name in found} == seen


def odd_files() -> dict[str, Callable[[str], str]]:
    """What may stand in a shard, and what jackhmmer makes of it is right."""
    return {
        "carriage returns alone": lambda text: text.replace("\n", "\r"),
        "both line ends": lambda text: text.replace("\n", "\r\n"),
        "a blank before '>'": lambda text: "\n \n" + text.replace("\n>", "\n >"),
        "a record in mid-line": lambda text: text.replace("\n>", " >"),
        "blanks before the name": lambda text: text.replace(">", ">  "),
        "names that look like comments": lambda text: text.replace(">", ">#"),
    }


@pytest.mark.external_tool
@needs_hmmer
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", odd_files())
def test_files_that_are_written_oddly(tmp_path, what, engine):
    entries = [f">{entry}" for entry in GLOBINS.read_text().split(">")[1:]]
    texts = ["".join(entries[:20]), odd_files()[what]("".join(entries[20:]))]
    paths = [tmp_path / "first", tmp_path / "second"]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    whole = tmp_path / "whole"
    whole.write_bytes(b"".join(path.read_bytes() for path in paths))
    plain = Jackhmmer.find(database=str(whole), cpus=1, timeout_s=TIMEOUT_S)
    # Neither our parser nor any other can tell such a row of a Stockholm file from a comment.
    readable = 20 if what == "names that look like comments" else 40
    for query, rows in ((next(iter(globins(1).values())), readable), ("W" * 50, 0)):
        # Turned, the odd file is the first, which a query without candidates meets.
        for order in (paths, paths[::-1]):
            found = sharded(order, engine).search(query)
            assert len(read_hits(found, query).hit_ids) - 1 >= rows
        expected = run_jackhmmer(plain, query, folder=tmp_path, extra_flags=("-Z", str(len(entries))))
        found = sharded(paths, engine).search(query)
        assert found.alignment == expected.alignment
        assert found.table == expected.table


@pytest.mark.external_tool
@needs_hmmer
def test_a_shard_that_changes_while_it_is_searched_gives_no_candidates(tmp_path, shards, monkeypatch):
    tool = sharded(shards)
    run = jackhmmer_scanner.run_program

    def replaced_afterwards(argv, **words):
        done = run(argv, **words)
        shards[0].write_text(">other\nACDEFGHIKL\n")
        return done

    monkeypatch.setattr(jackhmmer_scanner, "run_program", replaced_afterwards)
    with pytest.raises(ToolOutputError, match=r"which .*shard-000 does not hold: the file changed"):
        tool.scan(next(iter(globins(1).values())), 0)


@pytest.mark.external_tool
@needs_hmmer
@pytest.mark.parametrize("engine", ENGINES)
def test_candidates_have_names_of_their_own(tmp_path, shards, monkeypatch, engine):
    """A file may be a database alone and a shard of another; and a new rule makes candidates anew."""
    one = find_tool(DatabaseSpec.parse(f"u={shards[0]}"), cpus=1, timeout_s=9.0, engine=engine)
    several = sharded(shards, engine)
    before = {one.identity.digest, several.identity.digest, several.scan_identity.digest}
    assert len(before) == 3
    monkeypatch.setattr(sharded_jackhmmer, "JOIN_VERSION", 2)
    after = sharded(shards, engine)
    assert not before & {after.identity.digest, after.scan_identity.digest}


def test_a_report_without_a_count_is_refused(tmp_path):
    report = tmp_path / "report"
    report.write_text("Target sequences:                         45  (6519 residues searched)\n")
    assert num_targets_of(report) == 45
    report.write_text("Target sequence:                           1  (19 residues searched)\n")
    assert num_targets_of(report) == 1
    report.write_text("stopped\n")
    with pytest.raises(ToolOutputError, match="how many target sequences"):
        num_targets_of(report)


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    entries = [f">{entry}" for entry in GLOBINS.read_text().split(">")[1:]]
    return split(tmp_path / "db", entries, 3)


def names_of(paths: list[Path]) -> str:
    return "uniref90=" + ",".join(map(str, paths))


def rows_of(store: FeatureStore) -> dict[str, tuple]:
    """Everything of a record but which files its database lies in."""
    found = {}
    for name in store:
        record = store[name]
        crop = record.crop(slice(None), slice(None))
        rows = json.dumps(record.rows().to_pylist(), default=str)
        found[name] = (record.sequence, crop.msa.tobytes(), crop.deletions.tobytes(), rows)
    return found


def units(results: str) -> set[str]:
    return {path.stem for path in Path(results).glob("units/*/*.json")}


@pytest.mark.external_tool
@needs_hmmer
@pytest.mark.parametrize("engine", ENGINES)
def test_a_build_gives_the_records_of_one_file_and_searches_only_what_is_new(tmp_path, shards, engine):
    queries = write_fasta(tmp_path / "q.fasta", globins(3))
    whole = tmp_path / "whole.fasta"
    whole.write_bytes(b"".join(path.read_bytes() for path in shards))
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    run_build(config_of(tmp_path / "one", queries, [f"uniref90={whole}"], engine=engine))
    expected = rows_of(FeatureStore.open(str(tmp_path / "one" / "store")))

    said: list[str] = []
    first = config_of(tmp_path / "many", queries, [names_of(shards[:2])], engine=engine)
    run_build(first, say=said.append)
    assert any("in 2 shards" in line for line in said)
    before = units(first.results_url)
    # Three queries: two shards and the whole of each.
    assert len(before) == 9
    config = config_of(tmp_path / "many", queries, [names_of(shards)], engine=engine, on_existing="replace")
    report = run_build(config)
    # The third shard and the whole of each.
    assert len(units(config.results_url) - before) == 6
    assert (report.num_searched, report.num_reused, report.num_failed) == (3, 0, 0)
    store = FeatureStore.open(config.store)
    assert rows_of(store) == expected
    (use,) = store[next(iter(store))].databases
    assert (use["name"], use["tool"]) == ("uniref90", "jackhmmer")
    # What the search cost is what its parts cost, those of the first build among them.
    (cost,) = report.costs
    receipts = [ResultStore(config.results_url).receipt(name) for name in units(config.results_url)]
    parts = sum(one.usage.cpu_s for one in receipts if "shard" in one.facts.database)
    assert cost.cpu_s > parts > 0
    again = run_build(config)
    assert (again.started_engine, again.num_searched, again.num_reused) == (False, 0, 3)


@pytest.mark.external_tool
@needs_hmmer
def test_damaged_and_missing_candidates_are_searched_again(tmp_path, shards):
    queries = write_fasta(tmp_path / "q.fasta", globins(1))
    config = config_of(tmp_path, queries, [names_of(shards)])
    run_build(config)
    expected = rows_of(FeatureStore.open(config.store))
    results = ResultStore(config.results_url)
    found = {results.receipt(name).facts.database: name for name in units(config.results_url)}
    assert len(found) == 4
    folder = Path(config.results_url) / "units"
    (folder / found["uniref90"][:2] / f"{found['uniref90']}.json").unlink()
    damaged = found["uniref90, shard 1 of 3"]
    (folder / damaged[:2] / f"{damaged}.zst").write_bytes(b"damaged")
    gone = found["uniref90, shard 3 of 3"]
    (folder / gone[:2] / f"{gone}.json").unlink()
    other = dataclasses.replace(config, store=str(tmp_path / "other"), results=config.results_url)
    report = run_build(other)
    assert (report.num_searched, report.num_failed) == (1, 0)
    assert rows_of(FeatureStore.open(other.store)) == expected
    assert all(results.holds(name) for name in found.values())


@pytest.mark.external_tool
@needs_hmmer
@pytest.mark.parametrize("engine", ENGINES)
def test_a_shard_that_cannot_be_searched_fails_its_records_and_names_itself(tmp_path, shards, engine):
    queries = write_fasta(tmp_path / "q.fasta", globins(2))
    text = shards[1].read_text()
    shards[1].write_text(text + ">broken\nAC7\n")
    small = write_fasta(tmp_path / "small.fasta", globins(4))
    config = config_of(tmp_path, queries, [names_of(shards), f"mgnify={small}"], engine=engine)
    with pytest.raises(Exception, match="no record could be built") as caught:
        run_build(config)
    assert "uniref90" in str(caught.value)
    # Mended: the file is another one now, the candidates of the others are still there.
    before = units(config.results_url)
    shards[1].write_text(text)
    report = run_build(config)
    assert (report.num_records, report.num_failed) == (2, 0)
    assert len(units(config.results_url) - before) == 4


@pytest.mark.external_tool
@needs_hmmer
def test_one_database_with_two_names_is_refused(tmp_path, shards):
    queries = write_fasta(tmp_path / "q.fasta", globins(1))
    for text in (",".join(map(str, shards)), str(shards[0])):
        config = config_of(tmp_path, queries, [f"uniref90={text}", f"mgnify={text}"])
        with pytest.raises(ConfigError, match="'uniref90' and 'mgnify' are the same files; leave one out"):
            run_build(config)
