"""The job that Dataflow would get, made by Beam without a network, and the flex template around it."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys

import fsspec
import pytest
from pipelines_data import ROOT, globins, needs_hmmer, write_fasta

from foldfeed.pipelines import BuildConfig, DatabaseSpec
from foldfeed.pipelines.errors import ConfigError, EngineError
from foldfeed.pipelines.template import PARAMETERS, config_of, main, metadata

LAUNCH = {
    "queries": "gs://bucket/a.fasta;gs://bucket/b.fasta.gz",
    "databases": "uniref90=/databases/u.fasta;uniref30=/databases/hh/db:hhblits",
    "store": "gs://bucket/store",
}
# What the launcher itself adds, as Dataflow's logs show it.
BEAMS = (
    *("--runner=DataflowRunner", "--project=my-project", "--region=europe-west4", "--job_name=my-build"),
    *("--temp_location=gs://bucket/temp", "--staging_location=gs://bucket/staging"),
    *("--template_location=gs://bucket/staging/job_object", "--sdk_container_image=registry/foldfeed:0.1.0"),
    "--machine_type=n2-standard-4",
)


def words(**changes: str) -> list[str]:
    return [*(f"--{name}={value}" for name, value in (LAUNCH | changes).items()), *BEAMS]


def test_the_metadata_are_those_of_the_launcher():
    lies_there = json.loads((ROOT / "deploy" / "dataflow" / "metadata.json").read_text())
    assert lies_there == metadata()
    assert [one["name"] for one in lies_there["parameters"]] == [one.name for one in PARAMETERS]
    for one in lies_there["parameters"]:
        # What Google's documentation asks of a parameter.
        assert re.fullmatch(r"[A-Za-z_]\w*", one["name"])
        assert one["label"]
        assert one["helpText"]
        (pattern,) = one["regexes"]
        assert pattern.startswith("^")
        assert pattern.endswith("$")
        if "defaultValue" in one:
            assert one["isOptional"]
            assert re.match(pattern, one["defaultValue"])
    required = {one["name"] for one in lies_there["parameters"] if not one["isOptional"]}
    assert required == set(LAUNCH)
    assert all(re.match(one["regexes"][0], LAUNCH[one["name"]]) for one in lies_there["parameters"][:3])


def test_a_launch_becomes_a_build():
    config = config_of([*words(), "--workers=2", "--max_hits=uniref90=50;uniref30=7", "--search_engine=fast"])
    assert config.queries == ("gs://bucket/a.fasta", "gs://bucket/b.fasta.gz")
    assert [(one.name, one.tool, one.paths) for one in config.databases] == [
        ("uniref90", "jackhmmer", ("/databases/u.fasta",)),
        ("uniref30", "hhblits", ("/databases/hh/db",)),
    ]
    assert (config.store, config.results) == ("gs://bucket/store", "gs://bucket/store.results")
    assert (config.workers, config.engine, config.max_hits) == (2, "fast", {"uniref90": 50, "uniref30": 7})
    assert config.runner == "DataflowRunner"
    assert "--runner=DataflowRunner" not in config.beam_options
    assert "--databases_folder=/databases" in config.beam_options


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"queries": "q.fasta"}, "'queries' is 'q.fasta', which does not match"),
        ({"queries": "gs://bucket/a.fasta,gs://bucket/b c"}, "'queries' is"),
        ({"store": "gs://b"}, "'store' is 'gs://b'"),
        ({"databases": "uniref90"}, "'databases' is 'uniref90'"),
        ({"search_engine": "fastest"}, "'search_engine' is 'fastest'"),
        ({"workers": "0"}, "'workers' is '0'"),
        ({"timeout": "1h"}, "'timeout' is '1h'"),
    ],
)
def test_parameters_of_another_form_are_refused(change, said):
    with pytest.raises(ConfigError) as caught:
        config_of(words(**change))
    assert said in str(caught.value)


def test_a_missing_parameter_is_named_and_the_launcher_ends_with_one_line(capsys):
    assert main([word for word in words() if not word.startswith("--store=")]) == 1
    assert capsys.readouterr().err.startswith("error: parameter 'store' is missing: Where the records go")


def test_the_launcher_script_prints_the_metadata():
    script = ROOT / "deploy" / "dataflow" / "launcher.py"
    line = [sys.executable, str(script), "--print-metadata"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == metadata()


@pytest.fixture
def staged(monkeypatch) -> dict[str, bytes]:
    """What Beam would have put into the bucket: its upload is caught, and its look at the bucket's policy."""
    pytest.importorskip("apitools", reason="no Dataflow client: pip install 'foldfeed[dataflow]'")
    from apache_beam.options.pipeline_options import GoogleCloudOptions

    apiclient = importlib.import_module("apache_beam.runners.dataflow.internal.apiclient")
    files: dict[str, bytes] = {}

    def stage_file(self, folder, name, stream, mime_type=None, total_size=None):
        files[name] = stream.read()

    monkeypatch.setattr(apiclient.DataflowApplicationClient, "stage_file", stage_file)
    monkeypatch.setattr(GoogleCloudOptions, "_warn_if_soft_delete_policy_enabled", lambda *_: None)
    return files


