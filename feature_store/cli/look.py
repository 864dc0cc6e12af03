"""Commands that draw, report, and give names to answers: plot, report, sets, save-set, save-split.

Each fills an options object and calls one function. matplotlib takes most of a second to import, so it is
imported inside the commands that draw; the others do not wait for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import pyarrow as pa

from foldfeed.feature_store.cli.tables import FORMATS, write_table
from foldfeed.feature_store.cli.tools import failing_as_usage, open_store, parse_window, working
from foldfeed.feature_store.format.effective_rows import DEFAULT_IDENTITY
from foldfeed.feature_store.looking.measures import sample_positions, store_effective_rows
from foldfeed.feature_store.store.feature_store import FeatureStore
from foldfeed.feature_store.store.record_sets import Within
from foldfeed.feature_store.store.splits import MEMBER_COLUMNS, read_cluster_tsv

RECORD_KINDS = ("coverage", "logo")
STORE_KINDS = ("lengths", "depths", "neff")
PICTURES = (".png", ".svg")
LAYOUTS = ("cluster-member", "member-cluster")
NEFF_RECORDS = 1000
REPORT_NEFF_RECORDS = 200
# The options of `plot` that belong to one kind each.
ONLY_FOR = {"residues": "logo", "identity": "neff", "max_records": "neff"}


@click.command()
@click.argument("store")
@click.argument("record_id", required=False)
@click.option(
    "--kind",
    type=click.Choice(RECORD_KINDS + STORE_KINDS),
    default="coverage",
    show_default=True,
    help="coverage and logo show one record; lengths, depths and neff the whole store.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Name of the picture, .png or .svg.",
    show_default="RECORD_ID.png",
)
@click.option("--residues", help="Window a:b of a logo, 0-based, end excluded.", show_default="all")
@click.option(
    "--identity",
    type=click.FloatRange(0, 1, min_open=True),
    help="Rows that are so identical count as one in N_eff.",
    show_default=str(DEFAULT_IDENTITY),
)
@click.option(
    "--max-records",
    type=click.IntRange(min=1),
    help="Draw N_eff of so many records, evenly spaced by id.",
    show_default=str(NEFF_RECORDS),
)
@click.option("--version", help="An older version of the store, or a tag.")
def plot(
    store: str,
    record_id: str | None,
    kind: str,
    output: Path | None,
    residues: str | None,
    identity: float | None,
    max_records: int | None,
    version: str | None,
) -> None:
    """Draw one alignment, or what a whole STORE holds.

    \b
    coverage  identity to the query and rows per residue, as ColabFold draws them
    logo      information of each column, as letters
    lengths   histogram of the lengths of all records
    depths    histogram of the depths of all alignments
    neff      effective number of rows against length (compares all pairs of rows)

    \b
    Examples:
      foldfeed plot my-store HBB_HUMAN
      foldfeed plot my-store HBB_HUMAN --kind logo --residues 20:70 --output logo.svg
      foldfeed plot my-store --kind depths --output depths.png
      foldfeed plot my-store --kind neff --identity 0.62
    """
    _check_plot_usage(kind, record_id, residues=residues, identity=identity, max_records=max_records)
    path = output or Path(_file_name(store, record_id, kind))
    if path.suffix.lower() not in PICTURES:
        raise click.BadParameter(f"{path.name!r} must end in {' or '.join(PICTURES)}", param_hint="--output")
    opened = open_store(store, version)
    if record_id is not None:
        data = _draw_record(opened, record_id, kind, residues, path.suffix)
    else:
        data = _draw_store(
            opened, kind, identity or DEFAULT_IDENTITY, max_records or NEFF_RECORDS, path.suffix
        )
    with failing_as_usage(path):
        path.write_bytes(data)
    click.echo(path)


def _check_plot_usage(kind: str, record_id: str | None, **options: object) -> None:
    if kind in RECORD_KINDS and record_id is None:
        raise click.UsageError(f"--kind {kind} shows one record; name it after STORE.")
    if kind in STORE_KINDS and record_id is not None:
        raise click.UsageError(f"--kind {kind} shows the whole store; leave {record_id!r} out.")
    for name, value in options.items():
        if value is not None and ONLY_FOR[name] != kind:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect with --kind {kind}.")


def _file_name(store: str, record_id: str | None, kind: str) -> str:
    what = record_id or store.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9_.-]", "_", what) + ("" if kind == "coverage" else f"-{kind}") + ".png"


def _draw_record(store: FeatureStore, record_id: str, kind: str, residues: str | None, suffix: str) -> bytes:
    from foldfeed.feature_store.looking import logo, plots

    record = store[record_id]
    with working("drawing"):
        if kind == "coverage":
            return plots.render(plots.coverage_figure(record), suffix)
        window = parse_window("--residues", residues or ":", record.length)
        if window.stop - window.start > logo.MAX_COLUMNS:
            raise click.BadParameter(
                f"{record_id!r} has {record.length} residues; choose a window a:b of at most "
                f"{logo.MAX_COLUMNS}",
                param_hint="--residues",
            )
        return plots.render(logo.logo_figure(record, window), suffix)


def _draw_store(store: FeatureStore, kind: str, identity: float, max_records: int, suffix: str) -> bytes:
    from foldfeed.feature_store.looking import plots

    name = store.url.rstrip("/").rsplit("/", 1)[-1]
    if kind == "lengths":
        return plots.render(plots.lengths_figure(store.table(["length"]), name), suffix)
    if kind == "depths":
        return plots.render(plots.depths_figure(store.table(["depth"]), name), suffix)
    with working("comparing rows", len(sample_positions(len(store), max_records))) as advance:
        table = store_effective_rows(store, identity=identity, max_records=max_records, on_record=advance)
    return plots.render(plots.neff_figure(table, name, len(store), identity), suffix)


@click.command()
@click.argument("store")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page.",
)
@click.option("--results", help="Folder of a build's results (`build --results`), to list its dead letters.")
@click.option("--dead-letters", metavar="FILE", help="One file of dead letters, instead of --results.")
@click.option("--title", help="Title of the page.", show_default="the store's name")
@click.option(
    "--neff-records",
    type=click.IntRange(min=0),
    default=REPORT_NEFF_RECORDS,
    show_default=True,
    help="Compute N_eff of so many records; 0 for none.",
)
@click.option("--version", help="An older version of the store, or a tag.")
def report(
    store: str,
    output: Path,
    results: str | None,
    dead_letters: str | None,
    title: str | None,
    neff_records: int,
    version: str | None,
) -> None:
    """Write one page about STORE: numbers, pictures, databases, licences, sizes, jobs, dead letters.

    The page is one HTML file without scripts and loads nothing from elsewhere.

    \b
    Examples:
      foldfeed report my-store
      foldfeed report my-store --results my-results --output my-store.html
    """
    from foldfeed.feature_store.looking.report import ReportOptions, make_report

    if results is not None and dead_letters is not None:
        raise click.UsageError("--results and --dead-letters both name dead letters; give one.")
    options = ReportOptions(
        title=title, results=results, dead_letters=dead_letters, neff_records=neff_records
    )
    opened = open_store(store, version)
    with working("writing the report"):
        page = make_report(opened, options)
    with failing_as_usage(output):
        output.write_text(page, encoding="utf-8")
    click.echo(output)


@click.command()
@click.argument("store")
@click.option("--format", "form", type=click.Choice(FORMATS[:3]), default="table", show_default=True)
def sets(store: str, form: str) -> None:
    """List the record sets and splits that are saved in STORE.

    \b
    Example:
      foldfeed sets my-store
    """
    opened = open_store(store)
    found = [opened.set(name) for name in opened.set_names()]
    cuts = [opened.split(name) for name in opened.split_names()]
    rows = [
        ("set", one.name, len(one), one.store_version, _promise(one.within), one.fingerprint, one.sql)
        for one in found
    ] + [
        ("split", cut.name, len(cut.table), None, _shares(cut.fractions), cut.fingerprint, cut.source)
        for cut in cuts
    ]
    names = ("kind", "name", "records", "version", "parts", "fingerprint", "made_from")
    types = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string(), pa.string(), pa.string())
    columns = [pa.array([row[at] for row in rows], kind) for at, kind in enumerate(types)]
    write_table(pa.table(columns, names=list(names)), form, sys.stdout.buffer)


def _promise(within: Within | None) -> str:
    return "" if within is None else f"{within.split}/{within.part}"


def _shares(fractions: Mapping[str, float]) -> str:
    return ", ".join(f"{part}={share:g}" for part, share in fractions.items())


@click.command("save-set")
@click.argument("store")
@click.argument("name")
@click.argument("sql")
@click.option("--within", help="SPLIT/PART: refuse records of any other part.")
@click.option("--version", help="An older version of the store, or a tag.")
def save_set(store: str, name: str, sql: str, within: str | None, version: str | None) -> None:
    """Save the answer of a query as record set NAME of STORE.

    The query needs a column record_id. A name never changes its meaning. Tables: see `query`.

    \b
    Examples:
      foldfeed save-set my-store deep "select record_id from records where depth >= 1000"
      foldfeed save-set my-store train "from splits where part = 'train'" --within by-family/train
    """
    promise = None
    if within is not None:
        split, slash, part = within.partition("/")
        if not (slash and split and part):
            raise click.BadParameter(f"{within!r} is not SPLIT/PART", param_hint="--within")
        promise = (split, part)
    opened = open_store(store, version)
    with working("asking"):
        made = opened.save_set(name, sql, within=promise)
    click.echo(f"{made.name}: {len(made)} records, fingerprint {made.fingerprint}")


@click.command("save-split")
@click.argument("store")
@click.argument("name")
@click.option(
    "--part",
    "parts",
    multiple=True,
    required=True,
    metavar="NAME=SHARE",
    help="A part and its share of the clusters; give all of them, adding up to 1.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--column", help="Column with each record's cluster, or extra.KEY.")
@click.option(
    "--clusters",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Two columns, tab separated, as MMseqs2 easy-cluster writes them.",
)
@click.option("--layout", type=click.Choice(LAYOUTS), help="Of --clusters.", show_default=LAYOUTS[0])
@click.option("--member", type=click.Choice(MEMBER_COLUMNS), help="Of --clusters.", show_default="record_id")
def save_split(
    store: str,
    name: str,
    parts: tuple[str, ...],
    seed: int,
    column: str | None,
    clusters: Path | None,
    layout: str | None,
    member: str | None,
) -> None:
    """Split the records of STORE so that no cluster of similar proteins is in two parts.

    The part of a cluster depends on the seed and the cluster's name alone, so it stays when the store grows.

    \b
    Examples:
      foldfeed save-split my-store by-family --column extra.family --part train=0.9 --part test=0.1
      foldfeed save-split my-store by-mmseqs --clusters c_cluster.tsv --part train=0.8 --part val=0.2
    """
    if (column is None) == (clusters is None):
        raise click.UsageError("Give the clusters once: --column or --clusters.")
    if clusters is None and (layout or member):
        raise click.UsageError("--layout and --member say how to read --clusters; there is none.")
    fractions = dict(_part(text) for text in parts)
    if len(fractions) != len(parts):
        raise click.BadParameter("a part is given twice", param_hint="--part")
    opened = open_store(store)
    found = column if clusters is None else read_cluster_tsv(clusters, layout or LAYOUTS[0])
    made = opened.save_split(
        name,
        found or "",
        fractions=fractions,
        seed=seed,
        member=member or MEMBER_COLUMNS[0],
        source=None if clusters is None else clusters.name,
    )
    for part in fractions:
        click.echo(f"{part}: {len(made.ids(part))} records")


def _part(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        return name, float(share)
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is not NAME=SHARE, e.g. train=0.8", param_hint="--part"
        ) from error
