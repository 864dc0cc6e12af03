"""Which Beam runners are taken and which are refused, decided without importing Beam.

Owns names and reasons. Does not own Beam's options (`foldfeed.pipelines.engine`). Invariant: a runner
known to lose or mix records is refused before anything is searched.
"""

from __future__ import annotations

from foldfeed.pipelines.errors import EngineError

LOCAL_RUNNER = "FnApiRunner"

# Measured with Beam 2.77: both report DONE with wrong results.
_LOSES_RECORDS = (
    "this runner mixes tagged outputs, drops what finish_bundle emits and still reports success; "
    f"use {LOCAL_RUNNER}, SparkRunner, FlinkRunner or DataflowRunner"
)
REFUSED_RUNNERS = {
    "daskrunner": _LOSES_RECORDS,
    "pysparkrunner": _LOSES_RECORDS,
    "beampysparkrunner": _LOSES_RECORDS,
}
MAPPED_RUNNERS = {
    "directrunner": "a bare DirectRunner first tries to download another runner",
    "switchingdirectrunner": "it first tries to download another runner",
}


def choose_runner(runner: str) -> tuple[str, str | None]:
    """Returns the runner to use and, where it is not the one asked for, a line that says why.

    Raises:
      EngineError: the runner is refused.
    """
    key = runner.rpartition(".")[2].lower()
    if key in REFUSED_RUNNERS:
        raise EngineError(f"--runner {runner}", REFUSED_RUNNERS[key])
    if key in MAPPED_RUNNERS:
        return LOCAL_RUNNER, f"using {LOCAL_RUNNER} instead of {runner}: {MAPPED_RUNNERS[key]}"
    return runner, None
