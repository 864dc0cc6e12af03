"""The command ``foldfeed bench``: a door for measurements that other rooms offer.

They come as entry points of the group ``foldfeed.bench``; nothing of theirs is imported until one runs.
"""

from __future__ import annotations

import click

from foldfeed.feature_store.cli.entry_points import entry_points_of

BENCH_GROUP = "foldfeed.bench"


class _BenchGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(entry_points_of(BENCH_GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = entry_points_of(BENCH_GROUP).get(cmd_name)
        return None if found is None else found.load()


@click.group(cls=_BenchGroup, context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure what a part of the supply line does on this machine.

    \b
    Example:
      foldfeed bench loader my-store --crop-residues 256 --step-ms 33
    """
