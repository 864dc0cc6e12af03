"""What a search took of the machine's energy, as far as the machine tells: an estimate, by a stated rule.

Owns the rule and the two files it is made of. The processor counts the energy of each of its packages (RAPL,
``/sys/class/powercap``, Intel and AMD); it does not know processes. So a search is given the share of the
packages' energy that its CPU time was of the CPU time that the whole machine spent in those seconds
(``/proc/stat``). What the machine draws when it idles falls on those who work; memory, disks, fans and the
power supply are not in the counters.

Invariant: no number rather than a wrong one. There is none where the counters are missing or may not be read
(most kernels let root alone), or where two readings lie so far apart that a counter may have wrapped twice.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
STAT = Path("/proc/stat")

# Names of whole zones; "intel-rapl:0:0" is part of one, and "intel-rapl-mmio:0" is one of them once more.
_ZONE = re.compile(r"(intel|amd)-rapl:[0-9]+")
# No package draws more; at this power a counter of the usual 262 kJ wraps every 262 s.
_MOST_WATTS = 1000.0
# Shortest time between two looks at the counters: reading one asks the processor, which takes microseconds.
LOOK_S = 5.0
# Of the times in the first line of /proc/stat: user, nice, system, (idle, iowait,) irq, softirq.
_BUSY = (0, 1, 2, 5, 6)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackageCounter:
    """One package's counter.

    Attributes:
      energy_uj: microjoules since some moment, from 0 again after the range.
      range_uj: the largest value.
    """

    energy_uj: int
    range_uj: int


class EnergyMeter:
    """Measures from its creation on; `look` now and then, so that no counter wraps unseen."""

    def __init__(self, powercap: Path | None = None, stat: Path | None = None) -> None:
        """Starts to measure.

        Args:
          powercap: folder of the zones; the kernel's when None.
          stat: the machine's CPU times; the kernel's when None.
        """
        self._powercap = powercap if powercap is not None else POWERCAP
        self._stat = stat if stat is not None else STAT
        self._looked = time.monotonic()
        self._last = read_packages(self._powercap)
        self._busy_s = _busy_seconds(self._stat) if self._last else None
        self._package_j: float | None = 0.0 if self._last and self._busy_s is not None else None

    def look(self) -> None:
        """Reads the counters if that is due; costs nothing where there are none."""
        if self._package_j is not None and time.monotonic() - self._looked >= LOOK_S:
            self._read()

    def joules(self, cpu_s: float) -> float | None:
        """Returns the energy of work that took so much CPU time since the start; None where nobody knows.

        Args:
          cpu_s: user plus system seconds of the work.
        """
        if self._package_j is not None:
            self._read()
        if self._package_j is None or self._busy_s is None:
            return None
        busy_s = _busy_seconds(self._stat)
        if busy_s is None:
            return None
        # The kernel counts the machine in ticks of 10 ms and the work more finely: never more than all of it.
        spent_s = max(busy_s - self._busy_s, cpu_s)
        return self._package_j * cpu_s / spent_s if spent_s > 0 else 0.0

    def _read(self) -> None:
        now, counters = time.monotonic(), read_packages(self._powercap)
        took = joules_between(self._last, counters, now - self._looked)
        self._package_j = None if took is None or self._package_j is None else self._package_j + took
        self._looked, self._last = now, counters


def read_packages(powercap: Path) -> dict[str, PackageCounter]:
    """Returns the counters of all packages by zone; none where the machine does not tell, or not us."""
    found = {}
    try:
        for name in sorted(os.listdir(powercap)):
            zone = powercap / name
            if not _ZONE.fullmatch(name) or not (zone / "name").read_text().startswith("package"):
                continue
            found[name] = PackageCounter(
                energy_uj=int((zone / "energy_uj").read_text()),
                range_uj=int((zone / "max_energy_range_uj").read_text()),
            )
    except (OSError, ValueError):
        # One package of two would be half of the truth.
        return {}
    return found


def joules_between(
    before: Mapping[str, PackageCounter], after: Mapping[str, PackageCounter], elapsed_s: float
) -> float | None:
    """Returns what the packages took between two readings; None if that cannot be known.

    A counter that went down has wrapped once: `PackageCounter.range_uj` is its largest value, so the next one
    is 0.

    Example: from 90 to 5 with a range of 99 are 15 microjoules.
    """
    if not before or before.keys() != after.keys():
        return None
    total_uj = 0
    for zone, first in before.items():
        if elapsed_s * _MOST_WATTS * 1e6 > first.range_uj:
            return None
        delta_uj = after[zone].energy_uj - first.energy_uj
        total_uj += delta_uj if delta_uj >= 0 else delta_uj + first.range_uj + 1
    return total_uj / 1e6


def total_joules(parts: Iterable[float | None]) -> float | None:
    """Returns the sum; None if one part is not known, because the rest is not what the whole took."""
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def _busy_seconds(stat: Path) -> float | None:
    """Returns how long all CPUs together have worked since the machine started."""
    try:
        words = stat.read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    if len(words) < 8 or words[0] != "cpu":
        return None
    return sum(int(words[1 + place]) for place in _BUSY) / os.sysconf("SC_CLK_TCK")
