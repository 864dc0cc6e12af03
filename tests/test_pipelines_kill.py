"""SIGKILL of a build, three times in a row: a short form of campaigns/pipelines_kill.py."""

import pytest
from build_kills import Builds
from pipelines_data import needs_hmmer

pytestmark = [pytest.mark.external_tool, needs_hmmer]


def test_a_build_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path):
    builds = Builds(tmp_path)
    total = len(builds.reference.answers)
    assert builds.kill_at("killed", 1) == "in its searches"
    assert builds.kill_at("killed", total // 2) == "in its searches"
    # Where parts are written and committed.
    assert builds.kill_at("killed", total) != "in its searches"
    builds.finish("killed")
