"""What decides a run's numbers: schedules, the average of the weights, bfloat16 in compute and on wires."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_ranks import on_threads
from torch import nn
from trainer_ranks import SyntheticSource, tiny_config, toy_model, toy_shard, train_on, train_synthetic

from foldfeed.trainer.config import DataConfig, HeldOutConfig, ModelConfig, OptimizerConfig, RunConfig
from foldfeed.trainer.errors import SnapshotMismatchError, TrainerConfigError
from foldfeed.trainer.export import named_weights
from foldfeed.trainer.gradients.buckets import plan_buckets
from foldfeed.trainer.gradients.dyadic import Block, owned_shards, tree_sum
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.optimizer import FlatAdamW, learning_rate
from foldfeed.trainer.gradients.reducer import TreeReducer
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.models.losses import Loss
from foldfeed.trainer.models.task import EvoformerTask, Task
from foldfeed.trainer.rng import seed_shard
from foldfeed.trainer.state.resume import environment
from foldfeed.trainer.state.snapshot import read_generation
from foldfeed.trainer.training.compiling import settle, why_not
from foldfeed.trainer.training.launch import prepare_numerics

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))


def rates(steps: int, **changes: Any) -> list[float]:
    config = OptimizerConfig(**({"lr": 1.0, "warmup_steps": 0} | changes))
    return [learning_rate(config, step) for step in range(steps)]


def test_the_schedules_are_those_of_the_docstring_and_of_alphafold_2() -> None:
    half = {"decay_steps": 4, "decay_factor": 0.5}
    assert rates(3) == [1, 1, 1]
    assert rates(9, schedule="step", **half) == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert rates(9, schedule="linear", **half)[::2] == [1, 0.75, 0.5, 0.5, 0.5]
    assert rates(6, schedule="cosine", decay_steps=4) == [1, 0.853553390593, 0.5, 0.146446609407, 0, 0]
    alphafold = {"lr": 1e-3, "warmup_steps": 1000, "decay_steps": 50_000, "decay_factor": 0.95}
    config = OptimizerConfig(schedule="step", **alphafold)
    found = [learning_rate(config, step) for step in (0, 499, 999, 49_999, 50_000, 78_000)]
    assert found == pytest.approx([1e-6, 5e-4, 1e-3, 1e-3, 0.95e-3, 0.95e-3])


@given(
    st.sampled_from(["step", "linear", "cosine"]),
    st.integers(0, 20),
    st.integers(1, 40),
    st.floats(0.01, 0.99),
)
def test_a_schedule_rises_to_the_rate_and_never_again(kind: str, warmup: int, decay: int, to: float) -> None:
    steps = warmup + decay
    found = rates(steps + 3, warmup_steps=warmup, schedule=kind, decay_steps=steps, decay_factor=to)
    peak = max(0, warmup - 1)
    assert found[peak] == pytest.approx(1.0)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert found[-1] == pytest.approx(to if kind != "step" else to ** ((steps + 2) // steps))


DATA = DataConfig(store="s")
WRONG: dict[str, Any] = {
    "schedule is 'cos'; choose one of constant, step": lambda: OptimizerConfig(schedule="cos"),
    "decay_steps is 9, but a constant schedule": lambda: OptimizerConfig(decay_steps=9),
    "decay_steps is 10; schedule linear needs more than the 10": lambda: OptimizerConfig(
        schedule="linear", decay_steps=10
    ),
    "decay_factor is 0; schedule step": lambda: OptimizerConfig(schedule="step", decay_steps=50_000),
    r"ema_decay is 1.0; it must be in \[0, 1\)": lambda: OptimizerConfig(ema_decay=1.0),
    "precision is 'fp16'": lambda: RunConfig(output="o", data=DATA, precision="fp16"),
    "wire bf16 does not go with reducer ring": lambda: RunConfig(
        output="o", data=DATA, wire="bf16", reducer="ring"
    ),
    "wire bf16-between is about messages between nodes": lambda: RunConfig(
        output="o", data=DATA, wire="bf16-between"
    ),
    "eval_ema looks with a moving average": lambda: RunConfig(
        output="o", data=DATA, held_out=HeldOutConfig(eval_ema=True)
    ),
    "profile_step is 9, but the run has 5 steps": lambda: RunConfig(
        output="o", data=DATA, steps=5, profile_step=9
    ),
}


@pytest.mark.parametrize("text", WRONG)
def test_settings_without_effect_or_sense_are_refused(text: str) -> None:
    with pytest.raises(TrainerConfigError, match=text):
        WRONG[text]()


def test_runs_without_what_came_later_are_the_runs_that_they_were() -> None:
    """The digests of a run are a contract: these are the first release's."""
    assert RunConfig(output="o", data=DATA).digest() == "885f40d45c54f2f1"
    distances = RunConfig(output="o", data=DATA, model=ModelConfig(distogram_weight=0.3))
    assert distances.digest() == "1a3689e75b170dc5"
    changes: list[dict[str, Any]] = [
        {"precision": "bf16"},
        {"compile": True},
        {"wire": "bf16"},
        {"optimizer": OptimizerConfig(ema_decay=0.999)},
        {"optimizer": OptimizerConfig(schedule="cosine", decay_steps=50)},
    ]
    digests = {RunConfig(output="o", data=DATA, **change).digest() for change in changes}
    assert len(digests | {"885f40d45c54f2f1"}) == 6
    short = [RunConfig(output="o", data=DATA, reducer="auto", wire=wire) for wire in ("bf16", "bf16-between")]
    assert short[0].digest() == short[1].digest() == RunConfig(output="o", data=DATA, wire="bf16").digest()
    assert RunConfig(output="o", data=DATA, model=ModelConfig(recompute=True)).digest() == "885f40d45c54f2f1"


