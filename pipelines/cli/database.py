"""The command ``foldfeed database``: add, stage, list and verify search databases by name.

Owns words and exit codes. Does not own the registry (`databases.registry`) or the reading of
databases.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from foldfeed.pipelines.databases.files import differences, is_compressed, make_manifest, refreshed, unpack
from foldfeed.pipelines.databases.registry import VARIABLE, Registry
from foldfeed.pipelines.databases.spec import TEMPLATE_TOOLS, TOOLS, DatabaseSpec
from foldfeed.pipelines.errors import ConfigError
from foldfeed.pipelines.manifest import DatabaseManifest
from foldfeed.pipelines.tools import hmmsearch

if TYPE_CHECKING:
    from foldfeed.pipelines.databases.staging import StagedDatabase


# Files that gave nothing, printed by name.
_MAX_SHOWN = 20


def registry_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--registry`` to a command."""
    return click.option(
        "--registry",
        metavar="FILE",
        help=f"File of known databases. [default: ${VARIABLE}, else foldfeed/databases.json in "
        "$XDG_DATA_HOME or ~/.local/share]",
    )(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def database() -> None:
    """Know search databases by name: what is in them, which release, whether they are unchanged.

    \b
    Examples:
      foldfeed database add uniref90 /db/uniref90.fasta.gz --unpack-to /scratch/db --version 2026_03
      foldfeed database add uniref30 /db/UniRef30_2023_02 --licence CC-BY-SA-4.0
      foldfeed database stage s3://bucket/mgnify.fasta@16 --to /scratch/db --name mgnify
      foldfeed database add pdb pdb_seqres.txt release_dates.tsv --tool hmmsearch
      foldfeed database add pdb mmcif_files/ --tool hmmsearch --unpack-to /scratch/db
      foldfeed database build-hhsuite /scratch/db/mine --store my-store --name mine
      foldfeed database list
      foldfeed build --queries q.fasta --database uniref90 --database uniref30 --store my-store
    """


@database.command()
@click.argument("name")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--tool",
    type=click.Choice(TOOLS + TEMPLATE_TOOLS),
    help="hmmsearch or hhsearch for templates. [default: hhblits for an HH-suite prefix, else jackhmmer]",
)
@click.option("--version", default="", metavar="TEXT", help="Of the release, e.g. 2026_03.")
@click.option("--date", default="", metavar="YYYY-MM-DD", help="Of the release.")
@click.option("--licence", default="", metavar="TEXT", help="Of the data, e.g. CC-BY-4.0.")
@click.option(
    "--unpack-to",
    metavar="DIR",
    help="Where a .gz or .zst is unpacked to [default: beside it], or what is made of mmCIF files goes.",
)
@click.option("--replace", is_flag=True, help="Take this in place of other data of that name.")
@registry_option
def add(
    name: str,
    paths: tuple[str, ...],
    tool: str | None,
    version: str,
    date: str,
    licence: str,
    unpack_to: str | None,
    replace: bool,
    registry: str | None,
) -> None:
    """Read a database whole, count its sequences and residues, and remember it under NAME.

    PATH is a FASTA file (plain, gzip or Zstandard), with --tool mmseqs2 a FASTA file or an MMseqs2 database
    (of clusters, DB_seq and DB_aln are part of it), or HH-suite prefixes: several are searched together.
    The tools read plain files, so a single compressed one is unpacked once. Several plain FASTA files, or
    PATH@16 for PATH-00000-of-00016 and so on, are shards of one database: searched apart, with the answer
    of one.

    Templates (--tool hmmsearch) are two files, the sequences of known structures (FASTA like the PDB's
    pdb_seqres.txt) and a table of their release dates: lines of entry, tab, YYYY-MM-DD and perhaps a tab and
    the resolution, or OpenFold's mmcif_cache.json. With --tool hhsearch the first is an HH-suite prefix like
    the PDB70's. Or, for hmmsearch, a folder of mmCIF files, from which both are made.
    """
    if date:
        _check_date(date)
    source = ""
    if tool in TEMPLATE_TOOLS:
        _add_templates(
            tool,
            name,
            paths,
            unpack_to,
            {"version": version, "date": date, "licence": licence},
            replace,
            registry,
        )
        return
    if any("://" in path for path in paths):
        raise click.UsageError(
            "the tools read local files; copy and add it with "
            "`foldfeed database stage URL --to FOLDER --name NAME`"
        )
    if len(paths) > 1 and any("," in path for path in paths):
        raise click.UsageError("a path with a comma cannot be one of several; rename it")
    if len(paths) > 1 and any(map(is_compressed, paths)) and tool != "hhblits":
        raise click.UsageError("of several files each must be plain FASTA; decompress those that are not")
    if len(paths) == 1 and is_compressed(paths[0]) and tool != "hhblits":
        source, paths = paths[0], (unpack(name, paths[0], unpack_to),)
        click.echo(f"unpacked {source} to {paths[0]}")
    elif unpack_to is not None:
        raise click.UsageError("--unpack-to has no effect: PATH ends neither in .gz nor in .zst")
    text = f"{name}={','.join(paths)}" + (f":{tool}" if tool else "")
    try:
        spec = DatabaseSpec.parse(text)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    manifest = make_manifest(spec, version=version, date=date, licence=licence, source=source)
    Registry(registry).put(manifest, replace=replace)
    click.echo(_line(manifest))


