"""Which snapshot a run continues from: a decision that all ranks make together.

Every rank validates a candidate by itself; it counts only if all of them could read and verify it. A rank
never falls back alone. A candidate that fails somewhere is reported and the next older one is tried. A
candidate that is sound but belongs to another run, parameter layout or numeric environment is an error: it
would continue something else.

Invariant: every function here is called by all ranks in the same order and returns or raises the same.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from foldfeed.trainer.errors import InvalidSnapshotError, NoValidSnapshotError, SnapshotMismatchError
from foldfeed.trainer.ranks import Ranks
from foldfeed.trainer.snapshot import Generation, SnapshotFolder, read_generation

# Settings of NCCL that change the order of its sums.
NCCL_SETTINGS = ("NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE")


def newest_valid(folder: SnapshotFolder, ranks: Ranks, report: Callable[[str], None]) -> Generation | None:
    """Returns the newest generation that every rank validated, or None when there are none at all.

    Args:
      folder: the run's snapshots, as this rank sees them.
      ranks: the group.
      report: called with one line for each generation that was refused (print it on one rank).
    Raises:
      NoValidSnapshotError: there are generations, and every one fails on some rank.
    """
    seen = ranks.gather_json(folder.steps(), "the search for snapshots")
    candidates = sorted({step for steps in seen for step in steps}, reverse=True)
    reasons = []
    for step in candidates:
        path = folder.generation_path(step)
        generation, refusal = _validate(path, ranks)
        if generation is not None:
            return generation
        reasons.append(refusal)
        older = [other for other in candidates if other < step]
        report(f"{refusal}; " + (f"falling back to step {older[0]}" if older else "no older one is left"))
    if reasons:
        raise NoValidSnapshotError(str(folder.path), reasons)
    return None


def named_generation(path: Path, ranks: Ranks) -> Generation:
    """Returns the generation in a folder the user named.

    Raises:
      InvalidSnapshotError: it does not validate on every rank.
    """
    generation, refusal = _validate(path, ranks)
    if generation is None:
        raise InvalidSnapshotError(str(path), refusal)
    return generation


def _validate(path: Path, ranks: Ranks) -> tuple[Generation | None, str]:
    """Returns the generation if all ranks read the same valid one, else None and who found what."""
    generation, reason, seal = None, "", ""
    try:
        generation = read_generation(path)
        seal = str(generation.manifest["crc32c"])
    except InvalidSnapshotError as error:
        reason = error.reason
    answers = ranks.gather_json([reason, seal], f"the validation of {path.name}")
    refused = [(rank, text) for rank, (text, _) in enumerate(answers) if text]
    if refused:
        rank, text = refused[0]
        return (
            None,
            f"snapshot {path.name} refused by {len(refused)} of {ranks.world} ranks (rank {rank}: {text})",
        )
    if len({found for _, found in answers}) > 1:
        return None, f"snapshot {path.name} is not the same file on all ranks; --output must be shared"
    return generation, ""


def environment(device: torch.device, threads: int, deterministic: bool) -> dict[str, Any]:
    """Returns what, besides the settings, decides the bits of a step."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": threads,
        "deterministic": deterministic,
        "device": device.type,
        "processor": platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        found["kernels"] = torch.cuda.get_device_name(device)
        found.update({name: os.environ.get(name, "") for name in NCCL_SETTINGS})
    return found


def check_belongs(
    generation: Generation,
    expected: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    strict: bool,
    report: Callable[[str], None],
) -> None:
    """Checks that a sound generation may be continued by this run.

    Args:
      generation: validated.
      expected: manifest entries that must be equal (run id, config digest, layout hash).
      environment: of this run, compared with the manifest's.
      strict: refuse another environment; otherwise only report it.
      report: for warnings.
    Raises:
      SnapshotMismatchError: anything that must be equal is not.
    """
    manifest = generation.manifest
    path = str(generation.path)
    differences = _differences(manifest, expected)
    if differences:
        settings = _differences(_flatten(manifest["identity"]), _flatten(expected["identity"]))
        raise SnapshotMismatchError(
            path, settings or differences, "Use the settings it was made with, or another --output."
        )
    changed = _differences(manifest["environment"], environment)
    if changed and strict:
        raise SnapshotMismatchError(
            path, changed, "The weights could differ in their last bits; --no-deterministic continues anyway."
        )
    if changed:
        report(f"warning: {path} was made elsewhere ({'; '.join(changed)}); bits may differ from here on")


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {found.get(name)!r} in the snapshot, {value!r} now"
        for name, value in expected.items()
        if found.get(name) != value
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
