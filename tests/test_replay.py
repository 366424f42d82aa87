"""Replay: a free run, recorded with turn=Ordered(), trains again to the same bits, whatever the model and method."""

import copy
import itertools
import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import asyncprop as ap
from asyncprop.config import TrainConfig
from asyncprop.engine import Compensation, Partition
from asyncprop.methods.repeat import first_difference, read_recorded
from asyncprop.methods.train import Session
from asyncprop.methods.train import train as train_session
from asyncprop.progress import Quiet
from asyncprop.replay import Ordered, Replay
from asyncprop.runs import create_run
from asyncprop.testing import TINY, FakeDevice, cross_entropy, same_state
from asyncprop.trace import Event, Trace

WORKERS = {
    "decoupled": ap.Decoupled(2, 2, lanes=3),
    "one backward": ap.Decoupled(2, 1, lanes=3),
    "coupled": ap.Coupled(3),
}


class Noisy(nn.Module):
    """Dropout by a module, BatchNorm without parameters, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.norm, self.drop = nn.BatchNorm1d(7, affine=False), nn.Dropout(0.3)

    def forward(self, x):
        hidden = self.drop(self.norm(self.twice(torch.tanh(self.twice(self.first(x))))))
        return self.last(hidden)


def train(model, turn, batches, *, optimizer=None, workers, update, trace=None, partition=None, loss_fn=cross_entropy):
    """Train as a loop with a scheduler does; return losses by batch."""
    torch.manual_seed(7)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    losses = {}
    options = {"workers": workers, "update": update, "turn": turn, "trace": trace, "partition": partition}
    with ap.Engine(model, optimizer, loss_fn, **options) as engine:
        for half in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
            for step in engine.run(half):
                losses[step.index] = step.loss
                scheduler.step()
        state = engine.state_dict()
    return losses, copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"]), state


def record_and_replay(make, batches, **options):
    recorder, make_optimizer = ap.Recorder(), options.pop("make_optimizer", lambda model: None)
    model = make()
    first = train(model, Ordered(), batches, trace=recorder, optimizer=make_optimizer(model), **options)
    model, turn = make(), Replay(recorder.trace())
    again = train(model, turn, batches, optimizer=make_optimizer(model), **options)
    assert turn.finished
    assert len(first[0]) == len(batches)
    assert same_state(list(first), list(again))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", [*TINY, "noisy"])
def test_a_recorded_run_replays_to_the_bit(name: str, workers: str) -> None:
    tiny = TINY.get(name, ap.testing.Tiny(Noisy, TINY["mlp"].batch))
    record_and_replay(tiny.seeded_model, tiny.batches(24), workers=WORKERS[workers], update="layer")


def meeting(barrier: threading.Barrier):
    """Let the first passes that begin wait for each other in their forward passes."""
    seen = itertools.count()

    def loss_fn(model, batch):
        loss = cross_entropy(model, batch)
        if next(seen) < barrier.parties:
            barrier.wait(30)
        return loss

    return loss_fn


def test_stale_passes_replay_to_the_bit() -> None:
    """The first three batches are made to have read everything before any of them writes."""
    tiny, recorder = TINY["mlp"], ap.Recorder()
    options = {"workers": ap.Coupled(3), "update": "layer"}
    batches, together = tiny.batches(6), meeting(threading.Barrier(3))
    first = train(tiny.seeded_model(), Ordered(), batches, trace=recorder, loss_fn=together, **options)
    events = recorder.trace().events
    last_read = max(event.start_s for event in events if event.kind == "read" and event.batch < 3 and not event.detail)
    assert last_read < min(event.start_s for event in events if event.kind == "write")
    assert same_state(list(first), list(train(tiny.seeded_model(), Replay(recorder.trace()), batches, **options)))
    in_turn = train(tiny.seeded_model(), "lockstep", batches, **options)
    assert first[0][1] != in_turn[0][1]


def test_by_other_arithmetic_a_replay_is_the_same_but_for_rounding() -> None:
    """As on another machine, sums are taken in another order: over the samples of a batch, from last to first."""
    tiny, recorder = TINY["mlp"], ap.Recorder()
    options = {"workers": ap.Coupled(3), "update": "layer"}
    batches, together = tiny.batches(6), meeting(threading.Barrier(3))
    first = train(tiny.seeded_model(), Ordered(), batches, trace=recorder, loss_fn=together, **options)[0]
    backwards = [tuple(tensor.flip(0) for tensor in batch) for batch in batches]
    again = train(tiny.seeded_model(), Replay(recorder.trace()), backwards, **options)[0]
    in_turn = train(tiny.seeded_model(), "lockstep", batches, **options)[0]
    assert again != first
    rounding, interleaving = (max(abs(other[n] - first[n]) / first[n] for n in first) for other in (again, in_turn))
    assert rounding < 1e-6 < 100 * 1e-6 < interleaving


class BeginTogether(Replay):
    """Lets neither of the first two passes ask for its lane before both are about to."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._both = threading.Barrier(2)

    def at(self, batch, moment, layer):
        if moment == "forward" and batch < 2:
            self._both.wait(30)
        return super().at(batch, moment, layer)


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_pass_has_its_recorded_lane_whichever_was_free_first(exchanged: bool) -> None:
    tiny, recorder = TINY["mlp"], ap.Recorder()
    options = {"workers": ap.Decoupled(2, 2, lanes=2), "update": "layer"}
    batches, together = tiny.batches(8), meeting(threading.Barrier(2))
    first = train(tiny.seeded_model(), Ordered(), batches, trace=recorder, loss_fn=together, **options)
    trace = recorder.trace()
    lanes = {event.batch: event.lane for event in trace.events if event.kind == "forward"}
    assert {lanes[0], lanes[1]} == {0, 1}
    if exchanged:
        events = [replace(event, lane=1 - event.lane) if event.lane >= 0 else event for event in trace.events]
        trace = Trace(trace.layers, trace.threads, events)
    turn = BeginTogether(trace)
    assert same_state(list(first), list(train(tiny.seeded_model(), turn, batches, **options)))
    assert turn.finished


