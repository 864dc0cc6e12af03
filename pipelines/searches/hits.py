"""What one search found, parsed: rows, names and scores. Pure functions.

Owns what a tool's alignment and table say together. Does not own parsing of alignment text
(`foldfeed.feature_store.parsers`) or merging (`records.msa`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.feature_store.parsers.alignment import ParsedAlignment
from foldfeed.feature_store.parsers.hit_names import mmseqs_scores, taxonomy_id_of
from foldfeed.feature_store.parsers.stockholm import parse_stockholm, stockholm_descriptions
from foldfeed.pipelines.errors import ToolOutputError
from foldfeed.pipelines.tools.jackhmmer import has_numbered_names
from foldfeed.pipelines.tools.mmseqs_files import NAME as MMSEQS
from foldfeed.pipelines.tools.search_tool import SearchResult

_RANGE = re.compile(r"/\d+-\d+$")
_NUMBER_PREFIX = re.compile(r"^\d+\|")
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseHits:
    """What one database gave for one query, parsed.

    Attributes:
      alignment: rows in the tool's order, the query first.
      hit_ids: name of every row, without descriptions.
      e_values: float64 (num_rows,), of the whole target, of the row for MMseqs2; NaN where the tool gives
        none.
      bit_scores: float32 (num_rows,); NaN where the tool gives none.
      taxonomy_ids: int32 (num_rows,), 0 where the row's description tells none.
    """

    alignment: ParsedAlignment
    hit_ids: list[str]
    e_values: NDArray[np.float64]
    bit_scores: NDArray[np.float32]
    taxonomy_ids: NDArray[np.int32]

    @property
    def num_hits(self) -> int:
        """Rows that the search gave, the query not counted, with those that were not kept."""
        return len(self.hit_ids) - 1 + self.alignment.num_left_out


def read_hits(result: SearchResult, sequence: str, max_rows: int | None = None) -> DatabaseHits:
    """Returns the rows of a search result.

    Args:
      result: of one database.
      sequence: the query, which must be the first row.
      max_rows: of a Stockholm alignment, whose best rows come first, so many are kept with the query, so that
        a family with a hundred thousand relatives takes no more memory than its text; None keeps all.
    Raises:
      AlignmentParseError: the tool's text breaks its own format.
      ToolOutputError: the first row is not the query, so the tool cut or changed it.
    """
    if result.format == "stockholm":
        alignment = parse_stockholm(_blocks(result.alignment), keep_rows=max_rows)
    else:
        alignment = parse_a3m(result.alignment)
    if alignment.letters[0].tobytes() != sequence.encode("ascii"):
        raise ToolOutputError(
            result.tool.name,
            f"the first row of its alignment ({alignment.letters.shape[1]} columns) is not the query "
            f"({len(sequence)} residues)",
        )
    hit_ids = [name.split(maxsplit=1)[0] if name.split() else "" for name in alignment.names]
    if result.format == "stockholm" and has_numbered_names(result.alignment):
        hit_ids = [_NUMBER_PREFIX.sub("", hit_id) for hit_id in hit_ids]
    if result.tool.name == MMSEQS:
        # In the rows' headers; one target may have several rows, each with its own.
        rest = [mmseqs_scores(header) for header in alignment.names[1:]]
    else:
        scores = _target_scores(result.table)
        rest = [scores.get(_RANGE.sub("", hit_id), (np.nan, np.nan)) for hit_id in hit_ids[1:]]
    # The query row is in no table, even when the database holds a target of the same name.
    found = [(np.nan, np.nan), *rest]
    return DatabaseHits(
        alignment=alignment,
        hit_ids=hit_ids,
        e_values=np.array([e_value for e_value, _ in found], dtype=np.float64),
        bit_scores=np.array([bits for _, bits in found], dtype=np.float32),
        taxonomy_ids=_taxonomy_ids(result, alignment.names),
    )


def _taxonomy_ids(result: SearchResult, names: Sequence[str]) -> NDArray[np.int32]:
    if result.format == "stockholm":
        said = stockholm_descriptions(result.alignment)
        names = [f" {said.get(name, '')}" for name in names]
    # The query is given no description.
    return np.array([0, *map(taxonomy_id_of, names[1:])], dtype=np.int32)


def _blocks(text: bytes) -> Iterator[bytes]:
    """Yields a text in pieces, whose lines are then not in memory all at once."""
    return (text[start : start + _BLOCK_BYTES] for start in range(0, len(text), _BLOCK_BYTES))


def _target_scores(table: bytes) -> dict[str, tuple[float, float]]:
    """Returns full-sequence E-value and bit score by target name from a ``--tblout`` table.

    Of targets that share a name the best comes first in the table and is the one kept.
    """
    scores: dict[str, tuple[float, float]] = {}
    for line in table.decode("utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=6)
        scores.setdefault(fields[0], (float(fields[4]), float(fields[5])))
    return scores
