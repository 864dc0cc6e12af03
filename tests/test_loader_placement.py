"""Samples placed by where their records are stored: same steps, and a machine reads mostly its part."""

import numpy as np
import pyarrow as pa
import pytest
from test_loader_stream import assert_equal, build_store, by_sample, make_loader, take

from foldfeed.loader import LoaderConfigError, Sampling, StateMismatchError
from foldfeed.loader.order.order import SampleOrder, rank_shards
from foldfeed.loader.order.placement import StoragePlacement


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("placement") / "store")


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(epoch_end="short"), Sampling(kind="weighted", epoch_samples=19)],
    ids=["join", "short", "weighted"],
)
def test_steps_have_the_same_samples_and_shards_hold_them_by_place_whatever_the_world(store, sampling):
    with make_loader(store, sampling=sampling) as loader:
        plain = take(loader, 4)
        order = loader.order
    ids = store.ids
    place = {
        ids[n]: (store[ids[n]].part.part_id, store[ids[n]].tiled.grid.first_tile) for n in range(len(ids))
    }
    shards = {}
    for world in (1, 3, 7):
        found = {}
        for rank in range(world):
            values = {"rank": rank, "world": world, "placement": "storage", "sampling": sampling}
            with make_loader(store, **values) as loader:
                for batch in take(loader, 4):
                    found |= by_sample([batch])
                    for shard in batch.shards:
                        known = shards.setdefault((batch.step, shard.v), shard.samples)
                        assert known == shard.samples, "a shard's samples depend on no world"
        assert_equal(found, by_sample(plain))
    for step, batch in enumerate(plain):
        placed = [sample for shard in range(8) for sample in shards.get((step, shard), [])]
        assert sorted(placed) == sorted(sample for shard in batch.shards for sample in shard.samples)
        places = [place[ids[order.locate(sample).record]] for sample in placed]
        assert places == sorted(places)


@pytest.mark.parametrize(("batch", "least"), [(64, 0.80), (512, 0.93)])
def test_a_machine_reads_mostly_its_own_part_of_the_store(batch, least):
    num_records, nodes, steps = 20_000, 4, 12
    order = SampleOrder(num_records=num_records, seed=1, global_batch=batch, virtual_shards=32)
    # Records of a part are not neighbours among the ids.
    scattered = np.random.default_rng(2).permutation(num_records)
    table = pa.table(
        {"part_id": [f"{n // 500:03}" for n in scattered], "first_tile": [int(n % 500) for n in scattered]}
    )
    placement = StoragePlacement(order, [(table, None)])

    def own_share(shard_samples) -> float:
        own = total = 0
        for node in range(nodes):
            for step in range(steps):
                shards = rank_shards(32, node, nodes)
                records = order.records([sample for shard in shards for sample in shard_samples(step, shard)])
                own += int((scattered[records] * nodes // num_records == node).sum())
                total += len(records)
        assert total == steps * batch
        return own / total

    assert own_share(placement.shard_samples) > least
    assert own_share(order.shard_samples) < 0.3


def test_a_placement_is_part_of_the_stream(store):
    with make_loader(store, placement="storage") as loader, make_loader(store) as plain:
        state = loader.state_dict()
        loader.load_state_dict(state)
        with pytest.raises(StateMismatchError, match="placement='storage'"):
            plain.load_state_dict(state)
        with pytest.raises(StateMismatchError, match="placement='order'"):
            loader.load_state_dict(plain.state_dict())
    with pytest.raises(LoaderConfigError, match="must be one of order, storage"):
        make_loader(store, placement="node")