UPDATES = {
    "block": ap.BlockUpdate(),
    "private": ap.BlockUpdate(state="private"),
    "private layers": ap.LayerUpdate(state="private"),
    "clipped": ap.LayerUpdate(max_norm=0.1),
    "compensated": ap.LayerUpdate(compensate=Compensation(adaptive=True)),
}


@pytest.mark.parametrize("workers", ["decoupled", "coupled"])
@pytest.mark.parametrize("update", UPDATES)
def test_every_update_replays_to_the_bit(update: str, workers: str) -> None:
    tiny = TINY["resnet"]
    record_and_replay(tiny.seeded_model, tiny.batches(16), workers=WORKERS[workers], update=UPDATES[update])


def test_partial_passes_and_adam_replay_to_the_bit() -> None:
    tiny = TINY["mlp"]
    partition = Partition(blocks=(("0",), ("2",)), warm_up_batches=4, alternate=True)
    record_and_replay(
        tiny.seeded_model, tiny.batches(24), workers=ap.Coupled(2), update=ap.BlockUpdate(), partition=partition,
        make_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    )  # fmt: skip


def recorded() -> Trace:
    tiny, recorder = TINY["mlp"], ap.Recorder()
    train(tiny.seeded_model(), Ordered(), tiny.batches(4), trace=recorder, workers=ap.Coupled(2), update="layer")
    return recorder.trace()


def test_another_training_is_told_from_the_recorded_one() -> None:
    tiny = TINY["mlp"]
    with pytest.raises(ValueError, match="trace must be of this very training"):
        update = ap.LayerUpdate(layers="parameter")
        train(tiny.seeded_model(), Replay(recorded()), tiny.batches(4), workers=ap.Coupled(2), update=update)


def test_a_training_that_lacks_a_batch_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ap.replay, "PATIENCE_S", 0.05)
    tiny, trace = TINY["mlp"], recorded()
    swapped = [event for event in trace.events if event.batch != 3] + [Event("forward", 0.0, 1e-9, 0, batch=3, lane=0)]
    swapped.append(Event("backward", 2e-9, 3e-9, 0, batch=3, lane=0))
    turn = Replay(Trace(trace.layers, trace.threads, swapped))
    with pytest.raises(TimeoutError, match="waited for 'forward' of batch 3, which did not come"):
        train(tiny.seeded_model(), turn, tiny.batches(2), workers=ap.Coupled(2), update="layer")


def test_what_cannot_be_ordered_is_refused() -> None:
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="turn must be 'free' with an exchange"):
        ap.Engine(model, optimizer, cross_entropy, turn=Ordered(), exchange=ap.Averaging())
    for turn in (Ordered(), Replay(recorded())):
        with pytest.raises(ValueError, match="turn must be 'free' or 'lockstep' on a GPU"):
            ap.Engine(model, optimizer, cross_entropy, turn=turn, device=FakeDevice())
    with pytest.raises(ValueError, match="turn must not be ordered for method sgd"):
        Session(TrainConfig(task="digits", method="sgd", turn="ordered"))


