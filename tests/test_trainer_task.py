"""What is trained and how well: tasks of users, sizes, held-out losses, curves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from records import make_record
from torch import nn
from trainer_options import SMALL_CROPS, SMALL_MODEL
from trainer_ranks import rank_environment
from warm_python import Program, run_programs

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.trainer import Loss, Task, TrainerConfigError, curve, export
from foldfeed.trainer.cli import main
from foldfeed.trainer.config import DataConfig, HeldOutConfig, ModelConfig, RunConfig
from foldfeed.trainer.models.task import EvoformerTask, identity, load_task
from foldfeed.trainer.training import launch

SIZES = [*SMALL_CROPS, "--device", "cpu", "--no-tensorboard"]
EVERY_STEP = {"trained": ("a", "b", "c", "d"), "held": ("e", "f", "g")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Seven records, of which every second has a structure, in two sets; three are held out."""
    store = FeatureStore.create(tmp_path_factory.mktemp("task") / "store", StoreSettings(tile_rows=16))
    records = [make_record(name, 5 + n, 20 + 3 * n, seed=n) for n, name in enumerate("abcdefg")]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    for name, ids in EVERY_STEP.items():
        listed = ", ".join(f"'{record_id}'" for record_id in ids)
        store.save_set(name, f"select record_id from records where record_id in ({listed})")
    return store


def metrics_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def train(store: FeatureStore, output: Path, *options: object, ranks: int = 1) -> list[dict[str, Any]]:
    """Trains to the end; returns the metrics of every step."""
    given = ["--store", store.url, "--output", output, "--global-batch", 4, *SIZES, *options]
    arguments = [str(argument) for argument in given]
    if ranks == 1:
        assert main(arguments) == 0
    else:
        port = free_port()
        output.mkdir()
        programs = [
            Program(
                module="foldfeed.trainer",
                arguments=arguments,
                environment=rank_environment(rank, ranks, port),
                stdout=output / f"rank{rank}.out",
                stderr=output / f"rank{rank}.err",
            )
            for rank in range(ranks)
        ]
        codes = run_programs(programs, timeout_s=200)
        assert codes == [0] * ranks, "".join(program.stderr.read_text() for program in programs)
    return metrics_of(output)


def digest_of(output: Path) -> str:
    return str(json.loads((output / "result.json").read_text())["weights_digest"])


HELD_OUT = ["--record-set", "trained", "--eval-set", "held", "--eval-every", "2", *SMALL_MODEL]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_held_out_losses_are_equal_on_any_ranks_and_leave_the_training_alone(
    store: FeatureStore, tmp_path: Path
) -> None:
    options = [*HELD_OUT, "--steps", "5", "--distogram-weight", "0.3"]
    # Looks with the average of the weights, which lie in the weights' place meanwhile.
    options += ["--ema-decay", "0.5", "--eval-ema"]
    one = train(store, tmp_path / "one", *options)
    three = train(store, tmp_path / "three", *options, ranks=3)
    alone = train(store, tmp_path / "alone", *[o for o in options if o not in ("--eval-set", "held")])
    looks = [row for row in one if "eval/loss" in row]
    # Every second step, and the last one.
    assert [row["step"] for row in looks] == [2, 4, 5]
    assert set(looks[0]) == {"step", "eval/loss", "eval/masked_msa", "eval/distogram"}
    assert [row for row in three if "eval/loss" in row] == looks
    assert not any("eval/loss" in row for row in alone)
    assert len({row["eval/loss"] for row in looks}) == 3
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "three") == digest_of(tmp_path / "alone")
    for rows in (one, three, alone):
        steps = [row for row in rows if "grad_norm" in row]
        assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
        for row in steps:
            # Every crop of the training has a masked position, not every one a structure.
            assert row["loss_metrics/masked_msa"] <= row["loss_metrics/global_avg_loss"]
            assert row["loss_metrics/distogram"] == pytest.approx(4.16, abs=1.0)  # ln 64 of an untrained head


def test_a_look_counts_each_held_out_record_once(store: FeatureStore, tmp_path: Path) -> None:
    class Lengths(Task):
        """Each sample's loss is the number of residues in its crop: known from the records."""

        def build(self) -> nn.Module:
            return nn.Linear(1, 1)

        def loss(self, model: nn.Module, features: dict[str, torch.Tensor]) -> Loss:
            return Loss.of(features["seq_mask"].sum(1) + 0.0 * model(torch.zeros(1)).sum())

    data = DataConfig(
        store=store.url,
        recipe="crop_first",
        record_set="trained",
        crop_residues=64,
        num_clusters=4,
        num_extra=8,
        global_batch=2,
    )
    for wanted, samples in ((0, 3), (2, 2), (5, 5)):
        output = tmp_path / f"{wanted}"
        launch.run(
            RunConfig(
                output=str(output),
                steps=1,
                data=data,
                device="cpu",
                tensorboard=False,
                held_out=HeldOutConfig(eval_set="held", eval_samples=wanted),
            ),
            Lengths(),
        )
        found = metrics_of(output)[-1]["eval/loss"]
        lengths = [store[name].length for name in EVERY_STEP["held"]]
        if samples == 3:
            assert found == pytest.approx(sum(lengths) / 3)
        else:
            assert min(lengths) <= found <= max(lengths)
            assert found * samples == pytest.approx(round(found * samples))


