"""The command ``foldfeed bench search``: words for `foldfeed.pipelines.search_speed`.

Nothing heavy is imported here before the command runs.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import click

from foldfeed.pipelines.cli.database import registry_option

if TYPE_CHECKING:
    from foldfeed.pipelines.search_speed import SearchSpeed


@click.command("search", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("database", metavar="NAME|FASTA")
@click.option("--queries", required=True, metavar="FASTA", help="Sequences to search.")
@click.option("--number", type=click.IntRange(min=1), default=4, show_default=True, help="How many of them.")
@click.option(
    "--engine",
    type=click.Choice(("both", "binary", "fast")),
    default="both",
    show_default=True,
    help="jackhmmer alone, behind the fast scan, or both and whether they agree.",
)
@click.option("--price-per-cpu-hour", type=click.FloatRange(min=0), metavar="P", help="Any currency.")
@registry_option
def bench_search(
    database: str,
    queries: str,
    number: int,
    engine: str,
    price_per_cpu_hour: float | None,
    registry: str | None,
) -> None:
    """Say what a JackHMMER search costs here, and would cost in databases of full size.

    Searches some queries in one FASTA file, one thread each: cells (query residues times database residues)
    per CPU second, the share of targets that HMMER's first filter lets through, time per stage, and CPU
    hours projected to the sizes of UniRef90, MGnify and small BFD. Nothing is written.

    With FOLDFEED_SCAN_DEVICE=cuda in the environment a CUDA device computes the first filter; its rate, and
    how many cores it keeps busy with what it leaves to them, are said, too.

    \b
    Examples:
      foldfeed bench search uniref90.fasta --queries q.fasta
      foldfeed bench search uniref90 --queries q.fasta --engine fast --price-per-cpu-hour 0.04
    """
    from foldfeed.pipelines.databases.files import count_fasta
    from foldfeed.pipelines.databases.registry import Registry, database_of
    from foldfeed.pipelines.search_speed import measure_search, read_queries

    known = Registry(registry)
    spec = database_of(database if database in known.load() else f"database={database}", known)
    if spec.tool != "jackhmmer" or len(spec.paths) != 1:
        raise click.UsageError(f"{database} is no single FASTA file; give one file of it")
    spec.files()
    sequences = read_queries(queries, number)
    counts = count_fasta(spec.name, spec.paths[0])
    engines = ("binary", "fast") if engine == "both" else (engine,)
    for line in lines_of(measure_search(spec.paths[0], counts, sequences, engines), price_per_cpu_hour):
        click.echo(line)


def lines_of(speed: SearchSpeed, price_per_cpu_hour: float | None) -> list[str]:
    """Returns a measurement as lines for a person."""
    from foldfeed.pipelines.search_speed import KNOWN_SIZES

    number, length = len(speed.query_residues), round(statistics.median(speed.query_residues))
    mean = speed.target_residues / speed.num_targets
    lines = [
        f"{speed.num_targets:,} targets of {mean:.0f} residues on average, {number} queries, the median of "
        f"{length} residues"
    ]
    for one in speed.engines:
        passing = (
            "" if one.share_passing is None else f", {100 * one.share_passing:.3g} % of the targets pass"
        )
        lines.append(
            f"{one.engine}: {one.cpu_s / number:.3f} CPU seconds a query, {one.fixed_s / number:.3f} of them "
            f"whatever the database, {speed.num_cells / one.cpu_s / 1e9:.1f} Gcells/s{passing}"
        )
        lines += [f"  {stage}: {seconds / number:.3f} s a query" for stage, seconds in one.stages.items()]
        if (device := one.device) is not None:
            lines.append(
                f"  {device.name}: the first filter does {device.gcells_per_s:.1f} Gcells/s by the clock, "
                f"{device.gcells_per_s / device.core_gcells_per_s:.1f} times one core ({device.core_name}, "
                f"{device.core_gcells_per_s:.1f}), and keeps {device.cores_fed:.1f} cores busy with the rest"
            )
    if len(speed.engines) > 1:
        agree = "equal" if speed.is_equal else "NOT EQUAL; please report this"
        ratio = speed.engines[0].cpu_s / speed.engines[1].cpu_s
        lines.append(f"alignments and tables: {agree}; {ratio:.2f} times less CPU with the second")
    lines.append(f"projected, a query of {length} residues, targets as long as these:")
    for name, num_targets in KNOWN_SIZES.items():
        words = []
        for one in speed.engines:
            hours = speed.cpu_s_in(one, num_targets, length) / 3600
            price = "" if price_per_cpu_hour is None else f" (price {hours * price_per_cpu_hour:.3g})"
            words.append(f"{one.engine} {hours:.3g} CPU hours{price}")
        lines.append(f"  {name}, {num_targets:,} sequences: {', '.join(words)}")
    return lines
