"""Which key values a query can need of a table, read off DuckDB's own parse of it.

Owns one question: does ``where record_id = 'x'`` (or ``in ('x', 'y')``) hold for every row of the table that
reaches the rest of the query? Then only those records need to be read. Pure; no I/O.
Invariant: None ("all") for every shape it does not know, so that a restriction never changes an answer; a
test compares restricted and unrestricted answers.

Source: DuckDB manual, "SQL to/from JSON"; the parse is not stable between releases, hence the mistrust.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def constant_keys(shape: dict[str, Any] | None, table: str, key: str) -> frozenset[str] | None:
    """Returns the only values of a key column that a query can need, or None for all.

    ``select * from rows r join records using (record_id) where r.record_id in ('a', 'b') and rank < 3``
    gives {'a', 'b'} for table ``rows`` and key ``record_id``; with ``or`` in place of ``and`` it gives None.

    Args:
      shape: what ``json_serialize_sql`` gives; None when it gave nothing.
      table: name of the table.
      key: name of its key column, text.
    """
    if shape is None:
        return None
    uses = [node for node in _nodes(shape) if _is_table(node, table)]
    hidden = any(_text(entry.get("key")) == table for node in _nodes(shape) for entry in _cte_entries(node))
    if len(uses) != 1 or hidden:
        # Named twice, each use may need other values; hidden behind a CTE of that name, it is not ours.
        return None
    for node in _nodes(shape):
        if node.get("type") == "SELECT_NODE" and uses[0] in _inner_joined(node.get("from_table")):
            return _keys_of(node.get("where_clause"), _qualifiers(uses[0], table), key)
    return None


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _is_table(node: dict[str, Any], table: str) -> bool:
    return node.get("type") == "BASE_TABLE" and _text(node.get("table_name")) == table


def _cte_entries(node: dict[str, Any]) -> list[dict[str, Any]]:
    found = node.get("cte_map")
    return found["map"] if isinstance(found, dict) and isinstance(found.get("map"), list) else []


def _inner_joined(source: Any) -> list[dict[str, Any]]:
    """Returns the tables of a FROM clause of which a condition in WHERE may be applied first.

    True of plain tables and of both sides of an inner join; not of outer, positional or ASOF joins, where a
    missing row changes what the others become.
    """
    if not isinstance(source, dict):
        return []
    if (
        source.get("type") == "BASE_TABLE"
        and not source.get("sample")
        and not source.get("column_name_alias")
    ):
        return [source]
    if source.get("type") == "JOIN" and (source.get("join_type"), source.get("ref_type")) == (
        "INNER",
        "REGULAR",
    ):
        return [*_inner_joined(source.get("left")), *_inner_joined(source.get("right"))]
    return []


def _qualifiers(use: dict[str, Any], table: str) -> set[str]:
    """Returns the names by which a query may call this use of the table; an alias hides the table's own."""
    return {_text(use.get("alias")) or table}


def _keys_of(condition: Any, qualifiers: set[str], key: str) -> frozenset[str] | None:
    if not isinstance(condition, dict):
        return None
    kind = condition.get("type")
    if kind == "CONJUNCTION_AND":
        found = [_keys_of(child, qualifiers, key) for child in condition.get("children", ())]
        sets = [keys for keys in found if keys is not None]
        return frozenset.intersection(*sets) if sets else None
    if kind == "COMPARE_EQUAL":
        sides = [condition.get("left"), condition.get("right")]
        return _constants(sides, qualifiers, key) or _constants(sides[::-1], qualifiers, key)
    if kind == "COMPARE_IN":
        return _constants(condition.get("children", []), qualifiers, key)
    return None


def _constants(parts: list[Any], qualifiers: set[str], key: str) -> frozenset[str] | None:
    """Returns the values when the first part is the key column and the others are text constants."""
    if (
        len(parts) < 2
        or not all(isinstance(part, dict) for part in parts)
        or not _is_key(parts[0], qualifiers, key)
    ):
        return None
    values = [_constant(part) for part in parts[1:]]
    return None if None in values else frozenset(value for value in values if value is not None)


def _is_key(node: dict[str, Any], qualifiers: set[str], key: str) -> bool:
    names = node.get("column_names")
    if node.get("type") != "COLUMN_REF" or not isinstance(names, list):
        return False
    path = [_text(name) for name in names]
    return path == [key] or (len(path) == 2 and path[0] in qualifiers and path[1] == key)


def _constant(node: dict[str, Any]) -> str | None:
    """Returns a text constant; its form changed between DuckDB 1 and 2."""
    if node.get("type") != "VALUE_CONSTANT":
        return None
    literal, value = node.get("literal"), node.get("value")
    if isinstance(literal, dict):
        return literal.get("text") if literal.get("kind") == "STRING" else None
    if isinstance(value, dict) and not value.get("is_null"):
        text = value.get("value")
        return text if isinstance(text, str) and value.get("type", {}).get("id") == "VARCHAR" else None
    return None


def _text(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""
