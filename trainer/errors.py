"""What can go wrong in a training run, in terms a user can act on.

    FoldfeedError
    └── TrainerError
        ├── TrainerConfigError (ValueError)   an option, or a combination, that cannot work
        ├── GradientError                     a gradient that the flat buffers cannot take
        ├── CommunicationError                a collective failed: a rank died or stalled
        ├── WireError                         a connection between two ranks failed
        ├── RanksChangeError                  a rank wants to join: the ranks meet anew
        ├── ExcludedError                     the other ranks went on without this one
        ├── PeerError                         another rank failed at something it does for all
        ├── ReplicaMismatchError              ranks that must hold equal bits do not
        ├── MeetingPointError                 the port where ranks meet is taken
        ├── LeaseHeldError                    another run lives in the output folder
        ├── LeaseLostError                    another run has taken the output folder over
        ├── DivergedError                     too many steps in a row were not finite
        ├── SnapshotError                     something about snapshots on disk
        │   ├── InvalidSnapshotError          one generation does not validate (a rank may fall back)
        │   ├── NoValidSnapshotError          there are snapshots, and none validates
        │   └── SnapshotMismatchError         a sound snapshot, of another run, layout or environment
        └── DependencyError (ImportError)     an optional package is not installed

Every error carries its values as fields and pickles, because ranks hand them to each other's reports. This
module owns no behaviour and imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from foldfeed.feature_store.errors import FoldfeedError


class TrainerError(FoldfeedError):
    """Base of the errors of a training run."""


class TrainerConfigError(TrainerError, ValueError):
    """An option, or a combination of options, that cannot work."""


class GradientError(TrainerError):
    """A gradient that the flat buffers cannot take.

    Attributes:
      parameter: its name in the model.
      reason: what is wrong with it.
    """

    def __init__(self, parameter: str, reason: str) -> None:
        self.parameter = parameter
        self.reason = reason
        super().__init__(f"gradient of {parameter!r}: {reason}")


class CommunicationError(TrainerError):
    """A collective failed; the step was not applied on this rank.

    Attributes:
      rank: who reports it.
      phase: what was being exchanged.
      reason: the backend's words.
    """

    def __init__(self, rank: int, phase: str, reason: str) -> None:
        self.rank = rank
        self.phase = phase
        self.reason = reason
        super().__init__(
            f"rank {rank} lost its peers during {phase}: {reason} "
            "Look for the first rank that failed; a restart continues from the last snapshot."
        )


class WireError(TrainerError):
    """A connection between two ranks failed, or its other side does not belong to the run."""


class RanksChangeError(TrainerError):
    """A rank wants to join or leave an elastic run; raised by all of them after a step, to meet anew.

    Attributes:
      step: completed steps.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"the ranks meet anew after step {step}, because one wants to join or to leave")


class ExcludedError(TrainerError):
    """The other ranks of an elastic run went on without this one, and it found no way back.

    Attributes:
      generation: of the ranks that train now.
      reason: why it did not come back.
    """

    def __init__(self, generation: int, reason: str) -> None:
        self.generation = generation
        self.reason = reason
        super().__init__(
            f"the run goes on without this rank, in generation {generation} ({reason}). Nothing is lost with "
            "it; start it again to join, once the others can be reached from here"
        )


class MeetingPointError(TrainerError):
    """The port where the ranks meet is taken by another program.

    Attributes:
      address: of the first rank's host.
      port: on it.
      reason: the system's words.
    """

    def __init__(self, address: str, port: str, reason: str) -> None:
        self.address = address
        self.port = port
        self.reason = reason
        super().__init__(
            f"the ranks cannot meet at {address}:{port}: the port is in use ({reason}). Another run may live "
            "there: set MASTER_PORT to a free port on every rank, or start with torchrun --standalone or "
            "--rdzv-backend c10d, which choose one"
        )


class LeaseHeldError(TrainerError):
    """Another run lives in the output folder.

    Attributes:
      path: its lease.
      host: where it runs.
      pid: its process there.
      age_s: seconds since it last renewed the lease.
      lease_s: seconds without renewal after which it counts as dead.
    """

    def __init__(self, path: str, host: str, pid: int, age_s: float, lease_s: float) -> None:
        self.path = path
        self.host = host
        self.pid = pid
        self.age_s = age_s
        self.lease_s = lease_s
        super().__init__(
            f"a run lives in this --output: process {pid} on {host} renewed {path} {age_s:.0f} s ago. Use "
            f"another --output, or stop that run first; {lease_s:.0f} s after its last renewal it counts as "
            "dead and its lease is taken over"
        )


