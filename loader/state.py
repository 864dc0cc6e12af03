"""`LoaderState`: a position in the stream of samples, a few bytes of JSON.

It counts steps of one stream, so it names what the stream is a function of: the store's content (a
fingerprint, not a path: stores may be moved and copied), the recipe, the seed and the samples of a step.
Rank, world and threads are not part of it, because samples do not depend on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from foldfeed.loader.errors import LoaderStateError, StateMismatchError

FORMAT = 1

Value = TypeVar("Value", int, str)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """A position.

    Attributes:
      step: the next step to be consumed.
      seed: of the run.
      global_batch: samples of a step.
      recipe_digest: of `foldfeed.loader.recipe.Recipe`.
      store_fingerprint: of the store's content.
    """

    step: int
    seed: int
    global_batch: int
    recipe_digest: str
    store_fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LoaderState:
        """Returns the position in a dict, as `to_dict` made it.

        Raises:
          LoaderStateError: a value is missing, of another type or of another format.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
            raise LoaderStateError(
                f"loader state of format {found!r}; this release reads format {FORMAT}, as "
                "CropLoader.state_dict writes it"
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
        )

    def check_same_stream(self, other: LoaderState) -> None:
        """Raises unless both count steps of the same stream.

        Args:
          other: of the loader that is to go on.
        Raises:
          StateMismatchError: the first value that differs.
        """
        for field in ("store_fingerprint", "recipe_digest", "seed", "global_batch"):
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
