"""The bucketed reducer: gradients of all virtual shards, summed in one fixed tree, hidden behind backward.

Each rank runs its virtual shards one after another. After each but the last, the flat gradient is folded
into the rank's stack of finished blocks (dyadic.py). During the last shard's backward, a hook on every
parameter counts its bucket down; a complete bucket whose predecessors are launched goes to the
communication thread at once, so the exchange runs while backward goes on. (A hook that finds its bucket
incomplete does nothing else: models have thousands of them.)

`finish` is the commit point: all buckets, then one small message of scalars and flags. It returns only when
every bucket's sum has arrived, and raises whatever the hooks or the thread met.

A gradient that is produced again after its bucket left (several backward calls in one shard, reentrant
checkpointing) makes the bucket *late*: the flags tell all ranks, the bucket is exchanged again at the commit
point, and from then on it waits for it. Parameters without a gradient count as zeros.

What a rank finished of a step that is broken off outlives its reducer (`finished`), and the next one goes on
from there (`resume`): transports read blocks and leaf and never write them, so nothing that was under way is
in them.

Invariants: launch order is bucket order on every rank, whatever order backward produced; the sums have equal
bits for every world size; buffers are only touched by the thread between launch and `finish`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import profiler
from torch.profiler import record_function

from foldfeed.trainer.errors import TrainerError
from foldfeed.trainer.gradients.buckets import Bucket
from foldfeed.trainer.gradients.dyadic import Block, Division, merge_chain, usual_division
from foldfeed.trainer.gradients.exchange import Exchange, finish_blocks
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.stream import tree_exchange
from foldfeed.trainer.groups.ranks import Ranks


class Reducer(Protocol):
    """What the training step needs of a reducer.

    Attributes:
      gradient: fp32 (flat numel,), after `finish` the sum over all virtual shards, undivided.
      times: seconds of the last step: ``exposed`` (waiting in `finish`), ``total`` (all communication).
    """

    gradient: torch.Tensor
    times: dict[str, float]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the module to call in the forward pass."""
        ...

    def begin(self) -> None:
        """Starts a step: gradients are zero."""
        ...

    def shard(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Surrounds forward and backward of one of this rank's virtual shards, in order."""
        ...

    def finish(self, scalars: Sequence[float]) -> list[list[float]]:
        """The commit point: returns every rank's scalars once every bucket has arrived."""
        ...

    def not_finite(self) -> list[str]:
        """After `finish`: which of this rank's own gradients are not finite, one phrase each."""
        ...

    def close(self, *, wait: bool = True) -> None:
        """Ends threads and removes hooks."""
        ...


class TreeReducer:
    """Sums gradients bit-identically for every world size; see the module docstring."""

    def __init__(
        self,
        flat: FlatParameters,
        buckets: Sequence[Bucket],
        ranks: Ranks,
        num_shards: int,
        on_event: Callable[[str, int], None] | None = None,
        make_exchange: Callable[[torch.Tensor, int], Exchange] | None = None,
        wire: torch.dtype = torch.float32,
    ) -> None:
        """Registers the hooks and starts the communication thread.

        Args:
          flat: the model's flat buffers.
          buckets: the plan, equal on all ranks.
          ranks: the groups.
          num_shards: V, at least the world size.
          on_event: called with ``launch``, ``exchange``, ``arrived`` or ``backward_end`` and the bucket (or
            -1), from the thread where it happens; for tests and tracing.
          make_exchange: the transport, made from the output and the elements of the largest bucket; the
            usual tree when None.
          wire: what every virtual shard's gradient and every sum is rounded to, as the transport's.
        """
        self.gradient = torch.zeros_like(flat.params)
        self.times: dict[str, float] = {"exposed": 0.0, "total": 0.0}
        self._flat = flat
        self._ranks = ranks
        self._buckets = list(buckets)
        self._usual = self._division = usual_division(num_shards, ranks.world)
        self._resumes = False
        self._event = on_event or (lambda name, bucket: None)
        largest = max(bucket.numel for bucket in buckets)
        self._exchange: Exchange = (
            make_exchange(self.gradient, largest)
            if make_exchange is not None
            else tree_exchange(ranks, num_shards, largest, self.gradient, wire)
        )
        self._scratch = torch.zeros(largest, dtype=wire, device=flat.params.device)
        self._bucket_of = [bucket.index for bucket in buckets for _ in bucket.segments]
        self._deferred: set[int] = set()
        self._pool: list[torch.Tensor] = []
        self._stack: list[tuple[Block, torch.Tensor]] = []
        self._lock = threading.Lock()
        # Before the backward's kernels, which would otherwise be in front of its few small ones.
        is_cuda = ranks.device.type == "cuda"
        self._side = torch.cuda.Stream(ranks.device, priority=-1) if is_cuda else None
        # Per bucket, by the number that tells streams apart without making an object of each.
        self._streams: list[dict[int, Any]] = [{} for _ in buckets]
        # No executor: its locks hand the GIL to and fro, 0.2 ms of the backward for each bucket on two cores.
        self._tasks: deque[Callable[[], float]] = deque()
        self._num_tasks, self._seconds = 0, queue.SimpleQueue[float]()
        self._closed = False
        # Of the pipe with a byte for each task: what the thread reads, and what `_submit` writes.
        self._wake = self._waker = -1
        self._thread: threading.Thread | None = None
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._hook(position))
            for position, param in enumerate(flat.parameters)
        ]
        self._reset()

    def _reset(self) -> None:
        self._armed = False
        # Of this step's shards: how many are computed, and whether the last one's gradient is still a leaf.
        self._num_done = 0
        self._has_leaf = False
        self._error: BaseException | None = None
        # Of a device: events around what its side stream does for each bucket.
        self._spans: list[list[torch.cuda.Event]] = []
        self._next = 0
        self._num_merged = 0
        self._late: set[int] = set()
        self._pending = [set(bucket.segments) for bucket in self._buckets]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model itself: hooks on its parameters are all this reducer needs."""
        return model

    def begin(self) -> None:
        """Zeroes the gradient and forgets the previous step's blocks, but those that `resume` brought."""
        if self._division is not self._usual and not self._resumes:
            # What a repair took more of memory than usual goes back.
            self._stack, self._pool, self._division = [], [], self._usual
            self._exchange.divide(self._usual.blocks)
        while self._stack and not self._resumes:
            self._pool.append(self._stack.pop()[1])
        self._resumes = False
        self._reset()
        self._flat.zero_gradients()

    @property
    def _shards(self) -> list[int]:
        return self._division.shards[self._ranks.rank]

    def resume(self, division: Division, finished: Sequence[tuple[Block, torch.Tensor]]) -> None:
        """Lets the next step, and it alone, go on from what ranks have.

        Args:
          division: of the step, equal on all ranks.
          finished: of another reducer of the same flat buffers; what the division does not count is left out.
        """
        wanted = division.kept[self._ranks.rank]
        self._stack = [(block, values) for block, values in finished if block in wanted]
        assert [block for block, _ in self._stack] == wanted, f"{wanted} are not all in {finished}"
        self._division, self._resumes = division, True
        self._exchange.divide(division.blocks)

    def finished(self) -> list[tuple[Block, torch.Tensor]]:
        """Returns the sums of the step's virtual shards that were finished here; after `close`.

        Only what this rank computed (or resumed with) is in them. Owned by the caller once this is dropped.
        """
        if self._has_leaf:
            if self._side is not None:
                torch.cuda.current_stream(self._ranks.device).wait_stream(self._side)
            self._has_leaf = False
            self._fold(self._shards[-1])
        return list(self._stack)

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[None]:
        """Surrounds forward and backward of virtual shard ``number``.

        Raises:
          AssertionError: the number is not the next of this rank's shards.
        """
        expected = self._shards[self._num_done : self._num_done + 1]
        assert [number] == expected, f"virtual shard {number} out of turn, expected {expected}"
        last = self._num_done == len(self._shards) - 1
        if last:
            self._num_merged, _ = merge_chain([block for block, _ in self._stack], number)
            self._armed = True
        yield
        self._armed = False
        self._num_done += 1
        self._has_leaf = last
        if last:
            self._event("backward_end", -1)
        else:
            self._fold(number)

    def _fold(self, number: int) -> None:
        """Merges the finished shard into the stack, a binary counter of blocks, and zeroes the gradient."""
        num_merged, block = merge_chain([below for below, _ in self._stack], number)
        values = self._flat.grads
        if self._scratch.dtype is not values.dtype:
            # Rounded whether it will travel or be added here: on other ranks it may be otherwise.
            values = self._spare().copy_(values)
        for _ in range(num_merged):
            below = self._stack.pop()[1]
            below.add_(values)
            if values is not self._flat.grads:
                self._pool.append(values)
            values = below
        if values is self._flat.grads:
            values = self._spare().copy_(values)
        self._stack.append((block, values))
        self._flat.zero_gradients()

    def _spare(self) -> torch.Tensor:
        return self._pool.pop() if self._pool else torch.empty_like(self.gradient, dtype=self._scratch.dtype)

    def _hook(self, position: int) -> Callable[[torch.Tensor], None]:
        index = self._bucket_of[position]

        def on_gradient(_: torch.Tensor) -> None:
            if not self._armed:
                return
            # Runs inside autograd: an exception must not unwind through it, `finish` raises it.
            try:
                if self._side is not None:
                    self._note_stream(index)
                pending = self._pending[index]
                pending.discard(position)
                if not pending:
                    self._complete(index)
            except BaseException as error:  # noqa: BLE001 - kept whole, re-raised by finish()
                self._error = self._error or error

        return on_gradient

    def _note_stream(self, index: int) -> None:
        """Notes the stream that wrote to a bucket: autograd runs an operation on its forward's stream."""
        device = self._flat.params.device
        number = torch._C._cuda_getCurrentRawStream(device.index)
        if number not in self._streams[index]:
            self._streams[index][number] = torch.cuda.current_stream(device)

    def _complete(self, index: int) -> None:
        with self._lock:
            if index < self._next:
                self._late.add(index)
                return
            while self._next < len(self._buckets) and self._is_ready(self._next):
                self._launch(self._next)
                self._next += 1

    def _is_ready(self, index: int) -> bool:
        return not self._pending[index] and index not in self._deferred and self._error is None

    def _launch(self, index: int) -> None:
        self._event("launch", index)
        events = [stream.record_event() for stream in self._streams[index].values()]
        if self._side is not None:
            # Folded blocks and zeroed gradients come from the stream of the training loop.
            events.append(torch.cuda.current_stream(self._ranks.device).record_event())
        self._streams[index].clear()
        self._submit(functools.partial(self._run, self._buckets[index], events))

    def _submit(self, task: Callable[[], float]) -> None:
        if self._closed:
            # A device's backward that was broken off is still in a hook.
            return
        if self._thread is None:
            self._start()
        self._num_tasks += 1
        self._tasks.append(task)
        os.write(self._waker, b"t")

    def _start(self) -> None:
        self._wake, self._waker = os.pipe()
        # A daemon, because after a failure it may be stuck with peers that are gone, see `close`.
        self._thread = threading.Thread(
            target=_work,
            args=(self._wake, self._tasks, self._seconds),
            name="foldfeed-reducer",
            daemon=True,
        )
        self._thread.start()

    def _run(self, bucket: Bucket, events: Sequence[Any]) -> float:
        """Exchanges one bucket; runs in the communication thread. Returns the seconds it took."""
        if self._error is not None:
            return 0.0
        started = time.perf_counter()
        self._event("exchange", bucket.index)
        try:
            with self._on_side_stream(events), _span(f"trainer::bucket[{bucket.index}]::exchange"):
                span = slice(bucket.start, bucket.stop)
                stack = [(block, values[span]) for block, values in self._stack]
                leaf = self._flat.grads[span] if self._shards else None
                blocks = finish_blocks(stack, leaf, self._num_merged, self._scratch)
                self._exchange.reduce(bucket, blocks)
                self._exchange.progress(self._wake)
        except BaseException as error:  # noqa: BLE001 - kept whole, re-raised by finish()
            self._error = self._error or error
        self._event("arrived", bucket.index)
        return time.perf_counter() - started

    def _drain(self) -> float:
        started = time.perf_counter()
        if self._error is None:
            try:
                with self._on_side_stream(()), _span("trainer::bucket[last]::arrive"):
                    self._exchange.drain()
            except BaseException as error:  # noqa: BLE001 - kept whole, re-raised by finish()
                self._error = self._error or error
        return time.perf_counter() - started

    @contextlib.contextmanager
    def _on_side_stream(self, events: Sequence[Any]) -> Iterator[None]:
        if self._side is None:
            yield
            return
        with torch.cuda.stream(self._side):
            for event in events:
                self._side.wait_event(event)
            span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            span[0].record(self._side)
            yield
            span[1].record(self._side)
            self._spans.append(span)

    def finish(self, scalars: Sequence[float]) -> list[list[float]]:
        """Waits for all buckets, then exchanges scalars; the step may be applied when this returns.

        Args:
          scalars: this rank's values, equally many on every rank.
        Returns: one list per rank, in rank order.
        Raises:
          GradientError: a gradient view was replaced.
          TrainerConfigError: the model changed a buffer.
          CommunicationError: a peer died or stalled.
        """
        started = time.perf_counter()
        try:
            self._flat.check()
        except TrainerError as error:
            # Raised once nothing is under way any more.
            self._error = self._error or error
        self._collect(range(self._next, len(self._buckets)))
        flags = [float(index in self._late) for index in range(len(self._buckets))]
        rows = self._ranks.gather_floats([*flags, *scalars], "the commit of a step")
        late = [index for index in range(len(flags)) if any(row[index] for row in rows)]
        if late:
            # Every rank reaches the same list, so the order of collectives stays the same everywhere.
            self._deferred.update(late)
            self._collect(late)
        self.times["exposed"] = time.perf_counter() - started
        return [row[len(flags) :] for row in rows]

    def _collect(self, indices: Sequence[int]) -> None:
        """Launches the given buckets, waits for everything launched so far and raises what went wrong."""
        if self._error is None:
            for index in indices:
                self._launch(index)
            self._next = len(self._buckets)
            self._submit(self._drain)
        seconds = [self._seconds.get() for _ in range(self._num_tasks)]
        self._num_tasks = 0
        if self._error is not None:
            raise self._error
        if self._side is not None:
            # NCCL's calls return before their work is done; a commit says that it is.
            self._side.synchronize()
            torch.cuda.current_stream(self._ranks.device).wait_stream(self._side)
        # Work that was given up ends like any other, with whatever values.
        self._ranks.require_groups("the exchange of gradients")
        # NCCL's calls take no time in this thread but on the stream, gloo's the other way round.
        on_device = sum(first.elapsed_time(last) for first, last in self._spans) / 1e3
        self.times["total"] = max(sum(seconds), on_device)

    def not_finite(self) -> list[str]:
        """Returns which blocks of this rank's virtual shards are not finite, and their first such parameter.

        What is finite on every rank and not in the sum has overflowed there.
        """
        leaf = [(Block(self._shards[-1], 1), self._flat.grads)] if self._has_leaf else []
        blocks = [*self._stack, *leaf]
        found = []
        for block, values in blocks:
            if bool(values.isfinite().all()):
                continue
            bad = next(
                segment.name
                for segment in self._flat.segments
                if not bool(values[segment.start : segment.start + segment.padded].isfinite().all())
            )
            shards = f"{block.start}" if block.size == 1 else f"{block.start}..{block.shards[-1]}"
            found.append(f"virtual shard {shards}, parameter {bad}")
        return found

    def close(self, *, wait: bool = True) -> None:
        """Removes the hooks and ends the communication thread.

        Args:
          wait: False after a failure, when the thread may be stuck in a collective whose peers are gone.
        """
        for hook in self._hooks:
            hook.remove()
        self._tasks.clear()
        with self._lock:
            if self._thread is not None and not self._closed:
                # With the pipe the thread ends.
                os.close(self._waker)
            self._closed = True
        if wait and self._thread is not None:
            self._thread.join()
        if wait and self._side is not None:
            # What is still on its way into buffers must not find them in other hands.
            torch.cuda.current_stream(self._ranks.device).wait_stream(self._side)


def _work(wake: int, tasks: deque[Callable[[], float]], seconds: queue.SimpleQueue[float]) -> None:
    """Runs tasks in the communication thread, one for each byte of a pipe, until its other end is closed."""
    try:
        while os.read(wake, 1):
            try:
                task = tasks.popleft()
            except IndexError:
                # `close` dropped it.
                continue
            seconds.put(task())
    finally:
        os.close(wake)


def _span(name: str) -> contextlib.AbstractContextManager[object]:
    """Names what follows in a profiler's trace."""
    # Where nobody traces, torch's span costs 0.13 ms: its memory has left the caches since the last bucket.
    return record_function(name) if profiler._is_profiler_enabled else contextlib.nullcontext()
