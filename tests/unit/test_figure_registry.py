"""Looks of the methods: every method has one, no two are alike, colours can be told apart with colour blindness."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from kvbench.analysis.figures.registry import (
    BLACK,
    FAMILIES,
    FILLS,
    GREY,
    LINES,
    METHODS,
    PLOTLY_SYMBOLS,
    Look,
    display_name,
    looks_of,
    method_key,
)
from kvbench.analysis.figures.spec import named, panels_by_family

ROOT = Path(__file__).resolve().parents[2]
MIN_LAB_DISTANCE = 25.0
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SIGHTS = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}


def lab(color: str, sight: str) -> np.ndarray:
    """CIE Lab (D65) of a hexadecimal colour as somebody with this sight sees it."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    xyz = to_xyz @ np.clip(SIGHTS[sight] @ linear, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a: str, b: str) -> float:
    """Smallest Lab distance of two colours over all kinds of sight."""
    return min(float(np.linalg.norm(lab(a, sight) - lab(b, sight))) for sight in SIGHTS)


def test_lab_of_known_colours() -> None:
    assert lab("#ffffff", "normal") == pytest.approx([100, 0, 0], abs=0.01)
    assert lab("#ff0000", "normal") == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert distance("#1a9850", "#d73027") < MIN_LAB_DISTANCE  # green and red that deuteranopia confuses


