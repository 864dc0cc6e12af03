"""The fast scan's scores on a CUDA device: `scan_gpu.cu` compiled, fed and compared.

Owns how queries and targets come onto the device, which layout of the kernel takes a query, and what of a
database stays in the device's memory. Does not own the driver (`cuda_device`), when a device is used
(`fast_scan.choice`) or what scores mean (`fast_scan.scan`). Invariants: the scores are those of the other
kernels, bit for bit; a layout is used only after it gave plain C's scores on drawn input, on this device, in
this process; the device's memory holds at most `DEVICE_SHARE` of what was free, chunks used last first.

Safe from any thread; scans follow each other.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.resources
import weakref
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from foldfeed.pipelines.errors import DeviceError, KernelError
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan.cuda_device import INT, POINTER, Buffer, Device, Function, open_device
from foldfeed.pipelines.fast_scan.kernels import MAX_LETTERS, NUM_CODES, PAD, Blocks, Kernel, kernels

# Of the device's memory that was free when it was opened; the rest is for scores and for what a long query
# needs.
DEVICE_SHARE = 0.8
# The instructions that the kernel uses exist from there on (Ampere).
LEAST_CAPABILITY = (8, 0)
# Bytes of shared memory for a position of a query: a gain of 16 bits for every code.
_POSITION_BYTES = 2 * NUM_CODES
# Positions of a lane of the kernel: fewer leave too little work between two moves, more too few registers.
_STRIPS = range(16, 72, 8)
_GROUPS = (8, 16, 32)
# A large table of gains is shared by more threads.
_SMALL_TABLE_BYTES, _FEW_THREADS, _MANY_THREADS = 48 << 10, 256, 512


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Layout:
    """One compiled form of the kernel.

    Attributes:
      group: lanes that share a target.
      strip: positions of a query in each.
      stretches: whether it can take a part of a longer query.
    """

    group: int
    strip: int
    stretches: bool = False

    @property
    def positions(self) -> int:
        """The longest query, or part of one."""
        return self.group * self.strip

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.positions * _POSITION_BYTES

    @property
    def threads(self) -> int:
        """Of a block."""
        return _FEW_THREADS if self.shared_bytes <= _SMALL_TABLE_BYTES else _MANY_THREADS

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"ssv_{self.group}_{self.strip}" + ("_stretches" if self.stretches else "")

    @property
    def options(self) -> tuple[str, ...]:
        """Of the compiler."""
        words = {"GROUP": self.group, "STRIP": self.strip, "THREADS": self.threads, "KERNEL": self.name}
        found = [f"-D{key}={value}" for key, value in words.items()]
        return (*found, "-DSTRETCHES") if self.stretches else tuple(found)


def layout_of(num_residues: int, shared_bytes: int) -> Layout:
    """Returns the layout for a query: the one with the fewest positions to spare.

    Args:
      num_residues: of the query.
      shared_bytes: that a block may have on the device.
    """
    fitting = [
        Layout(group, strip)
        for group in _GROUPS
        for strip in _STRIPS
        if group * strip * _POSITION_BYTES <= shared_bytes
    ]
    large_enough = [one for one in fitting if one.positions >= num_residues]
    if large_enough:
        return min(large_enough, key=lambda one: (one.positions, one.group))
    return dataclasses.replace(max(fitting, key=lambda one: one.positions), stretches=True)


@functools.cache
def source() -> str:
    """Returns the kernel's text."""
    return (
        importlib.resources.files("foldfeed.pipelines.fast_scan").joinpath("scan_gpu.cu").read_text("ascii")
    )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Resident:
    """Targets on the device."""

    codes: Buffer
    offsets: Buffer
    rows: Buffer
    num_targets: int
    size_bytes: int


