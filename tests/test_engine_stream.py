"""Which clip comes when: every clip once per epoch, whatever the world, the workers or the resume point."""

from __future__ import annotations

import itertools
from collections import Counter

from engine.stream import PositionBatches, clip_at


def batches(count: int, *, seen: int = 0, batch: int, rank: int, world: int) -> list[list[int]]:
    endless = PositionBatches(seen, batch_size=batch, rank=rank, world_size=world)
    return list(itertools.islice(endless, count))


def positions(seen: int, steps: int, batch: int, accum: int, world: int) -> list[list[int]]:
    """Per optimiser step, the sorted positions over all ranks."""
    ranks = [batches(steps * accum, seen=seen, batch=batch, rank=rank, world=world) for rank in range(world)]
    return [
        sorted(itertools.chain.from_iterable(m for rank in ranks for m in rank[step * accum : (step + 1) * accum]))
        for step in range(steps)
    ]


def test_a_global_batch_is_the_same_positions_however_it_is_split() -> None:
    splits = [(12, 1, 1), (4, 3, 1), (2, 1, 6), (2, 2, 3), (1, 4, 3)]
    expected = [list(range(24 + 12 * step, 36 + 12 * step)) for step in range(5)]
    for batch, accum, world in splits:
        assert positions(24, 5, batch, accum, world) == expected


def test_micro_batches_do_not_depend_on_ranks_or_accumulation() -> None:
    accumulated = batches(6, batch=2, rank=0, world=1)
    parallel = [batches(3, batch=2, rank=rank, world=2) for rank in range(2)]
    assert accumulated == [batch for step in zip(*parallel) for batch in step]


def test_every_clip_comes_once_per_epoch_in_a_new_order() -> None:
    length, seed = 13, 5
    visits = [clip_at(position, length, seed) for position in range(4 * length)]
    for epoch in range(4):
        part = visits[epoch * length : (epoch + 1) * length]
        assert {e for e, _ in part} == {epoch}
        assert Counter(index for _, index in part) == Counter(range(length))
    orders = [tuple(index for e, index in visits if e == epoch) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert clip_at(20, length, seed) != clip_at(20, length, seed + 1) or orders[0] != orders[1]
