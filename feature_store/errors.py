"""The error tree of foldfeed: what can go wrong, in terms a user can act on.

    FoldfeedError
    ├── StoreError                    something about a store on disk or in a bucket
    │   ├── NotAStoreError            the URL holds no foldfeed store
    │   │   └── StoreGoneError        it did when it was opened; it was moved or deleted since
    │   ├── StoreUrlError             a kind of storage that cannot be reached from here
    │   ├── StoreSettingsError        the store exists with other settings than those asked for
    │   ├── FormatVersionError        written by a format this reader does not know
    │   ├── CorruptDataError          a checksum, a size or an index does not agree
    │   ├── CommitConflictError       the same record id with other content is already there
    │   ├── CommitContentionError     others kept committing; ours never got its turn
    │   ├── HistoryChangedError       a repair went back behind the version that is open
    │   ├── TagError                  a tag's name, or what it names, is not possible
    │   ├── StorageFullError          no space left where we must write
    │   ├── StorageError              the network or the storage failed, however often it was tried
    │   ├── StorageRefusedError       this kind of storage cannot do that, or not safely
    │   ├── ForkedProcessError        a forked child cannot open or change a local store
    │   ├── NameTakenError            a record set or split of that name means something else
    │   └── RecordSetMismatchError    this version holds other content for records of a set
    ├── LeakageError (ValueError)            a cluster or a sequence lies in two parts of a split
    ├── SplitError (ValueError)              clusters or fractions from which no split can be made
    ├── NameNotFoundError (KeyError)         no record set or split of that name
    ├── RecordNotFoundError (KeyError)
    ├── InvalidRecordError (ValueError)      a record that the format cannot hold
    ├── AlignmentParseError (ValueError)     A3M or Stockholm text that breaks its own rules
    ├── StructureParseError (ValueError)     mmCIF text that breaks its own rules, or ours
    ├── QueryError (ValueError)              SQL or column names the index does not understand
    │   └── QueryTimeoutError             a query ran longer than it was allowed to
    ├── MissingExtraError (ImportError)      an optional dependency is not installed
    └── (pipelines.errors, loader.errors, trainer.errors add their own branches)

Every message names the offending value, the rule it breaks and what to do. Errors carry the values as
fields, so that callers need not parse text. This module imports nothing of ours and owns no behaviour but
this: every error survives pickling.
"""

from __future__ import annotations

import functools
from typing import Any, Self

# The optional dependency of tables and arrays for pandas, polars and xarray.
ANALYSIS_EXTRA = "analysis"


class FoldfeedError(Exception):
    """Base of every error that foldfeed raises on purpose.

    Errors cross processes: a copy is made from what the constructor was given, so the fields and the message
    survive pickling, whatever arguments a class takes.
    """

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **named: Any) -> Self:
        """Keeps what the error is made of."""
        error = super().__new__(cls, *args)
        error._given = (args, named)
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        args, named = self._given
        return functools.partial(type(self), *args, **named), ()


class StoreError(FoldfeedError):
    """Something is wrong with a store as a whole."""


class NotAStoreError(StoreError):
    """The URL does not hold a foldfeed store.

    Attributes:
      url: what was opened.
      reason: what is missing or in the way there.
    """

    def __init__(self, url: str, reason: str) -> None:
        self.url = url
        self.reason = reason
        super().__init__(
            f"{url!r} is not a foldfeed store: {reason}. "
            "Give the folder that `foldfeed build --store` wrote (it holds foldfeed.json, index/ and parts/)."
        )


class StoreGoneError(NotAStoreError):
    """A store that was open is no longer where it was: moved, deleted or unmounted.

    What was read before is right. A file that is missing from a store that is still there is a
    `CorruptDataError`.

    Attributes:
      url: where it was opened.
      path: the file of it that was to be read.
    """

    def __init__(self, url: str, path: str) -> None:
        self.url = url
        self.path = path
        self.reason = "nothing of the store is there any more"
        StoreError.__init__(
            self,
            f"the store at {url!r} is gone: {path!r} cannot be read, and neither foldfeed.json nor index/ "
            "nor parts/ is there any more. It was moved, deleted or unmounted while it was open here; open "
            "it again at its new place",
        )


class StoreUrlError(StoreError):
    """A URL whose kind of storage cannot be reached from here.

    Attributes:
      url: what was given.
      reason: what is unknown or missing.
    """

    def __init__(self, url: str, reason: str) -> None:
        self.url = url
        self.reason = reason
        super().__init__(
            f"{url!r} cannot be opened: {reason}. Give a local path, or a URL that fsspec knows (s3://, "
            "gs://, ...) and install the package it names."
        )


class StoreSettingsError(StoreError):
    """A store exists already, with other settings than the ones asked for."""


