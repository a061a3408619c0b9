"""KV cache of one batch: the interface for the attention function, the engine and the layer-sharing models.

A *column* is one token position of a left-padded batch. Legend: B batch rows, H_q query heads, H KV heads, n new
columns of a forward, m <= n of them with a query, D channels.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...conf.errors import InputError
from ..sharing.kv_map import FULL
from ..sharing.plan import Plan
from .forward import LayerCall, NewTokens, Rows, rows_by_padding
from .inference_mode import under_inference_mode
from .layer import CacheLayer
from .prompt import ALL_QUERIES
from .recurrent import RecurrentStates
from .transformers_api import TransformersCache


class KVCache(TransformersCache):
    """KV cache of one batch, made by :meth:`Method.new_cache` and not reusable.

    Attributes:
        layers: Cache layers; ``plan`` maps the layers of the model to them.
        plan: See :class:`.sharing.plan.Plan`.
        passes: Encoding passes if layers read keys of a higher layer; 0: one per token; None: as in the model's config.
        is_warmup_pass: Set during non-final encoding passes, in which the cache must not be modified.
        prompt_length: Columns of the whole prompt, set before a chunked prefill; None: those of the first forward.
        tokens_seen: [B] int64, real tokens of each row so far, which is the position of the next token.
        new_tokens: Token metadata of the current forward.
        chunk_states: Per-chunk token metadata of a layer-by-layer chunked prefill, keyed by the chunk's end column;
            None: every layer processes a chunk before the next chunk begins.
        is_static: Whether the tensors have their final shapes; see :meth:`make_static`.
        requantizes_on_append: Whether the storage quantizes tokens after they are appended, so that a multi-token
            forward is not equivalent to single-token steps.
        copies: Decode rows per prompt row (more than one in ``fan_out.py``).
        recomputes: Whether every step recomputes the whole sequence (``no_cache.py``).
        separate_prefills: Caches that prefill one after another in place of this one (``fan_out.py``).
        states: States of the model's recurrent layers, or None.
        on_first_forward: Called with the cache in the first forward, or None; ``narrowing.py`` sets it.
    """

    recomputes, copies = False, 1
    on_first_forward: Callable[[KVCache], None] | None = None

    def __init__(self, layers: Sequence[Any], plan: Plan, passes: int | None = None):
        super().__init__(layers=list(layers))
        self.plan, self.passes, self.is_warmup_pass = plan, passes, False
        self.first_layer = next(iter(plan.attending), 0)  # the first layer of the model that attends in a forward
        self.prompt_length: int | None = None
        self.tokens_seen: torch.Tensor | None = None
        self.new_tokens: NewTokens | None = None
        self.is_static = self.requantizes_on_append = self._checked = False
        self.chunk_states: dict[int, NewTokens] | None = None
        self.separate_prefills: list[KVCache] = []
        self.states: RecurrentStates | None = None

    def fork(self) -> KVCache:
        """Return an independent copy, to continue one prompt in several ways; call it after the prefill."""
        return copy.deepcopy(self)

    # interface for the attention function -------------------------------------------------------------------------

    @under_inference_mode
    def attend(self, layer_idx: int, call: LayerCall, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Append the new tokens of one layer of the model and attend.

        Args:
            layer_idx: Index of the layer in the model.
            call: Queries, keys and values of the layer.
            padding_mask: [B, columns so far + n] bool, False for pads; None: no padding.

        Returns:
            [B, H_q, m, D].
        """
        use = self.plan.uses[layer_idx]
        if self.is_warmup_pass:
            use = replace(use, is_owner=False, is_last_reader=False, is_final_pass=False)
        layer = self.layers[self.plan.cache_layer[layer_idx]]
        end = layer.get_seq_length() + call.columns
        if layer_idx == self.first_layer:
            self.new_tokens = self._begin(call.key, padding_mask)
            if self.chunk_states is not None:
                self.chunk_states[end] = self.new_tokens
        elif self.chunk_states is not None:
            self.new_tokens = self.chunk_states[end]
        assert self.new_tokens is not None
        return layer.attend(call, self.new_tokens.on(call.key.device), use)

    def _begin(self, key: torch.Tensor, padding_mask: torch.Tensor | None) -> NewTokens:
        """Check the input of a forward and derive its token metadata, once for all layers."""
        batch, n = key.shape[0], key.shape[2]
        if self.on_first_forward is not None:
            self.on_first_forward(self)
            self.on_first_forward = None
        in_prefill = any(layer.in_prefill for layer in self.layers)
        if padding_mask is not None and padding_mask.shape[1] != self.get_seq_length() + n:
            raise InputError(
                "past_key_values",
                f"a cache of {self.get_seq_length()} tokens",
                f"cannot take {n} new tokens with an attention mask of {padding_mask.shape[1]}: it serves one text and "
                "its later turns, with use_cache=True; make a new one with Method.new_cache",
            )
        if not in_prefill and not self._checked and not self.is_warmup_pass:
            self.check_prompt()
        seen, switch = self.get_seq_length(), self.plan.rope_switch
        if switch is not None and not in_prefill and 0 < seen <= switch < seen + n:
            raise InputError(
                "model",
                f"RoPE of other frequencies beyond {switch} tokens (longrope)",
                f"a text of {seen} tokens cannot grow past that length with keys of the other frequencies; use prompts "
                "that are longer, or that stay below it with their new tokens (task.max_length), or method=no_cache",
            )
        valid, rows = None, [Rows(0, None, None, self.text_seeds, self.question_tokens)]
        in_prompt = in_prefill or (self.prompt_length is not None and self.get_seq_length() < self.prompt_length)
        if padding_mask is not None and (in_prompt or n > 1):  # a single token after the prompt is never a pad
            mask = padding_mask.bool()
            valid = None if bool(mask[:, -n:].all()) else mask[:, -n:]
            if in_prefill:
                rows = rows_by_padding(mask, self.text_seeds, self.question_tokens)
        if self.is_warmup_pass:
            return NewTokens(rows, valid, self.prompt_length)
        if self.tokens_seen is None:
            self.tokens_seen = torch.zeros(batch, dtype=torch.int64, device=key.device)
        # The copies of a row in a fan-out have the same padding, so the first B rows are enough.
        new_count = n if valid is None else valid[: self.batch_size].sum(1)
        if self.is_static:  # a captured step needs the same tensor every time
            self.tokens_seen += new_count
        else:
            self.tokens_seen = self.tokens_seen + new_count
        return NewTokens(rows, valid, self.prompt_length)

    def check_prompt(self) -> None:
        """Check that the prompt's keys and values are finite, with one device sync for all layers.

        Raises:
            InputError: Some are NaN or infinite. NaN scores rank first in top-k, so fail loudly.
        """
        self._checked = True
        flagged = [layer for layer in self.layers if getattr(layer, "is_finite", None) is not None]
        flags = [layer.is_finite.to(flagged[0].is_finite.device) for layer in flagged]
        if flags and not bool(torch.stack(flags).all()):
            layer = flagged[torch.stack(flags).tolist().index(False)]
            raise InputError(
                "model",
                f"layer {layer.model_layer}",
                f"gave {layer.method_names()} keys or values that are NaN or infinite; try dtype=float32",
            )

    # interface for the engine -------------------------------------------------------------------------------------

    def finish_prefill(self) -> None:
        """Check the prompt; the engine calls it once after the prefill."""
        self.check_prompt()

    def reserve(self, new_tokens: int) -> None:
        """Reserve buffer slots for the tokens to generate (a hint); unused slots count as stored bytes."""
        for layer in self.layers:
            if isinstance(layer, CacheLayer):
                evicts = layer.capabilities.evicts_while_decoding
                layer.storage.reserved = min(new_tokens, layer.storage.growth) if evicts else new_tokens

    @property
    def static_problem(self) -> str | None:
        """Why further decode steps cannot run over fixed shapes, as a captured one has to; None: they can."""
        return next((layer.static_problem for layer in self.layers if layer.static_problem is not None), None)

    @under_inference_mode
    def make_static(self, steps: int) -> None:
        """Give all tensors their final shapes; see :meth:`.storage.base.LayerStorage.make_static`."""
        self.is_static = True
        for layer in self.layers:
            layer.make_static(steps)

    def static_state(self) -> list[torch.Tensor]:
        """Return the tensors that a static step changes; see :meth:`.storage.base.LayerStorage.static_state`."""
        assert self.is_static and self.tokens_seen is not None
        return [self.tokens_seen, *itertools.chain(*(layer.static_state() for layer in self.layers))]

    @under_inference_mode
    def between_steps(self) -> None:
        """Do the uncaptured work after a static step; see :meth:`.storage.base.LayerStorage.between_steps`."""
        for layer in self.layers:
            layer.between_steps()

    def end_steps(self) -> None:
        """End the steps of a static cache; see :meth:`.storage.base.LayerStorage.end_steps`."""
        for layer in self.layers if self.is_static else []:
            layer.end_steps()

    def skip(self, steps: int) -> None:
        """Advance the sequence length by ``steps`` that were replayed as a graph."""
        for layer in self.layers:
            layer.skip(steps)

    def next_positions(self) -> torch.Tensor:
        """Return the position of the next token of every decode row, [copies * B] int64."""
        assert self.tokens_seen is not None, "no prompt yet"
        return self.tokens_seen.repeat(self.copies)

    def extend(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns of ids and mask and return the whole sequence; only if ``recomputes``."""
        raise NotImplementedError

    def join(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Merge finished ``separate_prefills`` into this cache; returns their last logits as its rows."""
        raise NotImplementedError

    def drop(self, member: int) -> None:
        """Remove a fan-out member whose rows have all finished."""
        raise NotImplementedError

    # interface for layer-sharing models ---------------------------------------------------------------------------

    @property
    def attends_whole_prompt(self) -> bool:
        """Whether every full-attention layer attends over the complete prompt."""
        kinds = zip(self.layers, self.plan.layer_types, strict=True)
        return all(layer.capabilities.attends_whole_prompt for layer, kind in kinds if kind == FULL)

    @property
    def max_new_columns(self) -> int | None:
        """Maximum number of new columns in the next forward; None: unlimited.

        Where layers of the model share a cache layer, tokens are evicted after the last of these layers, and a forward
        must end there. It must also end where a lower layer needs the keys of a higher one.
        """
        limits = []
        for number, layer in enumerate(self.layers):
            if layer.in_prefill:
                continue
            uses = [u for u, c in zip(self.plan.uses, self.plan.cache_layer, strict=True) if c == number]
            if len(uses) > 1 and layer.capabilities.max_step_tokens is not None:
                limits.append(layer.capabilities.max_step_tokens)
            if any(use.strictly_causal for use in uses):
                limits.append(1)
        return min(limits, default=None)

    @property
    def layers_are_independent(self) -> bool:
        """Whether each layer of the model has its own cache layer and none depends on another layer's."""
        independent = not self.plan.shares and self.states is None
        return independent and not any(layer.capabilities.spans_layers for layer in self.layers)

    def num_observed_queries(self, layer_idx: int) -> int:
        """Number of last queries of a forward that the cache needs from a layer of the model; 0: none."""
        layer = self.layers[self.plan.cache_layer[layer_idx]]
        return layer.observation_window if layer.in_prefill else ALL_QUERIES

    def recurrent_state(self, layer_idx: int, rows: int) -> torch.Tensor | None:
        """Return the state of a retention layer for a forward of ``rows`` rows; None before the first token."""
        state: torch.Tensor | None = self.layers[self.plan.cache_layer[layer_idx]].recurrent_states[0]
        return state

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Store the state of a recurrent layer and return it."""
        if self.states is not None:
            return self.states.cache.update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        self.layers[self.plan.cache_layer[layer_idx]].update(recurrent_states)
        return recurrent_states

    # bytes --------------------------------------------------------------------------------------------------------

    @property
    def kv_bytes_stored(self) -> int:
        """Allocated bytes: each storage counted once, with scales, masks, padding and unused slots."""
        return stored_bytes(t for part in (*self.layers, self.states) if part is not None for t in part.tensors())

    @property
    def kv_bytes_logical(self) -> int:
        """Bytes of the real tokens stored, without padding and unused slots; also named ``kv_bytes``."""
        return sum((layer.logical_bytes for layer in self.layers), self.states.nbytes if self.states else 0)

    kv_bytes = kv_bytes_logical

    @property
    def kv_bytes_read_per_step(self) -> int:
        """Bytes that the last decode step read; a layer's count once for each layer of the model that reads it."""
        read = [layer.step_bytes_read * self.plan.cache_layer.count(i) for i, layer in enumerate(self.layers)]
        return sum(read, self.states.nbytes if self.states else 0)

    @property
    def tokens_held(self) -> list[torch.Tensor]:
        """Number of real tokens stored, one int64 tensor [B, 1 or H] per layer."""
        return [layer.tokens for layer in self.layers]


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages behind ``tensors``, each storage counted once however many views it has."""
    return sum({(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}.values())
