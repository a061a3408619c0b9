"""The attention function of every kvbench run: it hands each layer's new queries, keys and values to the cache.

Registered with transformers under the name ``"kvbench"`` when this module is imported. A model that is switched to it
(:func:`use_kvbench_attention`) calls :func:`attention_function` once a layer; the cache that ``update()`` tagged on
the key tensor appends, attends over what it holds and compresses. No model code is touched and nothing is patched.

Also here: the two attention shapes that caches need, over a whole prompt and over a compressed cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ..conf.errors import InputError
from .logits import LogitRule
from .sdpa import sdpa_without_cudnn
from .sharing.plan import SLIDING, Span, span_of

if TYPE_CHECKING:
    from .base import KVCache

ATTENTION_NAME = "kvbench"

ADVICE = "use a decoder on transformers' attention interface, such as Llama, Qwen 3, Gemma 3 or gpt-oss"

BLOCK = 256
"""Queries at a time where attention is computed under a mask; memory grows with it times the keys in view."""
MASK_ELEMENTS = 1 << 27
"""Logits of one block, at most."""

PIECE = 1 << 18
"""Numbers that are converted or expanded at a time on a CPU: as many as stay in its cache."""

WORTH_LENGTH, WORTH_GAIN = 4096, 1.5
"""Cached tokens, and time that whole heads take over that with all threads at work, from which on it pays to share a
head's slots between the threads of a CPU (measured on two threads: docs/efficiency.md)."""


IGNORED = frozenset(
    (
        *("cache_position", "position_ids", "position_embeddings", "past_key_values", "use_cache", "layer_idx"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch"),
    )
)
"""Keywords of an attention function that change nothing about its result here."""

_waiting: tuple[KVCache, int] | None = None
"""The cache whose ``update`` was called last and the layer, until that layer's attention comes here."""


def tag(key: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Name the cache on the key tensor, so that the attention function finds it.

    ``model.generate`` refuses keyword arguments it does not know, so a cache cannot arrive as a keyword there; an
    attribute on the tensor that ``update()`` returns arrives in both.
    """
    key.kvbench_cache = cache  # type: ignore[attr-defined]
    return key


def announce(cache: KVCache, layer_idx: int) -> None:
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


def _cache_of(module: Any, key: torch.Tensor) -> KVCache | None:
    """The cache that a layer's new keys were given to; None: the forward has none."""
    global _waiting
    waiting, _waiting = _waiting, None
    cache: KVCache | None = getattr(key, "kvbench_cache", None)
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
        strict, new_kv: of kvbench's own models (:mod:`.sharing.model`): no token sees itself; what the layer adds where
            that is not what it attends over.

    Returns:
        ([B, n, H_q, D_v], None).

    Raises:
        InputError: the model asks for attention of a kind that is not implemented.
    """
    cache = _cache_of(module, key)
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
        out = cache.attend(module.layer_idx, query, key, value, rule, attention_mask, new_kv)
    return out.transpose(1, 2).contiguous(), None


def _padding_of(module: Any, mask: torch.Tensor) -> torch.Tensor:
    """[B, tokens] of a mask as :func:`padding_mask` gives it out, [B, 1, 1, tokens]."""
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.dtype == torch.bool:
        flat = mask[:, 0, 0]
        flat.kvbench_local_size = getattr(mask, "kvbench_local_size", None)  # type: ignore[attr-defined]
        return flat
    if mask.dim() != 2:
        _refuse(module, "attention_mask", f"of {mask.dim()} dimensions", "must be a padding mask [batch, tokens]")
    return mask


def _begins_again(module: Any, cache: KVCache, n: int, position_ids: torch.Tensor | None) -> bool:
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


def repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """[B, H_kv, S, D] -> [B, H_kv * times, S, D]; query head j is served by KV head j // times."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: LogitRule,
    strict: bool = False,
    span: Span | None = None,
) -> torch.Tensor:
    """Causal attention of the last n tokens of a sequence over all of it (rows without padding).

    Args:
        query: [B, H_q, n, D], the queries of positions S - n .. S - 1.
        key: [B, H_kv, S, D] with S >= n.
        value: [B, H_kv, S, D_v].
        rule: how logits are formed.
        strict: no token sees itself; the first token of all sees nothing, and its output is zero.
        span: which of the tokens before it each one sees; None: all.

    Returns:
        [B, H_q, n, D_v].
    """
    n, length = query.shape[2], key.shape[2]
    if strict:  # token i sees what token i - 1 sees of a sequence that is one token shorter
        lead = int(n == length)
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        if n > lead:
            out[:, :, lead:] = causal_attention(query[:, :, lead:], key[:, :, :-1], value[:, :, :-1], rule)
        return out
    local = span is not None and span.first_visible(length - 1) > 0
    if local or (not rule.is_plain and n > 1):
        return _attention_by_blocks(query, key, value, rule, span)
    if n < length or not rule.is_plain:
        if query.is_cuda and n > 1:
            return lower_right_attention(query, key, value, rule.scaling)
        return cached_attention(query, key, value, rule)
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=rule.scaling, enable_gqa=True)
    # On the CPU the flash kernel is faster on expanded heads than through enable_gqa.
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=rule.scaling)


