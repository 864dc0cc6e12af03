"""Errors of the search pipelines, a branch of foldfeed's error tree.

    FoldfeedError
    └── PipelineError
        ├── ConfigError (ValueError)      a build was described in a way that cannot work
        ├── QueryFileError                a FASTA file that cannot be opened at all
        ├── DatabaseError                 a database that is not there, empty or of the wrong kind
        ├── RegistryError                 the file of known databases cannot be used as asked
        ├── StagingError                  a database cannot be copied to a local disk
        │   └── StagingFullError          for want of space; what was copied is kept
        ├── ToolNotFoundError             a search tool is not installed, or not the planned one
        ├── KernelError                   a compiled kernel gives other scores than plain C
        ├── SearchError                   one search gave no usable result (ends as a dead letter)
        │   ├── ToolFailedError           non-zero exit or killed by a signal
        │   ├── ToolTimeoutError          ran longer than allowed; its process group was killed
        │   ├── ToolOutputError           exit 0, but the output is missing, cut or not of this query
        │   ├── DatabaseChangedError      the database is not the one that the build was planned with
        │   ├── QueryTooLongError         longer than the tool can take without cutting it silently
        │   ├── UnreadableDatabaseError   an engine cannot read the text of the database
        │   └── DeviceError               a CUDA device that the fast scan was to use is not there, or failed
        ├── CancelledError                the run was stopped: by the person, or because a step failed
        ├── CorruptResultError            a stored search result does not match its checksum
        ├── EngineError                   a Beam runner or option that is refused, with the reason
        ├── PipelineFailedError           the Beam run ended with an error
        ├── AuditError                    the run ended, but not every record is accounted for
        ├── NothingCommittedError         every record became a dead letter
        └── WorkerError                   one of the above, as text, on its way out of a worker

The values are fields and also ``args``, so every error survives pickling between a worker and the submitter.
"""

from __future__ import annotations

import socket

from foldfeed.feature_store.errors import FoldfeedError


class PipelineError(FoldfeedError):
    """Base of every error of a search pipeline."""


class ConfigError(PipelineError, ValueError):
    """A build was described in a way that cannot work."""


class QueryFileError(PipelineError):
    """A FASTA file that cannot be opened.

    Attributes:
      url: the file.
      reason: why not.
    """

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(url, reason)

    def __str__(self) -> str:
        return f"cannot read queries from {self.url!r}: {self.reason}. Give --queries an existing FASTA file."


class DatabaseError(PipelineError):
    """A search database that is not there, empty or of another kind.

    Attributes:
      name: the name the user gave it.
      path: what was looked at.
      reason: what is wrong there.
    """

    def __init__(self, name: str, path: str, reason: str) -> None:
        self.name, self.path, self.reason = name, path, reason
        super().__init__(name, path, reason)

    def __str__(self) -> str:
        return f"database {self.name!r} at {self.path!r}: {self.reason}"


class RegistryError(PipelineError):
    """The file of known databases cannot be used as asked.

    Attributes:
      path: of the file.
      reason: what is wrong.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"registry {self.path!r}: {self.reason}"


class StagingError(PipelineError):
    """A database cannot be copied to a local disk, or its copy is not what it should be.

    Attributes:
      path: the file, URL or folder.
      reason: what is wrong, and what to do.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"staging of {self.path!r}: {self.reason}"


class StagingFullError(StagingError):
    """The disk that a database is copied to is full, or would be.

    Attributes:
      num_missing: bytes that are still to be copied.
      num_free: bytes that are free there.
    """

    def __init__(self, path: str, num_missing: int, num_free: int) -> None:
        self.num_missing, self.num_free = num_missing, num_free
        need = f"{num_missing} bytes are still to be copied" if num_missing else "what was copied is unpacked"
        super().__init__(
            path,
            f"{need}, and only {num_free} bytes are free there; what was copied is kept. Free some space and "
            "run the same command again: it goes on where it stopped",
        )
        self.args = (path, num_missing, num_free)


class ToolNotFoundError(PipelineError):
    """A search tool is not installed, cannot run, or differs from the one the build was planned with.

    Attributes:
      tool: its name.
      reason: what was tried.
    """

    def __init__(self, tool: str, reason: str) -> None:
        self.tool, self.reason = tool, reason
        super().__init__(tool, reason)

    def __str__(self) -> str:
        return f"search tool {self.tool!r}: {self.reason}"


class KernelError(PipelineError):
    """A compiled kernel of the fast scan gives other scores than plain C.

    Attributes:
      kernel: its name.
      wrong: scores that differ.
      compared: scores that were compared.
    """

    def __init__(self, kernel: str, wrong: int, compared: int) -> None:
        self.kernel, self.wrong, self.compared = kernel, wrong, compared
        super().__init__(kernel, wrong, compared)

    def __str__(self) -> str:
        return (
            f"the {self.kernel} kernel of the fast scan gives {self.wrong} of {self.compared} scores "
            "other than plain C's; use '--engine binary' and report compiler and processor (of a device: "
            "FOLDFEED_SCAN_DEVICE=cpu, and report its driver)"
        )


class SearchError(PipelineError):
    """One search gave no usable result; the record becomes a dead letter, the others go on."""


class ToolFailedError(SearchError):
    """A tool exited with an error or was killed.

    Attributes:
      tool: its name.
      exit_code: as the shell counts, negative for a signal.
      stderr: the end of what it printed.
    """

    def __init__(self, tool: str, exit_code: int, stderr: str) -> None:
        self.tool, self.exit_code, self.stderr = tool, exit_code, stderr
        super().__init__(tool, exit_code, stderr)

    def __str__(self) -> str:
        how = f"killed by signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        said = " ".join(self.stderr.split())[-400:]
        return f"{self.tool} failed ({how})" + (f": {said}" if said else " and printed no message")


