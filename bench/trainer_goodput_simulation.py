"""How much of a long run is training, by number of GPUs: hourly checkpoints against what this trainer does.

A simulation, not a measurement: failures come at a published rate per GPU, and each way of going on costs
what was measured (this trainer, on a few ranks: bench/README.md) or published (the others). A failure while
ranks still start again starts that over. That thousands of ranks recover as quickly as a few is assumed.

  hourly      a checkpoint an hour; all ranks start again from it
  interval    the same, at the interval of Young and Daly
  in process  survivors go on in seconds and do the interrupted step again; until the lost ranks are replaced,
              the others share their virtual shards, so a step takes (k + 1) / k as long with k shards a rank
  spares      the same with ranks in waiting, which take over at once

Rates: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, Meta 2024: one per 50,700 GPU hours);
a mean time to failure of 7.9 h at 1,024 GPUs (Meta's research clusters, Kokolis et al. 2024: one per 8,100).

Run: python bench/trainer_goodput_simulation.py [--recovery-s 0.5] [--restart-s 600] [--picture FILE.png]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rows import emit

HOUR_S = 3600.0
GPU_HOURS_PER_FAILURE = {"Llama 3": 16_384 * 54 * 24 / 419, "research clusters": 1_024 * 7.9}
WORLDS = (8, 64, 256, 1024, 4096, 16384)
COLORS = {"hourly": "#c8502b", "interval": "#7a5aa6", "in process": "#2f6f9f", "spares": "#4f8a4b"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that things take.

    Attributes:
      step_s: of a step.
      checkpoint_s: for which a checkpoint holds training up.
      restart_s: to notice a failure, start all ranks again and read the checkpoint.
      recovery_s: for the survivors to notice, agree and form a group.
      replace_s: until a lost machine has a successor, where none waits.
      shards_per_rank: virtual shards of a rank.
    """

    step_s: float
    checkpoint_s: float
    restart_s: float
    recovery_s: float
    replace_s: float
    shards_per_rank: int


def goodput(way: str, mtbf_s: float, wanted_s: float, costs: Costs, draw: random.Random) -> float:
    """Returns the share of the wall time that the weights keep, for ``wanted_s`` seconds of training."""
    if way in ("hourly", "interval"):
        interval_s = HOUR_S if way == "hourly" else math.sqrt(2 * costs.checkpoint_s * mtbf_s)
        return _from_checkpoints(mtbf_s, wanted_s, max(interval_s, costs.step_s), costs, draw)
    return _by_survivors(mtbf_s, wanted_s, costs, draw, spares=way == "spares")


def _from_checkpoints(
    mtbf_s: float, wanted_s: float, interval_s: float, costs: Costs, draw: random.Random
) -> float:
    wall = done = 0.0
    failure = draw.expovariate(1 / mtbf_s)
    while done < wanted_s:
        segment = min(interval_s, wanted_s - done)
        if wall + segment + costs.checkpoint_s <= failure:
            wall += segment + costs.checkpoint_s
            done += segment
            continue
        wall = failure
        failure = wall + draw.expovariate(1 / mtbf_s)
        # A failure while ranks start again starts that again.
        while wall + costs.restart_s > failure:
            wall = failure
            failure = wall + draw.expovariate(1 / mtbf_s)
        wall += costs.restart_s
        if wall > 1000 * wanted_s:
            return 0.0
    return wanted_s / wall


def _by_survivors(
    mtbf_s: float, wanted_s: float, costs: Costs, draw: random.Random, *, spares: bool
) -> float:
    wall = done = 0.0
    replaced: list[float] = []
    failure = draw.expovariate(1 / mtbf_s)
    slow = (costs.shards_per_rank + 1) / costs.shards_per_rank
    while done < wanted_s:
        replaced = [moment for moment in replaced if moment > wall]
        pace = slow if replaced else 1.0
        until = min([failure, *replaced])
        left = (wanted_s - done) * pace
        if wall + left <= until:
            wall += left
            done = wanted_s
            break
        done += (until - wall) / pace
        wall = until
        if until == failure:
            # On the average half of the step is done again.
            done = max(0.0, done - costs.step_s / 2 / pace)
            wall += costs.recovery_s
            failure = wall + draw.expovariate(1 / mtbf_s)
            if not spares:
                replaced.append(wall + costs.replace_s)
    return wanted_s / wall


def simulate(costs: Costs, days: float, repeats: int) -> dict[str, dict[str, dict[int, float]]]:
    """Returns the median goodput by published rate, way and number of GPUs."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for rate, gpu_hours in GPU_HOURS_PER_FAILURE.items():
        for way in COLORS:
            for world in WORLDS:
                mtbf_s = gpu_hours * HOUR_S / world
                shares = [
                    goodput(way, mtbf_s, days * 24 * HOUR_S, costs, random.Random(f"{rate} {world} {number}"))
                    for number in range(repeats)
                ]
                found.setdefault(rate, {}).setdefault(way, {})[world] = round(statistics.median(shares), 4)
    return found


def draw_picture(found: dict[str, dict[str, dict[int, float]]], target: Path) -> None:
    """Draws one panel for each published rate."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (rate, ways) in zip(panels, found.items(), strict=True):
        for way, shares in ways.items():
            axes.plot(
                list(shares), [100 * share for share in shares.values()], marker="o", markersize=3, label=way
            )
            axes.lines[-1].set_color(COLORS[way])
        axes.set_xscale("log", base=2)
        axes.set_title(f"failures as on {rate}", fontsize=10)
        axes.set_xlabel("GPUs")
        axes.grid(color="#d9dee4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training, % of the wall time")
    panels[0].legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(target))


def main() -> None:
    """Simulates, draws and writes one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-s", type=float, default=10.0)
    parser.add_argument("--checkpoint-s", type=float, default=5.0)
    parser.add_argument("--restart-s", type=float, default=600.0)
    parser.add_argument("--recovery-s", type=float, default=1.0)
    parser.add_argument("--replace-s", type=float, default=1800.0)
    parser.add_argument("--shards-per-rank", type=int, default=4)
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/trainer_goodput_simulation.jsonl"
    )
    given = vars(parser.parse_args())
    days, repeats, picture, output = (given.pop(name) for name in ("days", "repeats", "picture", "output"))
    costs = Costs(**given)
    found = simulate(costs, days, repeats)
    for rate, ways in found.items():
        print(f"{rate}: " + "  ".join(f"{world:>7,}" for world in WORLDS) + "  GPUs")
        for way, shares in ways.items():
            print(f"  {way:<12}" + "  ".join(f"{100 * share:6.1f}%" for share in shares.values()))
    if picture is not None:
        draw_picture(found, picture)
    emit(
        "trainer_goodput_simulation",
        {**dataclasses.asdict(costs), "days": days, "repeats": repeats},
        found,
        output,
    )


if __name__ == "__main__":
    main()
