"""Generated protein families of any depth, in the texts that search tools write: A3M, A2M and Stockholm."""

from __future__ import annotations

import random

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
ODD = "XBZUJO"


Rows = list[tuple[str, list[str]]]


def family(depth: int, length: int, seed: int = 1, max_insertion: int = 40) -> Rows:
    """Returns names and rows, the query first.

    Hits cover a part of the query, differ from it by a share of their own, miss runs of columns and have
    insertions, as local alignments do. A row is ``length + 1`` pieces: the letters inserted left of a column
    (lower case) and the column's letter; the last piece is what stands right of all columns.
    """
    rng = random.Random(f"{seed} {depth} {length}")
    query = rng.choices(RESIDUES, k=length)
    rows = [("query", [*query, ""])]
    for number in range(1, depth):
        share = rng.uniform(0.1, 0.9)
        first, last = sorted(rng.sample(range(length + 1), 2)) if number % 3 == 0 else (0, length)
        pieces = ["-"] * length + [""]
        for column in range(first, last):
            other = rng.choice(RESIDUES if rng.random() < 0.98 else ODD)
            pieces[column] = other if rng.random() < share else query[column]
        for _ in range(rng.randrange(3)):
            at = rng.randrange(length)
            stop = min(length, at + rng.randint(1, 9))
            pieces[at:stop] = ["-"] * (stop - at)
        for at in set(rng.choices(range(length + (number % 5 == 0)), k=rng.randrange(4))):
            pieces[at] = "".join(rng.choices(RESIDUES, k=rng.randint(1, max_insertion))).lower() + pieces[at]
        species = ("HUMAN", "9BACT")[number % 2]
        rows.append((f"tr|A0A{number:07d}|A0A{number:07d}_{species}/1-{length}", pieces))
    return rows


def as_a3m(rows: Rows, width: int = 10**9) -> str:
    """Returns A3M text, residues in lines of so many letters."""
    lines = []
    for name, pieces in rows:
        text = "".join(pieces)
        lines += [f">{name}", *(text[at : at + width] for at in range(0, len(text), width))]
    return "\n".join(lines) + "\n"


def _padded(rows: Rows, gap: str) -> list[tuple[str, str]]:
    """Returns rows of equal length: every insertion is as wide as the widest at its place."""
    inserted = [["".join(filter(str.islower, piece)) for piece in pieces] for _, pieces in rows]
    widths = [max(map(len, column)) for column in zip(*inserted, strict=True)]
    padded = []
    for (name, pieces), own in zip(rows, inserted, strict=True):
        cells = zip(pieces, own, widths, strict=True)
        row = "".join(left.ljust(width, gap) + piece[len(left) :] for piece, left, width in cells)
        padded.append((name, row))
    return padded


def as_a2m(rows: Rows) -> str:
    """Returns A2M text: dots where others have an insertion."""
    return "".join(f">{name}\n{row}\n" for name, row in _padded(rows, "."))


def as_stockholm(rows: Rows, block: int = 60) -> str:
    """Returns interleaved Stockholm text as JackHMMER writes it: upper case, dashes for every gap."""
    padded = [(name, row.upper()) for name, row in _padded(rows, "-")]
    blocks = [
        "".join(f"{name:<40} {row[at : at + block]}\n" for name, row in padded)
        for at in range(0, len(padded[0][1]), block)
    ]
    return "# STOCKHOLM 1.0\n#=GF ID query-i1\n\n" + "\n".join(blocks) + "//\n"
