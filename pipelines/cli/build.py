"""The command ``foldfeed build``: options in, `BuildConfig` filled, report printed.

Owns words and exit codes. Does not own the build (`building.job`). Importing this module must not
import Beam, so that ``foldfeed --help`` is quick and works without it.
"""

from __future__ import annotations

import signal

import click

from foldfeed.feature_store.cli.tools import row_order_options
from foldfeed.feature_store.index.transactions import ON_EXISTING
from foldfeed.pipelines.beam.runners import RUNNERS
from foldfeed.pipelines.build_config import (
    DEFAULT_MAX_RESIDUES,
    DEFAULT_TIMEOUT_S,
    ENGINES,
    BuildConfig,
    BuildReport,
    Engine,
)
from foldfeed.pipelines.building.array_task import lines_of as share_lines
from foldfeed.pipelines.building.array_task import search_share
from foldfeed.pipelines.building.job import forecast_build, run_build
from foldfeed.pipelines.building.progress import byte_bars
from foldfeed.pipelines.cli.database import registry_option
from foldfeed.pipelines.costs import lines_of as cost_lines
from foldfeed.pipelines.databases.registry import Registry, database_of, templates_of
from foldfeed.pipelines.databases.spec import DatabaseSpec
from foldfeed.pipelines.databases.staging import staged_database
from foldfeed.pipelines.errors import ConfigError, EngineError
from foldfeed.pipelines.planning.forecast import lines_of as forecast_lines
from foldfeed.pipelines.planning.share import Share
from foldfeed.pipelines.programs.interrupt import StoppedBySignal
from foldfeed.pipelines.tools.template_tool import DEFAULT_MAX_TEMPLATE_HITS

