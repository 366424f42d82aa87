"""Png: the pictures of a page as pixels, for where SVG is not shown."""

from __future__ import annotations

from pathlib import Path

from asyncprop.report.page import FigureBlock, Page, standalone

WIDTH = 1200
"""Pixels of a picture from left to right."""


def to_png(svg: str) -> bytes:
    """Return a picture of a page as a PNG file, WIDTH pixels wide, in the light colours on white.

    Text is in matplotlib's own font, so that the same picture is the same on every machine.

    Raises:
        ValueError: if what draws it is not installed.
    """
    try:
        from matplotlib import get_data_path
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ValueError("PNG files need resvg-py and matplotlib: pip install 'asyncprop[report]'") from None
    font = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return bytes(
        svg_to_bytes(
            standalone(svg), width=WIDTH, skip_system_fonts=True, font_files=[str(font)],
            font_family="DejaVu Sans", sans_serif_family="DejaVu Sans",
        )
    )  # fmt: skip


def write_pngs(page: Page, folder: Path) -> list[Path]:
    """Write every figure of a page into a folder, by its name; return the files."""
    figures = [block for section in page.sections for block in section.blocks if isinstance(block, FigureBlock)]
    for figure in figures:
        (folder / f"{figure.name}.png").write_bytes(to_png(figure.svg))
    return [folder / f"{figure.name}.png" for figure in figures]
