"""Drawn sequences for the tests of the fast scan, and HMMER's own filters to compare with."""

import numpy as np
from pyhmmer import easel, plan7

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
ALPHABET = easel.Alphabet.amino()


def drawn(random: np.random.Generator, length: int, letters: str = RESIDUES) -> str:
    return "".join(random.choice(list(letters), length))


def drawn_query(random: np.random.Generator) -> str:
    length = int(random.choice([1, 2, 5, 10, 16, 17, 33, 60, 150, 400]))
    kind = random.integers(4)
    if kind == 0:
        return drawn(random, length, "WC")
    if kind == 1:
        return drawn(random, length) + "X" * 20 + "BZJUO"
    return drawn(random, length)


def drawn_targets(random: np.random.Generator, query: str, number: int) -> list[str]:
    """Unrelated ones, ones that hold the query's end, repeats of a piece of it, one letter only."""
    targets = []
    for _ in range(number):
        length = int(random.choice([1, 5, 8, 30, 200, 700]))
        letters = RESIDUES + "XBZ*" if random.random() < 0.3 else RESIDUES
        text = drawn(random, length, letters)
        kind, start = random.random(), int(random.integers(len(query)))
        if kind < 0.3:
            text = text[: length // 2] + query[start:] + text[length // 2 :]
        elif kind < 0.5:
            piece = query[start : start + int(random.integers(3, 25))]
            text = "".join(text[:7] + piece for _ in range(int(random.integers(1, 40))))
        elif kind < 0.55:
            text = "W" * length
        targets.append(text)
    return targets


def write_targets(path, targets) -> None:
    path.write_text("".join(f">t{number}\n{text}\n" for number, text in enumerate(targets)))


def hmmer_profile(query: str) -> plan7.OptimizedProfile:
    builder = plan7.Builder(ALPHABET)
    return builder.build(digital(query), plan7.Background(ALPHABET))[2]


def digital(text: str) -> easel.DigitalSequence:
    return easel.TextSequence(sequence=text).digitize(ALPHABET)
