"""Gossip: ranks in threads of one process, over real links. What is asserted holds in whatever order threads run."""

import dataclasses
import logging
import math
import re
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

import asyncprop as ap
from asyncprop.engine.layers import find_layers
from asyncprop.exchange.wire import Header, Kind
from asyncprop.testing import TINY, FakeDevice, cross_entropy, same_state
from gossip_world import Rank, at_once, linked, settle, spread, world


def test_all_begin_with_the_first_rank_s_model() -> None:
    with world(3) as ranks:
        first = TINY["mlp"].seeded_model(0).state_dict()
        assert all(same_state(dict(rank.model.state_dict()), dict(first)) for rank in ranks)
        assert all(rank.weight == 1.0 for rank in ranks)


def mean(ranks: list[Rank]) -> torch.Tensor:
    """Return the mean of all ranks' parameters."""
    return torch.stack([rank.values().double() for rank in ranks]).mean(0)


@pytest.mark.parametrize("topology", ["uniform", "ring", "exponential"])
def test_gossip_moves_values_but_not_their_mean(topology: str) -> None:
    with world(3, topology=topology, bucket_bytes=1, period=1) as ranks:
        spread(ranks)
        for turn in range(30):
            sender = ranks[turn % 3]
            sender.land_all()
            sender.send()
            assert torch.allclose(mean(ranks), torch.ones(1, dtype=torch.float64), atol=1e-6)
        distance = max(float((rank.values() - 1).abs().max()) for rank in ranks)
        assert distance < 0.9  # they were 1 apart
        settle(ranks)
        assert all(torch.equal(rank.values(), ranks[0].values()) for rank in ranks)
        assert torch.allclose(ranks[0].values(), torch.tensor(1.0), atol=1e-6)
        assert all(rank.weight == 1.0 for rank in ranks)


@pytest.mark.parametrize(("weight", "met_at"), [(1.0, 0.5), (0.5, 2 / 3)])
def test_both_ranks_draw_near_their_weighted_mean(weight: float, met_at: float) -> None:
    with world(2, period=1) as ranks:
        spread(ranks)
        ranks[0].shared.weight = weight
        ranks[1].gossip.landed(0)
        ranks[1].send()
        for rank in ranks:
            assert torch.allclose(rank.model[0].weight, torch.tensor(met_at))
            assert torch.equal(rank.model[2].weight, torch.full((3, 7), float(rank.rank)))  # that layer was not sent
        assert (ranks[1].gossip.tally.messages_sent, ranks[0].gossip.tally.messages_merged) == (1, 1)


def test_what_is_learnt_while_a_question_is_out_is_kept() -> None:
    """Nothing of it stays behind, as the half that travels does in push-sum gossip."""
    with world(2, period=1) as ranks:
        spread(ranks)
        ranks[1].shared.begin_meeting()  # it holds what comes
        ranks[0].land_all()
        ranks[0].gossip._sender.send_due()
        for rank in ranks:
            rank.set(rank.rank + 10.0)
        ranks[1].shared.end_meeting()
        ranks[0].wait(lambda: ranks[0].shared.questions_out == 0, "no answer")
        assert torch.equal(ranks[1].values(), torch.full_like(ranks[1].values(), 5.5))  # half of the way from 11 to 0
        assert torch.equal(ranks[0].values(), torch.full_like(ranks[0].values(), 15.5))  # the sum is 21, as before


def test_a_rank_that_has_questions_out_is_moved_less_by_others() -> None:
    """By a third instead of half: the answers will move it, too, and two that ask each other must not swap."""
    with world(2, period=1) as ranks:
        spread(ranks)
        ranks[0].shared.neighbours[1].ask([1], 1.0)  # not sent, but out
        ranks[1].gossip.landed(0)
        ranks[1].send()
        assert torch.allclose(ranks[0].model[0].weight, torch.tensor(1 / 3))
        assert torch.allclose(ranks[1].model[0].weight, torch.tensor(2 / 3))


def test_the_newest_value_goes() -> None:
    with world(2) as ranks:
        spread(ranks)
        for _ in range(5):
            ranks[1].land_all()
        ranks[1].set(10.0)
        ranks[1].send()
        assert torch.equal(ranks[0].values(), torch.full_like(ranks[0].values(), 5.0))
        assert ranks[1].gossip.tally.messages_sent == 1
        assert ranks[1].gossip.tally.superseded == 2 * 4


