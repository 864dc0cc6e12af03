"""The commands ``foldfeed ingest`` and ``foldfeed export``: other programs' files in and out of a store.

Owns words, progress and exit codes. Does not own formats (`importers`, `exporters`). Exit codes: 0 done (a
reject is reported and does not change it, unless ``--fail-on-rejects``), 1 the run failed or nothing could be
imported, 2 bad usage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from foldfeed.feature_store.cli.tools import (
    chosen_way,
    new_store_settings,
    open_store,
    row_order_options,
    selection_options,
)
from foldfeed.feature_store.exchange_errors import ExchangeError
from foldfeed.feature_store.exporters.formats import (
    EXPORT_FORMATS,
    ExportOptions,
    export_database,
    export_files,
    export_record,
    file_name,
    write_file,
)
from foldfeed.feature_store.exporters.jobs import CHAI_SOURCES
from foldfeed.feature_store.format.effective_rows import NEFF_MAX_ROWS
from foldfeed.feature_store.importers.into_store import ImportReport, import_into
from foldfeed.feature_store.importers.layouts import AUTO, LAYOUTS, AlignmentImport
from foldfeed.feature_store.importers.rows import A2M_COLUMNS, DEDUP, ID_FROM, ImportOptions
from foldfeed.feature_store.importers.sources import Reject
from foldfeed.feature_store.index.transactions import ON_EXISTING
from foldfeed.feature_store.parsers.bounded_files import COMPRESSED_SUFFIXES, DEFAULT_MAX_BYTES
from foldfeed.feature_store.parsers.mmcif.sequence import MODIFIED
from foldfeed.feature_store.store.feature_store import FeatureStore, Record
from foldfeed.feature_store.store.selection import choose_ids

HELP = {"help_option_names": ["-h", "--help"]}
# Rejects printed on the terminal; --rejects writes all of them.
MAX_SHOWN_REJECTS = 20


def commit_options(failure: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds ``--job-id``, ``--rejects`` and ``--fail-on-rejects`` to a command that commits what it was given.

    Args:
      failure: what ``--fail-on-rejects`` ends with 1 for, in words.
    """
    job = click.option("--job-id", metavar="ID", help="Names the commit. [default: made from the content]")
    rejects = click.option(
        "--rejects",
        "rejects_file",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write all rejects there, one JSON object per line.",
    )
    fail = click.option("--fail-on-rejects", is_flag=True, help=f"Exit with 1 if {failure}.")
    return lambda command: job(rejects(fail(command)))


