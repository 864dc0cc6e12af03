"""What every step of a Beam graph that runs search tools shares: the checks of its worker, and its errors.

Owns `Searching`, the base of such DoFns. Does not own any search. Invariant: an error that leaves a worker is
one line of text that names the record and the database, because engines print the rest as they like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import apache_beam as beam

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.pipelines.errors import WorkerError
from foldfeed.pipelines.programs.subprocess_runner import cancel_all, follow_parent
from foldfeed.pipelines.searches.search import JobContext, WorkUnit
from foldfeed.pipelines.tools.search_tool import require_same_binary

T = TypeVar("T")


def as_text(error: FoldfeedError, what: str = "") -> WorkerError:
    """Returns an error as one that survives the way out of a worker."""
    return WorkerError(f"{what}: {error}" if what else str(error))


class Searching(beam.DoFn):
    """What a step that runs search tools needs.

    Args:
      context: of the build.
      stop_together: one failure ends the other searches of this process. For the local runner, which reports
        a failed step only when all searches under way have ended: hours, in the worst case. Another engine
        tries a failed bundle again, perhaps in the same process, so there the others must go on.
    """

    def __init__(self, context: JobContext, stop_together: bool) -> None:
        self.context = context
        self._stop_together = stop_together

    def setup(self) -> None:
        """Checks once per worker that the planned tools are here."""
        if not self._stop_together:
            follow_parent()
        try:
            for database in self.context.databases:
                require_same_binary(database.tool)
            if self.context.templates is not None:
                require_same_binary(self.context.templates.tool)
                self.context.templates.tool.check()
        except FoldfeedError as error:
            raise as_text(error) from error

    def guarded(self, unit: WorkUnit, search: Callable[[], T]) -> T:
        """Returns what a search gives; its error leaves the worker as one line of text.

        Args:
          unit: that is searched.
          search: searches it.
        Raises:
          WorkerError: names record and database.
        """
        try:
            return search()
        except Exception as error:
            if self._stop_together:
                cancel_all(f"another search failed: {error}")
            if isinstance(error, FoldfeedError):
                name = self.context.searched[unit.database_index].name
                raise as_text(error, f"record {unit.record_ids[0]!r}, search in {name!r}") from error
            raise
