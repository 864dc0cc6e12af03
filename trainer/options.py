"""Options of a command line from the fields of a dataclass, so that name, type, default and text stand once.

Imports no torch, so that help and usage errors come at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def options_of(config: type, names: Sequence[str], renamed: dict[str, str] | None = None) -> Any:
    """Returns a decorator that adds one option per field, with the field's default and type.

    A field without a default is required, one with Literal values takes those alone. Help comes from the
    ``Attributes:`` section of the config's docstring, so it is written once.

    Args:
      config: the dataclass.
      names: of fields, in the order of the help.
      renamed: options that are called otherwise than their fields, by field.
    """
    texts = attribute_texts(config)
    hints = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            option = (renamed or {}).get(name, name).replace("_", "-")
            kind, required = hints[name], fields[name].default is dataclasses.MISSING
            if typing.get_origin(kind) is Literal:
                kind = click.Choice(typing.get_args(kind))
            elif kind == bool | None:
                kind = bool
            flag = f"--{option}/--no-{option}" if kind is bool else f"--{option}"
            told: dict[str, Any] = {"type": kind, "help": texts[name], "required": required}
            if not required:
                told |= {"default": fields[name].default, "show_default": True}
            command = click.option(flag, name, **told)(command)
        return command

    return decorate


def attribute_texts(config: type) -> dict[str, str]:
    """Returns the description of each attribute from a Google-style docstring."""
    # Python 3.13 keeps docstrings without their common indentation, 3.11 and 3.12 as they are written.
    section = (inspect.getdoc(config) or "").split("Attributes:")[1]
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.startswith("  ") and not line.startswith("   ") and ":" in line:
            name, text = line.strip().split(":", 1)
            texts[name] = text.strip()
        elif line.strip() and name:
            texts[name] += " " + line.strip()
    plain = {name: text.replace("``", "") for name, text in texts.items()}
    return {name: text[0].upper() + text[1:] for name, text in plain.items()}
