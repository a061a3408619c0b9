"""Every causal language model of the installed transformers is itself under a kvbench cache, or refused in a line.

The list is transformers' own mapping; docs/reference/models.md is what ``python scripts/models_page.py --write`` found
with the version that it names. With that version one model type of each kind is run and the others are slow; with any
other one all are run, so a new release is covered the day it is installed.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from contract_settings import marked_slow
from transformers.utils import logging

from kvbench.models.architecture_settings import WINDOW_EXCEEDED_IN_DECODE, Variant
from kvbench.models.architectures import build, model_types, variants
from kvbench.runners.engine import conformance
from kvbench.runners.engine.conformance import (
    EXACT,
    PROMPT,
    QUICK_PATHS,
    TRACEBACK,
    UNTESTED,
    WRONG,
    Form,
    failures,
    run_form,
)

ROOT = Path(__file__).resolve().parents[2]
ADVICE = "implement what it needs, or refuse the model when its cache is made; see docs/reference/models.md"


@pytest.fixture(autouse=True)
def quiet():
    """Tiny configs have special tokens outside of their vocabulary and the like."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(level)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row that is padded, and as many steps as pass the windows that are passed while decoding."""
    monkeypatch.setattr(conformance, "ROW_LENGTHS", (PROMPT, 9))
    monkeypatch.setattr(conformance, "STEPS", WINDOW_EXCEEDED_IN_DECODE - PROMPT + 2)


@cache
def page() -> Any:
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "scripts" / "models_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KINDS = {
    "plain": "llama smollm3 bitnet",
    "biases, partial or no rotary, learned or sinusoidal positions": "qwen2 glm gpt_neox gpt2 opt ctrl phi3 cohere2",
    "mixtures of experts": "granitemoe dbrx",
    "windows, chunks, soft-caps, sinks": "mistral gemma2 gemma3_text llama4_text gpt_oss mimo_v2_flash",
    "shared keys and values, latent attention": "gemma4_text deepseek_v3 longcat_flash minicpm3",
    "recurrent layers": "falcon_h1 jamba kimi_linear lfm3 nemotron_h qwen3_next",
    "encoders as decoders, decoders of other models": "bert modernbert-decoder whisper",
    "untested": "blt gemma3n gemma4_assistant musicgen",
    "refused": "axk2 bart big_bird camembert deepseek_v4 diffllama doge falcon_mamba git hrm_text inkling_text minimax "
    "mllama moshi recurrent_gemma xlstm zamba zamba2",
}
"""A model type for each thing that architectures differ in, and for each reason of a refusal."""


def of_each_kind() -> list:
    """All model types; those that are not in ``KINDS`` are slow where the page is of the installed versions."""
    quick = {name for names in KINDS.values() for name in names.split()}
    versions, _ = page().read(page().PAGE)
    is_new = versions != page().versions()
    return marked_slow(model_types(), set() if is_new else {*model_types()} - quick)


def variants_or_none(name: str) -> list[Variant]:
    """The variants of an architecture; one without settings where even its config cannot be imported."""
    try:
        return variants(name)
    except Exception:
        return [Variant("", {})]


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", of_each_kind())
def test_architecture_is_exact_or_refused(name: str) -> None:
    """Its first form through the engine, in a batch, in chunks and through ``generate``, and its other windows.

    The rest, with more rows and steps: ``test_every_form_on_every_path``.

    Any difference is a mistake (float64), as is any exception but one-line refusals; a page of the same transformers
    says the same.
    """
    first, *others = variants_or_none(name)
    forms = [run_form(name, first, QUICK_PATHS)]
    windows = [v for v in others if v.name.startswith(("window", "chunk")) and "never" not in v.name]
    if forms[0].verdict == EXACT:
        forms += [run_form(name, v, ("engine",)) for v in windows]
    bad = [line for form in forms for line in failures(form)]
    assert not bad, f"{name}: {'; '.join(bad)}. {ADVICE}"
    versions, verdicts = page().read(page().PAGE)
    if versions == page().versions():
        # Where transformers itself cannot run a model, the page says so; here it may be refused before that shows.
        assert verdicts[name] in (forms[0].verdict, UNTESTED), (
            f"{name}: docs/reference/models.md is old: python scripts/models_page.py --write"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", model_types())
def test_every_form_on_every_path(name: str) -> None:
    bad = [line for variant in variants_or_none(name) for line in failures(run_form(name, variant))]
    assert not bad, f"{name}: {'; '.join(bad)}. {ADVICE}"


def test_kinds_are_model_types() -> None:
    assert {name for names in KINDS.values() for name in names.split()} <= {*model_types()}


def test_page_lists_the_whole_mapping() -> None:
    versions, verdicts = page().read(page().PAGE)
    if versions != page().versions():
        pytest.skip(f"docs/reference/models.md is of {versions}, and here is {page().versions()}")
    assert list(verdicts) == model_types()
    assert not {WRONG, TRACEBACK} & set(verdicts.values())


def test_float64_leaves_no_rounding() -> None:
    """The oracle's own two ways agree to 1e-12, although the model casts to float32 in its norms and softmax."""
    model, ids = build("llama"), conformance._ids(72, 0)
    with conformance.in_float64():
        cached, whole = (conformance.own_logits(model, ids, 64, cached=c) for c in (True, False))
    assert (cached - whole).abs().max() < 1e-12 * whole.abs().max()


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("mistral", "sliding_window", (24, 256)),
        ("mistral", "sliding_window", (WINDOW_EXCEEDED_IN_DECODE, 256)),
        ("gemma2", "attn_logit_softcapping", (2.0, None)),
        ("llama4_text", "attention_chunk_size", (32, 256)),
    ],
)
def test_what_is_special_changes_the_logits(name: str, field: str, values: tuple[Any, Any]) -> None:
    """Otherwise a path that ignores it would pass."""
    (plain, *_), ids = variants(name), conformance._ids(72, 0)
    with conformance.in_float64():
        one, other = (conformance.own_logits(build(name, plain.settings | {field: v}), ids, 64) for v in values)
    assert (one - other).abs().max() > 0.01 * one.abs().max()


def test_wrong_logits_and_exceptions_are_told_apart() -> None:
    right = torch.ones(1, 3, 5, dtype=torch.float64)
    wrong = right.clone()
    wrong[0, 1, 2] = torch.nan

    def fails() -> torch.Tensor:
        raise KeyError("x")

    assert conformance.compare(lambda: right, right).verdict == EXACT
    assert conformance.compare(lambda: wrong, right).verdict == WRONG
    assert "first at step 1" in conformance.compare(lambda: wrong, right).detail
    assert conformance.compare(fails, right).verdict == TRACEBACK
    assert Form("", {}, "no").verdict == UNTESTED


def test_unknown_release_is_listed_not_hidden() -> None:
    """A config that cannot be built small is ``untested`` with its reason, not a pass."""
    form = run_form("llama", Variant("", {"num_attention_heads": 7}))
    assert form.verdict == UNTESTED and "multiple of the number of attention heads" in form.failure
    assert transformers.__version__ in page().versions()
