"""Text in LaTeX: escaped characters, typeset numbers, and the width of both."""

from __future__ import annotations

import re

ESCAPES = {
    **{character: f"\\{character}" for character in "%&_#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",  # \textquotedbl is not in the default encoding
    "`": r"\textasciigrave{}",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "×": r"$\times$",
    "−": r"$-$",
    "±": r"$\pm$",
    "°": r"$^\circ$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
}


def escape(text: str) -> str:
    """Text as LaTeX prints it, on one line."""
    return "".join(ESCAPES.get(c, c) for c in " ".join(text.split()) if c.isprintable())


def breakable(text: str) -> str:
    """Text that may be broken into lines after characters that join words."""
    return re.sub(r"(\\_|[=/])", r"\1\\allowbreak{}", escape(text))


def number_text(text: str) -> str:
    """Typeset a number's cell: a minus sign for the hyphen, a dash for a range, a multiplication sign for a ratio."""
    if text == "-":
        return "--"
    text = re.sub(r"(?<=[\d%]) - (?=[\d+-])", "–", text)
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return escape(re.sub(r"(?<=\d) x$", "×", text))


def has_other_script(text: str) -> bool:
    """Whether a text has characters that pdflatex cannot print with its own fonts."""
    return any(ord(c) > 0xFF for c in text)


WIDTHS = {
    **dict.fromkeys('0123456789ag*/$^~"–', 0.5),
    **dict.fromkeys(".,:;!'`|il[]", 0.278),
    **dict.fromkeys("hnu", 0.556),
    **dict.fromkeys("kqvxy", 0.528),
    **dict.fromkeys("cez†‡", 0.445),
    **dict.fromkeys("bp", 0.584),  # with the space before a round letter
    **dict.fromkeys("wCT", 0.723),
    **dict.fromkeys("ANHUVXY", 0.75),
    **dict.fromkeys("+=−×±<>@&OKQ≤≥", 0.778),
    **dict.fromkeys("m%#", 0.834),
    **dict.fromkeys("rs", 0.395),
    **dict.fromkeys("t()", 0.389),
    **dict.fromkeys("dS", 0.556),
    **dict.fromkeys("jI", 0.362),
    **dict.fromkeys("- ", 0.334),
    **dict.fromkeys("EP", 0.681),
    "o": 0.528,
    "f": 0.384,
    "_": 0.36,
    "?": 0.473,
    "°": 0.5,
    "B": 0.709,
    "D": 0.764,
    "F": 0.653,
    "G": 0.785,
    "J": 0.514,
    "L": 0.625,
    "M": 0.917,
    "R": 0.737,
    "W": 1.028,
    "Z": 0.612,
}
"""Widths of Computer Modern's characters in units of the type size at 10 points, kerns that widen included."""
SMALL_TYPE = {9.0: 1.03, 8.0: 1.065, 7.0: 1.165}
"""Its designs for small sizes are wider."""
BOLD = 1.16


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Points that LaTeX takes for an escaped text, or a little less than that."""
    plain = text
    for character, escaped in ESCAPES.items():
        plain = plain.replace(escaped, character)
    width = sum(WIDTHS.get(c, 1.0) for c in plain)
    return width * size * SMALL_TYPE.get(size, 1.0) * (BOLD if bold else 1.0)
