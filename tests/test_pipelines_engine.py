"""Which Beam runners and options are taken, which are refused, and how an engine's failure reads."""

import os
import runpy
import signal
import socket
import time

import pytest
from apache_beam.options.pipeline_options import (
    DebugOptions,
    DirectOptions,
    PortableOptions,
    StandardOptions,
)
from pipelines_data import ROOT

from foldfeed.pipelines.beam.engine import make_options, quiet_beam, run_pipeline
from foldfeed.pipelines.beam.errors import failure_of
from foldfeed.pipelines.beam.runners import choose_runner
from foldfeed.pipelines.errors import EngineError, PipelineFailedError
from foldfeed.pipelines.programs.interrupt import (
    StoppedBySignal,
    hold_back_interrupts,
    stop_searches_on_interrupt,
)


@pytest.mark.parametrize(
    "runner",
    [
        "DaskRunner",
        "apache_beam.runners.dask.dask_runner.DaskRunner",
        "beam_pyspark_runner.pyspark_runner.PySparkRunner",
    ],
)
def test_runners_that_lose_records_are_refused_with_the_reason(runner):
    with pytest.raises(EngineError, match="mixes tagged outputs") as caught:
        choose_runner(runner)
    assert caught.value.option == f"--runner {runner}"


def test_the_direct_runner_is_mapped_and_others_pass():
    runner, note = choose_runner("DirectRunner")
    assert runner == "FnApiRunner"
    assert "download another runner" in note
    assert choose_runner("SparkRunner") == ("SparkRunner", None)


def test_the_local_runner_gets_threads():
    options = make_options("FnApiRunner", 3, ["--job_name=x"])
    assert options.view_as(StandardOptions).runner == "FnApiRunner"
    direct = options.view_as(DirectOptions)
    assert (direct.direct_num_workers, direct.direct_running_mode) == (3, "multi_threading")


def test_other_runners_get_their_own_options():
    options = make_options("FlinkRunner", 3, ["--environment_type=EXTERNAL", "--anything=goes"])
    assert options.view_as(PortableOptions).environment_type == "EXTERNAL"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--direct_running_mode=multi_processing"], "hangs for ever"),
        (["--direct_num_workers", "4"], "--workers"),
        (["--runner=SparkRunner"], "before '--'"),
        (["--save_main_session"], "not needed"),
        (["--jobname=typo"], "knows no such option"),
    ],
)
def test_options_that_cannot_work_are_refused(extra, words):
    with pytest.raises(EngineError, match=words):
        make_options("FnApiRunner", 1, extra)


def test_a_workers_error_is_found_in_an_engines_text():
    text = (
        "Traceback (most recent call last):\n  File x, line 1, in process\n"
        "foldfeed.pipelines.errors.WorkerError: no space left on '/x'. Free some. "
        "[while running 'A/WritePart']\n"
    )
    error = failure_of(f"{text}\nDuring handling of the above exception\n{text}")
    assert (error.stage, error.reason) == ("A/WritePart", "no space left on '/x'. Free some.")


def test_any_other_error_is_its_last_line():
    error = failure_of(
        "Traceback\n  File x\nZeroDivisionError: division by zero [while running 'B/Search']\n"
    )
    assert (error.stage, error.reason) == ("B/Search", "ZeroDivisionError: division by zero.")
    assert failure_of("").reason == "no message."


# What Spark's DAGScheduler says of a failed task, around what Beam's worker says; then Beam's job service.
SPARK = """Pipeline BeamApp-root-1129_5d9 failed in state FAILED: org.apache.spark.SparkException: \
Job aborted due to stage failure: Task 1 in stage 3.0 failed 4 times, most recent failure: \
Lost task 1.3 in stage 3.0 (TID 21) (10.0.0.7 executor 0): {error}
\tat java.base/java.util.concurrent.CompletableFuture.reportGet(CompletableFuture.java:396)
\tat org.apache.beam.runners.spark.translation.SparkExecutableStageFunction.call(S.java:142)
\tat org.apache.spark.rdd.RDD.$anonfun$foreach$2$adapted(RDD.scala:1012)
Caused by: {cause}
\tat org.apache.beam.runners.fnexecution.control.FnApiControlClient$ResponseStreamObserver.onNext(F.java:180)
\t... 3 more

Driver stacktrace:"""
HARNESS = "java.lang.RuntimeException: Error received from SDK harness for instruction 7: {text}"
TRACEBACK = """Traceback (most recent call last):
  File "/venv/apache_beam/runners/worker/sdk_worker.py", line 311, in _execute
    response = task()
{error} [while running 'SearchAll/Search-ptransform-12']
"""


