"""What HHsearch and HHblits wrote (``.hhr``) as alignments of a query with chains.

Owns the format's blocks. Does not own what becomes of a hit (`format.templates`). Invariants: residues are
those of the sequences that are shown, counted by the numbers before and behind them; consensus, secondary
structure and confidence lines are looked at by nobody. HHsearch 3.3 prints no closing mark, so a text is
whole if every line of its table has its block and every block the aligned columns that it tells.

Pure functions without state: safe from any thread.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.format.templates import runs_of
from foldfeed.feature_store.parsers.a3m import shown
from foldfeed.feature_store.parsers.lines import Text, lines_of

_TABLE = re.compile(r"^ *No Hit +Prob ")
_TABLE_LINE = re.compile(r"^ *(\d+) \S")
_NUMBER = re.compile(r"^No (\d+)\s*$")
_FACTS = re.compile(r"([\w-]+)=(\S+?)%?(?:\s|$)")
# A sequence as it is shown: name, first residue, letters, last residue, (length).
_SHOWN = re.compile(r"^([QT]) (\S+)\s+(\d{1,9}) ([A-Za-z-]+)\s+(\d{1,9}) \((\d{1,9})\)\s*$")
_LEFT_OUT = re.compile(r"^(ss_|sa_|aa_|Consensus$)")
MAX_HITS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HhrHit:
    """One numbered block.

    Attributes:
      target: name of the target.
      description: what its header says behind the name.
      num_residues: of the target.
      first: its first residue in the alignment, from 0.
      residues: upper-case letters of it from there on, without gaps.
      runs: int32 (num_runs, 3) as in `TemplateHit`.
      probability: percent.
      e_value, score, sum_probs: as the block tells them.
    """

    target: str
    description: str
    num_residues: int
    first: int
    residues: str
    runs: NDArray[np.int32]
    probability: float
    e_value: float
    score: float
    sum_probs: float


@dataclasses.dataclass(slots=True)
class _Block:
    line: int
    header: str = ""
    facts: str = ""
    letters: dict[str, str] = dataclasses.field(default_factory=lambda: {"Q": "", "T": ""})
    first: dict[str, int] = dataclasses.field(default_factory=dict)
    last: dict[str, int] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def parse_hhr(text: Text, length: int) -> list[HhrHit]:
    """Returns the hits of a result, in the tool's order.

    Args:
      text: of the file.
      length: of the query.
    Raises:
      AlignmentParseError: the text is cut, breaks its format or is of a query of another length.
    """
    blocks: list[_Block] = []
    started = in_table = False
    num_announced = 0
    for number, raw in lines_of(text):
        line = raw.decode("utf-8", errors="replace").rstrip()
        if not line:
            continue
        if not started:
            if not line.startswith("Query "):
                raise AlignmentParseError("no result of HH-suite: expected 'Query' first", number)
            started = True
        elif not blocks and _TABLE.match(line):
            in_table = True
        elif in_table and not blocks and _TABLE_LINE.match(line):
            num_announced += 1
        elif _NUMBER.match(line):
            if len(blocks) >= MAX_HITS:
                raise AlignmentParseError(f"it has more than {MAX_HITS} hits", number)
            blocks.append(_Block(line=number))
        elif blocks:
            _add(blocks[-1], line, number)
    if not in_table or len(blocks) != num_announced:
        raise AlignmentParseError(
            f"its table has {num_announced} hits and {len(blocks)} alignments follow: the file was cut off"
        )
    return [_hit(block, length) for block in blocks]


def _add(block: _Block, line: str, number: int) -> None:
    if line.startswith(">"):
        block.header = line[1:].strip()
        return
    if line.startswith("Probab="):
        block.facts = line
        return
    found = _SHOWN.match(line)
    if found is None or _LEFT_OUT.match(found[2]):
        return
    kind, letters = found[1], found[4]
    first, last = int(found[3]), int(found[5])
    if kind in block.last and first != block.last[kind] + 1:
        raise AlignmentParseError(f"residue {first} does not follow {block.last[kind]}", number)
    if last - first + 1 != len(letters) - letters.count("-"):
        raise AlignmentParseError(f"residues {first} to {last} are not the letters between", number)
    block.first.setdefault(kind, first - 1)
    block.last[kind] = last
    block.sizes[kind] = int(found[6])
    block.letters[kind] += letters


def _hit(block: _Block, length: int) -> HhrHit:
    facts = dict(_FACTS.findall(block.facts))
    name, _, description = block.header.partition(" ")
    if not name or block.first.keys() != {"Q", "T"}:
        raise AlignmentParseError(f"the hit {shown(name)} has no header or no alignment", block.line)
    if block.sizes["Q"] != length:
        raise AlignmentParseError(
            f"the hit {shown(name)} is of a query of {block.sizes['Q']} residues, not {length}", block.line
        )
    query, target = (
        np.frombuffer(block.letters[kind].encode("ascii"), dtype=np.uint8) != ord("-") for kind in "QT"
    )
    if len(query) != len(target):
        raise AlignmentParseError(f"the two rows of the hit {shown(name)} differ in length", block.line)
    places = [np.cumsum(is_residue) - 1 for is_residue in (query, target)]
    both = query & target
    pairs = [place[both] + block.first[kind] for place, kind in zip(places, "QT", strict=True)]
    try:
        numbers = [float(facts[key]) for key in ("Probab", "E-value", "Score", "Sum_probs")]
        num_aligned = int(facts["Aligned_cols"])
    except (KeyError, ValueError) as error:
        raise AlignmentParseError(f"the hit {shown(name)} has no {error}", block.line) from error
    if num_aligned != int(both.sum()):
        raise AlignmentParseError(
            f"the hit {shown(name)} shows {int(both.sum())} of its {num_aligned} aligned columns", block.line
        )
    return HhrHit(
        target=name,
        description=description,
        num_residues=block.sizes["T"],
        first=block.first["T"],
        residues=block.letters["T"].replace("-", "").upper(),
        runs=runs_of(np.stack(pairs, axis=1)),
        probability=numbers[0],
        e_value=numbers[1],
        score=numbers[2],
        sum_probs=numbers[3],
    )
