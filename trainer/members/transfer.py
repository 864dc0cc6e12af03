"""What ranks of a new generation need besides its wires: settings, a state, shares of a step, communicators.

Does not own: who is a member, when ranks meet (rank.py).
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from foldfeed.trainer.errors import CommunicationError, TrainerConfigError
from foldfeed.trainer.gradients.dyadic import Block, Division, repaired
from foldfeed.trainer.groups import nccl
from foldfeed.trainer.groups.ranks import Group, Ranks, TorchGroup, speaker
from foldfeed.trainer.groups.topology import own_place, pair_up
from foldfeed.trainer.groups.wire import MeshGroup, raw
from foldfeed.trainer.state.snapshot import extend_checksum
from foldfeed.trainer.training.loop import Trainer

# Of a buffer, between two looks at the checksum: 8 MiB, which a socket's buffers hold about.
PART_NUMEL = 1 << 21


def settings_of(header: Mapping[str, Any], deterministic: bool) -> dict[str, Any]:
    """Returns what of a run's header must be equal on all ranks."""
    names = ["config_digest", "layout_hash", "store_fingerprint", *(["environment"] if deterministic else [])]
    return {name: header[name] for name in names}


def require_equal_settings(rows: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Returns if all ranks that meet have the settings of the first one with a state.

    Args:
      rows: what every rank said, in order of rank: its ``settings`` and, in ``small``, its ``step``.
      rank: this one.
    Raises:
      TrainerConfigError: this rank's are others.
      CommunicationError: another rank's are; the rest meets again without it.
    """
    right = max(rows, key=lambda row: int(row["small"]["step"] >= 0))["settings"]
    odd = [other for other, row in enumerate(rows) if row["settings"] != right]
    if rank in odd:
        differ = [name for name, value in rows[rank]["settings"].items() if right.get(name) != value]
        raise TrainerConfigError(
            f"this rank cannot join: its {', '.join(differ)} differ from the run's; equal bits need equal "
            "settings, store, software and processors"
        )
    if odd:
        raise CommunicationError(rank, "the meeting", f"ranks {odd} have other settings.")


def divide_step(rows: Sequence[Mapping[str, Any]], num_shards: int) -> tuple[Division, dict[str, int]]:
    """Returns who computes what of the next step, and how much of a broken one is there; {} if none broke.

    Args:
      rows: what every rank said, in order of rank: in ``small`` its ``step``, and the blocks that it ``kept``
        of the step after it, None between steps.
      num_shards: V.
    """
    step = max(row["small"]["step"] for row in rows)
    # A rank that is behind gets the state after the step that its blocks belong to.
    found = [row["kept"] if row["small"]["step"] == step else None for row in rows]
    division = repaired([[Block(*block) for block in blocks or []] for blocks in found], num_shards)
    if all(blocks is None for blocks in found):
        return division, {}
    again = sum(map(len, division.shards))
    return division, {"shards_kept": num_shards - again, "shards_again": again}


def transfer(
    group: MeshGroup,
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
            _move(group, trainer.host_buffers(), sends=mine)
        if ranks.rank in pairs:
            giver = pairs[ranks.rank]
            fresh = trainer.host_buffers()
            if steps[ranks.rank] >= 0:
                fresh = {name: torch.empty_like(buffer) for name, buffer in fresh.items()}
            else:
                # Neither the initial state any more, should this fail.
                trainer.step = -1
            if not _move(group, fresh, receives=[giver]):
                raise CommunicationError(
                    ranks.rank, "the transfer of the state", f"crc32c of rank {giver}'s state differs."
                )
            trainer.take_over(fresh, states[giver])
            print(f"rank {ranks.rank} got the state of step {trainer.step} from rank {giver}", flush=True)
    return givers[0]


def _move(
    group: MeshGroup,
    buffers: Mapping[str, torch.Tensor],
    *,
    sends: Sequence[int] = (),
    receives: Sequence[int] = (),
) -> bool:
    """Sends buffers to some ranks, or receives them from one; returns whether the checksums agree."""

    def move(view: memoryview) -> None:
        group.exchange(dict.fromkeys(sends, view), dict.fromkeys(receives, view))

    mine = b""
    for buffer in buffers.values():
        crc = 0
        for part in buffer.split(PART_NUMEL):
            move(raw(part))
            crc = extend_checksum(crc, part)
        mine += crc.to_bytes(4, "little")
    theirs = bytearray(mine if sends else len(mine))
    move(memoryview(theirs))
    return theirs == mine


def nccl_groups(ranks: Ranks, host: str, timeout_s: float, preset: str) -> tuple[Group, Group]:
    """Returns new communicators for gradients on GPUs: one per phase of the reducer.

    A preset of NCCL holds for the life of a process, so ranks that come take that of those who are there.

    The store through which NCCL's ranks find each other lives on the first rank, for this generation alone.
    Not run where this was written: it had no two GPUs (a test marked ``cuda`` waits for them).
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    store = None
    if ranks.is_first:
        store = dist.TCPStore(host, 0, ranks.world, is_master=True, timeout=timeout, wait_for_workers=False)
    mine = [[host, store.port if store else 0], own_place(), nccl.has_infiniband(), nccl.applied()]
    rows = ranks.gather_json(mine, "the meeting of the devices")
    several, infiniband = len({tuple(row[1]) for row in rows}) > 1, all(row[2] for row in rows)
    named = next((row[3] for row in rows if row[3]), "")
    name = named or nccl.choose(preset, several_nodes=several, infiniband=infiniband)
    nccl.apply(name, speaker(ranks.is_first), pins=preset != "auto")
    address, port = rows[0][0]
    with ranks.guard("the meeting of the devices"):
        store = store or dist.TCPStore(address, port, ranks.world, is_master=False, timeout=timeout)

    def made(name: str, members: Sequence[int]) -> Any:
        own = dist.PrefixStore(f"{name}/{members}", store)
        return dist.ProcessGroupNCCL(own, members.index(ranks.rank), len(members), options)

    def group(name: str) -> Group:
        with ranks.guard("the meeting of the devices"):
            return TorchGroup(made(name, range(ranks.world)), functools.partial(made, name))

    return group("scatter"), group("gather")
