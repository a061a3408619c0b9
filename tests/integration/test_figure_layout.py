"""Figures of the committed records: nothing is clipped, covered or left out, no text is small.

Always the largest figure of each kind, which has the least room, in a single column, and some in other styles; all of
them in both widths of a paper are slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvbench.analysis.figures import KINDS, FigureSpec, Style, draw, figures
from kvbench.analysis.figures.style import MAX_CURVES_OF_A_PAGE, MAX_HEIGHT_INCHES, MIN_TEXT_PT, text_inches, wrapped
from kvbench.analysis.load import load

RESULTS = Path(__file__).resolve().parents[2] / "results" / "reference"
TOLERANCE_PX = 1.0


def drawn_texts(figure: Figure, style: Style, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Text], RendererAgg]:
    """The texts that are drawn, and a renderer that measures them."""
    texts: dict[int, Text] = {}
    draw_text = Text.draw

    def record(self: Text, renderer: RendererAgg) -> None:
        if self.get_visible() and self.get_text().strip():
            texts[id(self)] = self
        draw_text(self, renderer)

    renderer = RendererAgg(int(figure.bbox.width), int(figure.bbox.height), figure.dpi)
    with monkeypatch.context() as patch, mpl.rc_context(style.rc()):
        patch.setattr(Text, "draw", record)
        figure.draw(renderer)
    return list(texts.values()), renderer


def problems(spec: FigureSpec, figure: Figure, style: Style) -> Iterator[str]:
    """What is wrong with a drawn figure."""
    texts, renderer = drawn_texts(figure, style, pytest.MonkeyPatch())
    boxes = [text.get_window_extent(renderer).padded(-TOLERANCE_PX) for text in texts]
    page = figure.bbox.padded(TOLERANCE_PX)
    if abs(figure.get_figwidth() - style.inches) > 1e-6:
        yield f"{figure.get_figwidth()} inches wide"
    is_for_a_page = style.name == "paper" and len({point.curve for point in spec.points}) <= MAX_CURVES_OF_A_PAGE
    if is_for_a_page and figure.get_figheight() > MAX_HEIGHT_INCHES:
        yield f"{figure.get_figheight():.2f} inches high"
    for text, box in zip(texts, boxes, strict=True):
        if not (page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1)):
            yield f"clipped: {text.get_text()!r}"
        if text.get_fontsize() < MIN_TEXT_PT:
            yield f"small: {text.get_text()!r}"
        for ax in figure.axes:
            if text.axes is not ax and ax.axison and box.overlaps(ax.get_window_extent(renderer).padded(-TOLERANCE_PX)):
                yield f"in another panel: {text.get_text()!r}"
    for (one, a), (two, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        if a.overlaps(b):
            yield f"overlap: {one.get_text()!r} and {two.get_text()!r}"
    drawn = "".join("".join(text.get_text().split()) for text in texts)
    yield from (f"missing: {label}" for label in spec.labels if "".join(label.split()) not in drawn)
    for ax in figure.axes:
        frame = ax.get_window_extent(renderer).padded(TOLERANCE_PX)
        for line in ax.get_lines():
            if line.get_marker() not in ("None", None, "", " "):
                places = line.get_transform().transform(line.get_xydata())
                outside = [place for place in places if not frame.contains(*place)]
                if outside:
                    yield f"{len(outside)} points outside their panel"


@pytest.fixture(scope="module")
def specs() -> list[FigureSpec]:
    return list(figures(load(RESULTS)[0], tuple(KINDS)))


def test_the_committed_records_fill_every_kind_that_they_can(specs: list[FigureSpec]) -> None:
    assert {spec.kind for spec in specs} == set(KINDS) - {"batch"}  # no committed runs of several batch sizes


@pytest.mark.slow
@pytest.mark.parametrize("width", ["single", "double"])
def test_every_figure_in_print_is_whole(specs: list[FigureSpec], width: str) -> None:
    style = Style("paper", width)
    found = {f"{s.kind} {s.record['task']}": list(problems(s, draw(s, style), style)) for s in specs}
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    ("style", "kinds"),
    [
        (Style("paper", "single"), [kind for kind in KINDS if kind != "batch"]),
        (Style("paper", "double"), ["pareto", "datasets"]),
        (Style("screen", "double"), ["speed"]),
        (Style("slides", "single"), ["length"]),
    ],
)
def test_the_largest_figure_of_each_kind_is_whole(specs: list[FigureSpec], style: Style, kinds: list[str]) -> None:
    largest = [max((s for s in specs if s.kind == kind), key=lambda s: len(s.points)) for kind in kinds]
    found = {spec.kind: list(problems(spec, draw(spec, style), style)) for spec in largest}
    assert not {kind: wrong for kind, wrong in found.items() if wrong}


def test_the_check_finds_what_is_wrong(specs: list[FigureSpec]) -> None:
    """Each kind of problem is found when it is made."""
    style = Style("paper", "single")
    spec = next(spec for spec in specs if spec.kind == "trained")
    assert not list(problems(spec, draw(spec, style), style))
    figure = draw(spec, style)
    figure.text(0.99, 0.5, "clipped text")
    figure.text(0.5, 0.5, "small", fontsize=5)
    figure.text(0.5, 0.5, "covered")
    figure.legends[0].remove()
    found = " ".join(problems(spec, figure, style))
    for problem in ("clipped: 'clipped text'", "small: 'small'", "overlap: 'small' and 'covered'", "missing: MQA"):
        assert problem in found
    assert "in another panel" in found


def test_text_is_measured_and_wrapped() -> None:
    size = 7.0
    assert text_inches("MM", size) == pytest.approx(2 * text_inches("M", size), rel=0.05)
    assert text_inches("MM", 2 * size) == pytest.approx(2 * text_inches("MM", size), rel=0.05)
    text = wrapped("one two three four_long_word_without_any_break", 0.5, size)
    assert all(text_inches(line, size) <= 0.5 for line in text.split("\n"))
    assert "".join(text.split()) == "onetwothreefour_long_word_without_any_break"
