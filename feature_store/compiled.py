"""Finds what was compiled from C files: optional parts of an installation, there where a C compiler was.

Whoever has such a part has the same in Python, too, or says what is missing. Names in the C count versions,
so that a module that was compiled from another C than lies beside the Python is not used, which is logged.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

_log = logging.getLogger(__name__)
Functions = tuple[Callable[..., Any], ...]


def path_of(module: str) -> str | None:
    """Returns the path of a compiled module; None where it was not built.

    Args:
      module: its whole name.
    """
    spec = importlib.util.find_spec(module)
    return spec.origin if spec is not None else None


def functions_of(module: str, names: Sequence[str]) -> Functions | None:
    """Returns functions of a compiled module in the order of their names; None unless it was built with all.

    Args:
      module: its whole name.
      names: of functions, with their versions.
    Raises:
      ImportError: it was built and cannot be loaded.
    """
    # Not by asking for its spec first: while another thread loads it, there is a module without one.
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None
    if not all(hasattr(found, name) for name in names):
        # Nothing else shows it: the same numbers come, and more slowly.
        _log.warning(
            "%s was compiled from another version's C and is not used, so its work takes longer; install "
            "foldfeed again ('pip install --force-reinstall --no-deps foldfeed', in a clone "
            "'pip install -e .')",
            found.__file__,
        )
        return None
    return tuple(getattr(found, name) for name in names)