@click.command(context_settings=HELP)
@click.option(
    "--alignments",
    required=True,
    metavar="PATH",
    type=click.Path(exists=True, path_type=Path),
    help="A file or a folder.",
)
@click.option("--layout", type=click.Choice((AUTO, *LAYOUTS)), default=AUTO, show_default=True)
@click.option("--store", required=True, metavar="URL", help="Feature store to add to; made when absent.")
@row_order_options
@click.option(
    "--id-from",
    type=click.Choice(ID_FROM),
    default="auto",
    show_default=True,
    help="Where record ids of single alignments come from: file name, folder name or the query's header; "
    "auto takes the file's, or the folder's when all files are called alike.",
)
@click.option(
    "--on-existing",
    type=click.Choice(ON_EXISTING),
    default="error",
    show_default=True,
    help="For a record id that the store has with other content.",
)
@click.option(
    "--dedup",
    type=click.Choice(DEDUP),
    default="source",
    show_default=True,
    help="Drop repeated rows: as the layout implies (only where databases are merged), always, or never.",
)
@click.option(
    "--databases",
    metavar="NAME,NAME",
    help="Databases to take, in merge order. [default: AlphaFold 2's order, then others by name]",
)
@click.option(
    "--max-hits",
    multiple=True,
    metavar="NAME=N",
    help="Most rows of a database, the query counted; repeatable.",
)
@click.option(
    "--paired", is_flag=True, help="Also take alignments made for pairing chains (uniprot, pairedMsa)."
)
@click.option(
    "--a2m-columns",
    type=click.Choice(A2M_COLUMNS),
    default="match",
    show_default=True,
    help="Columns of A2M: upper case of the query, or every residue of the query.",
)
@click.option(
    "--empty-as-no-hits", is_flag=True, help="An empty alignment file means that nothing was found."
)
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_BYTES,
    show_default=True,
    metavar="N",
    help="Largest file, decompressed.",
)
@click.option(
    "--neff-max-rows",
    type=click.IntRange(min=0),
    default=NEFF_MAX_ROWS,
    show_default=True,
    metavar="N",
    help="Store N_eff of alignments up to that depth (compares all pairs of rows); 0 for none.",
)
@click.option(
    "--modified",
    type=click.Choice(MODIFIED),
    default=MODIFIED[0],
    show_default=True,
    help="Letter of modified residues in mmCIF: of the residue they were made from, or X. MSE is M in both.",
)
@click.option("--model", type=click.IntRange(min=0), help="Model of mmCIF entries. [default: the first]")
@commit_options("anything could not be imported")
@click.pass_context
def ingest(
    ctx: click.Context,
    alignments: Path,
    layout: str,
    store: str,
    row_order: str | None,
    row_order_seed: int | None,
    id_from: str,
    on_existing: str,
    dedup: str,
    databases: str | None,
    max_hits: tuple[str, ...],
    paired: bool,
    a2m_columns: str,
    empty_as_no_hits: bool,
    max_bytes: int,
    neff_max_rows: int,
    modified: str,
    model: int | None,
    job_id: str | None,
    rejects_file: Path | None,
    fail_on_rejects: bool,
) -> None:
    """Take alignments made elsewhere into a store, in one commit.

    Records are read one at a time. What cannot be read is reported and does not stop the others. Files may be
    compressed (.gz, .xz, .zst, .bz2). Pickles (features.pkl) are read without executing anything in them.
    A record that comes without a structure keeps the store's, if its sequence is the same.

    \b
    Examples:
      foldfeed ingest --alignments openproteinset/ --store my-store
      foldfeed ingest --alignments msas/ --layout a3m --id-from folder --store my-store
      foldfeed ingest --alignments job_data.json --store my-store --on-existing replace
      foldfeed ingest --alignments pdb_mmcif/ --layout mmcif --store my-store
      foldfeed ingest --alignments af2_output/ --databases uniref90,mgnify --store my-store
    """
    options = ImportOptions(
        dedup=dedup,
        id_from=id_from,
        databases=tuple(name for name in (databases or "").split(",") if name),
        max_hits=_caps(max_hits),
        paired=paired,
        a2m_columns=a2m_columns,
        empty_as_no_hits=empty_as_no_hits,
        max_bytes=max_bytes,
        modified=modified,
        model=model,
        neff_max_rows=neff_max_rows,
    )
    try:
        found = AlignmentImport(alignments, layout, options)
    except ExchangeError:
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    settings = new_store_settings(store, row_order, row_order_seed)
    with _counting("importing", len(found)) as advance:
        report = import_into(
            store, found, settings=settings, on_existing=on_existing, job_id=job_id, on_record=advance
        )
    _print_report(report, store)
    if found.left_out:
        names = ", ".join(f"{name} of {number} records" for name, number in found.left_out.items())
        click.echo(f"left out   {names}: made for pairing chains (--paired takes them)")
    save_rejects(rejects_file, report.rejects)
    if report.rejects and (fail_on_rejects or not report.num_read):
        ctx.exit(1)


