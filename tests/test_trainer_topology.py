"""Places of ranks: where they come from, and who gives to whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.topology import own_place, pair_up


def test_a_place_comes_from_the_environment_a_file_or_the_host(tmp_path: Path) -> None:
    file = tmp_path / "topology"
    file.write_text("# nodes of one hall\nnode17 eu/switch3/node17\nnode18  eu/switch4/node18  # new\n\n")
    slurm = {"SLURM_TOPOLOGY_ADDR": "s0.s3.node17"}
    assert own_place({}, "node17") == ("node17",)
    assert own_place(slurm, "node17") == ("s0", "s3", "node17")
    listed = {**slurm, "FOLDFEED_TOPOLOGY": str(file)}
    assert own_place(listed, "node18") == ("eu", "switch4", "node18")
    assert own_place({**listed, "FOLDFEED_PLACE": "us/switch1"}, "node18") == ("us", "switch1")
    with pytest.raises(TrainerConfigError, match="has no line for node19; add one"):
        own_place(listed, "node19")
    file.write_text("node17 eu switch3\n")
    with pytest.raises(TrainerConfigError, match="line 1: 'node17 eu switch3' is not HOST and PLACE"):
        own_place(listed, "node17")
    with pytest.raises(TrainerConfigError, match="cannot be read"):
        own_place({"FOLDFEED_TOPOLOGY": str(tmp_path / "none")})


def test_the_nearest_gives_and_of_equally_near_ones_the_one_with_fewer_takers() -> None:
    places = ["eu/s1/a", "eu/s1/b", "eu/s2/c", "us/s1/a", "eu/s1/b", "eu/s2/d", "us/s1/a", "asia", "eu/s1/x"]
    split = [place.split("/") for place in places]
    assert pair_up([4, 5, 6, 7, 8], [0, 1, 2, 3], split) == {4: 1, 5: 2, 6: 3, 7: 0, 8: 0}
    assert pair_up([2, 3, 4], [0, 1], [["host"]] * 5) == {2: 0, 3: 1, 4: 0}
    assert pair_up([], [0], [["host"]]) == {}
