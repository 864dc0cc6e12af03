"""Which key values a query can need of a table, read off DuckDB's own parse of it.

Owns one question: does ``where record_id = 'x'`` (or ``in ('x', 'y')``, ``= $id``, ``in $ids``) hold for
every row of the table that reaches the rest of the query? Then only those records need to be read. Also tells
which parameters a query has. Pure; no I/O.
Invariant: None ("all") for every shape it does not know, so that a restriction never changes an answer; a
test compares restricted and unrestricted answers.

Source: DuckDB manual, "SQL to/from JSON"; the parse is not stable between releases, hence the mistrust.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def constant_keys(
    shape: dict[str, Any] | None, table: str, key: str, params: Mapping[str, Any] | None = None
) -> frozenset[str] | None:
    """Returns the only values of a key column that a query can need, or None for all.

    ``select * from rows r join records using (record_id) where r.record_id in ('a', 'b') and rank < 3``
    gives {'a', 'b'} for table ``rows`` and key ``record_id``; with ``or`` in place of ``and`` it gives None.

    Args:
      shape: what ``json_serialize_sql`` gives; None when it gave nothing.
      table: name of the table.
      key: name of its key column, text.
      params: values of the query's parameters by name; "1", "2", ... of those without one.
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
            return _Keys(_qualifiers(uses[0], table), key, params or {}).of(node.get("where_clause"))
    return None


def parameters(shape: dict[str, Any] | None) -> list[str]:
    """Returns the names of a query's parameters, sorted; "1", "2", ... of those without one."""
    if shape is None:
        return []
    names = (node.get("identifier") for node in _nodes(shape) if node.get("type") == "VALUE_PARAMETER")
    return sorted({name for name in names if isinstance(name, str)})


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


class _Keys:
    """Which values of a key column a condition keeps."""

    def __init__(self, qualifiers: set[str], key: str, params: Mapping[str, Any]) -> None:
        self._qualifiers = qualifiers
        self._key = key
        self._params = params

    def of(self, condition: Any) -> frozenset[str] | None:
        if not isinstance(condition, dict):
            return None
        kind = condition.get("type")
        if kind == "CONJUNCTION_AND":
            found = [self.of(child) for child in condition.get("children", ())]
            sets = [keys for keys in found if keys is not None]
            return frozenset.intersection(*sets) if sets else None
        if kind == "COMPARE_EQUAL":
            sides = [condition.get("left"), condition.get("right")]
            found_left = self._constants(sides)
            return self._constants(sides[::-1]) if found_left is None else found_left
        if kind == "COMPARE_IN":
            return self._constants(condition.get("children", []))
        if kind == "FUNCTION" and _text(condition.get("function_name")) == "contains":
            return self._in_list(condition)
        return None

    def _constants(self, parts: list[Any]) -> frozenset[str] | None:
        """Returns the values when the first part is the key column and the others are text constants."""
        if len(parts) < 2 or not all(isinstance(part, dict) for part in parts) or not self._is_key(parts[0]):
            return None
        values = [self._constant(part) for part in parts[1:]]
        return None if None in values else frozenset(value for value in values if value is not None)

    def _in_list(self, call: dict[str, Any]) -> frozenset[str] | None:
        """Returns the values of ``record_id in $ids``; DuckDB parses ``contains($ids, record_id)``."""
        parts = call.get("arguments") or call.get("children") or []
        parts = [part.get("expression", part) for part in parts if isinstance(part, dict)]
        if len(parts) != 2 or not self._is_key(parts[1]):
            return None
        values = self._parameter(parts[0])
        if isinstance(values, list | tuple) and all(isinstance(value, str) for value in values):
            return frozenset(values)
        return None

    def _is_key(self, node: dict[str, Any]) -> bool:
        names = node.get("column_names")
        if node.get("type") != "COLUMN_REF" or not isinstance(names, list):
            return False
        path = [_text(name) for name in names]
        return path == [self._key] or (
            len(path) == 2 and path[0] in self._qualifiers and path[1] == self._key
        )

    def _constant(self, node: dict[str, Any]) -> str | None:
        """Returns a text constant; its form changed between DuckDB 1 and 2."""
        if node.get("type") == "VALUE_PARAMETER":
            value = self._parameter(node)
            return value if isinstance(value, str) else None
        if node.get("type") != "VALUE_CONSTANT":
            return None
        literal, value = node.get("literal"), node.get("value")
        if isinstance(literal, dict):
            return literal.get("text") if literal.get("kind") == "STRING" else None
        if isinstance(value, dict) and not value.get("is_null"):
            text = value.get("value")
            return text if isinstance(text, str) and value.get("type", {}).get("id") == "VARCHAR" else None
        return None

    def _parameter(self, node: dict[str, Any]) -> Any:
        """Returns the value of a parameter; None for anything else, and where its name is not unique."""
        name = node.get("identifier")
        if node.get("type") != "VALUE_PARAMETER" or not isinstance(name, str):
            return None
        # DuckDB does not tell $ID from $id.
        found = [value for other, value in self._params.items() if other.lower() == name.lower()]
        return found[0] if len(found) == 1 else None


def _text(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""
