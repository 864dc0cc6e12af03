"""Engines that find jackhmmer's candidates in their own ways: all give stock jackhmmer's bytes."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyhmmer", reason="pip install 'foldfeed[fast]'")

from pipelines_data import (
    GLOBINS,
    config_of,
    globins,
    needs_hmmer,
    stand_in,
    tree_bytes,
    write_fasta,
)
from pyhmmer import easel, plan7
from scan_data import ALPHABET, digital, drawn

from foldfeed.pipelines import DatabaseSpec, run_build
from foldfeed.pipelines.building.tools import find_sharded, find_tool
from foldfeed.pipelines.errors import (
    CancelledError,
    DatabaseChangedError,
    NothingCommittedError,
    ToolFailedError,
    ToolNotFoundError,
    ToolOutputError,
    ToolTimeoutError,
    UnreadableDatabaseError,
)
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan.database import ScanDatabase
from foldfeed.pipelines.programs.subprocess_runner import allow_all, cancel_all
from foldfeed.pipelines.searches import search
from foldfeed.pipelines.tools import hmmpgmd, hmmpgmd_scanner, pyhmmer_scanner
from foldfeed.pipelines.tools.hmmpgmd import DaemonProgram, read_hits
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer, run_jackhmmer
from foldfeed.pipelines.tools.search_tool import SearchResult, Shard
from foldfeed.pipelines.tools.sharded_jackhmmer import ShardedJackhmmer

pytestmark = [
    pytest.mark.external_tool,
    needs_hmmer,
    pytest.mark.skipif(scan_kernels.library_path() is None, reason="no C compiler at installation"),
]


def no_daemon() -> str:
    try:
        DaemonProgram.find()
    except ToolNotFoundError as error:
        return str(error)
    return ""


NO_DAEMON = no_daemon()
needs_daemon = pytest.mark.skipif(bool(NO_DAEMON), reason=NO_DAEMON or "it is there")
ENGINES = ["pyhmmer", pytest.param("hmmpgmd", marks=needs_daemon)]
TIMEOUT_S = 120.0


def sharded(
    paths: list[Path], engine: str, *, cpus: int = 1, timeout_s: float = TIMEOUT_S
) -> ShardedJackhmmer:
    shards = tuple(Shard(path=str(path), digest=path.name) for path in paths)
    return find_sharded(shards, cpus=cpus, timeout_s=timeout_s, engine=engine)


@pytest.fixture(scope="module")
def queries() -> dict[str, str]:
    globin = next(iter(globins(1).values()))
    random = np.random.default_rng(3)
    return {
        "a domain that some have twice": drawn(random, 150),
        "globin": globin,
        "X run": globin[:60] + "X" * 40 + globin[60:],
        "unusual letters": "BZJUOX" * 3 + globin,
        "low complexity": "QQQQQQQPQPQPQQQQAQAQAQPPPPPQQQQ" * 4,
        "10 residues": globin[:10],
        "one letter": "A" * 120,
        "1 residue": "M",
        "nothing found": drawn(random, 90),
    }


@pytest.fixture(scope="module")
def entries(queries) -> list[str]:
    """Targets of 1 to 20,000 residues, none, equal names, lower case, doubtful second domains, repeats."""
    random = np.random.default_rng(4)
    domain = queries["a domain that some have twice"]

    def mutated(share: float) -> str:
        return "".join(drawn(random, 1) if random.random() < share else letter for letter in domain)

    targets = [(f"drawn{number}", drawn(random, number)) for number in (1, 5, 5, 6, 20, 20_000)]
    targets += [(f"globin {name}", text) for name, text in globins(45).items()]
    targets += [("nothing", ""), ("same", drawn(random, 300)), ("same", next(iter(globins(1).values())))]
    for number in range(60):
        # Whether the second copy enters the alignment depends on how many targets are reported in all.
        doubtful = mutated(random.uniform(0.6, 0.95))
        text = drawn(random, 20) + mutated(0.3) + drawn(random, 40) + doubtful + drawn(random, 20)
        targets += [(f"two{number}", text), (f"u{number}", drawn(random, int(random.integers(30, 400))))]
    targets += [(f"only{letter}", letter * 200) for letter in "AQW"]
    targets += [("repeats", drawn(random, 9).join([queries["globin"][20:40]] * 30))]
    order = random.permutation(len(targets))
    texts = [targets[number] for number in order]
    return [f">{name}\n{text.lower() if at % 3 == 0 else text}\n" for at, (name, text) in enumerate(texts)]


@pytest.fixture(scope="module")
def expected(queries, entries, tmp_path_factory) -> dict[str, SearchResult]:
    """Stock jackhmmer in one file; ``-Z`` as it counts itself, which decides white space of the table."""
    folder = tmp_path_factory.mktemp("whole")
    whole = folder / "whole.fasta"
    whole.write_text("".join(entries))
    plain = Jackhmmer.find(database=str(whole), cpus=1, timeout_s=TIMEOUT_S)
    flags = ("-Z", str(len(entries)))
    found = {}
    for name, query in queries.items():
        found[name] = run_jackhmmer(plain, query, folder=folder, extra_flags=flags)
        assert found[name].alignment == plain.search(query).alignment, name
    return found


def split(folder: Path, entries: list[str], number: int) -> list[Path]:
    edges = [round(len(entries) * (at / number) ** 1.3) for at in range(number + 1)]
    paths = []
    for at, (start, stop) in enumerate(itertools.pairwise(edges)):
        paths.append(folder / f"shard{at}")
        paths[-1].write_text("".join(entries[start:stop]))
    return paths


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("number", "cpus"), [(1, 1), (4, 2), (7, 1)])
def test_rows_are_jackhmmers(tmp_path, monkeypatch, queries, entries, expected, number, cpus, engine):
    # Several blocks to a file.
    monkeypatch.setattr(pyhmmer_scanner, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(hmmpgmd_scanner, "BLOCK_BYTES", 20_000)
    tool = sharded(split(tmp_path, entries, number), engine, cpus=cpus)
    scans = [list(tool.scan_many(list(queries.values()), at)) for at in range(number)]
    for at, (name, query) in enumerate(queries.items()):
        found = tool.join(query, [scan[at] for scan in scans])
        assert found.alignment == expected[name].alignment, name
        assert found.table == expected[name].table, name
        assert found.usage.cpu_s > 0
    rows = [one.table.count(b"\n") for one in expected.values()]
    assert rows[0] == 60
    assert rows[1] > 40
    assert rows[-1] == 0
    # And it is a filter: of most queries hardly anything is left for jackhmmer.
    assert sum(scan[-1].alignment.count(b">") for scan in scans) < 5


def test_scores_are_the_binarys_far_within_the_margin(tmp_path, queries, entries):
    """The margin is one bit; what both print of hundreds of targets is equal to the last digit."""
    whole = tmp_path / "whole.fasta"
    whole.write_text("".join(entry for entry in dict.fromkeys(entries) if not entry.startswith(">same")))
    plain = Jackhmmer.find(database=str(whole), cpus=1, timeout_s=TIMEOUT_S)
    limits = {"F1": 0.9, "F2": 0.9, "F3": 0.9, "E": 1e6}
    flags = [word for name, value in limits.items() for word in (f"-{'-' * (name != 'E')}{name}", str(value))]
    with easel.SequenceFile(str(whole), digital=True, alphabet=ALPHABET) as file:
        targets = file.read_block()
    compared = 0
    for query in list(queries.values())[:3]:
        write_fasta(tmp_path / "q", {"query": query})
        table = tmp_path / "table"
        words = [plain.binary, "-N", "1", "--cpu", "1", "-o", os.devnull, "--tblout", str(table), *flags]
        assert os.spawnv(os.P_WAIT, plain.binary, [*words, str(tmp_path / "q"), str(whole)]) == 0
        said = {}
        for line in table.read_text().splitlines():
            if not line.startswith("#"):
                name, _, _, _, e_value, score, *_ = line.split()
                said[name] = (float(e_value), float(score))
        pipeline = plan7.Pipeline(ALPHABET, **limits)
        profile = plan7.Builder(ALPHABET, seed=42).build(digital(query), pipeline.background)[2]
        hits = {hit.name: (hit.evalue, hit.score) for hit in pipeline.search_hmm(profile, targets)}
        assert hits.keys() == said.keys()
        for name, (e_value, score) in hits.items():
            assert abs(score - said[name][1]) <= 0.051, name
            assert e_value == pytest.approx(said[name][0], rel=0.06), name
        compared += len(hits)
    assert compared > 120


def test_identities_of_stored_results_stay():
    """Results of earlier versions are found by these; other ones would search everything anew."""
    of = {}
    for engine in ("binary", "fast"):
        for paths in (f"{GLOBINS}", f"{GLOBINS},{GLOBINS}x"):
            spec = DatabaseSpec.parse(f"u={paths}")
            shard = Shard(path=str(GLOBINS), digest="")
            one = find_tool(
                dataclasses.replace(spec, paths=spec.paths[:1]), cpus=1, timeout_s=9.0, engine=engine
            )
            several = find_sharded((shard, shard), cpus=1, timeout_s=9.0, engine=engine)
            identities = (one.identity, several.identity, several.scan_identity)
        of[engine] = [
            dataclasses.replace(one, version="3.3.2", binary_sha256="0" * 64).digest[:16]
            for one in identities
        ]
    assert of == {
        "binary": ["1b0d572eb1312b6d", "b405312a5e420209", "2922d8b6bdc48914"],
        "fast": ["b7d7740d7b028495", "2a49316accf53d68", "a2a95b3ecb4984b3"],
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_a_build_makes_the_same_store_and_says_what_scanned(tmp_path, engine):
    """In one file: it is taken as a database of one shard."""
    queries = write_fasta(tmp_path / "q.fasta", globins(3))
    stores = {}
    for one in ("binary", engine):
        options = {"store": str(tmp_path / one), "results": str(tmp_path / f"{one}.results"), "engine": one}
        config = config_of(tmp_path, queries, [f"uniref90={GLOBINS}"], **options)
        said: list[str] = []
        report = run_build(config, say=said.append)
        assert (report.num_records, report.num_searched, report.num_reused) == (3, 3, 0)
        stores[one] = tree_bytes(tmp_path / one / "parts")
    assert stores["binary"] == stores[engine]
    assert any("uniref90: jackhmmer" in line and f"({engine} " in line for line in said)
    assert not any("shards" in line for line in said)
    again = run_build(config)
    assert (again.started_engine, again.num_searched) == (False, 0)
    texts = [path.read_text() for path in (tmp_path / f"{engine}.results").rglob("units/*/*.json")]
    receipts = [json.loads(text) for text in texts]
    scans = sorted(one["search"]["scan"].partition(" ")[0] for one in receipts)
    assert scans == ["", "", "", engine, engine, engine]
    assert sum(f"candidates 1:{engine} 1:database}}" in text for text in texts) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_spoilt_database_and_the_end_of_time_are_errors_of_a_search(tmp_path, engine, monkeypatch):
    query = next(iter(globins(1).values()))
    path = write_fasta(tmp_path / "t.fasta", globins(3))
    tool = sharded([path], engine)
    assert tool.scan(query, 0).alignment.count(b">") == 3
    with pytest.raises(ToolTimeoutError, match="2e-09 s"):
        list(sharded([path], engine, timeout_s=1e-9).scan_many([query, query], 0))
    cancel_all("of a test")
    try:
        with pytest.raises(CancelledError, match="of a test"):
            tool.scan(query, 0)
    finally:
        allow_all()
    whole = path.read_bytes()
    copy = ScanDatabase.copy_extents

    def changed_meanwhile(self, *args):
        path.write_bytes(whole[:-9])
        return copy(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ScanDatabase, "copy_extents", changed_meanwhile)
        with pytest.raises(DatabaseChangedError, match="changed while it was searched"):
            tool.scan(query, 0)
    path.write_text(">a\nAA1AA\n")
    with pytest.raises(UnreadableDatabaseError, match=r"at byte 5"):
        tool.scan(query, 0)
    # HMMER refuses such a target with an error; it must be given the chance.
    path.write_text(f">long\n{'ACDEFGHIKL' * 10_001}\n>a\n{query}\n")
    found = tool.scan(query, 0)
    assert (found.alignment.count(b">"), found.table) == (2, b"2\n")
    with pytest.raises(ToolFailedError):
        tool.join(query, [found])


def daemons() -> list[int]:
    """Processes of a daemon that this process started and that live."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            parent = int(Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0].endswith(b"hmmpgmd") and parent == os.getpid():
            found.append(int(name))
    return found


