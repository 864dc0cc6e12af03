"""`--engine fast` gives jackhmmer's own output: alignments and tables byte for byte."""

import dataclasses
import gzip
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyhmmer", reason="pip install 'foldfeed[fast]'")

from pipelines_data import GLOBINS, config_of, copy_databases, globins, needs_hmmer, tree_bytes, write_fasta
from scan_data import RESIDUES, drawn

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.pipelines import run_build
from foldfeed.pipelines.errors import (
    CancelledError,
    ConfigError,
    DatabaseChangedError,
    NothingCommittedError,
    SearchError,
    ToolNotFoundError,
    ToolTimeoutError,
    UnreadableDatabaseError,
)
from foldfeed.pipelines.fast_scan import choice as scan_choice
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan import memory as scan_memory
from foldfeed.pipelines.fast_scan import scan
from foldfeed.pipelines.fast_scan.database import open_database
from foldfeed.pipelines.programs.subprocess_runner import allow_all, cancel_all
from foldfeed.pipelines.tools import fast_jackhmmer
from foldfeed.pipelines.tools.fast_jackhmmer import FastJackhmmer, passing_extents
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer, run_jackhmmer

pytestmark = [
    pytest.mark.external_tool,
    needs_hmmer,
    pytest.mark.skipif(scan_kernels.library_path() is None, reason="no C compiler at installation"),
]