@database.command()
@click.argument("source", metavar="NAME_OR_URL")
@click.option("--to", "folder", required=True, metavar="FOLDER", help="On a local disk; made when absent.")
@click.option("--name", metavar="NAME", help="Count the copy, too, and remember it under this name.")
@click.option("--version", default="", metavar="TEXT", help="Of the release; with --name.")
@click.option("--date", default="", metavar="YYYY-MM-DD", help="Of the release; with --name.")
@click.option("--licence", default="", metavar="TEXT", help="Of the data; with --name.")
@click.option("--replace", is_flag=True, help="Take this in place of other data of that name; with --name.")
@registry_option
def stage(
    source: str,
    folder: str,
    name: str | None,
    version: str,
    date: str,
    licence: str,
    replace: bool,
    registry: str | None,
) -> None:
    """Copy a database to a local disk, once per host, and say where it lies.

    NAME_OR_URL is a name that `add` or `stage --name` gave, or a path or URL (anything with a slash): FASTA
    files, plain or compressed (the copy is plain), PATH@16, HH-suite prefixes (several with commas), or an
    MMseqs2 database whose name has no dot. A second process waits and finds the copy. After a kill the same
    command goes on where the copy stopped; a source that changes meanwhile is an error. A database known by
    name is checked against its digest, and elsewhere copied from the URL that it came from. Copies of other
    releases stay until you remove them.
    """
    from foldfeed.pipelines.building.progress import byte_bars
    from foldfeed.pipelines.databases.staging import stage as copy

    known = Registry(registry)
    if "/" not in source:
        if name is not None or version or date or licence or replace:
            raise click.UsageError(f"{source!r} is a name, and what it stands for is known; leave --name out")
        with byte_bars() as tell:
            click.echo(_where(copy("", folder, name=source, manifest=known.get(source), tell=tell)))
        return
    if name is None and (version or date or licence or replace):
        raise click.UsageError("--version, --date, --licence and --replace have no effect without --name")
    if date:
        _check_date(date)
    with byte_bars() as tell:
        found = copy(source, folder, name=name or _name_of(source), tell=tell)
    if name is not None:
        manifest = make_manifest(
            found.spec, version=version, date=date, licence=licence, source=_absolute(source)
        )
        known.put(manifest, replace=replace)
        click.echo(_line(manifest))
    click.echo(_where(found))


@database.command("build-hhsuite")
@click.argument("prefix", metavar="PREFIX")
@click.option("--store", metavar="URL", help="Feature store whose alignments it is made of.")
@click.option("--where", metavar="SQL", help='Which records of the store, e.g. "depth > 100". [default: all]')
@click.option(
    "--folder", metavar="FOLDER", help="A3M or Stockholm files (plain, gzip, Zstandard) instead of a store."
)
@click.option("--cpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option("--name", metavar="NAME", help="Remember it under this name.")
@registry_option
def build_hhsuite(
    prefix: str,
    store: str | None,
    where: str | None,
    folder: str | None,
    cpus: int,
    name: str | None,
    registry: str | None,
) -> None:
    """Make an HH-suite database of alignments, ready for `--database NAME=PREFIX:hhblits`.

    The alignments are those of the records of a store, or the files of a folder. Files PREFIX_a3m,
    PREFIX_hhm and PREFIX_cs219 (.ffdata, .ffindex) are made; equal alignments give equal bytes. hhblits calls
    an entry by its record's id, or by its file's name.
    """
    from foldfeed.feature_store.store.feature_store import FeatureStore
    from foldfeed.feature_store.store.selection import choose_ids
    from foldfeed.pipelines.databases import hhsuite_build

    if (store is None) == (folder is None):
        raise click.UsageError("give either --store or --folder")
    if folder is not None and where is not None:
        raise click.UsageError("--where has no effect with --folder")
    if folder is not None:
        if not os.path.isdir(folder):
            raise click.UsageError(f"--folder {folder!r} is no folder")
        alignments = hhsuite_build.alignments_of_folder(folder)
    else:
        opened = FeatureStore.open(str(store))
        alignments = hhsuite_build.alignments_of_store(opened, choose_ids(opened, where=where))
    number = hhsuite_build.build_hhsuite(alignments, prefix, cpus=cpus)
    click.echo(f"{number:,} alignments: {os.path.abspath(prefix)}")
    if name is not None:
        spec = DatabaseSpec(name=name, paths=(os.path.abspath(prefix),), tool="hhblits")
        manifest = make_manifest(spec)
        Registry(registry).put(manifest, replace=False)
        click.echo(_line(manifest))


@database.command("list")
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "csv", "json", "parquet")),
    default="table",
    show_default=True,
)
@registry_option
def list_command(form: str, registry: str | None) -> None:
    """List the known databases."""
    import pyarrow as pa

    from foldfeed.feature_store.cli.tables import write_table

    names = ["name", "tool", "num_sequences", "num_residues", "num_bytes", "version", "date", "licence"]
    names += ["added", "digest", "paths"]
    rows = [
        {name: getattr(manifest, name) for name in names} | {"paths": list(manifest.paths)}
        for manifest in Registry(registry).load().values()
    ]
    if not rows and form == "table":
        click.echo(f"{Registry(registry).path}: no databases; `foldfeed database add` adds one")
        return
    numbers = {"num_sequences", "num_residues", "num_bytes"}
    kinds = [(name, pa.int64() if name in numbers else pa.string()) for name in names[:-1]]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*kinds, ("paths", pa.list_(pa.string()))]))
    write_table(table, form, sys.stdout.buffer)


