"""Name, colour, marker and line of every method, the same in every figure.

Any two colours differ by a Lab distance of at least 25 for normal sight, deuteranopia and protanopia (15 from the black
of the baselines and the grey of unknown methods). Methods of one family, which share a panel, all have different
colours. Methods of different families may share a colour; they then differ in marker and in line. Settings of one
method share its colour and marker and differ in the fill of the marker and in the line.

    looks = looks_of((run.record["method"], run.curve) for run in runs)
    looks["kivi2"].color
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count

from ..ordering import without_settings

FAMILIES = {
    "baseline": "Baselines",
    "attention": "Eviction by attention",
    "keys": "Eviction by position or keys",
    "decoding": "Eviction every few steps",
    "quantization": "Quantization",
    "reading": "Partial reads",
    "merging": "Layer merging",
    "sharing": "Shared keys and values",
    "other": "Other methods",
}
"""Families of methods in the order of their panels, with their titles."""

AZURE, RUST, GREEN, AMBER, INDIGO, PINK = "#0069ff", "#c34b0f", "#3c875a", "#f0a500", "#4b0096", "#d296c3"
SKY, WINE, SLATE, KHAKI, BLUE, BROWN = "#00a5ff", "#690f3c", "#4b4b87", "#c3b469", "#0000ff", "#5a2d00"
BLACK, GREY = "#000000", "#8c8c8c"

LINES = ("solid", "dashed", "dotted", "dashdot", "longdash")
FILLS = ("full", "none", "left", "right", "top", "bottom")

PLOTLY_DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot", "dashdot": "dashdot", "longdash": "longdash"}
PLOTLY_SYMBOLS = dict(
    zip(
        "os^v<>DdPXph8*",
        (
            *("circle", "square", "triangle-up", "triangle-down", "triangle-left", "triangle-right", "diamond"),
            *("diamond-tall", "cross", "x", "pentagon", "hexagon", "octagon", "star"),
        ),
        strict=True,
    )
)
PLOTLY_FILLS = {"full": "", "none": "-open", "left": "-dot", "right": "-open-dot", "top": "-dot", "bottom": "-open-dot"}


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Attributes:
        name: Display name.
        color: Hexadecimal RGB.
        marker: Matplotlib's name of the marker.
        line: One of ``LINES``.
        family: One of ``FAMILIES``.
        fill: Part of the marker that is filled, one of ``FILLS``.
    """

    name: str
    color: str
    marker: str
    line: str
    family: str
    fill: str = "full"

    @property
    def plotly_symbol(self) -> str:
        """Plotly's name of the marker with its fill."""
        return PLOTLY_SYMBOLS[self.marker] + PLOTLY_FILLS[self.fill]

    @property
    def plotly_dash(self) -> str:
        """Plotly's name of the line."""
        return PLOTLY_DASHES[self.line]


def _family(family: str, line: str, **methods: tuple[str, str, str]) -> dict[str, Look]:
    return {key: Look(name, color, marker, line, family) for key, (name, color, marker) in methods.items()}


