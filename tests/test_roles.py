"""Roles: never more passes of a kind than there may be, oldest first, nobody left asleep."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncprop.engine.channel import Closed
from asyncprop.engine.roles import Roles


def test_a_thread_goes_on_with_its_own_pass() -> None:
    roles = Roles(1, 1, lanes=2)
    assert roles.next() is None
    assert roles.forward_done("a")  # type: ignore[arg-type]
    assert roles.next() is None  # another thread takes over the forward role
    assert not roles.forward_done("b")  # type: ignore[arg-type]
    assert roles.depth == 1
    roles.backward_done()
    assert roles.next() == "b"


def test_a_pass_that_waits_goes_before_a_newer_one() -> None:
    roles = Roles(2, 1, lanes=3)
    assert roles.next() is roles.next() is None
    assert roles.forward_done("a")  # type: ignore[arg-type]
    assert not roles.forward_done("b")  # type: ignore[arg-type]
    assert roles.next() is None
    roles.backward_done()
    assert not roles.forward_done("c")  # type: ignore[arg-type]
    assert [roles.next(), roles.depth] == ["b", 1]


def test_the_end() -> None:
    roles = Roles(1, 1, lanes=2)
    assert roles.next() is None
    roles.close()
    assert roles.forward_done("a")  # type: ignore[arg-type]
    roles.backward_done()
    with pytest.raises(Closed):
        roles.next()
    stopped = Roles(1, 1, lanes=2)
    stopped.stop()
    with pytest.raises(Closed):
        stopped.next()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 25))
@settings(max_examples=60, deadline=None)
def test_every_pass_is_run_once_within_the_bounds(forward: int, backward: int, lanes: int, batches: int) -> None:
    roles = Roles(forward, backward, lanes)
    lock = threading.Lock()
    left, running, finished, most = list(range(batches)), {"f": 0, "b": 0, "lanes": 0}, [], {"f": 0, "b": 0, "lanes": 0}

    def note(**changes: int) -> None:
        with lock:
            for name, change in changes.items():
                running[name] += change
                most[name] = max(most[name], running[name])

    def work() -> None:
        try:
            while True:
                pending = roles.next()
                if pending is None:
                    with lock:
                        batch = left.pop(0) if left else None
                    if batch is None:
                        roles.close()
                        return
                    note(f=1, lanes=1)
                    note(f=-1)
                    pending = batch  # type: ignore[assignment]
                    if not roles.forward_done(batch):  # type: ignore[arg-type]
                        continue
                note(b=1)
                note(b=-1, lanes=-1)
                finished.append(pending)
                roles.backward_done()
        except Closed:
            pass

    threads = [threading.Thread(target=work) for _ in range(forward + backward)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(finished) == list(range(batches))
    assert most["f"] <= forward
    assert most["b"] <= backward
    assert most["lanes"] <= lanes
