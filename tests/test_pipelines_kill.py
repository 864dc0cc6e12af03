"""SIGKILL of a build at three moments: a short form of campaigns/pipelines_kill.py."""

import pytest
from build_kills import Builds
from pipelines_data import needs_hmmer

pytestmark = [pytest.mark.external_tool, needs_hmmer]


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path):
    builds = Builds(tmp_path)
    begun_s, ended_s = builds.reference.begun_s, builds.reference.ended_s
    # Before the first answer, among them, and where parts are written and committed, by the clock of one run.
    for number, share in enumerate((0.0, 0.5, 0.9)):
        builds.kill_and_resume(f"killed{number}", begun_s + share * (ended_s - begun_s))