def test_our_error_inside_a_java_stack_trace_is_one_line_with_step_and_record():
    reason = "record 'A', search in 'u': no space left on '/x'. Free some."
    said = f"foldfeed.pipelines.errors.WorkerError: {reason}"
    inner = HARNESS.format(text=TRACEBACK.format(error=said))
    error = failure_of(SPARK.format(error=f"java.util.concurrent.ExecutionException: {inner}", cause=inner))
    assert error.stage == "SearchAll/Search"
    assert error.reason == reason
    assert len(str(error).splitlines()) == 1


def test_a_python_error_inside_a_java_stack_trace_is_its_own_line_and_the_task():
    inner = HARNESS.format(text=TRACEBACK.format(error="ZeroDivisionError: seven"))
    error = failure_of(SPARK.format(error=f"java.util.concurrent.ExecutionException: {inner}", cause=inner))
    assert error.stage == "SearchAll/Search"
    assert error.reason == "ZeroDivisionError: seven [task 1.3 in stage 3.0, 10.0.0.7 executor 0]."


@pytest.mark.parametrize(
    "cause",
    [
        "org.apache.beam.vendor.grpc.v1p69p0.io.grpc.StatusRuntimeException: CANCELLED: client cancelled",
        "java.lang.IllegalStateException: Process died with exit code 137",
        "java.lang.IllegalStateException: call already cancelled",
    ],
)
def test_a_lost_worker_is_named_with_its_task(cause):
    error = failure_of(SPARK.format(error="java.util.concurrent.ExecutionException: x", cause=cause))
    assert error.reason == (
        f"a worker process was lost, killed perhaps or out of memory ({cause}) "
        "[task 1.3 in stage 3.0, 10.0.0.7 executor 0]."
    )


def test_any_other_java_error_is_its_deepest_cause():
    cause = "java.lang.OutOfMemoryError: Java heap space"
    error = failure_of(SPARK.format(error="java.util.concurrent.ExecutionException: x", cause=cause))
    assert error.reason == f"{cause} [task 1.3 in stage 3.0, 10.0.0.7 executor 0]."
    # Without a cause it is the task's own error; with nothing but noise it is never the noise.
    alone = SPARK.format(error="java.io.IOException: disk", cause="").replace("Caused by: \n", "")
    assert failure_of(alone).reason.startswith("java.io.IOException: disk [task")
    assert failure_of("some words\n\tat a.b.C.d(E.java:1)\n\nDriver stacktrace:").reason == "some words."
    assert failure_of("Driver stacktrace:").reason == "no message."


def test_messages_of_a_job_service_stay_off_the_terminal_and_others_do_not(caplog):
    def log_from(path: str, text: str) -> None:
        exec(compile(f"import logging; logging.error({text!r})", path, "exec"), {})

    with quiet_beam():
        log_from("/venv/apache_beam/runners/portability/portable_runner.py", "Driver stacktrace:")
        log_from("/venv/mine.py", "inside")
    log_from("/venv/apache_beam/runners/portability/portable_runner.py", "after")
    assert [record.getMessage() for record in caplog.records] == ["inside", "after"]


# What Spark 3.5.0 really said when an executor's Python worker got SIGKILL in a search, with fewer frames.
KILLED_WORKER = """Pipeline x failed in state FAILED: org.apache.spark.SparkException: Job aborted due to \
stage failure: Task 0 in stage 2.0 failed 4 times, most recent failure: Lost task 0.3 in stage 2.0 (TID 23) \
(127.0.0.1 executor 1): org.apache.beam.vendor.grpc.v1p60p1.io.grpc.StatusRuntimeException: CANCELLED: \
call already cancelled. Use ServerCallStreamObserver.setOnCancelHandler() to disable this exception
\tat org.apache.beam.vendor.grpc.v1p60p1.io.grpc.Status.asRuntimeException(Status.java:529)
\tat org.apache.spark.rdd.RDD.$anonfun$mapPartitions$2$adapted(RDD.scala:855)
\tat org.apache.spark.util.Utils$.tryWithSafeFinally(Utils.scala:94)
\tat java.base/java.lang.Thread.run(Thread.java:840)

Driver stacktrace:"""


