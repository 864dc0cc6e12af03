"""Merging: the rows of several databases become one alignment, as AlphaFold 2 merges them.

Owns caps, de-duplication, order and where every row came from. Does not own parsing of alignment text. Pure
functions. Invariants: row 0 is the query; no two rows have equal letters; a row keeps the deletions and the
provenance of its first occurrence.

Source: AlphaFold 2 ``data/pipeline.py`` make_msa_features, ``data/parsers.py`` truncate_stockholm_msa,
``data/msa_identifiers.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.record import RowProvenance
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.feature_store.parsers.alignment import ParsedAlignment
from foldfeed.feature_store.parsers.hit_names import species_of
from foldfeed.feature_store.parsers.stockholm import parse_stockholm
from foldfeed.pipelines.errors import ToolOutputError
from foldfeed.pipelines.jackhmmer import has_numbered_names
from foldfeed.pipelines.search_tool import QUERY_NAME, SearchResult

_RANGE = re.compile(r"/\d+-\d+$")
# A database of Pfam domains has names with a range already, and HMMER adds one.
_RANGES = re.compile(r"(?:/\d+-\d+)+$")
_NUMBER_PREFIX = re.compile(r"^\d+\|")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseHits:
    """What one database gave for one query, parsed.

    Attributes:
      alignment: rows in the tool's order, the query first.
      hit_ids: name of every row, without descriptions.
      e_values: float64 (num_rows,), of the whole target; NaN where the tool gives none.
      bit_scores: float32 (num_rows,); NaN where the tool gives none.
    """

    alignment: ParsedAlignment
    hit_ids: list[str]
    e_values: NDArray[np.float64]
    bit_scores: NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergedMsa:
    """One alignment over all databases.

    Attributes:
      msa: uint8 (depth, length) codes, the query first.
      deletions: int32 (depth, length).
      rows: provenance of every row.
      num_rows: rows taken from each database, the query row counted for none.
    """

    msa: NDArray[np.uint8]
    deletions: NDArray[np.int32]
    rows: RowProvenance
    num_rows: tuple[int, ...]


def read_hits(result: SearchResult, sequence: str) -> DatabaseHits:
    """Returns the rows of a search result.

    Args:
      result: of one database.
      sequence: the query, which must be the first row.
    Raises:
      AlignmentParseError: the tool's text breaks its own format.
      ToolOutputError: the first row is not the query, so the tool cut or changed it.
    """
    alignment = (parse_stockholm if result.format == "stockholm" else parse_a3m)(result.alignment)
    if alignment.letters[0].tobytes() != sequence.encode("ascii"):
        raise ToolOutputError(
            result.tool.name,
            f"the first row of its alignment ({alignment.letters.shape[1]} columns) is not the query "
            f"({len(sequence)} residues)",
        )
    hit_ids = [name.split(maxsplit=1)[0] if name.split() else "" for name in alignment.names]
    if result.format == "stockholm" and has_numbered_names(result.alignment):
        hit_ids = [_NUMBER_PREFIX.sub("", hit_id) for hit_id in hit_ids]
    scores = _target_scores(result.table)
    # The query row is in no table, even when the database holds a target of the same name.
    found = [(np.nan, np.nan)] + [
        scores.get(_RANGE.sub("", hit_id), (np.nan, np.nan)) for hit_id in hit_ids[1:]
    ]
    return DatabaseHits(
        alignment=alignment,
        hit_ids=hit_ids,
        e_values=np.array([e_value for e_value, _ in found], dtype=np.float64),
        bit_scores=np.array([bits for _, bits in found], dtype=np.float32),
    )


def _target_scores(table: bytes) -> dict[str, tuple[float, float]]:
    """Returns full-sequence E-value and bit score by target name from a ``--tblout`` table.

    Of targets that share a name the best comes first in the table and is the one kept.
    """
    scores: dict[str, tuple[float, float]] = {}
    for line in table.decode("utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=6)
        scores.setdefault(fields[0], (float(fields[4]), float(fields[5])))
    return scores


def merge(sequence: str, hits: Sequence[DatabaseHits], max_hits: Sequence[int | None]) -> MergedMsa:
    """Returns the merged alignment: caps, then order, then first occurrences.

    Letters decide equality (B differs from D), deletions do not: of two rows with equal letters the later one
    goes, whatever it had inserted.

    Args:
      sequence: the query, upper case.
      hits: per database, in merge order.
      max_hits: per database, most rows taken from its alignment with the query counted; None for all.
    """
    seen = {sequence.encode("ascii")}
    query = np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)[None]
    letters = [query]
    kept: list[NDArray[np.int64]] = []
    for one, cap in zip(hits, max_hits, strict=True):
        rows = one.alignment.letters[:cap]
        new: list[int] = []
        for index in range(len(rows)):
            key = rows[index].tobytes()
            if key not in seen:
                seen.add(key)
                new.append(index)
        kept.append(np.array(new, dtype=np.int64))
        letters.append(rows[kept[-1]])
    msa = alphabet.ENCODE[np.concatenate(letters)]
    deletions = np.zeros(msa.shape, dtype=np.int32)
    stop = 1
    for one, chosen in zip(hits, kept, strict=True):
        start, stop = stop, stop + len(chosen)
        one.alignment.sparse.write(chosen, deletions[start:stop])
    return MergedMsa(
        msa=msa,
        deletions=deletions,
        rows=_provenance(hits, kept),
        num_rows=tuple(len(rows) for rows in kept),
    )


def _provenance(hits: Sequence[DatabaseHits], kept: Sequence[NDArray[np.int64]]) -> RowProvenance:
    hit_ids = [QUERY_NAME] + [one.hit_ids[row] for one, rows in zip(hits, kept, strict=True) for row in rows]
    return RowProvenance(
        database=np.repeat(np.arange(-1, len(hits)), [1, *map(len, kept)]).astype(np.int16),
        e_value=np.concatenate(
            [[np.nan], *(one.e_values[rows] for one, rows in zip(hits, kept, strict=True))]
        ),
        bit_score=np.concatenate(
            [[np.nan], *(one.bit_scores[rows] for one, rows in zip(hits, kept, strict=True))]
        ).astype(np.float32),
        hit_id=hit_ids,
        species=[species_of(hit_id) for hit_id in hit_ids],
    )
