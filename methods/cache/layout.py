"""What a model does with a cache, found out by trying it once: one token through every layer.

A config says a good deal of a model and its code decides, so before the first cache is made for a model it is given one
token, and what its layers do is compared with what its config promised. A model that a KV cache of this project cannot
serve is refused here, in one line, before any prompt is read. The rotation of keys by positions (RoPE) is measured in
the same way.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ...conf.errors import InputError
from ..sharing.base import Sharing
from ..sharing.kv_map import FULL, LINEAR
from ..sharing.plan import Plan, plan_of
from .attention import ADVICE, kvbench_attention
from .cache import KVCache
from .forward import LayerCall
from .kv_shape import KVShape, LocalShape
from .products import masked_attention
from .recurrent import RecurrentStates
from .rotary import Rotary, measured_rotary

POSITIONS = (1, 38)
"""Two positions at which one token's keys are compared."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer of the model hands over for a token."""

    query_heads: int
    kv_heads: int
    key_channels: int
    value_channels: int


@dataclass
class Layout:
    """What is known of a model.

    Attributes:
        plan: see there.
        shape: for the byte formulas.
        latent_channels: numbers a token and layer of a cache of latents, where the model has multi-head latent
            attention; keys and values are held expanded, as its layers hand them over. 0: it has none.
        rotary: measured so far, by layer of the model.
    """

    plan: Plan
    shape: KVShape
    latent_channels: int
    rotary: dict[int, Rotary | None] = field(default_factory=dict)


def describe_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Which layers a method works on and which hold what the model needs whatever the method; for a record."""
    layout = layout_of(model)
    plan, shape = layout.plan, layout.shape
    out: dict[str, Any] = {"full_attention": shape.layers}
    if shape.local:
        out["local"] = [{"kind": x.span.kind, "tokens": x.span.size, "layers": x.layers} for x in shape.local]
    recurrent = {*plan.recurrent, *(i for i, kind in zip(plan.owners, plan.layer_types, strict=True) if kind == LINEAR)}
    if recurrent:
        out["recurrent"] = len(recurrent)
    if plan.shares:
        out["reading_others"] = sum(not use.is_owner for use in plan.uses)
    if layout.latent_channels:
        out["latents"] = {"held": "expanded keys and values", "latent_numbers_a_token": layout.latent_channels}
    return out


class Trial(KVCache):
    """A cache that looks at one token's keys and keeps nothing.

    Attributes:
        shapes: by layer of the model, in the order of their calls.
        keys: [H_kv, D] of the token, by layer of the model.
        calls: how often each layer came here.
        local_sizes: what each layer's mask said of a window or chunk; None: nothing.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__([], plan)
        self.shapes: dict[int, LayerShape] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.calls: collections.Counter[int] = collections.Counter()
        self.local_sizes: dict[int, int | None] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def recurrent_state(self, layer_idx: int, rows: int) -> torch.Tensor | None:
        return None

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self.states is not None:
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return recurrent_states

    def attend(self, layer_idx: int, call: LayerCall, padding_mask: torch.Tensor | None) -> torch.Tensor:
        self.calls[layer_idx] += 1
        self.shapes[layer_idx] = LayerShape(
            call.query.shape[1], call.key.shape[1], call.key.shape[3], call.value.shape[3]
        )
        self.keys[layer_idx] = call.key[0, :, -1].detach().float().cpu()
        self.local_sizes[layer_idx] = getattr(padding_mask, "kvbench_local_size", None)
        return masked_attention(call.query, call.key, call.value, call.rule, None)


_layouts: weakref.WeakKeyDictionary[PreTrainedModel, Layout] = weakref.WeakKeyDictionary()


def layout_of(model: PreTrainedModel) -> Layout:
    """What is known of a model; it is tried when it is first asked for.

    Raises:
        InputError: no cache of this project can serve the model: which rule it breaks, and what to use instead.
    """
    if model not in _layouts:
        _layouts[model] = _try(model)
    return _layouts[model]


