"""Shares: each batch is one rank's, once, in whatever order ranks come, and whenever a share is stopped."""

from collections.abc import Callable
from itertools import chain, product
from typing import Any

import pytest
from torch.distributed import HashStore

from asyncprop.exchange.world import Counter, World
from asyncprop.methods.shares import Claims, Rounds, end_of_share


class One(World):
    """One rank of a world; nothing is sent."""

    def __init__(self, rank: int, size: int = 2) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def rounds(start: int, count: int, size: int = 2) -> list[Rounds]:
    """Return the shares of all ranks."""
    store = HashStore()
    return [Rounds(store, start, count, One(rank, size)) for rank in range(size)]


def test_claims_hand_out_each_number_once() -> None:
    counter = Counter(None, "")
    first, second = Claims(counter, 3, 9), Claims(counter, 3, 9)
    a, b = iter(first), iter(second)
    assert [next(a), next(b), next(b), next(a)] == [3, 4, 5, 6]
    assert (first.others, second.others) == (2, 1)
    second.stop()
    first.stop()
    assert list(a) == list(b) == []
    assert (first.ended, second.ended) == (None, 7)


@pytest.mark.parametrize(
    ("told", "end"),
    [
        ([(8, None), (None, 7)], 8),  # who ended it is alive
        ([(None, 5), (None, 7)], 7),
        ([(None, 10), (None, 8)], 10),
        ([(None, None), (None, 8)], 10),  # one went to the end: all is taken
        ([(None, None)], 10),
    ],
)
def test_the_next_share_starts_after_all_that_live_ranks_took(
    told: list[tuple[int | None, int | None]], end: int
) -> None:
    assert end_of_share(told, 10) == end


def test_claims_to_the_end() -> None:
    claims = Claims(Counter(None, ""), 0, 3)
    assert list(claims) == [0, 1, 2]
    assert claims.ended is None
    claims.stop()
    assert claims.ended == 3


def test_rounds_give_every_rank_as_many() -> None:
    shares = rounds(2, 11)
    assert [list(share) for share in shares] == [[2, 4, 6, 8], [3, 5, 7, 9]]
    assert [share.ended for share in shares] == [None, None]
    assert [share.others for share in shares] == [4, 4]


def test_rounds_end_together() -> None:
    first, second = rounds(0, 20)
    a, b = iter(first), iter(second)
    taken = [next(a), next(b), next(a)]
    first.stop()
    first.stop()
    second.stop()
    taken += [*a, *b]
    assert sorted(taken) == list(range(4))
    assert first.ended == second.ended == 4


def test_rounds_that_are_stopped_before_the_first_are_none() -> None:
    shares = rounds(3, 20)
    shares[1].stop()
    assert [list(share) for share in shares] == [[], []]
    assert [share.ended for share in shares] == [3, 3]


def check(shares: list[Rounds], taken: list[list[int]], start: int, done: int, whole: int) -> None:
    """Check that all ranks have taken so many rounds, each number once, and know it."""
    assert [len(numbers) for numbers in taken] == [done] * len(shares)
    assert sorted(chain.from_iterable(taken)) == list(range(start, start + done * len(shares)))
    end = None if done == whole else start + done * len(shares)
    assert [share.ended for share in shares] == [end] * len(shares)


@pytest.mark.parametrize(("size", "moves"), [(2, 6), (3, 5)])
def test_in_every_order_of_ranks_rounds_end_together_after_the_last_that_any_had_begun(size: int, moves: int) -> None:
    start, whole = 1, 4
    count = start + whole * size + 1  # one is left over
    for order in product(range(size), repeat=moves):
        for stopped_at, stops in product(range(moves + 1), range(size)):
            shares = rounds(start, count, size)
            iterators = [iter(share) for share in shares]
            taken: list[list[int]] = [[] for _ in shares]

            def move(rank: int) -> None:
                taken[rank] += [number for number in [next(iterators[rank], None)] if number is not None]  # noqa: B023

            for rank in order[:stopped_at]:
                move(rank)
            begun = max(map(len, taken))
            shares[stops].stop()
            for rank in order[stopped_at:]:
                move(rank)
            for numbers, rest in zip(taken, iterators, strict=True):
                numbers += rest
            check(shares, taken, start, begun, whole)


class Meanwhile:
    """A store on the way to which something else happens, each time it is asked."""

    def __init__(self, store: Any, *moves: Callable[[], Any]) -> None:
        self._store, self._moves = store, list(moves)

    def compare_set(self, key: str, expected: str, wanted: str) -> Any:
        if self._moves:
            self._moves.pop(0)()
        return self._store.compare_set(key, expected, wanted)


@pytest.mark.parametrize("moves", range(5))
@pytest.mark.parametrize("ahead", range(3))
@pytest.mark.parametrize("stops_too", [False, True])
def test_another_rank_goes_on_while_one_stops(moves: int, ahead: int, stops_too: bool) -> None:
    store = HashStore()
    other = Rounds(store, 0, 40, One(1))
    b = iter(other)
    taken: list[list[int]] = [[], [next(b) for _ in range(ahead)]]
    steps: list[Callable[[], Any]] = [lambda: taken[1].append(next(b))] * moves
    first = Rounds(Meanwhile(store, *steps, *([other.stop] if stops_too else [])), 0, 40, One(0))
    first.stop()
    taken[1] += b
    taken[0] += first
    check([first, other], taken, 0, len(taken[1]), 20)
    assert len(taken[1]) >= ahead
