"""Which Beam runners and options are taken, which are refused, and how an engine's failure reads."""

import pytest
from apache_beam.options.pipeline_options import DirectOptions, PortableOptions, StandardOptions

from foldfeed.pipelines.engine import failure_of, make_options
from foldfeed.pipelines.errors import EngineError
from foldfeed.pipelines.runners import choose_runner


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
