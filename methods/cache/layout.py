"""Attention layout of a loaded model, measured by a forward of one token.

A config does not fully determine what a model's code does. Before the first cache is made for a model, a probe forward
compares the layers' behaviour with the config, and a model that kvbench's caches cannot serve is rejected with a
one-line error. The rotation of keys by positions (RoPE) is measured in the same way.
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

PROBE_POSITIONS = (1, 38)
"""Two positions at which a token's keys are compared to measure RoPE."""


@dataclass(frozen=True)
class LayerShape:
    """Shapes of one layer's queries, keys and values."""

    query_heads: int
    kv_heads: int
    key_channels: int
    value_channels: int


@dataclass
class Layout:
    """Attention layout of a model.

    Attributes:
        plan: Cache layers and the layers of the model that use them.
        shape: KV shape for the byte formulas.
        latent_channels: Elements per token and layer of a latent cache, for models with multi-head latent attention
            (those of transformers hand over their keys and values expanded); 0: no latent attention.
        rotary: Measured rotations by layer of the model; None: the keys are not rotated by constant frequencies.
    """

    plan: Plan
    shape: KVShape
    latent_channels: int
    rotary: dict[int, Rotary | None] = field(default_factory=dict)


def describe_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Summarize for a run's record the layers that a method works on, and those with a window or a state."""
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
        held = "latents" if plan.holds_latents else "expanded keys and values"
        out["latents"] = {"held": held, "latent_numbers_a_token": layout.latent_channels}
    return out


class ProbeCache(KVCache):
    """Cache that records the attention calls of a one-token forward and stores nothing.

    Attributes:
        shapes: Shapes by layer of the model, in call order.
        keys: Keys of the token, [H_kv, D], by layer of the model.
        calls: Number of attention calls by layer of the model.
        local_sizes: Window or chunk size in each layer's mask; None: no local attention.
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
    """Return the layout of a model, measured on the first call.

    Raises:
        InputError: Kvbench's caches cannot serve the model; says why and which models to use instead.
    """
    if model not in _layouts:
        _layouts[model] = _measure_layout(model)
    return _layouts[model]


def _measure_layout(model: PreTrainedModel) -> Layout:
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise InputError("model", name, f"is an encoder-decoder, and kvbench supports only decoders; {ADVICE}")
    plan = plan_of(config)
    if not plan.attending:
        raise InputError("model", name, f"has no attention layers, so there is no KV cache to compress; {ADVICE}")
    probes = [run_probe(model, plan, position) for position in (None, 0)]
    probe, logits = probes[0]
    if list(probe.calls) != list(plan.attending) or set(probe.calls.values()) != {1}:
        missing = [i for i in plan.attending if not probe.calls[i]]
        problem = f"layers {missing} do not attend" if missing else "a layer attends more than once per token"
        raise InputError("model", name, f"{problem} through transformers' attention interface; {ADVICE}")
    if not torch.allclose(logits, probes[1][1], rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise InputError("model", name, f"does not count positions from 0; {ADVICE}")
    for layer in plan.attending:
        span, size = plan.spans[plan.cache_layer[layer]], probe.local_sizes[layer]
        if (None if span is None else span.size) != size:
            raise InputError(
                "model",
                name,
                f"layer {layer} attends over {f'{size} tokens' if size else 'all tokens'} by its code and over "
                f"{span or 'all tokens'} by its config; check the config",
            )
    latent = (getattr(config, "kv_lora_rank", None) or 0) and config.kv_lora_rank + config.qk_rope_head_dim
    return Layout(plan, _shape_of(model, plan, probe), int(latent or 0))


def run_probe(
    model: PreTrainedModel, plan: Plan, position: int | None, probe: ProbeCache | None = None
) -> tuple[ProbeCache, torch.Tensor]:
    """Run one token at a position (None: the model's default); returns the cache and the logits [vocabulary]."""
    probe, config = ProbeCache(plan) if probe is None else probe, model.config.get_text_config()
    if plan.recurrent:
        probe.states = RecurrentStates(config, plan.recurrent)
    special = [v for key, v in model.config.to_dict().items() if key.endswith(("_token_id", "_token_index"))]
    token = next((i for i in range(3, config.vocab_size) if i not in special), 0)
    ids = torch.full((1, 1), token, device=model.device)
    positions = {} if position is None else {"position_ids": torch.full_like(ids, position)}
    mask = torch.ones_like(ids, dtype=torch.bool)
    try:
        with kvbench_attention(model), torch.no_grad(), _restored_rope(model):
            out = model(input_ids=ids, attention_mask=mask, past_key_values=probe, use_cache=True, **positions)
    except InputError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise InputError(
            "model", type(model).__name__, f"does not run with kvbench's cache ({problem}); {ADVICE}"
        ) from error
    return probe, out.logits[0, -1].detach().float()


def _shape_of(model: PreTrainedModel, plan: Plan, probe: ProbeCache) -> KVShape:
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    shapes = {
        number: probe.shapes[plan.owners[number]] for number, kind in enumerate(plan.layer_types) if kind != LINEAR
    }
    full = [shapes[number] for number, kind in enumerate(plan.layer_types) if kind == FULL]
    if len(set(full)) > 1:
        raise InputError("model", type(model).__name__, "has layers of full attention with keys of different shapes")
    local: collections.Counter[LocalShape] = collections.Counter()
    for number, span in enumerate(plan.spans):
        if span is not None:
            shape = shapes[number]
            local[LocalShape(1, span, shape.kv_heads, shape.key_channels + shape.value_channels)] += 1
    recurrent = 0 if probe.states is None else probe.states.nbytes
    if probe.states is None and LINEAR in plan.layer_types:  # gated retention has one matrix per head
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
        values_in_keys=plan.holds_latents,
    )