def test_the_average_is_that_of_a_loop_and_leaves_the_weights_alone() -> None:
    draw = torch.Generator().manual_seed(1)
    params = torch.randn(100, generator=draw)
    plain = params.clone()
    bucket = plan_buckets([100], bucket_bytes=1000)
    averaging = FlatAdamW(params, bucket, OptimizerConfig(ema_decay=0.9))
    usual = FlatAdamW(plain, bucket, OptimizerConfig())
    wanted = params.double()
    for step in range(6):
        gradient = torch.randn(100, generator=draw)
        if step == 3:
            gradient[7] = math.nan
        usual.step(gradient.clone(), 1.0, step)
        assert averaging.step(gradient, 1.0, step).skipped == (step == 3)
        if step != 3:
            wanted = 0.9 * wanted + 0.1 * params.double()
    assert averaging.ema is not None
    assert torch.allclose(averaging.ema.double(), wanted, atol=1e-6)
    assert torch.equal(params, plain)
    with averaging.averaged():
        assert torch.equal(params, averaging.ema)
    assert torch.equal(params, plain)
    assert usual.ema is None


class Small(Task):
    """One layer, and what the run's options are put to the test with; counts its looks."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        self.layer = layer

    def build(self) -> nn.Module:
        return self.layer or nn.Sequential(nn.Linear(49, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 23))

    def loss(self, model: nn.Module, features: Any) -> Loss:
        logits = model(features["msa_feat"]).permute(0, 3, 1, 2)
        error = nn.functional.cross_entropy(logits, features["true_msa"], reduction="none")
        return Loss.of((error * features["msa_mask"]).mean((1, 2)))


class Sums:
    """In the place of held-out records: what is looked at is the sum of the weights."""

    def look(self, model: nn.Module) -> dict[str, float]:
        return {"loss": sum(param.detach().double().sum().item() for param in model.parameters())}


def test_a_look_is_at_the_average_and_leaves_the_weights(tmp_path: Path) -> None:
    found = {}
    for ema in (False, True):
        config = tiny_config(tmp_path / str(ema), steps=3, optimizer={"ema_decay": 0.8})
        held_out = HeldOutConfig(eval_set="sums", eval_every=1, eval_ema=ema)
        config = dataclasses.replace(config, model=ModelConfig(), held_out=held_out)
        prepare_numerics(config)
        digest = train_on(config, Small(), ALONE, {}, Sums()).weights_digest
        rows = (tmp_path / str(ema) / "metrics.jsonl").read_text().splitlines()
        looks = [row["eval/loss"] for row in map(json.loads, rows) if "eval/loss" in row]
        buffers = read_generation(tmp_path / str(ema) / "snapshots" / "step-00000003").buffers
        assert len(looks) == 3
        assert looks[-1] == pytest.approx(float(buffers["ema" if ema else "params"].double().sum()), rel=1e-9)
        found[ema] = (digest, looks)
    assert found[False][0] == found[True][0]
    assert found[False][1] != found[True][1]


def run_small(folder: Path, task: Task | None = None, **changes: Any) -> str:
    """Trains a small task alone; returns the digest of its weights."""
    config = dataclasses.replace(tiny_config(folder, **changes), model=ModelConfig())
    prepare_numerics(config)
    return str(train_on(config, task or Small(), ALONE, {}).weights_digest)


def test_the_average_goes_into_snapshots_and_out_of_them(tmp_path: Path) -> None:
    average = {"ema_decay": 0.8}
    train_synthetic(ALONE, tmp_path / "a", steps=3, optimizer=average)
    generation = read_generation(tmp_path / "a" / "snapshots" / "step-00000003")
    assert set(generation.buffers) == {"params", "exp_avg", "exp_avg_sq", "ema"}
    weights, averages = named_weights(generation), named_weights(generation, ema=True)
    assert weights.keys() == averages.keys()
    assert any(not torch.equal(weights[name], averages[name]) for name in weights)
    assert torch.equal(averages["head.bias"], generation.buffers["ema"][:23])
    train_synthetic(ALONE, tmp_path / "b", steps=3)
    plain = read_generation(tmp_path / "b" / "snapshots" / "step-00000003")
    assert torch.equal(plain.buffers["params"], generation.buffers["params"]), (
        "the weights are what they were"
    )
    with pytest.raises(TrainerConfigError, match="has no moving average"):
        named_weights(plain, ema=True)


def rounded(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16).float()


def by_hand(num_shards: int, step: int) -> torch.Tensor:
    """The sum of the toy's gradients in the tree, every node rounded to bfloat16, with plain tensors."""
    leaves = {}
    for v in range(num_shards):
        model = toy_model().train(False)
        model(toy_shard(step, v)).square().sum().backward()
        flat = [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()
        ]
        padded = [nn.functional.pad(row, (0, -row.numel() % 16)) for row in reversed(flat)]
        leaves[Block(v, 1)] = rounded(torch.cat(padded))
    return tree_sum(leaves, num_shards, lambda left, right: rounded(left + right))


