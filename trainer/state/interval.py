"""How many steps lie between two snapshots: fixed, or chosen from what a snapshot costs.

A snapshot costs the seconds it holds the training loop up; a failure costs, on average, half an interval of
work. Young's and Daly's interval makes their sum smallest for a mean time between failures. Without one there
is nothing to balance, so a tier that is meant to be cheap is held to a share of the time.

Source: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
Generation Computer Systems 22 (2006), equation 37; its first term is Young's (1974).
"""

from __future__ import annotations

import math

# Steps before a chosen interval's first snapshot: the first step of a process pays for warm-up.
FIRST_STEPS = 2
# Of the time, for a tier whose interval is chosen without a mean time between failures.
COST_SHARE = 0.001
# Of the time that copying and writing in the background may take: it uses memory and cores of the steps.
BUSY_SHARE = 0.1


def young_daly_s(cost_s: float, mtbf_s: float) -> float:
    """Returns the seconds of work between two snapshots that lose the least time.

    With 2 s per snapshot and a failure every 10,000 s: 198.7 s (Young alone: 200 s).

    Args:
      cost_s: for which a snapshot holds the run up.
      mtbf_s: mean time between failures of the whole run.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


class Interval:
    """When the next snapshot of one tier is due. All ranks keep equal ones: what they are told is agreed on.

    Attributes:
      chosen: whether costs decide; then `learn` wants to be called after each snapshot.
      steps: the present interval; 0 for never.
    """

    def __init__(self, steps: int, mtbf_s: float = 0.0) -> None:
        """Starts with the given interval.

        Args:
          steps: fixed interval, 0 for none, -1 to choose.
          mtbf_s: for a chosen one; 0 when unknown.
        """
        self.chosen = steps < 0
        self.steps = FIRST_STEPS if self.chosen else steps
        self._mtbf_s = mtbf_s
        self._cost_s: float | None = None
        self._last = 0

    def begin(self, step: int) -> None:
        """Counts from ``step`` completed steps: the run starts there, or a snapshot was taken."""
        self._last = step

    def is_due(self, step: int) -> bool:
        """Returns whether a snapshot belongs after ``step`` completed steps.

        A fixed interval counts from step 0, so that a resumed run takes the same ones.
        """
        if self.chosen:
            return step - self._last >= self.steps
        return self.steps > 0 and step % self.steps == 0

    def learn(self, cost_s: float, step_s: float, busy_s: float = 0.0) -> None:
        """Chooses the interval anew.

        Args:
          cost_s: for which the last snapshot held the run up, on the slowest rank.
          step_s: of a step, on the slowest rank.
          busy_s: for which it goes on in the background, on the slowest rank.
        """
        # Costs vary with what else the disk does; the mean follows within a few snapshots.
        self._cost_s = cost_s if self._cost_s is None else (self._cost_s + cost_s) / 2
        if self._mtbf_s:
            work_s = young_daly_s(self._cost_s, self._mtbf_s)
        else:
            work_s = self._cost_s / COST_SHARE
        self.steps = max(1, round(max(work_s, busy_s / BUSY_SHARE) / step_s))
