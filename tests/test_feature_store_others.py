"""The store opens in zarr-python, DuckDB and Polars, in a process where foldfeed cannot load."""

import subprocess
import sys
import textwrap

import pytest

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "foldfeed":
            raise ImportError("foldfeed must not be needed")
sys.meta_path.insert(0, Block())
"""


def run_without_foldfeed(code: str, *args: str) -> str:
    result = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", BLOCK + textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_zarr_python_reads_every_array_of_a_part(small_store):
    out = run_without_foldfeed(
        """
        import json, sys, zarr
        group = zarr.open_group(sys.argv[1], mode="r")
        arrays = dict(group.arrays())
        records = [json.loads(line) for line in arrays["record_json"][:].tobytes().splitlines()]
        tiles = {r["record_id"]: arrays["msa"][r["first_tile"]] for r in records}
        print(sorted(arrays), [r["record_id"] for r in records])
        tile = arrays["msa"][records[1]["first_tile"] + 1]
        print(tile[:3, :4].tolist(), int(arrays["deletion"][:].sum()), arrays["msa"].shape)
        print(group.attrs["foldfeed"]["version"])
        """,
        f"{small_store.url}/parts/{small_store.table(['part_id'])['part_id'][0]}",
    )
    assert "'msa'" in out
    assert "['a1', 'b2', 'c3']" in out
    # The second tile of b2 holds columns 64.. of its first rows.
    assert str(small_store["b2"].msa()[:3, 64:68].tolist()) in out
    total = sum(int(small_store[name].deletions().clip(max=255).sum()) for name in small_store.ids)
    assert str(total) in out


@pytest.mark.parametrize(
    "code",
    [
        """
        import sys, duckdb
        from deltalake import DeltaTable
        records = DeltaTable(sys.argv[1]).to_pyarrow_dataset()
        print(duckdb.sql("select record_id, depth from records order by record_id").fetchall())
        """,
        """
        import sys, polars
        frame = polars.read_delta(sys.argv[1]).select("record_id", "depth").sort("record_id")
        print(frame.rows())
        """,
        """
        import sys, duckdb
        print(duckdb.sql(
            f"select record_id, depth from read_parquet('{sys.argv[1]}/*.parquet') order by record_id"
        ).fetchall())
        """,
    ],
    ids=["duckdb-delta", "polars-delta", "duckdb-parquet"],
)
def test_the_index_opens_in_other_engines(small_store, code):
    out = run_without_foldfeed(code, f"{small_store.url}/index")
    assert out.strip() == "[('a1', 1), ('b2', 700), ('c3', 37)]"
