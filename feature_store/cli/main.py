"""The command line ``foldfeed``: its root, the commands that look into a store, doors for other rooms.

Other rooms add commands through the entry point group ``foldfeed.commands``; nothing of theirs is imported
until such a command runs, so a person who only queries a store needs neither Beam nor torch.

Exit codes: 0 done, 1 the run failed (any `FoldfeedError`), 2 bad usage. A traceback appears only with
``--debug``.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from foldfeed.feature_store.cli.entry_points import entry_points_of
from foldfeed.feature_store.cli.terminal import printable
from foldfeed.feature_store.errors import FoldfeedError

COMMANDS_GROUP = "foldfeed.commands"
# Commands of this package that every store understands; other rooms' come as entry points.
OWN_COMMANDS = {
    "bench": "bench:bench",
    "crop": "records:crop",
    "diff": "records:diff",
    "log": "records:log",
    "plot": "look:plot",
    "query": "records:query",
    "report": "look:report",
    "save-set": "look:save_set",
    "save-split": "look:save_split",
    "sets": "look:sets",
    "show": "records:show",
}
# The first sentences of the commands, so that `--help` loads none of them. A test compares.
SENTENCES = {
    "bench": "Measure what a part of the supply line does on this machine.",
    "build": "Search protein sequences and put their alignments into a feature store.",
    "compact": "Rewrite small and half-dead parts of STORE into full ones, and merge the files of the index.",
    "copy": "Copy one version of the store SOURCE to TARGET. Run it again to go on after an interruption.",
    "crop": "Read a piece of one alignment: only the tiles it touches.",
    "database": "Know search databases by name: what is in them, which release, whether they are unchanged.",
    "delete": "Delete records from STORE in one transaction. Older versions keep them.",
    "diff": "Show what changed from version OLD of STORE to version NEW, the newest by default.",
    "export": "Write records of STORE in the formats of other programs.",
    "gc": "Remove parts and index files of STORE that no version names, and leftovers of killed writers.",
    "ingest": "Take alignments made elsewhere into a store, in one commit.",
    "ledger": "Say what the searches behind STORE cost, by database, or answer a SQL question about them.",
    "log": "List the versions of STORE, the newest first.",
    "plot": "Draw one alignment, or what a whole STORE holds.",
    "query": "Answer a SQL question about the records of STORE.",
    "repair": "Restore damaged files of STORE that can be restored bit for bit; more only if told so.",
    "report": "Write one page about STORE: numbers, pictures, databases, licences, sizes, jobs, dead "
    "letters.",
    "save-set": "Save the answer of a query as record set NAME of STORE.",
    "save-split": "Split the records of STORE so that no cluster of similar proteins is in two parts.",
    "sets": "List the record sets and splits that are saved in STORE.",
    "show": "Show what STORE holds, or one RECORD of it with its first rows.",
    "structures": "Give records of STORE the structures of their chains, in one commit.",
    "tag": "Give a version of STORE a NAME, or list the names there are.",
    "verify": "Check that everything in STORE is as it was written. Exit code 1 when it is not.",
}


class RootGroup(click.Group):
    """The root: finds commands of other rooms, and turns our errors into one line and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns own commands and those of installed rooms."""
        return sorted({*OWN_COMMANDS, *entry_points_of(COMMANDS_GROUP)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns a command; loads another room only for its own command."""
        if cmd_name in OWN_COMMANDS:
            module, _, name = OWN_COMMANDS[cmd_name].partition(":")
            command: click.Command = getattr(
                importlib.import_module(f"foldfeed.feature_store.cli.{module}"), name
            )
            return command
        found = entry_points_of(COMMANDS_GROUP).get(cmd_name)
        return None if found is None else found.load()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands; loads only those that are not ours."""
        names = self.list_commands(ctx)
        width = formatter.width - 6 - max(map(len, names))
        rows = []
        for name in names:
            command = click.Command(name, help=SENTENCES[name]) if name in SENTENCES else None
            command = command or self.get_command(ctx, name)
            if command is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(width)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

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
            click.echo(f"error: {printable(str(error))}", err=True)
            ctx.exit(1)


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


if __name__ == "__main__":
    main()
