"""How the trainer's small commands end: ``python -m foldfeed.trainer.export``, ``.goodput`` and ``.prove``.

Owns the exit code and where errors go. Does not own the training command, whose ranks end in their own way
(`trainer.cli`).
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.trainer.errors import TrainerConfigError


def exit_code(command: click.Command, module: str, arguments: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code.

    0; 1 where it failed or returned False; 2 for wrong usage; 130 after Ctrl-C. Our errors and the system's
    end it with their message alone; others are raised.

    Args:
      command: to run.
      module: as ``python -m`` takes it, for the help.
      arguments: of the command line; those of the process when None.
    """
    try:
        result = command.main(
            args=None if arguments is None else list(arguments),
            prog_name=f"python -m {module}",
            standalone_mode=False,
        )
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()} (--help lists the options)", err=True)
        return 2
    except click.exceptions.Abort:
        # What click makes of Ctrl-C.
        click.echo("interrupted", err=True)
        return 130
    except (FoldfeedError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        return 2 if isinstance(error, TrainerConfigError) else 1
    # --help and ctx.exit() give a number, and 0 is not False.
    if result is False:
        return 1
    return result if isinstance(result, int) and not isinstance(result, bool) else 0
