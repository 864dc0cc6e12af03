"""The compiled kernels of the fast scan, called on arrays.

Owns the binding to ``scan.c``, how targets lie in memory and the check of sizes. Does not own which kernel is
used (`fast_scan.choice`) nor what the scores mean (`fast_scan.scan`). The kernels are an optional part of
an installation: they are there where a C compiler was.

Safe from any thread; the calls release the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.compiled import path_of
from foldfeed.pipelines.errors import ToolNotFoundError

# Codes below it are residues; the kernels' tables have as many columns.
NUM_CODES = 32
# After the end of a sequence.
PAD = 31
MAX_LETTERS = 32
# Blocks have a multiple of so many rows; those of one lane, for devices that read four codes at a time, of
# fewer.
TILE = 16
SINGLE_TILE = 4

# Of the C, see `foldfeed_interface` there.
_INTERFACE = 3

# What the text of a sequence becomes besides codes: skipped, refused.
SKIPPED, REFUSED = 64, 128
FAULTS = {-1: "start", -2: "name", -3: "residue"}


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """One instruction set.

    Attributes:
      name: ``plain``, ``sse4.1``, ``avx2``, ``avx512`` or ``neon``.
      number: in the library.
      lanes: targets side by side.
      usable: whether this processor has the instructions.
    """

    name: str
    number: int
    lanes: int
    usable: bool


class DeviceKernel(Protocol):
    """What computes the short filter's scores on another device than the processor; equal to itself alone."""

    def __hash__(self) -> int:
        """Returns a number for a place in a dictionary."""
        ...

    @property
    def name(self) -> str:
        """For a person."""
        ...

    @property
    def lanes(self) -> int:
        """Targets side by side in blocks for it."""
        ...

    @property
    def host(self) -> Kernel:
        """The processor's kernel, for all other scores."""
        ...

    def ssv(
        self, blocks: Blocks, table: NDArray[np.int8], letters: NDArray[np.uint8], starts: NDArray[np.int64]
    ) -> NDArray[np.int8]:
        """Returns what `ssv` of this module does, for all blocks."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """Targets side by side, `lanes` at a time.

    Attributes:
      codes: uint8 (bytes,), all blocks; within a block (rows, lanes).
      offsets: int64 (blocks,), where a block starts in `codes`.
      rows: int32 (blocks,), each a multiple of `TILE`; of `SINGLE_TILE` for one lane.
      lanes: of every block.
    """

    codes: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    lanes: int

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of a database, packed for one kernel.

    Attributes:
      starts: int64 (records + 1,), where the records start in the file; the last is where the chunk ends.
      order: int64 (records,), record of each lane, by length.
      lengths: int64 (records,), residues of each lane.
      distinct_lengths: int64 (different,) twice: the lengths that occur, ascending, and how often.
      blocks: the lanes.
    """

    starts: NDArray[np.int64]
    order: NDArray[np.int64]
    lengths: NDArray[np.int64]
    distinct_lengths: tuple[NDArray[np.int64], NDArray[np.int64]]
    blocks: Blocks

    @property
    def num_records(self) -> int:
        """Records, those without residues counted."""
        return len(self.order)

    @property
    def num_residues(self) -> int:
        """Residues of all records."""
        return int(self.lengths.sum())

    def extents(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns int64 (records, 2): where records start and end in the file."""
        return np.stack([self.starts[records], self.starts[records + 1]], axis=1)


def library_path() -> str | None:
    """Returns the path of the compiled kernels; None where they were not built."""
    return path_of("foldfeed.pipelines.fast_scan._scan")


def is_current(library: ctypes.CDLL) -> bool:
    """Returns whether kernels were compiled from the C that belongs to this file."""
    try:
        return library.foldfeed_interface() == _INTERFACE
    except AttributeError:
        return False


def is_usable() -> bool:
    """Returns whether there are compiled kernels, of this version."""
    path = library_path()
    return path is not None and is_current(ctypes.CDLL(path))


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise ToolNotFoundError(
            "fast scan",
            "foldfeed was installed without its compiled kernels; install it again where a C compiler is "
            "('apt-get install gcc', then 'pip install --force-reinstall --no-deps foldfeed'), or use "
            "'--engine binary'",
        )
    library = ctypes.CDLL(path)
    if not is_current(library):
        raise ToolNotFoundError(
            "fast scan",
            f"its compiled kernels ({path}) are of another version than the Python beside them; install "
            "foldfeed again ('pip install --force-reinstall --no-deps foldfeed', in a clone "
            "'pip install -e .'), or use '--engine binary'",
        )
    library.foldfeed_kernel.restype = ctypes.c_char_p
    for name in ("digitise", "count_byte", "find_named"):
        getattr(library, f"foldfeed_{name}").restype = ctypes.c_int64
    return library


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Returns the compiled kernels, slowest first, also those that this processor cannot run.

    Raises:
      ToolNotFoundError: none were compiled.
    """
    found: list[Kernel] = []
    lanes, usable = ctypes.c_int(), ctypes.c_int()
    while (
        name := _library().foldfeed_kernel(len(found), ctypes.byref(lanes), ctypes.byref(usable))
    ) is not None:
        found.append(Kernel(name.decode(), len(found), lanes.value, bool(usable.value)))
    return tuple(found)


def _pointer(array: NDArray[Any], dtype: type) -> ctypes.c_void_p:
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise TypeError(f"the kernels take contiguous {np.dtype(dtype)}, not {array.dtype} {array.strides}")
    return ctypes.c_void_p(array.ctypes.data)


def digitise(
    text: NDArray[np.uint8], codes_of_bytes: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the residue codes of FASTA text.

    Args:
      text: uint8 (bytes,), from the start of a record to the end of one.
      codes_of_bytes: uint8 (256,), a code, `SKIPPED` or `REFUSED` for every byte of a sequence.
    Returns:
      codes uint8 (residues,); int64 (records + 1,), where records start in `text`; int64 (records + 1,),
      where their sequences start in codes.
    Raises:
      ValueError: ``(kind, position)``, kind one of `FAULTS`: text before the first header, a header without a
        name, a byte that is refused.
    """
    library = _library()
    most = library.foldfeed_count_byte(_pointer(text, np.uint8), ctypes.c_int64(len(text)), ord(">"))
    codes = np.empty(len(text), dtype=np.uint8)
    record_starts = np.empty(most + 1, dtype=np.int64)
    code_starts = np.empty(most + 1, dtype=np.int64)
    fault = ctypes.c_int64()
    records = library.foldfeed_digitise(
        _pointer(text, np.uint8),
        ctypes.c_int64(len(text)),
        _pointer(codes_of_bytes, np.uint8),
        _pointer(codes, np.uint8),
        _pointer(record_starts, np.int64),
        _pointer(code_starts, np.int64),
        ctypes.byref(fault),
    )
    if records < 0:
        raise ValueError(FAULTS[records], fault.value)
    code_starts = code_starts[: records + 1].copy()
    return codes[: code_starts[-1]], record_starts[: records + 1].copy(), code_starts


# Records that one call gives back at most; a call more finds the others.
_FOUND_AT_ONCE = 65_536


def find_named(text: bytes, wanted: Sequence[bytes], ended: bool) -> tuple[list[tuple[int, int, int]], int]:
    """Returns the records of FASTA text that have one of some names.

    Args:
      text: from the start of a record, or what stands before the first.
      wanted: names, sorted.
      ended: whether the file ends here; else the last record may be cut and is left out.
    Returns: start, end and place in `wanted` of each record; where the first starts that was left out.
    """
    names = np.frombuffer(b"".join(wanted) or b"\0", dtype=np.uint8)
    starts = np.concatenate([[0], np.cumsum([len(name) for name in wanted])]).astype(np.int64)
    data = np.frombuffer(text or b"\0", dtype=np.uint8)
    room = np.empty((min(_FOUND_AT_ONCE, text.count(b">") + 1), 3), dtype=np.int64)
    found: list[tuple[int, int, int]] = []
    at, resume = 0, ctypes.c_int64()
    while True:
        number = _library().foldfeed_find_named(
            _pointer(data[at:], np.uint8),
            ctypes.c_int64(len(text) - at),
            ctypes.c_int(ended),
            _pointer(names, np.uint8),
            _pointer(starts, np.int64),
            ctypes.c_int64(len(wanted)),
            _pointer(room, np.int64),
            ctypes.c_int64(len(room)),
            ctypes.byref(resume),
        )
        found += [(at + start, at + end, place) for start, end, place in room[:number].tolist()]
        at += resume.value
        if number < len(room):
            return found, at


def pack(codes: NDArray[np.uint8], starts: NDArray[np.int64], order: NDArray[np.int64], lanes: int) -> Blocks:
    """Returns targets side by side; target ``order[i]`` is lane ``i % lanes`` of block ``i // lanes``.

    Args:
      codes: uint8 (residues,).
      starts: int64 (targets + 1,).
      order: int64 (chosen,), targets; best sorted by length, because a block is as long as its longest.
      lanes: of the kernel, 1 or a multiple of 8.
    """
    blocks = _empty_blocks(starts[order + 1] - starts[order], lanes)
    _library().foldfeed_pack(
        _pointer(codes, np.uint8),
        _pointer(starts, np.int64),
        _pointer(np.ascontiguousarray(order, dtype=np.int64), np.int64),
        ctypes.c_int64(len(order)),
        ctypes.c_int(lanes),
        _pointer(blocks.offsets, np.int64),
        _pointer(blocks.rows, np.int32),
        _pointer(blocks.codes, np.uint8),
    )
    return blocks


def gather(blocks: Blocks, positions: NDArray[np.int64], lengths: NDArray[np.int64], lanes: int) -> Blocks:
    """Returns chosen targets of blocks as blocks of their own.

    Args:
      blocks: packed targets.
      positions: int64 (chosen,), ``block * blocks.lanes + lane`` of each.
      lengths: int64 (chosen,), their residues.
      lanes: of the new ones.
    """
    chosen = _empty_blocks(lengths, lanes)
    _library().foldfeed_gather(
        _pointer(blocks.codes, np.uint8),
        _pointer(blocks.offsets, np.int64),
        _pointer(blocks.rows, np.int32),
        ctypes.c_int(blocks.lanes),
        _pointer(np.ascontiguousarray(positions, dtype=np.int64), np.int64),
        ctypes.c_int64(len(positions)),
        ctypes.c_int(lanes),
        _pointer(chosen.offsets, np.int64),
        _pointer(chosen.rows, np.int32),
        _pointer(chosen.codes, np.uint8),
    )
    return chosen


def _empty_blocks(lengths: NDArray[np.int64], lanes: int) -> Blocks:
    num_blocks = -(-len(lengths) // lanes)
    padded = np.zeros(num_blocks * lanes, dtype=np.int64)
    padded[: len(lengths)] = lengths
    rows = padded.reshape(num_blocks, lanes).max(axis=1, initial=0)
    tile = SINGLE_TILE if lanes == 1 else TILE
    rows = -(-rows // tile) * tile
    ends = np.cumsum(rows * lanes)
    return Blocks(
        codes=np.empty(int(ends[-1]) if num_blocks else 0, dtype=np.uint8),
        offsets=np.ascontiguousarray(ends - rows * lanes, dtype=np.int64),
        rows=rows.astype(np.int32),
        lanes=lanes,
    )


def ssv(
    kernel: Kernel,
    blocks: Blocks,
    table: NDArray[np.int8],
    letters: NDArray[np.uint8],
    starts: NDArray[np.int64],
    *,
    first: int = 0,
    last: int | None = None,
    out: NDArray[np.int8] | None = None,
) -> NDArray[np.int8]:
    """Returns the best cell of the SSV recurrence for every query and target.

    Cells start at -128; along a diagonal, ``cell = saturate(cell - table[letter of query][code of target])``.

    Args:
      kernel: which.
      blocks: targets, packed for its lanes.
      table: int8 (letters, `NUM_CODES`), costs.
      letters: uint8 (residues of all queries,), rows of `table`.
      starts: int64 (queries + 1,), where queries start in `letters`.
      first: block to begin with.
      last: block to end before; all when None.
      out: int8 (queries, blocks * lanes) to write into; made when None.
    """
    _check(kernel, blocks, table, letters)
    shape = (len(starts) - 1, len(blocks) * kernel.lanes)
    out = np.empty(shape, dtype=np.int8) if out is None else out
    if out.shape != shape or starts[-1] > len(letters):
        raise ValueError(f"out is {out.shape}, queries end at {starts[-1]}; expected {shape}, {len(letters)}")
    done = _library().foldfeed_ssv(
        ctypes.c_int(kernel.number),
        _pointer(blocks.codes, np.uint8),
        _pointer(blocks.offsets, np.int64),
        _pointer(blocks.rows, np.int32),
        ctypes.c_int64(first),
        ctypes.c_int64(len(blocks) if last is None else last),
        _pointer(table, np.int8),
        ctypes.c_int(len(table)),
        _pointer(letters, np.uint8),
        _pointer(starts, np.int64),
        ctypes.c_int(len(starts) - 1),
        _pointer(out, np.int8),
        ctypes.c_int64(shape[1]),
    )
    if done < 0:
        raise MemoryError("no memory for the columns of the scan")
    return out


def msv(
    kernel: Kernel,
    blocks: Blocks,
    table: NDArray[np.uint8],
    letters: NDArray[np.uint8],
    *,
    base: int,
    bias: int,
    tec: int,
    begin_costs: NDArray[np.uint8],
) -> NDArray[np.uint8]:
    """Returns xJ of the MSV recurrence of one query for every target; 255 where it overflows.

    Args:
      kernel: which.
      blocks: targets, packed for its lanes.
      table: uint8 (letters, `NUM_CODES`), biased costs.
      letters: uint8 (query residues,), rows of `table`.
      base: score of the begin state.
      bias: of `table`.
      tec: cost of E to C and E to J.
      begin_costs: uint8 (blocks * lanes,), tjb + tbm of every target.
    """
    _check(kernel, blocks, table, letters)
    if begin_costs.shape != (len(blocks) * kernel.lanes,):
        raise ValueError(f"begin_costs is {begin_costs.shape}; one for each of {len(blocks)} blocks' lanes")
    out = np.empty(len(blocks) * kernel.lanes, dtype=np.uint8)
    done = _library().foldfeed_msv(
        ctypes.c_int(kernel.number),
        _pointer(blocks.codes, np.uint8),
        _pointer(blocks.offsets, np.int64),
        _pointer(blocks.rows, np.int32),
        ctypes.c_int64(0),
        ctypes.c_int64(len(blocks)),
        _pointer(table, np.uint8),
        ctypes.c_int(len(table)),
        _pointer(letters, np.uint8),
        ctypes.c_int64(len(letters)),
        ctypes.c_int(base),
        ctypes.c_int(bias),
        ctypes.c_int(tec),
        _pointer(begin_costs, np.uint8),
        _pointer(out, np.uint8),
    )
    if done < 0:
        raise MemoryError("no memory for the columns of the scan")
    return out


def length_costs(lengths: NDArray[np.int64], scale: float) -> NDArray[np.uint8]:
    """Returns tjb, the cost of leaving N, C or J, for target lengths: ``-round(scale ln(3 / (L + 3)))``.

    Computed in C's float, as HMMER does, so that no other library's logarithm rounds another way.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    out = np.empty(len(lengths), dtype=np.uint8)
    _library().foldfeed_length_costs(
        _pointer(lengths, np.int64),
        ctypes.c_int64(len(lengths)),
        ctypes.c_float(scale),
        _pointer(out, np.uint8),
    )
    return out


def _check(kernel: Kernel, blocks: Blocks, table: NDArray[Any], letters: NDArray[np.uint8]) -> None:
    if not kernel.usable:
        raise ValueError(f"this processor has no {kernel.name}")
    check_input(kernel, blocks, table, letters)


def check_input(
    kernel: Kernel | DeviceKernel, blocks: Blocks, table: NDArray[Any], letters: NDArray[np.uint8]
) -> None:
    """Raises ValueError where a kernel would read outside of what it is given."""
    if blocks.lanes != kernel.lanes:
        raise ValueError(f"blocks of {blocks.lanes} lanes; kernel {kernel.name} takes {kernel.lanes}")
    if table.ndim != 2 or table.shape[1] != NUM_CODES or not 0 < len(table) <= MAX_LETTERS:
        raise ValueError(f"the table is {table.shape}; it must be (1 to {MAX_LETTERS}, {NUM_CODES})")
    if (table[:, PAD] != np.iinfo(table.dtype).max).any():
        raise ValueError(
            f"column {PAD} of the table must hold the highest cost, so that no score crosses an end"
        )
    if letters.size and letters.max() >= len(table):
        raise ValueError(f"a query has letter {letters.max()}; the table has {len(table)}")