class GpuKernel:
    """The kernel on one device; safe from any thread."""

    # Targets lie one after the other.
    lanes = 1

    def __init__(self, device: Device, host: Kernel) -> None:
        if device.capability < LEAST_CAPABILITY:
            found, least = (".".join(map(str, one)) for one in (device.capability, LEAST_CAPABILITY))
            raise DeviceError(
                "the fast scan", f"{device.name} has compute capability {found}; it needs {least}"
            )
        self.name = f"cuda ({device.name})"
        self.host = host
        self._device = device
        self._functions: dict[Layout, tuple[Function, int]] = {}
        self._resident: collections.OrderedDict[int, _Resident] = collections.OrderedDict()
        # Keys of chunks that are gone; whoever notices may be any thread, so they are let go by the next
        # scan.
        self._gone: list[int] = []
        with device.used():
            self._limit_bytes = int(DEVICE_SHARE * device.free_bytes())

    def ssv(
        self, blocks: Blocks, table: NDArray[np.int8], letters: NDArray[np.uint8], starts: NDArray[np.int64]
    ) -> NDArray[np.int8]:
        """Returns what `scan_kernels.ssv` does: int8 (queries, targets), best cells, -128 the begin score.

        Args:
          blocks: targets, packed for one lane.
          table: int8 (letters, `NUM_CODES`), costs.
          letters: uint8 (residues of all queries,), rows of `table`.
          starts: int64 (queries + 1,), where queries start in `letters`.
        Raises:
          DeviceError: the device or its compiler failed.
          KernelError: a layout gives other scores than plain C.
        """
        scan_kernels.check_input(self, blocks, table, letters)
        if not len(blocks) or len(starts) < 2:
            return np.empty((len(starts) - 1, len(blocks)), dtype=np.int8)
        with self._device.used():
            for query in range(len(starts) - 1):
                self._function(layout_of(int(starts[query + 1] - starts[query]), self._device.shared_bytes))
            return self._scores(blocks, table, letters, starts)

    def _scores(
        self, blocks: Blocks, table: NDArray[np.int8], letters: NDArray[np.uint8], starts: NDArray[np.int64]
    ) -> NDArray[np.int8]:
        device = self._device
        targets = self._targets(blocks)
        on_device = [device.upload(np.ascontiguousarray(one)) for one in (table, letters)]
        parts = list(_parts(starts, device.shared_bytes))
        counters = Buffer(device, 4 * len(parts))
        device.clear(counters)
        best = Buffer(device, (len(starts) - 1) * targets.num_targets)
        # Halves at the places of codes, of a stretch and of the one before it.
        long = any(layout.stretches for layout, *_ in parts)
        edges = [Buffer(device, 2 * targets.codes.size_bytes) for _ in range(2 * long)]
        for number, (layout, query, start, end) in enumerate(parts):
            function, num_blocks = self._function(layout)
            first, last = start == starts[query], end == starts[query + 1]
            before = 0 if first else int(edges[number % 2].address)
            after = 0 if last else int(edges[1 - number % 2].address)
            function.launch(
                num_blocks,
                layout.threads,
                layout.shared_bytes,
                (
                    *((int(one.address), POINTER) for one in (targets.codes, targets.offsets, targets.rows)),
                    (targets.num_targets, INT),
                    (int(on_device[0].address), POINTER),
                    (int(on_device[1].address) + start, POINTER),
                    (end - start, INT),
                    (before, POINTER),
                    (after, POINTER),
                    (int(counters.address) + 4 * number, POINTER),
                    (int(best.address) + query * targets.num_targets, POINTER),
                ),
            )
        out = np.empty((len(starts) - 1, targets.num_targets), dtype=np.uint8)
        device.download(best, out)
        # From steps above the begin score to signed bytes.
        np.bitwise_xor(out, 128, out=out)
        return out.view(np.int8)

    def _function(self, layout: Layout) -> tuple[Function, int]:
        """Returns a layout's kernel and how many blocks of it are started; compared before it is used."""
        if layout not in self._functions:
            function = self._device.function(source(), layout.name, layout.options)
            blocks = function.blocks_at_a_time(layout.threads, layout.shared_bytes)
            self._functions[layout] = function, blocks
            try:
                self._compare(layout)
            except BaseException:
                del self._functions[layout]
                raise
        return self._functions[layout]

    def _compare(self, layout: Layout) -> None:
        """Compares a layout with plain C on drawn targets and costs.

        Raises:
          KernelError: their scores differ.
        """
        letters, table, codes, starts = _drawn(layout)
        query, order = np.array([0, len(letters)]), np.arange(len(starts) - 1)
        plain = kernels()[0]
        expected = scan_kernels.ssv(
            plain, scan_kernels.pack(codes, starts, order, plain.lanes), table, letters, query
        )[:, : len(order)]
        found = self._scores(scan_kernels.pack(codes, starts, order, self.lanes), table, letters, query)
        wrong = int((found != expected).sum())
        if wrong:
            raise KernelError(f"{self.name}, {layout.name},", wrong, expected.size)

    def _targets(self, blocks: Blocks) -> _Resident:
        """Returns targets on the device, put there unless they are; those used longest ago make room."""
        while self._gone:
            self._resident.pop(self._gone.pop(), None)
        key = id(blocks.codes)
        if key not in self._resident:
            size = blocks.codes.nbytes + 12 * len(blocks)
            self._make_room(size)
            try:
                self._resident[key] = self._upload(blocks, size)
            except DeviceError:
                # Somebody else has taken what was free: once more, with all that we could do without.
                self._make_room(self._limit_bytes)
                self._resident[key] = self._upload(blocks, size)
            weakref.finalize(blocks.codes, self._gone.append, key)
        self._resident.move_to_end(key)
        return self._resident[key]

    def _upload(self, blocks: Blocks, size: int) -> _Resident:
        device = self._device
        return _Resident(
            codes=device.upload(blocks.codes),
            offsets=device.upload(blocks.offsets),
            rows=device.upload(blocks.rows),
            num_targets=len(blocks),
            size_bytes=size,
        )

    def _make_room(self, size: int) -> None:
        held = sum(one.size_bytes for one in self._resident.values())
        while self._resident and held + size > self._limit_bytes:
            held -= self._resident.popitem(last=False)[1].size_bytes
        self._device.collect()


