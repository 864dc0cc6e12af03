"""What every engine takes and refuses: one table, engine by engine, and the refusals' own words."""

import dataclasses

import pytest
from apache_beam.options.pipeline_options import (
    DebugOptions,
    DirectOptions,
    GoogleCloudOptions,
    PortableOptions,
    SetupOptions,
    StandardOptions,
)

from foldfeed.pipelines import BuildConfig, DatabaseSpec
from foldfeed.pipelines.beam.engine import options_of, search_hints
from foldfeed.pipelines.beam.runners import choose_runner
from foldfeed.pipelines.cli.build import build
from foldfeed.pipelines.errors import EngineError

LOCAL = BuildConfig(
    queries=("q.fasta",),
    databases=(DatabaseSpec(name="uniref90", paths=("/databases/u.fasta",), tool="jackhmmer"),),
    store="store",
)
CLOUD = dataclasses.replace(
    LOCAL,
    queries=("gs://bucket/q.fasta",),
    store="gs://bucket/store",
    workers=4,
    cpus_per_search=2,
    beam_options=(
        *("--project=my-project", "--region=europe-west4", "--temp_location=gs://bucket/temp"),
        *("--sdk_container_image=registry/foldfeed:0.1.0", "--databases_folder=/databases"),
    ),
)
FLINK = dataclasses.replace(
    LOCAL,
    workers=2,
    beam_options=(
        *("--flink_master=host:8081", "--flink_job_server_jar=/jars/server.jar"),
        *("--environment_type=PROCESS", '--environment_config={"command":"/boot.sh"}'),
    ),
)
PORTABLE = dataclasses.replace(LOCAL, beam_options=("--job_endpoint=127.0.0.1:8099",))
LOSES = "mixes tagged outputs"

