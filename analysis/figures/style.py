"""Sizes, fonts and lines of figures for a paper, slides or a screen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib.font_manager import FontProperties, fontManager, get_font
from matplotlib.ft2font import LoadFlags

FONT = "DejaVu Sans"  # Matplotlib brings it along, so every machine draws the same figure
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans")
POINTS_PER_INCH = 72
MIN_TEXT_PT = 7.0
DPI = {"paper": 300, "slides": 150, "screen": 160}
WIDTH_INCHES = {"paper": (3.25, 6.75), "slides": (6.0, 12.0), "screen": (4.6, 9.4)}
TEXT_PT = {"paper": MIN_TEXT_PT, "slides": 14.0, "screen": 9.0}
MAX_HEIGHT_INCHES = 9.0  # of a figure in a paper, which must fit on a page
MAX_CURVES_OF_A_PAGE = 24  # a figure of more is higher than a page, for each has an entry in a legend


@dataclass(frozen=True)
class Style:
    """Where a figure is shown and how wide it is.

    Attributes:
        name: ``paper``, ``slides`` or ``screen``.
        width: ``single`` or ``double`` column.
    """

    name: str = "screen"
    width: str = "double"

    @property
    def inches(self) -> float:
        """Final width."""
        return WIDTH_INCHES[self.name][self.width == "double"]

    @property
    def is_wide(self) -> bool:
        """Whether the figure spans two columns."""
        return self.width == "double"

    @property
    def text_pt(self) -> float:
        """Size of all text."""
        return TEXT_PT[self.name]

    @property
    def em(self) -> float:
        """Size of the text in inches."""
        return self.text_pt / POINTS_PER_INCH

    @property
    def scale(self) -> float:
        """Factor of lines and markers; 1 for a paper."""
        return self.text_pt / MIN_TEXT_PT

    @property
    def dpi(self) -> int:
        """Resolution of the PNG."""
        return DPI[self.name]

    @property
    def max_height_inches(self) -> float:
        """Height of a large figure: that of a page, or more where it is not printed."""
        return MAX_HEIGHT_INCHES * (1.0 if self.name == "paper" else self.scale)

    @property
    def formats(self) -> tuple[str, ...]:
        """Files of each figure unless others are asked for: one picture, and its points."""
        return ("svg", "csv") if self.name == "screen" else ("pdf", "csv")

    @property
    def has_title(self) -> bool:
        """Whether the title is in the figure; a paper has it in the caption."""
        return self.name != "paper"

    def rc(self) -> dict[Any, Any]:
        """Matplotlib's settings. The same points give the same bytes: no random ids."""
        line = 0.6 * self.scale
        return {
            "font.family": list(_families()),
            "font.size": self.text_pt,
            **dict.fromkeys(("axes.titlesize", "axes.labelsize", "legend.fontsize", "figure.titlesize"), self.text_pt),
            **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), self.text_pt),
            "text.parse_math": False,  # a label with a dollar sign is no formula
            "text.usetex": False,
            "text.hinting": "none",  # text has the same width in PNG and PDF
            "axes.unicode_minus": True,
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.linewidth": line,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.labelpad": 2.0 * self.scale,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "grid.color": "#e4e4e4",
            "grid.linewidth": line,
            **{f"{axis}tick.major.width": line for axis in "xy"},
            **{f"{axis}tick.major.size": 2.5 * self.scale for axis in "xy"},
            **{f"{axis}tick.major.pad": 2.0 * self.scale for axis in "xy"},
            **{f"{axis}tick.minor.size": 0.0 for axis in "xy"},
            "lines.linewidth": 1.0 * self.scale,
            "lines.markersize": 3.8 * self.scale,
            "lines.markeredgewidth": 0.8 * self.scale,
            # Fonts are embedded: TrueType for a paper, as journals refuse Type 3, which takes a fifth of the time.
            "pdf.fonttype": 42 if self.name == "paper" else 3,
            "pdf.use14corefonts": False,
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "kvbench",
        }


@cache
def _families() -> tuple[str, ...]:
    installed = {font.name for font in fontManager.ttflist}
    return (FONT, *(name for name in FALLBACK_FONTS if name in installed))


@cache
def text_inches(text: str, size_pt: float, weight: str = "normal") -> float:
    """Width of one line of text."""
    path = _font_path(weight)
    font = get_font(path)
    font.set_size(size_pt, POINTS_PER_INCH)
    font.set_text(text, 0.0, flags=LoadFlags.NO_HINTING)
    return float(font.get_width_height()[0]) / 64 / POINTS_PER_INCH


@cache
def _font_path(weight: str) -> str:
    with mpl.rc_context({"font.family": [FONT]}):
        return str(fontManager.findfont(FontProperties(family=FONT, weight=weight)))


def wrapped(text: str, inches: float, size_pt: float, weight: str = "normal") -> str:
    """Return the text with line breaks, so that no line is wider than ``inches``; long words are broken."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            candidate = f"{line} {word}" if line else word
            if text_inches(candidate, size_pt, weight) <= inches:
                line = candidate
                continue
            if line:
                lines.append(line)
            line = word
            while text_inches(line, size_pt, weight) > inches and len(line) > 1:
                cut = next(
                    n for n in range(len(line) - 1, 0, -1) if n == 1 or text_inches(line[:n], size_pt, weight) <= inches
                )
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return "\n".join(lines)
