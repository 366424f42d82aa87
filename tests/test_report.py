"""Report: what a page says of run folders, that it needs nothing else, and that a browser agrees."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from asyncprop.report.charts import Curve, bars, curves, strip
from asyncprop.report.figure1 import figure1
from asyncprop.report.files import read_paths, read_run
from asyncprop.report.overview import overview
from asyncprop.report.page import PLAIN, FigureBlock, Page, Section, TableBlock, render_html, standalone, write_markdown
from pages import CHROMIUM, ask_page, write_comparison, write_run

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "rect", "circle"}


class Reader(HTMLParser):
    """Notes what a page is made of, and that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.used: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        self.ids += [named["id"]] if named.get("id") else []
        for value in named.values():
            self.used += re.findall(r"url\(#([^)]+)\)", value or "")
        self.used += (named.get("aria-labelledby") or "").split()
        self.used += [named["href"][1:]] if (named.get("href") or "").startswith("#") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    compared = write_comparison(folder / "c", {"sgd": (0.5, 0.8), "async-lu": (0.6, 0.75), "async-bu": (0.1, 0.65)})
    lone = write_run(folder / "lone<1>", "hogwild", lr=0.5)
    return render_html(overview([compared, lone, compared / "comparison.json"], "asyncprop report runs/*"))


def test_the_page_is_whole_and_needs_no_other_file(html: str) -> None:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert set(reader.used) <= set(reader.ids)
    assert not [named for _, named in reader.tags if {"src", "srcset"} & set(named)]
    assert all(named.get("href", "#").startswith("#") for named in reader.all("a") + reader.all("link"))
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_who_cannot_see_the_figures_is_told_what_they_say(html: str) -> None:
    reader = Reader()
    reader.feed(html)
    pictures = reader.all("svg")
    assert len(pictures) >= 10
    for picture in pictures:
        assert picture["role"] == "img"
        assert len((picture["aria-labelledby"] or "").split()) == 2
    assert len(reader.all("table")) == len(reader.all("caption"))
    assert all(named.get("scope") in ("col", "row") for named in reader.all("th"))
    assert reader.all("html")[0]["lang"] == "en"
    assert "sgd is the fastest, with 4.0 s" in html  # async-lu needs as long: the first of the fastest is named
    assert "Not reached by async-bu." in html


def test_a_method_that_reached_the_target_in_some_runs_says_so_and_is_not_the_fastest(tmp_path: Path) -> None:
    file = write_comparison(tmp_path / "c", {"sgd": (0.5, 0.8), "async-lu": (0.75, 0.8)}) / "comparison.json"
    content = json.loads(file.read_text())
    content["rows"][1]["reached"] = 1
    file.write_text(json.dumps(content))
    figure = overview([file], "x").sections[0].blocks[2]
    assert isinstance(figure, FigureBlock)
    assert ">async-lu (1 of 2)</text>" in figure.svg
    assert ">sgd</text>" in figure.svg
    assert "mean ± deviation of the runs that reached it." in figure.caption
    assert figure.description.endswith("sgd is the fastest of those that reached it in every run, with 4.0 s.")
    content["rows"][0]["reached"] = 1
    file.write_text(json.dumps(content))
    figure = overview([file], "x").sections[0].blocks[2]
    assert isinstance(figure, FigureBlock)
    assert figure.description.endswith("No method reached it in every run.")


def test_the_numbers_are_the_files(html: str) -> None:
    assert "0.8000 ± 0.0000" in html
    assert "not reached (0 of 2)" in html
    assert "asyncprop train digits" in html
    assert "one &amp; only" in html
    assert "lone&lt;1&gt;" in html
    assert html.count("asyncprop report runs/*") >= 10  # with every figure


def test_runs_are_told_apart_by_what_they_differ_in(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "a", lr=0.1), write_run(tmp_path / "b", lr=0.2), write_run(tmp_path / "c", seed=1)]
    _, runs = read_paths(paths)
    assert [run.label for run in runs] == ["async-lu:lr=0.1", "async-lu:lr=0.2", "async-lu"]


