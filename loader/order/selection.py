"""`Selection`: the records that a sampling chooses in the stores at hand, under the numbers 0..n-1.

Numbers run through the components in their order, and through each one's records in the order of their ids.
All records of one store need no memory: number and position are the same, as they were before there were
samplings. Any other choice holds 8 bytes a record, and 12 more for weights.

Owns the reading of sets, conditions, clusters and weights, and two fingerprints: of the stores' content, and
of what was chosen in them. The second is needed because cluster ids and columns of one's own may change while
every record says the same. Thread safe after it was made.
"""

from __future__ import annotations

import bisect
import copy
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from foldfeed.feature_store import FoldfeedError, Record, RecordSource
from foldfeed.feature_store.format.columns import column_values
from foldfeed.feature_store.storage import Blobs
from foldfeed.loader.errors import LoaderConfigError
from foldfeed.loader.order.alias_table import AliasTable
from foldfeed.loader.order.sampling import ONCE, SPLIT_PREFIX, Component, Sampling

Store = RecordSource[Record]
LENGTH_RANGE = (256, 512)


class Selection:
    """Numbered records of one or several stores.

    Attributes:
      sampling: what chose them.
      table: chance of each number; None where every record comes once an epoch.
    """

    def __init__(self, stores: Store | Mapping[str, Store], sampling: Sampling) -> None:
        """Chooses the records; reads indexes, sets and splits, no arrays.

        Args:
          stores: a store or a view of one, or several by the names that components use.
          sampling: what to choose.
        Raises:
          LoaderConfigError: a store that is not there, not named or empty; a condition, set, split or column
            that cannot be had; a component without records; a weight that is none.
        """
        named = dict(stores) if isinstance(stores, Mapping) else {"": stores}
        _check_names(named, sampling)
        self.sampling = sampling
        self._stores = [named[component.store] for component in sampling.components]
        # Positions in the store's ids; None for all of them.
        self._positions: list[NDArray[np.int64] | None] = []
        weights: list[NDArray[np.float64]] = []
        for component, store in zip(sampling.components, self._stores, strict=True):
            positions, values = _choose(component, store, sampling.kind == ONCE)
            self._positions.append(positions)
            weights.append(values)
        sizes = [
            len(store) if positions is None else positions.size
            for store, positions in zip(self._stores, self._positions, strict=True)
        ]
        if sampling.kind == ONCE:
            self._check_disjoint()
        self._starts = [sum(sizes[:part]) for part in range(len(sizes) + 1)]
        self.table = None if sampling.kind == ONCE else AliasTable(np.concatenate(weights))
        self._sources = stores

    def __len__(self) -> int:
        return self._starts[-1]

    def place(self, number: int) -> tuple[Store, int]:
        """Returns the store of a number and the position among its ids."""
        assert 0 <= number < len(self), (number, len(self))
        part = self.component(number)
        positions, inside = self._positions[part], number - self._starts[part]
        return self._stores[part], inside if positions is None else int(positions[inside])

    def reading_through(self, wrap: Callable[[Blobs], Blobs]) -> Selection:
        """Returns the same records, read in that way; see `RecordSource.reading_through`."""
        other = copy.copy(self)
        wrapped = {id(store): store.reading_through(wrap) for store in self._stores}
        other._stores = [wrapped[id(store)] for store in self._stores]
        return other

    @property
    def urls(self) -> list[str]:
        """Where the stores lie."""
        return sorted({store.url for store in self._stores})

    def places(self) -> list[tuple[pa.Table, NDArray[np.int64] | None]]:
        """Returns of each component where its store's records lie, and which of them are drawn from."""
        return [
            (store.places(), positions)
            for store, positions in zip(self._stores, self._positions, strict=True)
        ]

    def component(self, number: int) -> int:
        """Returns which component a number belongs to."""
        return bisect.bisect_right(self._starts, number) - 1

    @property
    def store_fingerprint(self) -> str:
        """Fingerprint of the store's content; ``NAME=FINGERPRINT,...`` for stores with names."""
        if isinstance(self._sources, Mapping):
            return ",".join(f"{name}={store.fingerprint}" for name, store in sorted(self._sources.items()))
        return self._sources.fingerprint

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what was chosen and its chances; "" for all of one store, once an epoch."""
        if self.table is None and len(self._positions) == 1 and self._positions[0] is None:
            return ""
        digest = hashlib.sha256()
        for positions in self._positions:
            digest.update(b"all\n" if positions is None else positions.astype("<i8").tobytes() + b"\n")
        for data in self.table.data if self.table is not None else ():
            digest.update(data)
        return digest.hexdigest()

    def _check_disjoint(self) -> None:
        for name in {component.store for component in self.sampling.components}:
            chosen = [
                np.arange(len(store)) if positions is None else positions
                for component, store, positions in zip(
                    self.sampling.components, self._stores, self._positions, strict=True
                )
                if component.store == name
            ]
            if len(chosen) > 1 and np.unique(together := np.concatenate(chosen)).size < together.size:
                raise LoaderConfigError(
                    "components",
                    name,
                    "of this store share records, which would come twice an epoch; join them",
                )


def _check_names(named: Mapping[str, Store], sampling: Sampling) -> None:
    for component in sampling.components:
        if component.store not in named:
            raise LoaderConfigError(
                "component.store", component.store, f"is not among the stores given, {sorted(named)}"
            )
    for name, store in named.items():
        if not isinstance(store, RecordSource):
            raise LoaderConfigError(
                "store",
                store,
                "is no store; pass FeatureStore.open(...) of it, or a mapping from names to such",
            )
        if not any(component.store == name for component in sampling.components):
            raise LoaderConfigError(
                "stores", name, "is the name of a store that no component of the sampling names; leave it out"
            )


def _choose(
    component: Component, store: Store, once: bool
) -> tuple[NDArray[np.int64] | None, NDArray[np.float64]]:
    """Returns positions in the store's ids (None for all), and weights that add up to the share."""
    nothing_to_weigh = np.zeros(0)
    if not len(store):
        raise LoaderConfigError("num_records", 0, "an empty store has nothing to draw from")
    if not component.record_set and not component.where and once:
        return None, nothing_to_weigh
    source: Store = store
    try:
        if component.record_set:
            source = store.subset(component.record_set)
        where = " and ".join(f"({text})" for text in component.where)
        rows = source.table(where=where or None)
    except FoldfeedError as error:
        raise LoaderConfigError("component", component, str(error)) from error
    if not len(rows):
        raise LoaderConfigError(
            "component", component, f"keeps none of {len(source)} records; at least one must be left to draw"
        )
    positions = None
    if len(rows) < len(store):
        found = pc.index_in(
            rows["record_id"], value_set=pa.array(store.ids, rows.schema.field("record_id").type)
        )
        positions = found.to_numpy().astype(np.int64)
    return positions, nothing_to_weigh if once else _weights(component, store, rows)