def _drawn(
    layout: Layout,
) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.uint8], NDArray[np.int64]]:
    """Returns a query's letters, costs, and targets (codes, starts) that an error of a layout would show in.

    The query takes two parts where the layout takes parts, not a full one at the end. Most targets hold a
    piece of it that lies across a place where cells change hands, between lanes, halves of registers or
    parts, and scores more whole than cut; they begin at all places of a word. Some are so long that they
    saturate.
    """
    random = np.random.default_rng(layout.positions)
    residues = layout.positions - 5 + layout.stretches * layout.positions
    letters = random.integers(0, MAX_LETTERS, size=residues, dtype=np.uint8)
    table = random.integers(0, 20, size=(MAX_LETTERS, NUM_CODES)).astype(np.int8)
    table[np.arange(PAD), np.arange(PAD)] = random.integers(-9, -3, size=PAD)
    table[:, PAD] = 127
    edges = random.integers(0, residues // (layout.strip // 2) + 1, size=80) * (layout.strip // 2)
    edges[1::16] = layout.strip
    if layout.stretches:
        edges[::5] = layout.positions
    reach = random.integers(2, 12, size=len(edges))
    reach[::10] = 60
    targets = []
    for number, (edge, far) in enumerate(zip(edges.tolist(), reach.tolist(), strict=True)):
        before, behind = (random.integers(0, PAD, size=int(n)) for n in (number % 7, random.integers(6)))
        piece = letters[max(0, edge - far) : edge + far]
        if number % 8 == 1:
            # Ends at an edge and goes on at the query's start: two hits, not one.
            piece = np.concatenate([letters[max(0, edge - far) : edge], letters[:far]])
        piece = np.minimum(piece, PAD - 1)
        targets.append(np.concatenate([before, piece, behind]).astype(np.uint8))
    targets.sort(key=len)
    starts = np.concatenate([[0], np.cumsum([len(target) for target in targets])]).astype(np.int64)
    return letters, table, np.concatenate(targets), starts


def _parts(starts: NDArray[np.int64], shared_bytes: int) -> Iterator[tuple[Layout, int, int, int]]:
    """Yields layout, query, start and end of every part of some queries."""
    for query, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        layout = layout_of(end - start, shared_bytes)
        for at in range(start, end, layout.positions):
            yield layout, query, at, min(at + layout.positions, end)


def open_gpu_kernel(number: int, host: Kernel) -> GpuKernel:
    """Returns the kernel on a device of this machine.

    Args:
      number: of the device, as CUDA counts.
      host: kernel of the processor, for what is not computed on the device.
    Raises:
      MissingExtraError: the package ``cuda-bindings`` is not installed.
      DeviceError: no driver, no such device, or one that is too old.
    """
    return GpuKernel(open_device(number), host)
