"""What searches cost, as numbers and as lines for a person.

Owns the sums by database and their words. Does not own the rows that they are made of
(`records.ledger`). Nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseCost:
    """What the searches in one database cost, those of earlier runs among them.

    Attributes:
      database: its name.
      tool: that searched it.
      num_searches: searches, each counted once.
      num_new: of these, done in this run.
      num_hits: rows that they found, as far as their receipts say.
      cpu_s: user plus system seconds of all of them.
      new_cpu_s: of those of this run; what files of a database cost that were searched in earlier runs is
        part of the whole search, which is new.
      wall_s: sum of their wall times.
      max_rss_bytes: of the largest.
      bytes_read: bytes that they asked the system for, from disk or from its cache.
      energy_wh: watt-hours of the searches whose machine told, an estimate; None if no machine did.
      num_with_energy: searches that are in it.
    """

    database: str
    tool: str
    num_searches: int
    num_new: int
    num_hits: int
    cpu_s: float
    new_cpu_s: float
    wall_s: float
    max_rss_bytes: int
    bytes_read: int
    energy_wh: float | None = None
    num_with_energy: int = 0


def lines_of(costs: Iterable[DatabaseCost], price_per_cpu_hour: float | None) -> Iterator[str]:
    """Yields one line per database.

    Args:
      costs: sums by database.
      price_per_cpu_hour: in any currency; None: no price is given.
    """
    for cost in costs:
        words = [
            f"{cost.num_searches} searches ({cost.num_new} new)",
            f"{cost.cpu_s / 3600:.3g} CPU hours ({cost.new_cpu_s / 3600:.3g} new)",
            f"{readable_bytes(cost.max_rss_bytes)} of memory at most",
            f"{readable_bytes(cost.bytes_read)} read",
            f"{cost.num_hits} hits",
        ]
        if cost.energy_wh is not None:
            some = (
                f" (of {cost.num_with_energy} searches)" if cost.num_with_energy < cost.num_searches else ""
            )
            words.append(f"{cost.energy_wh:.3g} Wh of the processors{some}")
        if price_per_cpu_hour is not None:
            price = cost.cpu_s / 3600 * price_per_cpu_hour
            words.append(f"price {price:.4g}, {price / cost.num_searches:.4g} per MSA")
        yield f"{cost.database} ({cost.tool}): {', '.join(words)}"


def readable_bytes(count: float) -> str:
    """Returns a number of bytes with a decimal unit, e.g. ``1.4 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