def test_a_snapshot_is_refused_where_a_pass_that_waits_holds_layers() -> None:
    trace = recorded()
    for turn in (Ordered(), Replay(trace)):
        model = TINY["mlp"].seeded_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = ap.Engine(model, optimizer, cross_entropy, turn=turn)
        with pytest.raises(ValueError, match=rf"with turn {type(turn).__name__}.*: drain\(\) and copy"):
            engine.snapshot()


def test_only_whole_traces_of_ordered_runs_are_taken() -> None:
    trace = recorded()
    with pytest.raises(ValueError, match=r"trace must be of an engine with turn=Ordered\(\)"):
        Replay(Trace(trace.layers, trace.threads, [event for event in trace.events if event.detail != "back"]))
    with pytest.raises(ValueError, match="trace must be whole"):
        Replay(Trace(trace.layers, trace.threads, trace.events[1:]))


def test_nobody_reads_a_layer_that_is_being_written() -> None:
    """The slow obvious twin of the holds: no write in the trace lies within a use of the layer by another pass."""
    tiny, recorder = TINY["resnet"], ap.Recorder()
    train(
        tiny.seeded_model(), Ordered(), tiny.batches(24), trace=recorder, workers=WORKERS["decoupled"], update="layer"
    )
    events = recorder.trace().events
    uses = [
        (back.batch, back.layer, back.start_s, ready.start_s)
        for back in events
        if back.detail == "back"
        for ready in events
        if ready.kind == "ready" and (ready.batch, ready.layer) == (back.batch, back.layer)
    ]
    writes = [event for event in events if event.kind == "write"]
    assert len({use[:2] for use in uses}) == len(writes) == 24 * len(recorder.trace().layers)
    for batch, layer, start, end in uses:
        for write in writes:
            if write.layer == layer and write.batch != batch:
                assert write.end_s <= start or write.start_s >= end


# ---- runs


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run with --turn ordered."""
    path = tmp_path_factory.mktemp("runs") / "recorded"
    config = TrainConfig(task="digits", method="hogwild", turn="ordered", epochs=2, train_samples=320, workers=3)
    with create_run(path, config) as run:
        train_session(Session(config), run, Quiet())
    return path


def test_a_run_trains_again_to_the_bit(run_folder, tmp_path) -> None:
    config, trace = read_recorded(run_folder)
    with create_run(tmp_path / "again", config) as run:
        train_session(Session(config, replay=trace), run, Quiet())
    assert first_difference(run_folder, tmp_path / "again") is None


def test_where_two_runs_differ_first_is_told(run_folder, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_folder, other, symlinks=True)
    rows = [json.loads(line) for line in (other / "steps.jsonl").read_text().splitlines()]
    model = load_file(other / "checkpoint" / "model.safetensors")
    name = next(iter(model))
    model[name].view(-1)[1] += 0.25
    save_file(model, other / "checkpoint" / "model.safetensors")
    assert first_difference(run_folder, other) == f"the model at the end, by 2.5e-01 at most, in {name}"
    worse = [{**row, "loss": 1.0} if row["batch"] >= 7 else row for row in rows]
    (other / "steps.jsonl").write_text("\n".join(map(json.dumps, worse)))
    was = next(row["loss"] for row in rows if row["batch"] == 7)
    assert str(first_difference(run_folder, other)).startswith(
        f"the loss of batch 7 is 1.0, where {was!r} was recorded; "
    )
    off = {5: 1e-6, 9: 3e-6}
    near = [{**row, "loss": row["loss"] * (1 + off.get(row["batch"], 0))} for row in rows]
    (other / "steps.jsonl").write_text("\n".join(map(json.dumps, near)))
    told = str(first_difference(run_folder, other))
    assert told.startswith("the loss of batch 5 is ")
    assert told.endswith("; the largest difference is 3.0e-06 of a loss, at batch 9")
    (other / "steps.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    assert first_difference(run_folder, other) == "19 batches, where 20 were recorded"


def test_only_finished_ordered_runs_are_trained_again(run_folder, tmp_path) -> None:
    shutil.copytree(run_folder, tmp_path / "part", symlinks=True)
    steps = tmp_path / "part" / "steps.jsonl"
    steps.write_text("\n".join(steps.read_text().splitlines()[3:]))
    with pytest.raises(ValueError, match="path must be a run in one piece"):
        read_recorded(tmp_path / "part")
    (tmp_path / "part" / "result.json").unlink()
    with pytest.raises(ValueError, match="path must be a finished run"):
        read_recorded(tmp_path / "part")
    with create_run(tmp_path / "free", TrainConfig(task="digits")):
        pass
    with pytest.raises(ValueError, match=r"path must be a run with --turn ordered \(that of .* is free\)"):
        read_recorded(tmp_path / "free")