# positions --------------------------------------------------------------------------------------------------------


def rotary_of(model: PreTrainedModel, layer_idx: int, method: str) -> Rotary:
    """Return the RoPE rotation of a layer's keys, measured from one token's keys at two positions.

    Raises:
        InputError: No rotation by a difference of positions maps one to the other.
    """
    layout = layout_of(model)
    if layer_idx not in layout.rotary:
        (first, _), (second, _) = (run_probe(model, layout.plan, position) for position in PROBE_POSITIONS)
        distance = PROBE_POSITIONS[1] - PROBE_POSITIONS[0]
        for i in layout.plan.attending:
            layout.rotary[i] = measured_rotary(model, first.keys[i], second.keys[i], distance)
    rotary = layout.rotary[layer_idx]
    if rotary is None:
        raise InputError(
            "method",
            method,
            f"re-positions tokens, and RoPE of constant frequencies does not explain the keys of layer {layer_idx} of "
            f"{type(model).__name__}; use another method or, for streaming_llm, method.policy.reposition=false, "
            "for finch method.scorer.reposition=false",
        )
    return rotary


def _rope_modules(model: PreTrainedModel) -> Iterator[Any]:
    return (m for m in model.modules() if hasattr(m, "max_seq_len_cached") and hasattr(m, "original_inv_freq"))


@contextmanager
def _restored_rope(model: PreTrainedModel) -> Iterator[None]:
    """Restore RoPE frequencies that a forward changes because they depend on the sequence length."""
    before = [(m, m.inv_freq, m.max_seq_len_cached) for m in _rope_modules(model) if hasattr(m, "inv_freq")]
    try:
        yield
    finally:
        for module, inv_freq, longest in before:
            module.inv_freq, module.max_seq_len_cached = inv_freq, longest


def reset_rope(model: PreTrainedModel) -> None:
    """Reset RoPE frequencies that depend on the longest earlier sequence (dynamic NTK)."""
    for module in _rope_modules(model):
        if getattr(module, "rope_type", None) == "dynamic" and module.max_seq_len_cached != module.original_max_seq_len:
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
            module.max_seq_len_cached = module.original_max_seq_len


def model_shape(model: PreTrainedModel) -> KVShape:
    """Return the model's KV shape for the byte formulas, as measured by the probe forward."""
    return layout_of(model).shape


def full_shape(model: PreTrainedModel, sharing: Sharing | None = None) -> KVShape:
    """Return the KV shape of the same model without sharing, in which every layer owns keys and values.

    If ``sharing`` reduces the number of KV heads, the model without sharing has as many as query heads. If it holds
    latents, the model without it holds the keys and values of all heads that are made from them.
    """
    shape, config = model_shape(model), model.config.get_text_config()
    if sharing is not None and shape.values_in_keys:
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        shape = replace(shape, head_dim=widths[0], value_channels=widths[1], values_in_keys=False)
    heads = shape.query_heads if sharing is not None and sharing.shares_heads else shape.kv_heads
    if getattr(config, "upward_style", None) is None:
        return replace(shape, kv_heads=heads)
    return replace(shape, layers=config.num_hidden_layers, kv_heads=heads, local=(), recurrent_bytes=0)
