"""What several commands share: opening a store, parsing windows, writing to a file or the screen, a clock.

Owns no command. Errors of usage become click's own, which end the program with code 2 and one line.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from foldfeed.feature_store.format.grid import resolve_window
from foldfeed.feature_store.format.settings import MAX_ROW_ORDER_SEED, ROW_ORDERS, StoreSettings

if TYPE_CHECKING:
    from foldfeed.feature_store.store.feature_store import FeatureStore

# The reader of stores (DuckDB, pandas) and rich are loaded by the functions that need them: `foldfeed
# build` takes its options from here and, with nothing to do, ends before they would be loaded.

WINDOW = re.compile(r"(?P<start>-?\d+)?(?P<colon>:)(?P<stop>-?\d+)?|-?\d+")


def open_store(url: str, version: int | str | None = None) -> FeatureStore:
    """Returns a store; a version that does not exist is bad usage."""
    from foldfeed.feature_store.store.feature_store import FeatureStore

    try:
        return FeatureStore.open(url, version)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--version") from error


def row_order_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--row-order`` and ``--row-order-seed`` to a command that may make a store."""
    order = click.option(
        "--row-order",
        type=click.Choice(ROW_ORDERS),
        help="How a new store keeps alignment rows: as ranked, for reading the best hits, or permuted, so "
        "that a random sample of rows is one short read. Readers see ranks in both. [default: rank, or what "
        "the store has]",
    )
    seed = click.option(
        "--row-order-seed",
        type=click.IntRange(0, MAX_ROW_ORDER_SEED),
        metavar="N",
        help="Seed of permuted. [default: 0]",
    )
    return order(seed(command))


def selection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--where`` and ``--record-set`` to a command that works on some records of a store."""
    where = click.option("--where", metavar="CONDITION", help="Records for which this SQL condition holds.")
    record_set = click.option(
        "--record-set", metavar="NAME", help="The records of a set (see `foldfeed sets`)."
    )
    return where(record_set(command))


def chosen_way(verb: str, ways: Mapping[str, object]) -> str | None:
    """Returns by which of several ways records were chosen, None for none; two at once are bad usage.

    Args:
      verb: what is done with the records.
      ways: what was given, by option; None, false and () where it was not.
    """
    given = [name for name, value in ways.items() if value not in (None, False, ())]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} given; say in one way which records to {verb}")
    return given[0] if given else None


def new_store_settings(url: str, row_order: str | None, seed: int | None) -> StoreSettings | None:
    """Returns `choose_settings`; an option that cannot take effect is bad usage."""
    from foldfeed.feature_store.store.feature_store import choose_settings

    try:
        return choose_settings(url, row_order, seed)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--row-order-seed") from error


def parse_window(option: str, text: str, size: int) -> slice:
    """Returns what ``a:b``, or a single number, means of a size: `resolve_window` with words from a shell.

    Raises:
      click.BadParameter: not of that form, empty, or a number outside.
    """
    match = WINDOW.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no window; write a:b or one number", param_hint=option)
    ends = [int(end) if end else None for end in (match["start"], match["stop"])]
    try:
        asked = slice(*ends) if match["colon"] else int(text)
        return slice(*resolve_window(option.lstrip("-"), asked, size))
    except IndexError as error:
        raise click.BadParameter(str(error), param_hint=option) from error


@contextlib.contextmanager
def output_stream(path: Path | None) -> Iterator[BinaryIO]:
    """Gives the file to write to, or the screen."""
    if path is None:
        yield sys.stdout.buffer
    else:
        with failing_as_usage(path), path.open("wb") as file:
            yield file


@contextlib.contextmanager
def failing_as_usage(path: Path) -> Iterator[None]:
    """Turns "cannot open or write that file" into a usage error that names the file."""
    try:
        yield
    except OSError as error:
        raise click.FileError(str(path), hint=error.strerror or str(error)) from error


@contextlib.contextmanager
def working(verb: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Shows a clock on the terminal while something runs; silent when it is not a terminal.

    Args:
      verb: what is done.
      total: how many steps; call what the block is given after each. None for a single long one.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    count = () if total is None else (MofNCompleteColumn(),)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *count, TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda: progress.advance(task)
