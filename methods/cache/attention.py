"""Attention function that passes each layer's new queries, keys and values to the cache.

It is registered with transformers as ``"kvbench"`` when this module is imported. A model that is switched to it
(:func:`use_kvbench_attention`) calls :func:`attention_function` once per layer. The cache, which ``update()`` attached
to the key tensor, appends the new tokens, attends and compresses. No model code is modified or patched.

Legend: B batch rows, H_q query heads, H_kv KV heads, n new tokens, D key channels, D_v value channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ...conf.errors import InputError
from ..sharing.kv_map import SLIDING
from ..sharing.plan import span_of
from .forward import LayerCall
from .logits import LogitRule
from .products import uncached_attention

ATTENTION_NAME = "kvbench"

ADVICE = "use a decoder on transformers' attention interface, such as Llama, Qwen 3, Gemma 3 or gpt-oss"


IGNORED = frozenset(
    (
        *("cache_position", "position_ids", "position_embeddings", "past_key_values", "use_cache", "layer_idx"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch"),
    )
)
"""Keyword arguments of an attention function that do not affect its result."""


class ServesAttention(Protocol):
    """Interface of a cache for the attention function."""

    first_layer: int

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen so far."""

    def attend(self, layer_idx: int, call: LayerCall, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Attend for one layer of the model."""


_pending_update: tuple[ServesAttention, int] | None = None
"""Cache and layer of the last ``update`` call whose attention call has not arrived yet."""


def tag(key: torch.Tensor, cache: ServesAttention) -> torch.Tensor:
    """Attach the cache to the key tensor, where the attention function finds it.

    A keyword argument would not do: ``model.generate`` rejects keywords that it does not know.
    """
    key.kvbench_cache = cache  # type: ignore[attr-defined]
    return key


def register_update(cache: ServesAttention, layer_idx: int) -> None:
    """Record that a layer has called ``update``, for models that rebuild the keys afterwards and lose the tag.

    Raises:
        InputError: The previous layer did not call the attention function; its own attention code would see only the
            new tokens.
    """
    global _pending_update
    if _pending_update is not None and _pending_update[0] is cache:
        layer, _pending_update = _pending_update[1], None
        raise InputError(
            "model",
            f"layer {layer}",
            f"has its own attention code, so no kvbench cache can serve it; {ADVICE}",
        )
    _pending_update = (cache, layer_idx)


def _cache_of(module: Any, key: torch.Tensor) -> ServesAttention | None:
    """Return the cache that a layer's new keys were passed to; None: the forward has no cache."""
    global _pending_update
    pending, _pending_update = _pending_update, None
    cache: ServesAttention | None = getattr(key, "kvbench_cache", None)
    if cache is None and pending is not None and pending[1] == module.layer_idx:
        return pending[0]
    return cache


def attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    strictly_causal: bool = False,
    new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    A keyword argument that is neither a parameter, nor in :data:`IGNORED`, nor off raises an error: ignoring it would
    silently change the model's output.

    Args:
        module: Attention module; ``module.layer_idx`` is the index of the layer.
        query: [B, H_q, n, D], after RoPE.
        key: [B, H_kv, n, D], of the new tokens only, after RoPE.
        value: [B, H_kv, n, D_v].
        attention_mask: Output of :func:`padding_mask`, [B, 1, 1, tokens seen + n], True for a real token, or the same
            without the two middle dimensions; None: no padding.
        scaling: Factor on the logits; None: 1 / sqrt(D).
        sliding_window: The model's own window for this layer, which must equal the plan's.
        softcap, s_aux: See :class:`.logits.LogitRule`.
        dropout: Dropout on the weights; must be 0.
        is_causal: Must not be False.
        strictly_causal: No token attends to itself (only kvbench's own models in ``models/kvshare``).
        new_kv: Keys and values to store, if they differ from ``key`` and ``value`` (only ``models/kvshare``).

    Returns:
        ([B, n, H_q, D_v], None).

    Raises:
        InputError: The model requires a kind of attention that is not implemented.
    """
    cache = _cache_of(module, key)
    _check_keywords(module, others, dropout, is_causal)
    if cache is not None and _restarts_text(module, cache, query.shape[2], others.get("position_ids")):
        _refuse(module, "position_ids", 0, "begins a new text in a used cache; is use_cache=False?")
    if attention_mask is not None:
        attention_mask = _padding_of(module, attention_mask)
    declared = getattr(module, "sinks", None)
    if isinstance(declared, torch.Tensor) and s_aux is None and "s_aux" not in others:
        _refuse(module, "sinks", "None", "has attention sinks that its attention function is not given")
    rule = LogitRule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap or None, s_aux)
    span = span_of(module.config, module.layer_idx)
    if sliding_window is not None and (span is None or span.kind != SLIDING or span.size != sliding_window):
        _refuse(module, "sliding_window", sliding_window, f"differs from the model's config for the layer: {span}")
    if cache is None:  # a forward without a cache: scoring, or method=no_cache
        out = uncached_attention(query, key, value, rule, attention_mask, strictly_causal, span)
    else:
        out = cache.attend(module.layer_idx, LayerCall(query, key, value, rule, new_kv), attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _check_keywords(module: Any, others: dict[str, Any], dropout: float, is_causal: bool | None) -> None:
    """Raise InputError for keyword arguments that are not implemented."""
    unknown = [
        name for name, value in others.items() if name not in IGNORED and value is not None and value is not False
    ]
    if unknown:
        _refuse(module, unknown[0], others[unknown[0]], "is not implemented here, so the output would be wrong")
    if dropout:
        _refuse(module, "dropout", dropout, "is for training; call model.eval() first")
    if is_causal is False or (is_causal is None and not getattr(module, "is_causal", True)):
        _refuse(module, "is_causal", False, "is bidirectional attention; kvbench's caches are causal")


def _padding_of(module: Any, mask: torch.Tensor) -> torch.Tensor:
    """Reduce a mask from :func:`padding_mask`, [B, 1, 1, tokens], to [B, tokens]."""
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.dtype == torch.bool:
        flat = mask[:, 0, 0]
        flat.kvbench_local_size = getattr(mask, "kvbench_local_size", None)  # type: ignore[attr-defined]
        return flat
    if mask.dim() != 2:
        _refuse(module, "attention_mask", f"of {mask.dim()} dimensions", "must be a padding mask [batch, tokens]")
    return mask


def _restarts_text(module: Any, cache: ServesAttention, n: int, position_ids: torch.Tensor | None) -> bool:
    """Return whether the positions of several new columns start at 0 although the cache is not empty."""
    if n == 1 or position_ids is None or module.layer_idx != cache.first_layer or not cache.get_seq_length():
        return False
    return int(position_ids[..., 0].max()) == 0


def _refuse(module: Any, keyword: str, value: object, problem: str) -> NoReturn:
    if isinstance(value, torch.Tensor):
        value = f"a tensor {list(value.shape)}"
    raise InputError("model", type(module).__name__, f"{keyword}={value}: {problem}")


def padding_mask(
    attention_mask: torch.Tensor | None = None,
    config: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **others: Any,
) -> torch.Tensor | None:
    """Mask function registered with transformers: returns the padding mask only; the cache applies causality.

    The size of a window or chunk is attached to the tensor, so that it can be compared with the plan.

    Returns:
        [B, 1, 1, tokens] bool (four dimensions, because some models slice the mask); None: no padding.

    Raises:
        InputError: The model's mask is not just causal, padded and local, for example a bidirectional prefix.
    """
    is_bidirectional = "allow_is_bidirectional_skip" in others or not getattr(config, "is_causal", True)
    if is_bidirectional or use_vmap:
        problem = "has bidirectional attention" if is_bidirectional else "adds its own rule to the causal mask"
        raise InputError("model", getattr(config, "model_type", "?"), f"{problem}; kvbench's caches are causal")
    if attention_mask is None:
        return None
    mask = attention_mask.bool()[:, None, None]
    mask.kvbench_local_size = local_size  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(ATTENTION_NAME, attention_function)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)


def use_kvbench_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a model's text decoder to the registered attention function and return the model.

    Encoders and vision towers keep theirs. Use :func:`kvbench_attention` to switch temporarily.

    Raises:
        InputError: The model does not support custom attention functions.
    """
    text = model.config.get_text_config()
    if text._attn_implementation != ATTENTION_NAME:
        if not model._can_set_attn_implementation():
            raise InputError("model", type(model).__name__, f"has its own attention code; {ADVICE}")
        _set_attention(model, ATTENTION_NAME)
    return model


@contextmanager
def kvbench_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Switch a model to kvbench's attention inside a ``with`` block and restore its attention function afterwards."""
    before = model.config.get_text_config()._attn_implementation
    try:
        yield use_kvbench_attention(model)
    finally:
        if before != ATTENTION_NAME:
            _set_attention(model, before)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of the text decoder only."""
    config, text = model.config, model.config.get_text_config()
    keys = [key for key in config.sub_configs if getattr(config, key, None) is text]
    model.set_attn_implementation({keys[0]: name} if keys else name)
