"""Peers: whose turn it is."""

import pytest

from asyncprop.exchange.peers import Peers

ALL = range(8)


def turns(peers: Peers, count: int, rank: int = 0) -> list[int | None]:
    return [peers.choose(rank, ALL, ALL) for _ in range(count)]


def test_ring_goes_to_the_next_alive() -> None:
    peers = Peers("ring", 0)
    assert turns(peers, 3) == [1, 1, 1]
    assert peers.choose(7, ALL, ALL) == 0
    assert peers.choose(0, {0, 2, 3}, {2, 3}) == 2


def test_exponential_goes_round_the_powers_of_two() -> None:
    assert turns(Peers("exponential", 0), 6, rank=3) == [4, 5, 7, 4, 5, 7]
    assert Peers("exponential", 0).choose(0, {0, 1, 2, 3, 4}, {1}) == 1


def test_exponential_skips_those_that_have_not_answered() -> None:
    peers = Peers("exponential", 0)
    assert peers.choose(0, ALL, {2, 4}) == 2
    assert turns(peers, 2) == [4, 1]


def test_who_has_no_link_is_no_member_of_the_ring() -> None:
    assert Peers("ring", 0).choose(0, {2, 3}, {2}) == 2  # 1 may be alive, and has yet to join
    assert Peers("exponential", 0).choose(3, {0, 1}, {0, 1}) == 0


def test_exponential_reaches_all_in_as_many_turns_as_there_are_powers() -> None:
    ranks = [Peers("exponential", rank) for rank in ALL]
    knows = [{rank} for rank in ALL]
    for _ in range(3):
        sent = [(ranks[rank].choose(rank, ALL, ALL), set(knows[rank])) for rank in ALL]
        for target, known in sent:
            assert target is not None
            knows[target] |= known
    assert all(len(known) == 8 for known in knows)


def test_uniform_goes_to_anybody_ready_and_is_repeatable() -> None:
    assert set(turns(Peers("uniform", 1), 100)) == set(range(1, 8))
    assert turns(Peers("uniform", 1), 10) == turns(Peers("uniform", 1), 10)
    assert Peers("uniform", 0).choose(0, ALL, [5]) == 5


@pytest.mark.parametrize("topology", ["uniform", "ring", "exponential"])
def test_nobody_is_sent_to_who_is_not_ready(topology: str) -> None:
    peers = Peers(topology, 0)  # type: ignore[arg-type]
    assert peers.choose(0, ALL, []) is None
    assert peers.choose(0, [0], []) is None
    if topology != "uniform":
        assert peers.choose(0, ALL, [5]) is None  # it waits for the one whose turn it is


def test_unknown_topology() -> None:
    with pytest.raises(ValueError, match="topology must be one of uniform, ring, exponential"):
        Peers("star", 0)  # type: ignore[arg-type]
