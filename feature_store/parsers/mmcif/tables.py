"""The tables of one mmCIF entry as columns: syntax, categories, numbers.

Owns the use of gemmi's parser and how its answers become typed errors. Does not own what the tables mean
(`foldfeed.feature_store.parsers.mmcif.entry`). Invariants: nothing is kept but the columns that are needed;
no array grows with the longest value of a column, so a hostile file takes memory in proportion to its size.
Pure functions, safe from any thread.

Source: the mmCIF (PDBx) dictionary; gemmi's documentation of ``gemmi.cif``.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import MissingExtraError, StructureParseError

ATOM_SITE = "_atom_site"
EXTRA = "structures"
MAX_SHOWN = 80
# Files of entries have one; those with definitions of ligands beside it a few.
MAX_BLOCKS = 1000

# Python's int() also takes "1_000" and digits of other alphabets.
_INTEGER = re.compile(r"[+-]?[0-9]{1,10}", re.ASCII)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_PLAIN_NUMBER = re.compile(r"[0-9]{1,10}(\.[0-9]{1,10})?", re.ASCII)
_BLOCK = re.compile(rb"(?:\A|\s)data_", re.IGNORECASE)
_PIECE_BYTES = 1 << 20
_LINE = re.compile(r"^(?:string|data)?:?(\d+)(?::\d+(?:\(\d+\))?)?(?: in [^:]*)?: (.*)$", re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column of a category, each distinct value once.

    Attributes:
      values: distinct values without their quotes, in order of first appearance; None for ``?`` and ``.``.
      codes: int64 (rows,), position in ``values``.
    """

    values: tuple[str | None, ...]
    codes: NDArray[np.int64]

    def each(self, of_value: Callable[[str | None], Any], dtype: Any) -> NDArray[Any]:
        """Returns (rows,) of what a function says about every value; it is called once per distinct value."""
        found = np.array([of_value(value) for value in self.values], dtype=dtype)
        return found[self.codes] if len(found) else np.zeros(0, dtype=dtype)

    def at(self, row: int) -> str | None:
        """Returns the value of one row."""
        return self.values[self.codes[row]]


def gemmi_module() -> Any:
    """Returns gemmi.

    Raises:
      MissingExtraError: it is not installed.
    """
    try:
        import gemmi
    except ImportError as error:
        raise MissingExtraError("gemmi", EXTRA) from error
    return gemmi