@click.command(name="export", context_settings=HELP)
@click.argument("store")
@click.argument("record_ids", nargs=-1, metavar="[RECORD]...")
@click.option("--all", "everything", is_flag=True, help="Every record of the store.")
@selection_options
@click.option(
    "--resume", is_flag=True, help="Pass over records whose files are there: goes on after an interruption."
)
@click.option("--format", "form", type=click.Choice(tuple(EXPORT_FORMATS)), default="a3m", show_default=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="A file (one record) or a folder. A name that ends in .gz, .xz, .zst or .bz2 is compressed.",
    show_default="the screen, for texts",
)
@click.option("--rows", "max_rows", type=click.IntRange(min=1), metavar="N", help="Only the first N rows.")
@click.option(
    "--compress", type=click.Choice(COMPRESSED_SUFFIXES), help="Compression of the files in an output folder."
)
@click.option(
    "--chai-source", type=click.Choice(CHAI_SOURCES), help="What databases that Chai does not know count as."
)
@click.option("--version", help="An older version of the store, or a tag (see `foldfeed log`).")
def export_command(
    store: str,
    record_ids: tuple[str, ...],
    everything: bool,
    where: str | None,
    record_set: str | None,
    resume: bool,
    form: str,
    output: Path | None,
    max_rows: int | None,
    compress: str | None,
    chai_source: str | None,
    version: str | None,
) -> None:
    """Write records of STORE in the formats of other programs.

    Alignment and deletion counts are exact. Which residues were inserted is not stored: texts have `x` for
    each. Records of alphafold2-npz in a folder are RECORD/features.npz, as `foldfeed ingest` looks for them.
    openproteinset and openfold-db write the rows of uniprot, too, which `ingest` takes with --paired only.

    \b
    Examples:
      foldfeed export my-store HBB_HUMAN > HBB_HUMAN.a3m
      foldfeed export my-store HBB_HUMAN --format sto --output HBB_HUMAN.sto.gz
      foldfeed export my-store HBB_HUMAN MYG_HUMAN --format alphafold3-json --output jobs/
      foldfeed export my-store HBB_HUMAN --format openproteinset --output alignments/
      foldfeed export my-store --where "depth > 100" --output msas/ --compress .gz --resume
    """
    try:
        options = ExportOptions(form=form, max_rows=max_rows, chai_source=chai_source)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    way = chosen_way(
        "export", {"--all": everything, "--where": where, "--record-set": record_set, "RECORD": record_ids}
    )
    if way is None:
        raise click.UsageError(
            "nothing given; say which records to export: their ids, --all, --where or --record-set"
        )
    opened = open_store(store, version)
    output = None if output == Path("-") else output
    chosen = choose_ids(opened, record_ids=record_ids or None, where=where, record_set=record_set)
    if output is None and not record_ids:
        raise click.UsageError(f"{way} may be many records; add --output FOLDER.")
    if resume and EXPORT_FORMATS[form].is_database:
        raise click.UsageError(f"--resume has no effect on {form}, which is written whole.")
    is_folder = EXPORT_FORMATS[form].is_folder or EXPORT_FORMATS[form].is_database
    if output is None and is_folder:
        raise click.UsageError(f"{form} is more than one file; add --output FOLDER.")
    if EXPORT_FORMATS[form].is_database and compress is not None:
        raise click.UsageError(f"--compress has no effect on {form}, which is read in the middle.")
    if output is None or (len(record_ids) == 1 and not is_folder and not _is_folder(output)):
        _export_one(opened, record_ids, options, output, compress)
        return
    _export_many(opened, chosen, options, output, compress, resume)


def _export_one(
    store: FeatureStore,
    record_ids: tuple[str, ...],
    options: ExportOptions,
    output: Path | None,
    compress: str | None,
) -> None:
    if len(record_ids) > 1:
        raise click.UsageError("Several records need --output FOLDER.")
    if compress is not None:
        raise click.UsageError(
            "--compress goes with a folder; give the file a name that ends in " + compress + "."
        )
    if output is None and not EXPORT_FORMATS[options.form].is_text and sys.stdout.isatty():
        raise click.UsageError(f"{options.form} is binary; add --output FILE or redirect it.")
    data = export_record(store[record_ids[0]], options)
    if output is None:
        sys.stdout.buffer.write(data)
    else:
        write_file(output, data)


def _export_many(
    store: FeatureStore,
    record_ids: Sequence[str],
    options: ExportOptions,
    output: Path,
    compress: str | None,
    resume: bool,
) -> None:
    if options.form == "chai-pqt":
        # Its files are called after the sequence, so two records may meet; other names say the id.
        counts = Counter(file_name(name, store[name].sequence, options) for name in record_ids)
        name, count = next(iter(counts.most_common(1)), ("", 0))
        if count > 1:
            raise ExchangeError(
                f"several of these records would be called {name!r}; export them to other folders"
            )
    output.mkdir(parents=True, exist_ok=True)
    num_files = num_there = 0
    # One record at a time: a store may hold a million.
    records = (store[record_id] for record_id in record_ids)
    with _counting("exporting", len(record_ids)) as advance:
        if EXPORT_FORMATS[options.form].is_database:
            num_files = export_database(output, _counted(records, advance), options)
        else:
            for record in _counted(records, advance):
                written = _write_record(record, options, output, compress or "", resume)
                num_files += written
                num_there += not written
    there = f" ({num_there} records were there already)" if resume else ""
    click.echo(f"{num_files} files in {output}{there}", err=True)


