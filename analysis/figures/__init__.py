"""Figures of finished runs; ``kvbench plot`` writes them.

for spec in figures(runs):
    draw(spec, Style("paper", "single"))
"""

from .catalog import KINDS, figures
from .draw import draw
from .spec import FigureSpec, Options, Point
from .style import Style

__all__ = ["KINDS", "FigureSpec", "Options", "Point", "Style", "draw", "figures"]
