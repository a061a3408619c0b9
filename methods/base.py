"""A method, and the cache it makes: selection x storage, one layer at a time.

    method = Method("snapkv", SnapKV(budget=512))
    cache = method.new_cache(model)             # one batch; thrown away afterwards
    model.generate(**inputs, past_key_values=cache)

The cache works in ``model.generate`` and in :mod:`kvbench.runners.engine` alike: the model's layers hand their new
queries, keys and values to :meth:`KVCache.attend` through the registered attention function (``attention.py``).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..conf.errors import InputError
from .attention import announce, repeat_heads, tag, use_kvbench_attention
from .inference_mode import under_inference_mode
from .logits import LogitRule
from .named import allocators, token_methods
from .policies.allocators.base import Allocator
from .prompt import Prompt, PromptReader, Rows
from .recurrent import RecurrentStates
from .selection.base import ALL_QUERIES, ModelLayer, Selection, Step
from .selection.local import LocalAttention
from .selection.streaming_llm import BLOCK
from .sharing.base import Sharing
from .sharing.plan import FULL, LINEAR, KVAccess, Plan, Span, plan_of
from .sharing.recurrent import RecurrentLayer
from .storage.base import KVShape, LayerStorage, LocalShape, Storage
from .storage.dense import COMPACTION_INTERVAL_STEPS, Dense


@dataclass(frozen=True)
class Method:
    """One way of holding a KV cache.

    Attributes:
        name: as typed after ``method=``.
        selection: which tokens each layer keeps.
        storage: how kept tokens are represented.
        sharing: which layers own keys and values at all, a part of the model; None: as the model at hand has it.
        budget: where the key ``method.budget`` stands; the selection takes its own from there and is what counts.
        allocator: likewise the group ``method/allocator``.
    """

    name: str
    selection: Selection = field(default_factory=Selection)
    storage: Storage = field(default_factory=Dense)
    sharing: Sharing | None = None
    budget: int | float | None = None
    allocator: Allocator | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self._check_name()
        if self.allocator is not None and self.allocator != getattr(self.selection, "allocator", None):
            raise InputError(
                "method.allocator",
                self.allocator.id,
                "is not the selection's own; in Python pass it there, as in SnapKV(budget=64, allocator=Adaptive())",
            )
        if self.storage.requires_same_tokens_across_layers and not self.selection.keeps_everything:
            raise InputError(
                "method/storage",
                self.storage.name,
                f"shares tokens between layers, and under method={self.name} each layer keeps its own; use method=full",
            )
        if self.selection.evicts_while_decoding and not self.storage.is_exact:
            raise InputError(
                "method/storage",
                self.storage.name,
                f"holds rounded tokens, and method={self.name} lets tokens leave while decoding, which would round the "
                "others again and again; use method/storage=dense, or a method that evicts after the prompt alone",
            )
        if self.sharing is not None and self.sharing.shares:
            self._check_sharing()

    @property
    def shares_prompt(self) -> bool:
        """Whether other methods can ride on the same reading of the prompt (``fan_out.py``)."""
        return self.selection.reads_whole_prompt

    @property
    def shares_steps(self) -> bool:
        """Whether other methods can ride on the same decode steps (``fan_out.py``)."""
        return True

    def _check_name(self) -> None:
        """Refuse a full cache under another method's name, or with a budget that nothing keeps.

        ``method=full`` accepts a budget and ignores it, so that a sweep can include it; likewise what saves bits or
        layers.
        """
        if type(self) is not Method or self.name == "full" or not self.selection.keeps_everything:
            return
        methods = token_methods()
        is_plain = self.storage.is_exact and self.sharing is None
        if methods.get(self.name) or (is_plain and (self.name in methods or self.budget is not None)):
            budget = "" if self.budget is None else f"budget={self.budget}"
            raise InputError(
                "method",
                f"{self.name} {budget}".strip(),
                "is given no selection, storage or sharing of that name, so every token would stay; in Python pass the "
                f'selection, as in Method("snapkv", SnapKV(budget=64)), or call '
                f'kvbench.method("{self.name}"{budget and f", {budget}"})',
            )

    def _check_sharing(self) -> None:
        """What cannot be held where layers share keys and values."""
        if self.selection.spans_layers:
            raise InputError(
                "method",
                self.name,
                "drops tokens between layers, which then cannot share keys and values; use it on a plain model",
            )
        if self.storage.requires_same_tokens_across_layers:
            raise InputError(
                "method/storage",
                self.storage.name,
                "merges neighbouring layers' keys and values, and here layers share them already; use dense or kivi4",
            )
        if self.selection.stores_query_heads:
            raise InputError(
                "method.selection.granularity",
                "query_head",
                "would store keys for the query heads of every layer that shares them; use kv_head",
            )

    @property
    def passes(self) -> int | None:
        """See :attr:`.sharing.base.Sharing.passes`; only methods with the same can ride on one reading of a prompt."""
        return None if self.sharing is None else self.sharing.passes

    def new_cache(self, model: PreTrainedModel) -> KVCache:
        """An empty cache for one batch of ``model``, which is switched to kvbench's attention function.

        Where layers of the model share keys and values, there is a cache layer for each that owns some: one choice of
        tokens, by the queries of all that attend over them. A layer of local attention holds its span, and a recurrent
        one its state, whatever the method.

        Raises:
            InputError: the model cannot be served, or the method cannot be used on a model that shares as this one
                does.
        """
        from .layout import layout_of, reset_rope, rotary_of  # at run time: it makes a cache to try the model with

        use_kvbench_attention(model)
        config = model.config.get_text_config()
        if self.sharing is not None:
            self.sharing.fit(config)
        plan = layout_of(model).plan
        reset_rope(model)
        if plan.shares:
            self._check_sharing()
        if self.selection.spans_layers and not plan.is_uniform:
            raise InputError(
                "method",
                self.name,
                "drops tokens between layers; use it on a model all of whose layers attend over all tokens",
            )
        if plan.has_upward_kv_refs and self.selection.reads_prompt_by_steps:
            raise InputError(
                "method",
                self.name,
                "takes a prompt step by step, and a model whose layers refer up encodes it in several passes; "
                "use method.selection.mode=prefill_evict",
            )
        count = plan.layer_types.count(FULL)
        if not count and not (self.selection.keeps_everything and self.storage.is_exact):
            raise InputError(
                "method",
                self.name,
                f"works on layers that attend over all tokens, and {type(model).__name__} as configured has none: each "
                "holds a window whatever the method; use method=full",
            )
        storage = iter(self.storage.new_layers(count))
        layers: list[Any] = []
        states = RecurrentStates(config, plan.recurrent) if plan.recurrent else None
        for number, (owner, kind, span) in enumerate(zip(plan.owners, plan.layer_types, plan.spans, strict=True)):
            if kind == LINEAR:
                layers.append(RecurrentLayer() if states is None else states.cache.layers[owner])
                continue
            selection = self.selection if span is None else LocalAttention(span)
            held: LayerStorage = next(storage) if span is None else Dense().new_layers(1)[0]
            state = selection.new_state(ModelLayer(owner, partial(rotary_of, model, owner, self.name)))
            place = plan.layer_types[:number].count(kind)
            layer = CacheLayer(place, count, selection, state, held, span)
            layer.model_layer = owner
            layers.append(layer)
        cache = KVCache(layers, plan, self.passes)
        cache.states = states
        cache.requantizes_on_append = not self.storage.is_exact
        self.selection.attach(model, cache)
        return cache

    def bytes_formula(self, shape: KVShape, prompt_length: int, new_tokens: int = 0) -> int:
        """Bytes that one sequence should take after a prompt and ``new_tokens`` further tokens, by the formula."""
        return self._bytes(shape, [1] * shape.layers, prompt_length, new_tokens)

    def bytes_read_formula(self, model: PreTrainedModel, prompt_length: int, new_tokens: int = 0) -> int:
        """Bytes of the cache that a decode step reads: each cache layer once for each layer that attends over it."""
        plan, shape = plan_of(model.config.get_text_config()), model_shape(model)
        times = {
            span: sum(plan.cache_layer.count(n) for n, s in enumerate(plan.spans) if s == span) for span in plan.spans
        }
        shape = replace(shape, local=tuple(replace(x, layers=times[x.span]) for x in shape.local))
        return self._bytes(shape, plan.consumers(FULL), prompt_length, new_tokens, read=True)

    def _bytes(
        self, shape: KVShape, times: Sequence[int], prompt_length: int, new_tokens: int, read: bool = False
    ) -> int:
        """By the formula, with the l-th layer of full attention counted ``times[l]`` times."""
        tokens = self.selection.kept_tokens(prompt_length, new_tokens, shape.layers)
        tokens = [n for n, count in zip(tokens, times, strict=True) for _ in range(count)]
        formula = self.storage.bytes_read_formula if read else self.storage.bytes_formula
        heads = shape.query_heads if self.selection.stores_query_heads else shape.kv_heads
        stored = formula(tokens, heads, shape, new_tokens)
        state = self.selection.state_bytes(prompt_length, new_tokens, shape.layers, heads)
        return stored + state + shape.fixed_bytes(prompt_length + new_tokens)

    def identity(self) -> dict[str, Any]:
        """What decides this method's numbers, as plain data: see :class:`.conf.identity.HasIdentity`."""
        parts: dict[str, Any] = {"name": self.name}
        for part in ("selection", "storage", "sharing"):
            value = getattr(self, part)
            if value is not None:  # a run from before there was such a part is the same run
                parts[part] = value.identity()
        return parts

    @property
    def label(self) -> str:
        """Short name for tables: ``snapkv 512``, ``cla2 + kivi4``, ``key_diff 64 + adaptive``.

        Lossless storages only differ in size, so they are not shown.
        """
        text = self.name if self.effective_budget is None else f"{self.name} {self.effective_budget}"
        allocator = getattr(self.selection, "allocator", None)
        if allocator is not None and allocator.id != allocators().get(self.name, "uniform"):
            text = f"{text} + {allocator.id}"
        if self.sharing is not None:
            text = self.sharing.label if self.selection.keeps_everything else f"{self.sharing.label} + {text}"
        elif self.storage.name.startswith(self.name):  # the method is its storage: ``kivi4``
            return self.storage.name
        return text if self.storage.is_exact else f"{text} + {self.storage.name}"

    @property
    def effective_budget(self) -> int | float | None:
        """The selection's budget, or None where it has none (``full`` accepts ``method.budget`` and ignores it)."""
        return getattr(self.selection, "budget", None)