@database.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--quick", is_flag=True, help="Read only files whose size, time or inode changed.")
@registry_option
def verify(names: tuple[str, ...], quick: bool, registry: str | None) -> None:
    """Check that databases are as they were added, all unless NAMEs are given. Exit code 1 if not."""
    known = Registry(registry)
    wrong = False
    for manifest in [known.get(name) for name in names] if names else known.load().values():
        found = differences(manifest, quick=quick)
        for sentence in found:
            click.echo(f"{manifest.name}: {sentence}")
        if not found:
            # A registry that others own need not be writable unless there is something new to say.
            if (now := refreshed(manifest)) != manifest:
                known.put(now, replace=False)
            click.echo(f"{manifest.name}: unchanged since {manifest.added}")
        wrong = wrong or bool(found)
    if wrong:
        click.get_current_context().exit(1)


def _add_templates(
    tool: str,
    name: str,
    paths: tuple[str, ...],
    unpack_to: str | None,
    facts: dict[str, str],
    replace: bool,
    registry: str | None,
) -> None:
    from foldfeed.feature_store.cli.tools import working
    from foldfeed.pipelines.databases.template_database import count_dated, make_template_files

    known = Registry(registry)
    if len(paths) == 1 and os.path.isdir(paths[0]) and tool == hmmsearch.NAME:
        if unpack_to is None:
            raise click.UsageError(f"{paths[0]} is a folder; say with --unpack-to where the two files go")
        with working("reading mmCIF files"):
            made = make_template_files(name, paths[0], unpack_to)
        paths = (made.fasta, made.dates)
        click.echo(
            f"{made.num_chains:,} chains of {made.num_entries:,} entries, {made.num_undated:,} of these "
            f"without a release date; {len(made.rejects):,} files left out"
        )
        for where, reason in made.rejects[:_MAX_SHOWN]:
            click.echo(f"  {where}: {reason}", err=True)
        if len(made.rejects) > _MAX_SHOWN:
            click.echo(f"  ... and {len(made.rejects) - _MAX_SHOWN:,} more", err=True)
    elif len(paths) == 2 and is_compressed(paths[0]):
        paths = (unpack(name, paths[0], unpack_to), paths[1])
    elif unpack_to is not None:
        raise click.UsageError("--unpack-to has no effect: the first PATH is no folder and not compressed")
    try:
        spec = DatabaseSpec(name=name, paths=tuple(map(os.path.abspath, paths)), tool=tool)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    manifest = make_manifest(spec, **facts)
    num_dated, num_all = count_dated(spec)
    known.put(manifest, replace=replace)
    click.echo(_line(manifest))
    click.echo(f"{name}: {num_dated:,} of {num_all:,} sequences have a release date")


def _check_date(text: str) -> None:
    try:
        datetime.date.fromisoformat(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no date; write YYYY-MM-DD", param_hint="--date") from error


def _where(found: StagedDatabase) -> str:
    done = "was there" if found.was_there else f"copied, {found.num_bytes:,} bytes"
    return f"{done}: {found.spec.name}={','.join(found.spec.paths)}:{found.spec.tool}"


def _name_of(source: str) -> str:
    """Returns a name for a copy that nobody named: the first file's, without what follows the first dot."""
    stem = source.split(",")[0].rpartition("/")[2].split("@")[0].split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem).lstrip("-")[:64] or "database"


def _absolute(source: str) -> str:
    return ",".join(one if "://" in one else os.path.abspath(one) for one in source.split(","))


def _line(manifest: DatabaseManifest) -> str:
    things = ("alignments", "columns") if manifest.tool == "hhblits" else ("sequences", "residues")
    return (
        f"{manifest.name}: {manifest.num_sequences:,} {things[0]}, {manifest.num_residues:,} {things[1]}, "
        f"{manifest.num_bytes:,} bytes in {len(manifest.files)} files, digest {manifest.digest[:16]}"
    )
