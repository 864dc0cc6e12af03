"""The tree's exchange over own sockets: several buckets under way at once, in one thread that polls.

The messages and sums of exchange.py, without its turns: there a rank waits for a whole phase of a bucket
before it begins another, and the link stands still while ranks copy and add. Here every rank sends its part
of a bucket as soon as it is there, adds what has come from all, and sends the sum, in whatever order messages
come; the bits are those of the tree. A message goes from and comes to the place where it is used: what is
received of a finished bucket is received into the output.

On a connection the messages of each phase come in the order of buckets, so a number says which one it is. A
few buckets are under way, each in a slot: the next one's part goes to a peer once the sum of the one that had
its slot has come from there, which then has room. Sums never wait for room, so nobody waits in a circle.

Nothing is read that does not belong to what is under way, so other collectives may use the connections
between two `drain`. Invariant: one thread, the caller's, moves and adds everything.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from foldfeed.trainer.errors import WireError
from foldfeed.trainer.gradients.buckets import Bucket
from foldfeed.trainer.gradients.dyadic import Block, blocks_of_ranks
from foldfeed.trainer.gradients.exchange import Exchange, TreeExchange, sum_rows
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.groups.wire import HANGUP, HEADER, MeshGroup, advance, raw

# A rank that the system lets wait for tens of milliseconds shall not let the link run dry.
WINDOW_BYTES, LEAST_SLOTS, MOST_SLOTS = 16 << 20, 2, 32
# What is awaited of a message before the thread wakes: nothing can be added before all of it is there.
WAKE_BYTES = 1 << 20


class _Peer:
    """What goes over the connection to one rank. ``sent`` and ``come`` count whole messages: parts, sums."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank, self.connection = rank, connection
        self.outgoing: deque[tuple[int, list[memoryview]]] = deque()
        self.waiting: deque[list[memoryview]] = deque()
        self.header = memoryview(bytearray(HEADER.size))
        self.incoming, self.phase = [self.header], -1
        self.sent, self.come = [0, 0], [0, 0]
        self.events = -1
        self.awaited = 1

    def queue(self, number: int, phase: int, views: list[memoryview]) -> None:
        """Puts a message behind those that wait to be sent."""
        length = sum(map(len, views))
        # Twice the number of the bucket in this exchange, and one more where it is a sum.
        header = memoryview(HEADER.pack(2 * number + phase, length))
        self.outgoing.append((phase, [header, *filter(len, views)]))

    def wants(self, launched: int) -> int:
        """Returns how many messages of what is under way have not come."""
        parts, sums = self.come
        return max(0, launched - parts) + launched - sums

    def wake_at(self, num_bytes: int) -> None:
        """Lets the poll wake for so many bytes, or a part of them that is worth it."""
        awaited = min(WAKE_BYTES, num_bytes)
        if awaited != self.awaited:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, awaited)
            self.awaited = awaited


