"""A Llama whose layers share keys and values by a map: CLA, YOCO, Layer-Condensed KV and combinations of them.

Keys and values are projected in the model's loop and passed to the layers, so that caching is in one place: a layer
that is its own KV source projects them; a consumer has no such projections and gets its source's. The class works like
any causal LM of transformers: ``generate`` (left-padded batches, beam search), ``save_pretrained``, every attention
implementation. With the map "every layer its own source" it equals ``LlamaForCausalLM`` bit for bit.

Layers whose source is above them (Layer-Condensed KV) encode several tokens at once in passes: see :mod:`.iterative`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ...methods.cache.attention import ATTENTION_NAME
from ...methods.cache.cache import KVCache
from ...methods.sharing.kv_map import LINEAR, segments
from .config import KVShareLlamaConfig
from .iterative import encode_segment, number_of_passes
from .layer import ForwardState, KVShareDecoderLayer, run_layer
from .masks import attention_masks, retention_mask


@dataclass
class KVShareModelOutput(BaseModelOutputWithPast):
    """Output of the layers.

    Attributes:
        kv_loss: change of the shared keys and values in the last pass over the cyclic segments (mean squared).
    """

    kv_loss: torch.Tensor | None = None


class KVSharePreTrainedModel(LlamaPreTrainedModel):
    """Class attributes that transformers reads."""

    config: KVShareLlamaConfig
    config_class = KVShareLlamaConfig
    _no_split_modules = ["KVShareDecoderLayer"]  # noqa: RUF012 - as transformers declares it
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _can_record_outputs = {}  # noqa: RUF012 - a layer of a cyclic segment runs several times


class KVShareLlamaModel(KVSharePreTrainedModel):
    """The embedding and the layers, without a language-modelling head."""

    def __init__(self, config: KVShareLlamaConfig):
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(KVShareDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.segments = segments(config.source)
        self._keys_to_ignore_on_load_unexpected = unused_projections(config.source)
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
    ) -> KVShareModelOutput:
        """Run the layers, with the arguments of ``LlamaModel`` and two more.

        Args:
            logits_to_keep: number of last positions whose outputs are used (0: all); the layers above the last KV
                source may skip the others.
            n_iter: passes over a cyclic segment; None: as the config says.

        Raises:
            ValueError: the attention mask cannot be combined with upward references.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values
        if past is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            past = DynamicCache(config=self.config)
        n_seen, n = 0 if past is None else past.get_seq_length(), hidden.shape[1]
        if position_ids is None:
            position_ids = torch.arange(n_seen, n_seen + n, device=hidden.device)[None]
        if n > 1 and isinstance(past, KVCache) and (limit := past.max_new_columns) is not None and n > limit:
            return self._forward_in_chunks(limit, hidden, attention_mask, position_ids, past, logits_to_keep, kwargs)
        state = ForwardState(
            hidden=hidden,
            cos_sin=self.rotary_emb(hidden, position_ids=position_ids),
            masks=attention_masks(self.config, hidden, attention_mask, position_ids, past, n_seen),
            past=past,
            is_real=retention_mask(self.config, attention_mask, n),
            n_passes=number_of_passes(self.config, n, n_iter, past),
            options=kwargs,
            hidden_states=[hidden] if self._is_requested("output_hidden_states", output_hidden_states) else None,
            attentions=[] if self._is_requested("output_attentions", output_attentions) else None,
            shared_kv={},
        )
        self._run_layers(state, logits_to_keep)
        return self._output(state)

    def _is_requested(self, key: str, value: bool | None) -> bool:
        return bool(getattr(self.config, key) if value is None else value)

    def _forward_in_chunks(
        self,
        chunk: int,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        past: KVCache,
        logits_to_keep: int | torch.Tensor,
        options: dict[str, Any],
    ) -> KVShareModelOutput:
        """Run ``chunk`` tokens at a time, for a cache that evicts between tokens or a KV source above its consumers."""
        outs, n = [], hidden.shape[1]
        for start in range(0, n, chunk):
            end = min(n, start + chunk)
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
        return KVShareModelOutput(last_hidden_state=torch.cat(outs, dim=1), past_key_values=past)

    def _run_layers(self, state: ForwardState, logits_to_keep: int | torch.Tensor) -> None:
        source, n_kept = self.config.source, 0
        last_source = max(source)
        if state.hidden_states is None and state.attentions is None:
            n_kept = self._tokens_above_last_source(state, logits_to_keep)
        for segment in self.segments:
            if segment.cyclic:
                encode_segment(self.layers, self.config, state, segment)
                continue
            for i in segment.layers:
                layer: Any = self.layers[i]
                if source[i] == i and layer.mixer is None:
                    state.append_kv(i, layer.project_kv(state.hidden, state.cos_sin))
                if n_kept and i == last_source:
                    state.drop_all_but_last(n_kept)
                run_layer(layer, state, state.shared_kv.get(source[i]), self.config.is_paper_style)

    def _tokens_above_last_source(self, state: ForwardState, logits_to_keep: int | torch.Tensor) -> int:
        """Number of last tokens that the layers above the last KV source compute; 0: all.

        Those layers write no cache, so the other tokens' outputs are never read; skipping them is exact.
        """
        if not isinstance(logits_to_keep, int) or logits_to_keep < 1 or not self.config.prefill_skip:
            return 0
        last_source, n_kept = max(self.config.source), logits_to_keep
        if self.config.has_upward_kv_refs or self.config.types[last_source] == LINEAR:
            return 0
        name = self.config._attn_implementation
        if isinstance(state.past, KVCache):
            n_kept = max(n_kept, state.past.num_observed_queries(last_source))
        elif name != ATTENTION_NAME:
            types_above = {self.config.types[i] for i in range(last_source, len(self.layers))}
            have_masks = all(state.masks[kind] is not None for kind in types_above)
            is_flash = name not in ("eager", "sdpa")
            is_static = getattr(state.past, "is_compileable", False)
            # Without a mask a kernel aligns its causal triangle to the first key; a single query needs no triangle.
            if (is_flash or not have_masks) and (n_kept > 1 or is_static):
                return 0
        return n_kept if n_kept < state.hidden.shape[1] else 0

    def _output(self, state: ForwardState) -> KVShareModelOutput:
        hidden = self.norm(state.hidden)
        if state.hidden_states is not None:
            state.hidden_states[-1] = hidden
        return KVShareModelOutput(
            last_hidden_state=hidden,
            past_key_values=state.past,
            hidden_states=None if state.hidden_states is None else tuple(state.hidden_states),
            attentions=None if state.attentions is None else tuple(state.attentions),  # type: ignore[arg-type]
            kv_loss=state.kv_loss,
        )


def unused_projections(source: list[int]) -> list[str]:
    """Patterns of the key and value weights that a checkpoint of the plain model has and this model has not."""
    consumers = "|".join(str(i) for i, s in enumerate(source) if s != i)
    return [rf"layers\.({consumers})\.self_attn\.[kv]_proj\."] if consumers else []


class KVShareLlamaForCausalLM(LlamaForCausalLM):
    """The model with a language-modelling head."""

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
        """Run the model, with the arguments of ``LlamaForCausalLM`` and ``n_iter``, passes over a cyclic segment."""
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
