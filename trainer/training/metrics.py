"""What a run reports: TensorBoard scalars, one JSON line per step, one console line per step.

Scalar names are torchtitan's where it has one (``loss_metrics/global_avg_loss``, ``time_metrics/...``), so
that existing dashboards work. Only the first rank writes. A resumed run drops the lines and scalars of the
steps it is about to repeat, so every step appears once.

Does not own: what the numbers mean (loop.py fills them in). TensorBoard is imported only when it is used.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from foldfeed.trainer.config import RunConfig
from foldfeed.trainer.errors import DependencyError, TrainerError
from foldfeed.trainer.training.commit import Commit

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes the metrics of one rank; silent on all ranks but the first.

    Attributes:
      active: whether this rank writes.
      last: the newest step and its scalars (not finite ones as None), on every rank.
    """

    def __init__(self, config: RunConfig, *, active: bool, may_lead: bool = False) -> None:
        """Keeps the settings; `start` opens the files.

        Args:
          config: where the run's folder is, what goes there, and how often a line is said.
          active: whether this rank writes.
          may_lead: it may have to write later (`lead`), without a wait for imports.

        Raises:
          DependencyError: TensorBoard was asked for and is not installed.
        """
        self._folder = Path(config.output)
        self._config = config
        self.active = active
        self._file: Any = None
        self._writer: Any = None
        self._writer_class = _summary_writer() if (active or may_lead) and config.tensorboard else None
        self.last: tuple[int, dict[str, float | None]] = (0, {})

    def start(self, step: int) -> None:
        """Opens the files to go on after ``step`` completed steps."""
        if not self.active:
            return
        path = self._folder / METRICS_FILE
        _drop_after(path, step)
        self._file = path.open("a", encoding="utf-8")
        if self._writer_class is not None:
            self._writer = self._writer_class(str(self._folder / "tb"), purge_step=step + 1)

    def lead(self, step: int, last: tuple[int, Mapping[str, float | None]]) -> None:
        """Goes on as the first of an elastic run's ranks, after ``step`` completed steps.

        The file is made anew: a former first rank that was stopped and wakes up writes into the old one,
        which has no name any more.

        Args:
          step: that the ranks agreed on.
          last: `last` of a rank that completed it; written if the former first rank did not get to it.
        """
        self.close()
        self.active = True
        kept = _drop_after(self._folder / METRICS_FILE, step)
        self.start(step)
        if last[0] == step and kept < step:
            self._write(step, last[1])

    def follow(self) -> None:
        """Is silent from now on: another rank is first."""
        self.close()
        self.active = False

    def say(self, line: str) -> None:
        """Prints a line on the first rank."""
        if self.active:
            print(line, flush=True)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one step's scalars everywhere.

        Args:
          step: completed steps, 1 after the first.
          scalars: by name; must hold the console line's fields.
        """
        self.last = step, _finite(scalars)
        if not self.active:
            return
        self.note(step, scalars)
        if step % self._config.log_every == 0 or step == 1:
            self.say(console_line(step, scalars))

    def note(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step on a line of their own, for files alone.

        Args:
          step: completed steps.
          scalars: by name.
        """
        if not self.active:
            return
        self._write(step, _finite(scalars))
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def _write(self, step: int, finite: Mapping[str, float | None]) -> None:
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _finite(scalars: Mapping[str, float]) -> dict[str, float | None]:
    """Returns scalars as JSON takes them, which has no NaN: a skipped step's loss and norm are null."""
    return {name: value if math.isfinite(value) else None for name, value in scalars.items()}


def console_line(step: int, scalars: Mapping[str, float]) -> str:
    """Returns the line of a step, in torchtitan's manner."""
    skipped = "  SKIPPED (gradient not finite)" if scalars["train/skipped"] else ""
    return (
        f"step: {step:3d}  loss: {scalars['loss_metrics/global_avg_loss']:.4f}"
        f"  grad_norm: {scalars['grad_norm']:.4f}"
        f"  lr: {scalars['lr']:.2e}"
        f"  samples/s: {scalars['throughput(samples/s)']:.1f}"
        f"  residues/s: {scalars['throughput(residues/s)']:,.0f}"
        f"  data: {scalars['time_metrics/data_loading(%)']:.1f}%"
        f"  comm exposed: {scalars['comm/exposed_ms']:.0f} ms{skipped}"
    )


def commit_scalars(commit: Commit, num_samples: int, seconds: float) -> dict[str, float]:
    """Returns losses, speed and waits of a step.

    Args:
      commit: what the ranks agreed on.
      num_samples: of the step.
      seconds: it took.
    """
    data_s = max(commit.data_s)
    return {
        "loss_metrics/global_avg_loss": commit.mean_loss,
        "loss_metrics/global_max_loss": commit.max_loss,
        "throughput(samples/s)": num_samples / seconds,
        "throughput(residues/s)": commit.num_residues / seconds,
        "time_metrics/end_to_end(s)": seconds,
        "time_metrics/data_loading(s)": data_s,
        "time_metrics/data_loading(%)": 100.0 * min(1.0, data_s / seconds),
        **{f"loss_metrics/{name}": value for name, value in commit.parts.items()},
    }


def memory_scalars(device: torch.device) -> dict[str, float]:
    """Returns peak memory: the allocator's on CUDA, the resident set's on the CPU."""
    gib = 2.0**30
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return {
            "memory/max_active(GiB)": stats.get("active_bytes.all.peak", 0) / gib,
            "memory/max_reserved(GiB)": stats.get("reserved_bytes.all.peak", 0) / gib,
            "memory/num_alloc_retries": float(stats.get("num_alloc_retries", 0)),
            "memory/num_ooms": float(stats.get("num_ooms", 0)),
        }
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory/max_rss(GiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / gib}


def _summary_writer() -> Any:
    try:
        # Lazy: tensorboard is optional and slow to import.
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DependencyError(
            "tensorboard", "run: pip install 'foldfeed[train]', or train with --no-tensorboard."
        ) from error
    return SummaryWriter


def _drop_after(path: Path, step: int) -> int:
    """Removes the lines of steps after ``step`` (and a torn last line) from a metrics file.

    Returns: the last step that is left, 0 for none. Steps ascend, so only the end is parsed.

    Raises:
      TrainerError: what is parsed is damaged.
    """
    if not path.exists():
        return 0
    raw = path.read_bytes()
    stop, last = raw.rfind(b"\n") + 1, 0
    while stop:
        start = raw.rfind(b"\n", 0, stop - 1) + 1
        try:
            last = int(json.loads(raw[start:stop])["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise TrainerError(
                f"{path} is damaged at byte {start} ({error!r}). Move the file away: the run goes on, and "
                "its metrics begin there."
            ) from error
        if last <= step:
            break
        stop, last = start, 0
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(raw[:stop])
    os.replace(temporary, path)
    return last