@dataclass
class NewTokens:
    """What a forward adds, worked out once and shared by its layers.

    Attributes:
        rows: the batch grouped by leading pads, while the prompt is read.
        valid: [B, n] bool, False for pads; None: all real.
        prompt_length: columns of the whole prompt; None: this forward is all of it.
    """

    rows: list[Rows]
    valid: torch.Tensor | None
    prompt_length: int | None

    def on(self, device: torch.device) -> NewTokens:
        """The same for a layer that lies on another device."""
        one = self.valid if self.valid is not None else next((r.index for r in self.rows if r.index is not None), None)
        if one is None or one.device == device:
            return self
        rows = [Rows(r.pads, None if r.index is None else r.index.to(device)) for r in self.rows]
        return NewTokens(rows, None if self.valid is None else self.valid.to(device), self.prompt_length)


@dataclass(frozen=True)
class KeptRows:
    """What stays of the rows of one prompt length: see :class:`.selection.base.Kept`; ``length`` in tokens."""

    rows: Rows
    length: int
    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None
    scores: torch.Tensor | None


class CacheLayer(PromptReader):
    """One layer: reads the prompt, keeps what the selection says in the storage, then takes step after step."""

    is_sliding = False  # read by transformers
    is_compileable = record_past = False

    def __init__(
        self,
        layer_idx: int,
        num_layers: int,
        selection: Selection,
        state: Any,
        storage: LayerStorage,
        span: Span | None = None,
    ):
        super().__init__(layer_idx, num_layers, selection.observation_window, span)
        self.selection, self.state, self.storage = selection, state, storage
        if selection.evicts_while_decoding:  # more slots than steps between two moves are never in use
            storage.growth = COMPACTION_INTERVAL_STEPS
        self.reading = not selection.reads_prompt_by_steps

    def names(self) -> str:
        return type(self.selection).__name__

    @property
    def evicts_while_decoding(self) -> bool:
        return self.selection.evicts_while_decoding

    @property
    def reads_prompt_by_steps(self) -> bool:
        return self.selection.reads_prompt_by_steps

    @property
    def spans_layers(self) -> bool:
        return self.selection.spans_layers

    def absorb(self, prompts: list[tuple[Rows, Prompt]]) -> None:
        """Compress the prompt: every group of rows gets its selection, then all are stored as one batch."""
        groups = []
        for rows, prompt in prompts:
            keys, values = prompt.keys, prompt.values
            kept = self.selection.select(prompt, self.state)
            if self.selection.stores_query_heads:
                keys, values = repeat_heads(keys, prompt.groups), repeat_heads(values, prompt.groups)
            if kept.slots is not None:
                slots = kept.slots[..., None]
                keys, values = (x.gather(2, slots.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
            groups.append(KeptRows(rows, prompt.length, keys, values, kept.valid, kept.scores))
        lengths, scores = self._store(groups)
        self.selection.after_prompt(self.state, lengths, scores)

    def _store(self, groups: list[KeptRows]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Write the groups as one batch, padded on the left to the longest; returns prompt lengths [B] and scores."""
        first = groups[0]
        if len(groups) == 1:
            self.storage.write(first.keys, first.values, first.valid)
            lengths = torch.full((first.keys.shape[0],), first.length, dtype=torch.int64, device=first.keys.device)
            return lengths, first.scores
        batch = sum(g.keys.shape[0] for g in groups)
        width = max(g.keys.shape[2] for g in groups)
        heads = max(1 if g.valid is None else g.valid.shape[1] for g in groups)
        keys, values = (x.new_zeros(batch, x.shape[1], width, x.shape[3]) for x in (first.keys, first.values))
        valid = torch.zeros(batch, heads, width, dtype=torch.bool, device=keys.device)
        lengths = torch.zeros(batch, dtype=torch.int64, device=keys.device)
        scores = None if first.scores is None else first.scores.new_zeros(*keys.shape[:3])
        for g in groups:
            start = width - g.keys.shape[2]
            keys[g.rows.index, :, start:] = g.keys
            values[g.rows.index, :, start:] = g.values
            valid[g.rows.index, :, start:] = True if g.valid is None else g.valid
            lengths[g.rows.index] = g.length
            if scores is not None and g.scores is not None:
                scores[g.rows.index, :, start:] = g.scores
        self.storage.write(keys, values, None if bool(valid.all()) else valid)
        return lengths, scores

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: LogitRule,
        new: NewTokens,
        use: KVAccess,
        new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One layer of the model comes here: [B, H_q, n, D] queries in, the same shape out."""
        if self.reading:
            return self.read_prompt(query, key, value, rule, new.rows, new.prompt_length, use, new_kv)
        if new_kv is not None:
            key, value = new_kv
        if self.selection.stores_query_heads:
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        out = self.selection.attend(self.state, self.storage, Step(query, key, value, rule, new.valid, use))
        if use.is_last_reader:
            self.seen += key.shape[2]
            self.storage.settle()
            if self.seen == new.prompt_length:
                self.storage.trim()
        return out

    def get_seq_length(self) -> int:
        """Columns fed so far (pads included): what transformers counts positions and masks by."""
        return self.seen

    @property
    def tokens(self) -> torch.Tensor:
        """Real tokens held, [B, 1 or H], int64."""
        return self.storage.tokens

    def tensors(self) -> list[torch.Tensor]:
        """Everything this layer holds in memory."""
        return self.storage.tensors() + self.selection.state_tensors(self.state)

    @property
    def logical_bytes(self) -> int:
        """Bytes of the real tokens held and of what the selection keeps count of."""
        return self.storage.logical_bytes + self.selection.logical_state_bytes(self.state, self.storage.tokens)


class KVCache(Cache):
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
        pieces: what each piece of a prompt adds, by the column at which it ends, while each layer reads all pieces
            before the next layer begins; None: all layers read a piece before the next piece comes.
        frozen: see :meth:`freeze`.
        rounds: what is held is rounded as it ages, so several tokens fed together are not one after another.
        copies: rows a decode step has per row of the prompt (more than one in ``fan_out.py``).
        recomputes: holds no keys and values; the engine feeds it the whole sequence at each step (``no_cache.py``).
        readings: caches that read the prompt in place of this one, one after another (``fan_out.py``).
        states: of the model's recurrent layers; None: it has none.
    """

    recomputes = False
    copies = 1
    layers: list[Any]  # CacheLayer, or FanOutLayer: transformers' own layer classes hold tensors in their own way

    def __init__(self, layers: Sequence[Any], plan: Plan, passes: int | None = None):
        super().__init__(layers=list(layers))
        self.plan, self.passes = plan, passes
        self.first_layer = next(iter(plan.attending), 0)  # of the model's layers, the first to come here in a forward
        self.is_warmup_pass = False
        self.prompt_length: int | None = None
        self.tokens_seen: torch.Tensor | None = None
        self.new_tokens: NewTokens | None = None
        self.frozen = False
        self.requantizes_on_append = False
        self.chunk_states: dict[int, NewTokens] | None = None
        self.readings: list[KVCache] = []
        self.states: RecurrentStates | None = None
        self._checked = False

    def fork(self) -> KVCache:
        """A copy that goes on by itself, once the prompt is in: what one of them is fed, the other does not see."""
        return copy.deepcopy(self)

    # transformers' side -------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass the new keys and values straight through, with this cache's name on them.

        Raises:
            InputError: the layer before attended by code of its own, or this one should have no keys.
        """
        if layer_idx not in self.plan.attending:
            raise InputError("model", f"layer {layer_idx}", "gives keys and values that its config does not speak of")
        announce(self, layer_idx)
        return tag(key_states, self), value_states

    def __bool__(self) -> bool:
        """False: Phi-3's ``generate`` throws a true cache away where RoPE changes; this one refuses (``_begin``)."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if layer_idx not in self.plan.attending:
            layer_idx = self.first_layer
        return self.layers[self.plan.cache_layer[layer_idx]].get_seq_length()

    # the recurrent layers' calls go to transformers' own cache

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        return self.states is not None and self.states.cache.has_previous_state(layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return self._states.cache.get_conv_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._states.cache.update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return self._states.cache.get_recurrent_state(layer_idx, *args, **kwargs)

    @property
    def _states(self) -> RecurrentStates:
        if self.states is None:
            raise InputError("model", "a recurrent layer", "keeps a state that its config does not speak of")
        return self.states

    @property
    def is_sliding(self) -> list[bool]:
        """transformers sizes masks by it; here every layer counts the columns that it has seen."""
        return [False] * len(self.plan.cache_layer)

    is_linear = is_dummy = is_sliding

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not query_length:
            raise InputError(
                "past_key_values",
                f"a cache of {self.get_seq_length()} tokens",
                "is given no new ones: a text must be longer than what its cache has seen; make a new one",
            )
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.tokens_seen is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.tokens_seen is None else self.tokens_seen.shape[0]

    def reset(self) -> None:
        raise NotImplementedError("a kvbench cache is used once: make a new one with Method.new_cache")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("beam search is not supported by kvbench caches: use num_beams=1")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a compressed cache cannot be cropped: tokens that left it cannot come back")

    # the attention function's side --------------------------------------------------------------------------------

    @under_inference_mode
    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: LogitRule,
        padding_mask: torch.Tensor | None,
        new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of one layer of the model.

        Args:
            layer_idx: which.
            query: [B, H_q, m, D] of the last m of n new columns.
            key, value: [B, H_kv, n, D], what the new columns show.
            rule: how logits are formed.
            padding_mask: [B, columns so far + n], or None: no padding.
            new_kv: what the new columns leave in the cache, where that is not ``key`` and ``value``.

        Returns:
            [B, H_q, m, D].
        """
        use = self.plan.uses[layer_idx]
        if self.is_warmup_pass:
            use = KVAccess(
                is_owner=False, strictly_causal=use.strictly_causal, is_last_reader=False, is_final_pass=False
            )
        layer = self.layers[self.plan.cache_layer[layer_idx]]
        end = layer.get_seq_length() + key.shape[2]
        if layer_idx == self.first_layer:
            self.new_tokens = self._begin(key, padding_mask)
            if self.chunk_states is not None:
                self.chunk_states[end] = self.new_tokens
        elif self.chunk_states is not None:
            self.new_tokens = self.chunk_states[end]
        assert self.new_tokens is not None
        return layer.attend(query, key, value, rule, self.new_tokens.on(key.device), use, new_kv)

    def _begin(self, key: torch.Tensor, padding_mask: torch.Tensor | None) -> NewTokens:
        """Look at a forward's padding once, for all of its layers."""
        batch, n = key.shape[0], key.shape[2]
        reading = any(layer.reading for layer in self.layers)
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
                slots = min(new_tokens, layer.storage.growth) if layer.evicts_while_decoding else new_tokens
                layer.storage.expected = slots

    @property
    def can_freeze(self) -> bool:
        """Whether no step from here on changes a shape: every layer holds all that comes, as it is."""
        return not self.recomputes and all(
            isinstance(layer, CacheLayer)
            and not layer.reading
            and layer.storage.can_freeze
            and type(layer.selection).attend is Selection.attend
            for layer in self.layers
        )

    @under_inference_mode
    def make_static(self, room: int) -> None:
        """See :meth:`.storage.base.LayerStorage.make_static`."""
        self.frozen = True
        for layer in self.layers:
            layer.storage.make_static(room)

    def skip(self, steps: int) -> None:
        """Count steps that were replayed instead of run."""
        for layer in self.layers:
            layer.seen += steps

    @under_inference_mode
    def rollback(self) -> None:
        """Undo the last step of a frozen cache."""
        assert self.frozen and self.tokens_seen is not None
        self.skip(-1)
        self.tokens_seen -= 1
        for layer in self.layers:
            layer.storage.rollback()

    def next_positions(self) -> torch.Tensor:
        """Position of the next token of every decode row: [copies x B] int64."""
        assert self.tokens_seen is not None, "no prompt yet"
        return self.tokens_seen.repeat(self.copies)

    def extend(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where ``recomputes``: add columns of ids and mask; returns the whole sequence so far."""
        raise NotImplementedError

    def join(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Where there were ``readings``: go on together; their last logits as rows of this cache."""
        raise NotImplementedError

    def drop(self, member: int) -> None:
        """Where ``copies`` > 1: leave out a member whose rows have all ended."""
        raise NotImplementedError

    # the sharing models' side -------------------------------------------------------------------------------------

    @property
    def reads_whole_prompt(self) -> bool:
        """Every layer that is not the same for all methods attends over the complete prompt."""
        kinds = zip(self.layers, self.plan.layer_types, strict=True)
        return all(layer.selection.reads_whole_prompt for layer, kind in kinds if kind == FULL)

    @property
    def most_columns(self) -> int | None:
        """New columns that a forward may bring now; None: any number.

        Where several layers of the model share a cache layer, what leaves it leaves after the last of them: columns
        between which something leaves, or of which a layer above holds the keys, have to come in turn.
        """
        most = []
        for number, layer in enumerate(self.layers):
            if layer.reading:
                continue
            uses = [u for u, c in zip(self.plan.uses, self.plan.cache_layer, strict=True) if c == number]
            if len(uses) > 1 and layer.evicts_while_decoding and layer.span is None:
                most.append(BLOCK if layer.reads_prompt_by_steps else 1)
            if any(use.strictly_causal for use in uses):
                most.append(1)
        return min(most, default=None)

    @property
    def layers_are_independent(self) -> bool:
        """Each layer of the model has a cache layer to itself, and none looks at what another one does."""
        independent = not self.plan.shares and self.states is None
        return independent and not any(getattr(layer, "spans_layers", False) for layer in self.layers)

    def queries_wanted(self, layer_idx: int) -> int:
        """Last queries of a forward that the cache layer of a layer of the model wants to see; 0: none."""
        layer = self.layers[self.plan.cache_layer[layer_idx]]
        return layer.observation_window if layer.reading else ALL_QUERIES

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


def rows_by_padding(mask: torch.Tensor) -> list[Rows]:
    """Group a batch's rows by their leading pads.

    Args:
        mask: [B, columns so far], True for a real token.

    Raises:
        ValueError: a pad stands after a real token: prompts must be padded on the left.
    """
    pads = mask.shape[1] - mask.sum(1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(mask, columns[None] >= pads[:, None]):
        raise ValueError("kvbench caches need left padding (tokenizer.padding_side='left')")
    counts = pads.tolist()
    if len(set(counts)) == 1:
        return [Rows(counts[0], None)]
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        groups.setdefault(count, []).append(row)
    return [Rows(count, torch.tensor(index, device=mask.device)) for count, index in sorted(groups.items())]


def kv_shape(config: PretrainedConfig, dtype: torch.dtype) -> KVShape:
    """What the byte formulas need, from a transformers config whose layers are of one shape.

    :func:`model_shape` has it of any model.
    """
    config = config.get_text_config()
    plan = plan_of(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    linear = 0 if plan.recurrent else plan.layer_types.count(LINEAR)
    spans = [span for span in plan.spans if span is not None]
    return KVShape(
        layers=plan.layer_types.count(FULL),
        kv_heads=heads,
        head_dim=head_dim,
        element_bytes=dtype.itemsize,
        query_heads=config.num_attention_heads,
        local=tuple(LocalShape(spans.count(s), s, heads, 2 * head_dim) for s in dict.fromkeys(spans)),
        recurrent_bytes=linear * (config.retention_heads * head_dim**2 * max(4, dtype.itemsize) if linear else 0),
    )


def model_shape(model: PreTrainedModel) -> KVShape:
    """What the byte formulas need, as the model's layers were seen to hand over keys, values and states."""
    from .layout import layout_of  # at run time: see Method.new_cache

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
