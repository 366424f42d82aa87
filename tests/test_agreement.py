"""Agreement: means over whoever is there, of ranks in threads of one process: what counts, and what does not."""

import logging
import math
from datetime import timedelta
from typing import Any, ClassVar

import pytest
import torch
from torch.distributed import HashStore

from asyncprop.exchange import Members, agreement, group
from asyncprop.exchange.group import GroupBroken
from gossip_world import Rank, at_once, linked, settle, spread, world


def test_what_does_not_count_may_be_infinite_and_leaves_no_trace() -> None:
    store = HashStore()
    ranks: list[Rank] = at_once(*(lambda rank=rank: Rank(store, 2, rank) for rank in range(2)))
    mask = torch.tensor([0.0, -math.inf])
    for rank in ranks:
        rank.model.register_buffer("mask", mask.clone())
        rank.model.register_buffer("place", torch.tensor([-5 - rank.rank]))
        rank.model.register_buffer("is_used", torch.tensor([rank.rank == 0, rank.rank == 1]))
        rank.model.register_buffer("short", torch.tensor([-1 - rank.rank], dtype=torch.int16))
    try:
        at_once(*(lambda rank=rank: rank.gossip.open(rank.replica) for rank in ranks))  # the second has no weight yet
        linked(ranks)
        for rank in ranks:
            assert torch.equal(rank.model.mask, mask)
            assert torch.equal(rank.model.place, torch.tensor([-5]))
            assert torch.equal(rank.model.is_used, torch.tensor([True, False]))
            assert torch.equal(rank.model.short, torch.tensor([-1], dtype=torch.int16))
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
            assert rank.weight == 1.0
            assert rank.gossip.tally.weight == pytest.approx(2 / 3)
        assert "rank 2: 0.weight has values that are not finite" in caplog.text


def test_ranks_none_of_which_is_finite_end_equal_all_the_same() -> None:
    with world(2) as ranks:
        for rank in ranks:
            rank.set(math.nan)
        settle(ranks)
        assert all(bool(rank.values().isnan().all()) for rank in ranks)
        assert all(rank.weight == 1.0 for rank in ranks)


def alone() -> Rank:
    return Rank(HashStore(), 1, 0)


def test_a_buffer_on_which_ranks_cannot_agree_is_refused() -> None:
    rank = alone()
    rank.model.register_buffer("turns", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match=r"buffers and frozen .* of a type .* \(turns is torch.complex64; known are fl"
    ):
        rank.gossip.open(rank.replica)
    rank.close()


def test_a_failure_of_this_rank_s_own_is_raised_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = alone()
    rank.gossip.open(rank.replica)

    def fails(tensor: torch.Tensor) -> torch.dtype:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(agreement, "_wide", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        rank.gossip.settle()
    rank.close()


def break_once(rank: Rank) -> None:
    """Let this rank's next collective fail before it has begun."""
    own = rank.gossip._agreement._group

    def fails(*given: Any) -> None:
        del own.reduce
        raise GroupBroken("Connection closed by peer")

    own.reduce = fails


def test_when_a_group_breaks_the_ranks_begin_again_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with world(2) as ranks, caplog.at_level(logging.WARNING, "asyncprop"):
        spread(ranks)
        for rank in ranks:
            break_once(rank)
        settle(ranks)
        assert all(torch.equal(rank.values(), torch.full_like(rank.values(), 0.5)) for rank in ranks)
        for number in range(2):
            assert f"rank {number}: ranks begin their meeting again: Connection closed by peer" in caplog.text


def test_those_that_wait_for_a_rank_whose_group_broke_are_told_by_its_leaving() -> None:
    with world(3) as ranks:
        spread(ranks)
        break_once(ranks[0])  # the others wait in the collective for it
        settle(ranks)
        assert all(torch.equal(rank.values(), ranks[0].values()) for rank in ranks)
        assert torch.allclose(ranks[0].values(), torch.tensor(1.0), atol=1e-6)


def test_those_that_still_have_a_group_make_another_with_one_that_has_not() -> None:
    with world(3) as ranks:
        spread(ranks)
        ranks[2].gossip._agreement.forget()  # as one does that was left out and has joined again
        settle(ranks)
        assert all(torch.equal(rank.values(), ranks[0].values()) for rank in ranks)
        assert torch.allclose(ranks[0].values(), torch.tensor(1.0), atol=1e-6)
        keys = {rank.gossip._agreement._group.key for rank in ranks}
        assert len(keys) == 1
        settle(ranks)
        assert {rank.gossip._agreement._group.key for rank in ranks} == keys  # kept, as all have it


class FakeGroup:
    """Notes what it is told to wait for."""

    made: ClassVar[list["FakeGroup"]] = []

    def __init__(self, store: Any, place: int, size: int, timeout: timedelta) -> None:
        self.connecting, self.reducing = timeout, timedelta(0)
        self.made.append(self)

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.reducing = timeout


def test_connecting_is_given_as_long_as_silence_is_borne(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "ProcessGroupGloo", FakeGroup)
    monkeypatch.setattr(FakeGroup, "made", [])
    members = Members(HashStore(), 2, 0, timeout_s=20.0)
    group.Group(members, HashStore()).connect(["", ""], numbers=5_000_000)
    (made,) = FakeGroup.made
    assert made.connecting == timedelta(seconds=20)
    assert made.reducing == timedelta(seconds=20 + 40)
