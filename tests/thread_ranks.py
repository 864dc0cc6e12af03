"""Ranks as threads of one process: groups that pass tensors through memory and count what is sent.

For questions about sums, where five processes would cost seconds: any world, and no port. What runs on them
must not draw from torch's generator, which threads share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from foldfeed.trainer.groups.ranks import Ranks

Result = TypeVar("Result")


class Board:
    """Where the ranks of one group lay what they send."""

    def __init__(self, world: int, timeout_s: float = 30.0) -> None:
        self.barrier = threading.Barrier(world, timeout=timeout_s)
        self.rows: list[Any] = [None] * world
        self.lock = threading.Lock()
        self.parts: dict[tuple[int, ...], Board] = {}

    def part(self, members: tuple[int, ...]) -> Board:
        with self.lock:
            return self.parts.setdefault(members, Board(len(members)))

    def swap(self, rank: int, row: Any) -> list[Any]:
        self.rows[rank] = row
        self.barrier.wait()
        rows = list(self.rows)
        self.barrier.wait()
        return rows


class ThreadGroup:
    """A group of `ranks.Group`'s shape for one rank."""

    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.bytes_sent = board, rank, 0

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        runs = [run.clone() for run in sent.split(sent_sizes)]
        self.bytes_sent += sum(run.nbytes for rank, run in enumerate(runs) if rank != self.rank)
        rows = self.board.swap(self.rank, runs)
        received.copy_(torch.cat([row[self.rank] for row in rows]))

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> Callable[[], None]:
        self.bytes_sent += mine.nbytes * (len(self.board.rows) - 1)
        gathered.copy_(torch.cat(self.board.swap(self.rank, mine.clone())))
        return lambda: None

    def part(self, members: Sequence[int]) -> ThreadGroup:
        board = self.board.part(tuple(members))
        return ThreadGroup(board, list(members).index(self.rank))

    def abort(self, reason: str) -> None:
        self.board.barrier.abort()

    def close(self) -> None:
        pass


def on_threads(world: int, work: Callable[[Ranks], Result], timeout_s: float = 30.0) -> list[Result]:
    """Runs ``work`` on every rank at once; returns the results in rank order.

    Args:
      world: number of ranks.
      work: of a rank.
      timeout_s: after which a collective fails.
    """
    boards = [Board(world, timeout_s) for _ in range(3)]
    cpu = torch.device("cpu")
    ranks = []
    for rank in range(world):
        scatter, gather, control = (ThreadGroup(board, rank) for board in boards)
        ranks.append(
            Ranks(rank=rank, world=world, device=cpu, scatter=scatter, gather=gather, control=control)
        )

    def alone(ranks: Ranks) -> Result:
        # A setting of each thread; with more than one the order of sums inside a kernel changes.
        torch.set_num_threads(1)
        return work(ranks)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(alone, ranks))
