"""`Templates`: which known structures a search found for a record, and how their chains align with it.

This is the contract between whoever searches templates (pipelines) and the store. It owns what a hit says,
validity and the rules by which hits are chosen for a model; it parses nothing and knows no coordinates.
Invariant: an alignment is a list of runs, each a stretch of the query beside an equally long stretch of the
template's chain, so that a pair of residues is never guessed from letters.

Source: A. Abramson et al., Nature 630 (2024), supplementary information 2.4 and AlphaFold 3's
``data/templates.py`` (the rules of `Templates.select`).
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Days from this day on are how a release date is stored; `NO_DATE` where none is known.
EPOCH = datetime.date(1970, 1, 1)
NO_DATE = -(2**31)
ID_BYTES = 255
# Of a chain: the longest of the PDB has 8,563 residues, and predicted models have some ten thousands more.
MAX_TEMPLATE_RESIDUES = 100_000

# Name in a part -> name of the field and dtype of what every hit has one number of.
NUMBERS = {
    "template_e_value": "e_value",
    "template_score": "score",
    "template_probability": "probability",
    "template_sum_probs": "sum_probs",
    "template_resolution": "resolution_angstrom",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TemplateHit:
    """One alignment of the query with one chain of known structure.

    Attributes:
      template_id: of the chain as the database names it, e.g. ``4hhb_A``.
      sequence: of the whole chain as it was searched, upper case (SEQRES for the PDB).
      runs: int32 (num_runs, 3): first residue of the query, first residue of the template, number of pairs;
        from 0, increasing in both, not overlapping.
      release_date: of the structure; None when the database does not say it.
      resolution_angstrom: of the structure; None when there is none or it is not known.
      e_value: of this alignment (HMMER: independent E-value of the domain); None when the tool gives none.
      score: of this alignment in the tool's own unit (HMMER: bits); None when it gives none.
      probability: HHsearch's, percent; None for other tools.
      sum_probs: HHsearch's ``Sum_probs``, by which AlphaFold 2 sorts; None for other tools.
    """

    template_id: str
    sequence: str
    runs: NDArray[np.int32]
    release_date: datetime.date | None = None
    resolution_angstrom: float | None = None
    e_value: float | None = None
    score: float | None = None
    probability: float | None = None
    sum_probs: float | None = None

    def __post_init__(self) -> None:
        reason = self._problem()
        if reason is not None:
            raise ValueError(f"the template hit {self.template_id[:40]!r} is not valid: {reason}")

    @property
    def entry_id(self) -> str:
        """The entry, which is what stands before the last ``_``: ``4hhb`` of ``4hhb_A``."""
        return entry_of(self.template_id)

    @property
    def chain_id(self) -> str:
        """What stands behind the last ``_``; "" where the name has none."""
        return self.template_id.rpartition("_")[2] if "_" in self.template_id else ""

    @property
    def num_aligned(self) -> int:
        """Number of pairs of residues."""
        return int(self.runs[:, 2].sum())

    @property
    def query_span(self) -> tuple[int, int]:
        """The residues ``[start, stop)`` of the query from the first pair to the last."""
        return int(self.runs[0, 0]), int(self.runs[-1, 0] + self.runs[-1, 2])

    @property
    def template_span(self) -> tuple[int, int]:
        """The residues ``[start, stop)`` of the template from the first pair to the last."""
        return int(self.runs[0, 1]), int(self.runs[-1, 1] + self.runs[-1, 2])

    @property
    def matching_sequence(self) -> str:
        """The template's residues from the first pair to the last, those without a partner among them."""
        return self.sequence[slice(*self.template_span)]

    def pairs(self) -> NDArray[np.int32]:
        """Returns int32 (num_aligned, 2): residue of the query, residue of the template, from 0."""
        return pairs_of(self.runs)

    def index_map(self, length: int) -> NDArray[np.int32]:
        """Returns int32 (length,): the template's residue beside each residue of the query, -1 for none.

        Args:
          length: of the query.
        """
        found = np.full(length, -1, dtype=np.int32)
        pairs = self.pairs()
        found[pairs[:, 0]] = pairs[:, 1]
        return found

    def aligned_sequence(self, length: int) -> str:
        """Returns the template's letters in the query's columns, ``-`` where there is none."""
        letters = np.full(length, ord("-"), dtype=np.uint8)
        pairs = self.pairs()
        letters[pairs[:, 0]] = np.frombuffer(self.sequence.encode("ascii"), dtype=np.uint8)[pairs[:, 1]]
        return letters.tobytes().decode("ascii")

    def identity(self, query: str) -> float:
        """Returns the share of pairs whose two letters are equal."""
        pairs = self.pairs()
        ours, theirs = (np.frombuffer(text.encode("ascii"), np.uint8) for text in (query, self.sequence))
        return float(np.count_nonzero(ours[pairs[:, 0]] == theirs[pairs[:, 1]]) / len(pairs))

    def coverage(self, length: int) -> float:
        """Returns the share of the query's residues that have a partner."""
        return self.num_aligned / length

    def _problem(self) -> str | None:
        """Returns the first rule that is broken, or None."""
        if not self.template_id or len(self.template_id.encode("utf-8", "replace")) > ID_BYTES:
            return f"its name must be 1 to {ID_BYTES} bytes"
        if any(letter.isspace() or letter == "\0" for letter in self.template_id):
            return "its name holds a space or a zero byte"
        sequence = self.sequence
        if not (sequence.isascii() and sequence.isalpha() and sequence.isupper()):
            return "its sequence must be upper-case letters"
        if len(sequence) > MAX_TEMPLATE_RESIDUES:
            return f"its sequence has {len(sequence)} residues; the format holds {MAX_TEMPLATE_RESIDUES}"
        runs = self.runs
        if runs.dtype != np.int32 or runs.ndim != 2 or runs.shape[1] != 3 or not len(runs):
            return f"runs must be int32 (1 or more, 3), not {runs.dtype} {runs.shape}"
        wide = runs.astype(np.int64)
        ends = wide[:, :2] + wide[:, 2:]
        if (wide[:, 2] < 1).any() or (wide[:, :2] < 0).any() or (wide[1:, :2] < ends[:-1]).any():
            return "its runs must be of positive length and increase in query and template"
        if int(ends[-1, 1]) > len(sequence):
            return f"it aligns residue {int(ends[-1, 1])} of a template of {len(sequence)}"
        numbers = (getattr(self, name) for name in NUMBERS.values())
        if any(number is not None and not math.isfinite(number) for number in numbers):
            return "it holds a number that is not finite; what is not known is None"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Templates:
    """What a search for templates found, in the order in which the tool ranked it.

    Attributes:
      hits: best first; none where the search found nothing.
      source: small JSON-able facts: database, digest, tool, tool_version, msa (whose rows made the profile),
        num_hits (alignments that the tool returned), max_date (later ones were left out), ...
    """

    hits: tuple[TemplateHit, ...]
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Number of hits."""
        return len(self.hits)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the source and all hits, independent of how they are stored."""
        source = json.dumps(dict(self.source), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(source.encode())
        digest.update("\x00".join(hit.template_id for hit in self.hits).encode())
        digest.update("\x00".join(hit.sequence for hit in self.hits).encode())
        for values in arrays_of(self.hits).values():
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def reaches(self) -> int:
        """Returns the end of the last residue of the query that is aligned; 0 without hits."""
        return max((hit.query_span[1] for hit in self.hits), default=0)

    def select(
        self,
        query: str,
        *,
        max_date: datetime.date | str | None = None,
        max_hits: int | None = None,
        min_aligned_ratio: float | None = None,
        min_residues: int | None = None,
        max_subsequence_ratio: float | None = None,
        distinct: bool = False,
    ) -> Templates:
        """Returns the hits that pass all rules, in their order.

        AlphaFold 3 uses min_aligned_ratio 0.1, min_residues 10, max_subsequence_ratio 0.95, distinct True and
        max_hits 4 (20 are kept for training).

        Args:
          query: sequence of the record.
          max_date: released on that day or before; a hit of unknown date is left out, because it may be
            younger.
          max_hits: at most so many, after all other rules.
          min_aligned_ratio: hits with at most this share of the query's residues aligned are left out.
          min_residues: hits whose matching sequence is shorter are left out.
          max_subsequence_ratio: a hit whose matching sequence stands in the query and is longer than this
            share of it is left out: it is the query itself.
          distinct: of hits that put the same letters beside the query the first is kept.
        Raises:
          ValueError: ``max_date`` is no date.
        """
        day = None if max_date is None else to_date(max_date)
        kept: list[TemplateHit] = []
        seen: set[str] = set()
        for hit in self.hits:
            if max_hits is not None and len(kept) >= max_hits:
                break
            if day is not None and (hit.release_date is None or hit.release_date > day):
                continue
            if min_aligned_ratio is not None and hit.coverage(len(query)) <= min_aligned_ratio:
                continue
            matching = hit.matching_sequence
            if min_residues is not None and len(matching) < min_residues:
                continue
            share = len(matching) / len(query)
            if max_subsequence_ratio is not None and share > max_subsequence_ratio and matching in query:
                continue
            if distinct:
                letters = hit.aligned_sequence(len(query))
                if letters in seen:
                    continue
                seen.add(letters)
            kept.append(hit)
        return dataclasses.replace(self, hits=tuple(kept))


def arrays_of(hits: tuple[TemplateHit, ...]) -> dict[str, NDArray[Any]]:
    """Returns what is stored of hits, but for names and sequences, by the name of the array.

    Returns: for every hit template_release_date int32 (days since 1970-01-01, `NO_DATE` for none), the
      arrays of `NUMBERS` float64 (NaN for none), template_num_runs int32; and template_run int32 (runs, 3).
    """
    days = [NO_DATE if hit.release_date is None else (hit.release_date - EPOCH).days for hit in hits]
    found: dict[str, NDArray[Any]] = {"template_release_date": np.array(days, dtype="<i4")}
    for name, field in NUMBERS.items():
        values = [getattr(hit, field) for hit in hits]
        found[name] = np.array([math.nan if one is None else one for one in values], dtype="<f8")
    found["template_num_runs"] = np.array([len(hit.runs) for hit in hits], dtype="<i4")
    found["template_run"] = np.concatenate([np.empty((0, 3), dtype="<i4"), *(hit.runs for hit in hits)])
    return found


def pairs_of(runs: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns int32 (pairs, 2) of runs (num_runs, 3): residues of the query and their partners."""
    sizes = runs[:, 2].astype(np.int64)
    step = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return (np.repeat(runs[:, :2], sizes, axis=0) + step[:, None]).astype(np.int32)


def runs_of(pairs: NDArray[np.integer]) -> NDArray[np.int32]:
    """Returns int32 (num_runs, 3) of pairs (n, 2) that increase in both columns.

    (0, 4), (1, 5), (3, 6) gives (0, 4, 2), (3, 6, 1).
    """
    if not len(pairs):
        return np.empty((0, 3), dtype=np.int32)
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(pairs, axis=0) != 1).any(axis=1)]))
    sizes = np.diff(np.concatenate([starts, [len(pairs)]]))
    return np.concatenate([pairs[starts], sizes[:, None]], axis=1).astype(np.int32)


def entry_of(template_id: str) -> str:
    """Returns the entry of a chain's name; the name itself where it has no ``_``."""
    return template_id.rpartition("_")[0] or template_id


def date_of(days: int) -> datetime.date:
    """Returns the date so many days after `EPOCH`.

    Raises:
      OverflowError: it is no date of the calendar.
    """
    return EPOCH + datetime.timedelta(days=days)


def to_date(text: datetime.date | str) -> datetime.date:
    """Returns a date that may be spelled ``YYYY-MM-DD``.

    Raises:
      ValueError: it is no date.
    """
    if isinstance(text, datetime.date):
        return text
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no date; write YYYY-MM-DD") from error