def test_short_messages_give_equal_bits_on_any_ranks_and_half_the_bytes() -> None:
    """Real reducers on 1 to 7 ranks; against a tree by hand that knows nothing of ranks."""
    torch.set_num_threads(1)
    num_shards, wanted = 7, by_hand(7, 0)
    models = [toy_model().train(False) for _ in range(7)]
    sent: dict[Any, list[int]] = {}

    def work(ranks: Ranks, wire: torch.dtype) -> tuple[torch.Tensor, int]:
        model = models[ranks.rank]
        flat = FlatParameters(model)
        buckets = plan_buckets([s.padded for s in flat.segments], bucket_bytes=6000)
        reducer = TreeReducer(flat, buckets, ranks, num_shards, wire=wire)
        reducer.begin()
        for v in owned_shards(num_shards, ranks.world, ranks.rank):
            with reducer.shard(v):
                model(toy_shard(0, v)).square().sum().backward()
        reducer.finish([])
        reducer.close()
        groups: list[Any] = [ranks.scatter, ranks.gather] if ranks.world > 1 else []
        return reducer.gradient, sum(group.bytes_sent for group in groups)

    for world in (1, 2, 3, 4, 5, 7):
        for wire in (torch.bfloat16, torch.float32):
            found = (
                on_threads(world, lambda ranks, wire=wire: work(ranks, wire))
                if world > 1
                else [work(ALONE, wire)]
            )
            sent[world, wire] = [number for _, number in found]
            for gradient, _ in found:
                if wire is torch.bfloat16:
                    assert torch.equal(gradient, wanted), world
                else:
                    # 1 + log2 V roundings of at most 2^-8; of magnitudes that do not cancel here.
                    assert (gradient - wanted).abs().max() <= 4 * 2**-8 * gradient.abs().max()
                    assert not torch.equal(gradient, wanted)
        if world > 1:
            assert [2 * n for n in sent[world, torch.bfloat16]] == sent[world, torch.float32]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_blocks_changes_no_bit_of_a_gradient(precision: str) -> None:
    """Dropout drops the same again, and no gradient comes twice."""
    sources = {}
    for recompute in (False, True):
        config = tiny_config(Path("unused"), model={"recompute": recompute, "dropout_pair": 0.3})
        task = EvoformerTask(config.model)
        torch.manual_seed(4)
        model = task.build()
        flat = FlatParameters(model)
        reducer = TreeReducer(
            flat, plan_buckets([s.padded for s in flat.segments], bucket_bytes=4000), ALONE, 2
        )
        shards = next(iter(SyntheticSource(config.data, 3, ALONE, {}))).shards[:2]
        reducer.begin()
        for shard in shards:
            with reducer.shard(shard.v):
                seed_shard(3, 0, shard.v)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                    loss = task.loss(model, shard.features)
                assert loss.total.dtype == torch.float32
                loss.total.backward()
        assert not reducer._late
        reducer.finish([])
        reducer.close()
        sources[recompute] = reducer.gradient.clone()
    assert torch.equal(sources[False], sources[True])
    assert sources[True].abs().max() > 0


