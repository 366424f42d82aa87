"""Members: deaths, silence, joining and agreeing, by a clock that the tests move."""

import socket
import threading
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from asyncprop.exchange import World, world
from asyncprop.exchange.board import PIECE_BYTES, Board, StoreLostError
from asyncprop.exchange.handover import GIVEN, WITHDRAWN, Handover
from asyncprop.exchange.members import LATE_S, START_TIMEOUT_S, LeftOut, Members, note_end
from gossip_world import at_once


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Net:
    """Some members without threads of their own: they look when told to."""

    def __init__(self, size: int, announced: int | None = None) -> None:
        self.store, self.clock, self.size = PrefixStore("members", HashStore()), Clock(), size
        self.members = [self.new(rank) for rank in range(size)]
        for member in self.members[: size if announced is None else announced]:
            member.announce()
        self.look(*range(size if announced is None else announced))

    def new(self, rank: int | None) -> Members:
        return Members(self.store, self.size, rank, timeout_s=10.0, clock=self.clock)

    def look(self, *ranks: int) -> None:
        for rank in ranks:
            self.members[rank].look()

    def pass_s(self, seconds: float, *living: int) -> None:
        """Let time pass, in which the living look each second."""
        for _ in range(round(seconds)):
            self.clock.now += 1.0
            self.look(*living)
        self.look(*living)


def test_a_silent_member_is_dropped_and_one_that_speaks_again_is_back() -> None:
    net = Net(3)
    heard: list[tuple[int, bool]] = []
    net.members[0].changed.append(lambda member, alive: heard.append((member, alive)))
    net.pass_s(9, 0, 1)
    assert net.members[0].alive == {0, 1, 2}
    before = net.members[0].lost
    net.pass_s(2, 0, 1)
    assert net.members[0].alive == net.members[1].alive == {0, 1}
    assert set(net.members[0].lost) == {2}
    assert not before  # who was reading it need not hear that it has changed
    net.look(2, 0)
    assert net.members[0].alive == {0, 1, 2}
    assert not net.members[0].lost
    assert heard == [(2, False), (2, True)]


def test_who_was_stopped_itself_does_not_take_the_others_for_dead() -> None:
    net = Net(2)
    net.clock.now += 1000.0  # both were
    net.look(0)
    assert net.members[0].alive == {0, 1}
    net.pass_s(11, 0)
    assert net.members[0].alive == {0}


def test_a_member_that_leaves_is_not_lost() -> None:
    net = Net(2)
    net.members[1].board.put("gone/1", None)
    net.look(0)
    assert net.members[0].alive == {0}
    assert not net.members[0].lost