def config_of_many(folder, count: int) -> BuildConfig:
    """A build of so many sequences, each another one; queries and store lie where no worker's disk is."""
    letters = "ACDEFGHIKLMNPQRSTVWY"
    url = f"memory://{folder.name}/q-{count:07}.fasta"
    with fsspec.open(url, "w") as file:
        for number in range(count):
            digits = (letters[number // 20**place % 20] for place in range(6))
            file.write(f">r{number}\nMKT{''.join(digits)}\n")
    database = write_fasta(folder / "u.fasta", globins(5))
    return BuildConfig(
        queries=(url,),
        databases=(
            DatabaseSpec(name="uniref90", paths=(str(database),), tool="jackhmmer"),
            DatabaseSpec(name="other", paths=(str(database), str(folder / "v.fasta")), tool="jackhmmer"),
        ),
        store=f"memory://{folder.name}/store-{count:07}",
        parts=3,
        runner="dataflow",
        beam_options=(
            *(word for word in BEAMS if not word.startswith("--runner")),
            *("--no_auth", f"--databases_folder={folder}"),
        ),
    )


@pytest.mark.external_tool
@needs_hmmer
def test_the_job_has_two_environments_stable_names_and_the_size_of_any_other(tmp_path, staged):
    from apache_beam.portability.api import beam_runner_api_pb2 as api

    from foldfeed.pipelines.building.submit import submit_build

    write_fasta(tmp_path / "v.fasta", {"more": "MKTAYIAKQRQISFVK"})
    jobs = []
    for count in (10, 3000):
        submitted = submit_build(config_of_many(tmp_path, count))
        assert (submitted.num_queries, submitted.num_planned) == (count, 2 * count)
        jobs.append((json.loads(staged["job_object"]), staged["pipeline.pb"], len(staged["job_object"])))
    (job, graph, size), (_, larger_graph, larger_size) = jobs
    proto, larger = (api.Pipeline.FromString(data) for data in (graph, larger_graph))
    # Nothing of the sequences is in the job: names of files only.
    assert len(proto.components.transforms) == len(larger.components.transforms)
    assert abs(larger_size - size) <= size / 100
    assert abs(len(larger_graph) - len(graph)) <= len(graph) / 100
    environments = proto.components.environments
    hints = {key: dict(one.resource_hints) for key, one in environments.items()}
    assert sorted(len(one) for one in hints.values()) == [0, 2]
    (searching,) = (key for key, one in hints.items() if one)
    assert hints[searching] == {
        "beam:resources:cpu_count:v1": b"4",
        "beam:resources:min_ram_bytes:v1": b"%d" % (4 * 4 * 10**9 + 2 * 10**9),
    }
    names = {one.unique_name: one for one in proto.components.transforms.values()}
    assert {name for name, one in names.items() if one.environment_id == searching} == {
        "SearchAll/Search",
        "SearchAll/ScanShards",
    }
    # The steps that a person sees, and that an update of a job would match.
    assert {name for name in names if name.count("/") == 1 and "ref_" not in name} == {
        *(f"ReadQueries/{step}" for step in ("Files", "Read", "Rejects", "Valid", "KeyById", "GroupById")),
        *(f"ReadQueries/{step}" for step in ("FirstWins", "Queries", "Losers", "DeadOnRead")),
        *(f"SearchAll/{step}" for step in ("Units", "GroupByUnit", "JoinUnits", "ShardUnits", "ByGroup")),
        *(f"SearchAll/{step}" for step in ("GroupScans", "ScanBatches", "SpreadScans")),
        *(f"SearchAll/{step}" for step in ("ScanShards", "GroupShards", "WithScans", "Search", "Receipts")),
        *(f"SearchAll/{step}" for step in ("ReceiptsByRecord", "ByRecord", "GroupByRecord", "Completed")),
        *(f"WriteParts/{step}" for step in ("ByPart", "PartNumbers", "AllParts", "EmptyParts", "WithEmpty")),
        *(f"WriteParts/{step}" for step in ("GroupByPart", "WritePart")),
    }
    assert larger.components.transforms.keys() == proto.components.transforms.keys()
    (pool,) = job["environment"]["workerPools"]
    assert {one["containerImage"] for one in pool["sdkHarnessContainerImages"]} == {"registry/foldfeed:0.1.0"}
    assert len(pool["sdkHarnessContainerImages"]) == 2
    assert all(one["useSingleCorePerContainer"] for one in pool["sdkHarnessContainerImages"])
    assert (pool["numThreadsPerWorker"], pool["machineType"]) == (4, "n2-standard-4")
    assert "no_use_multiple_sdk_containers" in job["environment"]["experiments"]
    assert "use_multiple_sdk_containers" not in job["environment"]["experiments"]
    assert (job["type"], job["name"]) == ("JOB_TYPE_BATCH", "my-build")
    payloads = [len(one.spec.payload) for one in proto.components.transforms.values()]
    assert max(payloads) < 32_000


@pytest.mark.external_tool
@needs_hmmer
def test_a_launch_that_cannot_work_submits_nothing(tmp_path, staged):
    from foldfeed.pipelines.building.submit import submit_build

    write_fasta(tmp_path / "v.fasta", {"more": "MKTAYIAKQRQISFVK"})
    config = config_of_many(tmp_path, 3)
    rest = tuple(word for word in config.beam_options if "sdk_container_image" not in word)
    with pytest.raises(EngineError, match="the worker image"):
        submit_build(dataclasses.replace(config, beam_options=rest))
    assert not staged
