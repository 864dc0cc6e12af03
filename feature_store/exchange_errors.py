"""Errors of import and export, a branch of the tree in `foldfeed.feature_store.errors`.

    FoldfeedError
    └── ExchangeError (ValueError)
        ├── LayoutError            the path does not hold the layout that was asked for (or any known one)
        ├── SourceFileError        one file cannot be read as what it claims to be
        │   ├── SourceTooLargeError    it is larger, or decompresses to more, than the limit
        │   └── UnsafePickleError      a pickle that holds more than arrays and plain containers
        ├── UnsupportedSourceError one record is well formed but is nothing this store keeps (a complex, RNA)
        └── ExportError            the target format cannot hold the record

A bad record is reported and does not stop the others; a `LayoutError` does. Owns no behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence

from foldfeed.feature_store.errors import FoldfeedError


class ExchangeError(FoldfeedError, ValueError):
    """Base of what can go wrong between this store and other programs' files."""


class LayoutError(ExchangeError):
    """A path does not hold the layout.

    Attributes:
      path: what was looked at.
      looked_for: what would have been recognised, one entry per layout.
    """

    def __init__(self, path: str, reason: str, looked_for: Sequence[str] = ()) -> None:
        self.path = path
        self.reason = reason
        self.looked_for = tuple(looked_for)
        listing = "".join(f"\n  {line}" for line in looked_for)
        super().__init__(f"{path!r}: {reason}{listing}")


class SourceFileError(ExchangeError):
    """A file that is not what it claims to be.

    Attributes:
      where: the file, or the member of it.
      reason: what is wrong.
    """

    def __init__(self, where: str, reason: str) -> None:
        self.where = where
        self.reason = reason
        super().__init__(f"{where}: {reason}")


class SourceTooLargeError(SourceFileError):
    """A file beyond the limit; nothing larger than the limit was read into memory."""


class UnsafePickleError(SourceFileError):
    """A pickle that asks for code or for objects that are no arrays or containers. Nothing of it ran."""


class UnsupportedSourceError(ExchangeError):
    """A record that this store does not keep, such as the alignment of a complex."""


class ExportError(ExchangeError):
    """A record that the target format cannot hold.

    Attributes:
      record_id: the record.
      reason: the limit it breaks and what to do.
    """

    def __init__(self, record_id: str, reason: str) -> None:
        self.record_id = record_id
        self.reason = reason
        super().__init__(f"record {record_id!r} cannot be exported: {reason}")