@needs_daemon
@pytest.mark.parametrize("which", ["--master", "--worker"])
def test_a_daemon_that_dies_fails_its_searches_and_leaves_nothing(tmp_path, which):
    """Killed in the middle of many searches, from outside, as the kernel does for want of memory."""
    tool = sharded([GLOBINS], "hmmpgmd")
    killed = []

    def kill() -> None:
        while not killed:
            for pid in daemons():
                # It may have ended since it was listed.
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if which.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() and len(daemons()) == 2:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises((ToolFailedError, ToolOutputError), match="hmmpgmd"):
            list(tool.scan_many(list(globins(1).values()) * 2000, 0))
    finally:
        killed.append(0)
        killer.join()
    assert killed[0]
    assert not daemons()


@pytest.mark.parametrize("bad", [1, 2, 7])
def test_a_query_that_breaks_a_batch_costs_no_other(tmp_path, monkeypatch, bad):
    """One breaks whatever scans it, by a signal; where all break it, only the first ones are tried again."""
    names = globins(7)
    wrong = set(list(names.values())[:bad])
    scanned: list[int] = []
    candidates = pyhmmer_scanner.PyhmmerScanner.candidates

    def breaks(self, sequences, path):
        scanned.append(len(sequences))
        if wrong & set(sequences):
            raise ToolFailedError("a scan", -signal.SIGSEGV, "")
        return candidates(self, sequences, path)

    monkeypatch.setattr(pyhmmer_scanner.PyhmmerScanner, "candidates", breaks)
    queries = write_fasta(tmp_path / "q.fasta", names)
    config = config_of(tmp_path, queries, [f"uniref90={GLOBINS}"], engine="pyhmmer", workers=1)
    if bad == len(names):
        with pytest.raises(NothingCommittedError):
            run_build(config)
        # The batch, then each of three twice, as after any signal.
        assert scanned == [7] + [1] * 2 * search.LONE_FAILURES
        return
    report = run_build(config)
    assert report.num_records == len(names) - bad
    assert sorted(scanned) == [1] * (len(names) + bad) + [7]
    left = [letter for letter in report.dead_letters if letter.kind == "ToolFailedError"]
    assert sorted(letter.record_id for letter in left) == sorted(
        name for name, sequence in names.items() if sequence in wrong
    )


