"""Beam engines: with which options they run.

Owns the mapping from a runner's name and extra options to Beam's `PipelineOptions`, and the refusals of
options. Does not own the graph, nor how an engine's error reads (`foldfeed.pipelines.engine_errors`).
Imports Beam, so it is itself imported only when a build runs.

Invariant: a runner known to lose or mix records, or to hang, is refused before anything is searched.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import (
    DebugOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
    _BeamArgumentParser,
)
from apache_beam.runners.runner import PipelineResult, PipelineState
from apache_beam.runners.worker import sdk_worker

from foldfeed.pipelines.engine_errors import failure_of
from foldfeed.pipelines.errors import EngineError, PipelineFailedError
from foldfeed.pipelines.interrupt import StoppedBySignal, hold_back_interrupts
from foldfeed.pipelines.runners import LOCAL_RUNNER

# A cancelled Spark job is over in a second or two; its executors end their programs within five.
CANCEL_S = 60.0

_FLAG = re.compile(r"--([A-Za-z0-9_]+)(?:=(.*))?", re.DOTALL)


def make_options(runner: str, workers: int, extra: Sequence[str]) -> PipelineOptions:
    """Returns Beam's options for a build.

    Args:
      runner: as `choose_runner` returned it.
      workers: threads of the local runner; other engines have options of their own.
      extra: further Beam options, ``--name=value`` or ``--name value``.
    Raises:
      EngineError: an option that is refused, given twice, or (for the local runner) unknown to Beam.
    """
    given = {match.group(1): match.group(2) for word in extra if (match := _FLAG.fullmatch(word))}
    if "runner" in given:
        raise EngineError("--runner", "give it before '--', as an option of foldfeed build")
    if "save_main_session" in given:
        raise EngineError(
            "--save_main_session", "not needed, because every step lives in an installed module"
        )
    if runner != LOCAL_RUNNER:
        options = PipelineOptions([f"--runner={runner}", *extra])
        # `deploy/spark/boot.py` refuses a worker with another one.
        options.view_as(DebugOptions).add_experiment(f"foldfeed_version={version('foldfeed')}")
        return options
    _check_local(given, extra)
    return PipelineOptions(
        [
            f"--runner={LOCAL_RUNNER}",
            f"--direct_num_workers={workers}",
            "--direct_running_mode=multi_threading",
            *extra,
        ]
    )


def _check_local(given: dict[str, str | None], extra: Sequence[str]) -> None:
    if "direct_num_workers" in given:
        raise EngineError("--direct_num_workers", "use foldfeed's own --workers")
    if "direct_running_mode" in given:
        raise EngineError(
            "--direct_running_mode",
            "foldfeed always uses multi_threading, because multi_processing hangs for ever when a worker "
            "dies; the searches are processes of their own and run in parallel anyway",
        )
    parser = _BeamArgumentParser(allow_abbrev=False, add_help=False)
    for options in PipelineOptions.__subclasses__():
        with contextlib.suppress(argparse.ArgumentError):
            options._add_argparse_args(parser)
    unknown = parser.parse_known_args(list(extra))[1]
    if unknown:
        # Beam itself only logs "Discarding unparseable args", and a typing error would go unnoticed.
        raise EngineError(unknown[0], f"Beam {beam.__version__} knows no such option")


def run_pipeline(options: PipelineOptions, build: Callable[[beam.Pipeline], None]) -> None:
    """Builds a pipeline and runs it to its end.

    Args:
      options: of `make_options`.
      build: adds the graph to an empty pipeline.
    Raises:
      PipelineFailedError: the engine reports an error or another end than DONE.
      StoppedBySignal: the job was cancelled and is over, or the exception says why it may run on.
    """
    try:
        _require_job_server(options.view_as(PortableOptions))
        pipeline = beam.Pipeline(options=options)
        build(pipeline)
        state = _run(pipeline, is_local=options.view_as(StandardOptions).runner == LOCAL_RUNNER)
    except PipelineFailedError:
        raise
    except Exception as error:
        raise failure_of(str(error) or type(error).__name__) from error
    if state is not None and state != PipelineState.DONE:
        raise PipelineFailedError("", f"the engine ended with state {state}.")


def _require_job_server(options: PortableOptions) -> None:
    """Returns once the job server that an option names takes connections; Beam itself would not name it."""
    endpoint = options.job_endpoint
    if not endpoint or endpoint == "embed":
        return
    with grpc.insecure_channel(endpoint) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=options.job_server_timeout)
        except grpc.FutureTimeoutError as error:
            raise PipelineFailedError(
                "",
                f"no job server answered at {endpoint} (--job_endpoint) within "
                f"{options.job_server_timeout} s (--job_server_timeout); start it or correct the option.",
            ) from error


def _run(pipeline: beam.Pipeline, is_local: bool) -> str | None:
    result: PipelineResult | None = None
    try:
        # A job that runs elsewhere is known by name, and can be cancelled, only when it was handed over; the
        # local runner does all its work in this call.
        with contextlib.nullcontext() if is_local else hold_back_interrupts():
            result = pipeline.run()
        return result.wait_until_finish()
    except StoppedBySignal as stop:
        if result is not None and not is_local:
            stop.problem = _cancel(result)
        raise


def _cancel(result: PipelineResult) -> str:
    """Cancels a job and waits for its end; returns why it may run on, "" when it is over."""
    end = time.monotonic() + CANCEL_S
    try:
        result.cancel()
        while not PipelineState.is_terminal(result.state):
            if time.monotonic() > end:
                return f"the engine did not end the job within {CANCEL_S:g} s"
            time.sleep(0.2)
    except (grpc.RpcError, OSError, RuntimeError) as error:
        # The build ends by the signal all the same, and says this.
        return f"the engine did not take the cancellation: {failure_of(str(error)).reason}"
    return ""


@contextlib.contextmanager
def quiet_beam() -> Iterator[None]:
    """Keeps Beam's own lines off the terminal; a failed run ends in one typed error instead.

    Beam's worker logs the traceback of a failed step and also prints it (`SdkWorker._execute`), so a `print`
    of its own is put before the built-in one. A job service's messages, the whole stack trace of a failed job
    among them, come through the root logger. The same text is the cause of the typed error.
    """
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    logging.root.addFilter(_is_not_beams)
    vars(sdk_worker)["print"] = _print_nothing
    try:
        yield
    finally:
        vars(sdk_worker).pop("print", None)
        logging.root.removeFilter(_is_not_beams)
        logger.setLevel(level)


def _is_not_beams(record: logging.LogRecord) -> bool:
    return "/apache_beam/" not in record.pathname


def _print_nothing(*_: object, **__: object) -> None:
    return
