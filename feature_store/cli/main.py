"""The command line ``foldfeed``: its root, the commands that look into a store, doors for other rooms.

Other rooms add commands through the entry point group ``foldfeed.commands``; nothing of theirs is imported
until such a command runs, so a person who only queries a store needs neither Beam nor torch.

Exit codes: 0 done, 1 the run failed (any `FoldfeedError`), 2 bad usage. A traceback appears only with
``--debug``.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa

from foldfeed.feature_store.cli import look as look_cli
from foldfeed.feature_store.cli.tables import FORMATS, write_table
from foldfeed.feature_store.cli.tools import open_store, output_stream, parse_window, working
from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.store.feature_store import FeatureStore, Record

COMMANDS_GROUP = "foldfeed.commands"


class RootGroup(click.Group):
    """The root: finds commands of other rooms, and turns our errors into one line and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns own commands and those of installed rooms."""
        return sorted({*super().list_commands(ctx), *_entry_points()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns a command; loads another room only for its own command."""
        own = super().get_command(ctx, cmd_name)
        found = _entry_points().get(cmd_name)
        return own if own is not None or found is None else found.load()

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the chosen command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output left (`| head`); click ends the program quietly.
            raise
        except (FoldfeedError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=COMMANDS_GROUP)}


@click.group(cls=RootGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="foldfeed", prog_name="foldfeed")
def main(debug: bool) -> None:
    """Feed protein folding models: build a feature store, look into it, ask it questions.

    \b
    Examples:
      foldfeed build --queries q.fasta --database uniref90=uniref90.fasta --store my-store
      foldfeed query my-store "select record_id, depth from records order by depth desc"
      foldfeed plot my-store HBB_HUMAN --output coverage.png
    """


@main.command()
@click.argument("store")
@click.argument("sql")
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="A file instead of the screen."
)
@click.option("--version", help="An older version of the store, or a tag (see `foldfeed log`).")
@click.option("--rows-of", metavar="CONDITION", help="The table `rows` holds the rows of these records only.")
def query(
    store: str, sql: str, form: str, output: Path | None, version: str | None, rows_of: str | None
) -> None:
    """Answer a SQL question about the records of STORE.

    The tables are `records` (`foldfeed show STORE` lists its columns), `rows` (one per alignment row:
    record_id, rank, database, e_value, bit_score, hit_id, species), `sets` and `splits` (see
    `foldfeed sets`). A question about `rows` reads the columns that it needs of every record (some million
    rows a second), or of those that it names: `where record_id = 'HBB_HUMAN'`, or --rows-of. The dialect is
    DuckDB's.

    \b
    Examples:
      foldfeed query my-store "select count(*), avg(depth) from records"
      foldfeed query my-store "select record_id, length from records where depth > 100" --format csv
      foldfeed query my-store "from records" --format parquet --output records.parquet
      foldfeed query my-store "select species, count(*) from rows group by 1" --rows-of "depth > 100"
    """
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise click.UsageError("Parquet is binary; add --output FILE or redirect it.")
    with working("asking"):
        answer = open_store(store, version).query(sql, rows_of)
    with output_stream(output) as out:
        write_table(answer, form, out)


@main.command()
@click.argument("store")
@click.argument("record_id", required=False)
@click.option("--rows", "num_rows", type=click.IntRange(min=0), default=5, show_default=True)
@click.option("--version", help="An older version of the store, or a tag.")
def show(store: str, record_id: str | None, num_rows: int, version: str | None) -> None:
    """Show what STORE holds, or one RECORD of it with its first rows.

    \b
    Examples:
      foldfeed show my-store
      foldfeed show my-store HBB_HUMAN --rows 20
    """
    opened = open_store(store, version)
    if record_id is None:
        _show_store(opened)
    else:
        _show_record(opened[record_id], num_rows)


