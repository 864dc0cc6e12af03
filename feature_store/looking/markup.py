"""HTML that cannot be written wrongly: every text is escaped unless it was made here.

Owns one rule: `tag` escapes strings and attributes, and takes only `Html`, the result of another `tag`, as it
is. So a record id or a description, which are user text, can never become markup.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

VOID = frozenset({"meta", "img", "br", "hr", "link"})
NAME = re.compile(r"[a-z][a-z0-9]*")
# HTML has no way to write these, escaped or not; a reader would take the page for damaged.
FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Markup that needs no escaping."""

    __slots__ = ()


Child: TypeAlias = "Html | str | int | float | Iterable[Child] | None"


def tag(name: str, /, *children: Child, **attributes: str | int | None) -> Html:
    """Returns an element.

    ``tag("p", "a < b", class_="x")`` is ``<p class="x">a &lt; b</p>``.

    Args:
      name: of the element.
      children: text, which is escaped; numbers; elements; lists of these; None for nothing.
      attributes: names with ``_`` for ``-``, and a ``_`` behind words that Python keeps; None: left out.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an element")
    found = (
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_legal(str(value)), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{name}{''.join(found)}>"
    if name in VOID:
        return Html(opening)
    return Html(f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Returns children one after the other, escaped where they are text."""
    return Html("".join(_child(child) for child in children))


def raw(text: str) -> Html:
    """Returns text of our own as markup: a style sheet, never anything from a store."""
    return Html(text)


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int | float):
        return html.escape(_legal(str(child)), quote=False)
    return join(child)


def _legal(text: str) -> str:
    return FORBIDDEN.sub("\ufffd", text)