class LeaseLostError(TrainerError):
    """Another run has taken the output folder over, because this one seemed dead; nothing more is written.

    Attributes:
      path: the lease.
      host: where the other one runs; "" where the lease is gone, or damaged.
    """

    def __init__(self, path: str, host: str) -> None:
        self.path = path
        self.host = host
        super().__init__(
            f"{path} is no longer ours but of {host}: this process did not renew it in time (was it "
            "stopped?). The other run goes on; use another --output for this one"
            if host
            else f"{path} is gone or damaged: somebody changed the folder, or another run had taken it over "
            "and has ended. Nothing more is written; the same command goes on from what is there"
        )


class DivergedError(TrainerError):
    """So many steps in a row were not finite that the run was stopped.

    Attributes:
      first_step: the first of them, counted from 1 as in the log.
      num_steps: how many.
      snapshot: the last one that was written before, or "".
    """

    def __init__(self, first_step: int, num_steps: int, snapshot: str) -> None:
        self.first_step = first_step
        self.num_steps = num_steps
        self.snapshot = snapshot
        kept = f"the last snapshot before it is {snapshot}" if snapshot else "there is no snapshot before it"
        super().__init__(
            f"{num_steps} steps in a row, from step {first_step} on, had a loss or gradient that is not "
            f"finite; {kept}. Lower --lr or look at the data of step {first_step}, then start from that "
            "snapshot with --resume and another --output; --max-skipped sets how many are borne, 0 any number"
        )


class PeerError(TrainerError):
    """Another rank failed at something it does for all of them; that rank reports the error itself.

    Attributes:
      rank: who failed.
      phase: at what.
      reason: the first line of its error.
    """

    def __init__(self, rank: int, phase: str, reason: str) -> None:
        self.rank = rank
        self.phase = phase
        self.reason = reason
        super().__init__(f"rank {rank} failed at {phase}: {reason}")


class ReplicaMismatchError(TrainerError):
    """Ranks that must hold equal bits do not.

    Attributes:
      what: which state was compared, and when.
      digests: one hex digest per rank, in rank order.
      odd_ranks: the ranks outside the majority; all of them when there is none.
    """

    def __init__(self, what: str, digests: Sequence[str], odd_ranks: Sequence[int]) -> None:
        self.what = what
        self.digests = tuple(digests)
        self.odd_ranks = tuple(odd_ranks)
        who = f"rank {odd_ranks[0]} differs" if len(odd_ranks) == 1 else f"ranks {list(odd_ranks)} differ"
        super().__init__(
            f"{who} in {what} (digests by rank: {', '.join(digests)}). Nothing was written from this state; "
            "restart from the last snapshot and suspect that rank's memory, device or software."
        )


class SnapshotError(TrainerError):
    """Something is wrong with snapshots on disk."""


class InvalidSnapshotError(SnapshotError):
    """One generation does not validate.

    Attributes:
      path: its folder.
      reason: the check that failed.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"snapshot {path} is not valid: {reason}")


class NoValidSnapshotError(SnapshotError):
    """There are snapshots, and none validates on every rank.

    Attributes:
      folder: where they lie.
      reasons: one line per generation, newest first.
    """

    def __init__(self, folder: str, reasons: Sequence[str]) -> None:
        self.folder = folder
        self.reasons = tuple(reasons)
        super().__init__(
            f"no snapshot in {folder} is valid on every rank ({'; '.join(reasons)}). "
            "Restore one from a copy, or start over with another --output."
        )


class SnapshotMismatchError(SnapshotError):
    """A sound snapshot that does not belong to this run, this parameter layout or this environment.

    Attributes:
      path: its folder.
      differences: what differs, one phrase each, snapshot's value first.
    """

    def __init__(self, path: str, differences: Sequence[str], fix: str) -> None:
        self.path = path
        self.differences = tuple(differences)
        self.fix = fix
        super().__init__(f"{path} cannot be continued by this run: {'; '.join(differences)}. {fix}")


class DependencyError(TrainerError, ImportError):
    """An optional package is not installed.

    Attributes:
      package: the missing import.
      fix: what to install, or which option does without it.
    """

    def __init__(self, package: str, fix: str) -> None:
        self.package = package
        self.fix = fix
        super().__init__(f"{package} is not installed; {fix}")
