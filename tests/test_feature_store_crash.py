"""SIGKILL at steps of everything that writes, and at random moments: a short form of campaigns/crash.py."""

import random

import pytest
from crash_checks import BEFORE, Case
from crash_harness import server

NUM_STEPS = 6
NUM_RANDOM = 12


@pytest.fixture(scope="module")
def killer():
    with server() as running:
        yield running


@pytest.mark.parametrize("name", sorted(BEFORE))
def test_a_kill_at_any_step_leaves_the_store_as_before_or_as_after(killer, tmp_path, name):
    case = Case(killer, name, tmp_path)
    # Steps all over the way, and each of the last ones: there the commit happens.
    chosen = {1 + case.steps * number // NUM_STEPS for number in range(NUM_STEPS)}
    chosen |= set(range(max(1, case.steps - 4), case.steps + 1))
    seen = {case.kill(step=step, torn=step % 2 == 1) for step in sorted(chosen)}
    # The threads of a copy race for the making of folders, so one run has some steps less than another, and a
    # kill at its last steps may find it done.
    assert seen <= {"before", "after", *(["done"] if name == "copy" else [])}
    if name not in ("create", "gc"):
        assert "before" in seen


def test_kills_at_random_moments(killer, tmp_path):
    rng = random.Random(5)
    case = Case(killer, "commit", tmp_path)
    outcomes = [case.kill(after_s=rng.uniform(0, case.seconds)) for _ in range(NUM_RANDOM)]
    assert "before" in outcomes