def test_one_message_is_out_to_a_neighbour_and_no_more() -> None:
    with world(2, period=1) as ranks:
        ranks[1].shared.begin_meeting()  # it holds what comes
        for _ in range(3):
            ranks[0].land_all()
            ranks[0].gossip._sender.send_due()
        assert ranks[0].gossip.tally.messages_sent == 1
        ranks[1].shared.end_meeting()
        ranks[1].wait(lambda: ranks[1].gossip.tally.messages_merged == 1, "nothing came")


@pytest.mark.parametrize(
    ("options", "sent"),
    [({"period": 3}, 2), ({}, 3), ({"period": 1}, 6), ({"period": 1, "probability": 0.5, "seed": 1}, 3)],
)
def test_how_often_layers_are_sent(options: dict[str, Any], sent: int) -> None:
    with world(2, **options) as ranks:
        for _ in range(6):
            ranks[0].gossip.landed(0)
            ranks[0].gossip._sender.send_due()
            ranks[0].wait(lambda: ranks[0].shared.neighbours[1].out is None, "no answer")
        assert ranks[0].gossip.tally.messages_sent == sent


def test_a_message_of_before_a_meeting_is_not_merged_after_it() -> None:
    with world(2, period=1) as ranks:
        spread(ranks)
        ranks[1].shared.begin_meeting()  # it will hold what comes
        ranks[0].gossip.landed(0)
        ranks[0].gossip._sender.send_due()
        settle(ranks)
        assert ranks[0].gossip.tally.lost == 1
        here = ranks[0].shared.neighbours[1]
        ranks[0].wait(lambda: here.is_ready, "it was not told that its question came too late")
        assert ranks[1].gossip.tally.late == 1
        assert all(torch.equal(rank.values(), torch.full_like(rank.values(), 0.5)) for rank in ranks)
        assert all(rank.weight == 1.0 for rank in ranks)


@pytest.mark.parametrize("arrives", [False, True])
def test_a_link_that_is_cut_heals_and_nothing_is_lost_or_doubled(arrives: bool) -> None:
    with world(2, period=1) as ranks:
        spread(ranks)
        here, there = ranks[0].shared.neighbours[1], ranks[1].shared.neighbours[0]
        link, back = here.link, there.link
        if arrives:  # but the answer is lost
            back.send = lambda message, slot: None
        else:  # the message is lost
            link.send = lambda message, slot: None
        ranks[0].land_all()
        ranks[0].gossip._sender.send_due()
        ranks[1].wait(lambda: ranks[1].gossip.tally.messages_merged == arrives, "the message did not come")
        assert here.out is not None
        link.cut()
        ranks[0].wait(lambda: here.link not in (None, link), "no new link")
        ranks[1].wait(lambda: there.link not in (None, back), "no new link")
        ranks[0].wait(lambda: here.out is None, "the answer did not come again")
        assert ranks[0].gossip.tally.lost == (not arrives)
        for rank in ranks:
            assert torch.equal(rank.values(), torch.full_like(rank.values(), 0.5 if arrives else float(rank.rank)))
        ranks[0].land_all()
        ranks[0].send()
        assert ranks[1].gossip.tally.messages_merged == 1 + arrives


def test_a_rank_that_was_taken_for_dead_gets_its_answer_when_it_is_back() -> None:
    with world(2, period=1) as ranks:
        spread(ranks)
        here, there = ranks[0].shared.neighbours[1], ranks[1].shared.neighbours[0]
        there.link.send = lambda message, slot: None  # the answer is lost
        ranks[0].land_all()
        ranks[0].gossip._sender.send_due()
        ranks[1].wait(lambda: ranks[1].gossip.tally.messages_merged == 1, "the message did not come")
        ranks[1].members._mark(0, alive=False)
        ranks[1].wait(lambda: there.thread is None, "its thread goes on")
        assert here.out is not None
        ranks[1].members._mark(0, alive=True)
        ranks[0].wait(lambda: here.out is None, "the answer did not come again")
        for rank in ranks:
            assert torch.equal(rank.values(), torch.full_like(rank.values(), 0.5))


def test_what_a_dead_rank_asked_counts_as_out_no_more() -> None:
    with world(2, period=1) as ranks:
        ranks[1].shared.begin_meeting()  # it holds what comes
        ranks[0].land_all()
        ranks[0].gossip._sender.send_due()
        assert ranks[0].shared.questions_out == 1
        ranks[0].members._mark(1, alive=False)
        ranks[0].wait(lambda: ranks[0].shared.neighbours[1].thread is None, "its thread goes on")
        assert ranks[0].shared.questions_out == 0


