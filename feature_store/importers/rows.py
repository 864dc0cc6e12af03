"""From parsed rows to an `MsaRecord`: merging, de-duplication, names, species, provenance.

Owns what is common to every format that can be imported. Does not own any format. Invariants: row 0 is the
query; a record depends on the source and the options only, so an import done again gives the same bytes.

De-duplication follows AlphaFold 2: databases in order, the first occurrence of each row of aligned letters
stays with its deletions; letters are compared, so B and D differ. ``none`` keeps every row, the repeated
query rows of further databases included, as OpenFold 3 does.

Source: AlphaFold 2 ``data/pipeline.py`` make_msa_features, ``data/msa_identifiers.py``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.exchange_errors import SourceTooLargeError, UnsupportedSourceError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.effective_rows import NEFF_MAX_ROWS
from foldfeed.feature_store.format.record import DatabaseUse, MsaRecord, RowProvenance
from foldfeed.feature_store.parsers.alignment import ParsedAlignment
from foldfeed.feature_store.parsers.bounded_files import DEFAULT_MAX_BYTES
from foldfeed.feature_store.parsers.hit_names import first_word, mmseqs_scores, species_of
from foldfeed.feature_store.parsers.mmcif.sequence import MODIFIED

TOOL = "import"
DEDUP = ("source", "rows", "none")
ID_FROM = ("auto", "file", "folder", "header")
A2M_COLUMNS = ("match", "query")


# The deepest alignments of today have about a million rows. A row costs some 600 bytes besides its residues.
MAX_IMPORT_ROWS = 4_000_000
_ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What the user may choose about an import.

    Attributes:
      dedup: ``source`` (what the format implies: layouts that merge databases drop repeated rows, single
        alignments keep theirs), ``rows`` (AlphaFold 2's rule everywhere) or ``none``.
      id_from: where record ids of single alignments come from: ``file`` name, ``folder`` name, first word of
        the query's ``header``, or ``auto`` (the file name).
      databases: names to take, in merge order; empty for AlphaFold 2's order and all that are there.
      max_hits: most rows of a database by name, its query row counted.
      paired: also take alignments meant for pairing chains (UniProt hits, ``pairedMsa``).
      a2m_columns: ``match`` (the format's own columns: upper case in the query) or ``query`` (every residue
        of the query, for files that write poorly aligned columns in lower case).
      empty_as_no_hits: an empty alignment file means "searched, nothing found" and not a failed run.
      max_bytes: most bytes of one file, decompressed.
      modified: letter of modified residues in mmCIF: ``parent`` (of what they were made from) or ``X``.
      model: of mmCIF entries with several; the first of the file when None.
      neff_max_rows: alignments up to that depth are stored with their N_eff; 0 for none.
    """

    dedup: str = "source"
    id_from: str = "auto"
    databases: tuple[str, ...] = ()
    max_hits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    paired: bool = False
    a2m_columns: str = "match"
    empty_as_no_hits: bool = False
    max_bytes: int = DEFAULT_MAX_BYTES
    modified: str = MODIFIED[0]
    model: int | None = None
    neff_max_rows: int = NEFF_MAX_ROWS

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dedup", DEDUP),
            ("id_from", ID_FROM),
            ("a2m_columns", A2M_COLUMNS),
            ("modified", MODIFIED),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes {self.max_bytes} must be at least 1")
        if self.neff_max_rows < 0:
            raise ValueError(f"neff_max_rows {self.neff_max_rows} must not be negative; 0 computes no N_eff")
        if any(cap < 1 for cap in self.max_hits.values()):
            raise ValueError(f"max_hits {dict(self.max_hits)} must be at least 1 each: the query counts")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseRows:
    """The rows that one database gave for one query.

    Attributes:
      name: of the database.
      alignment: rows in the source's order, the query first.
      hit_ids: name of every row without its description.
      e_values: float64 (num_rows,); NaN where the source has none.
      bit_scores: float32 (num_rows,); NaN where the source has none.
      species: UniProt mnemonic of every row or "".
      pairing_keys: of every row or "", see `RowProvenance`; empty where no row has one.
      tool: what made it, where the source says so.
      tool_version: as above.
    """

    name: str
    alignment: ParsedAlignment
    hit_ids: Sequence[str]
    e_values: NDArray[np.float64]
    bit_scores: NDArray[np.float32]
    species: Sequence[str]
    pairing_keys: Sequence[str] = ()
    tool: str = TOOL
    tool_version: str = ""


