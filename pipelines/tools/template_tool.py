"""What a program that searches templates is to the rest of the pipeline, and what its answer says.

Owns the protocol, the database of a build's templates (`TemplateDatabase`) and the way from a stored answer
to hits. Does not own any program's flags. An answer is stored like any search's (`SearchResult`): the
alignment as the program wrote it, and in place of its table one JSON line for every row of the alignment with
what the row does not say: the chain's sequence, the day of its release, its resolution, hmmsearch's scores.

Invariant: an answer says all that a record needs, so whoever writes records needs no database.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.format.templates import TemplateHit
from foldfeed.feature_store.parsers.hhr import HhrHit, parse_hhr
from foldfeed.feature_store.parsers.hmmsearch import AlignedChain, parse_hmmsearch
from foldfeed.feature_store.parsers.lines import Text
from foldfeed.pipelines.errors import ToolOutputError
from foldfeed.pipelines.tools.search_tool import SearchResult, ToolIdentity

# Hits that a record keeps unless told otherwise: a model takes 4, training draws from 20, and a cut-off that
# is asked for later must find as many among those that are old enough.
DEFAULT_MAX_TEMPLATE_HITS = 200


class TemplateTool(Protocol):
    """A program that finds chains of known structure that are related to an alignment."""

    @property
    def identity(self) -> ToolIdentity:
        """Who answers."""
        ...

    @property
    def binary(self) -> str:
        """Absolute path of the executable."""
        ...

    def check(self) -> None:
        """Checks on a worker that it would run what the build was planned with, beside `binary`.

        Raises:
          ToolNotFoundError: it would not.
        """
        ...

    def search(self, sequence: str, rows: Sequence[bytes]) -> SearchResult:
        """Searches one alignment.

        Args:
          sequence: the query, upper case.
          rows: of A3M, the query first.
        Raises:
          SearchError: no usable result for this query.
          StorageFullError: no space for the tool's files.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TemplateDatabase:
    """The templates of a build, ready to search.

    Attributes:
      name: the user's name for them.
      digest: sha256 (hex) of the manifest, release dates among it.
      tool: what searches them.
      files: whose content the digest is of.
      msa: positions of the build's databases whose rows make the profile, in merge order.
      msa_name: these in a word, for the record: a database's name, or ``all``.
      max_hits: most hits that a record keeps.
      max_date: hits released later are not kept; None for all.
    """

    name: str
    digest: str
    tool: TemplateTool
    files: tuple[str, ...]
    msa: tuple[int, ...]
    msa_name: str
    max_hits: int
    max_date: datetime.date | None


def fact_line(**facts: Any) -> bytes:
    """Returns the JSON line of one row; equal facts give equal bytes."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def read_template_hits(result: SearchResult, sequence: str) -> tuple[list[TemplateHit], int]:
    """Returns the hits of an answer, in the tool's order, and how many rows its alignment has.

    Rows of nucleic acids (``mol:na`` in the PDB's file of sequences) and rows that put no residue beside the
    query are rows, but no hits.

    Args:
      result: of one search.
      sequence: the query.
    Raises:
      AlignmentParseError: the text breaks its format.
      ToolOutputError: the alignment and its facts are not of one search.
    """
    facts = [json.loads(line) for line in result.table.splitlines()]
    parse: Callable[[Text, int], Sequence[AlignedChain | HhrHit]] = (
        parse_hhr if result.format == "hhr" else parse_hmmsearch
    )
    rows = parse(result.alignment, len(sequence))
    if len(rows) != len(facts):
        raise ToolOutputError(result.tool.name, f"its answer has {len(rows)} rows and facts of {len(facts)}")
    hits = []
    for row, fact in zip(rows, facts, strict=True):
        is_nucleic = row.description.startswith("mol:") and not row.description.startswith("mol:protein")
        if not is_nucleic and len(row.runs):
            hits.append(_hit(row, fact))
    return hits, len(rows)


def _hit(row: AlignedChain | HhrHit, fact: dict[str, Any]) -> TemplateHit:
    date = fact.pop("release_date")
    if isinstance(row, HhrHit):
        names = ("e_value", "score", "probability", "sum_probs")
        fact |= {name: getattr(row, name) for name in names}
    try:
        return TemplateHit(
            template_id=row.target,
            runs=row.runs,
            release_date=None if date is None else datetime.date.fromisoformat(date),
            **fact,
        )
    except (TypeError, ValueError) as error:
        raise AlignmentParseError(f"the hit {row.target!r} cannot be: {error}") from error