@pytest.mark.parametrize("wire", ["exact", "bf16"])
def test_on_a_device_with_streams(wire: str) -> None:
    device = FakeDevice()
    with world(2, device=device, wire=wire, model="resnet") as ranks:
        for _ in range(3):
            for rank in ranks:
                rank.land_all()
                rank.send()
        settle(ranks)
        assert sum(rank.gossip.tally.messages_merged for rank in ranks) >= 2
        assert torch.equal(ranks[0].values(), ranks[1].values())
        assert same_state(dict(ranks[0].model.state_dict()), dict(ranks[1].model.state_dict()))


def test_buffers_are_averaged_and_of_counts_the_largest_is_taken() -> None:
    with world(2, model="resnet") as ranks:
        for rank in ranks:
            for name, buffer in rank.model.named_buffers():
                buffer.fill_(4 + 2 * rank.rank if name.endswith("tracked") else float(rank.rank))
        settle(ranks)
        for rank in ranks:
            for name, buffer in rank.model.named_buffers():
                expected = 6 if name.endswith("tracked") else 0.5
                assert torch.equal(buffer, torch.full_like(buffer, expected))


def garbage_of(rank: Rank, kind: str) -> None:
    """Send, in this rank's name, something that no rank sends."""
    neighbour = rank.shared.neighbours[0]
    wire = rank.shared.wire
    neighbour.ask([0], rank.weight)
    message = wire.write(neighbour.sent, Header(Kind.CHUNKS, rank.rank, 1, rank.members.round, rank.weight), [0])
    for _, value in wire.values(message, [0]):
        value.fill_(float("nan") if kind == "not finite" else 1.0)
    if kind == "another model":
        message[64:72].view(torch.int64).fill_(1)
    if kind == "not a message":
        message.fill_(255)
    neighbour.link.send(message, 0)


@pytest.mark.parametrize("kind", ["not finite", "another model", "not a message"])
def test_garbage_is_cut_off_and_nothing_of_it_is_merged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with world(2) as ranks, caplog.at_level(logging.WARNING, "asyncprop"):
        before = ranks[0].values()
        garbage_of(ranks[1], kind)
        ranks[0].wait(lambda: ranks[0].shared.neighbours[1].thread is None, "it was not cut off")
        assert ranks[0].shared.neighbours[1].refused
        assert torch.equal(ranks[0].values(), before)
        assert "rank 0: rank 1 is cut off: it sent" in caplog.text
        assert kind in caplog.text
        settle(ranks)  # all models are equal: it may try again
        linked(ranks)
        for _ in range(2):
            ranks[1].land_all()
        ranks[1].send()
        assert ranks[0].shared.tally.messages_merged == 1


def test_a_rank_whose_parameters_were_no_numbers_takes_part_again_after_a_meeting() -> None:
    with world(2) as ranks:
        for rank in ranks:
            for parameter in rank.model.parameters():
                rank.optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 2.0)
        momentum = rank.optimizer.state[parameter]["momentum_buffer"]
        momentum.view(-1)[0] = math.nan
        ranks[1].set(math.nan)
        settle(ranks)
        assert momentum.view(-1)[0] == 0.0
        assert torch.equal(momentum.view(-1)[1:], torch.full_like(momentum.view(-1)[1:], 2.0))
        assert all(bool((state["momentum_buffer"] == 2.0).all()) for state in ranks[0].optimizer.state.values())


def test_a_rank_that_was_left_out_merges_nothing_before_it_has_joined_again() -> None:
    with world(2, period=1) as ranks:
        before = ranks[1].values()
        ranks[1].gossip.leave()
        ranks[0].land_all()
        ranks[0].gossip._sender.send_due()  # it arrives, and waits
        assert torch.equal(ranks[1].values(), before)
        settle(ranks)
        assert ranks[0].gossip.tally.weight == pytest.approx(1)


def test_a_closed_exchange_offers_nothing_and_holds_no_group() -> None:
    with world(2) as ranks:
        settle(ranks)
        agreement = ranks[0].gossip._agreement
        assert agreement._group.key
        ranks[0].gossip.close()
        assert ranks[0].members.offers["replica"]() is None
        assert not agreement._group.key