METHODS: dict[str, Look] = {
    "full": Look("Full cache", BLACK, "*", "solid", "baseline"),
    "no_cache": Look("No cache", BLACK, "X", "dotted", "baseline"),
    "transformers": Look("transformers generate", BLACK, "h", "dashed", "baseline"),
    **_family(
        "attention",
        "solid",
        snapkv=("SnapKV", AZURE, "o"),
        pyramidkv=("PyramidKV", RUST, "^"),
        ada_kv=("Ada-KV", GREEN, "s"),
        h2o=("H2O", AMBER, "D"),
        tova=("TOVA", INDIGO, "v"),
        pyramid_infer=("PyramidInfer", PINK, "p"),
        finch=("FINCH", KHAKI, "h"),
        chunkkv=("ChunkKV", WINE, "P"),
        criticalkv=("CriticalKV", SKY, "X"),
        kvzip=("KVzip", SLATE, "8"),
        duo_attention=("DuoAttention", BLUE, "d"),
    ),
    **_family(
        "keys",
        "dashed",
        streaming_llm=("StreamingLLM", WINE, ">"),
        expected_attention=("Expected Attention", KHAKI, "<"),
        key_diff=("KeyDiff", SLATE, "d"),
        random=("Random tokens", BLUE, "8"),
        key_norm=("Key norm", GREEN, "X"),
        lagkv=("LagKV", RUST, "*"),
        cur=("CUR", AZURE, "^"),
        compactor=("Compactor", INDIGO, "s"),
    ),
    **_family(
        "decoding",
        "dashdot",
        rkv=("R-KV", AZURE, "D"),
        snapkv_d=("SnapKV-D", GREEN, "h"),
        snapstream=("SnapStream", AMBER, "o"),
        scissorhands=("Scissorhands", INDIGO, ">"),
        cam=("CaM", RUST, "P"),
    ),
    **_family(
        "quantization",
        "dotted",
        kivi=("KIVI", SKY, "s"),
        hf_quantized=("HF quantized", RUST, "D"),
        snapkv_kivi4=("SnapKV + KIVI-4", AZURE, "P"),
        fp8=("FP8", GREEN, "P"),
        turboquant=("TurboQuant", INDIGO, "o"),
        kvquant=("KVQuant", AMBER, "X"),
    ),
    **_family("reading", "longdash", quest=("Quest", WINE, "<")),
    **_family(
        "merging",
        "dashdot",
        minicache=("MiniCache", BROWN, "o"),
        minicache_kivi4=("MiniCache + KIVI-4", PINK, "h"),
    ),
    **_family(
        "sharing",
        "longdash",
        mha=("MHA", BLUE, "s"),
        gqa=("GQA", SLATE, "o"),
        mqa=("MQA", AMBER, "^"),
        cla=("CLA", RUST, "v"),
        yoco=("YOCO", GREEN, "D"),
        lckv=("LCKV", INDIGO, "p"),
        kvshare=("KV sharing", SKY, "<"),
        mla=("MLA", BROWN, "P"),
    ),
}
"""Look of every choice of ``conf/method``."""

KNOWN_SETTINGS = {
    "kivi": ("kivi4", "kivi2", "kivi8"),
    "hf_quantized": ("hf_quantized4", "hf_quantized2"),
    "cla": ("cla2", "cla3", "cla4"),
    "gqa": ("gqa2", "gqa4", "gqa8"),
    "yoco": ("yoco", "yoco-gret", "yoco-full"),
    "lckv": ("lckv-w2", "lckv-w10", "lckv-w2-paper"),
    "mla": ("mla-r48", "mla-r112"),
    "snapkv_kivi4": ("snapkv + kivi4",),
    "fp8": ("fp8", "fp8_head", "fp8_tensor", "fp8_one", "fp8_e5m2", "fp8_e5m2_one"),
    "turboquant": ("turboquant4", "turboquant3", "turboquant2"),
    "kvquant": ("kvquant4", "kvquant3", "kvquant2"),
    "quest": ("quest1024", "quest512", "quest256", "quest128", "quest64"),
}
"""Labels of a method's settings that always look the same; the first one looks as the method does."""

