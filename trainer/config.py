"""What a run is: frozen settings, checked when they are made, dumped as JSON into the run's folder.

Settings fall in two kinds. Those that decide the numbers (model, optimizer, data, seed, shards, buckets)
make up the run's identity, the *config digest*: a snapshot continues only under an equal digest. The others
(how many steps, where to write, how often, which device) may change between restarts.

Does not own: the rest of a recipe (loader), the layers (model.py), the command line (cli.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.groups import nccl

# The task that is built in.
EVOFORMER = "evoformer"
# Steps between snapshots on disk when nothing is known about failures.
DEFAULT_EVERY = 10
# Of data and model, the settings that decide no number.
_NOT_NUMBERS = (
    *("store", "loader_threads", "prefetch_steps"),
    *("cache_folder", "cache_gb", "cache_memory_mb", "cache_redis", "recompute"),
)
# Those that came later are named only where they differ from what all runs were before: old digests stay.
_LATER = ("on_unreadable", "distogram_weight", "schedule", "decay_steps", "decay_factor", "ema_decay")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TrainerConfigError(message)


class _Rule(NamedTuple):
    """What the value of a field must be; stands in the field's type."""

    holds: Callable[[Any], bool]
    text: str


def _not_negative(zero: str = "") -> _Rule:
    """Returns the rule of values that are 0 or more; says what 0 means where that is given."""
    return _Rule(lambda value: value >= 0, f"it must not be negative{zero and f' (0: {zero})'}")


_POSITIVE = _Rule(lambda value: value > 0, "it must be greater than 0")
_PORT = _Rule(lambda value: 0 <= value <= 65535, "it must be a port, 1 to 65535, or 0 for none")
_PRESET = _Rule(lambda value: value in nccl.CHOICES, f"choose one of {', '.join(nccl.CHOICES)}")
PositiveInt = Annotated[int, _POSITIVE]
PositiveFloat = Annotated[float, _POSITIVE]
NotNegativeInt = Annotated[int, _not_negative()]
NotNegativeFloat = Annotated[float, _not_negative()]
Share = Annotated[float, _Rule(lambda value: 0.0 <= value < 1.0, "it must be in [0, 1)")]


def _check_fields(config: Any) -> None:
    """Checks every field of a dataclass against the rules and the choices of its type."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value, rules = getattr(config, name), getattr(hint, "__metadata__", ())
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            rules = (_Rule(choices.__contains__, f"choose one of {', '.join(choices)}"),)
        for rule in rules:
            _require(rule.holds(value), f"{name} is {value!r}; {rule.text}.")


def _numbers(config: Any) -> dict[str, Any]:
    """Returns the settings of a part of the run that decide its numbers."""
    told = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    return {
        name: value
        for name, (value, default) in told.items()
        if name not in _NOT_NUMBERS and not (name in _LATER and value == default)
    }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of the compact Evoformer; the defaults train on a laptop's CPU.

    AlphaFold 2's own sizes are c_m 256, c_z 128, c_e 64, 48 blocks, 4 extra blocks, 8 and 4 heads.

    Attributes:
      c_m: channels of the MSA representation.
      c_z: channels of the pair representation.
      c_e: channels of the extra MSA representation.
      num_blocks: Evoformer blocks.
      num_extra_blocks: blocks of the extra MSA stack.
      num_heads: attention heads; c_m and c_e divide by it.
      c_opm: hidden channels of the outer product mean.
      c_tri: hidden channels of the triangle multiplications.
      transition_factor: widening of the transitions.
      dropout_msa: row-wise dropout of the MSA row attention.
      dropout_pair: row- or column-wise dropout of the triangle updates.
      max_relative: relative positions are clipped to +- this many residues.
      distogram_weight: of the loss of predicted distances (AlphaFold 2 uses 0.3); needs records with
        structures; 0 for no such head.
      recompute: keep only what lies between blocks, and compute their inside again in backward: less memory,
        more time, equal bits.
    """

    c_m: PositiveInt = 32
    c_z: PositiveInt = 16
    c_e: PositiveInt = 16
    num_blocks: PositiveInt = 2
    num_extra_blocks: PositiveInt = 1
    num_heads: PositiveInt = 4
    c_opm: PositiveInt = 8
    c_tri: PositiveInt = 16
    transition_factor: PositiveInt = 2
    dropout_msa: Share = 0.15
    dropout_pair: Share = 0.25
    max_relative: PositiveInt = 32
    distogram_weight: Annotated[float, _not_negative("no distances")] = 0.0
    recompute: bool = False

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("c_m", "c_e"):
            value = getattr(self, name)
            _require(
                value % self.num_heads == 0, f"{name} {value} does not divide by num_heads {self.num_heads}."
            )

    @classmethod
    def sized(cls, size: str, **overrides: Any) -> ModelConfig:
        """Returns a named size with some values replaced.

        Args:
          size: one of `MODEL_SIZES`.
          overrides: values that differ.
        Raises:
          TrainerConfigError: an unknown size, or a value that breaks a rule.
        """
        _require(size in MODEL_SIZES, f"size is {size!r}; choose one of {', '.join(MODEL_SIZES)}.")
        return cls(**(MODEL_SIZES[size] | overrides))


