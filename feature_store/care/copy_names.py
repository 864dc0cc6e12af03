"""What `copy` takes along besides records: named sets, splits, and the tags of the version that is copied.

Owns which names travel and when two stores' names clash. Does not own parts and the index (`care.copy`).
Invariant: a name in the target never changes its meaning, and nothing is written before all names are known
not to clash. Sets and splits are the source's files byte for byte; a tag is made anew, because it names a
version of the target, and only where that version holds what the tagged one holds.
"""

from __future__ import annotations

import dataclasses

from foldfeed.feature_store.errors import NameTakenError
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.index.tags import Tag
from foldfeed.feature_store.storage import Blobs
from foldfeed.feature_store.store import named_tables, record_sets, splits

# A promise of a set names a split, so splits go first.
_FOLDERS = ((splits.FOLDER, splits.KIND), (record_sets.FOLDER, record_sets.KIND))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """The names of a store that a copy of one of its versions takes along.

    Attributes:
      files: sets and splits that the target lacks: their bytes by path.
      tags: of the version that is copied.
    """

    files: dict[str, bytes]
    tags: tuple[Tag, ...]


def collect_names(
    source: Blobs, target: Blobs, settings: StoreSettings, version: int, on_existing: str
) -> Names:
    """Returns what is to be copied; writes nothing.

    Args:
      source: store that is copied.
      target: store that is copied to.
      settings: of both.
      version: of the source.
      on_existing: with ``skip`` a name that means something else in the target stays what it is; otherwise
        that is an error, also with ``replace``.
    Raises:
      CorruptDataError: a set, a split or a tag of the source is damaged.
      NameTakenError: the target has a set or split of that name that means something else.
    """
    files: dict[str, bytes] = {}
    for folder, kind in _FOLDERS:
        there = set(named_tables.names(target, folder))
        for name in named_tables.names(source, folder):
            if name not in there:
                _load(source, settings, folder, name)
                files[f"{folder}/{name}{named_tables.SUFFIX}"] = source.read(
                    f"{folder}/{name}{named_tables.SUFFIX}"
                )
            elif on_existing != "skip" and _load(source, settings, folder, name) != _load(
                target, settings, folder, name
            ):
                raise NameTakenError(kind, name)
    tags = tuple(tag for tag in versions.list_tags(source.url) if tag.version == version)
    return Names(files=files, tags=tags)


def write_names(target: Blobs, names: Names, version: int | None) -> tuple[str, ...]:
    """Writes names into a store; returns their paths, those that were there already left out.

    Args:
      target: the store.
      names: of `collect_names`.
      version: of the target that holds what the source's version holds; None when there is none, and then no
        tag is set.
    Raises:
      TagError: a tag of that name exists for another version.
    """
    written = [path for path, data in names.files.items() if target.create_exclusive(path, data)]
    for tag in names.tags if version is not None else ():
        if tag.name not in versions.tag_names(target):
            written.append(f"{versions.TAG_FOLDER}/{tag.name}.json")
        versions.set_tag(target.url, tag.name, version, message=tag.message)
    return tuple(written)


def _load(blobs: Blobs, settings: StoreSettings, folder: str, name: str) -> tuple[object, ...]:
    """Returns what a set or split means; equal for two that mean the same."""
    if folder == splits.FOLDER:
        return (splits.load(blobs, name).fingerprint,)
    found = record_sets.load(blobs, settings, name)
    return (found.fingerprint, found.within)