def test_what_spark_says_of_a_killed_worker_names_worker_and_task():
    reason = failure_of(KILLED_WORKER).reason
    assert reason.startswith(
        "a worker process was lost, killed perhaps or out of memory (org.apache.beam.vendor"
    )
    assert reason.endswith("[task 0.3 in stage 2.0, 127.0.0.1 executor 1].")
    assert len(reason.splitlines()) == 1


# What Spark 3.5.0 really said of a second job while the first one ran, with fewer frames.
BUSY = """Pipeline x_76ab failed in state FAILED: org.apache.spark.SparkException: \
Only one SparkContext should be running in this JVM (see SPARK-2243).\
The currently running SparkContext was created at:
org.apache.spark.api.java.JavaSparkContext.<init>(JavaSparkContext.scala:58)
org.apache.beam.runners.spark.translation.SparkContextFactory.createSparkContext(SparkContextFactory.java:175)
java.base/java.lang.Thread.run(Thread.java:840)"""


def test_a_job_server_with_another_job_is_said_so():
    reason = failure_of(BUSY).reason
    assert reason.startswith(
        "this job server runs another job, and Beam's runner for Spark takes one at a time"
    )
    assert "Thread" not in reason
    assert len(reason.splitlines()) == 1


def test_a_worker_that_does_not_start_is_a_lost_worker_without_the_jobs_long_name():
    said = "Pipeline BeamApp-root-1_d2 failed in state FAILED: java.lang.IllegalStateException: "
    assert failure_of(said + "Process died with exit code 1").reason == (
        "a worker process was lost, killed perhaps or out of memory "
        "(java.lang.IllegalStateException: Process died with exit code 1)."
    )


def test_a_cluster_that_is_not_there_is_said_so():
    """What Spark 3.5.0 really said 77 s after a job was sent to a cluster whose master was dead."""
    said = "org.apache.spark.SparkException: Job 0 cancelled because SparkContext was shut down"
    assert failure_of(f"Pipeline x failed in state FAILED: {said}\n\tat a.b.C.d(E.java:1)\n").reason == (
        f"Spark ended the job: its master did not answer, or the cluster was taken away ({said})."
    )


def test_a_worker_without_foldfeed_or_with_another_one_is_said_in_words():
    said = "Pipeline x failed in state FAILED: java.lang.IllegalStateException: Process died with exit code "
    boot = runpy.run_path(str(ROOT / "deploy" / "spark" / "boot.py"))
    assert "has no foldfeed" in failure_of(f"{said}{boot['NO_FOLDFEED']}").reason
    assert "another version of foldfeed" in failure_of(f"{said}{boot['OTHER_FOLDFEED']}").reason
    sent = make_options("FlinkRunner", 1, ["--experiments=mine"]).view_as(DebugOptions).experiments
    assert boot["is_planned_version"]({"beam:option:experiments:v1": sent})
    assert not boot["is_planned_version"]({"beam:option:experiments:v1": ["mine", "foldfeed_version=0.0.7"]})
    assert boot["is_planned_version"]({"beam:option:experiments:v1": None})


def test_a_job_server_that_is_not_there_is_named():
    with socket.socket() as taken:
        # Bound and not listening: nobody answers, and nobody else can begin to.
        taken.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        options = make_options("PortableRunner", 1, [f"--job_endpoint={endpoint}", "--job_server_timeout=1"])
        with pytest.raises(PipelineFailedError) as caught:
            run_pipeline(options, lambda pipeline: None)
    assert str(caught.value).startswith(
        f"the run failed: no job server answered at {endpoint} (--job_endpoint) within 1 s"
    )


def test_a_signal_while_a_job_is_handed_over_takes_effect_right_after_it():
    done = []
    with pytest.raises(StoppedBySignal) as caught, stop_searches_on_interrupt():  # noqa: PT012 -- the order is the test
        with hold_back_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append("handed over")
        done.append("waited")
    assert done == ["handed over"]
    assert caught.value.number == signal.SIGTERM
    # Nothing is held back for the next build.
    with stop_searches_on_interrupt(), hold_back_interrupts():
        done.append("again")
    assert done == ["handed over", "again"]
