"""Traces: a file says what was traced, and nothing else is taken for one."""

import threading

import pytest
import torch

import asyncprop as ap
from asyncprop.recorder import Recorder
from asyncprop.testing import TINY, cross_entropy
from asyncprop.trace import Event, Trace

TRACE = Trace(
    layers=("0", "2"),
    threads=("thread-0", "averaging"),
    events=[
        Event("forward", 0.0, 0.125, thread=0, lane=0, batch=0),
        Event("read", 0.1, 0.1, thread=0, lane=0, batch=0, layer=1),
        Event("average", 0.2, 1 / 3, thread=1, rank=2, detail="all layers"),
    ],
)


def test_a_trace_is_read_as_it_was_written(tmp_path) -> None:
    TRACE.save(tmp_path / "trace.jsonl")
    assert Trace.load(tmp_path / "trace.jsonl") == TRACE
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 1 + len(TRACE.events)


@pytest.mark.parametrize("content", ["", "{}\n", '{"trace": 0}\n', "[1]\n", "no trace\n"])
def test_what_is_no_trace_is_refused(tmp_path, content: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"trace.jsonl must be a trace \("):
        Trace.load(path)


def test_a_trace_that_is_cut_off_is_told(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    TRACE.save(path)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match=r"trace.jsonl must be a trace \(its last line is cut off\)"):
        Trace.load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="trace must be a readable file"):
        Trace.load(tmp_path / "trace.jsonl")


def test_a_recorder_keeps_the_newest_of_each_thread_and_rank() -> None:
    recorder = Recorder(limit=2)
    recorder.open(("a",), lambda: 10.0)
    other = recorder.of_rank(1)
    for start in (11.0, 12.0, 13.0):
        recorder.add("wait", start, start + 0.5)
    thread = threading.Thread(target=other.add, args=("send", 11.5, 11.5), name="asyncprop-send")
    thread.start()
    thread.join()
    trace = recorder.trace()
    assert trace.threads == ("MainThread", "send")
    assert [(event.rank, event.thread, event.kind, event.start_s, event.end_s) for event in trace.events] == [
        (1, 1, "send", 1.5, 1.5), (0, 0, "wait", 2.0, 2.5), (0, 0, "wait", 3.0, 3.5),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="limit must be >= 1"):
        Recorder(limit=0)


@pytest.mark.parametrize(("update", "writes"), [("layer", 2), ("block", 1)])
def test_an_engine_notes_every_event_of_every_pass(update: str, writes: int) -> None:
    recorder, model = ap.Recorder(), TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"workers": ap.Decoupled(1, 2, lanes=3), "update": update, "trace": recorder, "telemetry": False}
    with ap.Engine(model, optimizer, cross_entropy, **options) as engine:
        assert len(list(engine.run(TINY["mlp"].batches(9)))) == 9
    trace = recorder.trace()
    assert trace.layers == ("0", "2")
    for batch in range(9):
        events = [event for event in trace.events if event.batch == batch]
        kinds = [event.kind for event in events]
        counts = {kind: kinds.count(kind) for kind in ("forward", "backward", "read", "ready", "write")}
        assert counts == {"forward": 1, "backward": 1, "read": 2, "ready": 2, "write": writes}
        forward, backward = (next(event for event in events if event.kind == kind) for kind in ("forward", "backward"))
        for event in events:
            within = forward if event.kind in ("forward", "read") else backward
            assert within.start_s <= event.start_s <= event.end_s <= within.end_s
            assert event.lane == forward.lane
    assert all(event.start_s >= 0 for event in trace.events)


def test_a_plain_loop_notes_its_passes(tmp_path) -> None:
    from asyncprop.methods.sgd import SequentialLoop

    recorder, model = ap.Recorder(), TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SequentialLoop(model, optimizer, cross_entropy, trace=recorder) as loop:
        list(loop.run(TINY["mlp"].batches(2)))
    assert [event.kind for event in recorder.trace().events] == ["forward", "backward"] * 2