def test_a_run_under_way_is_shown_as_far_as_it_has_come(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", finished=False)
    with (path / "epochs.jsonl").open("a") as file:
        file.write('{"epoch": 3, "train_')
    assert "2 (not finished)" in render_html(overview([path], "x"))
    empty = write_run(tmp_path / "b", metrics=(), finished=False)
    assert "0 (not finished)" in render_html(overview([empty], "x"))


def test_a_run_with_a_trace_has_its_timeline(tmp_path: Path) -> None:
    figure1(batches=40).save(write_run(tmp_path / "a") / "trace.jsonl")
    html = render_html(overview([tmp_path / "a"], "x"))
    assert "3 threads work on batches 14 to 23 in" in html
    assert ">B17</text>" in html
    assert ">B2</text>" not in html


def test_an_old_run_without_telemetry_is_shown(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a")
    rows = [json.loads(line) for line in (path / "epochs.jsonl").read_text().splitlines()]
    new = ("updates", "staleness_by_layer", "threads", "peak_memory_bytes")
    lean = [{key: value for key, value in row.items() if key not in new} for row in rows]
    (path / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lean))
    assert "Staleness over the run" in render_html(overview([path], "x"))


def test_steps_are_means_over_stretches(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", metrics=(0.1,) * 12))
    assert [step["step"] for step in run.steps] == [2 * n + 0.5 for n in range(60)]
    assert {step["staleness"] for step in run.steps} == {0.25}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "runs must be folders"), ("{}", "must be a file that asyncprop compare"), ("{", "must be a file that")],
)
def test_what_is_no_run(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        overview([path], "x")


def test_headings_tell_a_comparisons_runs_from_others(tmp_path: Path) -> None:
    paths = [write_comparison(tmp_path / "c", {"sgd": (0.5, 0.8)}), write_run(tmp_path / "a")]
    page = overview(paths, "x")
    titles = [section.title for section in page.sections]
    assert {"digits: runs", "digits: other runs"} <= set(titles)
    assert len(set(titles)) == len(titles)
    assert page.lead == "1 comparison and 3 runs, from their files alone."


def test_runs_are_counted_by_machine_and_comparisons_apart(tmp_path: Path) -> None:
    compared = write_comparison(tmp_path / "c", {"sgd": (0.5, 0.8)})
    other = write_run(tmp_path / "a")
    environment = json.loads((other / "environment.json").read_text())
    (other / "environment.json").write_text(json.dumps({**environment, "commit": "def"}))
    table = overview([compared, other], "x").sections[-1].blocks[0]
    assert isinstance(table, TableBlock)
    assert table.columns[-2:] == ["comparisons", "runs"]
    assert [(row[3], *row[-2:]) for row in table.rows] == [("abc", "1", "2"), ("def", "0", "1")]
    content = json.loads((compared / "comparison.json").read_text())
    content["environments"] = [{**environment, "commit": commit} for commit in ("abc", "def")]
    (compared / "comparison.json").write_text(json.dumps(content))
    table = overview([compared / "comparison.json"], "x").sections[-1].blocks[0]
    assert isinstance(table, TableBlock)
    assert [(row[3], *row[-2:]) for row in table.rows] == [("abc", "1", "0"), ("def", "1", "0")]


def test_nothing_given_and_a_damaged_run() -> None:
    with pytest.raises(ValueError, match="runs must be given"):
        overview([], "x")


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a")
    (path / "epochs.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="must be a run whose files are whole"):
        overview([path], "x")


# ---- charts


def test_charts_take_their_colours_from_the_page() -> None:
    made = {
        "curves": curves([Curve("a", [1, 2], [3, 4]), Curve("a", [1, 2], [4, 5])], x="x", y="y", name="n",
                         description="d", level=3.5),
        "bars": bars(["a<b", "c"], {"g": [1.0, None], "h": [2.0, 3.0]}, x="s", name="n", description="d"),
        "strip": strip(["a" * 50], ["1", "2"], [[0.0, None]], x="x", unit="u", name="n", description="d & e"),
    }  # fmt: skip
    for kind, svg in made.items():
        ET.fromstring(svg)
        assert svg.count("<title") == 1, kind
        assert "var(--text)" in svg, kind
        assert "#0a0b" not in svg, kind
        assert set(re.findall(r"var\(--([a-z0-9-]+)\)", svg)) <= set(PLAIN), kind
        alone = standalone(svg)
        ET.fromstring(alone.encode())
        assert "var(" not in alone


def test_long_labels_of_bars_are_folded_at_their_colons() -> None:
    long = "async-lu:backward-threads=7:lanes=8:compensation=attenuation"
    svg = bars([long, "sgd"], {"g": [1.0, 2.0]}, x="s", name="n", description="d")
    assert ">async-lu:backward-threads=7:lanes=8:</text>" in svg
    assert ">compensation=attenuation</text>" in svg
    assert ">sgd</text>" in svg


def test_curves_of_one_label_share_colour_and_entry() -> None:
    svg = curves([Curve("same", [1], [1]), Curve("same", [1], [2])], x="x", y="y", name="n", description="d")
    assert svg.count(">same</text>") == 1
    assert "var(--s1)" not in svg


def test_the_strip_is_strongest_at_its_highest_value() -> None:
    svg = strip(["a", "b"], ["1"], [[1.0], [4.0]], x="x", unit="u", name="n", description="d")
    assert re.findall(r"fill-opacity: ([0-9.]+)", svg) == ["0.250", "1.000"]
    assert "strongest: 4.00 u" in svg


def test_markdown_has_the_tables_and_pictures_beside_it(tmp_path: Path) -> None:
    svg = curves([Curve("a", [1], [1])], x="x", y="y", name="n", description="d")
    table = TableBlock("A table", ["a", "b"], [["1", "2"]], note="A note.")
    page = Page("Title", "Lead.", [Section("Part", [table, FigureBlock("pic", "Caption", "Says", svg, "cmd")])])
    write_markdown(page, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| 1 | 2 |" in text
    assert "![Says](pic.svg)" in text
    assert "A note." in text
    ET.fromstring((tmp_path / "pic.svg").read_bytes())


# ---- in a browser

browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, as make test does")


@browser
def test_a_browser_shows_it_without_an_error_and_sorts_its_tables(html: str, tmp_path: Path) -> None:
    script = """
      const document = this.document, cells = () => [...document.querySelector("tbody").rows].map(
        row => row.cells[1].textContent);
      const button = document.querySelectorAll("thead button")[1], head = button.parentElement, before = cells();
      button.click(); const up = cells(), said = head.getAttribute("aria-sort");
      button.click(); const down = cells();
      const drawn = [...document.querySelectorAll("figure > svg")].map(svg => svg.getBoundingClientRect().height);
      return {before, up, down, said, drawn, background: this.getComputedStyle(document.body).backgroundColor};
    """
    answer = ask_page(html, script, tmp_path)
    assert answer["errors"] == []
    value = answer["value"]
    assert value["up"] == sorted(value["before"])
    assert value["up"] != value["before"]
    assert value["down"] == value["up"][::-1]
    assert value["said"] == "ascending"
    assert min(value["drawn"]) > 20
    assert value["background"] == "rgb(255, 255, 255)"


@browser
def test_what_has_no_number_comes_last_both_ways(tmp_path: Path) -> None:
    cells = ["2.0", "–", "10.0 ± 1.0", "not reached (0 of 3)", "3.0"]
    table = TableBlock("A table", ["place", "time"], [[str(place), cell] for place, cell in enumerate(cells)])
    script = """
      const document = this.document, places = () => [...document.querySelector("tbody").rows].map(
        row => Number(row.cells[0].textContent));
      const [place, time] = document.querySelectorAll("thead button");
      time.click(); const up = places();
      time.click(); const down = places();
      place.click(); place.click();
      return {up, down, last: places()};
    """
    answer = ask_page(render_html(Page("Title", "Lead.", [Section("Part", [table])])), script, tmp_path)
    assert answer["errors"] == []
    value = answer["value"]
    assert value["up"][:3] == [0, 4, 2]
    assert value["down"][:3] == [2, 4, 0]
    assert set(value["up"][3:]) == set(value["down"][3:]) == {1, 3}
    assert value["last"] == [4, 3, 2, 1, 0]


@browser
def test_a_phone_in_the_dark(html: str, tmp_path: Path) -> None:
    script = """
      const root = this.document.documentElement;
      return {width: root.scrollWidth, seen: root.clientWidth,
              background: this.getComputedStyle(this.document.body).backgroundColor,
              widest: Math.max(...[...this.document.querySelectorAll("figure > svg")].map(
                svg => svg.getBoundingClientRect().width))};
    """
    answer = ask_page(html, script, tmp_path, width=400, flags=("--blink-settings=preferredColorScheme=0",))
    assert answer["errors"] == []
    assert answer["value"]["width"] <= answer["value"]["seen"] <= 400  # only tables and commands scroll sideways
    assert answer["value"]["widest"] <= 400
    assert answer["value"]["background"] == "rgb(15, 19, 24)"