# Dead letters printed on the terminal; the file holds all of them.
MAX_SHOWN_LETTERS = 20


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--queries", multiple=True, required=True, metavar="FASTA", help="Query file; may be repeated.")
@click.option(
    "--database",
    "databases",
    multiple=True,
    required=True,
    metavar="NAME[=PATH[:TOOL]]",
    help="What to search: a FASTA file (jackhmmer), an HH-suite prefix (hhblits), with `:mmseqs2` a FASTA "
    "file or MMseqs2 database (behind that, with commas: after=NAME, filter=0, s=7.5, db-load-mode=2), or "
    "the NAME alone of one that `foldfeed database add` knows; may be repeated. "
    "Several files with commas between them, or PATH@16 for PATH-00000-of-00016 and so on, are one database.",
)
@click.option(
    "--stage-databases",
    metavar="FOLDER",
    help="Copy every database to this folder first, unless it is there, and search the copy; a PATH may then "
    "be a URL. The workers must see the folder under this name, with the same files in it.",
)
@registry_option
@click.option("--store", required=True, metavar="URL", help="Feature store to add to; made when absent.")
@row_order_options
@click.option(
    "--results", metavar="URL", help="Where search results are kept and reused. [default: STORE.results]"
)
@click.option(
    "--max-hits",
    multiple=True,
    metavar="NAME=N",
    help="Most rows of a database, the query counted. [default: uniref90=10000, mgnify=501, others all]",
)
@click.option(
    "--templates",
    metavar="NAME[=PATH,DATES[:TOOL]]",
    help="Search each record's alignment against sequences of known structures, too, and keep the hits. "
    "PATH is a FASTA file like the PDB's pdb_seqres.txt (hmmsearch) or an HH-suite prefix (hhsearch), DATES "
    "a table of release dates; or the NAME alone of one that `foldfeed database add` knows.",
)
@click.option(
    "--template-msa",
    metavar="NAME",
    help="Database whose rows make the profile of that search. [default: the record's whole alignment]",
)
@click.option(
    "--max-template-hits",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_TEMPLATE_HITS,
    show_default=True,
    metavar="N",
    help="Most hits that a record keeps.",
)
@click.option(
    "--max-template-date",
    metavar="YYYY-MM-DD",
    help="Keep no hits of later or unknown date. [default: keep all; readers choose by date]",
)
@click.option(
    "--taxonomy-ids",
    is_flag=True,
    help="Keep the NCBI taxonomy ids that descriptions of rows tell (TaxID=, OX=), for pairing; records that "
    "were built without say something else then.",
)
@click.option("--cpus-per-search", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Searches at a time. [default: CPUs / cpus]"
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="How jackhmmer searches: binary, the program alone; the same rows behind fast, our own scan (extra "
    "'fast', a C compiler at installation), pyhmmer, HMMER's filters on sequences parsed once for many "
    "queries (the same extra), or hmmpgmd, HMMER's daemon (3.4; it listens on ports of this host); auto, "
    "which is binary.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    metavar="S",
    help="Longest time of one search, in seconds.",
)
@click.option(
    "--max-residues",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_RESIDUES,
    show_default=True,
    metavar="N",
    help="Longer queries become dead letters.",
)
@click.option(
    "--parts", type=click.IntRange(min=1), metavar="N", help="Parts to write. [default: by number of queries]"
)
@click.option(
    "--on-existing",
    type=click.Choice(ON_EXISTING),
    default="error",
    show_default=True,
    help="What to do with a record id that is in the store with other content, e.g. from an older database.",
)
@click.option(
    "--check-databases",
    is_flag=True,
    help="Read the databases again; else files of known size, time and inode count as unchanged.",
)
@click.option(
    "--runner", default="FnApiRunner", show_default=True, help=f"Beam runner: {', '.join(RUNNERS)}."
)
@click.option(
    "--task",
    type=int,
    metavar="I",
    help="Search only the share of task I of an array of jobs, 0 to N - 1, and commit nothing.",
)
@click.option("--tasks", type=int, metavar="N", help="Tasks of the array.")
@click.option(
    "--dry-run", is_flag=True, help="Say what would be searched and what that costs; search nothing."
)
@click.option(
    "--price-per-cpu-hour", type=click.FloatRange(min=0), metavar="P", help="Add prices, in any currency."
)
@click.option("--fail-on-dead-letters", is_flag=True, help="Exit with 1 if any record could not be built.")
@click.argument("beam_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def build(
    ctx: click.Context,
    queries: tuple[str, ...],
    databases: tuple[str, ...],
    stage_databases: str | None,
    registry: str | None,
    store: str,
    row_order: str | None,
    row_order_seed: int | None,
    results: str | None,
    max_hits: tuple[str, ...],
    templates: str | None,
    template_msa: str | None,
    max_template_hits: int,
    max_template_date: str | None,
    taxonomy_ids: bool,
    cpus_per_search: int,
    workers: int | None,
    engine: Engine,
    timeout: float,
    max_residues: int,
    parts: int | None,
    on_existing: str,
    check_databases: bool,
    runner: str,
    task: int | None,
    tasks: int | None,
    dry_run: bool,
    price_per_cpu_hour: float | None,
    fail_on_dead_letters: bool,
    beam_options: tuple[str, ...],
) -> None:
    """Search protein sequences and put their alignments into a feature store.

    Records that cannot be built (a bad sequence, a search that fails) are listed with the reason and do not
    stop the others. Run the same command again to go on after a failure: finished searches are reused.
    Options for Beam go behind `--`.

    \b
    Examples:
      foldfeed build --queries q.fasta --database uniref90=uniref90.fasta --store my-store
      foldfeed build --queries a.fa.gz --queries b.fa --store my-store \\
          --database uniref90=/db/uniref90.fasta --database mgnify=/db/mgnify.fasta \\
          --database uniref30=/db/UniRef30_2023_02:hhblits --cpus-per-search 2
      foldfeed build --queries q.fasta --store my-store --database uniref30=/db/uniref30_2302_db:mmseqs2 \\
          --database env=/db/colabfold_envdb_202108_db:mmseqs2,after=uniref30
      foldfeed build --queries s3://b/q.fa --database uniref90=/db/u.fasta --store s3://b/store \\
          --runner flink --workers 64 -- --flink_master=host:8081 --flink_job_server_jar=/jars/server.jar \\
          --environment_type=EXTERNAL --environment_config=localhost:50000
      foldfeed build --queries q.fasta --database uniref90=/db/u.fasta --store my-store --task 3 --tasks 16
      foldfeed build --queries q.fasta --database uniref90=/db/u.fasta --store my-store \\
          --templates pdb=/db/pdb_seqres.txt,/db/release_dates.tsv
    """
    try:
        if dry_run and stage_databases is not None:
            raise ConfigError("--dry-run copies nothing; leave --stage-databases out")
        config = BuildConfig(
            queries=queries,
            databases=_databases_of(databases, Registry(registry), stage_databases),
            store=store,
            row_order=row_order,
            row_order_seed=row_order_seed,
            results=results,
            max_hits=dict(_parse_max_hits(text) for text in max_hits),
            templates=_templates_of(templates, Registry(registry), stage_databases),
            template_msa=template_msa,
            max_template_hits=max_template_hits,
            max_template_date=max_template_date,
            taxonomy_ids=taxonomy_ids,
            cpus_per_search=cpus_per_search,
            workers=workers,
            engine=engine,
            timeout_s=timeout,
            max_residues=max_residues,
            parts=parts,
            on_existing=on_existing,
            check_databases=check_databases,
            runner=runner,
            beam_options=beam_options,
        )
        share = _share_of(task, tasks)
        if dry_run and share is not None:
            raise ConfigError("--dry-run speaks of the whole build; leave --task and --tasks out")
        if dry_run:
            for line in forecast_lines(forecast_build(config), price_per_cpu_hour):
                click.echo(line)
            return
        if share is not None:
            ctx.exit(_search_share(config, share, fail_on_dead_letters))
        report = run_build(config, say=_say)
    except (ConfigError, EngineError) as error:
        raise click.UsageError(str(error), ctx) from error
    except StoppedBySignal as stop:
        click.echo(
            f"stopped by {signal.Signals(stop.number).name}: finished searches are kept in "
            f"{config.results_url}; the same command goes on from there",
            err=True,
        )
        if stop.problem:
            click.echo(f"the job may run on: {stop.problem}", err=True)
        # As a shell counts: 130 after Ctrl-C, 143 after SIGTERM.
        ctx.exit(128 + stop.number)
    _print_report(report, price_per_cpu_hour)
    if report.dead_letters and fail_on_dead_letters:
        ctx.exit(1)