def rows_of(
    name: str,
    alignment: ParsedAlignment,
    *,
    hit_ids: Sequence[str] | None = None,
    pairing_keys: Sequence[str] = (),
    tool: str = TOOL,
    tool_version: str = "",
) -> DatabaseRows:
    """Returns rows with what their headers say.

    MMseqs2 headers (``NAME BITS IDENTITY E-VALUE ...``, tab separated) give E-values and bit scores.

    Args:
      name: of the database.
      alignment: as parsed.
      hit_ids: names where they are not the first words of the headers.
      pairing_keys: of every row, where the source pairs rows.
      tool: what made it.
      tool_version: as above.
    """
    ids = list(hit_ids) if hit_ids is not None else [first_word(header) for header in alignment.names]
    scores = np.array([mmseqs_scores(header) for header in alignment.names], dtype=np.float64)
    scores = scores.reshape(len(ids), 2)
    scores[:1] = np.nan
    return DatabaseRows(
        name=name,
        alignment=alignment,
        hit_ids=ids,
        e_values=np.ascontiguousarray(scores[:, 0]),
        bit_scores=scores[:, 1].astype(np.float32),
        species=[species_of(hit_id) for hit_id in ids],
        pairing_keys=pairing_keys,
        tool=tool,
        tool_version=tool_version,
    )


def check_depth(num_rows: int, where: str) -> None:
    """Raises unless an alignment of so many rows may enter memory.

    Raises:
      SourceTooLargeError: more than `MAX_IMPORT_ROWS`.
    """
    if num_rows > MAX_IMPORT_ROWS:
        raise SourceTooLargeError(where, f"it has more than {MAX_IMPORT_ROWS} rows")


def build_record(
    record_id: str,
    databases: Sequence[DatabaseRows],
    *,
    sequence: str | None = None,
    description: str = "",
    drop_repeats: bool = False,
    keep_pairs: bool = False,
    keep_query_rows: bool = True,
    max_hits: Mapping[str, int] | None = None,
    extra: Mapping[str, str] | None = None,
) -> MsaRecord:
    """Returns the record of the rows of one or more databases, one database after the other.

    Args:
      record_id: its id.
      databases: in merge order, at least one.
      sequence: the query, when the source states it apart from the rows.
      description: free text.
      drop_repeats: keep only the first of rows with equal letters.
      keep_pairs: but keep every row with a pairing key, which says something of its own.
      keep_query_rows: the first rows of further databases stay, although they are the query again.
      max_hits: most rows of a database, its query row counted.
      extra: further facts.
    Raises:
      UnsupportedSourceError: the query is no sequence, or the databases disagree about it.
      InvalidRecordError: the store cannot hold the record.
    """
    query = (
        sequence if sequence is not None else databases[0].alignment.letters[0].tobytes().decode("latin-1")
    )
    _check_queries(query, databases)
    repeats = _Repeats(query, keep_pairs) if drop_repeats else None
    kept = _choose(query, databases, repeats, keep_query_rows, max_hits or {})
    return _assemble(
        record_id,
        query,
        list(zip(databases, kept, strict=True)),
        np.repeat(np.arange(len(databases)), [len(rows) for rows in kept]),
        tuple(
            _use(one.name, one.tool, one.tool_version, len(one.hit_ids) - 1, len(rows))
            for one, rows in zip(databases, kept, strict=True)
        ),
        description,
        dict(extra or {}),
    )