def _attention_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: LogitRule, span: Span | None
) -> torch.Tensor:
    """:func:`causal_attention` in blocks of queries, each over the keys that it can see: no [n, S] tensor is made."""
    n, length = query.shape[2], key.shape[2]
    first = length - n  # position of the first query
    columns = length if span is None else min(length, span.size + BLOCK)
    block = max(1, min(BLOCK, MASK_ELEMENTS // (query.shape[0] * query.shape[1] * columns)))
    out = []
    for start in range(0, n, block):
        end = min(n, start + block)
        begin = 0 if span is None else span.first_visible(first + start)
        stop = first + end
        at = torch.arange(first + start, stop, device=query.device)[:, None]  # [n, 1]
        columns_at = torch.arange(begin, stop, device=query.device)[None]  # [1, S]
        visible = columns_at <= at
        if span is not None:
            visible = visible & span.visible(at, columns_at)
        part = (query[:, :, start:end], key[:, :, begin:stop], value[:, :, begin:stop])
        out.append(masked_attention(*part, rule, visible[None, None]))
    return torch.cat(out, dim=2)


def lower_right_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The same as :func:`causal_attention` of n < S queries, by flash kernels: no mask [n, S] is made, which for a long
    prompt in pieces would be larger than its cache."""
    bias = causal_lower_right(query.shape[2], key.shape[2])
    gqa = query.shape[1] > key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=gqa)


def exact_products(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``query @ keys^T`` in float32 or wider, as every kernel of attention has its logits before the softmax.

    Args:
        query: [..., G, D].
        keys: [..., S, D], with the same leading dimensions.

    Returns:
        [..., G, S].
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    if exact == query.dtype:
        return torch.matmul(query, keys.transpose(-1, -2))
    if query.is_cuda:
        flat = (query.flatten(0, -3), keys.flatten(0, -3).transpose(1, 2))
        return torch.bmm(*flat, out_dtype=exact).view(*query.shape[:-1], keys.shape[-2])
    out = query.new_empty(*query.shape[:-1], keys.shape[-2], dtype=exact)
    step = max(1, PIECE // (keys.shape[:-2].numel() * keys.shape[-1]))
    for start in range(0, keys.shape[-2], step):  # a piece at a time: all of them in float32 would be a second cache
        piece = keys[..., start : start + step, :].to(exact)
        out[..., start : start + step] = torch.matmul(query.to(exact), piece.transpose(-1, -2))
    return out


def softmax_of(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights in ``dtype`` of logits that are in float32 or wider, as in every kernel of attention."""
    return logits.softmax(-1).to(dtype)


def visibility(n: int, length: int, valid: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Which of ``length`` cached slots each of the last ``n`` tokens may see.

    Everything that was cached before is visible and the new tokens, which hold the last ``n`` slots, are causal among
    themselves: SDPA's ``is_causal`` would be wrong here, because it aligns the triangle to the first slot.

    Args:
        n: new tokens.
        length: slots in all, the new ones included.
        valid: [B, 1 or H, length], True where a slot holds a real token; None: everywhere.

    Returns:
        bool, broadcastable to [B, H, n, length], or None: everything is visible.
    """
    causal = None
    if n > 1:
        causal = torch.ones(n, length, dtype=torch.bool, device=device).tril(length - n)[None, None]
    if valid is None:
        return causal
    visible = valid[:, :, None, :]
    if causal is not None:
        # A padding query sees itself alone, so that its softmax is not over nothing.
        own = torch.eye(n, dtype=torch.bool, device=device)
        own = F.pad(own, (length - n, 0))[None, None]
        visible = (visible & causal) | own
    return visible


def cached_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rule: LogitRule,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of n new tokens over a cache whose last n slots are those tokens.

    Args:
        query: [B, H_q, n, D].
        keys: [B, H, S, D] with H dividing H_q.
        values: [B, H, S, D_v].
        rule: how logits are formed.
        valid: see :func:`visibility`.

    Returns:
        [B, H_q, n, D_v].
    """
    mask = visibility(query.shape[2], keys.shape[2], valid, query.device)
    if mask is not None and mask.shape[2] != query.shape[2]:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    return masked_attention(query, keys, values, rule, mask)


def masked_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: LogitRule, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention under a bool mask [B or 1, H or 1, n, S] (None: everything is visible).

    The query heads of a group are laid side by side as extra query rows of their KV head, so keys and values are never
    expanded: [B, H_kv, g * n, D] against [B, H_kv, S, D].

    Args:
        query: [B, H_q, n, D].
        keys: [B, H_kv, S, D].
        values: [B, H_kv, S, D_v].
        rule: how logits are formed.
        mask: True where a query sees a slot; every query sees one at least.

    Returns:
        [B, H_q, n, D_v].
    """
    batch, query_heads, n, dim = query.shape
    heads = keys.shape[1]
    groups = query_heads // heads
    rows = query.reshape(batch, heads, groups * n, dim)
    if not rule.is_plain:
        logits = rule.logits(exact_products(rows, keys)).unflatten(2, (groups, n))  # [B, H_kv, g, n, S]
        if mask is not None:
            logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
        weights = rule.weights(logits, head_dims=2).to(values.dtype).flatten(2, 3)
        return torch.matmul(weights, values).reshape(batch, query_heads, n, -1)
    if mask is not None and groups > 1 and n > 1:
        mask = mask.repeat(1, 1, groups, 1)
    parts = 1 if mask is not None else _parts(rows, keys, values)
    if parts > 1:
        out = split_kv_attention(rows, keys, values, rule.scaling, parts)
    else:
        out = sdpa_without_cudnn(rows, keys, values, attn_mask=mask, scale=rule.scaling)
    return out.reshape(batch, query_heads, n, -1)


def _parts(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> int:
    """Parts into which to cut the slots of each head, so that every thread has as much to read; 1: leave them whole.

    PyTorch's kernel gives whole heads to threads: eight heads keep eight of sixteen threads at work.
    """
    threads = torch.get_num_threads()
    units = keys.shape[0] * keys.shape[1]
    rounds = -(-units // threads)
    gain = rounds * threads / units  # time / time with all threads at work
    in_order = all(x.stride(0) == x.shape[1] * x.stride(1) and x.stride(3) == 1 for x in (keys, values))
    in_order = in_order and keys.shape[3] == values.shape[3]
    worth = rows.device.type == "cpu" and keys.shape[2] >= WORTH_LENGTH and gain >= WORTH_GAIN and in_order
    return threads if worth else 1


def split_kv_attention(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, parts: int
) -> torch.Tensor:
    """Attention over slots that are cut into parts, each with a softmax of its own, joined by their log-sum-exp.

    Args:
        rows: [B, H, R, D] queries, all of which see all slots; on a CPU.
        keys, values: [B, H, S, D] with S >= ``parts``.
        scaling: factor on the logits.
        parts: how many.

    Returns:
        [B, H, R, D].
    """
    batch, heads, n, dim = rows.shape
    size = keys.shape[2] // parts
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    queries = rows.reshape(batch * heads, 1, n, dim)

    def attend(start: int, end: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """([units, parts, R, D], [units, parts, R]); the parts take the place of heads, which need not lie together."""
        cut = [x[:, :, start:end].view(batch * heads, parts, -1, dim) for x in (keys, values)]
        found: tuple[torch.Tensor, torch.Tensor] = flash(queries.expand(-1, parts, -1, -1), *cut, scale=scaling)
        return found

    out, log_sum = attend(0, size * parts, parts)
    if size * parts < keys.shape[2]:
        out, log_sum = (
            torch.cat(pair, dim=1) for pair in zip((out, log_sum), attend(size * parts, keys.shape[2], 1), strict=True)
        )
    weights = log_sum.softmax(1)[..., None]
    return (out * weights).sum(1).to(rows.dtype).view(batch, heads, n, dim)


def uncached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: LogitRule,
    attention_mask: torch.Tensor | None,
    strict: bool = False,
    span: Span | None = None,
) -> torch.Tensor:
    """Causal attention of the last n tokens of whole rows, which may be padded on either side.

    Args:
        query: [B, H_q, n, D].
        key: [B, H_kv, T, D].
        value: [B, H_kv, T, D_v].
        rule: how logits are formed.
        attention_mask: [B, T], True for a real token; None: no padding.
        strict: no token sees itself.
        span: which of the tokens before it each one sees; None: all.

    Returns:
        [B, H_q, n, D_v]; zero where a token sees nothing.
    """
    n, length = query.shape[2], key.shape[2]
    if attention_mask is None or bool(attention_mask.all()):
        return causal_attention(query, key, value, rule, strict, span)
    mask = attention_mask.bool()
    columns = torch.arange(length, device=query.device)
    position = (mask.long().cumsum(1) - 1) if span is not None and span.counts_from_start else columns.expand_as(mask)
    at, of = position[:, length - n :, None], position[:, None]  # [B, n, 1], [B, 1, T]
    visible = columns[length - n :, None] - columns[None] >= int(strict)
    visible = visible & mask[:, None]
    if span is not None:
        visible = visible & span.visible(at, of)
    visible = visible[:, None]
    sees = visible.any(-1, keepdim=True)
    return masked_attention(query, key, value, rule, visible | ~sees).masked_fill(~sees, 0.0)
