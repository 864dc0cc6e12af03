"""What a search of templates reads and writes besides the programs: its alignment, and chains by name."""

import random
import re

import numpy as np

from foldfeed.pipelines.tools.hmmsearch import sequences_in
from foldfeed.pipelines.tools.template_profile import to_stockholm


def test_an_alignment_as_stockholm_keeps_every_letter_in_its_place():
    """Against a loop over letters, on random rows with insertions anywhere."""
    rng = np.random.default_rng(3)
    for length in (1, 2, 7, 30):
        rows = [bytes(rng.choice(list(b"ACDEFG"), length).astype(np.uint8))]
        for _ in range(6):
            row = b""
            for _ in range(length):
                row += bytes(rng.choice(list(b"acd"), rng.integers(0, 3)).astype(np.uint8))
                row += bytes(rng.choice(list(b"ACD-"), 1).astype(np.uint8))
            rows.append(row + bytes(rng.choice(list(b"ac"), rng.integers(0, 3)).astype(np.uint8)))
        lines = to_stockholm(rows).decode().splitlines()
        reference = next(line.split()[2] for line in lines if line.startswith("#=GC RF"))
        table = [line.split()[1] for line in lines if line and not line.startswith(("#", "//"))]
        assert {len(line) for line in table} == {len(reference)}
        for row, line in zip(rows, table, strict=True):
            back = "".join(
                letter if mark == "x" else letter.lower()
                for letter, mark in zip(line, reference, strict=True)
                if mark == "x" or letter != "."
            )
            assert back == row.decode()
        assert all(mark == "x" or letter in ".-" for letter, mark in zip(table[0], reference, strict=True))


def test_sequences_are_found_by_name_wherever_they_lie(tmp_path):
    """Against a loop over the text: names that repeat, lines of any length, either end of line."""
    rng = random.Random(3)
    for number in range(60):
        names = [rng.choice("abcd") + rng.choice(["x", "y", ""]) for _ in range(rng.randint(1, 12))]
        end = rng.choice(["\n", "\r\n"])
        text = ""
        for name in names:
            text += f">{rng.choice(['', ' '])}{name}{rng.choice(['', ' d > e'])}{end}"
            text += "".join("".join(rng.choices("ACDacd*", k=rng.randint(0, 9))) + end for _ in range(2))
        path = tmp_path / f"{number}.fasta"
        path.write_bytes((text if rng.random() < 0.5 else text.rstrip()).encode())
        wanted: dict[str, list[str]] = {}
        for entry in re.split(r"(?:^|\n)>", text)[1:]:
            header, _, body = entry.partition("\n")
            letters = re.sub("[^A-Z]", "X", re.sub(r"\s", "", body).upper())
            wanted.setdefault(header.split()[0], []).append(letters)
        asked = {name for name in names if rng.random() < 0.7} | {"zzz"}
        found = sequences_in(str(path), asked)
        assert found == {name: one for name, one in wanted.items() if name in asked}