def build_labelled_record(
    record_id: str,
    rows: DatabaseRows,
    labels: Sequence[str],
    *,
    description: str = "",
    drop_repeats: bool = False,
    max_hits: Mapping[str, int] | None = None,
    extra: Mapping[str, str] | None = None,
) -> MsaRecord:
    """Returns the record of one alignment whose rows each name their database; they keep their order.

    Args:
      record_id: its id.
      rows: the query first.
      labels: database of every row; that of the query is not used.
      description: free text.
      drop_repeats: keep only the first of rows with equal letters.
      max_hits: most rows of a database, the query counted.
      extra: further facts.
    Raises:
      UnsupportedSourceError: the query is no sequence.
      InvalidRecordError: the store cannot hold the record.
    """
    query = rows.alignment.letters[0].tobytes().decode("latin-1")
    _check_queries(query, [rows])
    names = list(dict.fromkeys(labels[1:]))
    code_of = {name: code for code, name in enumerate(names)}
    room = {name: (max_hits or {}).get(name, len(labels) + 1) - 1 for name in names}
    is_new = _Repeats(query) if drop_repeats else None
    kept: list[int] = []
    for row, label in enumerate(labels[1:], start=1):
        room[label] -= 1
        if room[label] >= 0 and (is_new is None or is_new(rows, row)):
            kept.append(row)
    codes = np.array([code_of[labels[row]] for row in kept], dtype=np.int64)
    hits = Counter(labels[1:])
    return _assemble(
        record_id,
        query,
        [(rows, np.array(kept, dtype=np.int64))],
        codes,
        tuple(
            _use(name, rows.tool, rows.tool_version, hits[name], int((codes == code).sum()))
            for name, code in code_of.items()
        ),
        description,
        dict(extra or {}),
    )


def _check_queries(query: str, databases: Sequence[DatabaseRows]) -> None:
    """Raises unless every database was searched with the query; rare letters may be written otherwise."""
    codes = alphabet.encode(query)
    if bool((codes >= alphabet.GAP).any()):
        position = int(np.argmax(codes >= alphabet.GAP))
        raise UnsupportedSourceError(
            f"the query has {query[position]!r} at residue {position + 1}; a record's sequence has "
            "upper-case "
            "residues only"
        )
    for one in databases:
        width = one.alignment.letters.shape[1]
        if width != len(query):
            raise UnsupportedSourceError(
                f"database {one.name!r} has alignments of {width} columns for a query of {len(query)} "
                "residues"
            )
        differs = alphabet.ENCODE[one.alignment.letters[0]] != codes
        if differs.any():
            raise UnsupportedSourceError(
                f"the first row of database {one.name!r} is not the query: they differ at residue "
                f"{int(np.argmax(differs)) + 1}"
            )


def _choose(
    query: str,
    databases: Sequence[DatabaseRows],
    is_new: _Repeats | None,
    keep_query_rows: bool,
    max_hits: Mapping[str, int],
) -> list[NDArray[np.int64]]:
    """Returns which rows of every database stay, besides the query row of the first."""
    kept = []
    for number, one in enumerate(databases):
        letters = one.alignment.letters[: max_hits.get(one.name)]
        rows = np.arange(0 if number and keep_query_rows else 1, len(letters))
        if is_new is not None:
            rows = np.array([row for row in rows.tolist() if is_new(one, row)], dtype=np.int64)
        kept.append(rows)
    return kept


class _Repeats:
    """Says of one row after the other whether its letters are new."""

    def __init__(self, query: str, keep_pairs: bool = False) -> None:
        self._keep_pairs = keep_pairs
        self._seen = {query.encode("latin-1", errors="replace")}

    def __call__(self, rows: DatabaseRows, row: int) -> bool:
        letters = rows.alignment.letters[row].tobytes()
        is_new = letters not in self._seen
        self._seen.add(letters)
        return is_new or bool(self._keep_pairs and rows.pairing_keys and rows.pairing_keys[row])


