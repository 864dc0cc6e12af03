"""Queries that are taken through a file of a database together: equal answers, and the file is read once."""

from pathlib import Path

import pytest

pytest.importorskip("pyhmmer", reason="pip install 'foldfeed[fast]'")

from pipelines_data import GLOBINS, config_of, globins, needs_hmmer, tree_bytes, write_fasta

from foldfeed.pipelines import run_build
from foldfeed.pipelines.building.tools import find_sharded
from foldfeed.pipelines.errors import DatabaseChangedError, ToolTimeoutError
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan import memory as scan_memory
from foldfeed.pipelines.fast_scan.database import ScanDatabase
from foldfeed.pipelines.searches import search
from foldfeed.pipelines.tools.search_tool import Shard
from foldfeed.pipelines.tools.sharded_jackhmmer import ShardedJackhmmer

pytestmark = [
    pytest.mark.external_tool,
    needs_hmmer,
    pytest.mark.skipif(scan_kernels.library_path() is None, reason="no C compiler at installation"),
]


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    entries = [f">{entry}" for entry in GLOBINS.read_text().split(">")[1:]]
    paths = [tmp_path / f"shard{number}" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_text("".join(entries[number::3]))
    return paths


def tool_of(shards: list[Path], timeout_s: float = 60.0) -> ShardedJackhmmer:
    parts = tuple(Shard(path=str(path), digest=path.name) for path in shards)
    return find_sharded(parts, cpus=1, timeout_s=timeout_s, engine="fast")


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_together_is_as_alone_but_the_file_is_read_once(shards, monkeypatch, share):
    monkeypatch.setattr(scan_memory, "RESIDENT_SHARE", share)
    tool = tool_of(shards)
    queries = [*globins(19).values(), "M", "W" * 40]
    reads = []
    read_chunk = ScanDatabase.read_chunk

    def counted(self, start):
        reads.append(start)
        return read_chunk(self, start)

    monkeypatch.setattr(ScanDatabase, "read_chunk", counted)
    alone = [tool.scan(query, 0) for query in queries]
    assert len(reads) == (1 if share else len(queries))
    reads.clear()
    together = list(tool.scan_many(queries, 0))
    assert len(reads) == (0 if share else 1)
    assert [(one.alignment, one.table) for one in together] == [(one.alignment, one.table) for one in alone]
    assert sum(one.usage.cpu_s for one in together) > 0
    assert {one.table for one in together} == {b"15\n"}
    # Not every query has candidates, and not all of the shard are.
    assert 0 < sum(one.alignment.count(b">") for one in together) < 15 * len(queries)


def test_a_build_in_batches_makes_the_store_of_a_build_without(tmp_path, shards, monkeypatch):
    batches: list[int] = []
    scan_many = ShardedJackhmmer.scan_many

    def noted(self, sequences, number):
        batches.append(len(sequences))
        return scan_many(self, sequences, number)

    monkeypatch.setattr(ShardedJackhmmer, "scan_many", noted)
    queries = write_fasta(tmp_path / "q.fasta", globins(18))
    database = "uniref90=" + ",".join(map(str, shards))
    stores = {}
    # Three shards; jackhmmer takes one query at a time, the others as many as pay.
    sizes = {"binary": [1] * 54, "fast": [2, 2, 2, 16, 16, 16], "pyhmmer": [18, 18, 18]}
    for engine in sizes:
        # Where reading costs much, groups are as few as the build has workers for.
        monkeypatch.setattr(search, "SCAN_GROUPS", 8 if engine == "pyhmmer" else 1)
        config = config_of(tmp_path, queries, [database], store=str(tmp_path / engine), engine=engine)
        assert run_build(config).num_records == 18
        stores[engine] = tree_bytes(tmp_path / engine / "parts")
        assert sorted(batches) == sizes[engine]
        batches.clear()
    assert stores["binary"] == stores["fast"] == stores["pyhmmer"]


def test_a_file_that_breaks_under_a_batch_fails_what_is_left_of_it(shards):
    tool = tool_of(shards)
    found = tool.scan_many(list(globins(3).values()), 1)
    assert b">" in next(found).alignment
    shards[1].write_text("cut")
    with pytest.raises(DatabaseChangedError, match="changed while it was searched"):
        next(found)


def test_a_batch_has_the_time_of_its_queries(shards):
    queries = list(globins(4).values())
    with pytest.raises(ToolTimeoutError, match="did not end within 4e-09 s"):
        list(tool_of(shards, timeout_s=1e-9).scan_many(queries, 0))
