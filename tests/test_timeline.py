"""Timelines: measured and predicted ones alike, cut into spans, drawn, printed, and written for Perfetto."""

import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from asyncprop.cli import main
from asyncprop.config import TrainConfig
from asyncprop.methods.session import Session
from asyncprop.methods.train import train
from asyncprop.progress import Quiet
from asyncprop.report.figure1 import figure1
from asyncprop.report.perfetto import chrome_trace
from asyncprop.report.timeline import Timeline, load_timeline
from asyncprop.report.tracks import draw, print_tracks
from asyncprop.runs import create_run
from asyncprop.trace import Event, Trace

FIGURE_1 = Timeline(figure1())  # three layers, a backward pass takes twice as long as a forward pass


def test_a_timeline_is_cut_into_its_layers() -> None:
    first = [(span.kind, span.layer, span.start_s, span.end_s) for span in FIGURE_1.spans if span.batch == 0]
    assert first == [
        ("forward", 0, 0, 1), ("forward", 1, 1, 2), ("forward", 2, 2, 3),
        ("backward", 2, 3, 5), ("write", 2, 5, 5), ("backward", 1, 5, 7), ("write", 1, 7, 7),
        ("backward", 0, 7, 9), ("write", 0, 9, 9),
    ]  # fmt: skip
    assert [FIGURE_1.name(track) for track in FIGURE_1.tracks] == ["forward", "backward 1", "backward 2"]


def test_backward_passes_wait_where_there_are_too_few_threads() -> None:
    starts = [event.start_s for event in Timeline(figure1(backward_threads=1)).passes if event.kind == "backward"]
    assert starts == [3.0, 9.0, 15.0, 21.0]


def test_staleness_is_counted_by_hand() -> None:
    """L1 of batch 1 is read at 3 and written at 12; batch 0 writes L1 at 9."""
    ages = {(event.batch, event.layer): age for event, age in FIGURE_1.staleness}
    assert [ages[0, layer] for layer in range(3)] == [0, 0, 0]
    assert [ages[1, layer] for layer in range(3)] == [1, 1, 1]  # L3: read at 5, as batch 0 writes it: reads come first
    assert [ages[2, layer] for layer in range(3)] == [2, 2, 1]  # L3: read at 8, after batch 0's write, at 5


def test_hand_overs_and_passes_in_flight() -> None:
    assert [(arrow.batch, arrow.start_s, arrow.end_s) for arrow in FIGURE_1.arrows] == [
        (0, 3.0, 3.0), (1, 6.0, 6.0), (2, 9.0, 9.0), (3, 12.0, 12.0),
    ]  # fmt: skip
    assert max(count for _, _, count in FIGURE_1.in_flight) == 3
    assert FIGURE_1.in_flight[-1][2] == 0


def test_a_locked_or_late_write_does_not_count_as_gradient_time() -> None:
    trace = Trace(("a", "b"), ("t",), [
        Event("backward", 0.0, 10.0, 0, batch=0), Event("ready", 3.0, 3.0, 0, batch=0, layer=1),
        Event("write", 3.0, 5.0, 0, batch=0, layer=1), Event("ready", 8.0, 8.0, 0, batch=0, layer=0),
        Event("write", 8.0, 9.0, 0, batch=0, layer=0),
    ])  # fmt: skip
    spans = [(span.kind, span.layer, span.start_s, span.end_s) for span in Timeline(trace).spans]
    assert spans == [("backward", 1, 0.0, 3.0), ("write", 1, 3.0, 5.0), ("backward", 0, 5.0, 8.0),
                     ("write", 0, 8.0, 9.0)]  # fmt: skip
    assert Timeline(trace).staleness == []  # its forward pass is not in the trace
    assert Timeline(trace).arrows == []