def _weights(component: Component, store: Store, rows: pa.Table) -> NDArray[np.float64]:
    """Returns the weight of each index row; they add up to the component's share."""
    weights = np.ones(len(rows))
    if component.length_term:
        weights *= np.clip(rows["length"].to_numpy(), *LENGTH_RANGE) / LENGTH_RANGE[1]
    if component.clusters:
        clusters = _clusters(component, store, rows)
        sizes = Counter(clusters)
        weights /= [sizes[cluster] for cluster in clusters]
    if component.column:
        weights *= _numbers(component, rows)
    total = math.fsum(weights)
    if total <= 0:
        raise LoaderConfigError(
            "component", component, "the weights of its records are all 0; nothing to draw"
        )
    return weights * ((1.0 if component.share is None else component.share) / total)


def _clusters(component: Component, store: Store, rows: pa.Table) -> list[str]:
    name = component.clusters
    ids = rows["record_id"].to_pylist()
    try:
        if name.startswith(SPLIT_PREFIX):
            table = store.split(name.removeprefix(SPLIT_PREFIX)).table
            known = dict(zip(*(table[c].to_pylist() for c in ("record_id", "cluster_id")), strict=True))
            found = [known.get(record_id) for record_id in ids]
        else:
            found = column_values(rows, name)
    except FoldfeedError as error:
        raise LoaderConfigError("clusters", name, str(error)) from error
    _refuse_missing("clusters", name, ids, [not value for value in found], "give every record a cluster")
    return [str(value) for value in found]


def _numbers(component: Component, rows: pa.Table) -> NDArray[np.float64]:
    try:
        found = column_values(rows, component.column)
        numbers = np.array([math.nan if value is None else float(value) for value in found])
    except (FoldfeedError, TypeError, ValueError) as error:
        raise LoaderConfigError("column", component.column, f"is no column of numbers ({error})") from error
    bad = [not (math.isfinite(number) and number >= 0) for number in numbers]
    _refuse_missing(
        "column", component.column, rows["record_id"].to_pylist(), bad, "a weight is finite and at least 0"
    )
    return numbers


def _refuse_missing(field: str, name: str, ids: list[str], bad: list[bool], rule: str) -> None:
    if any(bad):
        raise LoaderConfigError(
            field,
            name,
            f"{sum(bad)} of {len(ids)} records have none, e.g. {ids[bad.index(True)]!r}; {rule}, or leave "
            "such records out by a condition",
        )
