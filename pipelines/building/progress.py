"""Progress bars: for searches, fed by what is visible in the result store, and for bytes that are copied.

Owns a polling thread and bars on standard error. Does not own results. The count comes from the result
store and not from the engine, because engines report progress differently, late or not at all. Invariants:
nothing is printed and no thread runs unless standard error is a terminal; a fault of the bar never fails a
build.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from foldfeed.feature_store.progress import Progress as Told
from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.planning.plan import Plan
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.searches.search import JobContext, failure_folder

# A look lists folders; between two looks the bar waits twenty times as long as a look took, and at least
# this.
SHORTEST_PAUSE_S = 0.5


class _RateColumn(ProgressColumn):
    """Searches per minute, since searches take seconds to hours."""

    def render(self, task: Task) -> Text:
        return Text(f"{60 * task.speed:.1f}/min" if task.speed else "-/min")


@contextlib.contextmanager
def search_progress(plan: Plan, context: JobContext, console: Console | None = None) -> Iterator[None]:
    """Shows how many of the planned searches, and of their parts, are done while the block runs.

    Args:
      plan: names the searches.
      context: of the run.
      console: where to draw; standard error when None.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal or not plan.unit_ids:
        yield
        return
    columns = (
        TextColumn("searching"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    stop = threading.Event()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("searching", total=len(plan.unit_ids) + len(plan.shard_unit_ids))
        thread = threading.Thread(
            target=_poll, args=(plan, context, bar, task, stop), name="foldfeed-progress", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def byte_bars(console: Console | None = None) -> Iterator[Told]:
    """Gives a function that draws a bar of bytes and their rate, and does nothing where there is no terminal.

    Args:
      console: where to draw; standard error when None.
    """
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                # What is there already, of a copy that goes on, was not brought in the first second.
                tasks[stage] = bar.add_task(stage, total=total, completed=done)
            bar.update(tasks[stage], completed=done, total=total)

        yield tell


def count_done(plan: Plan, context: JobContext) -> tuple[int, int]:
    """Returns how many planned searches have an answer, and how many failed in this run."""
    done = ResultStore(context.results_url).count_present(plan.unit_ids)
    failed = len(open_blobs(context.results_url).list(failure_folder(context)))
    return done, failed


def _poll(plan: Plan, context: JobContext, bar: Progress, task: TaskID, stop: threading.Event) -> None:
    pause_s = 0.0
    while not stop.wait(pause_s):
        started = time.monotonic()
        try:
            parts = ResultStore(context.results_url).count_present(plan.shard_unit_ids)
            bar.update(task, completed=sum(count_done(plan, context)) + parts)
        except OSError:
            # The bar only looks; whoever writes there reports what is wrong.
            return
        pause_s = max(SHORTEST_PAUSE_S, 20 * (time.monotonic() - started))
