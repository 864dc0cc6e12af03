"""Beam engines: with which options they run.

Owns the mapping from a runner's name and extra options to Beam's `PipelineOptions`, and the refusals of
options that hold for all. Does not own what one engine needs (`beam.dataflow`,
`beam.flink`), the graph, nor how an engine's error reads (`beam.errors`).
Imports Beam, so it is itself imported only when a build runs.

Invariant: a runner known to lose or mix records, or to hang, is refused before anything is searched.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import (
    DebugOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
)
from apache_beam.runners.runner import PipelineResult, PipelineState
from apache_beam.runners.worker import sdk_worker

from foldfeed.pipelines.beam.dataflow import DataflowEngine
from foldfeed.pipelines.beam.errors import failure_of
from foldfeed.pipelines.beam.flink import FlinkEngine
from foldfeed.pipelines.beam.runners import DATAFLOW, FLINK, LOCAL_RUNNER
from foldfeed.pipelines.beam.words import refuse_given, refuse_unknown
from foldfeed.pipelines.build_config import BuildConfig
from foldfeed.pipelines.errors import PipelineFailedError
from foldfeed.pipelines.programs.interrupt import StoppedBySignal, hold_back_interrupts

# A cancelled Spark job is over in a second or two; its executors end their programs within five.
CANCEL_S = 60.0

# Refused whatever the engine.
_REFUSED = {
    "runner": "give it before '--', as an option of foldfeed build",
    "save_main_session": "not needed, because every step lives in an installed module",
}
_REFUSED_LOCALLY = {
    "direct_num_workers": "use foldfeed's own --workers",
    "direct_running_mode": "foldfeed always uses multi_threading, because multi_processing hangs for ever "
    "when a worker dies; the searches are processes of their own and run in parallel anyway",
}


def options_of(config: BuildConfig, runner: str) -> PipelineOptions:
    """Returns Beam's options for a build.

    Args:
      config: of the build.
      runner: as `choose_runner` returned it.
    Raises:
      EngineError: an option that is refused, missing or contradicts another.
    """
    refuse_given(config.beam_options, _REFUSED)
    if runner == DATAFLOW:
        return PipelineOptions(DataflowEngine.of(config).beam_words())
    if runner == FLINK:
        return _with_version(PipelineOptions(FlinkEngine.of(config).beam_words()))
    return make_options(runner, config.num_workers, config.beam_options)


def search_hints(config: BuildConfig, runner: str) -> dict[str, str]:
    """Returns Beam's resource hints for the steps that search; none where the engine would not use them."""
    return DataflowEngine.of(config).search_hints() if runner == DATAFLOW else {}


def make_options(runner: str, workers: int, extra: Sequence[str]) -> PipelineOptions:
    """Returns Beam's options for a runner without a class of its own.

    Args:
      runner: as `choose_runner` returned it.
      workers: threads of the local runner; other engines have options of their own.
      extra: further Beam options, ``--name=value`` or ``--name value``.
    Raises:
      EngineError: an option that is refused, given twice, or (for the local runner) unknown to Beam.
    """
    refuse_given(extra, _REFUSED)
    if runner != LOCAL_RUNNER:
        return _with_version(PipelineOptions([f"--runner={runner}", *extra]))
    refuse_given(extra, _REFUSED_LOCALLY)
    refuse_unknown(extra)
    return PipelineOptions(
        [
            f"--runner={LOCAL_RUNNER}",
            f"--direct_num_workers={workers}",
            "--direct_running_mode=multi_threading",
            *extra,
        ]
    )


def _with_version(options: PipelineOptions) -> PipelineOptions:
    """Returns options that tell workers the version here; `deploy/spark/boot.py` refuses one with another."""
    options.view_as(DebugOptions).add_experiment(f"foldfeed_version={version('foldfeed')}")
    return options


def start_pipeline(options: PipelineOptions, build: Callable[[beam.Pipeline], None]) -> str:
    """Builds a pipeline and hands it to its engine; returns the engine's name for the job, "" if it has none.

    Args:
      options: of `options_of`.
      build: adds the graph to an empty pipeline.
    Raises:
      PipelineFailedError: the engine did not take it.
    """
    try:
        pipeline = beam.Pipeline(options=options)
        build(pipeline)
        # Only Dataflow's result has a job.
        result: Any = pipeline.run()
    except Exception as error:
        raise failure_of(str(error) or type(error).__name__) from error
    return str(result.job_id()) if getattr(result, "has_job", False) else ""


def run_pipeline(options: PipelineOptions, build: Callable[[beam.Pipeline], None]) -> None:
    """Builds a pipeline and runs it to its end.

    Args:
      options: of `options_of`.
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
    # Beam ends a job server that it started when Python ends, long after this block, and warns of it.
    logging.getLogger("apache_beam.utils.subprocess_server").setLevel(logging.ERROR)
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