def _write_record(record: Record, options: ExportOptions, output: Path, suffix: str, resume: bool) -> int:
    """Writes a record's files and returns how many; 0 where a run that is resumed had written them.

    A file has its name only when it is whole. Which files a folder gets is known when they are made.
    """
    is_folder = EXPORT_FORMATS[options.form].is_folder
    name = file_name(record.record_id, record.sequence, options, suffix)
    if resume and not is_folder and (output / name).is_file():
        return 0
    files = export_files(record, options, suffix)
    if resume and all((output / name).is_file() for name in files):
        return 0
    for name, data in files.items():
        write_file(output / name, data)
    return len(files)


def _counted(records: Iterable[Record], advance: Callable[[], None]) -> Iterator[Record]:
    for record in records:
        yield record
        advance()


def _is_folder(output: Path) -> bool:
    return output.is_dir() or str(output).endswith("/")


def _caps(texts: tuple[str, ...]) -> dict[str, int]:
    caps: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name or not number.isdecimal() or not 1 <= len(number) <= 12 or int(number) < 1:
            raise click.BadParameter(f"{text!r} is not NAME=N with N at least 1", param_hint="--max-hits")
        caps[name] = int(number)
    return caps


def _print_report(report: ImportReport, store: str) -> None:
    click.echo(f"layout     {report.layout}")
    click.echo(f"read       {report.num_read} records in {report.num_parts} parts")
    if report.already_done:
        click.echo(
            f"added      0: this import was committed before (job {report.job_id}). If its records were "
            "removed or "
            "replaced since, name this one with --job-id to commit it again"
        )
    elif report.version is not None:
        click.echo(f"added      {report.num_added}, not needed {report.num_unchanged}")
        click.echo(f"store      {store} version {report.version} (job {report.job_id})")
    if report.query_insertions:
        names = ", ".join(report.query_insertions[:5])
        click.echo(
            f"note       {len(report.query_insertions)} queries have lower-case residues, which are no "
            "columns and "
            f"not in the stored sequence: {names}"
        )
    if report.renamed:
        name, record_id = next(iter(report.renamed.items()))
        click.echo(
            f"note       {len(report.renamed)} names cannot be record ids and were changed, such as "
            f"{name!r} to {record_id!r}"
        )
    if report.kept_structures:
        click.echo(f"kept structures of {len(report.kept_structures)} records, whose alignment was replaced")
    if report.lost_structures:
        names = ", ".join(report.lost_structures[:5])
        click.echo(
            f"dropped structures of {len(report.lost_structures)} records, whose sequence is another one "
            f"now: {names}"
        )
    print_rejects(report.rejects)


def save_rejects(path: Path | None, rejects: tuple[Reject, ...]) -> None:
    """Writes what was refused to the file of ``--rejects``, when one was asked for."""
    if path is not None:
        lines = [json.dumps(dataclasses.asdict(reject)) + "\n" for reject in rejects]
        write_file(path, "".join(lines).encode())


def print_rejects(rejects: tuple[Reject, ...]) -> None:
    """Prints what was refused, the first of it by name."""
    click.echo(f"rejected   {len(rejects)}", err=bool(rejects))
    for reject in rejects[:MAX_SHOWN_REJECTS]:
        name = f"{reject.record_id} ({reject.where})" if reject.record_id else reject.where
        click.echo(f"  {name}: {reject.reason}", err=True)
    if len(rejects) > MAX_SHOWN_REJECTS:
        click.echo(f"  ... and {len(rejects) - MAX_SHOWN_REJECTS} more; --rejects FILE writes all", err=True)


@contextlib.contextmanager
def _counting(verb: str, total: int) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each record; draws a bar on a terminal and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda: progress.advance(task)