class FormatVersionError(StoreError):
    """The store's format version is not one that this software reads.

    Attributes:
      url: the store.
      found: its version.
      supported: the versions this software reads.
    """

    def __init__(self, url: str, found: object, supported: tuple[int, ...]) -> None:
        self.url = url
        self.found = found
        self.supported = supported
        super().__init__(
            f"{url!r} has format version {found!r}; this foldfeed reads {list(supported)}. "
            "Install the foldfeed release that wrote it, or a newer one."
        )


class CorruptDataError(StoreError):
    """Stored bytes are not what was written.

    Attributes:
      where: part, array and chunk, or file.
      reason: which check failed.
    """

    def __init__(self, where: str, reason: str) -> None:
        self.where = where
        self.reason = reason
        super().__init__(f"corrupt data in {where}: {reason}. Restore that part from a copy or rebuild it.")


class CommitConflictError(StoreError):
    """A commit would give a record id a second meaning."""


class CommitContentionError(StoreError):
    """Others kept committing and ours lost every race. Nothing was committed; try again.

    Attributes:
      url: the store.
      attempts: how often it was tried.
      seconds: for how long.
    """

    def __init__(self, url: str, attempts: int, seconds: float) -> None:
        self.url = url
        self.attempts = attempts
        self.seconds = seconds
        super().__init__(
            f"{url!r}: {attempts} attempts to commit in {seconds:.0f} s all lost against other commits; "
            "run the command again, with fewer and larger commits at the same time"
        )


class HistoryChangedError(StoreError):
    """The version that is open is no longer part of the store's history: a repair went back behind it.

    Nothing was written. What the open object shows may be gone, and whoever opens the store again sees what
    there is.

    Attributes:
      url: the store.
      version: that was open.
    """

    def __init__(self, url: str, version: int) -> None:
        self.url = url
        self.version = version
        super().__init__(
            f"{url!r}: version {version}, which is open here, is no longer what it was when it was opened: "
            "the history was changed, as `repair --roll-back` and `--rebuild-index` do. Nothing was written; "
            "open the store again and repeat what you did"
        )


class TagError(StoreError, ValueError):
    """A tag cannot be set or followed."""


