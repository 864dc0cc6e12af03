"""The command ``foldfeed structures``: structures into records that a store has.

Owns words and exit codes: 0 done (single rejects are reported and do not change it, unless
``--fail-on-rejects``), 1 the work failed or no chain found its record, 2 bad usage.
"""

from __future__ import annotations

from pathlib import Path

import click

from foldfeed.feature_store.cli.care import bars
from foldfeed.feature_store.cli.exchange import HELP, commit_options, print_rejects, save_rejects
from foldfeed.feature_store.importers.attach_structures import (
    BY,
    AttachOptions,
    AttachReport,
    attach_structures,
)
from foldfeed.feature_store.index.transactions import ON_EXISTING
from foldfeed.feature_store.parsers.mmcif.entry import DEFAULT_MAX_BYTES
from foldfeed.feature_store.parsers.mmcif.sequence import MODIFIED


@click.command("structures", context_settings=HELP)
@click.argument("store")
@click.option(
    "--from",
    "source",
    required=True,
    metavar="PATH",
    type=click.Path(exists=True, path_type=Path),
    help="An mmCIF file, or a folder of them; plain or compressed.",
)
@click.option(
    "--by",
    type=click.Choice(BY),
    default="id",
    show_default=True,
    help="A chain goes to the record called 1abc_A, or to every record with exactly its sequence.",
)
@click.option(
    "--on-existing",
    type=click.Choice(ON_EXISTING),
    default="error",
    show_default=True,
    help="For a record that has another structure.",
)
@click.option(
    "--modified",
    type=click.Choice(MODIFIED),
    default=MODIFIED[0],
    show_default=True,
    help="Letter of modified residues: of the residue they were made from, or X. MSE is M in both.",
)
@click.option("--model", type=click.IntRange(min=0), help="Model of every entry. [default: its first]")
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_BYTES,
    show_default=True,
    metavar="N",
    help="Largest file, decompressed.",
)
@commit_options("anything was refused")
@click.pass_context
def structures_command(
    ctx: click.Context,
    store: str,
    source: Path,
    by: str,
    on_existing: str,
    modified: str,
    model: int | None,
    max_bytes: int,
    job_id: str | None,
    rejects_file: Path | None,
    fail_on_rejects: bool,
) -> None:
    """Give records of STORE the structures of their chains, in one commit.

    Alignments stay as they are. Letters of chain and record must agree (X and modified residues match any);
    what does not is reported and does not stop the others. Chains that no record asks for are left alone.

    \b
    Examples:
      foldfeed structures my-store --from pdb_mmcif/
      foldfeed structures my-store --from pdb_mmcif/ --by sequence --rejects refused.jsonl
    """
    options = AttachOptions(
        by=by, on_existing=on_existing, modified=modified, model=model, max_bytes=max_bytes
    )
    with bars() as progress:
        report = attach_structures(store, source, options, job_id=job_id, progress=progress)
    _print(report, store)
    save_rejects(rejects_file, report.rejects)
    if not report.num_matched or (report.rejects and fail_on_rejects):
        ctx.exit(1)


def _print(report: AttachReport, store: str) -> None:
    click.echo(f"read       {report.num_chains} protein chains of {report.num_files} files")
    click.echo(f"matched    {report.num_matched} records")
    if not report.num_matched:
        _explain(report, store)
    if report.already_done:
        click.echo(f"attached   0: this was committed before (job {report.job_id}); name it with --job-id")
    elif report.version is not None:
        click.echo(f"attached   {report.num_attached}, not needed {report.num_unchanged}")
        click.echo(f"store      {store} version {report.version} (job {report.job_id})")
    else:
        click.echo(f"attached   0, not needed {report.num_unchanged}")
    print_rejects(report.rejects)


def _explain(report: AttachReport, store: str) -> None:
    """Says why no chain found a record, where the ids tell."""
    if not report.stored_id:
        click.echo(f"note       {store} has no records; make some with foldfeed ingest", err=True)
    elif report.wanted_id:
        click.echo(
            f"note       chains go to the record of their id: one is {report.wanted_id}, and a record of the "
            f"store is {report.stored_id}. Where ids are made otherwise, add --by sequence",
            err=True,
        )
