"""Merging: the rows of several databases become one alignment, as AlphaFold 2 merges them.

Owns caps, de-duplication, order and where every row came from. Does not own parsing of alignment text. Pure
functions. Invariants: row 0 is the query; no two rows have equal letters; a row keeps the deletions and the
provenance of its first occurrence.

Source: AlphaFold 2 ``data/pipeline.py`` make_msa_features, ``data/parsers.py`` truncate_stockholm_msa,
``data/msa_identifiers.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.record import RowProvenance
from foldfeed.feature_store.parsers.hit_names import species_of
from foldfeed.pipelines.searches.hits import DatabaseHits
from foldfeed.pipelines.tools.search_tool import QUERY_NAME


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
        taxonomy_id=np.concatenate(
            [[0], *(one.taxonomy_ids[rows] for one, rows in zip(hits, kept, strict=True))]
        ).astype(np.int32),
    )
