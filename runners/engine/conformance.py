"""Conformance of a model with a kvbench cache: the logits of every path of the engine against transformers' own.

The oracle is the model's eager attention with the cache that its own ``generate`` creates, teacher-forced. Both sides
compute everything in float64 (:class:`InFloat64`): rounding is 1e-14 of the logits, so a difference is a bug.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from ...conf.errors import InputError
from ...methods.cache.method import Method
from ...methods.policies.eviction import EvictionPolicy
from ...methods.policies.no_cache import NoCache
from ...methods.policies.scorers.snapkv import SnapKV
from ...methods.storage.kivi import Kivi
from ...models.architecture_settings import Variant
from ...models.architectures import build, features, kinds_of_layers
from .. import engine

PROMPT, STEPS = 64, 8
CHUNK_COLUMNS = 16
ROW_LENGTHS = (PROMPT, 37, 9)
TOLERANCE = 1e-9
"""Largest allowed difference of two logits over the largest logit; float64 kernels differ by less than 1e-12."""

EXACT, REFUSED, WRONG, TRACEBACK, UNTESTED = "exact", "refused", "WRONG", "traceback", "untested"
PATHS = ("engine", "batch", "chunked", "generate", "feed", "no_cache", "snapkv", "kivi8")
"""``batch``: three rows of different lengths, compared with single rows; ``feed``: all further tokens in one forward;
``snapkv`` and ``kivi8``: a budget and a residual longer than the text, so that nothing is lost."""
QUICK_PATHS = PATHS[:4]


class CacheNotUsed(Exception):
    """A model ignored its cache: the logits may be right, but nothing is compressed."""


class InFloat64(TorchFunctionMode):
    """Replaces float32 by float64: models cast to float32 in norms, softmax, RoPE and routers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        if func is not torch.Tensor.view:  # of bits
            for value in args:
                if value is torch.float32:
                    args = tuple(torch.float64 if value is torch.float32 else value for value in args)
                    break
            for name, value in kwargs.items():
                if value is torch.float32:
                    kwargs = kwargs | {name: torch.float64}
        return func(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute everything in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class Outcome:
    """Result of one path.

    Attributes:
        verdict: ``exact``, ``refused``, ``WRONG`` or ``traceback``.
        detail: The reason, in one line; empty if exact.
        difference: Largest difference of two logits over the largest logit.
    """

    verdict: str
    detail: str = ""
    difference: float = 0.0


def check(model: PreTrainedModel, paths: Sequence[str] = PATHS) -> dict[str, Outcome]:
    """Run a float64 model on each of ``paths``.

    If ``method=full`` is refused when its cache is created, so is every path that needs a cache, and none is run.

    Raises:
        Exception: Whatever transformers itself raises on this model.
    """
    full = Method("full")
    with in_float64():
        oracle = copy.deepcopy(model)
        refused = compare(lambda: full.new_cache(model), None)
        if refused.verdict != EXACT:
            return {path: refused for path in paths if path != "no_cache"} | _no_cache(oracle, paths)
        rows = [_ids(length + STEPS, seed) for seed, length in enumerate(ROW_LENGTHS)]
        own = [own_logits(oracle, row, length) for row, length in zip(rows, ROW_LENGTHS, strict=True)]
        ids, tail = rows[0][:, :PROMPT], rows[0][:, PROMPT:]

        def batch() -> torch.Tensor:
            padded, mask = engine.left_padded(
                [r[0, :n].tolist() for r, n in zip(rows, ROW_LENGTHS, strict=True)], 0, ids.device
            )
            tails = torch.cat([row[:, n:] for row, n in zip(rows, ROW_LENGTHS, strict=True)])
            return engine_logits(model, full, padded, tails, mask)

        def generated() -> torch.Tensor:
            cache = full.new_cache(model)
            logits = generate_logits(model, ids, past_key_values=cache)
            if cache.get_seq_length() != PROMPT + STEPS:
                raise CacheNotUsed(f"the cache saw {cache.get_seq_length()} of {PROMPT + STEPS} tokens")
            return logits

        snapkv = Method("snapkv", EvictionPolicy(SnapKV(window=8), 2 * PROMPT))
        kivi = Method("kivi8", storage=Kivi(bits=8, group=8, residual=2 * PROMPT))
        runs: dict[str, Callable[[], Outcome]] = {
            "engine": lambda: compare(lambda: engine_logits(model, full, ids, tail), own[0]),
            "batch": lambda: compare(batch, torch.cat(own)),
            "chunked": lambda: compare(lambda: engine_logits(model, full, ids, tail, chunk=CHUNK_COLUMNS), own[0]),
            "generate": lambda: compare(generated, generate_logits(fresh(oracle), ids)),
            "feed": lambda: compare(lambda: engine_logits(model, full, ids, tail, at_once=True), own[0]),
            "snapkv": lambda: compare(lambda: engine_logits(model, snapkv, ids, tail), own[0]),
            "kivi8": lambda: compare(lambda: engine_logits(model, kivi, ids, tail), own[0]),
        }
        return {path: runs[path]() for path in paths if path != "no_cache"} | _no_cache(oracle, paths)


def _no_cache(model: PreTrainedModel, paths: Sequence[str]) -> dict[str, Outcome]:
    """``method=no_cache`` against the model's own forward without a cache."""
    if "no_cache" not in paths:
        return {}
    ids = _ids(PROMPT + STEPS, 0)
    own = own_logits(model, ids, PROMPT, cached=False)
    run = copy.deepcopy(model)
    return {"no_cache": compare(lambda: engine_logits(run, NoCache("no_cache"), ids[:, :PROMPT], ids[:, PROMPT:]), own)}


def compare(run: Callable[[], Any], expected: torch.Tensor | None) -> Outcome:
    """Run one path and compare its logits [B, steps, vocabulary]; with ``expected=None`` only check that it runs."""
    try:
        logits = run()
    except InputError as error:
        return Outcome(REFUSED, str(error))
    except CacheNotUsed as error:
        return Outcome(WRONG, str(error), float("inf"))
    except Exception as error:
        return Outcome(TRACEBACK, line_of(error))
    if expected is None:
        return Outcome(EXACT)
    if logits.shape != expected.shape:
        return Outcome(WRONG, f"logits of shape {tuple(logits.shape)}, not {tuple(expected.shape)}", float("inf"))
    steps = (logits - expected).abs().amax(dim=(0, 2)) / expected.abs().max()
    is_right = steps <= TOLERANCE  # False for NaN
    worst = float(steps.max())
    if bool(is_right.all()):
        return Outcome(EXACT, difference=worst)
    first = int((~is_right).nonzero()[0])
    return Outcome(WRONG, f"logits differ by {worst:.1e} of the largest, first at step {first}", worst)


def line_of(error: Exception) -> str:
    """An exception in one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    at = next((f for f in reversed(frames) if f.filename != __file__), frames[-1])
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]} ({at.filename.rsplit('/', 1)[-1]}:{at.lineno})"


def _ids(length: int, seed: int) -> torch.Tensor:
    """[1, length] token ids of a tiny model, none of them special."""
    return torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def fresh(model: PreTrainedModel) -> PreTrainedModel:
    """A model without state: a copy if its RoPE adapts to the longest text so far."""
    rope = str(getattr(model.config.get_text_config(decoder=True), "rope_parameters", None))
    return copy.deepcopy(model) if "dynamic" in rope or "longrope" in rope else model


@torch.no_grad()
def own_logits(model: PreTrainedModel, ids: torch.Tensor, prompt: int, cached: bool = True) -> torch.Tensor:
    """Return the model's own logits [1, 1 + steps, vocabulary] after the prompt and after each further token.

    Args:
        model: The model with its own attention.
        ids: [1, prompt + steps].
        prompt: Number of prompt tokens, which run in one forward.
        cached: Run the further tokens one by one with the model's own cache; otherwise recompute the whole sequence at
            each step, as for every model without a cache.
    """
    model = fresh(model)
    forward: Any = model.forward
    if "past_key_values" not in inspect.signature(forward).parameters:
        cached = False
    if not cached:
        ends = range(prompt, ids.shape[1] + 1)
        return torch.stack([model(input_ids=ids[:, :end], use_cache=False).logits[:, -1] for end in ends], dim=1)
    config = model.config.get_text_config(decoder=True)
    takes_positions = "position_ids" in inspect.signature(forward).parameters
    makes_its_own = not model._supports_default_dynamic_cache()  # type: ignore[operator]
    cache: Any = None if makes_its_own else DynamicCache(config=config)
    logits: list[torch.Tensor] = []
    for chunk in ids.split([prompt, *[1] * (ids.shape[1] - prompt)], dim=1):
        # Like generate, pass positions: without them Bamba counts the positions of every step from 0.
        at = {"position_ids": torch.tensor([[prompt + len(logits) - 1]])} if logits and takes_positions else {}
        out = model(input_ids=chunk, past_key_values=cache, use_cache=True, **at)
        cache = out.past_key_values
        logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


def engine_logits(
    model: PreTrainedModel,
    method: Method,
    ids: torch.Tensor,
    tail: torch.Tensor,
    mask: torch.Tensor | None = None,
    chunk: int | None = None,
    at_once: bool = False,
) -> torch.Tensor:
    """Logits [B, 1 + steps, vocabulary] through the engine: the last of ids [B, T], and of each of tail [B, steps]."""
    cache = method.new_cache(model)
    logits = [engine.prefill(model, cache, ids, mask, chunk_size=chunk)[:, None]]
    if at_once:
        logits += engine.feed(model, cache, tail)
    else:
        logits += [engine.decode(model, cache, token)[:, None] for token in tail.unbind(1)]
    return torch.cat(logits, dim=1)


def generate_logits(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the logits [1, 1 + steps, vocabulary] of greedy ``model.generate``, for the tokens that it generates."""
    options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generate: Any = model.generate
    out = generate(ids, max_new_tokens=STEPS + 1, **options)
    return torch.stack(out.logits, dim=1)


@dataclass(frozen=True)
class Form:
    """Results of one variant of an architecture.

    Attributes:
        variant: Name of the variant.
        outcomes: Result of each path; empty if transformers itself cannot run the model.
        failure: The reason, if it cannot.
        features: See :func:`.models.architectures.features`.
        layers: See :func:`.models.architectures.kinds_of_layers`.
    """

    variant: str
    outcomes: Mapping[str, Outcome]
    failure: str = ""
    features: Sequence[str] = ()
    layers: Mapping[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Wrong, or a traceback, if any path is; refused if every path is that needs a cache; else exact."""
        verdicts = {outcome.verdict for outcome in self.outcomes.values()}
        cached = {outcome.verdict for path, outcome in self.outcomes.items() if path != "no_cache"}
        if not verdicts:
            return UNTESTED
        if cached == {REFUSED} and not verdicts & {WRONG, TRACEBACK}:
            return REFUSED
        return next(v for v in (WRONG, TRACEBACK, EXACT, REFUSED) if v in verdicts)


def run_form(name: str, variant: Variant, paths: Sequence[str] = PATHS) -> Form:
    """Build a variant of an architecture and check it."""
    try:
        model = build(name, variant.settings)
        outcomes = check(model, paths)
    except Exception as error:
        return Form(variant.name, {}, line_of(error))
    return Form(variant.name, outcomes, features=features(model), layers=kinds_of_layers(model))


def verdict_of(forms: Sequence[Form]) -> str:
    """Verdict of an architecture: that of its first form, unless another form is wrong or a traceback."""
    verdicts = [form.verdict for form in forms]
    return next((v for v in (WRONG, TRACEBACK) if v in verdicts), verdicts[0])


def failures(form: Form) -> list[str]:
    """A line for each path of a form that is wrong or a traceback."""
    bad = [(path, outcome) for path, outcome in form.outcomes.items() if outcome.verdict in (WRONG, TRACEBACK)]
    return [f"{form.variant or 'first form'}, {path}: {outcome.verdict}, {outcome.detail}" for path, outcome in bad]
