"""`StepBlock`: what a rank reads for a step as one block of bytes, so that one copy takes it to a device.

    nothing | header | sample | sample | ...      each sample: its arrays end to end

The block begins with what is read where a sample has nothing: zeros for any dtype, and from `NO_CODE_AT` on
bytes of `NO_CODE`. The header is int64 (samples, `HEADER`): for each array of a sample where it begins,
counted in its own elements from the block's first byte, and the sample's sizes. It travels in the block, so a
device finds everything by itself and the host needs to know no more than the largest sizes (`StepSizes`).
Samples lie in the order in which they came; the header has them in the order of the step.

Owns the layout. Does not own whose memory it is or when that may be written again (`features.device`).

A block may be filled by several threads at once. Where its memory is too small, samples are kept aside, and
`whole` moves all into larger memory: that happens to the first steps only.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from foldfeed.loader.reading.fetch import ARRAYS, DTYPES, SampleArrays
from foldfeed.loader.reading.ring import ALIGNMENT
from foldfeed.loader.reading.slots import place

# Sizes of a sample, in the header behind the places of its arrays.
SIZES = (
    *("columns", "residues", "centres", "extras", "members", "replaced"),
    *("with_atoms", "crop_start", "first_residue"),
)
HEADER = (*ARRAYS, *SIZES)
# What stands where a sample has nothing: 0 at the block's first byte, and this code, which is none.
NO_CODE = 255
NO_CODE_AT = ALIGNMENT // 2
# Memory is asked for in such pieces, so that steps of nearly the same size find it large enough.
GRAIN_BYTES = 1 << 20


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


def header_of(arrays: SampleArrays, start: int) -> list[int]:
    """Returns a sample's line of the header.

    Args:
      arrays: the sample.
      start: first byte of it, a multiple of `ALIGNMENT`.
    """
    places = []
    for name in ARRAYS:
        places.append(start // DTYPES[name].itemsize)
        start += _padded(getattr(arrays, name).nbytes)
    return [
        *places,
        *(arrays.msa.shape[1], len(arrays.aatype), len(arrays.centre_at), len(arrays.extra_at)),
        *(len(arrays.member_at), len(arrays.profile_at), len(arrays.atom_mask)),
        *(arrays.crop_in_columns[0], arrays.first_residue),
    ]


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
        self._used = ALIGNMENT + _padded(self._header.nbytes)
        self._aside: list[tuple[int, SampleArrays]] = []
        self._lock = threading.Lock()

    def put(self, index: int, arrays: SampleArrays) -> None:
        """Copies sample ``index`` of the step; its arrays are not needed afterwards.

        One that is put again takes the place of the one before, whose bytes are left behind in the block.
        """
        size = _size(arrays)
        with self._lock:
            start = self._used
            fits = start + size <= len(self.memory)
            self._aside = [(other, kept) for other, kept in self._aside if other != index]
            if fits:
                self._used += size
        if fits:
            self._header[index] = header_of(arrays, start)
            _copy(arrays, self.memory.numpy(), start)
            return
        kept = {name: getattr(arrays, name).copy() for name in ARRAYS}
        with self._lock:
            self._aside.append((index, dataclasses.replace(arrays, **kept)))

    def whole(self, more: Callable[[int], torch.Tensor]) -> tuple[torch.Tensor, StepSizes]:
        """Returns the block, once all samples are there.

        Args:
          more: gives memory of so many bytes; what was there is not used any more then.
        Returns: uint8 (bytes,), a view of ``memory``, its size a multiple of `ALIGNMENT`; and the sizes.
        """
        if self._aside:
            needed = self._used + sum(_size(arrays) for _, arrays in self._aside)
            memory = more(-(-needed // GRAIN_BYTES) * GRAIN_BYTES)
            # No more than the header's room, where nothing had any.
            filled = min(self._used, len(self.memory))
            memory[:filled] = self.memory[:filled]
            self.memory = memory
            aside, self._aside = self._aside, []
            for index, arrays in aside:
                self.put(index, arrays)
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


def _copy(arrays: SampleArrays, memory: NDArray[np.uint8], start: int) -> None:
    shapes = {name: getattr(arrays, name).shape for name in ARRAYS}
    for name, room in place(memory, start, shapes).items():
        room[...] = getattr(arrays, name)


def _size(arrays: SampleArrays) -> int:
    return sum(_padded(getattr(arrays, name).nbytes) for name in ARRAYS)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
