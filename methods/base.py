"""A method, and the cache it makes: selection x storage, one layer at a time.

    method = Method("snapkv", SnapKV(budget=512))
    cache = method.new_cache(model)             # one batch; thrown away afterwards
    model.generate(**inputs, past_key_values=cache)

The cache works in ``model.generate`` and in :mod:`kvbench.runners.engine` alike: the model's layers hand their new
queries, keys and values to :meth:`KVCache.attend` through the registered attention function (``attention.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..conf.errors import InputError
from .attention import repeat_heads, tag, use_kvbench_attention
from .prompt import Prompt, PromptReader, Rows
from .selection.base import Selection, Step
from .storage.base import KVShape, LayerStorage, Storage
from .storage.dense import Dense


@dataclass(frozen=True)
class Method:
    """One way of holding a KV cache.

    Attributes:
        name: as typed after ``method=``.
        selection: which tokens each layer keeps.
        storage: how kept tokens are represented.
        budget: where the key ``method.budget`` stands; the selection takes its own from there and is what counts.
    """

    name: str
    selection: Selection = field(default_factory=Selection)
    storage: Storage = field(default_factory=Dense)
    budget: int | float | None = None

    def __post_init__(self) -> None:
        if self.storage.needs_the_same_tokens and not self.selection.keeps_everything:
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

    @property
    def shares_prompt(self) -> bool:
        """Whether other methods can ride on the same reading of the prompt (``fan_out.py``)."""
        return self.selection.reads_whole_prompt

    def new_cache(self, model: PreTrainedModel) -> KVCache:
        """An empty cache for one batch of ``model``, which is switched to kvbench's attention function."""
        use_kvbench_attention(model)
        config = model.config.get_text_config()
        storage = self.storage.new_layers(config.num_hidden_layers)
        layers = [
            CacheLayer(i, config.num_hidden_layers, self.selection, self.selection.new_state(config), storage[i])
            for i in range(config.num_hidden_layers)
        ]
        cache = KVCache(layers)
        self.selection.attach(model, cache)
        return cache

    def bytes_formula(self, shape: KVShape, prompt_length: int, new_tokens: int = 0) -> int:
        """Bytes that one sequence should take after a prompt and ``new_tokens`` further tokens, by the formula."""
        tokens = self.selection.kept_tokens(prompt_length, new_tokens, shape.layers)
        heads = shape.query_heads if self.selection.stores_query_heads else shape.kv_heads
        stored = self.storage.bytes_formula(tokens, heads, shape, new_tokens)
        return stored + self.selection.state_bytes(prompt_length, new_tokens, shape.layers, heads)

    def identity(self) -> dict[str, Any]:
        """What decides this method's numbers, as plain data: class and values of its parts (not what is only shown)."""
        parts: dict[str, Any] = {"name": self.name}
        for part in ("selection", "storage"):
            value = getattr(self, part)
            parts[part] = {"class": type(value).__name__, **asdict(value)}
        return parts

    @property
    def label(self) -> str:
        """Short name for tables: ``snapkv 512``, ``snapkv 512 + kivi4``; how exact storages differ is bytes alone."""
        text = self.name if self.effective_budget is None else f"{self.name} {self.effective_budget}"
        if self.storage.name.startswith(self.name):  # the method is its storage: ``kivi4``
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
    is_compileable = False

    def __init__(self, layer_idx: int, num_layers: int, selection: Selection, state: Any, storage: LayerStorage):
        super().__init__(layer_idx, num_layers, selection.observation_window)
        self.selection, self.state, self.storage = selection, state, storage
        self.reading = not selection.reads_prompt_by_steps

    def names(self) -> str:
        return type(self.selection).__name__

    def absorb(self, prompts: list[tuple[Rows, Prompt]]) -> None:
        """Compress the prompt: every group of rows gets its selection, then all are stored as one batch."""
        groups = []
        for rows, prompt in prompts:
            keys, values = prompt.keys, prompt.values
            kept = self.selection.select(prompt, self.state)
            if self.selection.stores_query_heads:
                keys, values = repeat_heads(keys, prompt.groups), repeat_heads(values, prompt.groups)
            if kept.slots is not None:
                index = kept.slots[..., None].expand(-1, -1, -1, keys.shape[-1])
                keys, values = keys.gather(2, index), values.gather(2, index)
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
        keys = first.keys.new_zeros(batch, first.keys.shape[1], width, first.keys.shape[3])
        values = torch.zeros_like(keys)
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
        scaling: float,
        new: NewTokens,
    ) -> torch.Tensor:
        """One forward of this layer: [B, H_q, n, D] queries in, the same shape out."""
        if self.reading:
            return self.read_prompt(query, key, value, scaling, new.rows, new.prompt_length)
        if self.selection.stores_query_heads:
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        self.seen += query.shape[2]
        out = self.selection.attend(self.state, self.storage, Step(query, key, value, scaling, new.valid))
        self.storage.settle()
        if self.seen == new.prompt_length:
            self.storage.trim()
        return out

    def get_seq_length(self) -> int:
        """Columns fed so far (pads included): what transformers counts positions and masks by."""
        return self.seen

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
        prompt_length: columns of the whole prompt, set before a prompt is fed in chunks; None: the first forward is
            all of it.
        tokens_seen: real tokens of each row so far, [B] int64; the next token's position.
        new_tokens: what the forward under way adds.
        copies: rows a decode step has per row of the prompt (more than one in ``fan_out.py``).
        recomputes: holds no keys and values; the engine feeds it the whole sequence at each step (``no_cache.py``).
    """

    recomputes = False
    copies = 1
    layers: list[Any]  # CacheLayer, or FanOutLayer: transformers' own layer classes hold tensors in their own way

    def __init__(self, layers: Sequence[Any]):
        super().__init__(layers=list(layers))
        self.prompt_length: int | None = None
        self.tokens_seen: torch.Tensor | None = None
        self.new_tokens: NewTokens | None = None

    # transformers' side -------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass the new keys and values straight through, with this cache's name on them."""
        return tag(key_states, self), value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
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

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one layer: [B, H_q, n, D] queries, [B, H_kv, n, D] keys and values -> [B, H_q, n, D]."""
        if layer_idx == 0:
            self.new_tokens = self._begin(query, padding_mask)
        assert self.new_tokens is not None
        return self.layers[layer_idx].attend(query, key, value, scaling, self.new_tokens)

    def _begin(self, query: torch.Tensor, padding_mask: torch.Tensor | None) -> NewTokens:
        """Look at a forward's padding once, for all of its layers."""
        batch, n = query.shape[0], query.shape[2]
        layer = self.layers[0]
        valid = None
        rows = [Rows(0, None)]
        in_prompt = layer.reading or (self.prompt_length is not None and layer.seen < self.prompt_length)
        if padding_mask is not None and (in_prompt or n > 1):  # after the prompt a single new token is a real one
            mask = padding_mask.bool()
            valid = mask[:, -n:]
            if bool(valid.all()):
                valid = None
            if layer.reading:
                rows = rows_by_padding(mask)
        if self.tokens_seen is None:
            self.tokens_seen = torch.zeros(batch, dtype=torch.int64, device=query.device)
        # In a fan-out the copies of a row are fed alike: the first ones stand for all.
        self.tokens_seen = self.tokens_seen + (n if valid is None else valid[: self.batch_size].sum(1))
        return NewTokens(rows, valid, self.prompt_length)

    def next_positions(self) -> torch.Tensor:
        """Position of the next token of every decode row: [copies x B] int64."""
        assert self.tokens_seen is not None, "no prompt yet"
        return self.tokens_seen.repeat(self.copies)

    def extend(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where ``recomputes``: add columns of ids and mask; returns the whole sequence so far."""
        raise NotImplementedError

    def drop(self, member: int) -> None:
        """Where ``copies`` > 1: leave out a member whose rows have all ended."""
        raise NotImplementedError

    # bytes --------------------------------------------------------------------------------------------------------

    @property
    def kv_bytes_stored(self) -> int:
        """Bytes of memory the cache keeps allocated: each storage once, scales, masks, padding and room included."""
        return stored_bytes(itertools.chain.from_iterable(layer.tensors() for layer in self.layers))

    @property
    def kv_bytes_logical(self) -> int:
        """Bytes of the real tokens held, without padding and room to grow."""
        return sum(layer.logical_bytes for layer in self.layers)

    @property
    def tokens_held(self) -> list[torch.Tensor]:
        """Real tokens held: one [B, 1 or H] tensor a layer."""
        return [layer.storage.tokens for layer in self.layers]


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage counted once however many views it has."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


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
    """What the byte formulas need, from a transformers config."""
    config = config.get_text_config()
    return KVShape(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        element_bytes=dtype.itemsize,
        query_heads=config.num_attention_heads,
    )
