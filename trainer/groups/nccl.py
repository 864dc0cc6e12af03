"""What NCCL is told about the links: presets of its variables by topology, and the record of what was used.

NCCL reads its environment once in a process, so a preset is applied before the first group is made and stays.
What the user (or the cluster) has set already is never overridden. ``auto`` leaves algorithm and protocol to
NCCL, as its manual advises, unless the run's sums are made in NCCL's order (`ORDERED`): its choice depends on
the message, the number of ranks and the version, and the bits on its choice.

Ring is the only algorithm here, because a variable holds for all collectives and the others cannot all-gather
("no algorithm/protocol available"); LL128 is left out, because it may corrupt data where links do not keep
its order. bench/trainer_nccl.py measures presets where there are GPUs; **none of these was measured yet**.

Source: NCCL user guide, environment variables (NCCL_SOCKET_NTHREADS, NCCL_NSOCKS_PERTHREAD: 4 and 4 for
generic 100G networks, 2 and 8 its own choice on AWS, product at most 64; NCCL_MAX_CTAS: CUDA blocks, one for
each channel).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from foldfeed.trainer.errors import TrainerConfigError

# Whose sums are made in the backend's order.
ORDERED = ("ring", "ddp")
# Variables that say how NCCL and gloo send, and the preset that this process has applied.
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_")
_APPLIED = "FOLDFEED_NCCL_PRESET"


# What decides the order of sums, in every preset.
_PINS = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}
# By name, the other variables; what is not there is left to NCCL. NCCL_MAX_CTAS: channels, few leave more of
# the GPU to the model. NCCL_SOCKET_NTHREADS: CPU threads for each connection. NCCL_NSOCKS_PERTHREAD: sockets.
PRESETS: Mapping[str, Mapping[str, str]] = {
    "nvlink": {},
    "nvlink-lean": {"NCCL_MAX_CTAS": "8"},
    "ethernet": {"NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4"},
    "ethernet-wide": {"NCCL_SOCKET_NTHREADS": "2", "NCCL_NSOCKS_PERTHREAD": "8"},
    "infiniband": {},
    "infiniband-lean": {"NCCL_MAX_CTAS": "8"},
}
CHOICES = ("auto", "none", *PRESETS)


def variables(preset: str, *, pins: bool = True) -> dict[str, str]:
    """Returns the environment of a preset; with ``pins`` also what decides the order of sums."""
    return {**(_PINS if pins else {}), **PRESETS[preset]}


def has_infiniband(devices: Path = Path("/sys/class/infiniband")) -> bool:
    """Returns whether this machine has an adapter that NCCL reaches by verbs: InfiniBand or RoCE."""
    return devices.is_dir() and any(devices.iterdir())


def choose(wish: str, *, several_nodes: bool, infiniband: bool) -> str:
    """Returns the name of a preset; ``none`` for none.

    Args:
      wish: a name, ``auto`` or ``none``.
      several_nodes: the ranks are not all on one.
      infiniband: every node has it.
    """
    if wish != "auto":
        return wish
    return ("infiniband" if infiniband else "ethernet") if several_nodes else "nvlink"


def apply(name: str, say: Callable[[str], None], *, pins: bool = True) -> None:
    """Sets the variables of a preset that nobody has set, and says what it did; once in a process.

    Args:
      name: of a preset, or ``none``.
      say: called with a line for people.
      pins: see `variables`.
    """
    environment = os.environ
    if _APPLIED in environment:
        return
    environment[_APPLIED] = name
    wanted = variables(name, pins=pins) if name in PRESETS else {}
    kept = {key: environment[key] for key, value in wanted.items() if environment.get(key, value) != value}
    for key, value in kept.items():
        say(f"NCCL preset {name}: {key} stays {value}, as it was set; the preset has {wanted[key]}")
    new = {key: value for key, value in wanted.items() if key not in environment}
    environment.update(new)
    if name in PRESETS:
        text = " ".join(f"{key}={value}" for key, value in new.items())
        say(f"NCCL preset {name}: {text or 'nothing to set'}")


def applied() -> str:
    """Returns the name that `apply` was called with; empty before."""
    return os.environ.get(_APPLIED, "")


def require_effect(wish: str, device: str) -> None:
    """Checks that a preset that was named is for something.

    Raises:
      TrainerConfigError: gradients do not travel by NCCL.
    """
    if wish in PRESETS and device != "cuda":
        raise TrainerConfigError(
            f"--nccl-preset {wish} has no effect on device {device}: gradients travel by NCCL between GPUs "
            "only. Leave it out."
        )


def record(transport: str, version: str) -> dict[str, str]:
    """Returns what a run keeps of how its gradients travelled.

    Args:
      transport: name of the exchange in use.
      version: NCCL's; empty where it is not used.
    """
    told = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
    facts = {"transport": transport, "nccl": version, "preset": applied()}
    return told | {name: value for name, value in facts.items() if value}
