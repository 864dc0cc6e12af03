"""``python -m foldfeed.trainer.curve RUN... FILE.png``: the losses of runs over their steps, as a picture.

A run's own steps are a thin line and their running median a thick one; what was held out is drawn with dots.
Reads ``metrics.jsonl`` alone, so it works while a run lives and after it failed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from foldfeed.feature_store.looking.plots import ACCENT, BAR, CANVASES, INK, new_figure, write_figure
from foldfeed.trainer.errors import TrainerConfigError, TrainerError
from foldfeed.trainer.exit_code import exit_code
from foldfeed.trainer.training.metrics import METRICS_FILE

TRAINED, HELD_OUT = "loss_metrics/global_avg_loss", "eval/loss"
COLORS = (BAR, ACCENT, "#4f8a4b", "#7a5aa6")
# Steps on either side that the running median looks at.
HALF_WINDOW = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What a run's metrics say of its losses; a step that was skipped has none.

    Attributes:
      name: of the run's folder.
      trained: (completed steps, mean loss of that step).
      held_out: (completed steps, loss of the held-out records).
    """

    name: str
    trained: list[tuple[int, float]]
    held_out: list[tuple[int, float]]

    def smooth(self) -> list[tuple[int, float]]:
        """Returns the running median of the trained losses."""
        values = [value for _, value in self.trained]
        return [
            (step, statistics.median(values[max(0, i - HALF_WINDOW) : i + HALF_WINDOW + 1]))
            for i, (step, _) in enumerate(self.trained)
        ]


def read_curve(run: Path) -> Curve:
    """Reads the losses of a run.

    Args:
      run: its ``--output``.
    Raises:
      TrainerError: there are no metrics, or a line before the last is damaged.
    """
    path = run / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise TrainerError(f"no metrics at {path} ({error.strerror}); give the --output of a run.") from error
    # A killed run may have left half a line.
    whole = [line for line in lines if line.endswith("\n")]
    try:
        rows = [json.loads(line) for line in whole]
        curve = Curve(name=run.name, trained=_column(rows, TRAINED), held_out=_column(rows, HELD_OUT))
    except (ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{path} is damaged ({error}); restore it from a copy.") from error
    if not curve.trained:
        raise TrainerError(f"{path} has no step with a loss yet.")
    return curve


def _column(rows: Sequence[dict[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]


def draw(curves: Sequence[Curve], target: Path) -> None:
    """Draws the curves into a PNG or SVG file.

    Raises:
      TrainerConfigError: another kind of file.
    """
    if target.suffix not in CANVASES:
        raise TrainerConfigError(f"{target} is neither .png nor .svg; give one of those names.")
    figure, axes = new_figure(7.0, 4.2)
    for curve, color in zip(curves, COLORS * len(curves), strict=False):
        axes.plot(*zip(*curve.trained, strict=True), color=color, alpha=0.25, linewidth=0.8)
        smooth = zip(*curve.smooth(), strict=True)
        axes.plot(*smooth, color=color, linewidth=1.8, label=f"{curve.name}, trained")
        if curve.held_out:
            dots: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4, "dashes": (3, 2)}
            axes.plot(*zip(*curve.held_out, strict=True), label=f"{curve.name}, held out", **dots)
    axes.set_xlabel("completed steps", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.legend(frameon=False)
    write_figure(figure, target)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def command(runs: tuple[Path, ...], target: Path) -> None:
    """Draw the losses of RUNS (their --output folders) over the steps into the picture TARGET."""
    curves = [read_curve(run) for run in runs]
    draw(curves, target)
    for curve in curves:
        step, loss = curve.smooth()[-1]
        held_out = f", held out {curve.held_out[-1][1]:.4f}" if curve.held_out else ""
        click.echo(f"{target}: {curve.name} step {step}  loss {loss:.4f}{held_out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code(command, "foldfeed.trainer.curve", arguments)


if __name__ == "__main__":
    sys.exit(main())