REAL = Path(os.environ.get("FOLDFEED_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
TIMEOUT_S = 250.0


def both(database: Path, *, cpus: int = 1) -> tuple[Jackhmmer, FastJackhmmer]:
    words = {"database": str(database), "cpus": cpus, "timeout_s": TIMEOUT_S}
    return Jackhmmer.find(**words), FastJackhmmer.find(**words)


def assert_same(database: Path, queries: dict[str, str], folder: Path) -> int:
    """Compares both engines on every query and returns the number of rows."""
    plain, fast = both(database)
    rows = 0
    for name, query in queries.items():
        expected, found = plain.search(query), fast.search(query)
        assert found.alignment == expected.alignment, name
        # White space in the table is HMMER's only with the same -Z, see scan.py.
        assert [line.split() for line in found.table.splitlines()] == [
            line.split() for line in expected.table.splitlines()
        ], name
        if found.table != expected.table:
            number = str(open_database(str(database)).num_records)
            same_z = run_jackhmmer(plain, query, folder=folder, extra_flags=("-Z", number))
            assert found.table == same_z.table, name
        rows += found.table.count(b"\n")
    return rows


@pytest.fixture(scope="module")
def odd_queries() -> dict[str, str]:
    random = np.random.default_rng(5)
    globin = next(iter(globins(1).values()))
    return {
        "X run": globin[:60] + "X" * 40 + globin[60:],
        "low complexity": "QQQQQQQPQPQPQQQQAQAQAQPPPPPQQQQ" * 4,
        "collagen": "GPPGAPGPK" * 30,
        "10 residues": globin[:10],
        "1 residue": "M",
        "one letter": "A" * 120,
        "costly letter": "W" * 60,
        "unusual letters": "BZJUOX" * 3 + globin,
        "long": drawn(random, 1500) + globin + drawn(random, 1500),
    }


@pytest.fixture(scope="module")
def odd_database(tmp_path_factory, odd_queries) -> Path:
    """Targets of 1 to 35,000 residues, repeats, one letter only, odd text; related ones among them."""
    random = np.random.default_rng(6)
    family = globins(45)
    targets = [(f"drawn{number}", drawn(random, number)) for number in (1, 2, 5, 6, 10, 20, 12_000, 35_000)]
    targets += [(f"related with words {name}", text) for name, text in family.items()]
    targets += [("a_name_of_more_than_twenty_letters_" + name, text[20:110]) for name, text in family.items()]
    targets += [("nothing", "")]
    for number, text in enumerate([*family.values(), *odd_queries.values()]):
        start, length = random.integers(0, max(1, len(text) - 30)), int(random.integers(4, 30))
        targets.append((f"rep{number}", drawn(random, 20).join([text[start : start + length]] * 40)))
        targets.append((f"in{number}", drawn(random, 300) + text + drawn(random, 500)))
    targets += [(f"only{letter}", letter * int(random.integers(30, 2000))) for letter in RESIDUES]
    targets += [(f"u{number}", drawn(random, int(random.integers(30, 900)))) for number in range(3000)]
    order = random.permutation(len(targets))
    lines = []
    for number in order:
        name, text = targets[number]
        # Lower case, stop signs, blank lines, old line ends: all of it HMMER reads.
        text = text.lower() if number % 3 == 0 else text
        text = text + "*" if number % 5 == 0 else text
        wide = [text[i : i + 70] for i in range(0, len(text), 70)]
        lines += [f">{name}", *wide, ""] if number % 7 else [f">{name}\r", *(line + "\r" for line in wide)]
    path = tmp_path_factory.mktemp("odd") / "odd.fasta"
    path.write_text("\n".join(lines), newline="")
    return path


def test_odd_queries_and_targets(odd_database, odd_queries, tmp_path):
    assert assert_same(odd_database, odd_queries | globins(3), tmp_path) > 300


def test_passing_targets_are_counted_as_hmmer_counts(odd_database, odd_queries, tmp_path):
    database = open_database(str(odd_database))
    for name, query in (odd_queries | globins(2)).items():
        for f1 in ("0.02", "0.0005"):
            write_fasta(tmp_path / "q.fasta", {"query": query})
            flags = ("--F1", f1, "--F2", "1e-9", "--F3", "1e-9", "--noali", "-N", "1", "--cpu", "1")
            words = [Jackhmmer.find(database="", cpus=1, timeout_s=1).binary, *flags]
            words += [str(tmp_path / "q.fasta"), str(odd_database)]
            said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            expected = int(re.search(r"Passed MSV filter:\s+(\d+)", said)[1])
            profile = scan.profile_of(query)
            exact, safe = (
                sum(
                    len(found.records)
                    for chunk in database.chunks()
                    for found in scan.survivors(
                        [profile], chunk, f1=float(f1), kernel=database.kernel, safety_bits=bits
                    )
                )
                for bits in (0.0, scan.SAFETY_BITS)
            )
            assert exact == expected, (name, f1)
            assert expected <= safe <= 1.1 * expected + 3, (name, f1)


@pytest.mark.skipif(not (REAL / "scop_benchmark").is_dir(), reason=f"no real sequences in {REAL}")
@pytest.mark.slow
def test_real_proteins(tmp_path):
    import lzma

    database = tmp_path / "targets.fasta"
    parts = [REAL / "scop_benchmark/scop_targets.fasta.xz", *sorted((REAL / "searchdb").glob("proteome*.xz"))]
    database.write_bytes(b"".join(lzma.decompress(part.read_bytes()) for part in parts))
    texts = gzip.decompress((REAL / "queries/mmseqs_500.fasta.gz").read_bytes()).decode()
    texts += (REAL / "scop_benchmark/scop_queries.fasta").read_text()
    queries = {}
    for entry in texts.split(">")[1:]:
        head, _, body = entry.partition("\n")
        queries[head.split()[0]] = "".join(body.split()).upper()
    chosen = {name: text for name, text in queries.items() if len(text) < 700}
    chosen = dict(list(chosen.items())[:10] + list(chosen.items())[-20:])
    assert assert_same(database, chosen, tmp_path) > 100


def test_nothing_passes(tmp_path):
    database = tmp_path / "t.fasta"
    database.write_text(">a\nAAAA\n>b\nGGGGGGGG\n")
    query = next(iter(globins(1).values()))
    (passing,) = passing_extents([scan.profile_of(query)], open_database(str(database)), threads=1)
    assert passing.shape == (0, 2)
    plain, fast = both(database)
    assert fast.search(query).alignment == plain.search(query).alignment
    assert fast.search(query).table == b""


def test_a_changed_database_is_read_again(tmp_path):
    database = tmp_path / "t.fasta"
    family = globins(3)
    query = next(iter(family.values()))
    write_fasta(database, dict(list(family.items())[:1]))
    fast = both(database)[1]
    assert fast.search(query).table.count(b"\n") == 1
    write_fasta(database, family)
    assert fast.search(query).table.count(b"\n") == 3


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (
            lambda path: path.write_text(">a\nAA1AA\n"),
            UnreadableDatabaseError,
            "no residue, which HMMER refuses too, at byte 5 (b'1')",
        ),
        (lambda path: path.write_text(">\nAAAA\n"), UnreadableDatabaseError, "a header without a name"),
        (lambda path: path.write_text(""), UnreadableDatabaseError, "the file is empty"),
        (lambda path: path.unlink(), DatabaseChangedError, "No such file"),
    ],
    ids=["residue", "name", "empty", "missing"],
)
def test_a_spoilt_database_ends_a_search_as_it_does_jackhmmers(tmp_path, spoil, kind, words):
    """One search fails with an error of the kind of jackhmmer's own; the next one reads the file anew."""
    database = write_fasta(tmp_path / "t.fasta", globins(2))
    query = next(iter(globins(1).values()))
    plain, fast = both(database)
    whole = database.read_bytes()
    assert fast.search(query).table.count(b"\n") == 2
    spoil(database)
    with pytest.raises(SearchError):
        plain.search(query)
    with pytest.raises(kind, match=re.escape(words)):
        fast.search(query)
    database.write_bytes(whole)
    assert fast.search(query).table.count(b"\n") == 2


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_a_database_that_changes_under_a_search_is_no_mixture(tmp_path, monkeypatch, resident, change):
    """Between the scan of a chunk and the copy of what passed, when texts of two files could meet."""
    monkeypatch.setattr(scan_memory, "RESIDENT_SHARE", 0.25 * resident)
    database = write_fasta(tmp_path / "t.fasta", globins(9))
    query = next(iter(globins(1).values()))
    fast = both(database)[1]
    survivors = scan.survivors

    def changed_meanwhile(*args, **words):
        found = survivors(*args, **words)
        if change == "cut":
            os.truncate(database, 50)
        else:
            os.replace(write_fasta(tmp_path / "new", globins(9)), database)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(scan, "survivors", changed_meanwhile)
        with pytest.raises(DatabaseChangedError, match="changed while it was searched"):
            fast.search(query)