@needs_daemon
def test_a_port_that_somebody_took_is_not_spoken_to(tmp_path, monkeypatch):
    """The daemon that listens on it may be another's, with other sequences."""
    other = write_fasta(tmp_path / "other.fasta", {"w": "W" * 50})
    copy = tmp_path / "copy"
    hmmpgmd_scanner.write_daemon_database(ScanDatabase(str(other), scan_kernels.kernels()[0]), copy)
    free_ports, given = hmmpgmd.free_ports, []

    def taken_first(number: int) -> list[int]:
        given.append(given[0] if len(given) == 1 else free_ports(number))
        return given[-1]

    monkeypatch.setattr(hmmpgmd, "free_ports", taken_first)
    words = {"folder": tmp_path, "cpus": 1, "check": lambda: None}
    with hmmpgmd.daemon(DaemonProgram.find(), copy, **words):
        (found,) = sharded([GLOBINS], "hmmpgmd").scan_many(list(globins(1).values()), 0)
    assert found.table == b"45\n"
    assert found.alignment.count(b">") > 40
    assert given[0] == given[1]
    assert len(given) == 3


def test_daemons_that_cannot_be_talked_to_are_refused_by_name(tmp_path, monkeypatch):
    old = stand_in(tmp_path / "bin", "", name="hmmpgmd")
    (old / "hmmpgmd").write_text("#!/bin/sh\necho '# HMMER 3.3.2 (Nov 2020)'\n")
    monkeypatch.setenv("PATH", str(old))
    monkeypatch.setattr("foldfeed.pipelines.tools.search_tool._packaged", lambda name: None)
    with pytest.raises(ToolNotFoundError, match=r"hmmpgmd is 3\.3\.2; before 3\.4 .*use '--engine pyhmmer'"):
        DaemonProgram.find()


@pytest.mark.parametrize("change", ["cut", "count", "number", "name"])
def test_answers_that_are_no_answers_are_refused(change):
    names = [b"000000001", b"000000003"]
    hits = [
        struct.pack(">2Id3f3df9i2qB", 119, 0, *[0.0] * 7, 0.0, *[0] * 11, 0) + name + b"\0" for name in names
    ]
    counts = [1, 3, 0, 0, 0, 0, 2, 2, 2]
    starts = struct.pack(">2Q", 0, len(hits[0]))
    answer = struct.pack(">5d2B9Q", *[0.0] * 5, 0, 0, *counts) + starts + b"".join(hits)
    assert read_hits(answer, 3) == [0, 2]
    broken = {
        "cut": answer[:-12],
        "count": answer.replace(struct.pack(">2Q", 1, 3), struct.pack(">2Q", 1, 4)),
        "number": answer.replace(b"000000003", b"000000004"),
        "name": answer.replace(b"000000003", b"x00000003"),
    }[change]
    with pytest.raises(ToolOutputError, match="hmmpgmd"):
        read_hits(broken, 3)