def _use(name: str, tool: str, tool_version: str, num_hits: int, num_rows: int) -> DatabaseUse:
    # Which release of a database was searched is in no file that others write, so there is no digest.
    return DatabaseUse(
        name=name,
        digest="",
        tool=tool,
        tool_version=tool_version,
        num_hits=max(0, num_hits),
        num_rows=num_rows,
    )


def _encoded(pieces: Sequence[tuple[NDArray[np.uint8], NDArray[np.int64]]], depth: int) -> NDArray[np.uint8]:
    """Returns codes (depth, length) of the chosen rows of all pieces; what row 0 holds is for the caller."""
    letters, rows = pieces[0]
    if len(pieces) == 1 and len(letters) == depth == len(rows) + 1 and letters.flags.writeable:
        # The whole of one alignment, which nobody reads again: its letters become codes where they are.
        for first in range(0, depth, _ROWS_AT_ONCE):
            block = letters[first : first + _ROWS_AT_ONCE]
            block[:] = alphabet.ENCODE[block]
        return letters
    msa = np.empty((depth, letters.shape[1]), dtype=np.uint8)
    start = 1
    for letters, rows in pieces:
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            chosen = rows[first : first + _ROWS_AT_ONCE]
            msa[start + first : start + first + len(chosen)] = alphabet.ENCODE[letters[chosen]]
        start += len(rows)
    return msa


def _pairing_keys(pieces: Sequence[tuple[DatabaseRows, NDArray[np.int64]]]) -> list[str]:
    """Returns the key of every row of a record, the query's first; an empty list when no source has keys."""
    if not any(one.pairing_keys for one, _ in pieces):
        return []
    first = pieces[0][0].pairing_keys
    keys = [first[0] if first else ""]
    for one, rows in pieces:
        keys += [one.pairing_keys[row] for row in rows] if one.pairing_keys else [""] * len(rows)
    return keys


def _assemble(
    record_id: str,
    query: str,
    pieces: Sequence[tuple[DatabaseRows, NDArray[np.int64]]],
    codes: NDArray[np.int64],
    uses: tuple[DatabaseUse, ...],
    description: str,
    extra: dict[str, str],
) -> MsaRecord:
    """Returns the record of the query row of the first piece and the chosen rows of all pieces.

    The letters of the pieces are used up.
    """
    if pieces[0][0].alignment.query_insertions:
        # AlphaFold 2 passes over such residues in silence; here the record says that its sequence lacks them.
        extra.setdefault("query_insertions", str(pieces[0][0].alignment.query_insertions))
    depth = 1 + len(codes)
    # Zeros are not touched before a count is written, and most of them never are.
    deletions = np.zeros((depth, len(query)), dtype=np.int32)
    pieces[0][0].alignment.sparse.write(np.zeros(1, dtype=np.int64), deletions[:1])
    start = 1
    for one, rows in pieces:
        one.alignment.sparse.write(rows, deletions[start : start + len(rows)])
        start += len(rows)
    msa = _encoded([(one.alignment.letters, rows) for one, rows in pieces], depth)
    msa[0] = alphabet.encode(query)
    return MsaRecord(
        record_id=record_id,
        description=description,
        sequence=query,
        msa=msa,
        deletions=deletions,
        rows=RowProvenance(
            database=np.concatenate([[-1], codes]).astype(np.int16),
            e_value=np.concatenate([[np.nan], *(one.e_values[rows] for one, rows in pieces)]),
            bit_score=np.concatenate([[np.nan], *(one.bit_scores[rows] for one, rows in pieces)]).astype(
                np.float32
            ),
            hit_id=[record_id, *(one.hit_ids[row] for one, rows in pieces for row in rows)],
            species=["", *(one.species[row] for one, rows in pieces for row in rows)],
            pairing_key=_pairing_keys(pieces),
        ),
        databases=uses,
        extra=extra,
    )
