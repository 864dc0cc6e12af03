"""Where a rank stands among switches and regions.

From it follow the numbers of ranks (neighbours in place are neighbours in number, and so hold neighbouring
virtual shards), which of them sum inside a node first (two_level.py), and who gives a state to whom.

A place is a list of names from the widest to the narrowest, such as region, switch, node:

    FOLDFEED_PLACE=eu/switch3/node17      said by whoever starts the process; or
    FOLDFEED_TOPOLOGY=FILE                lines "HOST eu/switch3/node17", # begins a comment; or
    SLURM_TOPOLOGY_ADDR=s0.s3.node17      set by Slurm's topology plugin

Without any of them an elastic run takes the host, and any other torchrun's LOCAL_WORLD_SIZE.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from foldfeed.trainer.errors import TrainerConfigError

Place = tuple[str, ...]


def own_place(environment: Mapping[str, str] = os.environ, host: str = "") -> Place:
    """Returns where this process stands: `told_place`, or the host alone."""
    return told_place(environment, host) or (host or socket.gethostname(),)


def told_place(environment: Mapping[str, str] = os.environ, host: str = "") -> Place:
    """Returns where this process was told that it stands, widest name first; empty if it was not.

    Args:
      environment: variables as in the module docstring.
      host: its name; the machine's when empty.
    Raises:
      TrainerConfigError: the file cannot be read, or names no place for the host.
    """
    if text := environment.get("FOLDFEED_PLACE"):
        return tuple(text.strip("/").split("/"))
    if file := environment.get("FOLDFEED_TOPOLOGY"):
        return _place_in(Path(file), host or socket.gethostname())
    if text := environment.get("SLURM_TOPOLOGY_ADDR"):
        return tuple(text.split("."))
    return ()


def _place_in(path: Path, host: str) -> Place:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise TrainerConfigError(f"FOLDFEED_TOPOLOGY {path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if len(words) not in (0, 2):
            raise TrainerConfigError(f"{path}, line {number}: {line!r} is not HOST and PLACE.")
        if words and words[0] == host:
            return tuple(words[1].strip("/").split("/"))
    raise TrainerConfigError(f"{path} has no line for {host}; add one, or unset FOLDFEED_TOPOLOGY.")


def by_place(places: Sequence[Sequence[str]]) -> list[int]:
    """Returns all ranks in an order in which those of a node, a switch, a region are neighbours.

    Of two nodes that whose first rank comes first goes first, so rank 0 stays the first one, and who was
    neighbours stays it when ranks are taken out. ``by_place([["a"], ["b"], ["a"]])`` is ``[0, 2, 1]``.
    """
    first: dict[Place, int] = {}
    keys = []
    for rank, place in enumerate(places):
        # A name more, so that a place that ends where another goes on is a neighbour like any other.
        whole = (*place, "")
        prefixes = [whole[:depth] for depth in range(1, len(whole) + 1)]
        keys.append([first.setdefault(prefix, rank) for prefix in prefixes])
    return sorted(range(len(places)), key=lambda rank: (keys[rank], rank))


def nodes_of(places: Sequence[Sequence[str]], ranks_per_node: Sequence[int]) -> list[list[int]]:
    """Returns the ranks of each node, in order of their first ones.

    Args:
      places: of all ranks, as told; empty where nothing was.
      ranks_per_node: what each rank believes; counts where no place was told, and then neighbours in number
        share a node. Each rank is a node of its own when these beliefs do not fit together.
    Raises:
      TrainerConfigError: some ranks know their place and others do not.
    """
    lost = [rank for rank, place in enumerate(places) if not place]
    if lost and len(lost) < len(places):
        raise TrainerConfigError(
            f"ranks {lost} were told no place and the others were; set FOLDFEED_PLACE or FOLDFEED_TOPOLOGY "
            "for all of them, or for none."
        )
    nodes: dict[Place, list[int]] = {}
    for rank, place in enumerate(places):
        nodes.setdefault(tuple(place), []).append(rank)
    if not lost:
        return list(nodes.values())
    found, start = [], 0
    while start < len(places):
        found.append(list(range(start, start + max(1, ranks_per_node[start]))))
        start = found[-1][-1] + 1
    agree = start == len(places) and all(len(node) == ranks_per_node[r] for node in found for r in node)
    return found if agree else [[rank] for rank in range(len(places))]


def pair_up(takers: Sequence[int], givers: Sequence[int], places: Sequence[Sequence[str]]) -> dict[int, int]:
    """Returns a giver for each taker: the nearest one, of equally near ones that with the fewest takers.

    Args:
      takers: ranks that need something.
      givers: ranks that have it; at least one.
      places: of all ranks.
    """
    found: dict[int, int] = {}
    load = dict.fromkeys(givers, 0)
    for taker in takers:
        found[taker] = min(givers, key=lambda g: (-_shared(places[taker], places[g]), load[g], g))
        load[found[taker]] += 1
    return found


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    differs = [mine != theirs for mine, theirs in zip(one, other, strict=False)]
    return differs.index(True) if True in differs else len(differs)
