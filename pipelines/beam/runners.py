"""Which Beam runners are taken and which are refused, decided without importing Beam.

Owns names and reasons. Does not own Beam's options (`beam.engine`). Invariant: a runner
known to lose or mix records is refused before anything is searched, however its name is spelled.
"""

from __future__ import annotations

from foldfeed.pipelines.errors import EngineError

LOCAL_RUNNER = "FnApiRunner"
DATAFLOW = "DataflowRunner"
FLINK = "FlinkRunner"
SPARK = "SparkRunner"
PORTABLE = "PortableRunner"
RUNNERS = (LOCAL_RUNNER, SPARK, FLINK, DATAFLOW, PORTABLE)

# Measured with Beam 2.77: both report DONE with wrong results.
_LOSES_RECORDS = (
    "this runner mixes tagged outputs, drops what finish_bundle emits and still reports success; "
    f"use {LOCAL_RUNNER}, SparkRunner, FlinkRunner or DataflowRunner"
)
REFUSED_RUNNERS = {
    "daskrunner": _LOSES_RECORDS,
    "pysparkrunner": _LOSES_RECORDS,
    "beampysparkrunner": _LOSES_RECORDS,
    "interactiverunner": "it is made for notebooks, keeps every collection and may run a graph in pieces; "
    f"use {LOCAL_RUNNER} and look at the store afterwards",
    "prismrunner": "it downloads a program when it starts, and no build was ever run on it; "
    f"use {LOCAL_RUNNER}",
    "kafkastreamsrunner": f"Beam calls it experimental and ships it in no release; use {SPARK} or {FLINK}",
    "renderrunner": "it draws a graph and runs nothing; `foldfeed build --dry-run` says what would be done",
}
_DOWNLOADS = "a bare DirectRunner first tries to download another runner"
MAPPED_RUNNERS = {
    "directrunner": _DOWNLOADS,
    "switchingdirectrunner": _DOWNLOADS,
    "bundlebaseddirectrunner": "it is Beam's older engine for tests, one bundle at a time",
}


def choose_runner(runner: str) -> tuple[str, str | None]:
    """Returns the runner to use and, where it is not the one asked for, a line that says why.

    Args:
      runner: as Beam takes it: ``FlinkRunner``, ``flink``, or the path of a class.
    Raises:
      EngineError: the runner is refused, or there is none of that name.
    """
    key = runner.rpartition(".")[2].lower()
    key = key if key.endswith("runner") else f"{key}runner"
    if key in REFUSED_RUNNERS:
        raise EngineError(f"--runner {runner}", REFUSED_RUNNERS[key])
    if key in MAPPED_RUNNERS:
        return LOCAL_RUNNER, f"using {LOCAL_RUNNER} instead of {runner}: {MAPPED_RUNNERS[key]}"
    known = {name.lower(): name for name in RUNNERS}
    if key in known:
        return known[key], None
    if "." not in runner:
        raise EngineError(
            f"--runner {runner}", f"no such runner; one of {', '.join(RUNNERS)}, or the path of a class"
        )
    return runner, None