def test_one_whose_process_has_ended_is_lost_at_once_even_before_its_first_heartbeat(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Net(3, announced=2)
    note_end(net.store, 2, "was ended by SIGKILL")
    net.look(0, 1)
    assert at_once(*(lambda m=m: m.meet(None).keys() for m in net.members[:2])) == [{0, 1}] * 2
    assert set(net.members[0].lost) == {2}
    assert "rank 0: rank 2 was ended by SIGKILL: going on without it" in caplog.messages
    net.members[1].board.put("gone/1", None)
    note_end(net.store, 1, "has ended with exit code 0")
    net.look(0)
    assert net.members[0].alive == {0}
    assert set(net.members[0].lost) == {2}  # the other has said goodbye itself


def test_one_that_fails_is_lost_and_one_that_refuses_what_it_was_given_is_not(caplog: pytest.LogCaptureFixture) -> None:
    net = Net(3)
    for rank, error in ((1, RuntimeError), (2, ValueError)):
        one = World(tolerant=True)
        one.members = Members(net.store, 3, rank)
        one.members.open()
        one.__exit__(error, error(), None)
    net.look(0)
    assert net.members[0].alive == {0}
    assert set(net.members[0].lost) == {1}
    assert [said for said in caplog.messages if said.startswith("rank 0")] == [
        "rank 0: rank 1 has failed: going on without it"
    ]


def test_a_rank_of_the_start_may_take_its_time_and_the_others_say_for_whom_they_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Net(3, announced=1)
    net.pass_s(LATE_S - 1, 0)
    assert not caplog.messages
    net.pass_s(START_TIMEOUT_S - LATE_S, 0)
    assert net.members[0].alive == {0, 1, 2}
    (said,) = caplog.messages
    assert said.startswith("rank 0: waiting for ranks 1, 2, for 300 s at most: do all machines have the same MASTER")
    net.pass_s(2, 0)
    assert net.members[0].alive == {0}
    assert caplog.messages[1] == "rank 0: rank 1 was not heard of for 300 s: going on without it"


class Asked(Board):
    """Tells when it is looked whether a member has left."""

    asked = threading.Event()

    def has(self, *keys: str) -> bool:
        found = super().has(*keys)
        if keys[0].startswith("gone/"):
            self.asked.set()
        return found


def test_who_holds_the_store_leaves_last() -> None:
    store = HashStore()
    holder, other = (Members(store, 2, rank, timeout_s=60.0, holds_store=rank == 0) for rank in range(2))
    holder.open()
    other.open()
    holder.board = Asked(store)
    closing = threading.Thread(target=holder.close)
    closing.start()
    assert Asked.asked.wait(60.0)
    assert other.board.has("gone/0")  # nobody is to wait for it meanwhile
    assert closing.is_alive()
    other.close()
    closing.join(30.0)
    assert not closing.is_alive()


def leaving(one: World) -> threading.Thread:
    """Let a world end, and return the thread in which it does, once it has looked whether the others have."""
    assert one.members
    one.members.board = Asked(one.members.store)
    Asked.asked.clear()
    closing = threading.Thread(target=one.__exit__, args=(None, None, None))
    closing.start()
    assert Asked.asked.wait(60.0), "it does not wait"
    return closing


def test_ranks_of_which_none_holds_the_store_leave_together_as_its_launcher_ends_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in {**place, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    shared = PrefixStore(world.MEMBERS, store)
    other, late = Members(shared, 2, 1, timeout_s=60.0), Members(shared, 2, None)
    other.open()
    late.open()
    one = World(tolerant=True, timeout_s=60.0).__enter__()
    assert one.members
    assert one.address == f"127.0.0.1:{store.port}"
    assert one.members.alive == {0, 1, 2}
    closing = leaving(one)
    assert closing.is_alive()
    other.close()
    closing.join(30.0)
    assert not closing.is_alive()  # though one is there that has yet to join
    late.close()


def test_who_has_yet_to_join_waits_for_nobody_as_it_leaves() -> None:
    store = HashStore()
    first, new = Members(store, 1, 0, timeout_s=60.0), Members(store, 1, None)
    first.open()
    new.open()
    new.board = Asked(store)
    Asked.asked.clear()
    new.close(waits=True)
    assert not Asked.asked.is_set()
    first.close()


def test_who_has_joined_is_waited_for() -> None:
    store = HashStore()
    one = World(tolerant=True, timeout_s=60.0)
    one.members = Members(store, 1, 0, timeout_s=60.0)
    one.members.board.put("start", (1, 60.0))
    new = Members(store, 1, None)
    new.open()
    one.members.open()
    one.members.among = (0, 1)  # they have met
    closing = leaving(one)
    assert closing.is_alive()
    new.close()
    closing.join(30.0)
    assert not closing.is_alive()


def test_who_asks_the_holder_of_the_store_as_it_leaves_hears_that_nobody_trains() -> None:
    store = HashStore()
    holder, other = (Members(store, 2, rank, timeout_s=0.5, holds_store=rank == 0) for rank in range(2))
    holder.offers["session"] = lambda: None  # its training is over
    holder.open()
    other.open()
    closing = threading.Thread(target=holder.close)
    closing.start()
    with pytest.raises(LeftOut, match="no other rank is training"):
        other.ask()
    other.close()
    closing.join(30.0)
    assert not closing.is_alive()


@pytest.mark.parametrize(("failed", "timeout_s"), [(True, 60.0), (False, 0.1)])
def test_it_waits_for_nobody_after_an_error_and_not_for_good(failed: bool, timeout_s: float) -> None:
    members = Members(HashStore(), 2, 0, timeout_s=timeout_s, holds_store=True)
    members.open()
    members.board = Asked(members.store)
    Asked.asked.clear()
    members.close(failed=failed)
    assert Asked.asked.is_set() != failed
    assert members.board.find("gone/0") == ("has failed" if failed else None)


def test_members_agree_on_everybodys_values() -> None:
    net = Net(3)
    big = b"x" * (2 * PIECE_BYTES + 5)
    met = at_once(*(lambda m=m: m.meet((m.rank, big)) for m in net.members))
    assert met == [{rank: (rank, big) for rank in range(3)}] * 3
    gathered = at_once(*(lambda m=m: m.gather(m.rank) for m in net.members))
    assert gathered == [{0: 0, 1: 1, 2: 2}] * 3
    assert {m.turn for m in net.members} == {"1.1"}


class Counting(HashStore):
    """A store that notes what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def clone(self) -> "Counting":
        return self

    def get(self, key: str) -> bytes:
        self.read.append(key)
        return super().get(key)


def test_a_value_is_read_by_who_asks_for_it_when_it_does() -> None:
    store = Counting()
    members = [Members(store, 2, rank) for rank in range(2)]
    told = at_once(*(lambda m=m: m.meet(m.rank + 5) for m in members))
    assert not store.read
    assert 0 in told[1]
    assert told[1].keys() == {0, 1}
    assert told[1][1] == 6
    assert not store.read
    assert [told[1][0], told[1][0]] == [5, 5]
    assert store.read == ["round/1.0/0"]
    with pytest.raises(KeyError):
        told[1][2]


def test_the_first_rank_reads_what_all_have_said_and_others_what_they_ask_for() -> None:
    store = Counting()
    worlds = [World(tolerant=True), World(tolerant=True)]
    for rank, one in enumerate(worlds):
        one.rank, one.size, one.members = rank, 2, Members(store, 2, rank)
    first, second = at_once(*(lambda one=one: one.gather(one.rank + 5) for one in worlds))
    assert type(first) is list
    assert store.read == ["round/0.1/1"]
    assert second[0] == 5
    assert list(second) == second[:] == first == [5, 6]


def test_the_dead_are_not_waited_for() -> None:
    net = Net(3)
    net.pass_s(11, 0, 1)
    met = at_once(*(lambda m=m: m.meet(m.rank) for m in net.members[:2]))
    assert met == [{0: 0, 1: 1}] * 2
    assert net.members[0].among == (0, 1)


def test_one_that_dies_before_the_meeting_is_over_is_left_behind() -> None:
    net = Net(3)
    at_once(*(lambda m=m: m.meet(None) for m in net.members))
    net.pass_s(11, 0, 1)
    assert at_once(*(lambda m=m: m.gather(m.rank) for m in net.members[:2])) == [{0: 0, 1: 1}] * 2


def test_whoever_was_left_out_knows_and_joins_again() -> None:
    net = Net(2)
    net.pass_s(11, 0)
    net.members[0].meet(None)
    with pytest.raises(LeftOut, match="rank 1 was not heard of for 10 s"):
        net.members[1].meet(None)
    net.look(1, 0)
    assert net.members[0].alive == {0, 1}
    assert net.members[0].meet(None).keys() == {0}  # it is back, but has not joined: nobody waits for it
    assert ask(net, 1) == {"round": 2, "among": (0,), "state": "a model"}
    met = at_once(*(lambda m=m: m.meet(m.rank) for m in net.members))
    assert met == [{0: 0, 1: 1}] * 2


def freeze(net: Net, rank: int, value: Any, rounds: int) -> None:
    """Let a member be stopped in the next meeting, just as it has said something, and the others meet so often more."""
    others = [other for other in range(len(net.members)) if other != rank]
    net.members[rank].board.put(f"round/{net.members[rank].round + 1}.0/{rank}", value)
    at_once(*(lambda other=other: net.members[other].meet(None) for other in others))
    net.pass_s(11, *others)
    for _ in range(rounds):
        met = at_once(*(lambda other=other: net.members[other].meet(None).keys() for other in others))
        assert met == [set(others)] * len(others)
    net.look(*range(len(net.members)))


def test_one_that_was_stopped_within_a_meeting_that_the_others_have_forgotten_knows() -> None:
    net = Net(3)
    freeze(net, 2, "a value", rounds=3)
    assert net.members[2].board.has("round/1.0/set")
    assert not net.members[2].board.has("round/1.0/0")
    with pytest.raises(LeftOut, match="rank 2 was not heard of for 10 s"):
        net.members[2].meet("a value")
    assert ask(net, 2)["round"] == 4
    net.look(0, 1, 2)
    assert at_once(*(lambda m=m: m.meet(None).keys() for m in net.members)) == [{0, 1, 2}] * 3


def test_a_long_value_of_which_pieces_are_deleted_is_as_good_as_none() -> None:
    net = Net(2)
    net.members[1].board.put("round/1.0/1", None)
    net.members[0].meet(b"x" * (2 * PIECE_BYTES))
    net.members[0].board._store.delete_key("round/1.0/0/2")
    told = net.members[1].meet(None)
    with pytest.raises(LeftOut):
        told[0]


def test_two_that_were_stopped_within_one_meeting_do_not_ask_each_other() -> None:
    net = Net(4)
    for rank in (0, 1):
        net.members[rank].board.put(f"round/1.0/{rank}", None)
    living = net.members[2:]
    at_once(*(lambda m=m: m.meet(None) for m in living))
    net.pass_s(11, 2, 3)
    for _ in range(3):
        at_once(*(lambda m=m: m.meet(None) for m in living))
    net.look(0, 1, 2, 3)
    for rank in (0, 1):
        with pytest.raises(LeftOut):
            net.members[rank].meet(None)
        assert net.members[rank].alive == {0, 1, 2, 3}
        assert net.members[rank]._expected() == {2, 3}


def test_a_new_member_knows_who_had_been_left_out() -> None:
    net = Net(2)
    at_once(*(lambda m=m: m.meet(None) for m in net.members))
    net.pass_s(11, 0)
    net.members[0].meet(None)  # without 1
    net.members.append(net.new(None))
    new = net.members[2]
    new.announce()
    net.look(0)
    ask(net, 2)
    net.pass_s(12, 1, 2)  # the first is gone, and the one that was left out is back
    assert new.alive == {1, 2}
    assert new.meet(None).keys() == {2}


def ask(net: Net, rank: int) -> dict[str, Any]:
    """Let a member join while the first one answers."""
    answers = iter([None, "a model"])  # not at the first asking: it is at a meeting
    net.members[0].offers["state"] = lambda: next(answers)
    return net.members[rank].ask(lambda: (net.members[0].answer(), net.look(rank, 0))[0])


def test_a_new_member_joins(caplog: pytest.LogCaptureFixture) -> None:
    net = Net(2)
    at_once(*(lambda m=m: m.meet(None) for m in net.members))
    net.members.append(net.new(None))
    new = net.members[2]
    new.announce()
    net.look(0, 1, 2)
    assert (new.rank, new.size, new.joins) == (2, 2, True)
    assert net.members[0].alive == {0, 1, 2}
    assert at_once(*(lambda m=m: m.meet(None).keys() for m in net.members[:2])) == [{0, 1}] * 2
    assert ask(net, 2)["state"] == "a model"
    assert not new.joins
    assert caplog.messages == ["rank 0: rank 2 joins"]
    net.look(0, 1, 2)
    assert at_once(*(lambda m=m: m.meet(None).keys() for m in net.members)) == [{0, 1, 2}] * 3


def test_a_new_member_joins_though_the_first_has_died() -> None:
    net = Net(3)
    net.pass_s(11, 1, 2)
    net.members.append(Members(net.store, 1, None, timeout_s=10.0, clock=net.clock))  # it does not know their number
    new = net.members[3]
    new.announce()
    assert (new.rank, new.size) == (3, 3)
    net.look(1, 2)
    net.members[1].offers["state"] = lambda: "a model"

    def passes() -> None:
        net.pass_s(1, 1, 2, 3)
        net.members[1].answer()

    assert new.ask(passes)["state"] == "a model"  # after the dead one was given up
    assert at_once(*(lambda m=m: m.meet(None).keys() for m in net.members[1:])) == [{1, 2, 3}] * 3


def joining(net: Net) -> Members:
    """Let a new member announce itself to all."""
    new = net.new(None)
    net.members.append(new)
    new.announce()
    net.look(*range(new.rank))
    return new


def test_what_is_packed_in_vain_is_taken_back_and_nobody_waits_for_the_one_that_asked() -> None:
    net = Net(2)
    new, donor = joining(net), net.members[0]
    parted: list[bool] = []

    def offer() -> str:
        Handover(new.board, "offer/0/2/1").withdraw()  # as it has waited for too long
        return "a model"

    donor.offers["state"] = offer
    donor.part_with = lambda give: bool(parted.append(give()))
    new.board.add("asked/0/2", 1)
    for _ in range(3):  # the third time it has been dealt with
        donor.answer()
    assert parted == [False]
    assert not new.board.has("offer/0/2/1")
    assert new.board.has("since/2")
    assert at_once(*(lambda m=m: m.meet(None).keys() for m in net.members[:2])) == [{0, 1}] * 2


def test_what_is_collected_while_a_meeting_begins_is_taken_back() -> None:
    net = Net(1)
    new, donor = joining(net), net.members[0]
    parted: list[bool] = []

    def offer() -> str:
        donor.meet(None)
        return "a model"

    donor.offers["state"] = offer
    donor.part_with = lambda give: bool(parted.append(give()))
    new.board.add("asked/0/1", 1)
    for _ in range(2):
        donor.answer()
    assert parted == [False]  # it was asked to take back what it had offered
    assert not new.board.has("since/1")


def test_who_takes_back_what_it_has_offered_is_asked_again() -> None:
    net = Net(2)
    new, donor = joining(net), net.members[0]
    answers = iter([False, True])  # a meeting begins when the model is packed; the second time none does
    donor.offers["state"] = lambda: "a model"
    donor.part_with = lambda give: next(answers) and give()

    def passes() -> None:
        donor.answer()
        net.look(0, 1, 2)
        if new.board.has("offer/0/2/1/fate") and not new.board.has("offer/0/2/2"):
            expected.append(net.members[1]._expected())

    expected: list[set[int]] = []
    assert new.ask(passes)["state"] == "a model"
    assert expected[0] == {0, 1}  # nobody waits for one whose handover was withdrawn
    assert not new.board.has("offer/0/2/1")
    assert net.members[1]._expected() == {0, 1, 2}


def test_all_have_heard_of_one_that_joins_before_it_is_given_anything() -> None:
    net = Net(2)
    new = net.new(None)
    net.members.append(new)
    new.announce()
    net.look(0)  # the other has yet to look
    net.members[0].offers["state"] = lambda: "a model"
    new.board.add("asked/0/2", 1)
    net.members[0].answer()
    assert not new.board.has("since/2")  # the other would meet without it
    net.look(0, 1)  # as each does until the donor looks for those that ask again
    net.members[0].answer()
    assert new.board.has("offer/0/2/1/fate")


def test_nobody_waits_for_one_whose_donor_died_at_it() -> None:
    net = Net(2)
    new, second = joining(net), net.members[1]
    new.board.put("since/2", (1, "offer/0/2/1"))  # as the first does before it hands over; then it is killed
    met: list[set[int]] = []
    second.offers["state"] = lambda: "a model" if met else None  # not while it is at a meeting

    def passes() -> None:
        net.pass_s(1, 1, 2)
        second.answer()

    given, _ = at_once(lambda: new.ask(passes), lambda: met.append(set(second.meet(None))))
    assert met == [{1}]
    assert given["state"] == "a model"
    net.look(1, 2)
    assert at_once(*(lambda m=m: m.meet(None).keys() for m in (second, new))) == [{1, 2}] * 2


def test_a_handover_is_given_or_withdrawn() -> None:
    board = Board(HashStore())
    given, withdrawn = Handover(board, "a"), Handover(board, "b")
    assert given.fate == withdrawn.fate == ""
    given.leave("a model")
    assert given.fate == ""
    assert given.give()
    assert not given.withdraw()
    assert given.fate == GIVEN
    assert given.take() == "a model"
    assert withdrawn.withdraw()
    withdrawn.leave("a model")
    assert not withdrawn.give()
    withdrawn.delete()
    assert withdrawn.fate == WITHDRAWN
    assert not board.has("a")
    assert not board.has("b")


def test_the_heart_beats_while_a_model_is_handed_over() -> None:
    begun, beaten, is_over = threading.Event(), threading.Event(), threading.Event()

    class Beating(Members):
        def look(self) -> None:
            super().look()
            if begun.is_set():
                beaten.set()

    def offer() -> str:
        begun.set()
        is_over.wait(30.0)
        return "a model"

    def watch() -> None:
        assert begun.wait(30.0), "nobody asks"
        assert beaten.wait(20.0), "its heart does not beat"
        is_over.set()

    store = HashStore()
    donor, new = Beating(store, 1, 0, timeout_s=5.0), Members(store, 1, None)
    donor.offers["state"] = offer
    try:
        donor.open()
        new.open()
        given, _ = at_once(new.ask, watch)
        assert given["state"] == "a model"
    finally:
        at_once(donor.close, new.close)


def test_joining_nobody() -> None:
    net = Net(1)
    net.members.append(net.new(None))
    net.members[1].announce()
    net.members[0].board.put("gone/0", None)
    net.look(1)
    with pytest.raises(LeftOut, match="no other rank is training"):
        net.members[1].ask()


def test_joining_where_nobody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"join must be where ranks train \(nobody answers at 127.0.0.1:1\)"):
        World(joins="127.0.0.1:1").__enter__()  # at once
    monkeypatch.setattr(world, "JOIN_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ValueError, match="nobody answers"):
        World(joins=f"127.0.0.1:{silent.getsockname()[1]}").__enter__()
    foreign = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(ValueError, match=r"\(nobody answers .*\): give the address that the first rank told"):
        World(joins=f"127.0.0.1:{foreign.port}").__enter__()


def test_old_meetings_are_forgotten() -> None:
    net = Net(1)
    board = net.members[0].board
    net.members[0].gather("value")
    assert board.has("round/0.1/0")
    for _ in range(4):
        net.members[0].meet("value")
        net.members[0].gather("value")
    assert not board.has("round/0.1/0")
    assert not board.has("round/1.0/0")
    assert not board.has("round/1.1/0")
    assert board.has("round/2.0/0")


def test_what_a_member_had_said_before_it_was_left_out_is_forgotten() -> None:
    net = Net(2)
    at_once(*(lambda m=m: m.meet(None) for m in net.members))
    freeze(net, 1, None, rounds=3)
    with pytest.raises(LeftOut):
        net.members[1].meet(None)
    assert ask(net, 1)["round"] == 5
    net.look(0, 1)
    board = net.members[1].board
    assert board.has("round/1.0/1", "round/2.0/1")
    at_once(*(lambda m=m: m.meet(None) for m in net.members))
    assert not board.has("round/1.0/1")
    assert not board.has("round/2.0/1")


class Lost(HashStore):
    """A store whose process has ended."""

    def clone(self) -> "Lost":
        return self

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Broken pipe")


def test_a_lost_store_is_named() -> None:
    with pytest.raises(StoreLostError, match="the process that holds it has ended"):
        Board(Lost()).has("key")


def test_a_failure_of_the_thread_reaches_those_who_wait() -> None:
    net = Net(2)
    net.members[0].failure = StoreLostError("gone")
    with pytest.raises(StoreLostError, match="gone"):
        net.members[0].meet(None)


def test_wrong_timeout() -> None:
    with pytest.raises(ValueError, match=r"timeout_s must be > 0 \(got 0\)"):
        Members(HashStore(), 1, 0, timeout_s=0)
