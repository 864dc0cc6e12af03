"""`LoaderState`: a position in the stream of samples, a few bytes of JSON.

It counts steps of one stream, so it names what the stream is a function of: the store's content (a
fingerprint, not a path: stores may be moved and copied), the recipe, the seed and the samples of a step; and
unless every record of one store comes once an epoch, the sampling and the records that it chose; and whether
unreadable records are replaced, and samples placed by storage. Rank, world, threads and caches are not part
of it, because samples do not depend on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from foldfeed.loader.errors import LoaderStateError, StateMismatchError
from foldfeed.loader.order.placement import ORDER
from foldfeed.loader.unreadable import STOP

# Without a sampling a state is what it was before there were samplings; with one, a release that knows none
# must refuse it.
FORMAT = 1
SAMPLING_FORMAT = 2
SAMPLING_FIELDS = ("sampling_digest", "selection_fingerprint")
# Where a record that cannot be read is replaced by another, or samples are placed by where they are stored,
# which earlier releases would not do.
POLICY_FORMAT = 3
POLICY_FIELDS = (*SAMPLING_FIELDS, "on_unreadable", "placement")
_FIELDS = {FORMAT: (), SAMPLING_FORMAT: SAMPLING_FIELDS, POLICY_FORMAT: POLICY_FIELDS}

Value = TypeVar("Value", int, str)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """A position.

    Attributes:
      step: the next step to be consumed.
      seed: of the run.
      global_batch: samples of a step.
      recipe_digest: of `foldfeed.loader.recipe.Recipe`.
      store_fingerprint: of the store's content; ``NAME=FINGERPRINT,...`` for several.
      sampling_digest: of `order.sampling.Sampling`; "" for the default one.
      selection_fingerprint: of the records it chose; "" for all of one store.
      on_unreadable: ``stop`` or ``substitute``, see `foldfeed.loader.unreadable`.
      placement: ``order`` or ``storage``, see `order.placement`.
    """

    step: int
    seed: int
    global_batch: int
    recipe_digest: str
    store_fingerprint: str
    sampling_digest: str = ""
    selection_fingerprint: str = ""
    on_unreadable: str = STOP
    placement: str = ORDER

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        values = dataclasses.asdict(self)
        number = FORMAT
        if any(values[field] for field in SAMPLING_FIELDS):
            number = SAMPLING_FORMAT
        if (self.on_unreadable, self.placement) != (STOP, ORDER):
            number = POLICY_FORMAT
        left_out = set(POLICY_FIELDS) - set(_FIELDS[number])
        return {"format": number, **{k: value for k, value in values.items() if k not in left_out}}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LoaderState:
        """Returns the position in a dict, as `to_dict` made it.

        Raises:
          LoaderStateError: a value is missing, of another type or of another format.
        """
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        if isinstance(found, bool) or not isinstance(found, int) or found not in _FIELDS:
            raise LoaderStateError(
                f"loader state of format {found!r}; this release reads {', '.join(map(str, _FIELDS))}, as "
                "CropLoader.state_dict writes them"
            )
        step = _typed(state, "step", int)
        if step < 0:
            raise LoaderStateError(f"loader state has step={step}; steps are counted from 0")
        return cls(
            step=step,
            seed=_typed(state, "seed", int),
            global_batch=_typed(state, "global_batch", int),
            recipe_digest=_typed(state, "recipe_digest", str),
            store_fingerprint=_typed(state, "store_fingerprint", str),
            **{field: _typed(state, field, str) for field in _FIELDS[found]},
        )

    def check_same_stream(self, other: LoaderState) -> None:
        """Raises unless both count steps of the same stream.

        Args:
          other: of the loader that is to go on.
        Raises:
          StateMismatchError: the first value that differs.
        """
        for field in ("store_fingerprint", "recipe_digest", *POLICY_FIELDS, "seed", "global_batch"):
            if getattr(self, field) != getattr(other, field):
                raise StateMismatchError(field, getattr(self, field), getattr(other, field))


def _typed(state: Mapping[str, Any], field: str, wanted: type[Value]) -> Value:
    value = state.get(field)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise LoaderStateError(
            f"loader state has {field}={value!r}, which must be of type {wanted.__name__}; it was changed or "
            "cut after CropLoader.state_dict wrote it"
        )
    return value
