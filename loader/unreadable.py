"""What happens to a sample whose record cannot be read: the run stops, or another record takes its place.

Only damage is ever replaced: stored bytes that do not match their checksums, files that are missing, a disk
that cannot read them (EIO); each after another attempt that asked the store itself, past every cache. A store
that cannot be reached is no damage: what it holds is unknown, and a stream that depended on the network would
be another one each time.

Where a recipe draws several alignments for a sample (recycling), all that a step takes are of one record, the
first of which all of them can be read: damage that none of them meets replaces nothing.

Invariant: with ``substitute``, sample g is a function of (stores, sampling, recipe, seed, g) still, for
stores that are damaged in the same places; with several alignments, of the recycling iterations of its step,
too.
"""

from __future__ import annotations

import dataclasses
import errno
from typing import Any

from foldfeed.feature_store import CorruptDataError

STOP, SUBSTITUTE = "stop", "substitute"
POLICIES = (STOP, SUBSTITUTE)
# So many unreadable records in a row are no accident.
MAX_SUBSTITUTES = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Substitution:
    """One sample that is made from another record than the order says.

    Attributes:
      sample: its global number.
      record_id: the record that cannot be read.
      substitute_id: the record it is made from.
      attempt: how many were tried, this one counted.
      reason: why the first one could not be read.
    """

    sample: int
    record_id: str
    substitute_id: str
    attempt: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return dataclasses.asdict(self)


def is_damage(error: BaseException | None) -> bool:
    """Returns whether an error says that stored bytes are wrong or gone, and not that nobody could ask."""
    return isinstance(error, CorruptDataError) or (isinstance(error, OSError) and error.errno == errno.EIO)
