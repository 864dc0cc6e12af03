"""`StepBlock`: what a rank reads for a step as one block of bytes, so that one copy takes it to a device.

    nothing | header | sample | sample | ...      see `reading.packed` for header and samples

The block begins with what is read where a sample has nothing: zeros for any dtype, and from `NO_CODE_AT` on
bytes of `NO_CODE`. Places in the header are counted from the block's first byte. The header travels in the
block, so a device finds everything by itself and the host needs to know no more than the largest sizes
(`StepSizes`). Samples lie in the order in which they came; the header has them in the order of the step.

Owns the layout of a step. Does not own whose memory it is or when that may be written again
(`features.device`).

A block may be filled by several threads at once. Where its memory is too small, samples are kept aside, and
`whole` moves all into larger memory: that happens to the first steps only.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from foldfeed.loader.reading.fetch import ARRAYS, SampleArrays
from foldfeed.loader.reading.packed import HEADER, padded, row_of, shift
from foldfeed.loader.reading.ring import ALIGNMENT
from foldfeed.loader.reading.slots import place

# What stands where a sample has nothing: 0 at the block's first byte, and this code, which is none.
NO_CODE = 255
NO_CODE_AT = ALIGNMENT // 2
# Memory is asked for in such pieces, so that steps of nearly the same size find it large enough.
GRAIN_BYTES = 1 << 20
# Samples without room: their places in the step, their rows (as for `StepBlock.put_packed`), their bytes.
_Kept: TypeAlias = "tuple[list[int], NDArray[np.int64], NDArray[np.uint8]]"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """What the host knows of a step before its data is looked at.

    Attributes:
      num_samples: B.
      columns: most columns read of a sample, W; at least 1, as the next two.
      members: most rows of a sample that are no centres, M.
      replaced: most positions of a sample that take a token from its profile, K.
    """

    num_samples: int
    columns: int
    members: int
    replaced: int


class StepBlock:
    """A step's samples on their way into one block.

    Attributes:
      memory: uint8 (bytes,), contiguous.
    """

    def __init__(self, memory: torch.Tensor, num_samples: int) -> None:
        """Takes memory that nobody else reads or writes."""
        self.memory = memory
        self._num_samples = num_samples
        self._header = np.zeros((num_samples, len(HEADER)), dtype=np.int64)
        self._used = ALIGNMENT + padded(self._header.nbytes)
        self._aside: list[_Kept] = []
        self._lock = threading.Lock()

    def put(self, index: int, arrays: SampleArrays) -> None:
        """Copies sample ``index`` of the step; its arrays are not needed afterwards.

        One that is put again takes the place of the one before, whose bytes are left behind in the block.
        """
        size = _size(arrays)
        start = self._room([index], size)
        if start is not None:
            self._header[index] = row_of(arrays, start)
            _copy(arrays, self.memory.numpy(), start)
            return
        kept = np.empty(size, dtype=np.uint8)
        _copy(arrays, kept, 0)
        row = np.array([row_of(arrays, 0)], dtype=np.int64)
        with self._lock:
            self._aside.append(([index], row, kept))

    def put_packed(self, indices: Sequence[int], rows: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Copies samples that lie together, all at once; as `put` does, whose rules hold.

        Args:
          indices: their places in the step.
          rows: int64 (n, `HEADER`), of each of them; places are counted from the first byte of ``data``.
          data: uint8 (bytes,), a multiple of `ALIGNMENT`; what else lies there comes along.
        """
        wanted = list(indices)
        start = self._room(wanted, len(data))
        if start is not None:
            moved = rows.copy()
            shift(moved, start)
            self._header[wanted] = moved
            # `copyto` gives the interpreter's lock away; an assignment to a slice of the same dtype keeps it.
            np.copyto(self.memory.numpy()[start : start + len(data)], data)
            return
        with self._lock:
            self._aside.append((wanted, rows.copy(), data.copy()))

    def whole(self, more: Callable[[int], torch.Tensor]) -> tuple[torch.Tensor, StepSizes]:
        """Returns the block, once all samples are there.

        Args:
          more: gives memory of so many bytes; what was there is not used any more then.
        Returns: uint8 (bytes,), a view of ``memory``, its size a multiple of `ALIGNMENT`; and the sizes.
        """
        if self._aside:
            needed = self._used + sum(len(data) for *_, data in self._aside)
            memory = more(-(-needed // GRAIN_BYTES) * GRAIN_BYTES)
            # No more than the header's room, where nothing had any.
            filled = min(self._used, len(self.memory))
            memory[:filled] = self.memory[:filled]
            self.memory = memory
            aside, self._aside = self._aside, []
            for indices, rows, data in aside:
                self.put_packed(indices, rows, data)
        assert not self._aside
        start = self.memory.numpy()
        start[:NO_CODE_AT] = 0
        start[NO_CODE_AT:ALIGNMENT] = NO_CODE
        start[ALIGNMENT : ALIGNMENT + self._header.nbytes] = self._header.view(np.uint8).reshape(-1)
        largest = dict(zip(HEADER, self._header.max(axis=0).tolist(), strict=True))
        return self.memory[: self._used], StepSizes(
            num_samples=self._num_samples,
            columns=max(1, largest["columns"]),
            members=max(1, largest["members"]),
            replaced=max(1, largest["replaced"]),
        )

    def _room(self, indices: list[int], size: int) -> int | None:
        """Returns where samples go, None where there is no room; forgets what is kept aside of them."""
        with self._lock:
            if self._aside:
                self._aside = [
                    found for kept in self._aside if (found := _without(kept, indices)) is not None
                ]
            if self._used + size > len(self.memory):
                return None
            start = self._used
            self._used += size
            return start


def _without(kept: _Kept, indices: list[int]) -> _Kept | None:
    left = [place for place, index in enumerate(kept[0]) if index not in indices]
    if not left:
        return None
    return [kept[0][place] for place in left], kept[1][left], kept[2]


def _copy(arrays: SampleArrays, memory: NDArray[np.uint8], start: int) -> None:
    shapes = {name: getattr(arrays, name).shape for name in ARRAYS}
    for name, room in place(memory, start, shapes).items():
        np.copyto(room, getattr(arrays, name))


def _size(arrays: SampleArrays) -> int:
    return sum(padded(getattr(arrays, name).nbytes) for name in ARRAYS)
