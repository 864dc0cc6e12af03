"""Restores files of damaged parts, from another copy or from what the part still holds.

Owns the restoring of single files. Invariant: a file is written only if its bytes hash to what the part's
metadata says, and metadata only if it hashes to the part's name; so a restored part is the part, bit for bit,
or stays as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator

from foldfeed.feature_store.care.verify_parts import file_sha256
from foldfeed.feature_store.errors import NOT_DAMAGE, FoldfeedError
from foldfeed.feature_store.format.schema import GROUP_FILE, array_specs, chunk_entries_of, group_metadata
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.rebuild import rewritten
from foldfeed.feature_store.parts.shard_reader import ShardReader
from foldfeed.feature_store.parts.wanted import PARTS_FOLDER
from foldfeed.feature_store.parts.writer import PART_ID_HEX
from foldfeed.feature_store.storage import TEMPORARY_PREFIX, Blobs


def restore_part(
    blobs: Blobs, part_id: str, settings: StoreSettings, source: Blobs | None, dry_run: bool
) -> list[str]:
    """Restores what can be restored of a part, exactly; returns the paths of the files.

    Ways, in this order: another copy of the part; array metadata, which follows from the lengths; arrays that
    are derived from others (sidecars), by writing the part anew; the part's own metadata, from its intact
    files.

    Args:
      blobs: the store's files.
      part_id: the part.
      settings: of the store.
      source: another store that may have the part.
      dry_run: only find out what could be restored.
    """
    restored: list[str] = []

    def put(path: str, data: bytes) -> None:
        if not dry_run:
            blobs.write_atomic(f"{PARTS_FOLDER}/{part_id}/{path}", data)
        restored.append(f"{PARTS_FOLDER}/{part_id}/{path}")

    group = _group_bytes(blobs, part_id, settings, source)
    if group is None:
        return []
    if group != _read(blobs, f"{PARTS_FOLDER}/{part_id}/{GROUP_FILE}"):
        put(GROUP_FILE, group)
        if dry_run:
            # Without its metadata in place nothing else of the part can be looked at.
            return restored
    for finder in (_from_copy, _from_schema, _from_records):
        wrong = _wrong_files(blobs, part_id)
        if dry_run:
            wrong = {
                path: sha for path, sha in wrong.items() if f"{PARTS_FOLDER}/{part_id}/{path}" not in restored
            }
        if wrong:
            try:
                for path, data in finder(blobs, part_id, sorted(wrong), source):
                    if hashlib.sha256(data).hexdigest() == wrong[path]:
                        put(path, data)
            except NOT_DAMAGE:
                raise
            except FoldfeedError:
                # This way does not lead there; the next one may.
                continue
    return restored


def _wrong_files(blobs: Blobs, part_id: str) -> dict[str, str]:
    """Returns the sha256 that files should have and do not, by path."""
    part = PartReader(blobs, part_id)
    found = {}
    for path, entry in part.files.items():
        try:
            good = file_sha256(blobs, f"{part.path}/{path}") == entry["sha256"]
        except FileNotFoundError:
            good = False
        if not good:
            found[path] = entry["sha256"]
    return found


def _from_copy(
    blobs: Blobs, part_id: str, paths: list[str], source: Blobs | None
) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        data = _read(source, f"{PARTS_FOLDER}/{part_id}/{path}") if source is not None else None
        if data is not None:
            yield path, data


def _from_schema(
    blobs: Blobs, part_id: str, paths: list[str], source: Blobs | None
) -> Iterator[tuple[str, bytes]]:
    part = PartReader(blobs, part_id)
    for name, array in part.arrays.items():
        if f"{name}/{GROUP_FILE}" in paths:
            yield f"{name}/{GROUP_FILE}", array.spec.metadata(array.length)


def _from_records(
    blobs: Blobs, part_id: str, paths: list[str], source: Blobs | None
) -> Iterator[tuple[str, bytes]]:
    with rewritten(blobs, part_id) as (scratch, new_id):
        for path in paths:
            data = _read(scratch, f"{PARTS_FOLDER}/{new_id}/{path}")
            if data is not None:
                yield path, data


def _group_bytes(blobs: Blobs, part_id: str, settings: StoreSettings, source: Blobs | None) -> bytes | None:
    """Returns the part's own metadata: as it is, from a copy or made again; None: none hashes to its id."""
    path = f"{PARTS_FOLDER}/{part_id}/{GROUP_FILE}"
    makers: tuple[Callable[[], bytes | None], ...] = (
        lambda: _read(blobs, path),
        lambda: _read(source, path) if source is not None else None,
        lambda: _made_group(blobs, part_id, settings),
    )
    for make in makers:
        data = make()
        if data is not None and hashlib.sha256(data).hexdigest()[:PART_ID_HEX] == part_id:
            return data
    return None


def _made_group(blobs: Blobs, part_id: str, settings: StoreSettings) -> bytes | None:
    """Returns the metadata that a part of these files would have."""
    root = f"{PARTS_FOLDER}/{part_id}/"
    files, lengths, specs = {}, {}, array_specs(settings)
    for file in blobs.walk(root.rstrip("/")):
        path = file.path.removeprefix(root)
        if path != GROUP_FILE and not path.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX):
            files[path] = {"bytes": file.num_bytes, "sha256": file_sha256(blobs, file.path)}
    for name, spec in specs.items():
        data = _read(blobs, f"{root}{name}/{GROUP_FILE}")
        if data is None:
            # Written before that array came; or it is lost, and the result will not hash to the part's id.
            continue
        try:
            array = json.loads(data)
            lengths[name] = array["shape"][0]
            specs[name] = spec.with_entries(array["codecs"][0]["configuration"]["chunk_shape"][0])
        except (ValueError, KeyError, IndexError, TypeError):
            return None
    num_records = _count_lines(blobs, root, settings, lengths)
    if num_records is None:
        return None
    return group_metadata(settings, lengths, files, num_records, chunk_entries_of(specs))


def _count_lines(blobs: Blobs, root: str, settings: StoreSettings, lengths: dict[str, int]) -> int | None:
    """Returns how many records a part without metadata has, or None when that cannot be read."""
    if "record_json" not in lengths:
        return None
    spec = array_specs(settings)["record_json"]
    try:
        size = blobs.info(root + spec.shard_path).num_bytes
        array = ShardReader(blobs, root.rstrip("/"), spec, lengths["record_json"], size)
        return array.read(0, array.length).tobytes().count(b"\n")
    except NOT_DAMAGE:
        raise
    except (FoldfeedError, FileNotFoundError):
        return None


def _read(blobs: Blobs | None, path: str) -> bytes | None:
    try:
        return blobs.read(path) if blobs is not None else None
    except FileNotFoundError:
        return None
