"""Agreement: means over whoever is there, of ranks in threads of one process: what counts, and what does not."""

import logging
import math

import pytest
import torch
from torch.distributed import HashStore

from gossip_world import Rank, at_once, settle, spread, world


def test_what_does_not_count_may_be_infinite_and_leaves_no_trace() -> None:
    store = HashStore()
    ranks: list[Rank] = at_once(*(lambda rank=rank: Rank(store, 2, rank) for rank in range(2)))
    mask = torch.tensor([0.0, -math.inf])
    for rank in ranks:
        rank.model.register_buffer("mask", mask.clone())
        rank.model.register_buffer("place", torch.tensor([-5 - rank.rank]))
        rank.model.register_buffer("is_used", torch.tensor([rank.rank == 0, rank.rank == 1]))
    try:
        at_once(*(lambda rank=rank: rank.gossip.open(rank.replica) for rank in ranks))  # the second has no weight yet
        for rank in ranks:
            assert torch.equal(rank.model.mask, mask)
            assert torch.equal(rank.model.place, torch.tensor([-5]))
            assert torch.equal(rank.model.is_used, torch.tensor([True, False]))
        ranks[1].model.is_used[1] = True
        settle(ranks)
        for rank in ranks:
            assert torch.equal(rank.model.mask, mask)
            assert torch.equal(rank.model.is_used, torch.tensor([True, True]))
    finally:
        at_once(*(rank.close for rank in ranks))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_rank_whose_parameters_are_not_finite_counts_for_nothing(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    with world(3) as ranks, caplog.at_level(logging.WARNING, "asyncprop"):
        spread(ranks)
        with torch.no_grad():
            ranks[2].model[0].weight[0, 0] = value
        settle(ranks)
        for rank in ranks:
            assert torch.equal(rank.values(), torch.full_like(rank.values(), 0.5))
            assert rank.weights == [1.0, 1.0]
            assert rank.gossip.tally.weight == pytest.approx(2 / 3)
        assert "rank 2: 0.weight has values that are not finite" in caplog.text


def test_ranks_none_of_which_is_finite_end_equal_all_the_same() -> None:
    with world(2) as ranks:
        for rank in ranks:
            rank.set(math.nan)
        settle(ranks)
        assert all(bool(rank.values().isnan().all()) for rank in ranks)
        assert all(rank.weights == [1.0, 1.0] for rank in ranks)
