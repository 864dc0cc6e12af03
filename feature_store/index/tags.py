"""Names and lifetimes of versions: tags that people give, and the oldest version that `gc` has left readable.

Owns ``tags/NAME.json`` and ``retention.json``. Does not own the versions themselves (`index`). Invariant:
these small files carry a checksum of their own content, and a tag names its commit by checksum too, so a tag
that is followed leads to the rows it was set on or to an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re

from foldfeed.feature_store.errors import CorruptDataError, StorageError, TagError
from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index.sealed import seal, unseal
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.presence import check_present
from foldfeed.feature_store.storage import Blobs, open_blobs
from foldfeed.feature_store.storage.contract import is_forbidden

TAG_FOLDER = "tags"
RETENTION_FILE = "retention.json"
# A tag never looks like a number, so that "3" always means version 3.
TAG_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """A name for a version.

    Attributes:
      name: see `TAG_NAME`.
      version: what it names.
      commit: checksum of that version's commit.
      message: of whoever set it.
      time: when, ISO 8601, UTC.
    """

    name: str
    version: int
    commit: str
    message: str
    time: str


def set_tag(
    store_url: str, name: str, version: int | None = None, *, message: str = "", move: bool = False
) -> Tag:
    """Names a version, the newest by default. Of two that set a name at once one wins.

    Raises:
      TagError: the name is not possible, or names another version and ``move`` is false.
      ValueError: there is no such version.
    """
    if not TAG_NAME.fullmatch(name):
        raise TagError(
            f"{name!r} cannot be a tag: a tag is a letter or _, then up to 127 of A-Z a-z 0-9 _ . -"
        )
    blobs = open_blobs(store_url)
    if version is not None:
        check_retained(blobs, version)
    head = Index.open(blobs.url, version).head
    tag = Tag(name=name, version=head.version, commit=head.checksum, message=message, time=index_log.now())
    data = seal(dataclasses.asdict(tag))
    if blobs.create_exclusive(_path(name), data):
        return tag
    with contextlib.suppress(CorruptDataError):
        found = read_tag(blobs, name)
        if found.commit == tag.commit:
            return found
    if not move:
        raise TagError(
            f"tag {name!r} exists already, for another version; choose another name, or move it on purpose"
        )
    blobs.write_atomic(_path(name), data)
    return tag


def delete_tag(store_url: str, name: str) -> None:
    """Forgets a tag; the version stays.

    Raises:
      TagError: there is none of that name.
    """
    blobs = open_blobs(store_url)
    if name not in tag_names(blobs):
        raise _unknown(blobs, name)
    blobs.delete(_path(name))


def read_tag(blobs: Blobs, name: str) -> Tag:
    """Returns a tag.

    Raises:
      TagError: there is none of that name.
      CorruptDataError: its file is damaged.
    """
    if not TAG_NAME.fullmatch(name):
        raise _unknown(blobs, name)
    try:
        data = blobs.read(_path(name))
    except FileNotFoundError as error:
        check_present(blobs, _path(name))
        raise _unknown(blobs, name) from error
    document = unseal(data, _path(name))
    try:
        return Tag(**document)
    except TypeError as error:
        raise CorruptDataError(_path(name), f"it does not hold a tag ({error})") from error


def tag_names(blobs: Blobs) -> list[str]:
    """Returns the names of all tags, sorted."""
    names = blobs.list(TAG_FOLDER)
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def list_tags(store_url: str) -> list[Tag]:
    """Returns all tags, sorted by version and name."""
    blobs = open_blobs(store_url)
    tags = [read_tag(blobs, name) for name in tag_names(blobs)]
    return sorted(tags, key=lambda tag: (tag.version, tag.name))


def open_index(store_url: str, version: int | str | None) -> Index:
    """Returns the index at a version, a tag, or the newest version.

    Raises:
      ValueError: there is no such version (any more), or no such tag (`TagError`).
      CorruptDataError: the tag was set on another history of this store.
    """
    blobs = open_blobs(store_url)
    if version is None:
        return Index.open(blobs.url, None)
    if isinstance(version, str) and not version.isdecimal():
        tag = read_tag(blobs, version)
        index = Index.open(blobs.url, tag.version)
        if index.head.checksum != tag.commit:
            raise CorruptDataError(
                _path(tag.name), f"it was set on another version {tag.version} than the one there is now"
            )
        return index
    check_retained(blobs, int(version))
    return Index.open(blobs.url, int(version))


def oldest_version(blobs: Blobs) -> int:
    """Returns the oldest version that `gc` promised to keep; 0 when it never removed any."""
    try:
        data = blobs.read(RETENTION_FILE)
    except FileNotFoundError:
        return 0
    except StorageError as error:
        if blobs.can_list or not is_forbidden(error):
            raise
        # A web server that denies what is not there. If the file is there, and the version that is asked for
        # was given up, then its files are missing, and that is said when they are read.
        return 0
    found = unseal(data, RETENTION_FILE).get("oldest_version")
    if not isinstance(found, int):
        raise CorruptDataError(RETENTION_FILE, f"oldest_version is {found!r}, not a number")
    return found


def set_oldest_version(blobs: Blobs, version: int) -> None:
    """Says that versions before this one, but for tagged ones, are no longer readable."""
    if version > oldest_version(blobs):
        blobs.write_atomic(RETENTION_FILE, seal({"oldest_version": version}))


def lower_oldest_version(blobs: Blobs, version: int) -> None:
    """Says that versions from this one on are readable, where a shorter history takes a longer one's place.

    Version numbers are given out again then, and none of the new ones has been given up. A damaged file stays
    as it is: `verify` reports it, and `gc` removes nothing until somebody has looked.
    """
    with contextlib.suppress(CorruptDataError):
        if oldest_version(blobs) > version:
            blobs.write_atomic(RETENTION_FILE, seal({"oldest_version": version}))


def check_retained(blobs: Blobs, version: int) -> None:
    """Raises ValueError for a version whose parts `gc` may have removed."""
    oldest = oldest_version(blobs)
    if 0 <= version < oldest and version not in {tag.version for tag in list_tags(blobs.url)}:
        raise ValueError(
            f"version {version} is no longer kept: gc removed what only versions before {oldest} named"
        )


def _path(name: str) -> str:
    return f"{TAG_FOLDER}/{name}.json"


def _unknown(blobs: Blobs, name: str) -> TagError:
    there = ", ".join(tag_names(blobs)) or "none"
    return TagError(f"there is no tag {name!r}; the tags of this store are: {there}")