def test_a_measured_trace_is_cut_and_drawn_as_a_predicted_one_is(tmp_path: Path) -> None:
    config = TrainConfig(task="digits", epochs=1, train_samples=320, test_samples=50, trace=True)
    with create_run(tmp_path / "run", config) as run:
        train(Session(config), run, Quiet())
    timeline = load_timeline(tmp_path / "run")
    layers = len(timeline.trace.layers)
    assert len(timeline.passes) == 2 * 10  # batches of 32
    assert len(timeline.arrows) == 10
    assert all(arrow.start_s <= arrow.end_s for arrow in timeline.arrows)
    kinds = [span.kind for span in timeline.spans]
    assert [kinds.count(kind) for kind in ("forward", "write")] == [10 * layers] * 2
    assert len(timeline.staleness) == 10 * layers
    assert min(age for _, age in timeline.staleness) == 0
    assert timeline.in_flight[-1][2] == 0
    ET.fromstring(draw(timeline, timeline.window(), name="n", title="t"))
    json.dumps(chrome_trace(timeline))


def test_the_window_is_in_the_middle() -> None:
    assert FIGURE_1.window() == (0.0, FIGURE_1.end_s)
    assert FIGURE_1.window(2) == (3.0, 9.0)


def test_the_window_is_beside_a_pause() -> None:
    """Eight passes of a second each, four before and four after a minute in which nobody trains."""
    starts = [*range(4), *range(60, 64)]
    events = [Event("forward", start, start + 1, 0, batch=n) for n, start in enumerate(starts)]
    assert Timeline(Trace((), ("thread",), events)).window(2) == (60, 62)


def test_a_pass_too_short_for_its_label_has_none() -> None:
    svg = draw(FIGURE_1, (0.0, 40 * FIGURE_1.end_s), name="figure-1", title="From far away")
    assert ">F0<" not in svg
    assert ">F0<" in draw(FIGURE_1, (0.0, FIGURE_1.end_s), name="figure-1", title="From near")


# ---- Perfetto


def test_slices_nest_and_arrows_start_in_a_slice() -> None:
    rows = chrome_trace(FIGURE_1)["traceEvents"]
    json.dumps(rows)
    for track in FIGURE_1.tracks:
        slices = [row for row in rows if row["ph"] == "X" and (row["pid"], row["tid"]) == track]
        outer = [row for row in slices if row["name"].split()[0] in ("forward", "backward")]
        for row in slices:
            holders = [
                o for o in outer
                if o["ts"] - 1e-6 <= row["ts"] and row["ts"] + row["dur"] <= o["ts"] + o["dur"] + 1e-6
            ]  # fmt: skip
            assert holders, row
    for start in (row for row in rows if row["ph"] == "s"):
        assert any(
            row["ph"] == "X" and row["cat"] == "forward" and row["tid"] == start["tid"]
            and row["ts"] <= start["ts"] < row["ts"] + row["dur"]
            for row in rows
        )  # fmt: skip
    flows = {row["id"] for row in rows if row["ph"] == "s"}
    assert flows == {row["id"] for row in rows if row["ph"] == "f"} == {f"0.{n}" for n in range(4)}
    assert {row["name"] for row in rows if row["ph"] == "C"} == {"passes in flight", "staleness"}
    names = [row["args"]["name"] for row in rows if row["name"] == "thread_name"]
    assert names == ["forward", "backward 1", "backward 2"]


def test_ranks_are_processes() -> None:
    trace = Trace(("a",), ("thread-0", "averaging"), [
        Event("forward", 0.0, 1.0, 0, rank=0, batch=0), Event("average", 0.5, 0.75, 1, rank=1, detail="all layers"),
        Event("wait", 1.0, 1.5, 0, rank=1),
    ])  # fmt: skip
    timeline = Timeline(trace)
    assert [timeline.name(track) for track in timeline.tracks] == [
        "rank 0 thread-0", "rank 1 thread-0", "rank 1 averaging",
    ]  # fmt: skip
    rows = chrome_trace(timeline)["traceEvents"]
    assert [row["pid"] for row in rows if row["ph"] == "X"] == [0, 1, 1]
    ET.fromstring(draw(timeline, (0.0, 2.0), name="n", title="t"))


