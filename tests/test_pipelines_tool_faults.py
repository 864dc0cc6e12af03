"""Tools and databases that go wrong during a build: what of it becomes a dead letter, and what is kept."""

import shutil
from pathlib import Path

import pytest
from pipelines_data import (
    GLOBINS,
    config_of,
    first_on_path,
    globins,
    needs_hmmer,
    stand_in,
    tree_bytes,
    write_fasta,
)

from foldfeed.feature_store import FeatureStore
from foldfeed.pipelines import DatabaseSpec, run_build
from foldfeed.pipelines.build_config import BuildReport
from foldfeed.pipelines.building.tools import find_tool
from foldfeed.pipelines.errors import NothingCommittedError, ToolNotFoundError
from foldfeed.pipelines.tools.search_tool import find_binary, require_same_binary

pytestmark = [pytest.mark.external_tool, needs_hmmer]

NAMES = sorted(globins(3))
# Where the options of a command line name the file with the alignment.
ALIGNMENT = 'for word in "$@"; do [ "$last" = -A ] && alignment=$word; last=$word; done'


@pytest.fixture
def queries(tmp_path) -> Path:
    return write_fasta(tmp_path / "q.fasta", globins(3))


def build_with(tmp_path: Path, monkeypatch, queries: Path, script: str, **options) -> BuildReport:
    """Builds with a jackhmmer that is a script around the real one, ``$REAL``."""
    script = f'REAL="{find_binary("jackhmmer")}"\n{script}\n'
    with monkeypatch.context() as patch:
        first_on_path(patch, stand_in(tmp_path / "bin", script))
        return run_build(config_of(tmp_path, queries, [f"uniref90={GLOBINS}"], **options))


def reasons(report: BuildReport) -> dict[str, str]:
    return {letter.record_id: letter.reason for letter in report.dead_letters}


def test_a_flood_of_output_changes_nothing(tmp_path, monkeypatch, queries):
    flood = "head -c 64M /dev/zero; head -c 64M /dev/zero >&2"
    report = build_with(tmp_path, monkeypatch, queries, f'{flood}\nexec "$REAL" "$@"')
    assert report.num_records == 3
    plain = build_with(tmp_path, monkeypatch, queries, 'exec "$REAL" "$@"', store=str(tmp_path / "plain"))
    assert tree_bytes(Path(report.store) / "parts", "*/c/**/*") == tree_bytes(
        Path(plain.store) / "parts", "*/c/**/*"
    )


def test_an_alignment_that_was_cut_is_no_answer(tmp_path, monkeypatch, queries):
    """At a line, in a line, and before its last: the exit code is 0 and the table is whole."""
    cut = f"""
if mkdir {tmp_path}/first; then size=-3; elif mkdir {tmp_path}/second; then size=-700; else size=900; fi
{ALIGNMENT}
"$REAL" "$@" && truncate -s $size "$alignment"
"""
    with pytest.raises(NothingCommittedError, match="3 dead letters"):
        build_with(tmp_path, monkeypatch, queries, cut, workers=1)
    assert not list((tmp_path / "store.results" / "units").rglob("*.json"))


def test_a_tool_without_memory_is_a_dead_letter_with_its_own_words(tmp_path, monkeypatch, queries):
    """HMMER's real end where it gets no memory, for the second query only; the kernel's is a SIGKILL."""
    second = globins(3)[NAMES[1]]
    script = f"""
for word in "$@"; do case "$word" in */query) query=$word;; esac; done
if grep -q {second} "$query"; then ulimit -v 12000; fi
exec "$REAL" "$@"
"""
    report = build_with(tmp_path, monkeypatch, queries, script)
    assert set(reasons(report)) == {NAMES[1]}
    assert "killed by signal 6" in reasons(report)[NAMES[1]]
    assert "thread creation failed" in reasons(report)[NAMES[1]]
    assert FeatureStore.open(report.store).ids == [NAMES[0], NAMES[2]]


def test_a_worker_with_another_program_is_refused(tmp_path, monkeypatch):
    folder = stand_in(tmp_path / "bin", f'exec "{find_binary("jackhmmer")}" "$@"\n')
    with monkeypatch.context() as patch:
        first_on_path(patch, folder)
        tool = find_tool(DatabaseSpec.parse(f"u={GLOBINS}"), cpus=1, timeout_s=60)
    require_same_binary(tool)
    stand_in(folder, "exit 7\n")
    with pytest.raises(
        ToolNotFoundError, match=r"on this worker \(.+\) is not the program the build was planned"
    ):
        require_same_binary(tool)
    (folder / "jackhmmer").unlink()
    with pytest.raises(ToolNotFoundError, match="is not on this worker"):
        require_same_binary(tool)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_database_that_changes_under_a_build_costs_the_units_that_met_it(
    tmp_path, monkeypatch, queries, shards
):
    """The second search changes it: that one and the third are no results, the first is; nothing is mixed."""
    entries = [f">{entry}" for entry in GLOBINS.read_text().split(">")[1:]]
    for number in range(2):
        (tmp_path / f"db{number}").write_text("".join(entries[number::2]))
    paths = ",".join(str(tmp_path / f"db{number}") for number in range(shards))
    change = f"""
case "$*" in *{tmp_path}/db0*) echo run >> {tmp_path}/runs;; esac
if [ "$(wc -l < {tmp_path}/runs)" = 2 ]; then printf ">late\\nMVLSPADKTNVKAAW\\n" >> {tmp_path}/db0; fi
exec "{find_binary("jackhmmer")}" "$@"
"""
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", change))
    config = config_of(tmp_path, queries, [f"uniref90={paths}"], workers=1, on_existing="replace")
    report = run_build(config)
    words = reasons(report)
    assert report.num_records == 1
    assert len(words) == 2
    assert sum(f"'{tmp_path}/db0' was changed while it was searched" in word for word in words.values()) == 1
    assert sum("holds something else on" in word for word in words.values()) == 1
    # The same command plans with the new file and takes nothing of the old one.
    again = run_build(config)
    assert (again.num_records, again.num_searched, again.num_reused) == (3, 3, 0)
    fresh = run_build(config_of(tmp_path / "fresh", queries, [f"uniref90={paths}"]))
    for name in NAMES:
        mine, other = (
            FeatureStore.open(one.store)[name].crop(slice(None), slice(None)) for one in (again, fresh)
        )
        assert mine.msa.tobytes() == other.msa.tobytes()


def test_a_database_that_goes_away_during_a_build(tmp_path, monkeypatch, queries):
    database = tmp_path / "db.fasta"
    shutil.copyfile(GLOBINS, database)
    script = f'"{find_binary("jackhmmer")}" "$@"; code=$?; rm -f {database}; exit $code\n'
    first_on_path(monkeypatch, stand_in(tmp_path / "bin", script))
    with pytest.raises(NothingCommittedError, match="cannot be read on"):
        run_build(config_of(tmp_path, queries, [f"uniref90={database}"], workers=1))
