"""Traces of a few steps with torch's profiler: OUTPUT/profile_traces/iteration_N/rankR_trace.json.

Every rank writes its own, as torchtitan does; chrome://tracing and Perfetto open them. The trainer's spans
begin with ``trainer::``: each virtual shard's forward and backward, each bucket's exchange (in the
communication thread), the commit and the optimizer. They show which bucket backward hides, and for which one
the step waits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from foldfeed.trainer.errors import TrainerConfigError

FOLDER = "profile_traces"
NUM_STEPS = 3


class StepTraces:
    """The profiler of one process, on for `NUM_STEPS` steps of the run."""

    def __init__(self, output: Path, first_step: int, device: torch.device) -> None:
        """Starts nothing yet.

        Args:
          output: the run's folder.
          first_step: to trace, counted from 1; 0 for none.
          device: CUDA's activity is traced, too, where that is.
        Raises:
          TrainerConfigError: this torch traces one thread alone.
        """
        self._folder = output / FOLDER
        self._first, self._device = first_step, device
        # The exchange runs in a thread of its own. Asked for now: no run should end at its first traced step.
        self._threads = _all_threads() if first_step else None
        self._profile: Any = None

    def begin(self, step: int, rank: int) -> None:
        """Starts before the first traced step, and writes after the last one.

        Args:
          step: completed steps; a step that is run again is traced again.
          rank: of this process now.
        """
        if self._profile is not None and step + 1 >= self._first + NUM_STEPS:
            self.end(step, rank)
        elif self._profile is None and self._first and self._first == step + 1:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, experimental_config=self._threads)
            self._profile.start()

    def end(self, step: int, rank: int) -> None:
        """Writes what was traced until ``step`` completed steps, if anything."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        folder = self._folder / f"iteration_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / f"rank{rank}_trace.json"))


def _all_threads() -> Any:
    try:
        return torch.profiler._ExperimentalConfig(profile_all_threads=True)
    except TypeError as error:
        raise TrainerConfigError(
            f"--profile-step: torch {torch.__version__} cannot trace the thread of the exchange; use a newer "
            "one, or leave it out."
        ) from error