# (what a person writes, configuration, options added, the runner that runs or the words of the refusal)
MATRIX = [
    ("FnApiRunner", LOCAL, (), "FnApiRunner"),
    ("fnapi", LOCAL, (), "FnApiRunner"),
    ("DirectRunner", LOCAL, (), "FnApiRunner"),
    ("direct", LOCAL, (), "FnApiRunner"),
    ("SwitchingDirectRunner", LOCAL, (), "FnApiRunner"),
    ("BundleBasedDirectRunner", LOCAL, (), "FnApiRunner"),
    ("apache_beam.runners.portability.fn_api_runner.FnApiRunner", LOCAL, (), "FnApiRunner"),
    ("FnApiRunner", LOCAL, ("--direct_running_mode=multi_processing",), "hangs for ever when a worker dies"),
    ("DirectRunner", LOCAL, ("--direct_num_workers", "4"), "use foldfeed's own --workers"),
    ("FnApiRunner", LOCAL, ("--jobname=x",), "knows no such option"),
    ("FnApiRunner", LOCAL, ("--databases_folder=/d",), "knows no such option"),
    ("DaskRunner", LOCAL, (), LOSES),
    ("dask", LOCAL, (), LOSES),
    ("apache_beam.runners.dask.dask_runner.DaskRunner", LOCAL, (), LOSES),
    ("beam_pyspark_runner.pyspark_runner.PySparkRunner", LOCAL, (), LOSES),
    ("InteractiveRunner", LOCAL, (), "made for notebooks"),
    ("PrismRunner", LOCAL, (), "downloads a program when it starts"),
    ("KafkaStreamsRunner", LOCAL, (), "ships it in no release"),
    ("RenderRunner", LOCAL, (), "runs nothing"),
    ("SamzaRunner", LOCAL, (), "no such runner; one of FnApiRunner"),
    ("my.own.LabRunner", LOCAL, (), "my.own.LabRunner"),
    ("PortableRunner", PORTABLE, (), "PortableRunner"),
    ("SparkRunner", PORTABLE, (), "SparkRunner"),
    ("FlinkRunner", FLINK, (), "FlinkRunner"),
    ("flink", FLINK, (), "FlinkRunner"),
    ("FlinkRunner", LOCAL, (), "--flink_master: missing"),
    ("FlinkRunner", FLINK, ("--flink_master=[local]",), "must be HOST:PORT"),
    ("FlinkRunner", FLINK, ("--flink_master=[auto]",), "must be HOST:PORT"),
    ("FlinkRunner", FLINK, ("--environment_type=LOOPBACK",), "the cluster would search nothing"),
    ("FlinkRunner", FLINK, ("--environment_config=/boot.sh",), 'needs {"command":"/path/of/boot.sh"}'),
    ("FlinkRunner", FLINK, ("--environment_config={}",), 'needs {"command":"/path/of/boot.sh"}'),
    ("FlinkRunner", FLINK, ("--parallelism=3",), "--workers is 2"),
    ("FlinkRunner", FLINK, ("--flink_submit_uber_jar",), "hears nothing of a job that fails"),
    ("FlinkRunner", FLINK, ("--job_endpoint=host:1",), "--runner PortableRunner"),
    ("FlinkRunner", FLINK, ("--spark_version=3",), "an option of SparkRunner"),
    ("FlinkRunner", FLINK, ("--machine_type=n2-standard-4",), "an option of DataflowRunner"),
    ("FlinkRunner", FLINK, ("--streaming",), "it is a batch job"),
    ("FlinkRunner", FLINK, ("--paralelism=3",), "knows no such option"),
    ("DataflowRunner", CLOUD, (), "DataflowRunner"),
    ("dataflow", CLOUD, (), "DataflowRunner"),
    ("apache_beam.runners.dataflow.dataflow_runner.DataflowRunner", CLOUD, (), "DataflowRunner"),
    ("DataflowRunner", CLOUD, ("--machine_type=n2-standard-8",), "DataflowRunner"),
    ("DataflowRunner", CLOUD, ("--machine_type=n2-custom-8-32768",), "DataflowRunner"),
    ("DataflowRunner", CLOUD, ("--machine_type=c3-standard-4-lssd",), "it has 4 CPUs; --workers 4"),
    ("DataflowRunner", CLOUD, ("--dataflow_service_options=enable_prime",), "DataflowRunner"),
    ("DataflowRunner", CLOUD, ("--setup_file=setup.py",), "the worker image has everything"),
    ("DataflowRunner", CLOUD, ("--extra_package=x.whl",), "the worker image has everything"),
    ("DataflowRunner", CLOUD, ("--resource_hints=min_ram=9GB",), "it would hold for the cheap steps"),
    ("DataflowRunner", CLOUD, ("--number_of_worker_harness_threads=9",), "foldfeed's own --workers"),
    ("DataflowRunner", CLOUD, ("--experiments=use_multiple_sdk_containers",), "a process for every CPU"),
    ("DataflowRunner", CLOUD, ("--experiments=disable_runner_v2",), "knows neither the image"),
    ("DataflowRunner", CLOUD, ("--environment_type=DOCKER",), "an option of portable runners"),
    ("DataflowRunner", CLOUD, ("--flink_master=host:1",), "an option of FlinkRunner"),
    ("DataflowRunner", CLOUD, ("--streaming",), "it is a batch job"),
    ("DataflowRunner", CLOUD, ("--search_ram=lots",), "a number with a unit"),
    ("DataflowRunner", CLOUD, ("--temp_location=/tmp",), "it must be in a bucket"),
    ("DataflowRunner", CLOUD, ("--staging_location=gs://b",), "it must be in a bucket"),
    ("DataflowRunner", CLOUD, ("--databases_folder=/data",), "not in --databases_folder=/data"),
    ("DataflowRunner", CLOUD, ("--save_main_session",), "not needed"),
    ("DataflowRunner", CLOUD, ("--runner=FlinkRunner",), "before '--'"),
    ("DataflowRunner", CLOUD, ("--regoin=x",), "knows no such option"),
    ("DataflowRunner", CLOUD, ("--num_workers=many",), "--num_workers: invalid int value: 'many'"),
    ("DataflowRunner", CLOUD, ("--search_ram",), "--search_ram: expected one argument"),
    ("FnApiRunner", LOCAL, ("--job_name",), "--job_name: expected one argument"),
]


@pytest.mark.parametrize(("asked", "config", "added", "expected"), MATRIX)
def test_what_an_engine_takes_and_what_it_refuses(asked, config, added, expected):
    config = dataclasses.replace(config, runner=asked, beam_options=(*config.beam_options, *added))
    if " " in expected:
        with pytest.raises(EngineError) as caught:
            options_of(config, choose_runner(asked)[0])
        assert expected in str(caught.value)
        return
    runner, note = choose_runner(asked)
    assert runner == expected
    assert (note is not None) == ("irect" in asked)
    assert options_of(config, runner).view_as(StandardOptions).runner == expected


@pytest.mark.parametrize(
    "name", ["project", "region", "temp_location", "sdk_container_image", "databases_folder"]
)
def test_what_dataflow_must_be_told(name):
    rest = tuple(word for word in CLOUD.beam_options if not word.startswith(f"--{name}="))
    with pytest.raises(EngineError, match=f"--{name}: missing; "):
        options_of(dataclasses.replace(CLOUD, beam_options=rest), "DataflowRunner")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": ("q.fasta",)}, "--queries q.fasta: a path of this machine"),
        (
            {"queries": ("gs://b/q.fasta", "file:///q.fasta")},
            "--queries file:///q.fasta: a path of this machine",
        ),
        ({"store": "store"}, "--store store: a path of this machine"),
        ({"results": "/results"}, "--results /results: a path of this machine"),
        ({"workers": None}, "--workers: missing; say how many searches a worker runs at a time, or name"),
    ],
)
def test_dataflow_refuses_what_its_workers_would_not_see(change, words):
    with pytest.raises(EngineError) as caught:
        options_of(dataclasses.replace(CLOUD, **change), "DataflowRunner")
    assert words in str(caught.value)


