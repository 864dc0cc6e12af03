"""Reads crops of many records at once: one plan, merged reads, many of them in flight, results in order.

Owns how requests become tasks and arrays. Does not own tiles (`parts.tiles`), threads (`read_pool`) or
records. Invariant: the result equals reading the crops one by one, whatever the order and number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format.grid import Rows, Window
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.record import Record
from foldfeed.feature_store.parts.tiles import Crop, CropArrays, CropJob, Task, pair_of
from foldfeed.feature_store.storage.read_pool import DEFAULT_IN_FLIGHT, run_tasks

BatchArrays: TypeAlias = "tuple[NDArray[np.uint8], NDArray[np.int32]]"


class CropRequest(NamedTuple):
    """One crop to read.

    Attributes:
      record_id: of the record.
      residues: window as in `Record.crop`; everything when None.
      rows: ranks as in `Record.crop`, or a `StoredRun` as in `Record.slab`; everything when None.
    """

    record_id: str
    residues: Window | None = None
    rows: Window | Rows | None = None


def read_crops(
    records: Sequence[Record],
    requests: Sequence[CropRequest],
    out: BatchArrays | None = None,
    in_flight: int | None = None,
) -> list[Crop]:
    """Returns the crops in the order of the requests; see `FeatureStore.crops`.

    Args:
      records: the record of each request.
      requests: what to read of it.
      out: see `FeatureStore.crops`.
      in_flight: see `FeatureStore.crops`.
    """
    shapes = []
    for record, request in zip(records, requests, strict=True):
        try:
            shapes.append(record.resolve(request.residues, request.rows))
        except IndexError as error:
            raise IndexError(f"record {record.record_id!r}: {error}") from error
    slots = [None] * len(requests) if out is None else _slots(requests, [shape.size for shape in shapes], out)
    jobs: list[CropJob] = []
    by_part: dict[int, tuple[PartReader, list[CropJob]]] = {}
    for record, shape, slot in zip(records, shapes, slots, strict=True):
        part = record.part
        job = part.tiles.job(record.tiled, shape.window, shape.rows, slot)
        by_part.setdefault(id(part), (part, []))[1].append(job)
        jobs.append(job)
    groups = list(by_part.values())
    if in_flight is None:
        in_flight = 1 if all(part.is_local for part, _ in groups) else DEFAULT_IN_FLIGHT
    run_tasks([task for part, found in groups for task in part.tiles.openers(found)], in_flight)
    tasks: list[Task] = []
    finishers: list[Task] = []
    for part, found in groups:
        tasks += part.tiles.tasks(found, part.tiles.reads(found, part.max_read_bytes))
        finishers += part.tiles.finishers(found)
    run_tasks(tasks, in_flight)
    run_tasks(finishers, in_flight)
    return [record.part.tiles.result(job) for record, job in zip(records, jobs, strict=True)]


def _slots(
    requests: Sequence[CropRequest], sizes: list[tuple[int, int]], out: BatchArrays
) -> list[CropArrays]:
    """Returns the corner of each slot of a batch that a crop fills.

    Raises:
      ValueError: the arrays are not of the kind asked for, or a crop does not fit.
    """
    msa, deletions = pair_of(out)
    for name, array, dtype in (("msa", msa, np.uint8), ("deletions", deletions, np.int32)):
        if array.dtype != dtype or array.ndim != 3 or len(array) != len(requests):
            raise ValueError(
                f"out: {name} is {array.dtype} {array.shape}; it must be {np.dtype(dtype)} (batch, rows, "
                f"residues) with a batch of {len(requests)}, one slot for each request"
            )
    found = []
    for number, (request, (num_rows, num_cols)) in enumerate(zip(requests, sizes, strict=True)):
        for name, array in (("msa", msa), ("deletions", deletions)):
            if num_rows > array.shape[1] or num_cols > array.shape[2]:
                raise ValueError(
                    f"out: request {number}, record {request.record_id!r}, is {num_rows} x {num_cols} and "
                    f"does not fit into a slot of {array.shape[1]} x {array.shape[2]} of {name}"
                )
        window = number, slice(0, num_rows), slice(0, num_cols)
        found.append((msa[window], deletions[window]))
    return found
