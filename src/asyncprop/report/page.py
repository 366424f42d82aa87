"""Page: sections of text, tables and figures, written as one self-contained HTML file, or as Markdown with SVGs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from asyncprop.report.tables import markdown_table

EXTRA = "needs jinja2 and matplotlib: pip install 'asyncprop[report]'"


@dataclass(frozen=True)
class TableBlock:
    """A table: `columns` and rows of text; columns from `numbers_from` on are numbers, and sort as such."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numbers_from: int = 1
    note: str = ""


@dataclass(frozen=True)
class FigureBlock:
    """A picture.

    Attributes:
        name: of its file, where it gets one.
        caption: what is seen.
        description: the same for who cannot see it: what the figure says, in a sentence.
        svg: the picture, as `report.charts` makes it.
        command: what it was made by, to be typed again.
        table: its numbers.
        is_wide: whether it needs the page's whole width.
    """

    name: str
    caption: str
    description: str
    svg: str
    command: str = ""
    table: TableBlock | None = None
    is_wide: bool = False


@dataclass(frozen=True)
class TextBlock:
    """A paragraph; `is_code` keeps its lines as they are."""

    text: str
    is_code: bool = False


Block = TableBlock | FigureBlock | TextBlock


@dataclass(frozen=True)
class Section:
    """A heading, and what is under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Return the heading as part of an address."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """Sections under one title; `lead` says in a line or two what it all is."""

    title: str
    lead: str
    sections: list[Section]


def render_html(page: Page) -> str:
    """Return one HTML file that needs no other: styles, script and pictures are in it.

    Raises:
        ValueError: if jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise ValueError(f"an HTML report {EXTRA}") from None
    environment = Environment(
        loader=PackageLoader("asyncprop.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    kinds = {TableBlock: "table", FigureBlock: "figure", TextBlock: "text"}
    return environment.get_template("page.html.j2").render(page=page, kind=lambda block: kinds[type(block)])


def write_markdown(page: Page, file: Path) -> None:
    """Write Markdown to `file`, and its pictures beside it."""
    lines = [f"# {page.title}", "", page.lead, ""]
    for section in page.sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_markdown(block, file), ""]
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _markdown(block: Block, file: Path) -> list[str]:
    match block:
        case TextBlock(text, True):
            return [f"    {line}" for line in text.splitlines()]
        case TextBlock(text):
            return [text]
        case TableBlock(caption, columns, rows, _, note):
            return [f"**{caption}**", "", markdown_table(columns, rows), *([note] if note else [])]
        case FigureBlock():
            picture = file.with_name(f"{block.name}.svg")
            picture.write_text(standalone(block.svg), encoding="utf-8")
            shown = [f"![{block.description}]({picture.name})", "", block.caption]
            return [*shown, *([f"`{block.command}`"] if block.command else [])]


PLAIN = {
    "text": "#1b1f24", "muted": "#59636e", "grid": "#d1d9e0", "paper": "#ffffff", "heat-low": "#f3f6fa",
    "heat-high": "#8c2d04", "s0": "#0072b2", "s1": "#d55e00", "s2": "#009e73", "s3": "#cc79a7", "s4": "#9a7b00",
    "s5": "#3b9fd6", "s6": "#7a5195", "s7": "#666666",
}  # fmt: skip
"""The light colours; the page's style sheet has the dark ones, by the same names."""


def standalone(svg: str) -> str:
    """Return a picture of a page as a file of its own, in the light colours on white."""
    filled = re.sub(r"var\(--([a-z0-9-]+)\)", lambda name: PLAIN[name.group(1)], svg)
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    return head + re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', filled, count=1)