# What a laptop's CPU trains, what a workstation's GPU does, and half of AlphaFold 2's channels.
MODEL_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"c_m": 64, "c_z": 32, "c_e": 32, "num_blocks": 4, "c_opm": 16, "c_tri": 32},
    "base": {
        **{"c_m": 128, "c_z": 64, "c_e": 32, "num_blocks": 8, "num_extra_blocks": 2, "num_heads": 8},
        **{"c_opm": 16, "c_tri": 64, "transition_factor": 4},
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with clipping, a schedule of the learning rate and, by choice, an average of the weights.

    Attributes:
      lr: learning rate after warmup.
      warmup_steps: linear from lr / warmup_steps; 0 for none.
      max_norm: clip the mean gradient's norm to this; 0 for no clipping.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: AdamW's epsilon.
      weight_decay: decoupled weight decay.
      schedule: after warmup ``constant``; ``step`` multiplies by decay_factor at every decay_steps-th step
        (AlphaFold 2: 0.95, 50000); ``linear`` or ``cosine`` reach decay_factor * lr at step decay_steps.
      decay_steps: period of ``step``, last step of ``linear`` and ``cosine``.
      decay_factor: what ``step`` multiplies by, the share of lr at which the others end.
      ema_decay: of the moving average of the weights (AlphaFold 2: 0.999); 0 for none.
    """

    lr: PositiveFloat = 1e-3
    warmup_steps: NotNegativeInt = 10
    max_norm: NotNegativeFloat = 1.0
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: PositiveFloat = 1e-6
    weight_decay: NotNegativeFloat = 0.0
    schedule: Literal["constant", "step", "linear", "cosine"] = "constant"
    decay_steps: int = 0
    decay_factor: Share = 0.0
    ema_decay: Share = 0.0

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.schedule == "constant":
            for name in ("decay_steps", "decay_factor"):
                value = getattr(self, name)
                _require(
                    not value, f"{name} is {value}, but a constant schedule does not decay; give another."
                )
            return
        _require(
            self.decay_steps > self.warmup_steps,
            f"decay_steps is {self.decay_steps}; schedule {self.schedule} needs more than the "
            f"{self.warmup_steps} steps of warmup.",
        )
        _require(
            self.decay_factor > 0 or self.schedule != "step",
            "decay_factor is 0; schedule step needs one between 0 and 1, such as 0.95.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which samples, and how many per step.

    Attributes:
      store: folder or URL of the feature store to train from.
      recipe: recipe of the loader: af2 or crop_first.
      record_set: name of a record set saved in the store; all records when empty.
      crop_residues: residues of a crop.
      num_clusters: clustered MSA rows.
      num_extra: extra MSA rows.
      global_batch: samples per step, over all ranks.
      virtual_shards: V, the unit of work and of the summation order; 0 for one per sample.
      loader_threads: threads that prepare samples (no effect on the numbers).
      prefetch_steps: steps prepared ahead (no effect on the numbers).
      cache_folder: local folder where all ranks of a machine keep what they read of a remote store.
      cache_gb: limit of that folder in 10^9 bytes; 0 for 107.
      cache_memory_mb: memory of each rank for the same, in 10^6 bytes; 0 for none, or 268 with another cache.
      cache_redis: URL of a Redis server for the same, redis:// or rediss:// (TLS); its password comes from
        FOLDFEED_REDIS_PASSWORD.
      on_unreadable: ``stop`` at a damaged record, or ``substitute`` another one by a fixed rule and say so.
    """

    store: str
    recipe: str = "af2"
    record_set: str = ""
    crop_residues: PositiveInt = 256
    num_clusters: PositiveInt = 128
    num_extra: PositiveInt = 1024
    global_batch: PositiveInt = 8
    virtual_shards: NotNegativeInt = 0
    loader_threads: PositiveInt = 2
    prefetch_steps: PositiveInt = 2
    cache_folder: str = ""
    cache_gb: NotNegativeFloat = 0.0
    cache_memory_mb: NotNegativeFloat = 0.0
    cache_redis: str = ""
    on_unreadable: str = "stop"

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            bool(self.store), "store is empty; give the folder or URL that `foldfeed build --store` wrote."
        )
        _require(
            self.global_batch % self.num_shards == 0,
            f"global_batch {self.global_batch} does not divide by virtual_shards {self.num_shards}; "
            "every virtual shard holds equally many samples.",
        )

    @property
    def num_shards(self) -> int:
        """V with the default resolved."""
        return self.virtual_shards or self.global_batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutConfig:
    """Records that are never trained on, and how often their loss is looked at.

    Attributes:
      eval_set: name of a record set of the store; none when empty.
      eval_every: steps between looks; the last step looks, too.
      eval_samples: first so many samples of it; 0 for each record once.
      eval_ema: look with the moving average of the weights.
    """

    eval_set: str = ""
    eval_every: PositiveInt = 50
    eval_samples: Annotated[int, _not_negative("every record once")] = 0
    eval_ema: bool = False

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotConfig:
    """Where and when the state is written.

    Attributes:
      every: steps between snapshots on disk; 0 for only the last one; -1 for 10, or what fits --mtbf.
      keep: newest generations to keep on disk.
      resume: ``auto`` (newest valid one of this run), ``none``, or a snapshot's folder.
      memory: folder in memory for snapshots every few steps, lost with the machine; ``none`` for none.
      memory_every: steps between snapshots in memory; 0 chooses from what they cost (0.1 % of the time, or
        what fits --mtbf).
      mirror: URL of a folder of this run alone to which snapshots on disk are copied in the background; a
        start in an empty folder fetches the newest from there. None when empty.
      mtbf_s: mean time between failures of the whole run, in seconds; intervals that are not given are then
        chosen from it and the measured cost of a snapshot (Young, Daly); 0 when unknown.
    """

    every: int = -1
    keep: int = 2
    resume: str = "auto"
    memory: str = "/dev/shm"
    memory_every: NotNegativeInt = 0
    mirror: str = ""
    mtbf_s: float = 0.0

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            self.every >= -1,
            f"snapshot_every is {self.every}; it must be a number of steps, 0 (only at the end) or -1 "
            "(chosen).",
        )
        _require(self.mtbf_s >= 0, f"mtbf is {self.mtbf_s}; it must not be negative.")
        _require(
            not (self.mtbf_s and self.every >= 0 and (self.memory_every or self.memory == "none")),
            f"mtbf {self.mtbf_s:g} has no effect, because every interval is given; leave out --mtbf, "
            "--snapshot-every or --memory-every.",
        )
        _require(bool(self.memory), "memory_snapshots is empty; give a folder in memory, or none.")
        _require(self.keep >= 1, f"keep_snapshots is {self.keep}; keep at least 1.")
        _require(bool(self.resume), "resume is empty; give auto, none or the folder of a snapshot.")

    @property
    def disk_every(self) -> int:
        """Steps between snapshots on disk; 0 for only the last one, -1 to choose from costs."""
        if self.every >= 0:
            return self.every
        return -1 if self.mtbf_s else DEFAULT_EVERY


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run.

    Attributes:
      output: folder of this run, seen by all ranks.
      task: what is trained: the compact Evoformer, or your own, as FILE.py:NAME or MODULE:NAME.
      steps: total steps of the run, resumed ones included.
      seed: seed of weights, data order, crops and dropout.
      data: samples.
      model: sizes of the compact Evoformer.
      optimizer: AdamW.
      snapshots: where and when the state is written.
      held_out: whose loss is looked at now and then.
      reducer: how gradients travel: tree, hierarchical (inside nodes first) and auto (measures both) give
        equal bits on any ranks; ring (all-reduce) and ddp (torch's) are controls.
      bucket_mb: limit of a gradient bucket; 0 chooses one from the model's size.
      device: where to train; auto takes CUDA when there is one. With cuda-shared ranks may share a GPU and
        gradients go over the host: to try out on one card what several do.
      threads: torch's threads per rank; more than one may change the order of sums inside a kernel.
      deterministic: use deterministic kernels, and refuse to continue where bits could differ.
      timeout_s: a collective that waits longer fails the run.
      log_every: steps between console lines.
      tensorboard: write TensorBoard scalars.
      max_skipped: steps in a row that may be skipped as not finite before the run ends with an error; 0: any.
      metrics_port: where Prometheus may ask for the loader's meters, on this machine only
        (http://127.0.0.1:PORT/metrics); every rank of a node adds its local rank; 0 for nowhere.
      loader_trace: a file for what every thread of the loader did when, to be opened with Perfetto; other
        ranks than the first add their number to its name; none when empty.
      profile_step: trace this step and the next two with torch's profiler; 0 for none.
      lease_s: a run that did not renew its hold on the output folder for so many seconds counts as dead.
      precision: of forward passes: ``fp32``, or ``bf16``: matrix products in bfloat16, weights and their
        updates in float32.
      compile: compile the blocks (torch.compile): other bits than without, equal ones in every run. The
        first step may take minutes, for which --timeout-s should allow. If nothing is said a run does what it
        did before, and a new one of the compact Evoformer on a GPU tries whether they repeat to the bit.
      wire: numbers of messages: ``fp32``; ``bf16`` rounds the gradient of each virtual shard and every sum of
        two (added in fp32) to bfloat16, on any number of ranks: half the bytes; ``bf16-between`` is that with
        fp32 messages inside nodes.
      nccl_preset: settings of NCCL for the links between GPUs: ``none``, a name, or ``auto``: by the topology
        (one node: nvlink, several: infiniband or ethernet). What is set in the environment stays.
    """

    output: str
    task: str = EVOFORMER
    steps: PositiveInt = 100
    seed: int = 0
    data: DataConfig
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    snapshots: SnapshotConfig = dataclasses.field(default_factory=SnapshotConfig)
    held_out: HeldOutConfig = dataclasses.field(default_factory=HeldOutConfig)
    reducer: Literal["tree", "hierarchical", "auto", "ring", "ddp"] = "tree"
    bucket_mb: Annotated[float, _not_negative("automatic")] = 0.0
    device: Literal["auto", "cpu", "cuda", "cuda-shared"] = "auto"
    threads: PositiveInt = 1
    deterministic: bool = True
    timeout_s: PositiveFloat = 120.0
    log_every: PositiveInt = 1
    tensorboard: bool = True
    max_skipped: Annotated[int, _not_negative("any number")] = 20
    metrics_port: Annotated[int, _PORT] = 0
    loader_trace: str = ""
    profile_step: Annotated[int, _not_negative("none")] = 0
    lease_s: PositiveFloat = 60.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool | None = None
    wire: Literal["fp32", "bf16", "bf16-between"] = "fp32"
    nccl_preset: Annotated[str, _PRESET] = "auto"

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(bool(self.output), "output is empty; give a folder for snapshots and metrics.")
        _require(
            "://" not in self.output,
            f"output {self.output!r} is a URL; snapshots need rename and fsync, give a mounted folder.",
        )
        _require(bool(self.task), f"task is empty; give {EVOFORMER}, FILE.py:NAME or MODULE:NAME.")
        _require(
            self.task == EVOFORMER or self.model == ModelConfig(),
            f"sizes of the compact Evoformer are given, but the task is {self.task}; leave them out.",
        )
        _require(
            self.profile_step <= self.steps,
            f"profile_step is {self.profile_step}, but the run has {self.steps} steps; give one of them.",
        )
        _require(
            self.wire == "fp32" or self.reducer not in ("ring", "ddp"),
            f"wire {self.wire} does not go with reducer {self.reducer}, whose backend would add in bfloat16; "
            "use tree, hierarchical or auto.",
        )
        _require(
            self.wire != "bf16-between" or self.reducer in ("hierarchical", "auto"),
            f"wire {self.wire} is about messages between nodes; use reducer hierarchical or auto, or bf16.",
        )
        _require(
            not self.held_out.eval_ema or self.optimizer.ema_decay > 0,
            "eval_ema looks with a moving average of the weights, and there is none; give --ema-decay 0.999.",
        )

    def check_world(self, world: int) -> None:
        """Checks that every rank gets work.

        Raises:
          TrainerConfigError: more ranks than virtual shards.
        """
        shards = self.data.num_shards
        _require(
            world <= shards,
            f"{world} ranks share {shards} virtual shards; every rank needs one. "
            f"Start at most {shards} ranks or raise --virtual-shards (and --global-batch).",
        )

    def check_elastic(self, world: int) -> None:
        """Checks that ranks may come and go, and that ``world`` of them get work; raises as `check_world`."""
        _require(
            self.reducer in ("tree", "hierarchical"),
            f"--reducer {self.reducer} cannot change its ranks while it runs: its sums depend on their "
            "number, or it measures for longer than they need to meet. Use tree or hierarchical.",
        )
        self.check_world(world)

    def identity(self) -> dict[str, Any]:
        """Returns the settings that decide the numbers, as JSON-able values."""
        return {
            "seed": self.seed,
            "data": {**_numbers(self.data), "virtual_shards": self.data.num_shards},
            "model": _numbers(self.model),
            "optimizer": _numbers(self.optimizer),
            # These sum in the same tree, so a run may change between them.
            "reducer": "tree" if self.reducer in ("hierarchical", "auto") else self.reducer,
            "bucket_mb": self.bucket_mb,
            **({} if self.precision == "fp32" else {"precision": self.precision}),
            **({"compile": True} if self.compile else {}),
            # Which messages are short changes no number.
            **({} if self.wire == "fp32" else {"wire": "bf16"}),
        }

    def digest(self) -> str:
        """Returns the digest of `identity`."""
        return digest_of(self.identity())


def digest_of(identity: Mapping[str, Any]) -> str:
    """Returns the digest of a run's identity; the store is bound by its fingerprint, not by its URL."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