SETTING_NAMES = (
    (r"\bhf_quantized(\d+)", r"HF quantized, \1 bit"),
    (r"\bkivi(\d+)", r"KIVI-\1"),
    (r"\bturboquant(\d+)", r"TurboQuant-\1"),
    (r"\bkvquant(\d+)", r"KVQuant-\1"),
    (r"\bquest(\d+)", r"Quest (\1 read)"),
    (r"\bfp8(_e5m2)?_(head|tensor)\b", r"fp8\1 (scale per \2)"),
    (r"\bfp8(_e5m2)?_one\b", r"fp8\1 (no scale)"),
    (r"\bfp8_e5m2\b", "FP8 E5M2"),
    (r"\b(cla|gqa)(\d+)", lambda match: f"{match[1].upper()}-{match[2]}"),
    (r"\blckv-w(\d+)", r"LCKV (\1 warm-up layers)"),
    (r"\bmla-r(\d+)", r"MLA (rank \1)"),
    (r"\byoco-gret\b", "YOCO, gated retention"),
    (r"\byoco-full\b", "YOCO, full attention"),
    (r"\b(pizza|sandwich|lasagna)-(bottom|middle|top)-(\d+)", r"KV sharing, \1-\2, \3 KV layers"),
    (r"\bgamma=", "\N{GREEK SMALL LETTER GAMMA}="),
)
"""Patterns of a label and what they are called in a figure, in order."""


def method_key(method: str, curve: str) -> str:
    """Return the key of ``METHODS`` that a run's look comes from; ``method`` itself where the registry has none.

    Args:
        method: Name in the record.
        curve: Label without the budget: ``minicache_kivi4``, ``snapkv + kivi4``, ``kivi2 (residual=32)``.
    """
    head, _, rest = curve.partition(" ")
    key = head if head in METHODS else method
    combined = re.match(r"\+ (\w+)$", rest)
    if combined and f"{key}_{combined[1]}" in METHODS:
        return f"{key}_{combined[1]}"
    return key


def display_name(curve: str) -> str:
    """Return a run's label as figures write it: ``SnapKV + KIVI-4``, ``KIVI-2 (residual=32)``."""
    for pattern, name in SETTING_NAMES:
        curve = re.sub(pattern, name, curve)
    return "".join(
        part.replace("_", " ") if part.startswith("(") else _with_names_of_methods(part)
        for part in re.split(r"(\([^()]*\))", curve)  # outside and inside parentheses
    )


def _with_names_of_methods(text: str) -> str:
    for key in sorted(METHODS, key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){key}(?![\w-])", METHODS[key].name, text)
    return text


def looks_of(curves: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """Return the look of each curve; no two curves look alike.

    Give all runs that are shown together, so that each setting of a method keeps its look from figure to figure.

    Args:
        curves: Method and label without the budget, of each run.
    """
    by_key: dict[str, set[str]] = {}
    for method, curve in curves:
        by_key.setdefault(method_key(method, curve), set()).add(curve)
    looks: dict[str, Look] = {}
    for key in sorted(by_key):
        base = METHODS.get(key) or _unknown_look(key, looks.values())
        known = KNOWN_SETTINGS.get(key, (key,))
        taken: set[int] = set()
        for curve in sorted(by_key[key], key=lambda c: (c not in known, c)):
            number = _setting_number(curve, known, taken)
            taken.add(number)
            looks[curve] = replace(_variant(base, number), name=display_name(curve))
    return looks


def _setting_number(curve: str, known: tuple[str, ...], taken: set[int]) -> int:
    """Return the place of a setting among those of its method: a fixed one if it is known, else the next free one."""
    head = without_settings(curve)
    if head in known and known.index(head) not in taken:
        return known.index(head)
    return next(number for number in count(len(known)) if number not in taken)


def _variant(base: Look, number: int) -> Look:
    """Return the look of a method's setting: another fill and line for each."""
    line = LINES.index(base.line)
    step = number + number // (len(FILLS) * len(LINES))
    return replace(base, fill=FILLS[number % len(FILLS)], line=LINES[(line + step) % len(LINES)])


def _unknown_look(key: str, others: Iterable[Look]) -> Look:
    """Return a grey look for a method that the registry does not have, with a marker that no other grey one has."""
    markers = list(PLOTLY_SYMBOLS)
    taken = {look.marker for look in others if look.color == GREY}
    first = zlib.crc32(key.encode()) % len(markers)
    order = markers[first:] + markers[:first]
    marker = next((m for m in order if m not in taken), order[0])
    return Look(key, GREY, marker, LINES[first % len(LINES)], "other")
