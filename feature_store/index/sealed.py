"""Small JSON documents that carry the sha256 of their own content.

Owns the seal. Does not own what the documents say. Invariant: what `unseal` and `check_seal` let pass is what
was sealed; a file is also the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from foldfeed.feature_store.errors import CorruptDataError

KEY = "sha256"


def digest(document: dict[str, Any]) -> str:
    """Returns sha256 (hex) of canonical JSON: sorted keys, no spaces, ASCII escapes."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(document: dict[str, Any]) -> bytes:
    """Returns a JSON file of a document and its digest."""
    return (json.dumps(document | {KEY: digest(document)}, indent=2, sort_keys=True) + "\n").encode()


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Returns the document in a file that `seal` made.

    Args:
      data: the file.
      where: its path, for messages.
    Raises:
      CorruptDataError: it is not such a file, or not as it was written.
    """
    try:
        document = json.loads(data)
        found = check_seal(document, where)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptDataError(where, f"it is not a sealed JSON file ({error})") from error
    if seal(found) != data:
        raise CorruptDataError(where, "its content does not match its sha256")
    return found


def check_seal(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a document without its digest.

    Raises:
      KeyError: there is no digest.
      CorruptDataError: it is not that of the rest.
    """
    claimed = document[KEY]
    rest = {name: value for name, value in document.items() if name != KEY}
    if claimed != digest(rest):
        raise CorruptDataError(where, "its content does not match its sha256")
    return rest