class Tables:
    """The categories of one data block, read by name."""

    def __init__(self, data: bytes, where: str) -> None:
        """Parses text.

        Args:
          data: mmCIF text, not compressed.
          where: for messages.
        Raises:
          StructureParseError: it is not CIF, or not exactly one of its data blocks has atoms.
          MissingExtraError: gemmi is not installed.
        """
        self.where = where
        self._cif = gemmi_module().cif
        _check_text(data, where)
        _check_blocks(data, where)
        try:
            document = self._cif.read_string(data)
        except (ValueError, RuntimeError) as error:
            # gemmi raises ValueError for syntax and RuntimeError for repeated names and missing values.
            raise _syntax_error(where, str(error)) from error
        blocks = [block for block in document if self._rows_in(block, ATOM_SITE)]
        if len(blocks) != 1:
            raise StructureParseError(
                where,
                f"{len(blocks)} of its {len(document)} data blocks have atoms; an entry is one block with "
                "one table of atoms",
                ATOM_SITE,
            )
        self._block = blocks[0]
        self.name: str = shorten(self._block.name.strip())

    def error(self, category: str, reason: str, row: int | None = None) -> StructureParseError:
        """Returns the error for a row (0-based) of a category, or for all of it."""
        return StructureParseError(self.where, reason, category, None if row is None else row + 1)

    def num_rows(self, category: str) -> int:
        """Returns the rows of a category; 0 when it is not there."""
        return self._rows_in(self._block, category)

    def column(self, category: str, item: str) -> Column | None:
        """Returns a column, or None when the file has none of that name."""
        raw = self._raw(category, item)
        if raw is None:
            return None
        seen: dict[str, int] = {}
        spelled = np.fromiter((seen.setdefault(text, len(seen)) for text in raw), dtype=np.int64)
        # One value may be spelled in several ways: with quotes and without, ? and .
        values: dict[str | None, int] = {}
        code = [values.setdefault(self._unquoted(text), len(values)) for text in seen]
        return Column(tuple(values), np.array(code, dtype=np.int64)[spelled])

    def need(self, category: str, item: str, fix: str = "give the file as it was deposited") -> Column:
        """Returns a column that must be there.

        Raises:
          StructureParseError: it is not.
        """
        found = self.column(category, item)
        if found is None:
            what = "it has no such column" if self.num_rows(category) else "the file has no such table"
            raise self.error(category, f"{what} ({category}.{item}); {fix}")
        return found

    def texts(self, category: str, item: str) -> list[str]:
        """Returns the values of a column that are given, in order; empty when there is none."""
        found = self.column(category, item)
        return [] if found is None else [text for code in found.codes if (text := found.values[code])]

    def numbers(self, category: str, item: str, missing: float | None = None) -> NDArray[np.float64]:
        """Returns float64 (rows,); NaN where the value is no number. A standard uncertainty is left out.

        Args:
          category: of the column.
          item: its name.
          missing: for rows that say ``?`` or ``.``, and for every row of a file without the column; None if
            they must be there.
        Raises:
          StructureParseError: there is no such column, and there must be.
        """
        raw = self._raw(category, item)
        if raw is None:
            if missing is None:
                self.need(category, item)
            return np.full(self.num_rows(category), missing, dtype=np.float64)
        number = self._cif.as_number
        found = np.fromiter((number(text) for text in raw), dtype=np.float64)
        if missing is not None:
            for row in np.flatnonzero(np.isnan(found)).tolist():
                if self._cif.is_null(raw[row]):
                    found[row] = missing
        return found

    def _rows_in(self, block: Any, category: str) -> int:
        try:
            return len(block.find_mmcif_category(category + "."))
        except RuntimeError as error:
            # gemmi's only reason: a loop that mixes items of two categories.
            raise self.error(
                category, f"its table is not one of a single category ({shorten(str(error))})"
            ) from error

    def _raw(self, category: str, item: str) -> Any:
        """Returns gemmi's column of texts as they are spelled, or None."""
        found = self._block.find([f"{category}.{item}"])
        return found.column(0) if found.width() else None

    def _unquoted(self, text: str) -> str | None:
        return None if self._cif.is_null(text) else self._cif.as_string(text)


def shorten(text: str) -> str:
    """Returns a value for a message, cut where a damaged file makes it endless."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def integer_of(text: str | None) -> int | None:
    """Returns a decimal integer of at most ten digits, or None for anything else."""
    return int(text) if text is not None and _INTEGER.fullmatch(text) else None


def day_of(text: str) -> str:
    """Returns a date as it is spelled, ``YYYY-MM-DD``.

    Raises:
      ValueError: it is spelled otherwise (Python also takes ``20200201`` and ``2020-W05-6``), or is no day.
    """
    if not _DAY.fullmatch(text):
        raise ValueError(f"{shorten(text)!r} is no date (YYYY-MM-DD)")
    return datetime.date.fromisoformat(text).isoformat()


def is_plain_number(text: str) -> bool:
    """Returns whether a text is a short decimal number as anybody writes it."""
    return _PLAIN_NUMBER.fullmatch(text) is not None


def _check_text(data: bytes, where: str) -> None:
    """Raises for bytes that are no text; gemmi takes any byte between quotes."""
    if data.isascii():
        return
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StructureParseError(where, f"byte {data[error.start]:#x} is no UTF-8", line=line) from error


def _check_blocks(data: bytes, where: str) -> None:
    """Raises for text of very many data blocks, whose names gemmi compares each with each (24 s for 8 MB)."""
    pieces = range(0, len(data), _PIECE_BYTES)
    if sum(data[start : start + _PIECE_BYTES].lower().count(b"data_") for start in pieces) <= MAX_BLOCKS:
        return
    if sum(1 for _ in itertools.islice(_BLOCK.finditer(data), MAX_BLOCKS + 1)) > MAX_BLOCKS:
        raise StructureParseError(
            where, f"it has more than {MAX_BLOCKS} data blocks; an entry is one of them"
        )


def _syntax_error(where: str, text: str) -> StructureParseError:
    found = _LINE.match(text)
    reason = shorten(found[2] if found else text)
    return StructureParseError(where, f"it is not CIF text ({reason})", line=int(found[1]) if found else None)
