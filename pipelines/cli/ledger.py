"""The command ``foldfeed ledger``: what the searches behind a store cost.

Owns words. Does not own the ledger (`records.ledger`).
"""

from __future__ import annotations

import sys

import click

from foldfeed.pipelines.build_config import default_results
from foldfeed.pipelines.costs import lines_of


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", metavar="STORE")
@click.argument("sql", required=False)
@click.option("--results", metavar="URL", help="Where its search results are. [default: STORE.results]")
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "csv", "json", "parquet")),
    default="table",
    show_default=True,
)
@click.option("--price-per-cpu-hour", type=click.FloatRange(min=0), metavar="P", help="Any currency.")
def ledger(
    store: str, sql: str | None, results: str | None, form: str, price_per_cpu_hour: float | None
) -> None:
    """Say what the searches behind STORE cost, by database, or answer a SQL question about them.

    Table `searches`, one row per record and database: record_id, unit_id, database, database_digest,
    num_residues, num_hits, host, finished, run_id, tool, tool_version, wall_s, cpu_s, max_rss_bytes,
    bytes_read, bytes_from_disk, answer_bytes, energy_wh (of the processors, an estimate; null where the
    machine does not tell), num_together (queries of a run of MMseqs2, each with its share of the cost by
    residues). Records of equal sequence share a search, that is, a unit_id.

    \b
    Examples:
      foldfeed ledger my-store --price-per-cpu-hour 0.04
      foldfeed ledger my-store "select record_id, sum(cpu_s) from searches group by 1 order by 2 desc"
    """
    from foldfeed.feature_store.cli.tables import write_table
    from foldfeed.feature_store.store.sql import sql as answer
    from foldfeed.pipelines.records.ledger import TABLE, costs, read_all

    table = read_all(results if results is not None else default_results(store))
    if sql is not None:
        if price_per_cpu_hour is not None:
            raise click.UsageError(
                "--price-per-cpu-hour has no effect on a SQL question; multiply cpu_s there"
            )
        write_table(answer({TABLE: table}, sql), form, sys.stdout.buffer)
        return
    if form != "table":
        raise click.UsageError(f'--format {form} has no effect without a SQL question; add "from searches"')
    for line in lines_of(costs(table, None), price_per_cpu_hour):
        click.echo(line)