# ---- pictures and text


def test_the_picture_has_every_pass_layer_and_arrow() -> None:
    svg = draw(FIGURE_1, (0.0, FIGURE_1.end_s), name="figure-1", title="As predicted")
    root = ET.fromstring(svg)
    words = [node.text for node in root.iter() if node.tag.endswith("}text")]
    assert words.count("L1") == words.count("L2") == words.count("L3") == 8  # four passes there, four back
    assert [word for word in words if word and word[0] in "FB"] == ["F0", "B0", "F1", "B1", "F2", "B2", "F3", "B3"]
    assert svg.count("marker-end") == 4
    assert "at most 3 passes are in flight" in svg


def test_what_the_mouse_is_over_says_what_it_is() -> None:
    svg = draw(FIGURE_1, (0.0, FIGURE_1.end_s + 1), name="figure-1", title="As predicted")  # the last write, too
    titles = [node.text for node in ET.fromstring(svg).iter() if node.tag.endswith("}title")]
    assert titles[0] == "figure 1"
    passes = [f"{kind} {batch}" for batch in range(4) for kind in ("forward", "backward")]
    parts = [f"{kind} L{layer}, batch {batch}" for batch in range(4) for layer in (1, 2, 3)
             for kind in ("forward", "backward", "write")]  # fmt: skip
    assert sorted(str(title) for title in titles[1:]) == sorted(passes + parts)
    waiting = Timeline(Trace((), ("t",), [Event("forward", 0.0, 1.0, 0, batch=0), Event("wait", 1.0, 2.0, 0)]))
    assert "<title>wait</title>" in draw(waiting, (0.0, 2.0), name="n", title="t")


def test_the_text_shows_who_does_what() -> None:
    said = io.StringIO()
    print_tracks(FIGURE_1, (0.0, 18.0), said)
    lines = said.getvalue().splitlines()
    forward, first, second = lines[1:4]
    assert forward.startswith("forward    F0---")
    assert [forward.count(f"F{n}") for n in range(4)] == [1] * 4
    assert [line.count("!") for line in (first, second)] == [6, 6]  # each writes three layers of two batches
    assert first.index("B0") < second.index("B1") < first.index("B2") < second.index("B3")
    assert first.index("B0") == forward.index("F1")  # the backward pass begins as the next forward pass does
    assert max(map(len, lines)) <= 120


def test_an_empty_stretch_is_said_to_be_empty() -> None:
    said = io.StringIO()
    print_tracks(FIGURE_1, (100.0, 101.0), said)
    assert "Nothing happens" in said.getvalue()


# ---- the command


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["trace", *arguments])
    return int(ended.value.code or 0)


def test_the_command_writes_what_its_file_is_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FIGURE_1.trace.save(tmp_path / "trace.jsonl")
    assert call(str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "trace.json")
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 40
    assert call(str(tmp_path), "--out", str(tmp_path / "a.svg"), "--start", "2", "--seconds", "5", "--quiet") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.svg'}\n"
    ET.fromstring((tmp_path / "a.svg").read_bytes())
    assert load_timeline(tmp_path / "trace.jsonl").passes == FIGURE_1.passes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "a.png"], "out must be a .json or .svg file (got a.png)"),
        (["--start", "99"], "start must be < 18, the end of the trace (got 99)"),
        (["--seconds", "0"], "ust be > 0"),
    ],
)
def test_wrong_input(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FIGURE_1.trace.save(tmp_path / "trace.jsonl")
    assert call(str(tmp_path), *options) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(str(tmp_path)) == 2
    assert "run must be a folder with a trace.jsonl" in capsys.readouterr().err
    Trace((), (), []).save(tmp_path / "trace.jsonl")
    assert call(str(tmp_path)) == 2
    assert "must have forward or backward passes" in capsys.readouterr().err
