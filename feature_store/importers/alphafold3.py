"""AlphaFold 3's input JSON: every protein chain that carries its alignment becomes a record ``NAME_CHAIN``.

A chain's ``unpairedMsa`` is the alignment; ``pairedMsa`` (UniProt hits, for pairing chains) is taken only on
request and stays a database of its own. A chain without an alignment was not searched and is rejected; an
empty one means "searched for nothing" and gives a record of one row. RNA, DNA and ligands are not proteins
and are passed over. The file may be compressed; it is read whole, twice: for the ids and for the record.

``...MsaPath`` fields are followed only to files in the folder of the JSON or below it, so that a JSON from
elsewhere cannot name other files of this machine.

Source: AlphaFold 3 ``docs/input.md``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.exchange_errors import SourceFileError, UnsupportedSourceError
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.importers.rows import ImportOptions, build_record, rows_of
from foldfeed.feature_store.importers.sources import (
    Found,
    Reject,
    load_json,
    relative,
    source_of,
    walk_files,
)
from foldfeed.feature_store.importers.texts import read_alignment
from foldfeed.feature_store.parsers.alignment import ParsedAlignment
from foldfeed.feature_store.parsers.bounded_files import read_file, read_head, stem_of

UNPAIRED, PAIRED = "unpaired", "paired"
MAX_CHAINS = 100_000


def scan_alphafold3(root: Path, options: ImportOptions) -> Found:
    """Yields one source per protein chain of the JSON files at or below ``root``."""
    jobs = _Jobs(options)
    for path in walk_files(root, (".json",)):
        where = relative(path, root)
        try:
            if path != root and not is_alphafold3(read_head(path)):
                # AlphaFold 3 writes confidences and timings as JSON beside its inputs.
                continue
            chains = [(name, chain_id) for name, chain_id, _ in jobs.chains(path, where)]
        except (FoldfeedError, OSError) as error:
            yield Reject("", where, str(error))
            continue
        if not chains:
            yield Reject("", where, "it has no protein chain")
        for number, (name, chain_id) in enumerate(chains):
            # The only chain of a job is called by the job, as AlphaFold 2 calls a monomer by its target.
            full = name if len(chains) == 1 else f"{name}_{chain_id}"
            read = functools.partial(_read_chain, jobs, path, where, number)
            yield source_of(full, f"{where}:{chain_id}", read)


class _Jobs:
    """Reads job files; the last one stays, since the chains of a job are read one after the other."""

    def __init__(self, options: ImportOptions) -> None:
        self.options = options
        self._path: Path | None = None
        self._chains: list[tuple[str, str, dict[str, Any]]] = []

    def chains(self, path: Path, where: str) -> list[tuple[str, str, dict[str, Any]]]:
        """Returns job name, first chain id and the description of every protein chain."""
        if path != self._path:
            # The one before goes first: two at a time would double the memory.
            self._path, self._chains = None, []
            self._chains = list(_protein_chains(path, where, self.options))
            self._path = path
        return self._chains


def is_alphafold3(head: bytes) -> bool:
    """Returns whether a JSON text looks like AlphaFold 3's, from its beginning."""
    return head.lstrip()[:1] == b"{" and (b'"sequences"' in head or b'"alphafold3"' in head)