def test_records_that_are_trained_on_are_no_held_out_ones(
    store: FeatureStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--store", store.url, "--output", str(tmp_path / "run"), "--eval-set", "held", *SIZES]
    assert main(arguments) == 2
    assert (
        "record set 'held' shares 3 records with what is trained on (the first is 'e')"
        in capfd.readouterr().err
    )
    assert not (tmp_path / "run").exists()


class Uneven(Task):
    """A part of the model is in evaluation mode for good, and every loss draws noise."""

    def build(self) -> nn.Module:
        quiet = nn.Sequential(nn.Linear(49, 8), nn.Dropout(0.5)).train(False)
        return nn.Sequential(quiet, nn.Dropout(0.5), nn.Linear(8, 23))

    def loss(self, model: nn.Module, features: dict[str, torch.Tensor]) -> Loss:
        noisy = features["msa_feat"] + torch.randn_like(features["msa_feat"])
        errors = nn.functional.cross_entropy(
            model(noisy).permute(0, 3, 1, 2), features["true_msa"], reduction="none"
        )
        return Loss.of((errors * features["msa_mask"]).mean((1, 2)))


def test_looks_draw_alike_wherever_a_run_was_and_leave_modes_alone(
    store: FeatureStore, tmp_path: Path
) -> None:
    def run(name: str, steps: int, eval_set: str = "held") -> tuple[str, list[float]]:
        sizes = {"crop_residues": 16, "num_clusters": 4, "num_extra": 8, "global_batch": 4}
        config = RunConfig(
            output=str(tmp_path / name),
            steps=steps,
            data=DataConfig(store=store.url, recipe="crop_first", record_set="trained", **sizes),
            device="cpu",
            tensorboard=False,
            held_out=HeldOutConfig(eval_set=eval_set, eval_every=2),
        )
        launch.run(config, Uneven())
        looks = [row["eval/loss"] for row in metrics_of(tmp_path / name) if "eval/loss" in row]
        return digest_of(tmp_path / name), looks

    whole, alone = run("whole", 4), run("alone", 4, "")
    assert whole[0] == alone[0]
    run("parts", 3)
    parts = run("parts", 4)
    assert parts[0] == whole[0]
    assert [parts[1][0], parts[1][-1]] == whole[1]


def test_a_model_of_ones_own_trains_resumes_and_is_exported(
    store: FeatureStore, tmp_path: Path, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = ["--task", root / "examples" / "own_task.py:NeighbourTask", "--lr", "0.02", "--warmup-steps", "0"]
    whole = train(store, tmp_path / "whole", *task, "--steps", "12")
    train(store, tmp_path / "parts", *task, "--steps", "5")
    train(store, tmp_path / "parts", *task, "--steps", "12")
    assert digest_of(tmp_path / "whole") == digest_of(tmp_path / "parts")
    # Residues drawn at random teach nothing, but an untrained model says ln 23 = 3.14.
    assert all(2.5 < row["loss_metrics/global_avg_loss"] < 4.0 for row in whole)
    weights = tmp_path / "own.safetensors"
    assert export.main([str(tmp_path / "whole"), str(weights)]) == 2
    assert "was trained with the task 'NeighbourTask'" in capfd.readouterr().err
    assert export.main([str(tmp_path / "whole"), str(weights), "--task", str(task[1])]) == 0
    from safetensors.torch import load_file

    assert set(load_file(weights)) == {"along.weight", "along.bias", "head.weight", "head.bias"}
    # The built-in model is another run.
    capfd.readouterr()
    arguments = ["--store", store.url, "--output", tmp_path / "whole", "--global-batch", 4, *SIZES]
    assert main([str(argument) for argument in arguments]) == 1
    assert "config_digest" in capfd.readouterr().err


class WithSettings(Task):
    def __init__(self, width: int) -> None:
        self.width = width

    def build(self) -> nn.Module:
        return nn.Linear(self.width, 1)

    def loss(self, model: nn.Module, features: dict[str, torch.Tensor]) -> Loss:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        return {"width": self.width}


NARROW = WithSettings(3)
NUMBER = 7


def test_a_task_is_found_by_module_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tasks_of_a_user", sys.modules[__name__])
    data = DataConfig(store="s")

    def config(task: str) -> RunConfig:
        return RunConfig(output="o", data=data, task=task)

    assert load_task(config("tasks_of_a_user:NARROW")) is NARROW
    assert isinstance(load_task(config("evoformer")), EvoformerTask)
    file = tmp_path / "odd name.py"
    file.write_text("from foldfeed.trainer import Task\nclass Half(Task):\n    pass\n")
    for task, text in (
        ("nonsense", "is neither evoformer nor a place"),
        ("no_such_module:Task", "there is no module 'no_such_module'"),
        (f"{tmp_path}/missing.py:Task", "there is no file"),
        (f"{file}:Other", "has no 'Other'"),
        ("tasks_of_a_user:NUMBER", "gives int, not a foldfeed.trainer.Task"),
    ):
        with pytest.raises(TrainerConfigError, match=text):
            load_task(config(task))
    with pytest.raises(TypeError, match="abstract"):
        load_task(config(f"{file}:Half"))


def test_a_run_is_bound_to_its_tasks_settings() -> None:
    own = RunConfig(output="o", data=DataConfig(store="s"), task="m:T")
    assert identity(own, WithSettings(3)) != identity(own, WithSettings(4))
    assert identity(own, WithSettings(3))["task"] == {"class": "WithSettings", "settings": {"width": 3}}
    builtin = RunConfig(output="o", data=DataConfig(store="s"))
    assert identity(builtin, EvoformerTask(builtin.model)) == builtin.identity()
    # Of the release before tasks came: its runs can be continued.
    assert builtin.digest() == "885f40d45c54f2f1"
    with pytest.raises(
        TrainerConfigError, match="sizes of the compact Evoformer are given, but the task is m:T"
    ):
        RunConfig(output="o", data=DataConfig(store="s"), task="m:T", model=ModelConfig(c_m=8))


def test_sizes_grow_and_single_values_may_differ() -> None:
    sizes = [
        sum(p.numel() for p in EvoformerTask(ModelConfig.sized(name)).build().parameters())
        for name in ("tiny", "small", "base")
    ]
    assert sizes[0] * 4 < sizes[1]
    assert sizes[1] * 4 < sizes[2]
    assert ModelConfig.sized("small", c_z=8).c_z == 8
    assert ModelConfig.sized("tiny") == ModelConfig()
    with pytest.raises(TrainerConfigError, match="size is 'huge'; choose one of tiny, small, base"):
        ModelConfig.sized("huge")


def test_a_named_size_is_that_of_the_command_line(store: FeatureStore, tmp_path: Path) -> None:
    train(
        store,
        tmp_path / "run",
        "--steps",
        "1",
        "--size",
        "small",
        "--num-blocks",
        "1",
        "--c-m",
        "8",
        "--c-e",
        "8",
    )
    written = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model"]
    small = ModelConfig.sized("small")
    assert written["c_z"] == small.c_z
    assert (written["num_blocks"], written["c_m"]) == (1, 8)


def test_recipes_that_cluster_nothing_are_for_own_tasks(store: FeatureStore, tmp_path: Path) -> None:
    data = DataConfig(store=store.url, recipe="masked_lm", crop_residues=8, num_clusters=4)
    recipe = WithSettings(1).recipe(data)
    assert (recipe.name, recipe.num_extra, recipe.num_clusters) == ("masked_lm", 0, 4)
    with pytest.raises(TrainerConfigError, match="learns from msa_feat, which masked_lm does not give"):
        EvoformerTask(ModelConfig()).recipe(data)
    labelled = EvoformerTask(ModelConfig(distogram_weight=0.3)).recipe(DataConfig(store="s"))
    assert labelled.labels
    assert not EvoformerTask(ModelConfig()).recipe(DataConfig(store="s")).labels


def test_a_curve_is_drawn_from_metrics_even_of_a_run_that_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows: list[dict[str, Any]] = [
        {"step": n, "loss_metrics/global_avg_loss": 3.0 / n if n != 7 else None} for n in range(1, 31)
    ]
    rows[19]["eval/loss"] = 1.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "lo')
    found = curve.read_curve(run)
    assert len(found.trained) == 29
    assert found.held_out == [(20, 1.5)]
    assert found.smooth()[0] == (1, sorted(3.0 / n for n in (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12))[5])
    for suffix in ("png", "svg"):
        picture = tmp_path / f"curve.{suffix}"
        assert curve.main([str(run), str(run), str(picture)]) == 0
        assert picture.stat().st_size > 5000
    assert "run step 30" in capsys.readouterr().out
    assert curve.main([str(run), str(tmp_path / "curve.pdf")]) == 2
    assert curve.main([str(tmp_path), str(tmp_path / "curve.png")]) == 1
    assert "no metrics at" in capsys.readouterr().err