def test_another_model_is_refused_with_both_sides_named() -> None:
    store = HashStore()
    ranks: list[Rank] = at_once(lambda: Rank(store, 2, 0), lambda: Rank(store, 2, 1, model="transformer"))

    def refusal(rank: Rank) -> str:
        with pytest.raises(ValueError, match="same on all ranks") as refused:
            rank.gossip.open(rank.replica)
        return str(refused.value)

    for said in at_once(lambda: refusal(ranks[0]), lambda: refusal(ranks[1])):
        assert "model must be the same on all ranks" in said
        assert "rank 0 has 0" in said
        assert "rank 1 has embed" in said
    at_once(*(rank.close for rank in ranks))


@pytest.mark.parametrize("what", ["buffers", "another version"])
def test_who_differs_in_what_does_not_travel_is_refused_too(what: str) -> None:
    store = HashStore()
    ranks: list[Rank] = at_once(lambda: Rank(store, 2, 0, model="resnet"), lambda: Rank(store, 2, 1, model="resnet"))
    if what == "buffers":
        for module in ranks[1].model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean = None  # as with track_running_stats=False
        said = r"rank 0 has \['bn1.running_mean', .*rank 1 has \['bn1.running_var'"
    else:
        ranks[1].members.board.put("identity/1", {"asyncprop": "0.0.1"})
        said = "asyncprop must be the same on all ranks .*0.0.1"

    def refused(rank: Rank) -> str:
        with pytest.raises(ValueError, match="must be the same on all ranks") as error:
            rank.gossip.open(rank.replica)
        return str(error.value)

    found = at_once(*(lambda rank=rank: refused(rank) for rank in ranks[: 2 if what == "buffers" else 1]))
    assert all(re.search(said, one) for one in found[:1]), found
    at_once(*(rank.close for rank in ranks))


def test_frozen_parameters_are_the_first_rank_s() -> None:
    store = HashStore()
    ranks: list[Rank] = at_once(*(lambda rank=rank: Rank(store, 2, rank) for rank in range(2)))
    for rank in ranks:
        rank.model[0].requires_grad_(False)  # each with random values of its own
        names = [name for name, parameter in rank.model.named_parameters() if parameter.requires_grad]
        rank.replica = dataclasses.replace(rank.replica, layers=find_layers(rank.model, names))
    at_once(*(lambda rank=rank: rank.gossip.open(rank.replica) for rank in ranks))
    assert torch.equal(ranks[0].values(), ranks[1].values())
    assert same_state(dict(ranks[1].model.state_dict()), dict(TINY["mlp"].seeded_model(0).state_dict()))
    at_once(*(rank.close for rank in ranks))


def test_a_rank_that_dies_before_it_has_greeted_is_not_waited_for() -> None:
    store = HashStore()
    ranks: list[Rank] = at_once(*(lambda rank=rank: Rank(store, 3, rank) for rank in range(3)))
    dead = ranks.pop(0)  # its model would have been everybody's
    dead.members.close()
    try:
        at_once(*(lambda rank=rank: rank.gossip.open(rank.replica) for rank in ranks))
        assert [rank.members.among for rank in ranks] == [(1, 2)] * 2
        first = TINY["mlp"].seeded_model(1).state_dict()
        assert all(same_state(dict(rank.model.state_dict()), dict(first)) for rank in ranks)
    finally:
        at_once(*(rank.close for rank in ranks))


def test_a_dead_rank_is_dropped_and_the_others_settle_without_it(caplog: pytest.LogCaptureFixture) -> None:
    with world(3) as ranks, caplog.at_level(logging.WARNING, "asyncprop"):
        spread(ranks)
        dead = ranks.pop()
        dead.die()  # its links break
        for rank in ranks:
            rank.members._gone.add(2)  # the clock is not to find it alive again
            rank.members._mark(2, alive=False, lost="was not heard of for 60 s")
        settle(ranks)
        assert torch.equal(ranks[0].values(), torch.full_like(ranks[0].values(), 0.5))
        assert torch.equal(ranks[0].values(), ranks[1].values())
        assert "rank 0: rank 2 was not heard of for 60 s: going on without it" in caplog.text
        assert all(set(rank.members.lost) == {2} for rank in ranks)