def test_bfloat16_agrees_with_float32_to_its_rounding() -> None:
    config = tiny_config(Path("unused"))
    task = EvoformerTask(dataclasses.replace(config.model, distogram_weight=0.3))
    torch.manual_seed(4)
    model = task.build().train(False)
    features = next(iter(SyntheticSource(config.data, 3, ALONE, {}))).shards[0].features
    residues = features["aatype"].shape[1]
    features |= {
        "pseudo_beta": torch.arange(3.0 * residues).view(1, residues, 3),
        "pseudo_beta_mask": torch.ones(1, residues),
    }
    exact = task.loss(model, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short = task.loss(model, features)
    assert short.total.dtype == torch.float32
    assert short.total.item() == pytest.approx(exact.total.item(), rel=0.02)
    assert short.total.item() != exact.total.item()


@pytest.fixture
def compiles_here() -> Iterator[None]:
    """Compiles in this thread: its pool of compiling threads would stay."""
    import torch._inductor.config

    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.usefixtures("compiles_here")
def test_a_compiled_model_repeats_to_the_bit_and_names_its_compiler(tmp_path: Path) -> None:
    digests = [run_small(tmp_path / name, steps=3, compile=True) for name in "ab"]
    assert digests[0] == digests[1]
    assert torch._inductor.config.deterministic
    found = json.loads((tmp_path / "a" / "run.json").read_text())
    assert found["identity"]["compile"] is True
    assert found["environment"]["compiler"]
    # Names of parameters are those of the plain model.
    generation = read_generation(tmp_path / "a" / "snapshots" / "step-00000003")
    assert generation.manifest["layout_hash"] == FlatParameters(Small().build()).layout_hash
    # A start that says nothing does as the run did, in its folder and from its snapshot elsewhere.
    resume = {"snapshots": {"resume": str(generation.path)}}
    ends = {
        run_small(tmp_path / "a", steps=4, compile=None),
        run_small(tmp_path / "b", steps=4, compile=True),
        run_small(tmp_path / "c", steps=4, **resume),
    }
    assert len(ends) == 1
    with pytest.raises(SnapshotMismatchError, match="compile True there, 'unset' now"):
        run_small(tmp_path / "a", steps=5, compile=False)


def test_a_run_that_does_not_compile_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from foldfeed.trainer.config import DataConfig, OptimizerConfig, RunConfig\n"
        "from foldfeed.trainer.gradients.buckets import plan_buckets\n"
        "from foldfeed.trainer.gradients.optimizer import FlatAdamW\n"
        "from foldfeed.trainer.training.launch import prepare_numerics\n"
        "prepare_numerics(RunConfig(output='o', data=DataConfig(store='s')))\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "buckets = plan_buckets([16], bucket_bytes=64)\n"
        "FlatAdamW(torch.ones(16), buckets, OptimizerConfig()).step(torch.ones(16), 1.0, 0)\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Shown(Small):
    """Gives an example; with ``drifts``, blocks whose results depend on when they are computed."""

    def __init__(self, *, drifts: bool = False) -> None:
        super().__init__()
        self.drifts, self.calls = drifts, 0

    def compiled(self, model: nn.Module) -> list[nn.Module]:
        return [] if self.drifts else [model]

    def example(self, data: DataConfig) -> Any:
        return next(iter(SyntheticSource(data, 3, ALONE, {}))).shards[0].features

    def loss(self, model: nn.Module, features: Any) -> Loss:
        self.calls += self.drifts
        return super().loss(model, {**features, "msa_feat": features["msa_feat"] * (1 + 1e-6 * self.calls)})


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.usefixtures("compiles_here")
def test_blocks_are_compiled_by_themselves_where_they_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of a GPU with the compiler of the CPU: two compilations, one of them from nothing."""
    config = tiny_config(tmp_path)
    prepare_numerics(config)
    assert why_not(config, Shown(), ALONE.device) == ""
    # Four different results of one step.
    assert why_not(config, Shown(drifts=True), ALONE.device) == "the same step gave 4 results"
    assert why_not(config, Small(), ALONE.device) == "Small gives no example to try them with"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert why_not(config, Shown(), ALONE.device).startswith("--compile needs a C++ compiler")


def test_what_is_tried_where_is_decided_by_device_and_record(tmp_path: Path) -> None:
    config, cuda = tiny_config(tmp_path), dataclasses.replace(ALONE, device=torch.device("cuda", 0))
    said: list[str] = []

    def settled(ranks: Ranks, before: Any = None, **changes: Any) -> bool | None:
        changed = dataclasses.replace(config, **changes)
        return settle(changed, Small(), ranks, lambda _: before, said.append).compile

    assert settled(ALONE) is False
    assert settled(ALONE, before={"compile": True}) is True
    assert settled(cuda, before={}) is False
    assert settled(cuda, before={"compile": True}) is True
    assert settled(cuda, before={"compile": True}, compile=False) is False
    assert settled(cuda, compile=True) is True
    assert said == []
    # A new run on a device: this task cannot be tried.
    assert settled(cuda) is False
    assert said == ["blocks are not compiled: Small gives no example to try them with (rank 0)"]


def test_the_example_of_the_evoformer_has_the_shapes_of_the_loader() -> None:
    config = tiny_config(Path("unused"), data={"virtual_shards": 4})
    task = EvoformerTask(dataclasses.replace(config.model, distogram_weight=0.3))
    found = task.example(config.data)
    assert found is not None
    for name, tensor in next(iter(SyntheticSource(config.data, 3, ALONE, {}))).shards[0].features.items():
        if name != "aatype":
            assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
    loss = task.loss(task.build(), found)
    assert loss.counted.all()
    assert set(loss.parts) == {"masked_msa", "distogram"}


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TrainerConfigError, match="--compile needs a C"):
        environment(torch.device("cpu"), 1, True, True)
    assert "compiler" not in environment(torch.device("cpu"), 1, True)


def test_other_settings_of_the_network_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for steps, threads in ((1, "2"), (2, "2"), (3, "4")):
        monkeypatch.setenv("NCCL_SOCKET_NTHREADS", threads)
        run_small(tmp_path, steps=steps, data={"global_batch": 2})
        assert json.loads((tmp_path / "run.json").read_text())["network"]["NCCL_SOCKET_NTHREADS"] == threads
        said = capfd.readouterr().out
        assert ("NCCL_SOCKET_NTHREADS '2' before, '4' now" in said) == (threads == "4")
        assert ("the weights do not depend on them" in said) == (threads == "4")
        manifest = read_generation(tmp_path / "snapshots" / f"step-{steps:08d}").manifest
        assert manifest["network"]["NCCL_SOCKET_NTHREADS"] == threads
        assert manifest["network"]["transport"] == "tree"


def test_a_trace_names_buckets_shards_and_phases(tmp_path: Path) -> None:
    run_small(tmp_path, steps=4, profile_step=2, data={"global_batch": 2})
    (trace,) = (tmp_path / "profile_traces").glob("*/*")
    assert trace.relative_to(tmp_path / "profile_traces") == Path("iteration_4/rank0_trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    ours = [event for event in events if str(event.get("name")).startswith("trainer::")]
    names = [event["name"] for event in ours]
    assert names.count("trainer::shard[1]::backward") == 3
    assert names.count("trainer::commit") == names.count("trainer::optimizer") == 3
    assert names.count("trainer::bucket[0]::exchange") == 3
    threads = {event["name"]: event["tid"] for event in ours}
    assert threads["trainer::bucket[0]::exchange"] != threads["trainer::optimizer"]
