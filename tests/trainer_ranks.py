"""Starts real ranks for the trainer's tests, and holds what those ranks run.

A test calls `launch(case, world, ...)`: one process per rank, gloo on localhost, one thread each. Every rank
runs the function ``case_NAME(ranks, folder, options)`` of this file and its JSON-able result comes back in
rank order. A launch has a hard timeout; its processes are killed by pid whatever happens. Ranks are forked
from a process that has imported torch (`warm_python`); those of torchrun import it themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ports import free_port
from warm_python import Program, run_programs

HERE = Path(__file__).resolve()


# ---------------------------------------------------------------- the test's side


def launch(
    case: str,
    world: int,
    folder: Path,
    *,
    timeout_s: float = 150.0,
    expect: int | None = 0,
    **options: Any,
) -> list[Any]:
    """Runs a case on ``world`` ranks and returns their results in rank order.

    ``expect`` is the exit code every rank must have; None takes any and returns (code, stderr) per rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    programs = [
        Program(
            module=HERE.stem,
            arguments=[case, str(folder), json.dumps(options)],
            environment=rank_environment(rank, world, port),
            stdout=folder / f"rank{rank}.out",
            stderr=folder / f"rank{rank}.err",
        )
        for rank in range(world)
    ]
    codes = run_programs(programs, timeout_s=timeout_s)
    errors = [(folder / f"rank{rank}.err").read_text() for rank in range(world)]
    if expect is None:
        return list(zip(codes, errors, strict=True))
    assert codes == [expect] * world, "\n".join(
        f"rank {r}: exit {c}\n{e}" for r, (c, e) in enumerate(zip(codes, errors, strict=True))
    )
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


# ---------------------------------------------------------------- the ranks' side


@dataclasses.dataclass
class FakeShard:
    v: int
    samples: list[int]
    features: dict[str, Any]


@dataclasses.dataclass
class FakeStep:
    step: int
    shards: list[FakeShard]