def _databases_of(texts: tuple[str, ...], registry: Registry, folder: str | None) -> tuple[DatabaseSpec, ...]:
    if folder is None:
        return tuple(database_of(text, registry) for text in texts)
    with byte_bars() as tell:
        return tuple(staged_database(text, registry, folder, tell) for text in texts)


def _templates_of(text: str | None, registry: Registry, folder: str | None) -> DatabaseSpec | None:
    if text is None or folder is None:
        return None if text is None else templates_of(text, registry)
    if "=" in text:
        raise ConfigError(
            f"--stage-databases copies templates by name only, and {text!r} is not one; "
            "`foldfeed database add NAME FASTA DATES --tool hmmsearch` gives them one"
        )
    with byte_bars() as tell:
        return staged_database(text, registry, folder, tell)


def _share_of(task: int | None, tasks: int | None) -> Share | None:
    if task is None and tasks is None:
        return None
    if task is None or tasks is None:
        raise ConfigError("--task and --tasks belong together, e.g. --task 3 --tasks 16")
    return Share(task=task, tasks=tasks)


def _search_share(config: BuildConfig, share: Share, fail_on_dead_letters: bool) -> int:
    """Searches and reports; returns the exit code."""
    report = search_share(config, share)
    for line in share_lines(report):
        click.echo(line)
    return int(bool(report.failures) and fail_on_dead_letters)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _parse_max_hits(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--max-hits {text!r} must be NAME=N with N at least 1, e.g. uniref90=10000")
    return name, int(number)


def _print_report(report: BuildReport, price_per_cpu_hour: float | None) -> None:
    click.echo(
        f"{report.store}: version {report.version}, {report.num_records} records built in "
        f"{report.seconds:.1f} s ({report.num_added} added, {report.num_unchanged} unchanged)"
    )
    if not report.started_engine:
        click.echo("nothing to do: every search is done and the store has the commit; no engine was started")
    click.echo(
        f"searches: {report.num_searched} done, {report.num_reused} reused, {report.num_failed} failed "
        f"(kept in {report.results})"
    )
    for line in cost_lines(report.costs, price_per_cpu_hour):
        click.echo(f"  {line}")
    if not report.dead_letters:
        return
    click.echo(f"dead letters: {len(report.dead_letters)} (listed in {report.dead_letters_path})")
    for letter in report.dead_letters[:MAX_SHOWN_LETTERS]:
        click.echo(f"  {letter}")
    if len(report.dead_letters) > MAX_SHOWN_LETTERS:
        click.echo(f"  ... and {len(report.dead_letters) - MAX_SHOWN_LETTERS} more")
