"""What the ranks of a new generation need besides its wires: one state, and communicators for GPUs.

Does not own: who is a member, when ranks meet (elastic_rank.py).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from foldfeed.trainer.errors import CommunicationError
from foldfeed.trainer.loop import Trainer
from foldfeed.trainer.ranks import Group, Ranks, TorchGroup
from foldfeed.trainer.snapshot import checksum
from foldfeed.trainer.wire import Channel, raw


def transfer(channel: Channel, trainer: Trainer, states: Sequence[Mapping[str, int]], ranks: Ranks) -> int:
    """Brings every rank to the furthest one's step; returns a rank that had it.

    Each rank that is behind gets parameters and moments from one that is not, all at once over different
    connections: raw bytes, then their crc32c, taken from the giver's memory. They are checked before the live
    buffers are touched, so a giver that dies leaves the taker as it was.

    Raises:
      CommunicationError: a peer died, or the bytes that came are not those that were sent.
    """
    steps = [state["step"] for state in states]
    givers = [rank for rank, step in enumerate(steps) if step == max(steps)]
    takers = [rank for rank, step in enumerate(steps) if step < max(steps)]
    pairs = {taker: givers[number % len(givers)] for number, taker in enumerate(takers)}
    mine = [taker for taker, giver in pairs.items() if giver == ranks.rank]
    names = tuple(trainer.state())
    with ranks.guard("the transfer of the state"):
        if mine:
            buffers = trainer.host_buffers()
            sums = b"".join(checksum(buffers[name]).to_bytes(4, "little") for name in names)
            views = [*(raw(buffers[name]) for name in names), memoryview(sums)]
            channel.exchange(dict.fromkeys(mine, views), {})
        if ranks.rank in pairs:
            giver = pairs[ranks.rank]
            fresh = {name: torch.empty(trainer.flat.numel, dtype=torch.float32) for name in names}
            sent = bytearray(4 * len(names))
            channel.exchange({}, {giver: [*(raw(fresh[name]) for name in names), memoryview(sent)]})
            if bytes(sent) != b"".join(checksum(fresh[name]).to_bytes(4, "little") for name in names):
                raise CommunicationError(
                    ranks.rank, "the transfer of the state", f"crc32c of rank {giver}'s state differs."
                )
            trainer.take_over(fresh, states[giver])
    return givers[0]


def nccl_groups(ranks: Ranks, host: str, timeout_s: float) -> tuple[Group, Group]:
    """Returns new communicators for gradients on GPUs: one per phase of the reducer.

    The store through which NCCL's ranks find each other lives on the first rank, for this generation alone.
    Not run where this was written: it had no two GPUs (a test marked ``cuda`` waits for them).
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    store = None
    if ranks.is_first:
        store = dist.TCPStore(host, 0, ranks.world, is_master=True, timeout=timeout, wait_for_workers=False)
    address, port = ranks.gather_json([host, store.port if store else 0], "the meeting of the devices")[0]
    with ranks.guard("the meeting of the devices"):
        store = store or dist.TCPStore(address, port, ranks.world, is_master=False, timeout=timeout)
        scatter, gather = (
            TorchGroup(dist.ProcessGroupNCCL(dist.PrefixStore(name, store), ranks.rank, ranks.world, options))
            for name in ("scatter", "gather")
        )
    return scatter, gather
