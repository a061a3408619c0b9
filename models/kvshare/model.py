"""A Llama whose layers share keys and values as a map says: CLA, YOCO, Layer-Condensed KV and everything between.

Keys and values are made in the model's loop and handed to the layers, so that one place owns caching: a layer that is
its own KV source projects them, a consumer has no such projections and gets its source's. The class behaves like any
causal LM of transformers: ``generate`` (batches padded on the left, beam search), ``save_pretrained``, every attention
implementation. With the map "every layer its own" it is ``LlamaForCausalLM`` to the bit.

Where a layer refers up (Layer-Condensed KV), several tokens at once are encoded by passing the layers in between
repeatedly, always from the same input, with the keys and values of the pass before (arXiv 2405.10637, section 3.2):
after r passes the first r tokens are exactly what feeding tokens one by one gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)

from ...methods.cache.attention import ATTENTION_NAME, tag
from ...methods.cache.cache import KVCache
from ...methods.cache.rotary import rope
from ...methods.sharing.kv_map import FULL, LINEAR, SLIDING, Segment, segments
from .config import KVShareLlamaConfig
from .retention import GatedRetention

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys after RoPE and values, [B, G, tokens, D] each."""


class KVShareAttention(LlamaAttention):
    """Attention over keys and values that it is given; its own projections for them where its layer is a source."""

    def __init__(self, config: KVShareLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.source[layer_idx] != layer_idx:
            del self.k_proj, self.v_proj
        slides = config.types[layer_idx] == SLIDING
        self.sliding_window = config.sliding_window if slides else None

    def project(self, x: torch.Tensor, cos_sin: KV) -> KV:
        """Keys, turned by RoPE at their own positions once and for all, and values of normalised x [B, n, hidden]."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        keys, values = (p(x).view(shape).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        return rope(keys, cos_sin), values

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: KV,
        kv: KV,
        attention_mask: torch.Tensor | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of [B, n, hidden] over ``kv``; ``strict``: no token sees itself (see :func:`strict_mask`)."""
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        query = rope(query, position_embeddings)
        name = self.config._attn_implementation
        lead = 0  # first tokens that see nothing and are left out
        if name == ATTENTION_NAME:
            kwargs["strict"] = strict
        elif strict and attention_mask is None:
            lead, query, kv = 1, query[:, :, 1:], (kv[0][:, :, :-1], kv[1][:, :, :-1])
        elif strict:
            nothing = kv[0].new_zeros(*kv[0].shape[:2], 1, kv[0].shape[3])
            kv = (torch.cat([nothing, kv[0]], dim=2), torch.cat([nothing, kv[1]], dim=2))
        if lead and not query.shape[2]:
            out, weights = hidden_states.new_zeros(*shape, self.o_proj.in_features), None
        else:
            out, weights = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)(
                self,
                query,
                *kv,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
            out = out.flatten(2)
            if lead:
                out = torch.cat([out.new_zeros(out.shape[0], 1, out.shape[2]), out], dim=1)
        return self.o_proj(out), weights


class KVShareDecoderLayer(LlamaDecoderLayer):
    """A Llama block with that attention, or gated retention in its place."""

    def __init__(self, config: KVShareLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mixer: GatedRetention | None = None
        own = config.source[layer_idx] == layer_idx
        if config.types[layer_idx] == LINEAR:
            del self.self_attn
            assert config.retention_heads is not None and config.head_dim is not None
            eps = config.rms_norm_eps
            self.mixer = GatedRetention(config.hidden_size, config.retention_heads, config.head_dim, eps)
            return
        self.self_attn = KVShareAttention(config, layer_idx)
        if own and config.separate_kv_norm:
            self.kv_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def project(self, hidden_states: torch.Tensor, cos_sin: KV) -> KV:
        """Keys and values of this layer's input."""
        norm = getattr(self, "kv_layernorm", self.input_layernorm)
        attention: KVShareAttention = self.self_attn  # type: ignore[assignment]
        return attention.project(norm(hidden_states), cos_sin)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: KV,
        kv: KV | None = None,
        attention_mask: torch.Tensor | None = None,
        strict: bool = False,
        recurrence: Any = None,
        attentions: list[torch.Tensor | None] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, n, hidden] -> the same; ``attentions``: a list that gets the attention's weights, where it gives any."""
        x = self.input_layernorm(hidden_states)
        if self.mixer is not None:
            assert recurrence is not None
            mixed, recurrence.after = self.mixer(x, position_embeddings, recurrence.real, recurrence.before)
        else:
            assert kv is not None
            mixed, weights = self.self_attn(x, position_embeddings, kv, attention_mask, strict, **kwargs)
            if attentions is not None:
                attentions.append(weights)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@dataclass
class Recurrence:
    """What a retention layer takes and leaves.

    Attributes:
        real: [B, n] bool, False for a pad; None: all real.
        before, after: its state; two fields, since a checkpointed layer is run a second time from the first.
    """

    real: torch.Tensor | None
    before: torch.Tensor | None
    after: torch.Tensor | None = None


def strict_mask(attention_mask: torch.Tensor | None, past: int, new: int, device: torch.device) -> torch.Tensor:
    """Which keys each new token sees where no token sees itself: bool [B or 1, 1, new, 1 + past + new].

    Column 0 is a key and a value of zeros, open to those alone that see nothing else: their attention is then exactly
    zero in every kernel, where a row without any open column would be an average over everything, the future included.
    """
    at = torch.arange(past + new, device=device)
    visible = (at[None] < at[past:, None])[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :].bool()
    return torch.cat([~visible.any(-1, keepdim=True), visible], dim=-1)


@dataclass
class Output(BaseModelOutputWithPast):
    """``kv_loss``: how much the shared keys and values still changed in the last pass of the cyclic segments."""

    kv_loss: torch.Tensor | None = None


@dataclass
class Stream:
    """The tokens on their way through the layers.

    Attributes:
        hidden: [B, n, hidden].
        cos_sin: RoPE of their positions.
        masks: by layer type, and ``strict``.
        past: the cache, or None.
        real: [B, n] bool, False for pads; None: all real.
        shared: keys and values by source layer, those of the past included where the cache hands them out.
        states: after each layer, if asked for.
        attentions: of each layer, if asked for.
        kv_loss: see :class:`Output`.
        passes: over a cyclic segment.
        options: for the attention function.
    """

    hidden: torch.Tensor
    cos_sin: KV
    masks: dict[str, torch.Tensor | None]
    past: Any
    real: torch.Tensor | None
    shared: dict[int, KV]
    states: list[torch.Tensor] | None
    attentions: list[torch.Tensor | None] | None
    kv_loss: torch.Tensor | None
    passes: int
    options: dict[str, Any]

    def cache(self, i: int, kv: KV) -> None:
        """Put down what source i makes of the new tokens; consumers get what the cache hands back."""
        self.shared[i] = kv if self.past is None else self.past.update(*kv, i)

    def keep_last(self, rows: int) -> None:
        """Go on with the last ``rows`` tokens alone."""
        self.hidden = self.hidden[:, -rows:]
        self.cos_sin = (self.cos_sin[0][:, -rows:], self.cos_sin[1][:, -rows:])
        for kind, mask in self.masks.items():
            if mask is not None and mask.dim() == 4:
                self.masks[kind] = mask[:, :, -rows:]


class KVSharePreTrainedModel(LlamaPreTrainedModel):
    """What the two classes below tell transformers."""

    config_class = KVShareLlamaConfig
    _no_split_modules = ["KVShareDecoderLayer"]  # noqa: RUF012 - as transformers declares it
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _can_record_outputs = {}  # noqa: RUF012 - a layer of a cyclic segment runs several times


class KVShareLlamaModel(KVSharePreTrainedModel):
    """The layers."""

    def __init__(self, config: KVShareLlamaConfig):
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(KVShareDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.source: list[int] = list(config.source)
        self.segments = segments(self.source)
        self.paper = config.upward_style == "paper" and config.refers_up
        self._keys_to_ignore_on_load_unexpected = unused_projections(self.source)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        n_iter: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Output:
        """As in ``LlamaModel``, and:

        Args:
            logits_to_keep: only the last so many positions will be used (0: all); the layers above the last KV layer
                may leave out the others.
            n_iter: passes over a cyclic segment; None: as the config says.

        Raises:
            ValueError: a mask that an upward reference cannot be combined with.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values
        if past is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            past = DynamicCache(config=self.config)
        seen = 0 if past is None else past.get_seq_length()
        n = hidden.shape[1]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + n, device=hidden.device)[None]
        output_hidden_states, output_attentions = (
            getattr(self.config, key) if value is None else value
            for key, value in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions))
        )
        if n > 1 and isinstance(past, KVCache) and (most := past.most_columns) is not None and n > most:
            return self._in_parts(most, hidden, attention_mask, position_ids, past, logits_to_keep, kwargs)
        stream = Stream(
            hidden=hidden,
            cos_sin=self.rotary_emb(hidden, position_ids=position_ids),
            masks=self._masks(hidden, attention_mask, position_ids, past, seen),
            past=past,
            real=self._real(attention_mask, n),
            shared={},
            states=[hidden] if output_hidden_states else None,
            attentions=[] if output_attentions else None,
            kv_loss=None,
            passes=self._passes(n, n_iter, past),
            options=kwargs,
        )
        last_owner, keep = max(self.source), 0
        if stream.states is None and stream.attentions is None:
            keep = self._rows_to_keep(stream, logits_to_keep, n)
        for segment in self.segments:
            if segment.cyclic:
                self._cycle(stream, segment)
                continue
            for i in segment.layers:
                self._own(stream, i)
                if keep and i == last_owner:
                    stream.keep_last(keep)
                self._layer(stream, i, stream.shared.get(self.source[i]), self.paper)
        hidden = self.norm(stream.hidden)
        if stream.states is not None:
            stream.states[-1] = hidden
        return Output(
            last_hidden_state=hidden,
            past_key_values=past,
            hidden_states=None if stream.states is None else tuple(stream.states),
            attentions=None if stream.attentions is None else tuple(stream.attentions),  # type: ignore[arg-type]
            kv_loss=stream.kv_loss,
        )

    # what a forward needs to know ---------------------------------------------------------------------------------

    def _masks(
        self, hidden: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor, past: Any, seen: int
    ) -> dict[str, Any]:
        config = self.config
        if isinstance(attention_mask, dict):  # a static cache: transformers has made them already
            if config.refers_up or LINEAR in config.types:
                raise ValueError("a static cache does not work with references to layers above or with retention")
            return dict(attention_mask)
        common = (config, hidden, attention_mask, past)
        masks: dict[str, Any] = {FULL: create_causal_mask(*common, position_ids=position_ids)}
        if SLIDING in config.types:
            masks[SLIDING] = create_sliding_window_causal_mask(*common, position_ids=position_ids)
        if config.refers_up:
            masks["strict"] = self._strict_mask(hidden, attention_mask, masks[FULL], seen)
        return masks

    def _strict_mask(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, causal: torch.Tensor | None, seen: int
    ) -> torch.Tensor | None:
        name = self.config._attn_implementation
        if name == ATTENTION_NAME:
            return causal  # the 2-D padding mask
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("references to layers above need a 2-D attention mask")
        if name != "eager" and attention_mask is None and not seen:
            return None  # the kernel's own causal mask, over everything but the last key and the first query
        if name not in ("eager", "sdpa"):
            raise ValueError(f"references to layers above with padding or a cache need eager or sdpa, not {name}")
        mask = strict_mask(attention_mask, seen, hidden.shape[1], hidden.device)
        if name == "eager":
            lowest = torch.finfo(hidden.dtype).min
            return torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, lowest)
        return mask

    def _real(self, attention_mask: Any, n: int) -> torch.Tensor | None:
        if LINEAR not in self.config.types or attention_mask is None:
            return None
        if attention_mask.dim() != 2:
            raise ValueError("retention layers need a 2-D attention mask")
        return attention_mask[:, -n:].bool()

    def _passes(self, n: int, n_iter: int | None, past: Any) -> int:
        """R: as many passes as tokens are exact, and more change nothing."""
        if n_iter is None and isinstance(past, KVCache) and past.passes is not None:
            n_iter = past.passes or n
        if n_iter is None:
            exact = self.config.encode == "exact"
            n_iter = n if exact else self.config.iter_forward + self.config.iter_backward
        return max(1, min(n_iter, n))

    def _rows_to_keep(self, stream: Stream, logits_to_keep: int | torch.Tensor, n: int) -> int:
        """Last positions that the layers above the last KV layer have to compute; 0: all.

        Those layers write no cache, so the others are of no use to anyone; the result is exact.
        """
        if not isinstance(logits_to_keep, int) or logits_to_keep < 1 or not self.config.prefill_skip:
            return 0
        last_owner, keep = max(self.source), logits_to_keep
        if self.config.refers_up or self.config.types[last_owner] == LINEAR:
            return 0
        name = self.config._attn_implementation
        if isinstance(stream.past, KVCache):
            keep = max(keep, stream.past.queries_wanted(last_owner))
        elif name != ATTENTION_NAME:
            above = {self.config.types[i] for i in range(last_owner, len(self.layers))}
            tensors = all(stream.masks[kind] is not None for kind in above)
            flash = name not in ("eager", "sdpa")
            static = getattr(stream.past, "is_compileable", False)
            # Without a mask a kernel aligns its triangle to the first key; a single query needs no triangle.
            if (flash or not tensors) and (keep > 1 or static):
                return 0
        return keep if keep < n else 0

    def _in_parts(
        self,
        most: int,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        past: KVCache,
        logits_to_keep: int | torch.Tensor,
        options: dict[str, Any],
    ) -> Output:
        """Columns in turn, for a cache whose tokens may leave, or a source that stands above, between them."""
        outs, n = [], hidden.shape[1]
        for start in range(0, n, most):
            end = min(n, start + most)
            out = self(
                inputs_embeds=hidden[:, start:end],
                attention_mask=None
                if attention_mask is None
                else attention_mask[:, : attention_mask.shape[1] - n + end],
                position_ids=position_ids[:, start:end],
                past_key_values=past,
                logits_to_keep=min(logits_to_keep, end - start) if isinstance(logits_to_keep, int) else 0,
                output_hidden_states=False,
                output_attentions=False,
                **options,
            )
            outs.append(out.last_hidden_state)
        return Output(last_hidden_state=torch.cat(outs, dim=1), past_key_values=past)

    def _block(self, i: int) -> KVShareDecoderLayer:
        return self.layers[i]  # type: ignore[return-value]

    # one layer ----------------------------------------------------------------------------------------------------

    def _own(self, stream: Stream, i: int) -> None:
        """Make and cache the keys and values of layer i, if it is a source."""
        if self.source[i] != i or self._block(i).mixer is not None:
            return
        stream.cache(i, self._block(i).project(stream.hidden, stream.cos_sin))

    def _layer(self, stream: Stream, i: int, kv: KV | None, strict: bool, **options: Any) -> None:
        """Layer i over the keys and values given; retention has its own."""
        layer = self._block(i)
        recurrence = None
        if layer.mixer is not None:
            recurrence = Recurrence(stream.real, recurrent_state(stream.past, i, stream.hidden.shape[0]))
        kind = "strict" if strict else self.config.types[i]
        stream.hidden = layer(
            stream.hidden,
            position_embeddings=stream.cos_sin,
            kv=kv,
            attention_mask=stream.masks.get(kind),
            strict=strict,
            recurrence=recurrence,
            attentions=stream.attentions,
            **options,
            **stream.options,
        )
        if recurrence is not None and stream.past is not None:
            stream.past.update_recurrent_state(recurrence.after, i)
        if stream.states is not None:
            stream.states.append(stream.hidden)

    # layers that refer up -----------------------------------------------------------------------------------------

    def _cycle(self, stream: Stream, segment: Segment) -> None:
        """Pass over a cyclic segment again and again; the last pass is the one that counts and is cached."""
        start, past = stream.hidden, stream.past
        targets = sorted({self.source[i] for i in segment.layers if self.source[i] > i})
        heads, dim = self.config.num_key_value_heads, self.config.head_dim
        assert heads is not None and dim is not None
        nothing = start.new_zeros(start.shape[0], heads, start.shape[1], dim)
        carry = dict.fromkeys(targets, (nothing, nothing))
        before = {i: cached(past, i) for i in segment.layers if self.source[i] == i}
        for number in range(stream.passes):
            final = number == stream.passes - 1
            graded = torch.is_grad_enabled() and number >= stream.passes - self.config.iter_backward
            with torch.set_grad_enabled(graded), nullcontext() if final else rehearsal(stream):
                made = self._pass(stream, segment, start, carry, before, final)
            previous, carry = carry, {t: made[t] for t in targets}
        for t in targets:
            for now, then in zip(carry[t], previous[t], strict=True):
                change = nn.functional.mse_loss(now, then)
                stream.kv_loss = change if stream.kv_loss is None else stream.kv_loss + change

    def _pass(
        self,
        stream: Stream,
        segment: Segment,
        start: torch.Tensor,
        carry: dict[int, KV],
        before: dict[int, KV | None],
        final: bool,
    ) -> dict[int, KV]:
        """One pass; returns the keys and values that its sources made of the new tokens.

        Args:
            start: input of the segment, the same in every pass.
            carry: keys and values of the new tokens as the pass before left them, by source above.
            before: those of the tokens before, by source.
            final: cache them.
        """
        stream.hidden = start
        made: dict[int, KV] = {}
        for i in segment.layers:
            source, options = self.source[i], {}
            if source == i:
                made[i] = self._block(i).project(stream.hidden, stream.cos_sin)
                if final:
                    stream.cache(i, made[i])
            from_above = source > i or (self.paper and source == i and i in carry)
            if from_above:
                kv = joined(stream.past, before[source], carry[source])
                if source == i and isinstance(stream.past, KVCache):
                    options["new_kv"] = made[i]  # what it attends over is not what it adds
            elif final or source not in made:
                kv = stream.shared[source]
            else:
                kv = joined(stream.past, before[source], made[source])
            self._layer(stream, i, kv, from_above or self.paper, **options)
        return made


def unused_projections(source: list[int]) -> list[str]:
    """Pattern of the key and value weights that a checkpoint of the plain model has and this one has no use for."""
    consumers = "|".join(str(i) for i, s in enumerate(source) if s != i)
    return [rf"layers\.({consumers})\.self_attn\.[kv]_proj\."] if consumers else []


def cached(past: Any, i: int) -> KV | None:
    """Keys and values of the tokens before at source i; None: there are none, or the cache keeps them to itself."""
    if past is None or isinstance(past, KVCache) or past.layers[i].keys is None:
        return None
    return past.layers[i].keys, past.layers[i].values


def joined(past: Any, before: KV | None, new: KV) -> KV:
    """Keys and values of the tokens before and of the new ones; a kvbench cache adds the former itself."""
    if isinstance(past, KVCache):
        return tag(new[0], past), new[1]
    return new if before is None else (torch.cat([before[0], new[0]], dim=2), torch.cat([before[1], new[1]], dim=2))


def recurrent_state(past: Any, i: int, rows: int) -> torch.Tensor | None:
    """State of retention layer i; transformers' own getter asks for a convolution's state that is not there."""
    if past is None:
        return None
    if isinstance(past, KVCache):
        return past.recurrent_state(i, rows)
    layer = past.layers[i]
    return layer.recurrent_states[0] if layer.is_recurrent_states_initialized[0] else None


@contextmanager
def rehearsal(stream: Stream) -> Iterator[None]:
    """A pass that leaves no trace: nothing is cached and nothing recorded."""
    kept, past = (stream.states, stream.attentions), stream.past
    stream.states = stream.attentions = None
    if isinstance(past, KVCache):
        past.is_warmup_pass = True
    try:
        yield
    finally:
        stream.states, stream.attentions = kept
        if isinstance(past, KVCache):
            past.is_warmup_pass = False


class KVShareLlamaForCausalLM(LlamaForCausalLM):
    """With a language-modelling head."""

    config_class = KVShareLlamaConfig
    _no_split_modules = KVSharePreTrainedModel._no_split_modules
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _can_record_outputs = {}  # noqa: RUF012

    def __init__(self, config: KVShareLlamaConfig):
        PreTrainedModel.__init__(self, config)
        self.model = KVShareLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._keys_to_ignore_on_load_unexpected = self.model._keys_to_ignore_on_load_unexpected
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        n_iter: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As in ``LlamaForCausalLM``; ``n_iter`` as in :meth:`KVShareLlamaModel.forward`."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep if labels is None else 0,
            n_iter=n_iter,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        hidden = out.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch)
            if self.config.kv_loss_weight and out.kv_loss is not None:
                loss = loss + self.config.kv_loss_weight * out.kv_loss
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return result.to_tuple() if return_dict is False else result


AutoConfig.register(KVShareLlamaConfig.model_type, KVShareLlamaConfig)
AutoModelForCausalLM.register(KVShareLlamaConfig, KVShareLlamaForCausalLM)
