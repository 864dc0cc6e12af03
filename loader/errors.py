"""What can go wrong between a store and a batch.

    FoldfeedError
    └── LoaderError
        ├── LoaderConfigError (ValueError)   an argument of a loader or a recipe that cannot work
        ├── LoaderStateError (ValueError)    a saved position that is no position, or belongs elsewhere
        │   └── StateMismatchError           ... to another store, recipe, sampling, seed or batch size
        ├── SampleError                      one sample could not be made; ``__cause__`` says why
        ├── ReadingProcessError (RuntimeError)   a process that reads samples does not stay alive
        └── LoaderUseError (RuntimeError)    used after close(), after a fork, or pickled

Errors carry the values as fields and survive pickling, so that they can cross a process boundary. This module
owns no behaviour.
"""

from __future__ import annotations

from foldfeed.feature_store.errors import FoldfeedError


class LoaderError(FoldfeedError):
    """Base of the loader's errors."""


class LoaderConfigError(LoaderError, ValueError):
    """An argument that cannot work.

    Attributes:
      field: its name.
      value: what was given.
      rule: what it breaks and what to do.
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field = field
        self.value = value
        self.rule = rule
        super().__init__(f"{field}={value!r}: {rule}")


class LoaderStateError(LoaderError, ValueError):
    """A saved position that this loader cannot read."""


class StateMismatchError(LoaderStateError):
    """A saved position that belongs to another stream of samples.

    Attributes:
      field: which value differs.
      found: its value in the saved state.
      expected: its value in this loader.
    """

    def __init__(self, field: str, found: object, expected: object) -> None:
        self.field = field
        self.found = found
        self.expected = expected
        super().__init__(
            f"the saved loader state has {field}={found!r}, this loader {expected!r}; a position counts "
            f"samples of one stream only. Open the loader with the saved {field}, or start anew at step 0."
        )


class SampleError(LoaderError):
    """One sample could not be made; nothing was skipped or replaced.

    Attributes:
      sample: its global sample number.
      record_id: the record it is drawn from.
      reason: the text of the error underneath, which is ``__cause__`` within one process.
    """

    def __init__(self, sample: int, record_id: str, reason: str) -> None:
        self.sample = sample
        self.record_id = record_id
        self.reason = reason
        super().__init__(f"sample {sample} (record {record_id!r}) could not be read: {reason}")


class ReadingProcessError(LoaderError, RuntimeError):
    """A process that reads samples ended again and again; no sample was skipped.

    Attributes:
      pid: of the last one.
      reason: how it ended.
    """

    def __init__(self, pid: int, reason: str) -> None:
        self.pid = pid
        self.reason = reason
        super().__init__(
            f"reading process {pid}: {reason}; see its messages above. Out of memory? Then give fewer "
            "num_processes or read_ahead_bytes; num_processes=0 reads in threads"
        )


class LoaderUseError(LoaderError, RuntimeError):
    """A loader was used where it cannot work: closed, inherited over a fork, or pickled."""
