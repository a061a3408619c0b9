"""The cache of one batch, as transformers and the attention function use it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ...conf.errors import InputError
from ..sharing.kv_map import FULL
from ..sharing.plan import KVAccess, Plan
from .forward import LayerCall, NewTokens, Rows, rows_by_padding
from .inference_mode import under_inference_mode
from .layer import CacheLayer
from .prompt import ALL_QUERIES
from .recurrent import RecurrentStates
from .transformers_api import TransformersCache


class KVCache(TransformersCache):
    """The cache of one batch. Make it with :meth:`Method.new_cache`; it is used once and thrown away.

    Attributes:
        layers: cache layers; ``plan`` says which layers of the model use which.
        plan: see :class:`.sharing.plan.Plan`.
        passes: that a sharing model makes over layers that refer up; 0: as many as tokens; None: as its config says.
        is_warmup_pass: the forward under way is a pass that will be done again: nothing may be kept of it.
        prompt_length: columns of the whole prompt, set before a prompt is fed in chunks; None: the first forward is
            all of it.
        tokens_seen: real tokens of each row so far, [B] int64; the next token's position.
        new_tokens: what the forward under way adds.
        chunk_states: what each chunk of a prompt adds, by the column at which it ends, while each layer takes all
            chunks before the next layer begins; None: all layers take a chunk before the next chunk comes.
        frozen: see :meth:`make_static`.
        requantizes_on_append: the storage quantizes tokens after they are appended, so a multi-token forward is not
            equivalent to single-token steps.
        copies: rows a decode step has per row of the prompt (more than one in ``fan_out.py``).
        recomputes: holds no keys and values; the engine feeds it the whole sequence at each step (``no_cache.py``).
        separate_prefills: caches that prefill in place of this one, one after another (``fan_out.py``).
        states: of the model's recurrent layers; None: it has none.
    """

    recomputes = False
    copies = 1

    def __init__(self, layers: Sequence[Any], plan: Plan, passes: int | None = None):
        super().__init__(layers=list(layers))
        self.plan, self.passes = plan, passes
        self.first_layer = next(iter(plan.attending), 0)  # of the model's layers, the first to come here in a forward
        self.is_warmup_pass = False
        self.prompt_length: int | None = None
        self.tokens_seen: torch.Tensor | None = None
        self.new_tokens: NewTokens | None = None
        self.frozen = self.requantizes_on_append = self._checked = False
        self.chunk_states: dict[int, NewTokens] | None = None
        self.separate_prefills: list[KVCache] = []
        self.states: RecurrentStates | None = None

    def fork(self) -> KVCache:
        """A copy that goes on by itself, once the prompt is in: what one of them is fed, the other does not see."""
        return copy.deepcopy(self)

    # the attention function's side --------------------------------------------------------------------------------

    @under_inference_mode
    def attend(self, layer_idx: int, call: LayerCall, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of one layer of the model.

        Args:
            layer_idx: which.
            call: its queries, keys and values.
            padding_mask: [B, columns so far + n], or None: no padding.

        Returns:
            [B, H_q, m, D].
        """
        use = self.plan.uses[layer_idx]
        if self.is_warmup_pass:
            use = KVAccess(
                is_owner=False, strictly_causal=use.strictly_causal, is_last_reader=False, is_final_pass=False
            )
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
        """Look at a forward's padding once, for all of its layers."""
        batch, n = key.shape[0], key.shape[2]
        reading = any(layer.in_prefill for layer in self.layers)
        if padding_mask is not None and padding_mask.shape[1] != self.get_seq_length() + n:
            raise InputError(
                "past_key_values",
                f"a cache of {self.get_seq_length()} tokens",
                f"cannot take {n} new ones under a mask of {padding_mask.shape[1]}: it is for one text and its "
                "further turns, with use_cache=True; make a new one with Method.new_cache",
            )
        if not reading and not self._checked and not self.is_warmup_pass:
            self.check_prompt()
        seen, switch = self.get_seq_length(), self.plan.rope_switch
        if switch is not None and not reading and 0 < seen <= switch < seen + n:
            raise InputError(
                "model",
                f"RoPE of other frequencies beyond {switch} tokens (longrope)",
                f"a text of {seen} tokens cannot grow past that length with the keys that the cache holds; use prompts "
                f"that are longer, or end before it with their new tokens (task.max_length), or method=no_cache",
            )
        valid = None
        rows = [Rows(0, None)]
        in_prompt = reading or (self.prompt_length is not None and self.get_seq_length() < self.prompt_length)
        if padding_mask is not None and (in_prompt or n > 1):  # after the prompt a single new token is a real one
            mask = padding_mask.bool()
            valid = mask[:, -n:]
            if bool(valid.all()):
                valid = None
            if reading:
                rows = rows_by_padding(mask)
        if self.is_warmup_pass:
            return NewTokens(rows, valid, self.prompt_length)
        if self.tokens_seen is None:
            self.tokens_seen = torch.zeros(batch, dtype=torch.int64, device=key.device)
        # In a fan-out the copies of a row are fed alike: the first ones stand for all.
        more = n if valid is None else valid[: self.batch_size].sum(1)
        if self.frozen:  # the same tensor for every step
            self.tokens_seen += more
        else:
            self.tokens_seen = self.tokens_seen + more
        return NewTokens(rows, valid, self.prompt_length)

    def check_prompt(self) -> None:
        """Look at what the layers noted about the prompt's keys and values, once for all of them.

        Raises:
            InputError: some are NaN or infinite: NaN scores rank first, so what follows would be garbage.
        """
        self._checked = True
        noted = [layer for layer in self.layers if getattr(layer, "is_finite", None) is not None]
        if not noted:
            return
        flags = torch.stack([layer.is_finite.to(noted[0].is_finite.device) for layer in noted])
        if not bool(flags.all()):
            layer = noted[flags.tolist().index(False)]
            raise InputError(
                "model",
                f"layer {layer.model_layer}",
                f"gave {layer.names()} keys or values that are NaN or infinite; try dtype=float32",
            )

    def end_prompt(self) -> None:
        """Called once by the engine when the prompt is in."""
        self.check_prompt()

    def reserve(self, new_tokens: int) -> None:
        """Say how many tokens will come after the prompt: buffers then grow once for all of them.

        Only a hint: fewer or more may come. Room that a layer has beyond its tokens counts as stored.
        """
        for layer in self.layers:
            if isinstance(layer, CacheLayer):
                evicts = layer.capabilities.evicts_while_decoding
                layer.storage.expected = min(new_tokens, layer.storage.growth) if evicts else new_tokens

    @property
    def supports_static(self) -> bool:
        """Whether no step from here on need change a shape, so that one can be captured and replayed."""
        return not self.recomputes and all(
            isinstance(layer, CacheLayer) and layer.supports_static(self.plan.has_upward_kv_refs)
            for layer in self.layers
        )

    @under_inference_mode
    def make_static(self, steps: int) -> None:
        """See :meth:`.storage.base.LayerStorage.make_static`."""
        self.frozen = True
        for layer in self.layers:
            layer.policy.make_static(layer.state, layer.storage, steps)

    def static_state(self) -> list[torch.Tensor]:
        """What a step of a static cache changes; see :meth:`.storage.base.LayerStorage.static_state`."""
        assert self.frozen and self.tokens_seen is not None
        layers = (layer.storage.static_state() + layer.policy.static_state(layer.state) for layer in self.layers)
        return [self.tokens_seen, *itertools.chain(*layers)]

    @under_inference_mode
    def between_steps(self) -> None:
        """Called after each step of a static cache; see :meth:`.storage.base.LayerStorage.between_steps`."""
        for layer in self.layers:
            layer.storage.between_steps()
            layer.policy.between_steps(layer.state, layer.storage)

    def end_steps(self) -> None:
        """Called after the last step of a static cache; see :meth:`.storage.base.LayerStorage.end_steps`."""
        for layer in self.layers if self.frozen else []:
            layer.storage.end_steps()

    def skip(self, steps: int) -> None:
        """Count steps that were replayed instead of run."""
        for layer in self.layers:
            layer.seen += steps

    def next_positions(self) -> torch.Tensor:
        """Position of the next token of every decode row: [copies x B] int64."""
        assert self.tokens_seen is not None, "no prompt yet"
        return self.tokens_seen.repeat(self.copies)

    def extend(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where ``recomputes``: add columns of ids and mask; returns the whole sequence so far."""
        raise NotImplementedError

    def join(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Where there were ``separate_prefills``: go on together; their last logits as rows of this cache."""
        raise NotImplementedError

    def drop(self, member: int) -> None:
        """Where ``copies`` > 1: leave out a member whose rows have all ended."""
        raise NotImplementedError

    # the sharing models' side -------------------------------------------------------------------------------------

    @property
    def attends_whole_prompt(self) -> bool:
        """Every layer that is not the same for all methods attends over the complete prompt."""
        kinds = zip(self.layers, self.plan.layer_types, strict=True)
        return all(layer.capabilities.attends_whole_prompt for layer, kind in kinds if kind == FULL)

    @property
    def most_columns(self) -> int | None:
        """New columns that a forward may bring now; None: any number.

        Where several layers of the model share a cache layer, what leaves it leaves after the last of them: columns
        between which something leaves, or of which a layer above holds the keys, have to come in turn.
        """
        most = []
        for number, layer in enumerate(self.layers):
            if layer.in_prefill:
                continue
            uses = [u for u, c in zip(self.plan.uses, self.plan.cache_layer, strict=True) if c == number]
            if len(uses) > 1 and layer.capabilities.evicts_while_decoding and layer.span is None:
                most.append(layer.capabilities.prefill_block)
            if any(use.strictly_causal for use in uses):
                most.append(1)
        return min(most, default=None)

    @property
    def layers_are_independent(self) -> bool:
        """Each layer of the model has a cache layer to itself, and none looks at what another one does."""
        independent = not self.plan.shares and self.states is None
        return independent and not any(layer.capabilities.spans_layers for layer in self.layers)

    def queries_wanted(self, layer_idx: int) -> int:
        """Last queries of a forward that the cache layer of a layer of the model wants to see; 0: none."""
        layer = self.layers[self.plan.cache_layer[layer_idx]]
        return layer.observation_window if layer.in_prefill else ALL_QUERIES

    def recurrent_state(self, layer_idx: int, rows: int) -> torch.Tensor | None:
        """State of a retention layer for a forward of ``rows`` rows; None before the first token."""
        state: torch.Tensor | None = self.layers[self.plan.cache_layer[layer_idx]].recurrent_states[0]
        return state

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Keep the state of a recurrent layer."""
        if self.states is not None:
            return self.states.cache.update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        self.layers[self.plan.cache_layer[layer_idx]].update(recurrent_states)
        return recurrent_states

    # bytes --------------------------------------------------------------------------------------------------------

    @property
    def kv_bytes_stored(self) -> int:
        """Bytes of memory the cache keeps allocated: each storage once, scales, masks, padding and room included."""
        states = [] if self.states is None else self.states.tensors()
        return stored_bytes(itertools.chain(states, *(layer.tensors() for layer in self.layers)))

    @property
    def kv_bytes_logical(self) -> int:
        """Bytes of the real tokens held, without padding and room to grow."""
        states = 0 if self.states is None else self.states.nbytes
        return states + sum(layer.logical_bytes for layer in self.layers)

    @property
    def tokens_held(self) -> list[torch.Tensor]:
        """Real tokens held: one [B, 1 or H] tensor a layer."""
        return [layer.tokens for layer in self.layers]


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage counted once however many views it has."""
    return sum({(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}.values())
