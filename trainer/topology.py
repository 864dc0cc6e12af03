"""Where a rank stands among switches and regions: who gives a state to whom follows from it.

A place is a list of names from the widest to the narrowest, such as region, switch, node:

    FOLDFEED_PLACE=eu/switch3/node17      said by whoever starts the process; or
    FOLDFEED_TOPOLOGY=FILE                lines "HOST eu/switch3/node17", # begins a comment; or
    SLURM_TOPOLOGY_ADDR=s0.s3.node17      set by Slurm's topology plugin; without any of them, the host alone

Does not own: which ranks sum inside a node first; torchrun's LOCAL_WORLD_SIZE says it (transports.py).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from foldfeed.trainer.errors import TrainerConfigError

Place = tuple[str, ...]


def own_place(environment: Mapping[str, str] = os.environ, host: str = "") -> Place:
    """Returns where this process stands, from the widest name to the narrowest.

    Args:
      environment: variables as in the module docstring.
      host: its name; the machine's when empty.
    Raises:
      TrainerConfigError: the file cannot be read, or names no place for the host.
    """
    host = host or socket.gethostname()
    if text := environment.get("FOLDFEED_PLACE"):
        return tuple(text.strip("/").split("/"))
    if file := environment.get("FOLDFEED_TOPOLOGY"):
        return _place_in(Path(file), host)
    if text := environment.get("SLURM_TOPOLOGY_ADDR"):
        return tuple(text.split("."))
    return (host,)


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
