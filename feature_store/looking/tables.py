"""Tables, counts and sizes as the pieces of a report.

Pure. Owns how they look in HTML; the words in them come from elsewhere and are escaped by `markup.tag`.
"""

from __future__ import annotations

from collections.abc import Sequence

from foldfeed.feature_store.looking.markup import Child, Html, tag


def data_table(heads: Sequence[Child], rows: Sequence[Sequence[Child]], numeric: Sequence[int] = ()) -> Html:
    """Returns a table; the columns ``numeric`` are set flush right."""
    kinds = ["num" if number in numeric else None for number in range(len(heads))]
    head = tag("tr", [tag("th", text, class_=kind) for text, kind in zip(heads, kinds, strict=True)])
    body = [
        tag("tr", [tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)])
        for row in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="wide")


def more(shown: int, total: int, noun: str, order: str = "") -> Html:
    """Returns how many of how many things a table shows."""
    count = f"{total:,} {noun}{'' if total == 1 else 's'}{order}."
    return tag("p", count if shown == total else f"{shown:,} of {count}")


def in_bytes(count: int) -> str:
    """Returns a size for people, e.g. ``1.5 GB``."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