def test_a_rank_joins_with_half_of_the_weight_of_another() -> None:
    store = HashStore()
    first = Rank(store, 1, 0)
    first.gossip.open(first.replica)
    first.set(3.0)
    batches = TINY["mlp"].batches(1)
    cross_entropy(first.model, batches[0]).backward()
    first.optimizer.step()
    new = Rank(store, 1, None)
    try:
        new.members.ask()
        new.gossip.open(new.replica)
        assert new.members.given is None  # it is as large as the model, and so is the optimizer's state in it
        linked([first, new])
        assert torch.equal(new.values(), first.values())
        assert same_state(new.optimizer.state_dict(), first.optimizer.state_dict())
        assert (first.weight, new.weight) == (0.5, 0.5)
        new.set(5.0)
        first.set(1.0)
        settle([first, new])
        assert torch.equal(first.values(), torch.full_like(first.values(), 3.0))
        assert torch.equal(first.values(), new.values())
    finally:
        at_once(first.close, new.close)


def test_weight_that_is_not_wanted_after_all_is_taken_back() -> None:
    with world(2) as ranks:
        gossip = ranks[0].gossip
        assert gossip._offer()
        assert ranks[0].weight == 0.5
        assert not gossip._part_with(lambda: False)
        assert ranks[0].weight == 1.0


def test_weight_that_is_being_offered_counts_at_a_meeting_and_is_not_given_after_it() -> None:
    with world(2) as ranks:
        spread(ranks)
        assert ranks[0].gossip._offer()
        settle(ranks)
        assert torch.equal(ranks[0].values(), torch.full_like(ranks[0].values(), 0.5))
        assert ranks[0].gossip.tally.weight == 1.0
        assert not ranks[0].gossip._part_with(lambda: pytest.fail("it was offered before the meeting"))
        assert ranks[0].weight == 1.0


def test_weight_that_is_given_is_given_once() -> None:
    with world(2) as ranks:
        assert ranks[0].gossip._offer()
        assert ranks[0].gossip._part_with(lambda: True)
        assert not ranks[0].gossip._part_with(lambda: True)
        assert ranks[0].weight == 0.5


def test_the_distance_to_the_mean_is_told() -> None:
    with world(2) as ranks:
        spread(ranks)
        settle(ranks)
        assert [rank.gossip.tally.distance for rank in ranks] == [1.0, 1.0]  # each 0.5 away, all numbers, from 0.5
        settle(ranks)
        assert [rank.gossip.tally.distance for rank in ranks] == [0.0, 0.0]


def test_workers_wait_for_nothing() -> None:
    """Whatever the exchange's threads hold: this test hangs if a worker asks for it."""
    with world(2) as ranks, ranks[0].shared.changed:
        at_once(ranks[0].land_all)


@pytest.mark.parametrize("update", [ap.LayerUpdate(), ap.BlockUpdate()])
def test_with_the_engine_all_end_equal_and_have_learnt(update: ap.LayerUpdate | ap.BlockUpdate) -> None:
    store = HashStore()
    batches = TINY["mlp"].batches(4)

    def train(rank: int) -> tuple[Any, float, float]:
        new = Rank(store, 2, rank)
        losses = []
        options: Any = {"workers": ap.Coupled(2), "update": update, "exchange": new.gossip}
        with ap.Engine(new.model, new.optimizer, cross_entropy, **options) as engine:
            for _ in range(10):
                losses += [step.loss for step in engine.run(batches)]
            engine.settle()
            sent = engine.statistics().exchange["messages_sent"]
        new.members.close()
        return dict(new.model.state_dict()), sum(losses[:4]) - sum(losses[-4:]), sent

    first, second = at_once(lambda: train(0), lambda: train(1))
    assert same_state(first[0], second[0])
    assert min(first[1], second[1]) > 0.5
    assert first[2] + second[2] > 0


def test_one_rank_alone_does_nothing() -> None:
    gossip = ap.LayerGossip()
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ap.Engine(model, optimizer, cross_entropy, exchange=gossip) as engine:
        list(engine.run(TINY["mlp"].batches(2)))
        engine.settle()
        assert engine.statistics().exchange == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"topology": "star"}, "topology must be one of"),
        ({"period": 0}, "period must be >= 1"),
        ({"probability": 0.0}, "probability must be > 0 and <= 1"),
        ({"bucket_bytes": 0}, "bucket_bytes must be >= 1"),
        ({"wire": "fp8"}, "wire must be one of"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ap.LayerGossip(**given)
