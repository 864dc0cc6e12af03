"""Commands that keep a store in good order: verify, repair, compact, gc, copy, tag, delete.

Each only fills in a function's arguments and prints its report: bars on a terminal, nothing while it works
otherwise, plain lines at the end. Exit codes: 0 done, 1 damage was found (or left) or the work failed, 2 bad
usage.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from foldfeed.feature_store.care.compact import DEFAULT_MIN_LIVE, compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.garbage import DEFAULT_GRACE_S, collect_garbage
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.repair_index import ON_AMBIGUOUS
from foldfeed.feature_store.care.roll_back import message_of
from foldfeed.feature_store.care.verify import VerifyReport, verify
from foldfeed.feature_store.care.verify_parts import LEVELS, Problem
from foldfeed.feature_store.cli.tools import chosen_way, selection_options
from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.index.transactions import ON_EXISTING
from foldfeed.feature_store.looking.tables import in_bytes
from foldfeed.feature_store.progress import Progress
from foldfeed.feature_store.store.feature_store import FeatureStore

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NAMED_RECORDS = 5


class Size(click.ParamType):
    """A number of bytes, e.g. ``256MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns bytes."""
        match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", str(value), re.IGNORECASE)
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a size; write e.g. 256MiB", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


@click.command("verify")
@click.argument("store")
@click.option("--quick", "level", flag_value="quick", help="Sizes, indices and metadata only; reads little.")
@click.option("--full", "level", flag_value="full", default=True, help="Every byte (the default).")
@click.option("--deep", "level", flag_value="deep", help="Also derive sidecars and fingerprints anew.")
@click.option("--version", help="A version or tag; the newest by default.")
@click.option("--all-versions", is_flag=True, help="Parts of every version that can be opened.")
def verify_command(store: str, level: str, version: str | None, all_versions: bool) -> None:
    """Check that everything in STORE is as it was written. Exit code 1 when it is not.

    Settings, log, the index of all versions, tags, sets and splits are checked in any case; parts are those
    of one version. With --all-versions they are those of every version that can be opened, and each damaged
    part comes with the first and the last version that show it.

    \b
    Examples:
      foldfeed verify my-store
      foldfeed verify my-store --quick
      foldfeed verify my-store --deep --version paper-1
      foldfeed verify my-store --all-versions
    """
    assert level in LEVELS
    if all_versions and version is not None:
        raise click.UsageError("--version is one version, --all-versions are all; give one of them.")
    with bars() as progress, bad_version_is_usage():
        report = verify(store, level=level, version=version, all_versions=all_versions, progress=progress)
    print_problems(report)
    for name in report.stale_sets:
        click.echo(f"note     record set {name}: no version that can be opened has all of its records")
    click.echo(summary(report))
    if report.problems:
        raise click.exceptions.Exit(1)


@click.command("repair")
@click.argument("store")
@click.option("--version", help="A version or tag whose files to restore; the newest by default.")
@click.option("--from", "source", metavar="STORE2", help="A copy to take damaged files from.")
@click.option("--quarantine", is_flag=True, help="Delete records that stay damaged from the index.")
@click.option("--roll-back", is_flag=True, help="Go back to the last version that can be read.")
@click.option("--rebuild-index", is_flag=True, help="Make a new index from the parts when it is lost.")
@click.option("--add-missing", is_flag=True, help="Make records visible that parts hold and the index lost.")
@click.option(
    "--on-ambiguous",
    type=click.Choice(ON_AMBIGUOUS),
    default="error",
    show_default=True,
    help="Which of several contents of a record a rebuilt index takes.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def repair_command(
    store: str,
    version: str | None,
    source: str | None,
    quarantine: bool,
    roll_back: bool,
    rebuild_index: bool,
    add_missing: bool,
    on_ambiguous: str,
    dry_run: bool,
) -> None:
    """Restore damaged files of STORE that can be restored bit for bit; more only if told so.

    Looked at are the parts of the newest version, or of --version: `foldfeed verify --all-versions` says
    which versions show a damaged part. Then that version can be read again; no version changes, so what
    changes the newest one (--quarantine, --roll-back, --rebuild-index, --add-missing) does not go with it.

    \b
    Examples:
      foldfeed repair my-store --dry-run
      foldfeed repair my-store --from s3://backup/my-store
      foldfeed repair my-store --version paper-1 --from s3://backup/my-store
      foldfeed repair my-store --quarantine
      foldfeed repair my-store --roll-back --add-missing
      foldfeed repair my-store --rebuild-index --on-ambiguous newest
    """
    if roll_back and rebuild_index:
        raise click.UsageError(
            "--roll-back keeps the history, --rebuild-index makes a new one; try the first."
        )
    changes = {
        "--quarantine": quarantine,
        "--roll-back": roll_back,
        "--rebuild-index": rebuild_index,
        "--add-missing": add_missing,
    }
    given = [name for name, value in changes.items() if value]
    if version is not None and given:
        raise click.UsageError(
            f"{' and '.join(given)} would change the newest version; --version restores files of one that "
            "is there and changes none. Leave one of them out."
        )
    with bars() as progress, bad_version_is_usage():
        report = repair(
            store,
            version=version,
            source_url=source,
            quarantine=quarantine,
            roll_back_index=roll_back,
            rebuild_lost_index=rebuild_index,
            add_missing=add_missing,
            on_ambiguous=on_ambiguous,
            dry_run=dry_run,
            progress=progress,
        )
    would = "would be " if dry_run else ""
    for path in report.restored:
        click.echo(f"{would}restored  {path}")
    for name in report.quarantined:
        click.echo(f"{would}quarantined  {name}")
    for path in report.rolled_back.set_aside if report.rolled_back else ():
        click.echo(f"{would}set aside  {path}")
    for name in report.rolled_back.lost if report.rolled_back else ():
        click.echo(f"{would}out of sight  {name}")
    if report.rolled_back:
        click.echo(f"{would}rolled back: {message_of(report.rolled_back)}")
        if not (dry_run or add_missing):
            click.echo(
                "what is out of sight is garbage for gc once its grace period is over: run "
                "repair --add-missing before gc"
            )
    for name in report.added:
        click.echo(f"{would}added  {name}")
    if report.index_rebuilt:
        click.echo(f"{would}rebuilt  index ({len(report.ambiguous)} ambiguous records)")
    print_problems(report.after)
    click.echo(summary(report.after))
    if report.after.problems:
        click.echo(advice(report.after, version))
        raise click.exceptions.Exit(1)


@click.command("compact")
@click.argument("store")
@click.option("--target-size", type=Size(), default="256MiB", show_default=True, help="Size of new parts.")
@click.option(
    "--min-live",
    type=click.FloatRange(0, 1),
    default=DEFAULT_MIN_LIVE,
    show_default=True,
    help="Rewrite parts with a smaller share of live records, whatever their size.",
)
@click.option("--part", "parts", multiple=True, metavar="ID", help="Rewrite this part in any case.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def compact_command(
    store: str, target_size: int, min_live: float, parts: tuple[str, ...], dry_run: bool
) -> None:
    """Rewrite small and half-dead parts of STORE into full ones, and merge the files of the index.

    Records keep their content and fingerprints. Old versions keep the old parts; `foldfeed gc --keep-days`
    removes them.

    \b
    Examples:
      foldfeed compact my-store --dry-run
      foldfeed compact my-store --target-size 1GiB
    """
    with bars() as progress:
        report = compact(
            store,
            target_bytes=target_size,
            min_live=min_live,
            part_ids=parts,
            dry_run=dry_run,
            progress=progress,
        )
    would = "would have " if dry_run else "has "
    click.echo(f"moved    {report.num_moved} records ({in_bytes(report.bytes_written)})")
    click.echo(f"parts    {report.parts_before}; now it {would}{report.parts_after}")
    if not dry_run:
        click.echo(f"index    {report.index_files_before} files; now it has {report.index_files_after}")
    click.echo(f"version  {report.version}")


@click.command("gc")
@click.argument("store")
@click.option(
    "--grace-hours",
    type=click.FloatRange(min=0),
    default=DEFAULT_GRACE_S / 3600,
    show_default=True,
    help="Spare what is younger: a running job may be about to commit it.",
)
@click.option(
    "--keep-days",
    type=click.FloatRange(min=0),
    help="Give up versions superseded longer ago (tagged ones stay). All are kept without this.",
)
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
def gc_command(store: str, grace_hours: float, keep_days: float | None, dry_run: bool) -> None:
    """Remove parts and index files of STORE that no version names, and leftovers of killed writers.

    \b
    Examples:
      foldfeed gc my-store --dry-run
      foldfeed gc my-store --keep-days 30
    """
    with bars() as progress:
        report = collect_garbage(
            store, grace_s=grace_hours * 3600, keep_days=keep_days, dry_run=dry_run, progress=progress
        )
    verb = "would remove" if dry_run else "removed"
    for item in report.removed:
        click.echo(f"{verb}  {item.path}  ({item.kind}, {in_bytes(item.num_bytes)})")
    click.echo(
        f"{verb} {len(report.removed)} things, {in_bytes(report.num_bytes)}; "
        f"{len(report.spared)} more are younger than {grace_hours:g} h or in use"
    )
    if report.oldest_version:
        click.echo(f"versions from {report.oldest_version} on are readable, and tagged ones")


@click.command("copy")
@click.argument("source")
@click.argument("target")
@click.argument("record_ids", nargs=-1, metavar="[RECORD]...")
@selection_options
@click.option("--version", help="A version or tag of SOURCE; the newest by default.")
@click.option(
    "--on-existing",
    type=click.Choice(ON_EXISTING),
    default="error",
    show_default=True,
    help="What to do with records that TARGET has with other content.",
)
def copy_command(
    source: str,
    target: str,
    record_ids: tuple[str, ...],
    where: str | None,
    record_set: str | None,
    version: str | None,
    on_existing: str,
) -> None:
    """Copy one version of the store SOURCE to TARGET. Run it again to go on after an interruption.

    All records, or the RECORDs named, or those of --where or --record-set: then the data of other records
    stay behind. Named sets, splits and the tags of that version come along; other versions stay behind.

    \b
    Examples:
      foldfeed copy my-store s3://bucket/my-store
      foldfeed copy my-store /mnt/other/my-store --version paper-1
      foldfeed copy my-store deep-ones --where "depth > 1000"
      foldfeed copy my-store train-set --record-set train
    """
    way = chosen_way("copy", {"--where": where, "--record-set": record_set, "RECORD": record_ids})
    with bars() as progress, bad_version_is_usage():
        report = copy_store(
            source,
            target,
            version=version,
            record_ids=record_ids or None,
            where=where,
            record_set=record_set,
            on_existing=on_existing,
            progress=progress,
        )
    anew = f", {report.parts_rewritten} of them written anew" if report.parts_rewritten else ""
    click.echo(
        f"parts    {report.parts_copied} copied ({in_bytes(report.bytes_copied)}){anew}, "
        f"{report.parts_skipped} were there"
    )
    chosen = f" of {report.num_chosen} chosen" if way else ""
    click.echo(f"records  {report.num_added} added{chosen}")
    for path in report.names_copied:
        click.echo(f"name     {path}")
    if not report.names_known:
        click.echo("named sets, splits and tags stay behind: a web server does not tell which there are")
    for name in report.tags_left:
        click.echo(f"left     tag {name}: the copy holds other records as well")
    click.echo(f"version  {report.source_version} of the source is {report.version} of the copy")


@click.command("tag")
@click.argument("store")
@click.argument("name", required=False)
@click.option("--version", type=int, help="What to name; the newest version by default.")
@click.option("--message", default="", help="Why.")
@click.option("--move", is_flag=True, help="The tag may exist and name another version.")
@click.option("--delete", "forget", is_flag=True, help="Forget the tag.")
def tag_command(
    store: str, name: str | None, version: int | None, message: str, move: bool, forget: bool
) -> None:
    """Give a version of STORE a NAME, or list the names there are.

    A tagged version is opened by its name and kept by `foldfeed gc`.

    \b
    Examples:
      foldfeed tag my-store paper-1 --message "as in the preprint"
      foldfeed tag my-store
      foldfeed tag my-store paper-1 --delete
    """
    FeatureStore.open(store)
    if name is None:
        for tag in versions.list_tags(store):
            click.echo(f"{tag.version:>7}  {tag.name}  {tag.time}  {tag.message}".rstrip())
    elif forget:
        versions.delete_tag(store, name)
        click.echo(f"forgot {name}")
    else:
        with bad_version_is_usage():
            tag = versions.set_tag(store, name, version, message=message, move=move)
        click.echo(f"{tag.name} is version {tag.version}")


@click.command("delete")
@click.argument("store")
@click.argument("record_ids", metavar="[RECORD]...", nargs=-1)
@click.option(
    "--from-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with one record id per line.",
)
@click.option("--message", default="", help="For the log.")
def delete_command(store: str, record_ids: tuple[str, ...], from_file: Path | None, message: str) -> None:
    """Delete records from STORE in one transaction. Older versions keep them.

    \b
    Examples:
      foldfeed delete my-store HBB_HUMAN HBA_HUMAN --message "wrong chain"
      foldfeed delete my-store --from-file retracted.txt
    """
    names = [*record_ids, *(from_file.read_text().split() if from_file else ())]
    if not names:
        raise click.UsageError("Give at least one RECORD or --from-file.")
    result = FeatureStore.open(store).delete(names, message=message)
    click.echo(f"deleted {result.num_removed} records; this is version {result.version}")


def summary(report: VerifyReport) -> str:
    """Returns one line that says what was checked and whether it is well."""
    found = f"{len(report.problems)} problems" if report.problems else "no damage found"
    version = "no readable index" if report.version is None else f"version {report.version}"
    if len(report.versions) > 1:
        version = f"{len(report.versions)} versions from {report.versions[0]} to {report.versions[-1]}"
    return (
        f"{version}: {report.num_records} records, {report.num_parts} parts, {report.num_files} files, "
        f"{in_bytes(report.num_bytes)}: {found} ({report.level}, {report.seconds:.1f} s)"
    )


def advice(report: VerifyReport, version: str | None = None) -> str:
    """Returns what to do about damage that is left, in the newest version or in one that was asked for."""
    if version is not None:
        return (
            f"version {version}: restore what is damaged from a copy (--from); one that was made file by "
            "file has all files of the index, too"
        )
    if report.version is None:
        return (
            "the index cannot be read: repair --roll-back goes back to the last version that can, "
            "repair --rebuild-index makes a new one from the parts"
        )
    if report.damaged_records:
        return "restore from a copy (--from), or take the damaged records out of sight (--quarantine)"
    parts = sorted({match[1] for p in report.problems if (match := re.match(r"parts/(\w+)", p.where))})
    return (
        "no visible record is affected; `foldfeed compact --part ID` moves the records away from "
        f"{', '.join(parts) or 'what is damaged'}"
    )


def print_problems(report: VerifyReport) -> None:
    """Prints each problem as one line."""
    for problem in report.problems:
        names = ", ".join(problem.record_ids[:_NAMED_RECORDS])
        more = len(problem.record_ids) - _NAMED_RECORDS
        suffix = f" [{names}{f' and {more} more' if more > 0 else ''}]" if names else ""
        click.echo(f"damaged  {problem.where}: {problem.reason}{suffix}{_shown_by(problem)}")


def _shown_by(problem: Problem) -> str:
    if problem.versions is None:
        return ""
    first, last = problem.versions
    return f" (version {first})" if first == last else f" (versions {first} to {last})"


@contextlib.contextmanager
def bad_version_is_usage() -> Iterator[None]:
    """Turns "no such version" into bad usage."""
    try:
        yield
    except FoldfeedError:
        # Some are ValueErrors and are about something else, or say more than that.
        raise
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--version") from error


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """Gives a function that draws one bar per stage on a terminal, and does nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done, total=total)

        yield tell