def test_databases_that_only_look_as_if_they_were_in_the_folder_are_refused():
    spec = DatabaseSpec(name="u", paths=("/databases/a.fasta", "/databases2/b.fasta"), tool="jackhmmer")
    with pytest.raises(EngineError, match=r"u=/databases2/b\.fasta: not in --databases_folder=/databases,"):
        options_of(dataclasses.replace(CLOUD, databases=(spec,)), "DataflowRunner")


def test_prime_and_a_machine_contradict_each_other():
    words = ("--dataflow_service_options=enable_prime", "--machine_type=n2-standard-8")
    with pytest.raises(EngineError, match="Prime chooses machines"):
        options_of(dataclasses.replace(CLOUD, beam_options=(*CLOUD.beam_options, *words)), "DataflowRunner")


def test_the_searches_of_a_worker_come_from_its_machine():
    config = dataclasses.replace(
        CLOUD, workers=None, beam_options=(*CLOUD.beam_options, "--machine_type=n2-highmem-16")
    )
    options = options_of(config, "DataflowRunner")
    assert options.view_as(DebugOptions).number_of_worker_harness_threads == 8
    hints = search_hints(config, "DataflowRunner")
    assert hints == {"cpu_count": "16", "min_ram": f"{8 * 4 * 10**9 + 2 * 10**9}B"}
    too_small = dataclasses.replace(
        config, cpus_per_search=8, beam_options=(*CLOUD.beam_options, "--machine_type=e2-standard-4")
    )
    with pytest.raises(EngineError, match="it has 4 CPUs, one search has 8 threads"):
        options_of(too_small, "DataflowRunner")
    unknown = dataclasses.replace(config, beam_options=(*CLOUD.beam_options, "--machine_type=e2-micro"))
    with pytest.raises(EngineError, match="are not in its name"):
        options_of(unknown, "DataflowRunner")


def test_dataflow_gets_the_image_threads_and_a_place_for_its_files():
    options = options_of(CLOUD, "DataflowRunner")
    assert options.view_as(SetupOptions).sdk_location == "container"
    assert options.view_as(GoogleCloudOptions).staging_location == "gs://bucket/temp/staging"
    assert options.view_as(DebugOptions).lookup_experiment("no_use_multiple_sdk_containers")
    named = dataclasses.replace(CLOUD, beam_options=(*CLOUD.beam_options, "--staging_location=gs://bucket/s"))
    assert options_of(named, "DataflowRunner").view_as(GoogleCloudOptions).staging_location == "gs://bucket/s"


def test_flink_gets_its_parallelism_and_workers_that_are_used_again():
    portable = options_of(FLINK, "FlinkRunner").view_as(PortableOptions)
    assert (portable.sdk_worker_parallelism, portable.environment_cache_millis) == ("1", "600000")
    own = dataclasses.replace(FLINK, beam_options=(*FLINK.beam_options, "--environment_cache_millis=5"))
    assert options_of(own, "FlinkRunner").view_as(PortableOptions).environment_cache_millis == "5"
    nothing = dataclasses.replace(FLINK, workers=None)
    with pytest.raises(EngineError, match="--workers: missing"):
        options_of(nothing, "FlinkRunner")
    for name in ("flink_job_server_jar", "environment_type"):
        rest = tuple(word for word in FLINK.beam_options if name not in word)
        with pytest.raises(EngineError, match=f"--{name}: missing"):
            options_of(dataclasses.replace(FLINK, beam_options=rest), "FlinkRunner")


def test_the_example_of_the_help_is_taken():
    """The words of `foldfeed build --help` for Flink."""
    text = " ".join(build.help.split())
    words = text.partition("--runner flink --workers 64 -- ")[2].partition(" foldfeed build")[0]
    found = tuple(word for word in words.split() if word != "\\")
    assert len(found) == 4
    config = dataclasses.replace(LOCAL, workers=64, beam_options=found)
    assert options_of(config, "FlinkRunner").view_as(PortableOptions).environment_config == "localhost:50000"


def test_the_embedded_engine_gets_threads_and_no_hints():
    options = options_of(dataclasses.replace(LOCAL, workers=3), "FnApiRunner")
    direct = options.view_as(DirectOptions)
    assert (direct.direct_num_workers, direct.direct_running_mode) == (3, "multi_threading")
    assert [search_hints(LOCAL, name) for name in ("FnApiRunner", "SparkRunner", "FlinkRunner")] == [
        {},
        {},
        {},
    ]
