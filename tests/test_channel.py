"""Channel: bounded, first in first out, closed once."""

import threading

import pytest

from asyncprop.engine.channel import Channel, Closed


def test_first_in_first_out() -> None:
    channel: Channel[int] = Channel(3)
    assert [channel.put(item) for item in (5, 6, 7)] == [1, 2, 3]
    assert [channel.get() for _ in range(3)] == [5, 6, 7]


def test_what_waits_can_be_had_after_closing() -> None:
    channel: Channel[int] = Channel(2)
    channel.put(1)
    channel.close()
    with pytest.raises(Closed):
        channel.put(2)
    assert channel.get() == 1
    with pytest.raises(Closed):
        channel.get()


def test_discarding_leaves_nothing() -> None:
    channel: Channel[int] = Channel(2)
    channel.put(1)
    channel.close(discard=True)
    with pytest.raises(Closed):
        channel.get()


@pytest.mark.parametrize("side", ["put", "get"])
def test_closing_wakes_whoever_waits(side: str) -> None:
    channel: Channel[int] = Channel(1)
    if side == "put":
        channel.put(0)
    ended = []

    def wait() -> None:
        try:
            channel.put(1) if side == "put" else channel.get()
        except Closed:
            ended.append(side)

    thread = threading.Thread(target=wait)
    thread.start()
    channel.close(discard=True)
    thread.join(timeout=30)
    assert ended == [side]


def test_a_put_waits_for_room() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(0)
    thread = threading.Thread(target=lambda: channel.put(1))
    thread.start()
    assert [channel.get(), channel.get()] == [0, 1]
    thread.join(timeout=30)


def test_an_item_is_put_in_the_place_of_another() -> None:
    channel: Channel[int] = Channel(3)
    for item in (1, 2, 3):
        channel.put(item)
    assert channel.get() == 1
    channel.swap(1, 3)
    assert [channel.get(), channel.get()] == [2, 1]
