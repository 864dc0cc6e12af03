"""Which kernel the fast scan uses on this machine: the fastest one whose scores are right.

Owns the comparison with plain C, the measurement, and whether a CUDA device computes the first filter
(environment variable `VARIABLE`, read once per process). Does not own the kernels (`fast_scan.kernels`,
`fast_scan.gpu`). Invariant: a kernel is used only after it gave the plain C kernel's scores on drawn input,
in this process; so a build for an instruction set or a device that nobody has tried yet cannot give wrong
ones.

A device is taken only where the variable asks for one, because results are the same and the processor's
kernels are those that have run on many machines. It belongs to a machine, not to a build: workers of one
build may differ.
"""

from __future__ import annotations

import functools
import os
import re
import time

import numpy as np

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.pipelines.errors import ConfigError, DeviceError, KernelError
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan.gpu import open_gpu_kernel
from foldfeed.pipelines.fast_scan.kernels import MAX_LETTERS, NUM_CODES, PAD, DeviceKernel, Kernel, kernels

# What computes the first filter: "cpu" (as when it is not set), "cuda" or "cuda:N", or "auto", a device where
# there is one that can be used.
VARIABLE = "FOLDFEED_SCAN_DEVICE"


def scan_kernel() -> Kernel | DeviceKernel:
    """Returns what computes the first filter here, as `VARIABLE` wants it.

    Raises:
      ConfigError: the variable says something else.
      ToolNotFoundError: no kernels were compiled; a device needs them, too.
      KernelError: the processor's kernel gives other scores than plain C.
      MissingExtraError, DeviceError: a device is asked for and cannot be used.
    """
    return _chosen(os.environ.get(VARIABLE, ""))[0]


def describe_kernel() -> str:
    """Returns `scan_kernel` in words, and why it is not a device where one was looked for."""
    kernel, reason = _chosen(os.environ.get(VARIABLE, ""))
    if not isinstance(kernel, Kernel):
        return f"{kernel.name} kernel, what it leaves by the {kernel.host.name} kernel"
    return f"{kernel.name} kernel" + (f"; no device, because {reason}" if reason else "")


@functools.cache
def _chosen(wanted: str) -> tuple[Kernel | DeviceKernel, str]:
    """Returns the kernel, and the reason against a device where one was only looked for."""
    named = re.fullmatch(r"(?:|cpu|auto|cuda(?::(\d{1,4}))?)", wanted)
    if named is None:
        raise ConfigError(f"{VARIABLE} is {wanted!r}; it must be cpu, cuda, cuda:N or auto")
    host = best_kernel()
    if wanted in ("", "cpu"):
        return host, ""
    try:
        return open_gpu_kernel(int(named[1] or 0), host), ""
    except (DeviceError, MissingExtraError) as error:
        if wanted != "auto":
            raise
        return host, error.reason if isinstance(error, DeviceError) else str(error)


@functools.cache
def best_kernel() -> Kernel:
    """Returns the fastest kernel that this processor runs, after comparing its scores with plain C.

    Which is fastest is measured, some milliseconds, once per process: processors that lower their clock for
    512-bit instructions, or take them in halves, need not gain by them. The scores are the same whichever.

    Raises:
      ToolNotFoundError: none were compiled.
      KernelError: it gives other scores.
    """
    usable = [kernel for kernel in kernels() if kernel.usable]
    # The widest two; narrower ones are slower wherever these are there.
    kernel = min(usable[-2:], key=seconds_per_cell) if len(usable) > 2 else usable[-1]
    check_kernel(kernel)
    return kernel


# Runs of one measurement, of which the quickest counts.
_TIMED_RUNS = 9


def seconds_per_cell(kernel: Kernel) -> float:
    """Returns CPU seconds that a kernel takes for a residue of a query and one of a target."""
    length, num_targets = 320, 4 * kernel.lanes
    random = np.random.default_rng(0)
    codes = random.integers(0, 20, size=length * num_targets, dtype=np.uint8)
    starts = np.arange(num_targets + 1, dtype=np.int64) * length
    blocks = scan_kernels.pack(codes, starts, np.arange(num_targets), kernel.lanes)
    table = random.integers(-20, 10, size=(20, NUM_CODES)).astype(np.int8)
    table[:, PAD] = 127
    letters = random.integers(0, 20, size=300, dtype=np.uint8)
    query = np.array([0, len(letters)], dtype=np.int64)

    def run() -> float:
        started = time.thread_time()
        scan_kernels.ssv(kernel, blocks, table, letters, query)
        return time.thread_time() - started

    return min(run() for _ in range(_TIMED_RUNS)) / (len(codes) * len(letters))


def check_kernel(kernel: Kernel) -> None:
    """Compares a kernel with the plain one on drawn targets, profiles and costs.

    Raises:
      KernelError: their scores differ.
    """
    random = np.random.default_rng(0)
    lengths = random.integers(0, 150, size=2 * kernel.lanes + 1)
    codes = random.integers(0, PAD, size=int(lengths.sum()), dtype=np.uint8)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    letters = random.integers(0, MAX_LETTERS, size=180, dtype=np.uint8)
    query_starts = np.array([0, 1, 70, 180], dtype=np.int64)
    signed = random.integers(-30, 20, size=(MAX_LETTERS, NUM_CODES)).astype(np.int8)
    biased = (signed.astype(np.int64) + 30).astype(np.uint8)
    signed[:, PAD], biased[:, PAD] = 127, 255
    order = np.argsort(lengths, kind="stable")
    answers = []
    for each in (kernels()[0], kernel):
        blocks = scan_kernels.pack(codes, starts, order, each.lanes)
        begin = np.full(len(blocks) * each.lanes, 60, dtype=np.uint8)
        scores = scan_kernels.ssv(each, blocks, signed, letters, query_starts)[:, : len(order)]
        full = scan_kernels.msv(each, blocks, biased, letters, base=190, bias=30, tec=3, begin_costs=begin)
        answers.append(np.concatenate([scores.view(np.uint8).ravel(), full[: len(order)]]))
    wrong = int((answers[0] != answers[1]).sum())
    if wrong:
        raise KernelError(kernel.name, wrong, len(answers[0]))
