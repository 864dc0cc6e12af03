"""Energy of searches: from counters that wrap, by a search's share of the machine's work, and None where the
machine does not tell."""

import dataclasses
import io
import json
import os
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from pipelines_data import globins

from foldfeed.feature_store.cli.main import main
from foldfeed.pipelines.costs import lines_of
from foldfeed.pipelines.programs import energy
from foldfeed.pipelines.programs.energy import EnergyMeter, joules_between, read_packages, total_joules
from foldfeed.pipelines.programs.subprocess_runner import Usage, run_program
from foldfeed.pipelines.records import ledger
from foldfeed.pipelines.searches.results import ResultStore, SearchFacts
from foldfeed.pipelines.tools.search_tool import SearchResult, ToolIdentity

RANGE_UJ = 262_143_328_850
TICKS = os.sysconf("SC_CLK_TCK")


def write_zone(root: Path, zone: str, name: str, energy_uj: int, range_uj: int = RANGE_UJ) -> None:
    folder = root / zone
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{text}\n")


def write_stat(path: Path, busy_s: float) -> None:
    """As /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal."""
    busy = int(busy_s * TICKS)
    path.write_text(f"cpu  {busy - 3} 1 1 99999 77777 1 0 5 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")


@pytest.fixture
def machine(tmp_path):
    """A machine with two packages, their parts, and the zone that counts the first package once more."""
    powercap = tmp_path / "powercap"
    write_zone(powercap, "intel-rapl:0", "package-0", 1_000_000)
    write_zone(powercap, "intel-rapl:1", "package-1", RANGE_UJ - 1_000_000)
    write_zone(powercap, "intel-rapl:0:0", "dram", 7)
    write_zone(powercap, "intel-rapl:2", "psys", 7)
    write_zone(powercap, "intel-rapl-mmio:0", "package-0", 7)
    write_stat(tmp_path / "stat", 1000)
    return powercap, tmp_path / "stat"


