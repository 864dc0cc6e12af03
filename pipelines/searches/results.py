"""The result store: finished searches under the hash of what was searched, kept outside Beam.

Layout under its root, one pair of files per unit (query sequence x database):

    units/ab/UNIT_ID.zst    Zstandard frame: one JSON line, then the alignment, then the table
    units/ab/UNIT_ID.json   the receipt: checksum, sizes, tool, cost; written last, so it makes the unit
    visible

Owns names, checksums and atomic publication. Does not own what a result means. Invariants: a visible unit
is complete; the frame's bytes depend on the result alone (no times, no host, no paths), so two workers that
search the same unit write the same file and either may win.

Safe from any thread and process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Collection
from typing import Any

import zstandard

from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.errors import CorruptResultError
from foldfeed.pipelines.programs.subprocess_runner import Usage
from foldfeed.pipelines.searches.id_set import IdSet
from foldfeed.pipelines.tools.search_tool import SearchResult, ToolIdentity

# Alignments compress about fivefold at this level; higher ones cost more time than they save bytes.
ZSTD_LEVEL = 6


def unit_id_of(sequence: str, database_digest: str, tool_digest: str) -> str:
    """Returns the name of a unit of search: sha256 (hex) of everything its answer depends on."""
    words = ("foldfeed unit 1", sequence, database_digest, tool_digest)
    return hashlib.sha256("\x00".join(words).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchFacts:
    """Who searched what, beside the answer.

    Attributes:
      database: the name by which that build knew the database.
      database_digest: of its content.
      num_residues: length of the query.
      num_hits: rows of the answer but for the query.
      host: that searched.
      finished: when, UTC, ISO 8601.
      run_id: of the build's run.
      num_together: queries of the run that this one was searched in, itself among them; None where each has
        a run of its own.
      scan: what found the candidates before the tool: the kernel of the fast scan (`fast_scan.choice`), or
      the
        program or library and its version (`tools.scanner`); "" where the tool did itself.
    """

    database: str = ""
    database_digest: str = ""
    num_residues: int | None = None
    num_hits: int | None = None
    host: str = ""
    finished: str = ""
    run_id: str = ""
    num_together: int | None = None
    scan: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UnitReceipt:
    """What the store knows of an answer without reading it.

    Attributes:
      unit_id: its name.
      stored_bytes: its size here.
      tool: who made it.
      usage: what it cost.
      facts: who searched what; empty in receipts of older versions.
    """

    unit_id: str
    stored_bytes: int
    tool: ToolIdentity
    usage: Usage
    facts: SearchFacts


class ResultStore:
    """Search results under one folder or URL."""

    def __init__(self, url: str) -> None:
        self._blobs = open_blobs(url)
        self.url = self._blobs.url

    def put(self, unit_id: str, result: SearchResult, facts: SearchFacts | None = None) -> None:
        """Publishes a result; an existing one of that name is replaced by equal bytes.

        Args:
          unit_id: its name.
          result: the answer.
          facts: for the receipt; they do not change the answer's bytes.
        Raises:
          StorageFullError: no space left; the unit stays invisible.
        """
        payload = _pack(result)
        stored = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(payload)
        receipt = {
            "format": 1,
            "unit_id": unit_id,
            "payload_sha256": hashlib.sha256(payload).hexdigest(),
            "payload_bytes": len(payload),
            "stored_bytes": len(stored),
            "tool": dataclasses.asdict(result.tool),
            "usage": dataclasses.asdict(result.usage),
            "search": dataclasses.asdict(facts or SearchFacts()),
        }
        self._blobs.write_atomic(f"{_stem(unit_id)}.zst", stored)
        self._blobs.write_atomic(f"{_stem(unit_id)}.json", json.dumps(receipt).encode())

    def get(self, unit_id: str) -> SearchResult:
        """Returns a result after checking its checksum.

        Raises:
          KeyError: there is no such unit.
          CorruptResultError: its files are damaged.
        """
        try:
            receipt = json.loads(self._blobs.read(f"{_stem(unit_id)}.json"))
            stored = self._blobs.read(f"{_stem(unit_id)}.zst")
            payload = zstandard.ZstdDecompressor().decompress(
                stored, max_output_size=int(receipt["payload_bytes"]) + 1
            )
            if hashlib.sha256(payload).hexdigest() != receipt["payload_sha256"]:
                raise CorruptResultError(unit_id, "its checksum does not agree")
            return _unpack(payload, receipt)
        except FileNotFoundError as error:
            raise KeyError(unit_id) from error
        except (ValueError, TypeError, LookupError, zstandard.ZstdError) as error:
            raise CorruptResultError(unit_id, f"it cannot be read ({error})") from error

    def receipt(self, unit_id: str) -> UnitReceipt:
        """Returns what is known of an answer.

        Raises:
          KeyError: there is no such unit.
          CorruptResultError: its receipt is damaged.
        """
        try:
            fields = json.loads(self._blobs.read(f"{_stem(unit_id)}.json"))
            return UnitReceipt(
                unit_id=unit_id,
                stored_bytes=int(fields["stored_bytes"]),
                tool=_tool_of(fields),
                usage=Usage(**fields["usage"]),
                facts=SearchFacts(**fields.get("search", {})),
            )
        except FileNotFoundError as error:
            raise KeyError(unit_id) from error
        except (ValueError, TypeError, LookupError) as error:
            raise CorruptResultError(unit_id, f"its receipt cannot be read ({error})") from error

    def shows(self, unit_id: str) -> bool:
        """Returns whether a unit is visible, without reading its answer."""
        return self._blobs.exists(f"{_stem(unit_id)}.json")

    def holds(self, unit_id: str) -> bool:
        """Returns whether an undamaged result is there; a damaged one is as good as none."""
        try:
            self.get(unit_id)
        except (KeyError, CorruptResultError):
            return False
        return True

    def sample(self, count: int) -> list[UnitReceipt]:
        """Returns the receipts of some units, at most so many; damaged ones are left out."""
        names = sorted(
            name.removesuffix(".json")
            for folder in self._blobs.list("units")
            for name in self._blobs.list(f"units/{folder}")
            if name.endswith(".json")
        )
        step = -(-len(names) // count) if names else 1
        found = []
        for name in names[::step]:
            with contextlib.suppress(CorruptResultError):
                found.append(self.receipt(name))
        return found

    def count_present(self, unit_ids: IdSet) -> int:
        """Returns how many of the units are visible; memory is that of one folder's names."""
        found = 0
        for folder, names in unit_ids.buckets():
            visible = set(self._blobs.list(f"units/{folder}"))
            found += sum(f"{name}.json" in visible for name in names)
        return found

    def present(self, unit_ids: Collection[str]) -> set[str]:
        """Returns which of the units are visible, by listing folders and without reading any file."""
        found: set[str] = set()
        for folder in sorted({unit_id[:2] for unit_id in unit_ids}):
            names = self._blobs.list(f"units/{folder}")
            found.update(name.removesuffix(".json") for name in names if name.endswith(".json"))
        return found.intersection(unit_ids)


def _stem(unit_id: str) -> str:
    return f"units/{unit_id[:2]}/{unit_id}"


def _pack(result: SearchResult) -> bytes:
    head = {
        "format": result.format,
        "alignment_bytes": len(result.alignment),
        "table_bytes": len(result.table),
    }
    return json.dumps(head, sort_keys=True).encode() + b"\n" + result.alignment + result.table


def _unpack(payload: bytes, receipt: dict[str, Any]) -> SearchResult:
    line, _, body = payload.partition(b"\n")
    head = json.loads(line)
    return SearchResult(
        tool=_tool_of(receipt),
        format=head["format"],
        alignment=body[: head["alignment_bytes"]],
        table=body[head["alignment_bytes"] :],
        usage=Usage(**receipt["usage"]),
    )


def _tool_of(receipt: dict[str, Any]) -> ToolIdentity:
    tool = receipt["tool"]
    return ToolIdentity(**{**tool, "argv_template": tuple(tool["argv_template"])})
