"""Which records a person means: named one by one, by a condition, or as a saved set.

Owns the three ways and that they exclude each other. `export` and `copy` choose by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foldfeed.feature_store.store.questions import RecordSource


def choose_ids(
    store: RecordSource[Any],
    *,
    record_ids: Sequence[str] | None = None,
    where: str | None = None,
    record_set: str | None = None,
) -> list[str]:
    """Returns ids of records, each once: all of them when nothing is said.

    Args:
      store: that holds them.
      record_ids: the records themselves; none where it is empty.
      where: an SQL condition over ``records``.
      record_set: name of a saved set.
    Returns: named ones in the order given, others sorted.
    Raises:
      ValueError: more than one way at once.
      RecordNotFoundError: no record of an id.
      QueryError: bad SQL.
      NameNotFoundError: no set of that name.
      RecordSetMismatchError: a record of the set is missing here or has other content.
    """
    ways = {"record_ids": record_ids, "where": where, "record_set": record_set}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; say in one way which records are meant")
    if record_set is not None:
        return list(store.subset(record_set))
    if record_ids is not None:
        for record_id in record_ids:
            if store.find(record_id) is None:
                raise store.not_found(record_id)
        return list(dict.fromkeys(record_ids))
    found: list[str] = store.table(["record_id"], where)["record_id"].to_pylist()
    return found
