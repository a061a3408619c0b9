"""The attention function of every kvbench run: it hands each layer's new queries, keys and values to the cache.

Registered with transformers under the name ``"kvbench"`` when this module is imported. A model that is switched to it
(:func:`use_kvbench_attention`) calls :func:`attention_function` once a layer; the cache that ``update()`` tagged on
the key tensor appends, attends over what it holds and compresses. No model code is touched and nothing is patched.
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
"""Keywords of an attention function that change nothing about its result here."""


class ServesAttention(Protocol):
    """A cache as the attention function sees it."""

    first_layer: int

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far."""

    def attend(self, layer_idx: int, call: LayerCall, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of one layer of the model."""


_waiting: tuple[ServesAttention, int] | None = None
"""The cache whose ``update`` was called last and the layer, until that layer's attention comes here."""


def tag(key: torch.Tensor, cache: ServesAttention) -> torch.Tensor:
    """Name the cache on the key tensor, so that the attention function finds it.

    ``model.generate`` refuses keyword arguments it does not know, so a cache cannot arrive as a keyword there; an
    attribute on the tensor that ``update()`` returns arrives in both.
    """
    key.kvbench_cache = cache  # type: ignore[attr-defined]
    return key


def announce(cache: ServesAttention, layer_idx: int) -> None:
    """Note that a layer has called ``update``: models that rebuild their keys behind it lose the tag on the tensor.

    Raises:
        InputError: the layer before it never came to the attention function: its model attends by code of its own,
            over the new tokens alone.
    """
    global _waiting
    if _waiting is not None and _waiting[0] is cache:
        layer, _waiting = _waiting[1], None
        raise InputError(
            "model",
            f"layer {layer}",
            f"attends by code of its own, so no kvbench cache can serve it; {ADVICE}",
        )
    _waiting = (cache, layer_idx)


def _cache_of(module: Any, key: torch.Tensor) -> ServesAttention | None:
    """The cache that a layer's new keys were given to; None: the forward has none."""
    global _waiting
    waiting, _waiting = _waiting, None
    cache: ServesAttention | None = getattr(key, "kvbench_cache", None)
    if cache is None and waiting is not None and waiting[1] == module.layer_idx:
        return waiting[0]
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
    strict: bool = False,
    new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Every keyword that is not named here must be on the list of those that change nothing, or be off; else the model
    is refused, for what it asks for would be missing from its output.

    Args:
        module: the attention module; ``module.layer_idx`` names the layer.
        query: [B, H_q, n, D], after RoPE.
        key: [B, H_kv, n, D], the new tokens only, after RoPE.
        value: [B, H_kv, n, D_v].
        attention_mask: as :func:`padding_mask` gives it, [B, 1, 1, tokens seen + n], True where a token is real; also
            without the two dimensions between; None: no padding.
        scaling: factor on the logits; 1 / sqrt(D) when None.
        sliding_window: the model's own window for this layer, if it has one; the plan's must be the same.
        softcap, s_aux: see :class:`.logits.LogitRule`.
        dropout: on the weights; must be 0.
        is_causal: must not be False.
        strict, new_kv: of kvbench's own models (``models/kvshare``): no token sees itself; what the layer adds where
            that is not what it attends over.

    Returns:
        ([B, n, H_q, D_v], None).

    Raises:
        InputError: the model asks for attention of a kind that is not implemented.
    """
    cache = _cache_of(module, key)
    _check_keywords(module, others, dropout, is_causal)
    if cache is not None and _begins_again(module, cache, query.shape[2], others.get("position_ids")):
        _refuse(module, "position_ids", 0, "begins a text in a cache that has read one; is use_cache=False?")
    if attention_mask is not None:
        attention_mask = _padding_of(module, attention_mask)
    declared = getattr(module, "sinks", None)
    if isinstance(declared, torch.Tensor) and s_aux is None and "s_aux" not in others:
        _refuse(module, "sinks", "None", "has attention sinks that its attention function is not given")
    rule = LogitRule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap or None, s_aux)
    span = span_of(module.config, module.layer_idx)
    if sliding_window is not None and (span is None or span.kind != SLIDING or span.size != sliding_window):
        _refuse(module, "sliding_window", sliding_window, f"is not what the model's config says of the layer: {span}")
    if cache is None:  # a forward without a cache: scoring, or method=no_cache
        out = uncached_attention(query, key, value, rule, attention_mask, strict, span)
    else:
        out = cache.attend(module.layer_idx, LayerCall(query, key, value, rule, new_kv), attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _check_keywords(module: Any, others: dict[str, Any], dropout: float, is_causal: bool | None) -> None:
    """Refuse what a model asks of its attention function and what is not implemented here."""
    unknown = [
        name for name, given in others.items() if name not in IGNORED and given is not None and given is not False
    ]
    if unknown:
        _refuse(
            module, unknown[0], others[unknown[0]], "is not implemented here, so the output would not be the model's"
        )
    if dropout:
        _refuse(module, "dropout", dropout, "is for training; call model.eval() first")
    if is_causal is False or (is_causal is None and not getattr(module, "is_causal", True)):
        _refuse(module, "is_causal", False, "is attention in both directions; kvbench's caches are causal")


def _padding_of(module: Any, mask: torch.Tensor) -> torch.Tensor:
    """[B, tokens] of a mask as :func:`padding_mask` gives it out, [B, 1, 1, tokens]."""
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.dtype == torch.bool:
        flat = mask[:, 0, 0]
        flat.kvbench_local_size = getattr(mask, "kvbench_local_size", None)  # type: ignore[attr-defined]
        return flat
    if mask.dim() != 2:
        _refuse(module, "attention_mask", f"of {mask.dim()} dimensions", "must be a padding mask [batch, tokens]")
    return mask


def _begins_again(module: Any, cache: ServesAttention, n: int, position_ids: torch.Tensor | None) -> bool:
    """Whether several new columns have the positions of a text's beginning although the cache holds some."""
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
    """The mask "function" registered beside it: the padding mask as it is; causality belongs to the cache.

    A window or chunk that a model puts into its mask is named on the tensor, so that it can be compared with the plan.

    Returns:
        [B, 1, 1, tokens] (some models cut masks of four dimensions), or None: no padding.

    Raises:
        InputError: the model's mask is more than causal, padded and local: a prefix that is seen from both sides, say.
    """
    both_directions = "allow_is_bidirectional_skip" in others or not getattr(config, "is_causal", True)
    if both_directions or use_vmap:
        problem = "attends in both directions" if both_directions else "adds a rule of its own to the causal mask"
        raise InputError("model", getattr(config, "model_type", "?"), f"{problem}; kvbench's caches are causal")
    if attention_mask is None:
        return None
    mask = attention_mask.bool()[:, None, None]
    mask.kvbench_local_size = local_size  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(ATTENTION_NAME, attention_function)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)


def use_kvbench_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a model's text decoder to the registered attention function; returns the same model.

    Encoders and vision towers keep theirs. :func:`kvbench_attention` does it for a while.

    Raises:
        InputError: the model does not take an attention function.
    """
    text = model.config.get_text_config()
    if text._attn_implementation != ATTENTION_NAME:
        if not model._can_set_attn_implementation():
            raise InputError("model", type(model).__name__, f"attends by code of its own; {ADVICE}")
        _set_attention(model, ATTENTION_NAME)
    return model


@contextmanager
def kvbench_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Switch a model to kvbench's attention inside a ``with`` block, and back to what it had after it."""
    before = model.config.get_text_config()._attn_implementation
    try:
        yield use_kvbench_attention(model)
    finally:
        if before != ATTENTION_NAME:
            _set_attention(model, before)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of the text decoder alone."""
    config, text = model.config, model.config.get_text_config()
    keys = [key for key in config.sub_configs if getattr(config, key, None) is text]
    model.set_attn_implementation({keys[0]: name} if keys else name)