def _show_store(store: FeatureStore) -> None:
    rows = store.table(["length", "depth"])
    tokens = sum(a * b for a, b in zip(rows["length"].to_pylist(), rows["depth"].to_pylist(), strict=True))
    click.echo(f"store        {store.url}")
    click.echo(f"version      {store.version}")
    click.echo(f"records      {len(store)}")
    click.echo(f"tokens       {tokens}")
    click.echo(f"structures   {store.table(['record_id'], 'structure is not null').num_rows}")
    click.echo(f"fingerprint  {store.fingerprint}")
    click.echo(f"tiles        {store.settings.tile_rows} rows x {store.settings.tile_cols} residues")
    seed = store.settings.row_order_seed
    click.echo(f"row order    {store.settings.row_order}{'' if seed is None else f' (seed {seed})'}")
    click.echo("columns of the table `records`:")
    for field in store.table().schema:
        click.echo(f"  {field.name:<16} {field.type}")


def _show_record(record: Record, num_rows: int) -> None:
    click.echo(f"record       {record.record_id}")
    click.echo(f"description  {record.description}")
    click.echo(f"length       {record.length}")
    click.echo(f"depth        {record.depth}")
    if record.neff is not None:
        click.echo(f"N_eff        {record.neff:.1f} (rows at 80 % identity share one vote)")
    structure = record.structure()
    if structure is not None:
        facts = ", ".join(f"{name} {value}" for name, value in sorted(structure.source.items()))
        observed = int(structure.observed.sum())
        click.echo(f"structure    {observed} of {record.length} residues observed; {facts}")
    for use in record.databases:
        click.echo(
            f"database     {use['name']}: {use['num_rows']} rows of {use['num_hits']} hits "
            f"({use['tool']} {use['tool_version']}, data {use['digest'][:12]})"
        )
    click.echo(f"sequence     {record.sequence}")
    if num_rows:
        click.echo()
        write_table(record.rows().slice(0, num_rows), "table", sys.stdout.buffer)


@main.command()
@click.argument("store")
@click.argument("record_id")
@click.option("--residues", default=":", help="Window a:b from 0, end excluded; or one.", show_default="all")
@click.option("--rows", default=":", help="Ranks a:b, or one; the query is 0.", show_default="all")
@click.option("--format", "form", type=click.Choice(("text", "npz")), default="text", show_default=True)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="A file instead of the screen."
)
@click.option("--version", help="An older version of the store, or a tag (see `foldfeed log`).")
def crop(
    store: str, record_id: str, residues: str, rows: str, form: str, output: Path | None, version: str | None
) -> None:
    """Read a piece of one alignment: only the tiles it touches.

    `text` prints one row per line: rank, aligned residues, hit id. `npz` holds msa (uint8) and deletions
    (int32).

    \b
    Examples:
      foldfeed crop my-store HBB_HUMAN --residues 20:80 --rows 0:10
      foldfeed crop my-store HBB_HUMAN --format npz --output crop.npz
    """
    if form == "npz" and output is None and sys.stdout.isatty():
        raise click.UsageError("npz is binary; add --output FILE or redirect it.")
    record = open_store(store, version)[record_id]
    window = parse_window("--residues", residues, record.length)
    ranks = parse_window("--rows", rows, record.depth)
    with working("reading"):
        piece = record.crop(residues=window, rows=ranks)
    with output_stream(output) as out:
        if form == "npz":
            np.savez_compressed(out, msa=piece.msa, deletions=piece.deletions)
        else:
            names = record.rows()["hit_id"].to_pylist()[ranks]
            for number, (row, name) in enumerate(zip(piece.msa, names, strict=True), start=ranks.start):
                out.write(f"{number:>7}  {alphabet.decode(row)}  {name}\n".encode())


@main.command()
@click.argument("store")
@click.option("--format", "form", type=click.Choice(FORMATS[:3]), default="table", show_default=True)
def log(store: str, form: str) -> None:
    """List the versions of STORE, the newest first.

    \b
    Example:
      foldfeed log my-store --format json
    """
    entries = open_store(store).log()
    table = pa.table(
        {
            "version": [entry.version for entry in entries],
            "time": [entry.time.isoformat(timespec="seconds") for entry in entries],
            "operation": [entry.operation for entry in entries],
            "records": [entry.num_added for entry in entries],
            "removed": [entry.num_removed for entry in entries],
            "tags": [" ".join(entry.tags) for entry in entries],
            "job_id": [entry.job_id for entry in entries],
            "message": [entry.message for entry in entries],
        }
    )
    write_table(table, form, sys.stdout.buffer)


for command in look_cli.COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