def _protein_chains(
    path: Path, where: str, options: ImportOptions
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields job name, first chain id and the description of every protein chain."""
    document = load_json(read_file(path, options.max_bytes), where)
    if isinstance(document, list):
        raise UnsupportedSourceError("it is a job list of AlphaFold Server, which holds no alignments")
    if not isinstance(document, dict) or not isinstance(document.get("sequences"), list):
        raise SourceFileError(where, "it is no AlphaFold 3 input: expected an object with a list 'sequences'")
    name = document.get("name")
    if len(document["sequences"]) > MAX_CHAINS:
        raise SourceFileError(where, f"it has more than {MAX_CHAINS} sequences")
    for entry in document["sequences"]:
        chain = entry.get("protein") if isinstance(entry, dict) else None
        if chain is None:
            continue
        ids = chain.get("id") if isinstance(chain, dict) else None
        first = ids[0] if isinstance(ids, list) and ids else ids
        if not isinstance(first, str) or not isinstance(chain.get("sequence"), str):
            raise SourceFileError(where, "a protein needs an 'id' (text or list of texts) and a 'sequence'")
        yield name if isinstance(name, str) and name else stem_of(path), first, chain


def _read_chain(jobs: _Jobs, path: Path, where: str, number: int, record_id: str) -> MsaRecord:
    chains = jobs.chains(path, where)
    if number >= len(chains):
        raise SourceFileError(where, "it changed while it was read")
    _, chain_id, chain = chains[number]
    return record_of_chain(record_id, chain, path, jobs.options, {"source": f"{where}:{chain_id}"})


def record_of_chain(
    record_id: str, chain: dict[str, Any], path: Path, options: ImportOptions, extra: dict[str, str]
) -> MsaRecord:
    """Returns the record of one ``protein`` object.

    Args:
      record_id: its id.
      chain: parsed JSON with ``sequence`` and the alignments.
      path: the JSON file; alignment paths are relative to it.
      options: of the import.
      extra: further facts.
    Raises:
      UnsupportedSourceError: the chain was not searched.
      SourceFileError, AlignmentParseError: an alignment cannot be used.
      InvalidRecordError: the store cannot hold the record.
    """
    sequence = chain["sequence"]
    texts = {UNPAIRED: _alignment_text(chain, "unpairedMsa", path, options)}
    if options.paired:
        texts[PAIRED] = _alignment_text(chain, "pairedMsa", path, options)
    if all(text is None for text in texts.values()):
        raise UnsupportedSourceError(
            "the chain has no unpairedMsa: it was not searched yet. Import the _data.json that AlphaFold 3 "
            "wrote "
            "after its data pipeline"
        )
    databases = []
    for name, text in texts.items():
        if text and text.strip():
            found = read_alignment(text, "a3m", name)
            databases.append(found.rows)
            extra = found.extra | extra
        else:
            databases.append(rows_of(name, _only(sequence)))
    description = chain.get("description")
    return build_record(
        record_id,
        databases,
        sequence=sequence,
        description=description if isinstance(description, str) else "",
        drop_repeats=options.dedup == "rows",
        keep_query_rows=False,
        max_hits=options.max_hits,
        extra={**extra, "source_format": "alphafold3-json"},
    )


def _only(sequence: str) -> ParsedAlignment:
    letters = np.frombuffer(sequence.encode("latin-1", errors="replace"), dtype=np.uint8)[None]
    return ParsedAlignment.dense(["query"], letters, np.zeros(letters.shape, dtype=np.int32))


def _alignment_text(chain: dict[str, Any], field: str, path: Path, options: ImportOptions) -> bytes | None:
    """Returns an alignment given inline or by path; None where there is none."""
    inline, linked = chain.get(field), chain.get(field + "Path")
    if inline is not None and linked is not None:
        raise SourceFileError(path.name, f"{field} and {field}Path exclude each other")
    if linked is not None:
        return _read_linked(linked, field, path, options)
    if inline is None:
        return None
    if not isinstance(inline, str):
        raise SourceFileError(path.name, f"{field} must be a text, not a {type(inline).__name__}")
    return inline.encode("utf-8", errors="replace")


def _read_linked(linked: Any, field: str, path: Path, options: ImportOptions) -> bytes:
    folder = path.resolve().parent
    try:
        target = (folder / linked).resolve() if isinstance(linked, str) else None
    except (ValueError, OSError, RuntimeError) as error:
        raise SourceFileError(path.name, f"{field}Path cannot be followed ({error})") from error
    if target is None or not target.is_relative_to(folder):
        raise SourceFileError(
            path.name,
            f"{field}Path {str(linked)[:80]!r} leads out of the folder of the JSON; put the file beside it",
        )
    return read_file(target, options.max_bytes)