class StreamExchange:
    """`exchange.TreeExchange` on the CPU over the connections of a `wire.MeshGroup`."""

    def __init__(
        self,
        ranks: Ranks,
        num_shards: int,
        max_numel: int,
        output: torch.Tensor,
        wire: torch.dtype = torch.float32,
    ) -> None:
        """Allocates the slots; the arguments are those of `exchange.TreeExchange`."""
        assert isinstance(ranks.scatter, MeshGroup), "own sockets"
        self._ranks, self._num_shards, self._output, self._wire = ranks, num_shards, output, wire
        self._channel = channel = ranks.scatter
        self._peers = [
            _Peer(rank, channel.connection(rank)) for rank in range(ranks.world) if rank != ranks.rank
        ]
        self._by_number = {peer.connection.fileno(): peer for peer in self._peers}
        self._poller = select.poll()
        self._chunk = -(-max_numel // ranks.world)
        fitting = WINDOW_BYTES // (output.itemsize * max_numel)
        self._slots = max(LEAST_SLOTS, min(MOST_SLOTS, fitting))
        # Sums that were rounded wait here for the output; others are received into it.
        self._rounds = wire is not output.dtype
        self._sums = [self._room(ranks.world * self._rounds) for _ in range(self._slots)]
        self._raw_output, self._values_output = raw(output), output if self._rounds else output.numpy()
        self._buckets: deque[Bucket] = deque()
        # By number and rank, the bytes of parts that came before this rank had that bucket.
        self._early: dict[tuple[int, int], int] = {}
        self._launched = self._summed = self._done = 0
        self.divide(blocks_of_ranks(num_shards, ranks.world))

    def _room(self, chunks: int) -> torch.Tensor:
        return torch.zeros(chunks * self._chunk, dtype=self._wire)

    def _values(self, tensor: torch.Tensor) -> Any:
        """Returns what a tensor is sliced, copied and added as."""
        # A call of torch takes 20 to 50 us where its code has left the caches, with the GIL; numpy's a few.
        return tensor if self._rounds else tensor.numpy()

    def divide(self, blocks: Sequence[Sequence[Block]]) -> None:
        """Allocates room for other blocks of the ranks, see `exchange.Exchange.divide`."""
        self._counts = [len(mine) for mine in blocks]
        self._before = [sum(self._counts[:rank]) for rank in range(len(blocks))]
        self._all_blocks = [block for mine in blocks for block in mine]
        self._in_order = self._all_blocks == sorted(self._all_blocks)
        sent, rows = self._ranks.world * self._counts[self._ranks.rank], len(self._all_blocks)
        rooms = [(self._room(sent), self._room(rows)) for _ in range(self._slots)]
        self._raw_send, self._raw_rows = [raw(room) for room, _ in rooms], [raw(room) for _, room in rooms]
        self._send = [self._values(room) for room, _ in rooms]
        self._rows = [self._values(room) for _, room in rooms]

    def reduce(self, bucket: Bucket, blocks: Sequence[torch.Tensor]) -> None:
        """Begins one bucket, see `exchange.Exchange.reduce`; waits for a slot."""
        with self._ranks.guard(f"the exchange of gradient bucket {bucket.index}"):
            self._pump(lambda: self._launched - self._done < self._slots)
            number, self._launched = self._launched, self._launched + 1
            self._buckets.append(bucket)
            slot, numel, item = number % self._slots, bucket.numel, self._wire.itemsize
            start, stop = self._share(bucket, self._ranks.rank)
            rows, first = self._rows_of(number, bucket), self._before[self._ranks.rank]
            for index, block in enumerate(blocks):
                values = self._values(block)
                self._send[slot][index * numel : (index + 1) * numel] = values
                rows[first + index] = values[start:stop]
            for peer in self._peers:
                expected = self._counts[peer.rank] * (stop - start) * item
                if (length := self._early.pop((number, peer.rank), expected)) != expected:
                    raise self._odd(peer, number, 0, length, expected)
                a, b = self._share(bucket, peer.rank)
                offsets = range(0, len(blocks) * numel, numel) if b > a else ()
                sent = self._raw_send[slot]
                peer.waiting.append([sent[(at + a) * item : (at + b) * item] for at in offsets])
                self._await(peer)
            self._step()

    def progress(self, wake: int) -> None:
        """Goes on until nothing is under way or the descriptor is readable."""
        self._finish(wake)

    def drain(self) -> None:
        """Finishes what is under way."""
        self._finish(-1)

    def _finish(self, wake: int) -> None:
        if self._buckets:
            with self._ranks.guard(f"the exchange of gradient bucket {self._buckets[0].index}"):
                self._pump(lambda: not self._buckets, wake)

    def _share(self, bucket: Bucket, rank: int) -> tuple[int, int]:
        """Returns from where to where a rank adds the elements of a bucket."""
        chunk = -(-bucket.numel // self._ranks.world)
        return min(rank * chunk, bucket.numel), min((rank + 1) * chunk, bucket.numel)

    def _rows_of(self, number: int, bucket: Bucket) -> Any:
        """Returns the room for all ranks' blocks of this rank's share, a row each."""
        start, stop = self._share(bucket, self._ranks.rank)
        width, count = stop - start, len(self._all_blocks)
        return self._rows[number % self._slots][: count * width].reshape(count, width)

    def _sum_of(self, number: int, bucket: Bucket) -> Any:
        """Returns where the sum of a bucket comes together."""
        if self._rounds:
            return self._sums[number % self._slots][: bucket.numel]
        return self._values_output[bucket.start : bucket.stop]

    def _raw_sum(self, number: int, bucket: Bucket, rank: int) -> memoryview:
        """Returns the bytes of a rank's share of it."""
        start, stop = self._share(bucket, rank)
        if self._rounds:
            whole = raw(self._sums[number % self._slots])
        else:
            whole, start, stop = self._raw_output, bucket.start + start, bucket.start + stop
        return whole[start * self._wire.itemsize : stop * self._wire.itemsize]

    def _step(self) -> None:
        """Adds, sends and finishes whatever can be."""
        mine = self._ranks.rank
        while self._summed < self._launched and min(p.come[0] for p in self._peers) > self._summed:
            number, self._summed = self._summed, self._summed + 1
            bucket = self._buckets[number - self._done]
            start, stop = self._share(bucket, mine)
            # What overflows is for the step to find, as in torch.
            with np.errstate(all="ignore"):
                self._sum_of(number, bucket)[start:stop] = sum_rows(
                    self._rows_of(number, bucket), self._all_blocks, self._num_shards, in_order=self._in_order
                )
            view = self._raw_sum(number, bucket, mine)
            for peer in self._peers:
                peer.queue(number, 1, [view])
        for peer in self._peers:
            if peer.waiting or peer.outgoing:
                self._send_to(peer)
        while self._buckets and self._done < min(min(p.come[1], p.sent[1]) for p in self._peers):
            bucket = self._buckets.popleft()
            if self._rounds:
                self._output[bucket.start : bucket.stop].copy_(self._sum_of(self._done, bucket))
            self._done += 1

    def _send_to(self, peer: _Peer) -> None:
        """Sends what the peer has room for and the socket takes."""
        while True:
            while peer.waiting and self._launched - len(peer.waiting) < peer.come[1] + self._slots:
                peer.queue(self._launched - len(peer.waiting), 0, peer.waiting.popleft())
            if not peer.outgoing:
                return
            # Several messages at once; 16 views: below the least limit of an iovec.
            views = [view for _, message in peer.outgoing for view in message][:16]
            try:
                moved = peer.connection.sendmsg(views)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._lost(peer, error) from error
            while peer.outgoing and moved >= (length := sum(map(len, peer.outgoing[0][1]))):
                moved -= length
                peer.sent[peer.outgoing.popleft()[0]] += 1
            if moved:
                advance(peer.outgoing[0][1], moved)
                return

    def _receive_from(self, peer: _Peer) -> bool:
        """Receives what is there of what must come, and nothing of what a next collective sends.

        Returns whether anything was.
        """
        moved = False
        while (wanted := peer.wants(self._launched)) > 0:
            body = peer.phase >= 0
            if body and len(peer.incoming) == 1 and wanted > (peer.come[peer.phase] < self._launched):
                # The header of the next one.
                peer.incoming.append(peer.header)
            try:
                num_bytes = peer.connection.recvmsg_into(peer.incoming)[0]
            except BlockingIOError:
                break
            except OSError as error:
                raise self._lost(peer, error) from error
            if not num_bytes:
                raise self._lost(peer, "closed by the other side")
            moved = True
            left = len(peer.incoming[0])
            if num_bytes < left:
                peer.incoming[0] = peer.incoming[0][num_bytes:]
                break
            if body:
                self._came(peer)
                peer.incoming[0] = peer.header[num_bytes - left :]
                if len(peer.incoming[0]):
                    break
            self._announced(peer)
        self._await(peer)
        return moved

    def _await(self, peer: _Peer) -> None:
        """Sets when the poll wakes: nothing can be done before a message that must come is whole."""
        if peer.phase >= 0:
            peer.wake_at(len(peer.incoming[0]))
            return
        # Either may be the next, and parts of buckets that are not launched here may be before them.
        lengths = [
            self._length(peer, phase, self._buckets[number - self._done])
            for phase, number in enumerate(peer.come)
            if number < self._launched
        ]
        peer.wake_at(len(peer.incoming[0]) + min(lengths) if lengths else 1)

    def _length(self, peer: _Peer, phase: int, bucket: Bucket) -> int:
        """Returns the bytes of a message from a rank."""
        start, stop = self._share(bucket, peer.rank if phase else self._ranks.rank)
        return (stop - start) * self._wire.itemsize * (1 if phase else self._counts[peer.rank])

    def _came(self, peer: _Peer) -> None:
        peer.come[peer.phase] += 1
        peer.incoming, peer.phase = [peer.header], -1

    def _announced(self, peer: _Peer) -> None:
        """Finds the place of the message whose header has come."""
        name, length = HEADER.unpack(peer.header)
        number, phase = divmod(name, 2)
        expected, view, count = -1, memoryview(b""), self._counts[peer.rank]
        if number == peer.come[phase] < self._launched:
            bucket = self._buckets[number - self._done]
            if phase:
                view = self._raw_sum(number, bucket, peer.rank)
            else:
                start, stop = self._share(bucket, self._ranks.rank)
                view = self._row_bytes(number, peer.rank, (stop - start) * self._wire.itemsize)
            expected = len(view)
        elif number == peer.come[0] < self._summed + self._slots and not phase:
            # The peer is ahead. Its rows stand where those of a bucket of that many bytes do.
            width = length // count if count else 0
            if width <= self._chunk * self._wire.itemsize:
                view = self._row_bytes(number, peer.rank, width)
                expected = self._early[number, peer.rank] = len(view)
        if length != expected:
            raise self._odd(peer, number, phase, length, expected)
        peer.phase, peer.incoming = phase, [view]
        if not length:
            self._came(peer)

    def _row_bytes(self, number: int, rank: int, width: int) -> memoryview:
        """Returns the room for a rank's blocks of this rank's share."""
        start = self._before[rank] * width
        return self._raw_rows[number % self._slots][start : start + self._counts[rank] * width]

    def _odd(self, peer: _Peer, number: int, phase: int, length: int, expected: int) -> WireError:
        return WireError(
            f"rank {peer.rank}: {length} bytes for phase {phase + 1} of exchange {number}; exchange "
            f"{peer.come[phase]} with {expected} bytes (-1: none) belongs there"
        )

    def _lost(self, peer: _Peer, reason: object) -> WireError:
        return WireError(self._channel.aborted or f"rank {peer.rank}: {reason}")

    def _pump(self, enough: Callable[[], bool], wake: int = -1) -> None:
        """Moves bytes until there is enough of it, or the descriptor is readable."""
        self._step()
        timeout_s = self._channel.timeout_s
        deadline = time.monotonic() + timeout_s
        if wake >= 0:
            self._poller.register(wake, select.POLLIN)
        while not enough():
            if self._channel.aborted:
                raise WireError(self._channel.aborted)
            for number, peer in self._by_number.items():
                events = (select.POLLIN * (peer.wants(self._launched) > 0)) | (
                    select.POLLOUT * bool(peer.outgoing)
                )
                if events != peer.events:
                    # Who is done may still give the generation up; Linux alone tells.
                    self._poller.register(number, events or HANGUP)
                    peer.events = events
            ready = dict(self._poller.poll(1e3 * max(0.0, deadline - time.monotonic())))
            if not ready and time.monotonic() > deadline:
                silent = sorted(p.rank for p in self._peers if p.wants(self._launched) or p.outgoing)
                # Less than is awaited may have come.
                if any(self._receive_from(p) for p in self._peers if p.wants(self._launched)):
                    deadline = time.monotonic() + timeout_s
                    continue
                raise WireError(f"ranks {silent} sent and took nothing for {timeout_s:g} s")
            woken = ready.pop(wake, 0)
            for number, events in ready.items():
                if not events & ~select.POLLOUT:
                    continue
                peer = self._by_number[number]
                if not peer.wants(self._launched):
                    raise self._lost(peer, "closed by the other side")
                self._receive_from(peer)
            deadline = time.monotonic() + timeout_s
            self._step()
            if woken:
                break
        if wake >= 0:
            self._poller.unregister(wake)


def tree_exchange(
    ranks: Ranks,
    num_shards: int,
    max_numel: int,
    output: torch.Tensor,
    wire: torch.dtype = torch.float32,
) -> Exchange:
    """Returns the usual exchange: over own sockets where ranks have them, else the backend's."""
    own = ranks.world > 1 and isinstance(ranks.scatter, MeshGroup) and output.device.type == "cpu"
    return (StreamExchange if own else TreeExchange)(ranks, num_shards, max_numel, output, wire)