def test_a_spoilt_database_makes_dead_letters_not_the_end_of_a_build(tmp_path):
    """A file that goes after the build looked at it: each query is answered for, whatever the engine."""
    good = copy_databases(tmp_path / "databases") / "uniref90.fasta"
    queries = write_fasta(tmp_path / "q.fasta", globins(2))
    for engine in ("binary", "fast"):
        bad = tmp_path / f"{engine}.fasta"
        # jackhmmer and the scan refuse this digit; a look at the head of the file does not find it.
        bad.write_text(good.read_text() + ">last\nAC7\n")
        config = config_of(
            tmp_path,
            queries,
            [f"uniref90={bad}"],
            store=str(tmp_path / engine),
            results=str(tmp_path / "results"),
            engine=engine,
        )
        with pytest.raises(NothingCommittedError, match=r"2 dead letters.*search in 'uniref90'"):
            run_build(config)
        failed = [json.loads(path.read_text()) for path in (tmp_path / "results").rglob("failed/*.json")]
        kinds = {one["kind"] for one in failed}
        assert {one["status"] for one in failed} == {"poison"}
        assert ("UnreadableDatabaseError" if engine == "fast" else "ToolFailedError") in kinds


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    words = {"database": "x", "cpus": 1, "timeout_s": 1.0}

    def missing():
        raise MissingExtraError("pyhmmer", "fast")

    with monkeypatch.context() as patch:
        patch.setattr(scan, "_pyhmmer", missing)
        with pytest.raises(MissingExtraError, match=r"foldfeed\[fast\]"):
            FastJackhmmer.find(**words)
    with monkeypatch.context() as patch:
        patch.setattr(fast_jackhmmer, "best_kernel", lambda: scan_kernels.kernels()[0])
        with pytest.raises(ToolNotFoundError, match="slower than jackhmmer"):
            FastJackhmmer.find(**words)
    scan_choice.best_kernel.cache_clear()
    scan_kernels.kernels.cache_clear()
    scan_kernels._library.cache_clear()
    monkeypatch.setattr(scan_kernels, "library_path", lambda: None)
    with pytest.raises(ToolNotFoundError, match="compiler"):
        FastJackhmmer.find(**words)


