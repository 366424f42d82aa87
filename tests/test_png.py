"""Png: pictures as pixels, in the colours that the same picture has as SVG."""

import io
import sys
from pathlib import Path

import pytest

from asyncprop.cli import main
from asyncprop.report.charts import Curve, curves, strip
from asyncprop.report.page import PLAIN, FigureBlock, Page, Section
from asyncprop.report.png import WIDTH, to_png, write_pngs

drawn = pytest.mark.usefixtures("resvg")


@pytest.fixture
def resvg() -> None:
    pytest.importorskip("resvg_py", reason="make setup installs it")


def colours(png: bytes) -> set[str]:
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert image.width == WIDTH
    return {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in image.getcolors(1 << 24)}


@drawn
def test_a_picture_has_the_light_colours_on_white() -> None:
    line = curves([Curve("one", [1, 2], [3, 4])], x="x", y="y", name="n", description="d")
    assert {PLAIN["s0"], PLAIN["text"], PLAIN["grid"], "#ffffff"} <= colours(to_png(line))
    heat = strip(["a"], ["1", "2"], [[0.0, 1.0]], x="x", unit="u", name="n", description="d")
    assert {PLAIN["heat-low"], PLAIN["heat-high"]} <= colours(to_png(heat))


@drawn
def test_the_same_picture_is_the_same_file_and_its_words_are_in_it() -> None:
    pictures = [to_png(curves([Curve(label, [1], [1])], x="x", y="y", name="n", description="d"))
                for label in ("one", "one", "two")]  # fmt: skip
    assert pictures[0] == pictures[1] != pictures[2]


@drawn
def test_every_figure_of_a_page_gets_a_file(tmp_path: Path) -> None:
    svg = strip(["a"], ["1"], [[1.0]], x="x", unit="u", name="n", description="d")
    figures = [FigureBlock(name, "c", "d", svg) for name in ("one", "two")]
    page = Page("Title", "Lead.", [Section("Part", figures)])
    assert write_pngs(page, tmp_path) == [tmp_path / "one.png", tmp_path / "two.png"]
    assert (tmp_path / "two.png").read_bytes() == to_png(svg)


def test_without_what_draws_it_all_else_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import asyncprop.exhibits.reproduce as made

    svg = strip(["a"], ["1"], [[1.0]], x="x", unit="u", name="n", description="d")
    page = Page("Title", "Lead.", [Section("Part", [FigureBlock("one", "c", "d", svg)])])
    monkeypatch.setattr(made, "reproduce", lambda *given, **options: page)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "figure1", "--scale", "tiny", "--out", str(tmp_path)])
    assert ended.value.code == 0
    assert "pictures are SVG only: PNG files need resvg-py and matplotlib" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"figure1.md", "figure1.html", "one.svg"}
