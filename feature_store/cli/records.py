"""Commands about records: ``query``, ``show``, ``crop``, ``log``, ``diff``.

Owns words and layout of what they print. Does not own how a store is asked or read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import pyarrow as pa

from foldfeed.feature_store.cli.tables import FORMATS, write_table
from foldfeed.feature_store.cli.terminal import printable
from foldfeed.feature_store.cli.tools import open_store, output_stream, parse_window, working
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.settings import ROW_ORDER_USES
from foldfeed.feature_store.format.templates import Templates
from foldfeed.feature_store.store.feature_store import FeatureStore, Record


@click.command()
@click.argument("store")
@click.argument("sql")
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="A file instead of the screen."
)
@click.option("--version", help="An older version of the store, or a tag (see `foldfeed log`).")
@click.option(
    "--rows-of",
    metavar="CONDITION",
    help="`rows`, `residues`, `structures` and `templates` hold what belongs to these records only.",
)
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE",
    help="A value for $NAME in the query, repeatable. It is always a text, cast where it meets a number or a "
    "date.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Stop the query after so long, with exit code 1.",
)
def query(
    store: str,
    sql: str,
    form: str,
    output: Path | None,
    version: str | None,
    rows_of: str | None,
    params: tuple[str, ...],
    timeout_s: float | None,
) -> None:
    """Answer a SQL question about the records of STORE.

    \b
    The tables:
      records     one row per record; `foldfeed show STORE` lists its columns
      rows        one per alignment row: record_id, rank, database, e_value, bit_score, hit_id,
                  species, pairing_key, taxonomy_id
      residues    one per residue: record_id, position (from 0), letter, profile, entropy, gap_fraction,
                  deletion_mean, neff, observed, residue_number, insertion_code
      structures  one per structure: record_id, entry_id, label_asym_id, auth_asym_id, entity_id, model,
                  method, resolution_angstrom, release_date, num_residues, num_observed
      templates   one per template hit: record_id, rank, template_id, entry_id, chain_id, release_date,
                  resolution_angstrom, e_value, score, probability, sum_probs, num_residues, num_aligned,
                  identity, coverage, sequence
      sets, splits (see `foldfeed sets`)

    A question about `rows` or `residues` reads the columns that it needs of every record (some million rows a
    second), or of those that it names: `where record_id = 'HBB_HUMAN'`, or --rows-of. `profile` has 22 shares
    in the order ARNDCQEGHILKMFPSTWYVX-; profile[1] is A's. The dialect is DuckDB's.

    \b
    Examples:
      foldfeed query my-store "select count(*), avg(depth) from records"
      foldfeed query my-store "select record_id, length from records where depth > 100" --format csv
      foldfeed query my-store "from records" --format parquet --output records.parquet
      foldfeed query my-store "select species, count(*) from rows group by 1" --rows-of "depth > 100"
      foldfeed query my-store "select position, letter, entropy from residues where record_id = $id" \\
          --param id=HBB_HUMAN --timeout 60
    """
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise click.UsageError("Parquet is binary; add --output FILE or redirect it.")
    values = _named_values(params)
    with working("asking"):
        answer = open_store(store, version).query(sql, rows_of, params=values, timeout_s=timeout_s)
    with output_stream(output) as out:
        write_table(answer, form, out)


def _named_values(params: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in params:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{text!r} is not NAME=VALUE, e.g. id=HBB_HUMAN", param_hint="--param")
        if name.lower() in map(str.lower, found):
            raise click.BadParameter(f"{name!r} is given twice (DuckDB ignores case)", param_hint="--param")
        found[name] = value
    return found


@click.command()
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
    order = store.settings.row_order
    click.echo(f"row order    {order}{'' if seed is None else f' (seed {seed})'}: {ROW_ORDER_USES[order]}")
    click.echo("columns of the table `records`:")
    for field in store.table().schema:
        click.echo(f"  {field.name:<16} {field.type}")


def _show_record(record: Record, num_rows: int) -> None:
    click.echo(f"record       {record.record_id}")
    click.echo(f"description  {printable(record.description)}")
    click.echo(f"length       {record.length}")
    click.echo(f"depth        {record.depth}")
    if record.neff is not None:
        click.echo(f"N_eff        {record.neff:.1f} (rows at 80 % identity share one vote)")
    structure = record.structure()
    if structure is not None:
        facts = ", ".join(f"{name} {value}" for name, value in sorted(structure.source.items()))
        observed = int(structure.observed.sum())
        click.echo(f"structure    {observed} of {record.length} residues observed; {printable(facts)}")
    templates = record.templates()
    if templates is not None:
        click.echo(f"templates    {_told_of(templates)}")
    for use in record.databases:
        click.echo(
            f"database     {use['name']}: {use['num_rows']} rows of {use['num_hits']} hits "
            f"({use['tool']} {use['tool_version']}, data {use['digest'][:12]})"
        )
    click.echo(f"sequence     {record.sequence}")
    if num_rows:
        click.echo()
        write_table(record.rows().slice(0, num_rows), "table", sys.stdout.buffer)


def _told_of(templates: Templates) -> str:
    facts = templates.source
    words = [f"{len(templates)} hits of {facts.get('num_hits', 'unknown')} found"]
    if "database" in facts:
        words.append(f"in {facts['database']} ({facts.get('tool', '')} {facts.get('tool_version', '')})")
    if templates.hits:
        words.append(f"the best is {templates.hits[0].template_id}")
        known = [hit.release_date for hit in templates.hits if hit.release_date is not None]
        words.append(f"released {min(known)} to {max(known)}" if known else "release dates unknown")
    return printable("; ".join(words))


@click.command()
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
                out.write(f"{number:>7}  {alphabet.decode(row)}  {printable(name)}\n".encode())


@click.command()
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


@click.command()
@click.argument("store")
@click.argument("old")
@click.argument("new", required=False)
@click.option("--format", "form", type=click.Choice(FORMATS[:3]), default="table", show_default=True)
def diff(store: str, old: str, new: str | None, form: str) -> None:
    """Show what changed from version OLD of STORE to version NEW, the newest by default.

    OLD and NEW are versions or tags (see `foldfeed log`). One row per record that was added, removed,
    replaced (it says something else) or annotated (columns of one's own, or N_eff, differ). WHY names what
    differs: description, sequence, depth, alignment, rows (hit ids, E-values, ...), databases, extra,
    structure, templates. VERSIONS are the commits that did it, JOB_IDS their jobs; both are empty where
    `gc` may have removed what tells. The exit code is 0 whether or not anything changed.

    \b
    Examples:
      foldfeed diff my-store 3
      foldfeed diff my-store paper-1 paper-2 --format json
    """
    then, now = open_store(store, old), open_store(store, new)
    with working("comparing"):
        found = now.diff(then.version)
    table = found.table
    if form == "table":
        counts = ", ".join(f"{number} {change}" for change, number in found.counts.items())
        click.echo(f"version {found.old} to {found.new}, {len(found.commits)} commits: {counts}")
        if not len(table):
            return
    if form != "json":
        for at, field in enumerate(table.schema):
            if pa.types.is_list(field.type):
                values = [" ".join(map(str, value or ())) for value in table[field.name].to_pylist()]
                table = table.set_column(at, field.name, pa.array(values, pa.string()))
    # The lines above go through click's own stream.
    sys.stdout.flush()
    write_table(table, form, sys.stdout.buffer)
