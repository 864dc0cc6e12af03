"""What an engine says about a failed run, as one line that names step, record and cause.

Owns the reading of other people's error text. Does not own the run. An engine hands on a worker's
exception as text: the local runner a Python traceback, Spark and Flink a Java stack trace around it, which
ends in words that say nothing ("Driver stacktrace:"). Never raises: text that nothing here knows gives its
last line that says something.

Source: texts of Beam 2.77's local runner, and of Spark 3.5.0 under Beam's job server ("Job aborted due to
stage failure: ... most recent failure: Lost task ...: <exception>", Spark's DAGScheduler).
"""

from __future__ import annotations

import re

from foldfeed.pipelines.errors import PipelineFailedError, WorkerError

# Our own text, and the step that Beam's worker adds to it.
_WORKER_ERROR = re.compile(
    rf"{WorkerError.__name__}: (?P<reason>.*?)(?: \[while running '(?P<stage>[^']*)'\])?\s*$",
    re.MULTILINE | re.DOTALL,
)
_STAGE = re.compile(r"\[while running '([^']*)'\]")
# Portable engines see a step's name with what made it unique behind it.
_UNIQUE_SUFFIX = re.compile(r"[-_]ptransform[-_]\d+$|_\d+$")
_NOISE = re.compile(
    # Frames; those of another thread that are part of a message have no "at".
    r"\s+at [\w$.<>/]+\(|[\w$.<>/]+\([\w$]+\.(?:java|scala):\d+\)$"
    r"|\s*\.\.\. \d+ (more|common frames)|Driver stacktrace:|\s*Suppressed:|\s*$"
)
# What Beam's client puts before the engine's words.
_JOB_STATE = re.compile(r"^Pipeline \S+ failed in state \w+: ")
_TRACEBACK = "Traceback (most recent call last):"
_PYTHON_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Warning|Iteration)\b(?::.*)?$")
_LOST_TASK = re.compile(
    r"Lost task (?P<task>[\d.]+ in stage [\d.]+) \(TID \d+\)(?: \((?P<where>[^)]*)\))?: *"
)
_CAUSED_BY = re.compile(r"\s*Caused by: (.*)")
# One job server is one Spark driver.
_BUSY = "Only one SparkContext should be running in this JVM"
_ENDED = "cancelled because SparkContext was shut down"
# Exit codes of `deploy/spark/boot.py`.
_BOOT_CODES = {
    81: "the Python that boot.py starts on a worker has no foldfeed; install foldfeed[pipelines] there",
    82: "a worker has another version of foldfeed than this machine; install the same one on all",
}
# How Java says that the Python process is gone: its connections end, or the process that was started does.
_LOST_WORKER = re.compile(
    r"StatusRuntimeException: (?:CANCELLED|UNAVAILABLE)|Process died with exit code"
    r"|SDK Harness.*(?:disconnected|closed)|call already (?:closed|cancelled)"
    r"|Connection reset by peer|ExecutorLostFailure|worker lost",
    re.IGNORECASE,
)


def failure_of(text: str) -> PipelineFailedError:
    """Returns the typed error for what an engine says about a failed run."""
    text = _JOB_STATE.sub("", text)
    stages = _STAGE.findall(text)
    ours = list(_WORKER_ERROR.finditer(text))
    if ours:
        stage = ours[-1].group("stage") or (stages or [""])[-1]
        return PipelineFailedError(_UNIQUE_SUFFIX.sub("", stage), ours[-1].group("reason"))
    stage = _UNIQUE_SUFFIX.sub("", (stages or [""])[-1])
    return PipelineFailedError(stage, f"{_cause(text)}{_where(text)}.")


def _cause(text: str) -> str:
    lines = [line for line in text.splitlines() if not _NOISE.match(line)]
    if not lines:
        return "no message"
    if _TRACEBACK in text:
        # A traceback's frames are indented; the exception follows them without indentation.
        last = max(index for index, line in enumerate(lines) if _TRACEBACK in line)
        errors = [line for line in lines[last + 1 :] if _PYTHON_ERROR.match(_STAGE.sub("", line).strip())]
        return _plain((errors or lines)[-1 if not errors else 0])
    causes = [found.group(1) for line in lines if (found := _CAUSED_BY.match(line))]
    lost = [line for line in lines if _LOST_TASK.search(line)]
    cause = _plain(causes[-1] if causes else _LOST_TASK.split(lost[-1])[-1] if lost else lines[-1])
    if _BUSY in text:
        return f"this job server runs another job, and Beam's runner for Spark takes one at a time ({cause})"
    if _ENDED in text:
        return f"Spark ended the job: its master did not answer, or the cluster was taken away ({cause})"
    for code, words in _BOOT_CODES.items():
        if f"Process died with exit code {code}" in text:
            return words
    if _LOST_WORKER.search(text):
        return f"a worker process was lost, killed perhaps or out of memory ({cause})"
    return cause


def _plain(line: str) -> str:
    return _STAGE.sub("", line).strip().removesuffix(".")


def _where(text: str) -> str:
    """Returns which task of which executor failed, where an engine says it."""
    found = list(_LOST_TASK.finditer(text))
    if not found:
        return ""
    place = f", {found[-1].group('where')}" if found[-1].group("where") else ""
    return f" [task {found[-1].group('task')}{place}]"
