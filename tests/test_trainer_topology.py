"""Places of ranks: where they come from, and who gives to whom."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.groups.topology import by_place, nodes_of, own_place, pair_up, told_place


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


def test_nodes_come_from_places_of_a_file_or_else_from_beliefs(tmp_path: Path) -> None:
    file = tmp_path / "topology"
    file.write_text("h1 eu/s1/a\nh2 eu/s2/b\nh3 eu/s1/c\n")
    told = [
        told_place({"FOLDFEED_TOPOLOGY": str(file)}, host) for host in ("h1", "h2", "h1", "h3", "h2", "h2")
    ]
    assert nodes_of(told, [6] * 6) == [[0, 2], [1, 4, 5], [3]]
    assert by_place(told) == [0, 2, 3, 1, 4, 5]
    nothing: list[tuple[str, ...]] = [told_place({}, "h1")] * 6
    assert nodes_of(nothing, [2, 2, 3, 3, 3, 1]) == [[0, 1], [2, 3, 4], [5]]
    # What cannot be: every rank counts alone.
    assert nodes_of(nothing, [4] * 6) == nodes_of(nothing, [1] * 6) == [[rank] for rank in range(6)]
    assert nodes_of(nothing, [2, 2, 2, 3, 3, 3]) == [[rank] for rank in range(6)]
    with pytest.raises(TrainerConfigError, match=r"ranks \[2\] were told no place and the others were; set"):
        nodes_of([*told[:2], ()], [1] * 3)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), min_size=1, max_size=12), st.data())
def test_ranks_of_a_place_are_neighbours_and_stay_it(places: list[list[str]], data: st.DataObject) -> None:
    order = by_place(places)
    assert sorted(order) == list(range(len(places)))
    assert order[0] == 0
    ordered = [places[rank] for rank in order]
    for depth in (1, 2, 3):
        prefixes = [tuple(place[:depth]) for place in ordered if len(place) >= depth]
        changes = sum(one != other for one, other in itertools.pairwise(prefixes))
        assert changes == len(set(prefixes)) - (len(prefixes) > 0)
    # Whoever is lost, the others keep their order.
    left = data.draw(st.lists(st.sampled_from(range(len(ordered))), unique=True, min_size=1)).copy()
    kept = [ordered[rank] for rank in sorted(left)]
    assert by_place(kept) == list(range(len(kept)))
