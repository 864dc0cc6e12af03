"""The result store: what is put comes back, damage is noticed, equal results are equal bytes."""

import dataclasses
import json

import pytest

from foldfeed.pipelines import SearchResult, ToolIdentity
from foldfeed.pipelines.errors import CorruptResultError
from foldfeed.pipelines.programs.subprocess_runner import Usage
from foldfeed.pipelines.searches.results import ResultStore, unit_id_of

TOOL = ToolIdentity(name="jackhmmer", version="3.4", binary_sha256="0" * 64, argv_template=("-N", "1"))


def make_result(wall_s: float = 1.5) -> SearchResult:
    return SearchResult(
        tool=TOOL,
        format="stockholm",
        alignment=b"# STOCKHOLM 1.0\n\nquery ACD\n//\n" * 50,
        table=b"t - query - 1e-5 20 0\n",
        usage=Usage(wall_s=wall_s, cpu_s=2.5, max_rss_bytes=1 << 20),
    )


def test_what_is_put_comes_back(tmp_path):
    store = ResultStore(str(tmp_path / "r"))
    unit_id = unit_id_of("ACD", "db", TOOL.digest)
    assert not store.holds(unit_id)
    with pytest.raises(KeyError):
        store.get(unit_id)
    store.put(unit_id, make_result())
    assert store.get(unit_id) == make_result()
    assert store.holds(unit_id)
    other = unit_id_of("ACE", "db", TOOL.digest)
    assert store.present({unit_id, other}) == {unit_id}


def test_equal_answers_are_equal_bytes_whatever_they_cost(tmp_path):
    for name, wall_s in (("a", 1.0), ("b", 99.0)):
        ResultStore(str(tmp_path / name)).put("ab" * 32, make_result(wall_s))
    one, two = (next((tmp_path / name).rglob("*.zst")).read_bytes() for name in "ab")
    assert one == two


def test_every_part_of_the_key_counts():
    base = unit_id_of("ACD", "db", "tool")
    assert len({base, unit_id_of("ACE", "db", "tool"), unit_id_of("ACD", "d2", "tool")}) == 3
    assert base != unit_id_of("ACD", "db", "tool2")
    changed = dataclasses.replace(TOOL, argv_template=("-N", "2"))
    assert changed.digest != TOOL.digest


@pytest.mark.parametrize("damage", ["flip", "cut", "no frame", "bad receipt", "other payload"])
def test_damage_is_noticed_and_counts_as_missing(tmp_path, damage):
    store = ResultStore(str(tmp_path))
    store.put("ab" * 32, make_result())
    frame, receipt = next(tmp_path.rglob("*.zst")), next(tmp_path.rglob("*.json"))
    data = bytearray(frame.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
        frame.write_bytes(data)
    elif damage == "cut":
        frame.write_bytes(data[:-5])
    elif damage == "no frame":
        frame.unlink()
    elif damage == "bad receipt":
        receipt.write_text("{}")
    else:
        changed = json.loads(receipt.read_text()) | {"payload_sha256": "0" * 64}
        receipt.write_text(json.dumps(changed))
    assert not store.holds("ab" * 32)
    with pytest.raises((CorruptResultError, KeyError)):
        store.get("ab" * 32)