def _try(model: PreTrainedModel) -> Layout:
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise InputError("model", name, f"is an encoder-decoder, and kvbench is for decoders alone; {ADVICE}")
    plan = plan_of(config)
    if not plan.attending:
        raise InputError("model", name, f"has no attention layers, so there is no KV cache to compress; {ADVICE}")
    trials = [_run(model, plan, position) for position in (None, 0)]
    trial, logits = trials[0]
    if list(trial.calls) != list(plan.attending) or set(trial.calls.values()) != {1}:
        without = [i for i in plan.attending if not trial.calls[i]]
        problem = f"layers {without} do not attend" if without else "a layer attends more than once a token"
        raise InputError("model", name, f"{problem} through transformers' attention interface; {ADVICE}")
    if not torch.allclose(logits, trials[1][1], rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise InputError("model", name, f"counts positions in a way of its own (its first is not 0); {ADVICE}")
    for layer in plan.attending:
        span, said = plan.spans[plan.cache_layer[layer]], trial.local_sizes[layer]
        if (None if span is None else span.size) != said:
            seen = "all tokens" if said is None else f"{said} tokens"
            raise InputError(
                "model",
                name,
                f"layer {layer} attends over {seen} by its code and over {span or 'all tokens'} by its config, and "
                "neither can be believed",
            )
    latent = (getattr(config, "kv_lora_rank", None) or 0) and config.kv_lora_rank + config.qk_rope_head_dim
    return Layout(plan, _shape_of(model, plan, trial), int(latent or 0))


def _run(model: PreTrainedModel, plan: Plan, position: int | None) -> tuple[Trial, torch.Tensor]:
    """One token through the model at a position (None: as it counts itself); the cache, and logits [vocabulary]."""
    trial, config = Trial(plan), model.config.get_text_config()
    if plan.recurrent:
        trial.states = RecurrentStates(config, plan.recurrent)
    named = [v for key, v in model.config.to_dict().items() if key.endswith(("_token_id", "_token_index"))]
    token = next((i for i in range(3, config.vocab_size) if i not in named), 0)  # an ordinary one
    ids = torch.full((1, 1), token, device=model.device)
    given = {} if position is None else {"position_ids": torch.full_like(ids, position)}
    mask = torch.ones_like(ids, dtype=torch.bool)
    try:
        with kvbench_attention(model), torch.no_grad(), _untouched_rope(model):
            out = model(input_ids=ids, attention_mask=mask, past_key_values=trial, use_cache=True, **given)
    except InputError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise InputError(
            "model", type(model).__name__, f"does not run with kvbench's cache ({problem}); {ADVICE}"
        ) from error
    return trial, out.logits[0, -1].detach().float()


def _shape_of(model: PreTrainedModel, plan: Plan, trial: Trial) -> KVShape:
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    shapes = {
        number: trial.shapes[plan.owners[number]] for number, kind in enumerate(plan.layer_types) if kind != LINEAR
    }
    full = [shapes[number] for number, kind in enumerate(plan.layer_types) if kind == FULL]
    if len(set(full)) > 1:
        raise InputError("model", type(model).__name__, "has layers of full attention with keys of different shapes")
    local: collections.Counter[LocalShape] = collections.Counter()
    for number, span in enumerate(plan.spans):
        if span is not None:
            one = shapes[number]
            local[LocalShape(1, span, one.kv_heads, one.key_channels + one.value_channels)] += 1
    recurrent = 0 if trial.states is None else trial.states.nbytes
    if trial.states is None and LINEAR in plan.layer_types:  # gated retention: one matrix a head
        matrices = plan.layer_types.count(LINEAR) * config.retention_heads
        recurrent = matrices * config.head_dim**2 * max(4, size)
    first = full[0] if full else next(iter(shapes.values()))
    return KVShape(
        layers=len(full),
        kv_heads=first.kv_heads,
        head_dim=first.key_channels,
        element_bytes=size,
        query_heads=first.query_heads,
        local=tuple(LocalShape(count, x.span, x.kv_heads, x.channels) for x, count in local.items()),
        recurrent_bytes=recurrent,
        value_channels=first.value_channels,
    )


# positions --------------------------------------------------------------------------------------------------------


def rotary_of(model: PreTrainedModel, layer_idx: int, method: str) -> Rotary:
    """The rotation of a layer's keys by positions, measured: the same token's keys at two positions.

    Raises:
        InputError: no rotation by a difference of positions turns the one into the other.
    """
    layout = layout_of(model)
    if layer_idx not in layout.rotary:
        (first, _), (second, _) = (_run(model, layout.plan, position) for position in POSITIONS)
        for i in layout.plan.attending:
            layout.rotary[i] = measured_rotary(model, first.keys[i], second.keys[i], POSITIONS[1] - POSITIONS[0])
    found = layout.rotary[layer_idx]
    if found is None:
        raise InputError(
            "method",
            method,
            f"re-positions tokens, and RoPE of constant frequencies does not explain the keys of layer {layer_idx} of "
            f"{type(model).__name__}; use another method or, for streaming_llm, method.policy.reposition=false",
        )
    return found


def _rope_modules(model: PreTrainedModel) -> Iterator[Any]:
    return (m for m in model.modules() if hasattr(m, "max_seq_len_cached") and hasattr(m, "original_inv_freq"))


@contextmanager
def _untouched_rope(model: PreTrainedModel) -> Iterator[None]:
    """Undo what a forward does to RoPE whose frequencies follow the length of the text."""
    before = [(m, m.inv_freq, m.max_seq_len_cached) for m in _rope_modules(model) if hasattr(m, "inv_freq")]
    try:
        yield
    finally:
        for module, inv_freq, longest in before:
            module.inv_freq, module.max_seq_len_cached = inv_freq, longest


def reset_rope(model: PreTrainedModel) -> None:
    """Set RoPE back whose frequencies have followed the length of an earlier text (dynamic NTK)."""
    for module in _rope_modules(model):
        if getattr(module, "rope_type", None) == "dynamic" and module.max_seq_len_cached != module.original_max_seq_len:
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
            module.max_seq_len_cached = module.original_max_seq_len


def model_shape(model: PreTrainedModel) -> KVShape:
    """What the byte formulas need, as the model's layers were seen to hand over keys, values and states."""
    return layout_of(model).shape


def full_shape(model: PreTrainedModel, sharing: Sharing | None = None) -> KVShape:
    """The same for the plain model of this size: every layer with keys and values of its own.

    Where ``sharing`` is a number of KV heads, the plain model has as many as query heads.
    """
    shape, config = model_shape(model), model.config.get_text_config()
    heads = shape.query_heads if sharing is not None and sharing.shares_heads else shape.kv_heads
    if getattr(config, "upward_style", None) is None:
        return replace(shape, kv_heads=heads)
    return replace(shape, layers=config.num_hidden_layers, kv_heads=heads, local=(), recurrent_bytes=0)
