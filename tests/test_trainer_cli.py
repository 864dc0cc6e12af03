"""The command line as people use it: help, exit codes, a real run on a real store, its files."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ports import free_port
from trainer_options import SMALL_CROPS, SMALL_MODEL
from trainer_ranks import rank_environment
from warm_python import Program, run_module, run_programs

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer import cli
from foldfeed.trainer.cli import command, main
from foldfeed.trainer.config import DataConfig, HeldOutConfig, ModelConfig, OptimizerConfig, RunConfig
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.options import attribute_texts

TINY = [
    *(*SMALL_CROPS, "--global-batch", "3", "--steps", "4", "--snapshot-every", "2"),
    *(*SMALL_MODEL, "--c-tri", "4", "--device", "cpu", "--lr", "0.01", "--warmup-steps", "0"),
]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``python -m foldfeed.trainer`` in a process of its own."""
    return lambda *arguments: run_module("foldfeed.trainer", arguments, tmp_path)


@pytest.fixture
def inside(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs the command line in this process (torch is loaded already); returns exit code and stderr."""
    threads = torch.get_num_threads()
    running = set(threading.enumerate())

    def call(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        # Threads of tests before, as those that read stores, may end meanwhile.
        assert set(threading.enumerate()) <= running, "a run left threads behind"
        return code, capfd.readouterr().err

    yield call
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_help_reads_docstrings_with_and_without_their_indentation(monkeypatch) -> None:
    """Python 3.13 takes the common indentation away when it compiles; older ones do not."""
    written = attribute_texts(ModelConfig)
    assert set(written) == {field.name for field in dataclasses.fields(ModelConfig)}
    monkeypatch.setattr(ModelConfig, "__doc__", inspect.cleandoc(ModelConfig.__doc__ or ""))
    assert attribute_texts(ModelConfig) == written
    first, *rest = (ModelConfig.__doc__ or "").splitlines()
    monkeypatch.setattr(ModelConfig, "__doc__", "\n".join([first, *("    " + line for line in rest)]))
    assert attribute_texts(ModelConfig) == written


def test_every_setting_has_an_option_with_a_text() -> None:
    options = {option.name: option for option in command.params}
    for config in (DataConfig, HeldOutConfig, ModelConfig, OptimizerConfig, RunConfig):
        for field in config.__dataclass_fields__:
            if field not in ("data", "model", "optimizer", "snapshots", "held_out"):
                assert field in options, field
    nameless = [name for name, option in options.items() if not getattr(option, "help", None)]
    assert nameless == []


def test_help_and_version_do_not_load_torch() -> None:
    code = (
        "import sys; from foldfeed.trainer.cli import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "torchrun --nproc-per-node 4" in done.stdout
    assert "foldfeed.trainer, version" in done.stdout


WRONG = {
    "no store": ([], "Missing option '--store'"),
    "unknown": (["--store", "s", "--output", "o", "--stepz", "3"], "No such option '--stepz'"),
    "no number": (["--store", "s", "--output", "o", "--steps", "many"], "'many' is not a valid integer"),
    "zero steps": (
        ["--store", "s", "--output", "o", "--steps", "0"],
        "steps is 0; it must be greater than 0",
    ),
    "url": (["--store", "s", "--output", "s3://b/o"], "output 's3://b/o' is a URL"),
    "shards": (
        ["--store", "s", "--output", "o", "--global-batch", "6", "--virtual-shards", "4"],
        "global_batch 6 does not divide by virtual_shards 4",
    ),
    "heads": (["--store", "s", "--output", "o", "--c-m", "30"], "c_m 30 does not divide by num_heads 4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_one_line_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, text = WRONG[case]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert text.replace("'", "").replace(".", "") in said.replace("'", "").replace(".", "")
    assert said.count("\n") == 1


def test_wrong_worlds_and_stores_are_one_line(
    tmp_path: Path,
    small_store: FeatureStore,
    inside: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = ["--store", small_store.url, "--output", tmp_path / "o", *TINY]
    code, said = inside(*usual, "--store", tmp_path / "nothing")
    assert (code, said.count("\n")) == (1, 1)
    assert "is not a foldfeed store" in said
    code, said = inside(*usual, "--recipe", "af9")
    assert (code, said.count("\n")) == (2, 1)
    assert "af9" in said
    code, said = inside(*usual, "--recipe", "masked_lm")
    assert (code, said.count("\n")) == (2, 1)
    assert "recipe 'masked_lm' cannot be used here" in said
    assert "use one of af2, crop_first" in said
    monkeypatch.setenv("RANK", "0")
    code, said = inside(*usual)
    assert (code, said.count("\n")) == (2, 1)
    assert "RANK set but not WORLD_SIZE, LOCAL_RANK" in said
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, said = inside(*usual)
    assert (code, said.count("\n")) == (2, 1)
    assert "4 ranks share 3 virtual shards" in said


def digest(output: Path) -> str:
    found: str = json.loads((output / "result.json").read_text())["weights_digest"]
    return found


def test_a_run_on_a_store_its_files_and_its_continuation(
    tmp_path: Path, small_store: FeatureStore, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run("--store", small_store.url, "--output", whole, *TINY)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("step:")]
    assert len(steps) == 4
    assert "loss:" in steps[0]
    assert "grad_norm:" in steps[0]
    assert f"weights_digest: {digest(whole)}" in done.stdout

    record = json.loads((whole / "run.json").read_text())
    assert record["config"]["data"]["crop_residues"] == 16
    assert record["store_fingerprint"] == small_store.fingerprint
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(whole / "tb"))
    events.Reload()
    for name in (
        *("loss_metrics/global_avg_loss", "loss_metrics/global_max_loss", "grad_norm", "lr"),
        *("time_metrics/end_to_end(s)", "time_metrics/data_loading(s)", "time_metrics/data_loading(%)"),
        *("throughput(residues/s)", "comm/exposed_ms", "memory/max_rss(GiB)"),
    ):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
        assert events.Scalars(name)[2].value == pytest.approx(lines[2][name], rel=1e-5)

    # The same in two parts, the second under torchrun's variables on three ranks: equal to the bit.
    assert (
        run(
            "--store", small_store.url, "--output", parts, *TINY, "--steps", "3", "--no-tensorboard"
        ).returncode
        == 0
    )
    port = free_port()
    ranks = [
        Program(
            module="foldfeed.trainer",
            arguments=["--store", small_store.url, "--output", str(parts), *TINY],
            environment=rank_environment(rank, 3, port),
            stdout=tmp_path / f"rank{rank}.out",
            stderr=tmp_path / f"rank{rank}.err",
        )
        for rank in range(3)
    ]
    codes = run_programs(ranks, timeout_s=120)
    assert codes == [0] * 3, [rank.stderr.read_text() for rank in ranks]
    assert "resumed: step 3" in ranks[0].stdout.read_text()
    assert digest(parts) == digest(whole)


def test_a_folder_belongs_to_one_run(
    tmp_path: Path, small_store: FeatureStore, inside: Callable[..., tuple[int, str]]
) -> None:
    arguments = ["--store", small_store.url, "--output", tmp_path / "run", *TINY, "--no-tensorboard"]
    assert inside(*arguments) == (0, "")
    first = digest(tmp_path / "run")
    assert inside(*arguments) == (0, ""), "a finished run says so again"
    assert digest(tmp_path / "run") == first
    for change, text in (
        (["--seed", "9"], "seed 0 there, 9 now"),
        (["--c-z", "16"], "model.c_z 8 there, 16 now"),
        (["--resume", "none"], "--resume none, but"),
        (["--threads", "2"], "threads 1 in the snapshot, 2 now"),
    ):
        code, said = inside(*arguments, *change)
        assert code in (1, 2), change
        assert text in said
        assert said.count("\n") == 1
    # A named snapshot may start another folder; the run id differs, everything that counts agrees.
    named = tmp_path / "run" / "snapshots" / "step-00000002"
    assert inside(*arguments, "--output", tmp_path / "other", "--resume", named) == (0, "")
    assert digest(tmp_path / "other") == first
    # A snapshot that somebody copied into another run's folder is not picked up silently.
    assert inside(*arguments, "--output", tmp_path / "third", "--steps", "2") == (0, "")
    shutil.rmtree(tmp_path / "third" / "snapshots")
    shutil.copytree(tmp_path / "run" / "snapshots", tmp_path / "third" / "snapshots")
    code, said = inside(*arguments, "--output", tmp_path / "third")
    assert (code, said.count("\n")) == (1, 1)
    assert "run_id" in said


def test_settings_that_do_not_decide_the_numbers_do_not_change_the_digest() -> None:
    base = RunConfig(output="o", data=DataConfig(store="s"))
    moved = RunConfig(output="p", steps=7, log_every=3, data=DataConfig(store="t", loader_threads=5))
    assert base.digest() == moved.digest()
    assert base.digest() != RunConfig(output="o", data=DataConfig(store="s", global_batch=16)).digest()
    # V is what counts, not how it was written.
    assert base.digest() == RunConfig(output="o", data=DataConfig(store="s", virtual_shards=8)).digest()
    with pytest.raises(TrainerConfigError, match="keep_snapshots is 0"):
        main_config_with_keep_zero()


def main_config_with_keep_zero() -> None:
    from foldfeed.trainer.config import SnapshotConfig

    SnapshotConfig(keep=0)


def test_a_damaged_run_file_is_one_line_and_its_snapshots_can_go_on_elsewhere(
    tmp_path: Path, small_store: FeatureStore, inside: Callable[..., tuple[int, str]]
) -> None:
    usual = ["--store", small_store.url, *TINY, "--no-tensorboard"]
    run_file = tmp_path / "o" / "run.json"
    assert inside(*usual, "--output", tmp_path / "o")[0] == 0
    for number, content in enumerate(("", '{"run', "[]", "7", "{}", '{"run_id": "x"}')):
        run_file.write_text(content)
        code, said = inside(*usual, "--output", tmp_path / "o")
        assert (code, said.count("\n")) == (1, 1), content
        assert "run.json is damaged" in said, content
        assert run_file.read_text() == content
        snapshot, new = tmp_path / "o" / "snapshots" / "step-00000002", tmp_path / f"new{number}"
        assert inside(*usual, "--output", new, "--resume", snapshot)[0] == 0, content
        assert digest(new) == digest(tmp_path / "o"), content


@pytest.mark.parametrize("name", ["metrics.jsonl", "goodput.jsonl"])
@pytest.mark.parametrize("line", ["\0" * 40, "[]", "7", "{}"])
def test_a_damaged_log_is_one_line_and_moved_away_it_holds_nothing_up(
    tmp_path: Path, small_store: FeatureStore, inside: Callable[..., tuple[int, str]], name: str, line: str
) -> None:
    usual = ["--store", small_store.url, *TINY, "--no-tensorboard", "--output", tmp_path / "o"]
    assert inside(*usual)[0] == 0
    log = tmp_path / "o" / name
    log.write_text(log.read_text() + line + "\n")
    code, said = inside(*usual)
    assert code == 1, said
    assert said.count("\n") == 1, said
    assert f"{name}" in said
    assert "Move the file away: the run goes on" in said
    log.unlink()
    assert inside(*usual)[0] == 0


def test_a_task_that_leaves_python_is_a_failed_rank() -> None:
    """Its exit code 0 would be that of a run that is done: a launcher ends the other ranks then."""
    code = "import sys; from foldfeed.trainer.cli import leave_with; leave_with(lambda: sys.exit(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "SystemExit: 0" in done.stderr


def test_a_full_disk_is_told_with_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logs have no room either; the system's own words name neither place nor fix."""

    def train(config: RunConfig) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_runner", lambda: train)
    assert cli.main(["--store", "s", "--output", "runs/o"]) == 1
    said = "No space left on device (for the run in runs/o); free some space and run the same command again"
    assert said in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_one_line(
    tmp_path: Path, small_store: FeatureStore, inside: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "file").touch()
    code, said = inside("--store", small_store.url, "--output", tmp_path / "file", *TINY)
    assert (code, said.count("\n")) == (1, 1)
    assert str(tmp_path / "file") in said


def test_a_run_may_train_on_a_record_set_alone(
    tmp_path: Path, small_store: FeatureStore, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The set is named on the command line and bound to the run by the fingerprint of its records."""
    small_store.save_set("deep", "select record_id from records where depth > 1")
    options = ["--store", small_store.url, "--record-set", "deep", *TINY, "--steps", "1"]
    done = run(*options, "--output", tmp_path / "run", "--no-tensorboard")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["data"]["record_set"] == "deep"
    assert record["store_fingerprint"] == small_store.subset("deep").fingerprint
    assert record["store_fingerprint"] != small_store.fingerprint
    unknown = run(*options, "--output", tmp_path / "other", "--record-set", "nobody")
    assert unknown.returncode == 1
    assert "nobody" in unknown.stderr
    assert "Traceback" not in unknown.stderr