class StorageFullError(StoreError):
    """There was no space left to write.

    Attributes:
      path: the file or folder that was being written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"no space left on the device while writing {path!r}. Nothing of this write is visible in the "
            "store; free some space and run the same command again."
        )


class StorageError(StoreError):
    """Storage behind a network failed: after a bounded number of attempts, or at once where it said no.

    It says nothing about what is stored, so nobody may take it for damage.

    Attributes:
      url: the file or folder.
      operation: what was tried, e.g. ``read``.
      attempts: how often.
      cause: what the last attempt met.
    """

    def __init__(self, url: str, operation: str, attempts: int, cause: str) -> None:
        self.url = url
        self.operation = operation
        self.attempts = attempts
        self.cause = cause
        times = "once" if attempts == 1 else f"{attempts} times"
        super().__init__(
            f"{operation} {url!r} failed {times}; the last time: {cause}. Check the network, the credentials "
            "and the endpoint, then run the same command again; FOLDFEED_STORAGE_ATTEMPTS sets how often a "
            "request is tried"
        )


class StorageRefusedError(StoreError):
    """A kind of storage that cannot do what was asked, or not without the risk of losing something.

    Attributes:
      url: the store or file.
      operation: what was asked.
      reason: why not, and what to do instead.
    """

    def __init__(self, url: str, operation: str, reason: str) -> None:
        self.url = url
        self.operation = operation
        self.reason = reason
        super().__init__(f"cannot {operation} {url!r}: {reason}")


class ForkedProcessError(StoreError):
    """A local store was to be opened or changed in a forked child of a process that had opened one.

    Attributes:
      url: the store.
      process: id of this process.
      parent: id of the one that had used Delta's library.
    """

    def __init__(self, url: str, process: int, parent: int) -> None:
        self.url = url
        self.process = process
        self.parent = parent
        super().__init__(
            f"{url!r} cannot be opened or changed here: process {process} was forked from {parent}, "
            "which had opened a store, and Delta's library does not survive that. Reading a store that was "
            "opened before the fork works; for the rest start processes with 'spawn' or 'forkserver'"
        )


# What goes wrong on the way to a store. Whoever takes errors for damage lets these pass.
NOT_DAMAGE = (
    StorageError,
    StorageRefusedError,
    StorageFullError,
    StoreGoneError,
    HistoryChangedError,
    ForkedProcessError,
)


class NameTakenError(StoreError):
    """A record set or a split of that name exists and means something else.

    Attributes:
      kind: ``record set`` or ``split``.
      name: the name.
    """

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        super().__init__(
            f"a {kind} {name!r} exists with other content; a name never changes its meaning, choose another"
        )


class RecordSetMismatchError(StoreError):
    """A version of the store does not hold the records of a set as they were when it was saved.

    Attributes:
      name: the set.
      version: of the store that is open.
      saved_version: of the store when the set was saved.
      missing: ids that this version does not have.
      changed: ids that it has with other content.
    """

    def __init__(
        self, name: str, version: int, saved_version: int, missing: tuple[str, ...], changed: tuple[str, ...]
    ) -> None:
        self.name = name
        self.version = version
        self.saved_version = saved_version
        self.missing = missing
        self.changed = changed
        super().__init__(
            f"record set {name!r} does not fit version {version}: {len(missing)} of its records are missing "
            f"and {len(changed)} have other content, e.g. {(*missing, *changed)[0]!r}. Open version "
            f"{saved_version}, from which it was saved, or save a new set"
        )


class LeakageError(FoldfeedError, ValueError):
    """Something that must stay on one side of a split is on two.

    Attributes:
      items: record ids, clusters or sequences at fault, sorted.
    """

    def __init__(self, reason: str, items: tuple[str, ...]) -> None:
        self.reason = reason
        self.items = items
        super().__init__(f"{reason} ({len(items)} such, e.g. {items[0]!r})")


class SplitError(FoldfeedError, ValueError):
    """Clusters or fractions from which no split can be made."""


class NameNotFoundError(FoldfeedError, KeyError):
    """No record set or split of that name in the store.

    Attributes:
      kind: ``record set`` or ``split``.
      name: the name asked for.
      known: the names there are.
    """

    def __init__(self, kind: str, name: str, known: tuple[str, ...]) -> None:
        self.kind = kind
        self.name = name
        self.known = known
        there = f"there are {', '.join(map(repr, known))}" if known else "the store has none"
        self.message = f"no {kind} {name!r}; {there}"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class RecordNotFoundError(FoldfeedError, KeyError):
    """No record of that id in this version of the store.

    Attributes:
      record_id: the id asked for.
      close: up to three ids that look like it.
    """

    def __init__(self, record_id: str, close: tuple[str, ...] = ()) -> None:
        self.record_id = record_id
        self.close = close
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        # KeyError prints the repr of its argument; __str__ below keeps the sentence readable.
        self.message = f"no record {record_id!r} in this store.{hint}"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class InvalidRecordError(FoldfeedError, ValueError):
    """A record that the format cannot hold.

    Attributes:
      record_id: the record.
      reason: the rule it breaks.
    """

    def __init__(self, record_id: str, reason: str) -> None:
        self.record_id = record_id
        self.reason = reason
        super().__init__(f"record {record_id!r} cannot be stored: {reason}")


class AlignmentParseError(FoldfeedError, ValueError):
    """Alignment text that breaks the rules of its own format.

    Attributes:
      reason: what is wrong.
      line: 1-based line number, or None when the whole text is at fault.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        self.reason = reason
        self.line = line
        super().__init__(f"line {line}: {reason}" if line is not None else reason)


class StructureParseError(FoldfeedError, ValueError):
    """A coordinate file that breaks the rules of its format, or says too little to be used.

    Attributes:
      where: the file.
      reason: the value, the rule it breaks and what to do.
      category: the mmCIF category at fault, e.g. ``_atom_site``; "" for the file as a whole.
      row: 1-based row of that category, or None.
      line: 1-based line of the file where the syntax is at fault, or None.
    """

    def __init__(
        self, where: str, reason: str, category: str = "", row: int | None = None, line: int | None = None
    ) -> None:
        self.where = where
        self.reason = reason
        self.category = category
        self.row = row
        self.line = line
        place = [where, *([f"line {line}"] if line is not None else []), *([category] if category else [])]
        super().__init__(f"{', '.join(place)}{f' row {row}' if row is not None else ''}: {reason}")


class QueryError(FoldfeedError, ValueError):
    """SQL, a column or a predicate that the index does not understand."""


class QueryTimeoutError(QueryError):
    """A query ran longer than it was allowed to, and was stopped; nothing of it still runs.

    Attributes:
      timeout_s: the limit, seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        super().__init__(
            f"the query was stopped after its limit of {timeout_s:g} s; ask about fewer records (record_id = "
            "'...' or rows_of), for fewer columns, or allow more time (timeout_s, --timeout)"
        )


class MissingExtraError(FoldfeedError, ImportError):
    """A command needs an optional dependency that is not installed.

    Attributes:
      package: the missing import.
      extra: the extra of foldfeed that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(f"{package} is not installed; run: pip install 'foldfeed[{extra}]'")
