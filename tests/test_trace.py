"""Traces: a file says what was traced, and nothing else is taken for one."""

import pytest

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


def test_a_file_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="trace must be a readable file"):
        Trace.load(tmp_path / "trace.jsonl")