def test_a_search_has_its_share_of_the_packages_and_wrapped_counters_go_on(machine):
    powercap, stat = machine
    meter = EnergyMeter(powercap, stat)
    write_zone(powercap, "intel-rapl:0", "package-0", 31_000_000)
    # 1,000,000 to the largest value, one to 0, and 8,999,999 more.
    write_zone(powercap, "intel-rapl:1", "package-1", 8_999_999)
    for zone, name in (
        ("intel-rapl:0:0", "dram"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        write_zone(powercap, zone, name, 10**9)
    write_stat(stat, 1008)
    # 30 J and 10 J; the search worked 2 s of the machine's 8.
    assert meter.joules(2.0) == pytest.approx(10.0)
    # Never more than all, where the kernel's ticks are coarser than the search.
    write_stat(stat, 1000)
    assert meter.joules(0.001) == pytest.approx(40.0)


def test_a_counter_that_wraps_again_and_again_is_followed_by_looks(machine, monkeypatch):
    powercap, stat = machine
    monkeypatch.setattr(energy, "LOOK_S", 0.0)
    meter = EnergyMeter(powercap, stat)
    for step in range(1, 8):
        write_zone(
            powercap, "intel-rapl:0", "package-0", (1_000_000 + step * 100_000_000_000) % (RANGE_UJ + 1)
        )
        meter.look()
    write_stat(stat, 1010)
    assert meter.joules(10.0) == pytest.approx(700_000, rel=1e-6)


@pytest.mark.parametrize(
    "fault", ["no folder", "no package", "denied", "not a number", "gone meanwhile", "no stat"]
)
def test_where_the_machine_does_not_tell_there_is_no_number(machine, fault, tmp_path):
    powercap, stat = machine
    if fault == "no folder":
        powercap = tmp_path / "elsewhere"
    elif fault == "no package":
        powercap = tmp_path / "other"
        write_zone(powercap, "dtpm", "dtpm", 1)
    elif fault == "denied":
        # A folder cannot be read as a file, also not by root, whom no mode of a file stops.
        (powercap / "intel-rapl:1" / "energy_uj").unlink()
        (powercap / "intel-rapl:1" / "energy_uj").mkdir()
    elif fault == "not a number":
        (powercap / "intel-rapl:1" / "energy_uj").write_text("")
    elif fault == "no stat":
        stat.unlink()
    meter = EnergyMeter(powercap, stat)
    if fault == "gone meanwhile":
        (powercap / "intel-rapl:1" / "name").write_text("psys\n")
    meter.look()
    assert meter.joules(1.0) is None


def test_readings_too_far_apart_say_nothing(machine):
    before = read_packages(machine[0])
    assert sorted(before) == ["intel-rapl:0", "intel-rapl:1"]
    assert joules_between(before, before, 262.0) == 0.0
    # At 1 kW a counter of 262 kJ may have gone round.
    assert joules_between(before, before, 263.0) is None
    assert total_joules([1.0, 2.5]) == 3.5
    assert total_joules([1.0, None]) is None


def test_a_real_program_is_measured_while_the_counter_runs(machine, monkeypatch, tmp_path):
    powercap, _ = machine
    monkeypatch.setattr(energy, "POWERCAP", powercap)
    code = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    stop = threading.Event()

    def draw() -> None:
        # A file that is replaced at once, as a reading of the kernel's is.
        joules = 1
        while not stop.wait(0.01):
            joules += 1
            (tmp_path / "next").write_text(f"{joules * 1_000_000}\n")
            os.replace(tmp_path / "next", powercap / "intel-rapl:0" / "energy_uj")

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        usage = run_program([sys.executable, "-c", code], folder=tmp_path, timeout_s=60).usage
    finally:
        stop.set()
        thread.join(10)
    drawn = int((powercap / "intel-rapl:0" / "energy_uj").read_text()) / 1e6
    assert usage.energy_j is not None
    assert 0 < usage.energy_j <= drawn
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nothing")
    assert run_program(["/bin/true"], folder=tmp_path, timeout_s=60).usage.energy_j is None


def ledger_of(tmp_path, energies_j: list[float | None]) -> pa.Table:
    """A result store with a search for every energy, of one job."""
    store = ResultStore(str(tmp_path / "results"))
    tool = ToolIdentity(name="jackhmmer", version="3.4", binary_sha256="0", argv_template=())
    usage = Usage(wall_s=2.0, cpu_s=1.0, max_rss_bytes=1 << 20)
    for number, joules in enumerate(energies_j):
        result = SearchResult(
            tool=tool,
            format="a3m",
            alignment=b"",
            table=b"",
            usage=dataclasses.replace(usage, energy_j=joules),
        )
        store.put(f"{number:064x}", result, SearchFacts(database="u", num_hits=1, run_id="r"))
    rows = [
        {**row, "database": "u", "database_digest": "d"}
        for number in range(len(energies_j))
        for name in sorted(globins(2))
        for row in ledger.rows_of(name, [store.receipt(f"{number:064x}")], [_Named()])
    ]
    path = tmp_path / "results" / "jobs" / "j" / "p.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(ledger.to_parquet(rows))
    return ledger.join(str(tmp_path / "results"), ["jobs/j/p.parquet"], "j")[0]


class _Named:
    """What the ledger asks of a database."""

    name, digest = "u", "d"


def test_watt_hours_are_summed_once_per_search_and_answer_sql(tmp_path):
    table = ledger_of(tmp_path, [7200.0, None, 1800.0])
    (cost,) = ledger.costs(table, "r")
    # Two records share each search.
    assert (cost.num_searches, cost.num_with_energy, cost.energy_wh) == (3, 2, pytest.approx(2.5))
    assert "2.5 Wh of the processors (of 2 searches)" in next(lines_of([cost], None))
    words = ["ledger", "store", "--results", str(tmp_path / "results")]
    said = CliRunner().invoke(main, words, catch_exceptions=False).output
    assert "2.5 Wh of the processors (of 2 searches)" in said
    question = "select count(energy_wh) n, max(energy_wh) wh from searches"
    said = CliRunner().invoke(main, [*words, question, "--format", "csv"], catch_exceptions=False).output
    assert said.split() == ["n,wh", "4,2"] or said.split() == ["n,wh", "4,2.0"]


def test_receipts_and_ledgers_of_older_versions_are_read(tmp_path):
    table = ledger_of(tmp_path, [None])
    (cost,) = ledger.costs(table, "r")
    assert cost.energy_wh is None
    assert "Wh" not in next(lines_of([cost], None))
    receipt = next((tmp_path / "results" / "units").rglob("*.json"))
    fields = json.loads(receipt.read_text())
    assert fields["usage"].pop("energy_j", 0) is None
    receipt.write_text(json.dumps(fields))
    assert ResultStore(str(tmp_path / "results")).receipt(receipt.stem).usage.energy_j is None
    old = io.BytesIO()
    pq.write_table(table.drop_columns(["energy_wh"]), old)
    (tmp_path / "results" / "jobs" / "j" / "ledger.parquet").write_bytes(old.getvalue())
    assert ledger.read_all(str(tmp_path / "results")).equals(table)