class ToolTimeoutError(SearchError):
    """A tool ran longer than allowed; it and its children were killed.

    Attributes:
      tool: its name.
      timeout_s: the limit.
    """

    def __init__(self, tool: str, timeout_s: float) -> None:
        self.tool, self.timeout_s = tool, timeout_s
        super().__init__(tool, timeout_s)

    def __str__(self) -> str:
        limit = f"did not end within {self.timeout_s:g} s and was killed"
        return f"{self.tool} {limit}; raise --timeout to wait longer"


class ToolOutputError(SearchError):
    """A tool ended without error, but what it wrote cannot be trusted.

    Attributes:
      tool: its name.
      reason: what is missing or wrong.
    """

    def __init__(self, tool: str, reason: str) -> None:
        self.tool, self.reason = tool, reason
        super().__init__(tool, reason)

    def __str__(self) -> str:
        return f"{self.tool} exited without error, but {self.reason}"


class DatabaseChangedError(SearchError):
    """A database that is another one than when the build was planned, or on this worker than elsewhere.

    Attributes:
      path: of the file that differs; several with commas where only their common digest is known.
      reason: how.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    @classmethod
    def unreadable(cls, path: str, error: OSError) -> DatabaseChangedError:
        """Returns the error of a file that was there for the plan and cannot be read here and now."""
        return cls(path, f"cannot be read on {socket.gethostname()} ({error})")

    def __str__(self) -> str:
        return (
            f"{self.path!r} {self.reason}, so no result of it is kept; the same command again plans with "
            "what is there then"
        )


class QueryTooLongError(SearchError):
    """A query that a tool would cut without saying so.

    Attributes:
      tool: its name.
      num_residues: length of the query.
      limit: the longest query the tool takes whole.
    """

    def __init__(self, tool: str, num_residues: int, limit: int) -> None:
        self.tool, self.num_residues, self.limit = tool, num_residues, limit
        super().__init__(tool, num_residues, limit)

    def __str__(self) -> str:
        return (
            f"{self.num_residues} residues; {self.tool} takes at most {self.limit} and cuts longer queries "
            "silently, so it was not run. Split the sequence or search it without that database."
        )


class UnreadableDatabaseError(SearchError):
    """An engine cannot read the text of a database: it is empty, or no FASTA that HMMER reads.

    A file that is gone, was cut or became another one is a `DatabaseChangedError`, whatever searches it.

    Attributes:
      path: of the file.
      reason: what is wrong.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"the scan cannot read {self.path!r}: {self.reason}. Correct it and run the build again"


class DeviceError(SearchError):
    """A CUDA device that the fast scan was told to use is not there, cannot be used, or failed.

    Attributes:
      what: the call, or who refuses.
      reason: in the driver's or compiler's words.
    """

    def __init__(self, what: str, reason: str) -> None:
        self.what, self.reason = what, reason
        super().__init__(what, reason)

    def __str__(self) -> str:
        return (
            f"CUDA device of the fast scan: {self.what}: {self.reason}. FOLDFEED_SCAN_DEVICE=cpu gives the "
            "same results without it"
        )


class CancelledError(PipelineError):
    """The run was stopped: by the person, or because another step failed for good."""


class CorruptResultError(PipelineError):
    """A stored search result does not match its checksum.

    Attributes:
      unit_id: which one.
      reason: what differs.
    """

    def __init__(self, unit_id: str, reason: str) -> None:
        self.unit_id, self.reason = unit_id, reason
        super().__init__(unit_id, reason)

    def __str__(self) -> str:
        return f"stored search result {self.unit_id}: {self.reason}; run the build again to search it anew"


class EngineError(PipelineError):
    """A Beam runner or option that this software refuses.

    Attributes:
      option: what was asked for.
      reason: why it is refused and what to use.
    """

    def __init__(self, option: str, reason: str) -> None:
        self.option, self.reason = option, reason
        super().__init__(option, reason)

    def __str__(self) -> str:
        return f"{self.option}: {self.reason}"


class PipelineFailedError(PipelineError):
    """The Beam run ended with an error; nothing was committed.

    Attributes:
      stage: the step that failed, "" when the engine does not say.
      reason: the error there.
    """

    def __init__(self, stage: str, reason: str) -> None:
        self.stage, self.reason = stage, reason
        super().__init__(stage, reason)

    def __str__(self) -> str:
        where = f" in step {self.stage!r}" if self.stage else ""
        return (
            f"the run failed{where}: {self.reason.rstrip(' .')}. Nothing was committed; finished searches "
            "are kept, run the same command again to go on."
        )


class AuditError(PipelineError):
    """The engine reported success, but not every record is accounted for; nothing was committed."""


class NothingCommittedError(PipelineError):
    """Every record of a build became a dead letter, or there was none.

    Attributes:
      num_dead_letters: how many.
      first: the first of them, as text.
      where: the file that lists all of them.
    """

    def __init__(self, num_dead_letters: int, first: str, where: str) -> None:
        self.num_dead_letters, self.first, self.where = num_dead_letters, first, where
        super().__init__(num_dead_letters, first, where)

    def __str__(self) -> str:
        return (
            f"no record could be built ({self.num_dead_letters} dead letters; first: {self.first}). "
            f"All are listed in {self.where}"
        )


class WorkerError(PipelineError):
    """Carries one of our errors out of a Beam worker as plain text.

    Engines pass a worker's exception on as text, after adding the step's name to its first argument; an error
    with fields would come out garbled.
    """