class SyntheticSource:
    """The loader's batches in shape and determinism: sample g depends on (seed, g) alone."""

    def __init__(self, data: Any, seed: int, ranks: Any, quirks: dict[str, Any]) -> None:
        self.data, self.seed, self.ranks, self.quirks = data, seed, ranks, quirks
        self.step = 0
        # A step of which this rank makes other virtual shards than its own.
        self.odd: tuple[int, Any] = (-1, None)

    def __iter__(self) -> Iterator[FakeStep]:
        from foldfeed.trainer.gradients.dyadic import owned_shards

        shards = self.data.num_shards
        per_shard = self.data.global_batch // shards
        while True:
            step = self.step
            self.step += 1
            time.sleep(self.quirks.get("pause_s", 0.0))
            for rank, first, seconds in self.quirks.get("slow", ()):
                # From step ``first`` on, or at that step alone when it is negative.
                if rank == self.ranks.rank and (step >= first >= 0 or step == -first):
                    time.sleep(seconds)
            for name, number in SIGNALS.items():
                if self.quirks.get(name) == [step, self.ranks.rank]:
                    os.kill(os.getpid(), number)
            yield FakeStep(
                step,
                [
                    FakeShard(v, self._numbers(step, v, per_shard), self._features(step, v, per_shard))
                    for v in self._shards(step, owned_shards(shards, self.ranks.world, self.ranks.rank))
                ],
            )

    def _shards(self, step: int, own: range) -> Any:
        return self.odd[1] if step == self.odd[0] and self.odd[1] is not None else own

    def _numbers(self, step: int, v: int, per_shard: int) -> list[int]:
        first = step * self.data.global_batch + v * per_shard
        return list(range(first, first + per_shard))

    def _features(self, step: int, v: int, per_shard: int) -> dict[str, Any]:
        import torch

        samples = [synthetic_sample(self.seed, g, self.data) for g in self._numbers(step, v, per_shard)]
        features = {
            name: torch.stack([sample[name] for sample in samples]).to(self.ranks.device)
            for name in samples[0]
        }
        if self.quirks.get("nan_at") == [step, v]:
            features["msa_feat"][0, 0, 0, 0] = float("nan")
        return features

    def state_dict(self) -> dict[str, Any]:
        return {"format": 1, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def synthetic_sample(seed: int, g: int, data: Any) -> dict[str, Any]:
    """Returns one sample with the loader's names, shapes and dtypes, with padded residues and rows."""
    import torch

    draw = torch.Generator().manual_seed(1_000_003 * seed + g)
    residues, rows, extra = data.crop_residues, data.num_clusters, data.num_extra
    length = residues - g % 3
    depth, extra_depth = rows - g % 2, extra - g % 4
    seq_mask = (torch.arange(residues) < length).float()
    msa_mask = (torch.arange(rows) < depth).float()[:, None] * seq_mask
    extra_mask = (torch.arange(extra) < extra_depth).float()[:, None] * seq_mask

    def uniform(*shape: int) -> Any:
        return torch.rand(*shape, generator=draw)

    # A pattern worth learning: the token depends on the column.
    true_msa = ((torch.arange(residues) * 7)[None] + (uniform(rows, residues) < 0.2).long()) % 21
    bert_mask = (uniform(rows, residues) < 0.3).float() * msa_mask
    shown = torch.where(bert_mask > 0, torch.full_like(true_msa, 22), true_msa)
    msa_feat = torch.cat((torch.nn.functional.one_hot(shown, 23).float(), uniform(rows, residues, 26)), -1)
    return {
        "aatype": true_msa[0],
        "residue_index": torch.arange(residues) + g % 5,
        "seq_mask": seq_mask,
        "target_feat": torch.nn.functional.one_hot(true_msa[0], 22).float() * seq_mask[:, None],
        "msa_feat": msa_feat * msa_mask[..., None],
        "msa_mask": msa_mask,
        "extra_msa": (torch.randint(0, 21, (extra, residues), generator=draw) * extra_mask).long(),
        "extra_has_deletion": (uniform(extra, residues) < 0.1).float() * extra_mask,
        "extra_deletion_value": uniform(extra, residues) * extra_mask,
        "extra_msa_mask": extra_mask,
        "true_msa": (true_msa * msa_mask).long(),
        "bert_mask": bert_mask,
    }


def tiny_config(folder: Path, **changes: Any) -> Any:
    """Returns settings of a run that takes milliseconds per step."""
    from foldfeed.trainer.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, SnapshotConfig

    data = {"crop_residues": 10, "num_clusters": 5, "num_extra": 7, "global_batch": 8} | changes.pop(
        "data", {}
    )
    model = {"c_m": 16, "c_z": 8, "c_e": 8, "num_blocks": 1, "num_heads": 2, "c_opm": 4, "c_tri": 8}
    model |= changes.pop("model", {})
    optimizer = {"warmup_steps": 3} | changes.pop("optimizer", {})
    # What lies in memory has tests of its own: here runs go back to the disk.
    snapshots = {"every": 4, "keep": 3, "memory": "none"} | changes.pop("snapshots", {})
    run = {
        "steps": 8,
        "seed": 3,
        "bucket_mb": 0.03,
        "device": "cpu",
        "tensorboard": False,
        "timeout_s": 30.0,
    } | changes
    return RunConfig(
        output=str(folder),
        data=DataConfig(store="synthetic", **data),
        model=ModelConfig(**model),
        optimizer=OptimizerConfig(**optimizer),
        snapshots=SnapshotConfig(**snapshots),
        **run,
    )


SIGNALS = {"term_at": signal.SIGTERM, "kill_at": signal.SIGKILL, "usr1_at": signal.SIGUSR1}
QUIRKS = ("nan_at", "pause_s", "slow", "fill_memory", *SIGNALS)


def train_synthetic(ranks: Any, folder: Path, **changes: Any) -> Any:
    """Runs `train` over the synthetic source."""
    from foldfeed.trainer.models.task import load_task
    from foldfeed.trainer.training.launch import prepare_numerics

    quirks = {name: changes.pop(name) for name in QUIRKS if name in changes}
    if "NODE" in (memory := changes.get("snapshots", {}).get("memory", "")):
        # Two ranks a node, each with a memory of its own.
        memory = memory.replace("NODE", str(ranks.rank // 2))
        changes["snapshots"] = {**changes["snapshots"], "memory": memory}
    config = tiny_config(folder, **changes)
    prepare_numerics(config)
    if quirks.get("fill_memory"):
        import torch

        # Every new tensor is NaN until it is written: whatever reads it before makes the weights NaN.
        torch.utils.deterministic.fill_uninitialized_memory = True
    return train_on(config, load_task(config), ranks, quirks)


def train_on(config: Any, task: Any, ranks: Any, quirks: dict[str, Any], held_out: Any = None) -> Any:
    """Runs `train` with a task over the synthetic source, with a ledger of its own."""
    from foldfeed.trainer.goodput import Ledger
    from foldfeed.trainer.training.launch import train
    from foldfeed.trainer.training.source import Source

    batches = SyntheticSource(config.data, config.seed, ranks, quirks)
    ledger = Ledger(Path(config.output), active=ranks.is_first)
    return train(config, task, ranks, Source(batches, "f" * 16, held_out=held_out), ledger)


def case_train(ranks: Any, folder: Path, options: dict[str, Any]) -> Any:
    """One or more runs one after another; returns each outcome, with the losses."""
    results = []
    for run in options["runs"]:
        run = dict(run)
        output = Path(run.pop("output", folder / "run"))
        for file, how in run.pop("damage", {}).items():
            if ranks.is_first:
                damage(output / file, how)
            ranks.gather_floats([0.0], "damage done")
        outcome = train_synthetic(ranks, output, **run)
        lines = (output / "metrics.jsonl").read_text().splitlines()
        results.append({**dataclasses.asdict(outcome), "metrics": [json.loads(line) for line in lines]})
    return results


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "truncate":
        del raw[len(raw) // 2 :]
    else:
        raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def toy_model() -> Any:
    """Tied weights, a parameter used twice, one never used, odd sizes, dropout."""
    import torch
    from torch import nn

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(13, 37)
            self.unused = nn.Parameter(torch.ones(11))
            self.body = nn.ModuleList(nn.Linear(37, 37) for _ in range(4))
            self.tied = nn.Linear(37, 37)
            self.tied.weight = self.body[0].weight
            self.drop = nn.Dropout(0.2)
            self.last = nn.Linear(37, 1)
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x: Any) -> Any:
            x = self.first(x)
            for layer in [*self.body, self.body[1], self.tied]:
                x = x + self.drop(torch.tanh(layer(x)))
            return self.last(x)

    torch.manual_seed(5)
    return Toy()


def toy_shard(step: int, v: int) -> Any:
    import torch

    return torch.randn(6, 13, generator=torch.Generator().manual_seed(100 * step + v))


NUM_TOY_STEPS = 3


def toy_steps(
    reducer: Any, flat: Any, model: Any, shards: range, num_shards: int, twice_at: int = -1
) -> list[list[float]]:
    """Runs a few SGD steps with a reducer and returns the gradient of each."""
    from foldfeed.trainer.rng import seed_shard

    forward = reducer.wrap(model)
    gradients = []
    for step in range(NUM_TOY_STEPS):
        reducer.begin()
        for v in shards:
            with reducer.shard(v):
                seed_shard(1, step, v)
                loss = forward(toy_shard(step, v)).square().sum()
                if step == twice_at:
                    # Two backward calls in one shard: every hook fires twice, buckets leave too early.
                    (0.5 * loss).backward(retain_graph=True)
                    (0.5 * loss).backward()
                else:
                    loss.backward()
        rows = reducer.finish([float(len(shards))])
        assert sum(row[0] for row in rows) == num_shards
        reducer.gradient.div_(num_shards * 6)
        gradients.append(reducer.gradient.tolist())
        flat.params.sub_(reducer.gradient, alpha=0.1)
    return gradients


def case_gradients(ranks: Any, folder: Path, options: dict[str, Any]) -> Any:
    """The toy model under our reducer (several shard counts), with late gradients, in bf16, and under DDP."""
    import torch
    from rank_refusals import model_in_ddp, other_layout, replaced_gradient, replica_mismatch

    from foldfeed.trainer.gradients.buckets import plan_buckets
    from foldfeed.trainer.gradients.ddp import DdpReducer
    from foldfeed.trainer.gradients.dyadic import owned_shards
    from foldfeed.trainer.gradients.flat import FlatParameters
    from foldfeed.trainer.gradients.reducer import TreeReducer

    results: dict[str, Any] = {}
    cases = (("tree8", 8, -1), ("tree6", 6, -1), ("late8", 8, 1), ("bf16", 6, -1), ("late16", 6, 1))
    for name, num_shards, twice_at in (*cases, ("ddp8", 8, -1)):
        model = toy_model()
        flat = FlatParameters(model)
        buckets = plan_buckets([s.padded for s in flat.segments], bucket_bytes=6000)
        if name == "ddp8":
            reducer: Any = DdpReducer(flat, ranks, num_shards, 6000, find_unused_parameters=True)
        else:
            wire = torch.bfloat16 if name in ("bf16", "late16") else torch.float32
            reducer = TreeReducer(flat, buckets, ranks, num_shards, wire=wire)
        shards = owned_shards(num_shards, ranks.world, ranks.rank)
        gradients = toy_steps(reducer, flat, model, shards, num_shards, twice_at)
        reducer.close()
        digest = hashlib.sha256(flat.params.numpy().tobytes()).hexdigest()
        results[name] = {
            "gradients": gradients if ranks.is_first else [],
            "digest": digest,
            "buckets": len(buckets),
        }
    results["events"] = overlap_events(ranks)
    results["replaced"] = replaced_gradient(ranks)
    results["mismatch"] = replica_mismatch(ranks, folder)
    results["refused"] = [other_layout(ranks, folder), model_in_ddp()]
    return results


def case_transports(ranks: Any, folder: Path, options: dict[str, Any]) -> Any:
    """Sums random blocks of every shard by each transport."""
    from transport_sums import sums_by_transport

    return sums_by_transport(ranks, options["nodes"], options["num_shards"])


def overlap_events(ranks: Any) -> list[list[Any]]:
    """A deep model whose backward takes a while: when do exchanges start?"""
    import torch
    from torch import nn

    from foldfeed.trainer.gradients.buckets import plan_buckets
    from foldfeed.trainer.gradients.flat import FlatParameters
    from foldfeed.trainer.gradients.reducer import TreeReducer

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(192, 192) for _ in range(16)])
    flat = FlatParameters(model)
    buckets = plan_buckets([s.padded for s in flat.segments], bucket_bytes=4 * 2 * 192 * 193)
    events: list[list[Any]] = []
    reducer = TreeReducer(flat, buckets, ranks, 4, on_event=lambda name, index: events.append([name, index]))
    reducer.begin()
    for v in range(4 * ranks.rank // ranks.world, 4 * (ranks.rank + 1) // ranks.world):
        with reducer.shard(v):
            model(torch.randn(512, 192)).sum().backward()
    reducer.finish([])
    reducer.close()
    return events


def case_fails(ranks: Any, folder: Path, options: dict[str, Any]) -> Any:
    """A run that must fail: prints the error's type and text, and leaves as the command line does."""
    from foldfeed.trainer.errors import TrainerError

    started = time.monotonic()
    try:
        train_synthetic(ranks, folder / "run", **options)
    except TrainerError as error:
        print(
            f"{time.monotonic() - started:.1f} {type(error).__name__}: {error}", file=sys.stderr, flush=True
        )
        os._exit(1)
    return "no error"


def main() -> int:
    case, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    import torch

    from foldfeed.trainer.groups.ranks import joined, world_from_environment

    torch.set_num_threads(1)
    rank, world, _ = world_from_environment()
    with joined(rank=rank, world=world, device=torch.device("cpu"), timeout_s=30.0, always=True) as ranks:
        result = globals()[f"case_{case}"](ranks, folder, options)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    from foldfeed.trainer.cli import leave_with

    leave_with(main)
