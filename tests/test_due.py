"""Due: which layers go, and in which order."""

from asyncprop.exchange.due import Due


def due_of(updates: list[int], *, period: int = 1, probability: float = 1.0) -> Due:
    return Due(updates, period=period, probability=probability, seed="0")


def test_those_that_have_waited_longest_go_first_and_then_the_output_s() -> None:
    assert due_of([1, 3, 0, 1]).chunks() == [1, 3, 0]


def test_what_was_sent_is_due_no_more_until_it_is_updated() -> None:
    updates = [2, 1]
    due = due_of(updates)
    assert due.sent(0) == 2
    assert due.chunks() == [1]
    updates[0] += 1
    assert due.chunks() == [1, 0]


def test_a_period_is_counted_in_updates() -> None:
    assert due_of([1, 2, 3], period=2).chunks() == [2, 1]


def test_chance_is_asked_once_for_each_time_that_a_layer_is_due() -> None:
    updates = [1] * 200
    due = due_of(updates, probability=0.25)
    drawn = due.chunks()
    assert 25 < len(drawn) < 75
    assert due.chunks() == drawn  # nobody could be sent to: what was drawn stays due
    assert sum(updates) == len(drawn)  # what was not waits for its next update
    for layer in drawn:
        due.sent(layer)
    assert due.chunks() == []