def test_every_method_of_conf_has_a_look_and_every_look_a_method() -> None:
    assert set(METHODS) == {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    for look in METHODS.values():
        assert look.family in FAMILIES and look.line in LINES and look.fill in FILLS and look.marker in PLOTLY_SYMBOLS


def test_any_two_colours_can_be_told_apart() -> None:
    colors = sorted({look.color for look in METHODS.values()} - {BLACK})
    distances = {pair: distance(*pair) for pair in itertools.combinations(colors, 2)}
    assert min(distances.values()) >= MIN_LAB_DISTANCE, min(distances, key=distances.__getitem__)
    assert min(distance(color, reserved) for color in colors for reserved in (BLACK, GREY)) >= 15


def test_methods_of_one_family_differ_in_colour_and_others_in_colour_or_in_marker_and_line() -> None:
    for (one, a), (two, b) in itertools.combinations(METHODS.items(), 2):
        if a.color == b.color:
            assert a.family != b.family or a.family == "baseline", (one, two)
            assert a.marker != b.marker and a.line != b.line, (one, two)


def test_methods_have_names_of_their_own_and_are_visible_on_white() -> None:
    names = [look.name for look in METHODS.values()]
    assert len(set(names)) == len(names)
    assert all(distance(look.color, "#ffffff") > MIN_LAB_DISTANCE for look in METHODS.values())


def test_settings_stand_in_the_order_of_their_numbers() -> None:
    curves = ["quest64", "quest1024", "quest512", "quest64 (page=8)", "quest64 (page=0.5)", "quest64 (page=0.25)"]
    looks = looks_of(("quest", curve) for curve in curves)
    assert panels_by_family(curves, looks) == [
        ("", ["quest64", *(f"quest64 (page={n})" for n in (0.25, 0.5, 8)), "quest512", "quest1024"])
    ]


def drawn(look: Look) -> tuple[str, ...]:
    return look.color, look.marker, look.line, look.fill


def test_no_two_curves_look_alike_whatever_their_settings() -> None:
    curves = [(name, name) for name in METHODS]
    curves += [("kivi", label) for label in ("kivi2", "kivi4", "kivi8", "kivi2 (residual=32)", "kivi2 (residual=128)")]
    curves += [("cla", label) for label in ("cla2", "cla3", "cla4")] + [("snapkv", "snapkv + kivi4")]
    curves += [("minicache", f"minicache (gamma=0.05, start={start})") for start in range(25)]
    curves += [("mine", "mine"), ("yours", "yours")]
    looks = looks_of(curves)
    assert set(looks) == {curve for _, curve in curves}
    for (one, a), (two, b) in itertools.combinations(looks.items(), 2):
        if not {one, two} <= {"kivi", "kivi4", "cla", "cla2", "snapkv_kivi4", "snapkv + kivi4"}:  # two names of one
            assert drawn(a) != drawn(b), (one, two)


def test_settings_share_colour_and_marker_and_differ_in_fill_and_line() -> None:
    looks = looks_of([("kivi", "kivi2"), ("kivi", "kivi4")])
    assert looks["kivi4"].color == looks["kivi2"].color == METHODS["kivi"].color
    assert looks["kivi4"].marker == looks["kivi2"].marker
    assert looks["kivi4"].fill != looks["kivi2"].fill and looks["kivi4"].line != looks["kivi2"].line


def test_a_known_setting_looks_the_same_alone_and_beside_others() -> None:
    alone = looks_of([("kivi", "kivi2")])["kivi2"]
    assert alone == looks_of([("kivi", label) for label in ("kivi2", "kivi2 (residual=32)", "kivi4", "kivi8")])["kivi2"]
    both = looks_of([("snapkv", "snapkv (window=16)"), ("snapkv", "snapkv")])
    assert drawn(both["snapkv"]) == drawn(METHODS["snapkv"])


def test_settings_in_a_label_look_as_the_method_does_and_apart() -> None:
    adaptive, uniform = "expected_attention (epsilon 0.01, adaptive)", "expected_attention (epsilon 0.01, uniform)"
    looks = looks_of([("expected_attention", curve) for curve in (uniform, adaptive)])
    assert drawn(looks[adaptive]) == drawn(METHODS["expected_attention"]) != drawn(looks[uniform])
    assert named(looks[adaptive], 1024) == "Expected Attention 1024 (epsilon 0.01, adaptive)"


def test_unknown_methods_are_grey_and_differ_in_marker() -> None:
    looks = looks_of([(f"method_{i}", f"method_{i}") for i in range(len(PLOTLY_SYMBOLS))])
    assert {look.color for look in looks.values()} == {GREY}
    assert len({look.marker for look in looks.values()}) == len(PLOTLY_SYMBOLS)
    assert {look.family for look in looks.values()} == {"other"}
    assert looks["method_0"].name == "method_0"


@pytest.mark.parametrize(
    ("method", "curve", "key", "name"),
    [
        ("streaming_llm", "streaming_llm", "streaming_llm", "StreamingLLM"),
        ("snapkv", "snapkv + kivi4", "snapkv_kivi4", "SnapKV + KIVI-4"),
        ("snapkv", "snapkv + adaptive", "snapkv", "SnapKV + adaptive"),
        ("key_diff", "key_diff + every 32", "key_diff", "KeyDiff + every 32"),
        ("chunkkv", "chunkkv over key_diff", "chunkkv", "ChunkKV over KeyDiff"),
        (
            "expected_attention",
            "expected_attention (epsilon 0.01, adaptive) + kivi4",
            "expected_attention",
            "Expected Attention (epsilon 0.01, adaptive) + KIVI-4",
        ),
        ("snapkv", "snapkv (window=8) + fp8", "snapkv", "SnapKV (window=8) + FP8"),
        ("kivi", "kivi2 (residual=32)", "kivi", "KIVI-2 (residual=32)"),
        ("turboquant", "turboquant3 (gain=norm)", "turboquant", "TurboQuant-3 (gain=norm)"),
        ("snapkv", "snapkv + kvquant2", "snapkv", "SnapKV + KVQuant-2"),
        ("quest", "quest512", "quest", "Quest (512 read)"),
        ("fp8", "fp8_e5m2_one", "fp8", "FP8 E5M2 (no scale)"),
        ("snapkv", "snapkv + fp8_head", "snapkv", "SnapKV + FP8 (scale per head)"),
        ("minicache", "minicache_kivi4 (start=20)", "minicache_kivi4", "MiniCache + KIVI-4 (start=20)"),
        (
            "minicache",
            "minicache (gamma=0.05, retention=top_ratio)",
            "minicache",
            "MiniCache (γ=0.05, retention=top ratio)",
        ),
        ("cla", "cla3", "cla", "CLA-3"),
        ("cla", "cla2 + kivi4", "cla", "CLA-2 + KIVI-4"),
        ("kvshare", "sandwich-middle-2", "kvshare", "KV sharing, sandwich-middle, 2 KV layers"),
        ("mine", "mine $x$ <b>", "mine", "mine $x$ <b>"),
    ],
)
def test_names_in_figures(method: str, curve: str, key: str, name: str) -> None:
    assert method_key(method, curve) == key
    assert display_name(curve) == name
