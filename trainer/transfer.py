"""What the ranks of a new generation need besides its wires: one state, and communicators for GPUs.

Does not own: who is a member, when ranks meet (elastic_rank.py).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from foldfeed.trainer.errors import CommunicationError, TrainerConfigError
from foldfeed.trainer.loop import Trainer
from foldfeed.trainer.ranks import Group, Ranks, TorchGroup
from foldfeed.trainer.snapshot import extend_checksum
from foldfeed.trainer.topology import pair_up
from foldfeed.trainer.wire import Channel, raw

# Of a buffer, between two looks at the checksum: 8 MiB, which a socket's buffers hold about.
PART_NUMEL = 1 << 21


def check_settings(rows: Sequence[Mapping[str, Any]], ranks: Ranks) -> None:
    """Checks that all ranks have the settings of the first one with a state.

    Args:
      rows: of every rank: ``settings``, by name, and ``small``, whose step is -1 without a state.
      ranks: the group.
    Raises:
      TrainerConfigError: on a rank that has others.
      CommunicationError: on those that meet again without it.
    """
    right = max(rows, key=lambda row: int(row["small"]["step"] >= 0))["settings"]
    odd = [rank for rank, row in enumerate(rows) if row["settings"] != right]
    if ranks.rank in odd:
        mine = rows[ranks.rank]["settings"]
        differ = [name for name, value in mine.items() if right.get(name) != value]
        raise TrainerConfigError(
            f"this rank cannot join: its {', '.join(differ)} differ from the run's; equal bits "
            "need equal settings, store, software and processors"
        )
    if odd:
        raise CommunicationError(ranks.rank, "the meeting", f"ranks {odd} have other settings.")


def transfer(
    channel: Channel,
    trainer: Trainer,
    states: Sequence[Mapping[str, int]],
    places: Sequence[Sequence[str]],
    ranks: Ranks,
) -> int:
    """Brings every rank to the furthest one's step; returns a rank that had it.

    Each rank that is behind gets parameters and moments from the nearest one that is not, all at once over
    different connections: raw bytes, then their crc32c, taken from the giver's memory. Both sides sum a part
    up while the next one is on its way. A rank that has a state keeps it until all was checked, so a giver
    that dies leaves it as it was.

    Raises:
      CommunicationError: a peer died, or the bytes that came are not those that were sent.
    """
    steps = [state["step"] for state in states]
    givers = [rank for rank, step in enumerate(steps) if step == max(steps)]
    takers = [rank for rank, step in enumerate(steps) if step < max(steps)]
    pairs = pair_up(takers, givers, places)
    mine = [taker for taker, giver in pairs.items() if giver == ranks.rank]
    with ranks.guard("the transfer of the state"):
        if mine:
            _move(channel, trainer.host_buffers(), sends=mine)
        if ranks.rank in pairs:
            giver = pairs[ranks.rank]
            fresh = trainer.host_buffers()
            if steps[ranks.rank] >= 0:
                fresh = {name: torch.empty_like(buffer) for name, buffer in fresh.items()}
            else:
                # Neither the initial state any more, should this fail.
                trainer.step = -1
            if not _move(channel, fresh, receives=giver):
                raise CommunicationError(
                    ranks.rank, "the transfer of the state", f"crc32c of rank {giver}'s state differs."
                )
            trainer.take_over(fresh, states[giver])
            print(f"rank {ranks.rank} got the state of step {trainer.step} from rank {giver}", flush=True)
    return givers[0]


def _move(
    channel: Channel, buffers: Mapping[str, torch.Tensor], *, sends: Sequence[int] = (), receives: int = -1
) -> bool:
    """Sends buffers to some ranks, or receives them from one; returns whether the checksums agree."""
    sums = []
    for buffer in buffers.values():
        crc = 0
        for part in buffer.split(PART_NUMEL):
            if not sends:
                channel.exchange({}, {receives: [raw(part)]})
            crc = extend_checksum(crc, part)
            if sends:
                channel.exchange({taker: [raw(part)] for taker in sends}, {})
        sums.append(crc.to_bytes(4, "little"))
    mine = b"".join(sums)
    if sends:
        channel.exchange({taker: [memoryview(mine)] for taker in sends}, {})
        return True
    theirs = bytearray(len(mine))
    channel.exchange({}, {receives: [memoryview(theirs)]})
    return bytes(theirs) == mine


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
