"""Which snapshot a run continues from: a decision that all ranks make together.

Every rank validates a candidate by itself; it counts only if all of them could read and verify it. A rank
never falls back alone. Of a candidate in memory the ranks of a machine that has none, or a damaged one, get
the bytes from a rank that has it, and verify them. A candidate that fails somewhere is reported and the next
older one is tried. A candidate that is sound but belongs to another run, parameter layout or numeric
environment is an error: it would continue something else.

Invariant: every function here is called by all ranks in the same order and returns or raises the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from foldfeed.trainer.errors import (
    InvalidSnapshotError,
    NoValidSnapshotError,
    SnapshotMismatchError,
    TrainerConfigError,
)
from foldfeed.trainer.groups.nccl import ORDERED
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.groups.topology import own_place, pair_up
from foldfeed.trainer.state.snapshot import CHUNK_BYTES, Generation, SnapshotFolder, checksum, read_generation

# Settings of NCCL that change the order of its sums: equal on all ranks; nccl.py warns of others than before.
NCCL_SETTINGS = ("NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE")


def newest_valid(
    folder: SnapshotFolder,
    ranks: Ranks,
    report: Callable[[str], None],
    memory: SnapshotFolder | None = None,
    run_id: str = "",
) -> Generation | None:
    """Returns the newest generation that every rank validated, or None when there are none at all.

    Of two of the same step the one in memory goes first.

    Args:
      folder: the run's snapshots on disk, as this rank sees them.
      ranks: the group.
      report: called with one line for each generation that was refused (print it on one rank).
      memory: the run's snapshots in this machine's memory, if that tier is used.
      run_id: of the run; what lies in memory for another one is refused.
    Raises:
      NoValidSnapshotError: there are generations on disk, and every one fails on some rank. When only memory
        had any, the run starts from step 0, which gives the same weights.
    """
    mine = [[step, 1] for step in memory.steps()] if memory is not None else []
    mine += [[step, 0] for step in folder.steps()]
    seen = ranks.gather_json(mine, "the search for snapshots")
    candidates = sorted({(step, fast) for row in seen for step, fast in row}, reverse=True)
    reasons = []
    for position, (step, fast) in enumerate(candidates):
        tier = memory if fast and memory is not None else folder
        generation, refusal = _validate(tier.generation_path(step), ranks, run_id if fast else "", report)
        if generation is not None:
            return generation
        reasons.append(refusal)
        next_step = candidates[position + 1][0] if position + 1 < len(candidates) else None
        there = "" if next_step != step else " on disk"
        report(
            f"{refusal}; "
            + ("no older one is left" if next_step is None else f"falling back to step {next_step}{there}")
        )
    if any(not fast for _, fast in candidates):
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


def _validate(
    path: Path, ranks: Ranks, run_id: str = "", report: Callable[[str], None] = lambda line: None
) -> tuple[Generation | None, str]:
    """Returns the generation if all ranks read the same valid one, else None and who found what.

    Args:
      path: of a generation; with a ``run_id`` in memory, and of that run alone.
      ranks: the group.
      run_id: that its manifest must name; then those who have not got the generation get it from others.
      report: called with a line when they do.
    """
    generation, reason, seal = None, "", ""
    name = str(path) if run_id else path.name
    try:
        generation = read_generation(path)
        seal = str(generation.manifest["crc32c"])
        if run_id and generation.manifest.get("run_id") != run_id:
            reason = f"it belongs to run {generation.manifest.get('run_id')}"
    except InvalidSnapshotError as error:
        reason = error.reason
    answers = ranks.gather_json([reason, seal], f"the validation of {path.name}")
    refused = [(rank, text) for rank, (text, _) in enumerate(answers) if text]
    if run_id and refused and len({found for text, found in answers if not text}) == 1:
        holders = [rank for rank, (text, _) in enumerate(answers) if not text]
        generation, reason = _spread(path, generation if not reason else None, holders, ranks)
        if not any(ranks.gather_json(reason, f"the validation of {path.name}")):
            report(
                f"snapshot {name}: {len(refused)} of {ranks.world} ranks got it from the memory of rank "
                f"{holders[0]}'s machine (rank {refused[0][0]}: {refused[0][1]})"
            )
            return generation, ""
    if refused:
        rank, text = refused[0]
        return (
            None,
            f"snapshot {name} refused by {len(refused)} of {ranks.world} ranks (rank {rank}: {text})",
        )
    if len({found for _, found in answers}) > 1:
        fix = "its machines were at different steps" if run_id else "--output must be shared"
        return None, f"snapshot {name} is not the same file on all ranks; {fix}"
    return generation, ""


def _spread(
    path: Path, mine: Generation | None, holders: Sequence[int], ranks: Ranks
) -> tuple[Generation | None, str]:
    """Sends a generation from the memory of some ranks to those that have none. A collective.

    Args:
      path: where this rank looked for it.
      mine: what it found there.
      holders: the ranks that found it; what they found is equal.
      ranks: the group.
    Returns: the generation; or None and what is wrong with what came.
    """
    takers = [rank for rank in range(ranks.world) if rank not in holders]
    phase = f"sending {path.name} from memory"
    pairs = pair_up(takers, holders, ranks.gather_json(own_place(), phase))
    text = json.dumps(mine.manifest if ranks.rank == holders[0] and mine else {})
    manifest: dict[str, Any] = json.loads(ranks.gather_bytes(text.encode(), phase)[holders[0]])
    buffers = dict(mine.buffers) if mine else {}
    assert ranks.control is not None, "a rank alone has nobody to ask"
    for name, entry in manifest["buffers"].items():
        numel = int(entry["numel"])
        if mine is None:
            buffers[name] = torch.empty(numel, dtype=torch.float32)
        for start in range(0, numel, CHUNK_BYTES // 4):
            part = buffers[name][start : start + CHUNK_BYTES // 4]
            gives = [part.numel() * (pairs.get(rank) == ranks.rank) for rank in range(ranks.world)]
            takes = [part.numel() * (pairs.get(ranks.rank) == rank) for rank in range(ranks.world)]
            sent = part.repeat(sum(size > 0 for size in gives)) if sum(gives) else part[:0]
            received = part if sum(takes) else torch.empty(0)
            with ranks.guard(phase):
                ranks.control.all_to_all(received, sent, takes, gives)
    sums = {name: f"{checksum(buffer):08x}" for name, buffer in buffers.items()}
    wrong = [name for name, found in sums.items() if found != manifest["buffers"][name]["crc32c"]]
    if wrong:
        return None, f"{', '.join(wrong)} failed their crc32c on the way"
    return Generation(path=path, manifest=manifest, buffers=buffers), ""


def environment(
    device: torch.device, threads: int, deterministic: bool, compiles: bool | None = False
) -> dict[str, Any]:
    """Returns what, besides the settings, decides the bits of a step.

    Raises:
      TrainerConfigError: it ``compiles``, and nothing is here that does.
    """
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
    return found | ({"compiler": compiler(device)} if compiles else {})


def compiler(device: torch.device) -> str:
    """Returns name and version of what torch.compile makes kernels with.

    Raises:
      TrainerConfigError: it is not here.
    """
    try:
        if device.type == "cuda":
            return f"triton {importlib.metadata.version('triton')}"
        done = subprocess.run(
            [os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, importlib.metadata.PackageNotFoundError) as error:
        need = "the package triton" if device.type == "cuda" else "a C++ compiler (g++, or one named by CXX)"
        raise TrainerConfigError(
            f"--compile needs {need}: {error}. Install it, or leave --compile out."
        ) from error


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
        settings = changed_settings(manifest["identity"], expected["identity"], "in the snapshot")
        raise SnapshotMismatchError(
            path, settings or differences, "Use the settings it was made with, or another --output."
        )
    numerics = {name: value for name, value in environment.items() if name not in NCCL_SETTINGS}
    changed = _differences(manifest["environment"], numerics)
    if changed and strict:
        raise SnapshotMismatchError(
            path, changed, "The weights could differ in their last bits; --no-deterministic continues anyway."
        )
    if changed:
        report(f"warning: {path} was made elsewhere ({'; '.join(changed)}); bits may differ from here on")


def network_warning(before: Mapping[str, str], now: Mapping[str, str], reducer: str) -> str:
    """Returns what to say when gradients travel under other settings than before; empty under the same.

    Args:
      before: `nccl.record` of the run so far.
      now: that of this start.
      reducer: of the run.
    """
    # Transports of one tree may follow each other; another sum is another run, and refused.
    was, told = ({name: text for name, text in row.items() if name != "transport"} for row in (before, now))
    if not (changed := changed_settings(was, told, "before")):
        return ""
    matters = (
        f"the sums of {reducer} are made in the backend's order, so bits may differ from here on"
        if reducer in ORDERED
        else f"the weights do not depend on them, because the sums of {reducer} are made in our own order"
    )
    return f"warning: other settings of the network ({'; '.join(changed)}): {matters}"


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {found.get(name)!r} in the snapshot, {value!r} now"
        for name, value in expected.items()
        if found.get(name) != value
    ]


def changed_settings(found: Mapping[str, Any], now: Mapping[str, Any], place: str) -> list[str]:
    """Returns what differs between two identities, one phrase each; a setting may be in one of them alone."""
    before, after = _flatten(found), _flatten(now)
    return [
        f"{name} {before.get(name, 'unset')!r} {place}, {after.get(name, 'unset')!r} now"
        for name in before | after
        if before.get(name) != after.get(name)
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
