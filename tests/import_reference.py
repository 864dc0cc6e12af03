"""Small alignments, and a reading of them letter by letter that shares nothing with the importers."""

import numpy as np

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.importers.layouts import AlignmentImport
from foldfeed.feature_store.importers.rows import ImportOptions

UNIREF90 = """# STOCKHOLM 1.0
#=GF ID query-i1
#=GF AU jackhmmer (HMMER 3.3.2)

query               AC-DE
UniRef90_X/3-9      ACkD-
tr|A0A146SKV9|A0A146SKV9_FUNHE/1-5  -C-DE
//
"""
BFD = ">query\nACDE\n>hit1 some text\nAC-E\n>hit2\n-CDE\n>hit3\nACkkBE\n"
MGNIFY = ">query\nACDE\n>MGYP1/1-4\nACBE\n>MGYP2/2-4\nACDE\n"


def naive_rows(text: str) -> list[tuple[str, str, list[int]]]:
    """Name, aligned letters and deletions of A3M or Stockholm, letter by letter."""
    if text.startswith("# STOCKHOLM"):
        lines = [line.split() for line in text.splitlines() if line and line[0] not in "#/"]
        query = lines[0][1]
        made = []
        for name, row in lines:
            letters, counts, seen = "", [], 0
            for mine, theirs in zip(row, query, strict=True):
                if theirs != "-":
                    letters += mine.upper()
                    counts.append(seen)
                    seen = 0
                elif mine != "-":
                    seen += 1
            made.append((name, letters, counts))
        return made
    made = []
    for entry in text.split(">")[1:]:
        header, row = entry.split("\n", 1)
        letters, counts, seen = "", [], 0
        for letter in row.replace("\n", ""):
            if letter.islower():
                seen += 1
            else:
                letters += letter
                counts.append(seen)
                seen = 0
        made.append((header.split()[0], letters, counts))
    return made


def naive_merge(*texts: str, dedup: bool = True) -> list[tuple[int, str, str, list[int]]]:
    """AlphaFold 2's make_msa_features: first occurrence of each row of letters."""
    rows, seen = [], set()
    for database, text in enumerate(texts):
        for name, letters, counts in naive_rows(text):
            if letters not in seen or not dedup:
                seen.add(letters)
                rows.append((database, name, letters, counts))
    return rows


def assert_rows(record, want) -> None:
    assert record.depth == len(want)
    for index, (database, name, letters, counts) in enumerate(want):
        assert np.array_equal(record.msa[index], alphabet.encode(letters)), index
        assert record.deletions[index].tolist() == counts
        if index:
            assert record.rows.database[index] == database
            assert record.rows.hit_id[index] == name
    assert record.rows.database[0] == -1


def read_all(path, layout="auto", **options):
    found = AlignmentImport(path, layout, ImportOptions(**options))
    return found, list(found)
