"""`foldfeed bench search`: what is measured, what is projected, and what a person reads."""

import dataclasses
import re

import pytest
from click.testing import CliRunner
from pipelines_data import GLOBINS, globins, needs_hmmer, write_fasta

from foldfeed.feature_store.cli.main import main
from foldfeed.pipelines.errors import ConfigError
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.search_speed import EngineSpeed, SearchSpeed, measure_search, read_queries

pytestmark = [pytest.mark.external_tool, needs_hmmer]


def run(*words) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["bench", "search", *map(str, words)], prog_name="foldfeed")
    return done.exit_code, done.output


@pytest.fixture
def queries(tmp_path):
    return write_fasta(tmp_path / "q.fasta", {"bad": "AC7", **globins(3)})


def needs_fast_scan() -> None:
    pytest.importorskip("pyhmmer", reason="pip install 'foldfeed[fast]'")
    if scan_kernels.library_path() is None:
        pytest.skip("no C compiler at installation")


def test_both_engines_are_measured_and_agree(queries):
    needs_fast_scan()
    sequences = read_queries(str(queries), 2)
    assert sequences == list(globins(2).values())
    speed = measure_search(str(GLOBINS), (45, 6519), sequences, ("binary", "fast"))
    assert speed.is_equal
    assert speed.num_cells == sum(map(len, sequences)) * 6519
    binary, fast = speed.engines
    assert (binary.engine, fast.engine) == ("binary", "fast")
    assert 0 < fast.share_passing <= 1
    assert binary.share_passing is None
    assert sum(fast.stages.values()) > 0
    assert min(binary.cpu_s, fast.cpu_s, binary.wall_s, fast.wall_s) > 0
    assert min(binary.fixed_s, fast.fixed_s) > 0
    answers = ((b"other", ()), *fast.answers[1:])
    assert not dataclasses.replace(
        speed, engines=(binary, dataclasses.replace(fast, answers=answers))
    ).is_equal


def test_a_projection_multiplies_cells():
    engine = EngineSpeed(
        engine="binary", cpu_s=2.4, fixed_s=0.4, wall_s=2.4, stages={}, share_passing=None, answers=()
    )
    speed = SearchSpeed(num_targets=10, target_residues=1000, query_residues=(50, 150), engines=(engine,))
    # 200 x 1,000 cells took 2 s, beside 0.2 s for each query; 300 residues against 40 targets of 100 are
    # 1,200,000 cells.
    assert speed.cpu_s_in(engine, 40, 300) == pytest.approx(12.2)


def test_the_command(queries, tmp_path):
    needs_fast_scan()
    code, said = run(GLOBINS, "--queries", queries, "--number", 2, "--price-per-cpu-hour", 1)
    assert code == 0, said
    assert re.search(
        r"^45 targets of \d+ residues on average, 2 queries, the median of \d+ residues$", said, re.M
    )
    assert re.search(
        r"^binary: \d+\.\d+ CPU seconds a query, \d+\.\d+ of them whatever the database, \d+\.\d+ Gcells/s$",
        said,
        re.M,
    )
    assert re.search(r"^fast: .* % of the targets pass$", said, re.M)
    assert "alignments and tables: equal; " in said
    assert re.search(r"mgnify, 623,796,864 sequences: binary \S+ CPU hours \(price \S+\), fast ", said)
    registry = ("--registry", tmp_path / "r.json")
    added = CliRunner().invoke(main, list(map(str, ("database", "add", "u", GLOBINS, *registry))))
    assert added.exit_code == 0, added.output
    code, said = run("u", "--queries", queries, "--engine", "binary", "--number", 1, *registry)
    assert code == 0, said
    assert "fast" not in said


def test_what_cannot_be_measured_is_refused(queries, tmp_path):
    nothing = write_fasta(tmp_path / "nothing.fasta", {"bad": "AC7"})
    for name in "ab":
        write_fasta(tmp_path / name, {name: "ACDEF"})
    code, said = run(f"{tmp_path}/a,{tmp_path}/b", "--queries", queries)
    assert (code, "is no single FASTA file" in said) == (2, True)
    code, said = run(tmp_path / "absent", "--queries", queries)
    assert (code, "no such file" in said) == (1, True)
    code, said = run(GLOBINS, "--queries", tmp_path / "absent")
    assert (code, "cannot read queries" in said) == (1, True)
    with pytest.raises(ConfigError, match="holds no valid sequence"):
        read_queries(str(nothing), 3)
