"""What an import is made of: sources found by a scan, rejects, walking folders, bounded JSON.

A scan lists sources without reading alignments, so that records can be read one at a time in the order of
their ids. Owns no format. Invariants: a walk gives the same order on every machine; symbolic links to folders
are not followed, so a walk ends.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foldfeed.feature_store.exchange_errors import SourceFileError, SourceTooLargeError
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.importers.rows import ImportOptions
from foldfeed.feature_store.parsers.bounded_files import kind_of, read_head, stem_of
from foldfeed.feature_store.parsers.hit_names import first_word, make_id, name_in_file

# The JSON of a job has hundreds, with many templates some hundred thousand.
MAX_JSON_ITEMS = 5_000_000
MAX_JSON_DEPTH = 64

_JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)
_JSON_BLOCK = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
    """Something that could not become a record.

    Attributes:
      record_id: the id it would have had; "" when it was not known.
      where: the file or member.
      reason: what is wrong and what to do.
    """

    record_id: str
    where: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One record to be.

    Attributes:
      record_id: its id.
      where: file or folder, for messages.
      read: reads it; raises `FoldfeedError` or `OSError`.
      left_out: names of its alignments that the options leave out (made for pairing chains).
      renamed_from: the name that the source has, where an id cannot be that; "" where it is the id.
    """

    record_id: str
    where: str
    read: Callable[[], MsaRecord]
    left_out: tuple[str, ...] = ()
    renamed_from: str = ""


Found = Iterable[Source | Reject]


def source_of(
    name: str, where: str, read: Callable[[str], MsaRecord], left_out: tuple[str, ...] = ()
) -> Source:
    """Returns the source of a record that is called by a name; ``read`` is given the id that it gets."""
    record_id = make_id(name)
    renamed_from = "" if record_id == name_in_file(name) else name
    return Source(record_id, where, functools.partial(read, record_id), left_out, renamed_from)


def walk_files(root: Path, extensions: tuple[str, ...]) -> Iterator[Path]:
    """Yields files with one of the extensions, compressed ones too, in sorted order.

    Hidden files and folders are left out. A ``root`` that is a file is yielded whatever its name.
    """
    if not root.is_dir():
        yield root
        return
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and kind_of(path)[1] in extensions:
                yield path


def walk_folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields each folder at or below ``root`` and the names of its files, sorted, without hidden ones."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def plain_name(name: str) -> str:
    """Returns a file's name without a compression's extension: ``x.a3m.gz`` gives ``x.a3m``."""
    return "".join(kind_of(Path(name)))


def names_of_folders(folders: list[Path]) -> list[str]:
    """Returns what records of folders are called: their names, after the folder above if some agree."""
    short = [folder.resolve().name for folder in folders]
    if len(set(short)) == len(short):
        return short
    return [f"{folder.resolve().parent.name}_{folder.resolve().name}" for folder in folders]


def sub_folders(root: Path) -> list[Path]:
    """Returns the folders in a folder, sorted, without hidden ones."""
    with os.scandir(root) as entries:
        return sorted(
            Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def relative(path: Path, root: Path) -> str:
    """Returns a path relative to what was imported, or its name: the same on every machine."""
    return path.relative_to(root).as_posix() if path != root and path.is_relative_to(root) else path.name


def id_of_file(path: Path, options: ImportOptions, header: Callable[[bytes], str] | None = None) -> str:
    """Returns the record id that a file's alignment gets: its name as an id.

    Args, Raises: as `name_of_file`.
    """
    return make_id(name_of_file(path, options, header))


def name_of_file(path: Path, options: ImportOptions, header: Callable[[bytes], str] | None = None) -> str:
    """Returns what a file's alignment is called.

    Args:
      path: the file.
      options: say where ids come from.
      header: finds the query's header in the first bytes; None where the format has none.
    Raises:
      SourceFileError: no id can be made of it.
      OSError: the file cannot be read.
    """
    if options.id_from == "folder":
        name = path.resolve().parent.name
    elif options.id_from == "header":
        if header is None:
            raise SourceFileError(
                path.name, "this format has no headers to take an id from; use file or folder"
            )
        name = first_word(header(read_head(path)))
    else:
        name = stem_of(path)
    if not make_id(name):
        raise SourceFileError(path.name, f"no record id can be made from its {options.id_from}")
    return name


def load_json(data: bytes, where: str, max_items: int = MAX_JSON_ITEMS) -> Any:
    """Returns parsed JSON, when its structure is not absurdly large or deep for its purpose.

    Long strings are cheap; millions of tiny lists are not (3 bytes of text become 60 of memory), so what lies
    outside of strings is counted first.

    Raises:
      SourceTooLargeError: more than ``max_items`` values.
      SourceFileError: not JSON, or nested deeper than `MAX_JSON_DEPTH`.
    """
    # Checked before the search below, which remembers every string it finds.
    if data.count(b'"') > 4 * max_items:
        raise SourceTooLargeError(where, f"its JSON has more than {max_items} values")
    structure, num_strings = _JSON_STRING.subn(b"", data)
    num_items = num_strings + sum(structure.count(mark) for mark in (b",", b"[", b"{"))
    if num_items > max_items:
        raise SourceTooLargeError(where, f"its JSON has more than {max_items} values")
    if _depth(structure) > MAX_JSON_DEPTH:
        raise SourceFileError(where, f"its JSON is nested deeper than {MAX_JSON_DEPTH}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceFileError(where, f"it is not JSON ({error})") from error


def _depth(structure: bytes) -> int:
    """Returns how deep brackets nest in JSON without its strings."""
    step = np.zeros(256, dtype=np.int32)
    step[[ord("["), ord("{")]] = 1
    step[[ord("]"), ord("}")]] = -1
    depth = deepest = 0
    for start in range(0, len(structure), _JSON_BLOCK):
        block = np.frombuffer(
            structure, dtype=np.uint8, count=min(_JSON_BLOCK, len(structure) - start), offset=start
        )
        depths = np.cumsum(step[block], dtype=np.int64) + depth
        deepest, depth = max(deepest, int(depths.max())), int(depths[-1])
    return deepest