def test_a_build_with_the_fast_engine_makes_the_same_store(tmp_path):
    folder = copy_databases(tmp_path / "databases")
    database = folder / "uniref90.fasta"
    queries = write_fasta(tmp_path / "q.fasta", globins(4))
    said: dict[str, list[str]] = {"binary": [], "fast": []}
    stores = {}
    for engine, lines in said.items():
        options = {"store": str(tmp_path / engine), "results": str(tmp_path / "results"), "engine": engine}
        config = config_of(tmp_path, queries, [f"uniref90={database}"], **options)
        report = run_build(config, say=lines.append)
        # Results of one engine are not taken for the other's.
        assert (report.num_records, report.num_searched, report.num_reused) == (4, 4, 0)
        assert run_build(config).num_searched == 0
        stores[engine] = tree_bytes(tmp_path / engine / "parts")
    assert stores["binary"] == stores["fast"]
    assert not any("fast scan" in line for line in said["binary"])
    assert any("uniref90: jackhmmer" in line and "fast scan" in line for line in said["fast"])
    receipts = [path.read_text() for path in (tmp_path / "results").rglob("units/*/*.json")]
    assert len(receipts) == 8
    assert sum("{scan 1:database}" in text for text in receipts) == 4
    assert (
        sorted(json.loads(text)["search"]["scan"] for text in receipts)
        == [""] * 4 + [scan_choice.best_kernel().name] * 4
    )


def test_a_database_without_room_in_memory_is_searched_all_the_same_and_said(tmp_path, monkeypatch):
    database = write_fasta(tmp_path / "t.fasta", globins(9))
    query = next(iter(globins(1).values()))
    plain, fast = both(database)
    assert "memory" not in fast.describe_scan()
    monkeypatch.setattr(scan_memory, "RESIDENT_SHARE", 0.0)
    assert re.search(r"its [\d.e-]+ GB do not stay in memory here \(0 GB of", fast.describe_scan())
    found = fast.search(query)
    assert found.alignment == plain.search(query).alignment
    assert open_database(str(database))._passes.num_kept == 0


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="auto, binary, fast"):
        config_of(tmp_path, tmp_path / "q.fasta", ["a=b"], engine="quick")


def test_a_scan_ends_at_the_time_limit_and_when_the_run_is_stopped(tmp_path):
    sequence = next(iter(globins(1).values()))
    late = FastJackhmmer.find(database=str(GLOBINS), cpus=1, timeout_s=1e-9)
    with pytest.raises(ToolTimeoutError, match="jackhmmer did not end within 1e-09 s"):
        late.search(sequence)
    tool = dataclasses.replace(late, timeout_s=60.0)
    cancel_all("of a test")
    try:
        with pytest.raises(CancelledError, match="the fast scan was stopped: of a test"):
            tool.search(sequence)
    finally:
        allow_all()
    assert b"# STOCKHOLM" in tool.search(sequence).alignment
