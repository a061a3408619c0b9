"""A method, and the cache that it makes for a model: which tokens stay, how they are stored, which layers share them.

    method = Method("snapkv", EvictionPolicy(SnapKV(), budget=512))
    cache = method.new_cache(model)             # one batch; thrown away afterwards
    model.generate(**inputs, past_key_values=cache)

The cache works in ``model.generate`` and in :mod:`kvbench.runners.engine` alike: the model's layers hand their new
queries, keys and values to :meth:`.cache.KVCache.attend` through the registered attention function (``attention.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from transformers import PreTrainedModel

from ...conf.errors import InputError
from ...conf.options import Options
from ..policies.budget import Budget
from ..policies.local import LocalAttention
from ..policies.names import parts_of, token_methods
from ..policies.policy import CachePolicy, KeepEverything
from ..policies.scorers.base import ModelLayer
from ..sharing.base import Sharing
from ..sharing.kv_map import FULL, LINEAR
from ..sharing.plan import Plan, plan_of
from ..storage.base import Storage
from ..storage.dense import Dense
from .attention import use_kvbench_attention
from .cache import KVCache
from .kv_shape import KVShape
from .layer import CacheLayer
from .layout import layout_of, model_shape, reset_rope, rotary_of
from .narrowing import narrow_between_layers
from .recurrent import RecurrentStates
from .retention import RecurrentLayer


@dataclass(frozen=True)
class Method(Options):
    """One way of holding a KV cache.

    Attributes:
        name: as typed after ``method=``.
        policy: which tokens each layer keeps.
        storage: how kept tokens are represented.
        sharing: which layers own keys and values at all, a part of the model; None: as the model at hand has it.
        budget: where the key ``method.budget`` stands; the policy takes its own from there and is what counts.
    """

    key_prefix: ClassVar[str] = "method."
    name: str
    policy: CachePolicy = field(default_factory=KeepEverything)
    storage: Storage = field(default_factory=Dense)
    sharing: Sharing | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_name()
        capabilities, stored = self.policy.capabilities, self.storage.capabilities
        if stored.requires_same_tokens_across_layers and not capabilities.keeps_everything:
            raise InputError(
                "method/storage",
                self.storage.name,
                f"shares tokens between layers, and under method={self.name} each layer keeps its own; use method=full",
            )
        if (capabilities.evicts_while_decoding or capabilities.drops_stored) and not stored.lossless:
            when = "while decoding" if capabilities.evicts_while_decoding else "once all layers have seen the prompt"
            raise InputError(
                "method/storage",
                self.storage.name,
                f"holds rounded tokens, and method={self.name} as configured lets tokens leave {when}, which would "
                "round the others again; use method/storage=dense or ragged, or method/schedule=after_prefill",
            )
        if self.sharing is not None and self.sharing.shares:
            self._check_sharing()

    @property
    def shares_prompt(self) -> bool:
        """Whether other methods can share its prefill (``fan_out.py``)."""
        return self.policy.capabilities.attends_whole_prompt

    @property
    def shares_steps(self) -> bool:
        """Whether other methods can share its decode steps (``fan_out.py``)."""
        return True

    def _check_name(self) -> None:
        """Refuse a full cache under another method's name, or with a budget that nothing keeps.

        ``method=full`` accepts a budget and ignores it, so that a sweep can include it; likewise what saves bits or
        layers.
        """
        if type(self) is not Method or self.name == "full" or not self.policy.capabilities.keeps_everything:
            return
        methods = token_methods()
        is_plain = self.storage.capabilities.lossless and self.sharing is None
        if methods.get(self.name) or (is_plain and (self.name in methods or self.budget is not None)):
            budget = "" if self.budget is None else f"budget={self.budget}"
            raise InputError(
                "method",
                f"{self.name} {budget}".strip(),
                "is given no policy, storage or sharing of that name, so every token would stay; in Python pass the "
                f'policy, as in Method("snapkv", EvictionPolicy(SnapKV(), 64)), or call '
                f'kvbench.method("{self.name}"{budget and f", {budget}"})',
            )

    def _check_sharing(self) -> None:
        """What cannot be held where layers share keys and values."""
        if self.policy.capabilities.spans_layers:
            raise InputError(
                "method",
                self.name,
                "drops tokens between layers, which then cannot share keys and values; use it on a plain model",
            )
        if self.storage.capabilities.requires_same_tokens_across_layers:
            raise InputError(
                "method/storage",
                self.storage.name,
                "merges neighbouring layers' keys and values, and here layers share them already; use dense or kivi4",
            )
        if self.policy.capabilities.stores_query_heads:
            raise InputError(
                "method.scorer.granularity",
                "query_head",
                "would store keys for the query heads of every layer that shares them; use kv_head",
            )

    def _check_plan(self, plan: Plan, model: PreTrainedModel) -> None:
        """Refuse a model whose layers the method cannot work on."""
        if plan.shares:
            self._check_sharing()
        if self.policy.capabilities.held_queries and plan.shares:
            raise InputError(
                "method/schedule",
                self.policy.schedule.id,  # type: ignore[attr-defined]
                f"scores again by one layer's queries, and layers of {type(model).__name__} share keys and values; use "
                "method/schedule=after_prefill",
            )
        if self.policy.capabilities.spans_layers and not plan.is_uniform:
            raise InputError(
                "method",
                self.name,
                "drops tokens between layers; use it on a model all of whose layers attend over all tokens",
            )
        if plan.has_upward_kv_refs and self.policy.capabilities.prefills_by_steps:
            raise InputError(
                "method",
                self.name,
                "takes a prompt step by step, and a model whose layers refer up encodes it in several passes; "
                "use method.policy.mode=prefill_evict",
            )
        count = plan.layer_types.count(FULL)
        if not count and not (self.policy.capabilities.keeps_everything and self.storage.capabilities.lossless):
            raise InputError(
                "method",
                self.name,
                f"works on layers that attend over all tokens, and {type(model).__name__} as configured has none: each "
                "holds a window whatever the method; use method=full",
            )

    @property
    def passes(self) -> int | None:
        """See :attr:`.sharing.base.Sharing.passes`; only methods with the same can share a prefill."""
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
        use_kvbench_attention(model)
        config = model.config.get_text_config()
        if self.sharing is not None:
            self.sharing.fit(config)
        plan = layout_of(model).plan
        reset_rope(model)
        self._check_plan(plan, model)
        count = plan.layer_types.count(FULL)
        storage = iter(self.storage.new_layers(count))
        owners = [owner for owner, kind in zip(plan.owners, plan.layer_types, strict=True) if kind == FULL]
        described = [self._model_layer(model, owner, place, count) for place, owner in enumerate(owners)]
        states = iter(self.policy.new_states(described))
        layers: list[Any] = []
        recurrent = RecurrentStates(config, plan.recurrent) if plan.recurrent else None
        for number, (owner, kind, span) in enumerate(zip(plan.owners, plan.layer_types, plan.spans, strict=True)):
            if kind == LINEAR:
                layers.append(RecurrentLayer() if recurrent is None else recurrent.cache.layers[owner])
                continue
            place = plan.layer_types[:number].count(kind)
            if span is None:
                layer = CacheLayer(place, count, self.policy, next(states), next(storage))
            else:
                local = LocalAttention(span)
                state = local.new_state(self._model_layer(model, owner, place, count))
                layer = CacheLayer(place, count, local, state, Dense().new_layers(1)[0], span)
            layer.model_layer = owner
            layers.append(layer)
        cache = KVCache(layers, plan, self.passes)
        cache.states = recurrent
        cache.requantizes_on_append = not self.storage.capabilities.lossless
        if self.policy.capabilities.narrows_prompt:
            narrow_between_layers(model, cache, self.name)
        return cache

    def _model_layer(self, model: PreTrainedModel, owner: int, place: int, count: int) -> ModelLayer:
        """A layer of the model as its policy sees it; see :class:`..policies.scorers.base.ModelLayer`."""
        return ModelLayer(owner, place, count, partial(rotary_of, model, owner, self.name))

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
        tokens = self.policy.kept_tokens(prompt_length, new_tokens, shape.layers)
        tokens = [n for n, count in zip(tokens, times, strict=True) for _ in range(count)]
        formula = self.storage.bytes_read_formula if read else self.storage.bytes_formula
        heads = shape.query_heads if self.policy.capabilities.stores_query_heads else shape.kv_heads
        stored = formula(tokens, heads, shape, new_tokens)
        state = self.policy.state_bytes(shape, heads, prompt_length, new_tokens)
        return stored + state + shape.fixed_bytes(prompt_length + new_tokens)

    def identity(self) -> dict[str, Any]:
        """What decides this method's numbers, as plain data: see :class:`.conf.identity.HasIdentity`."""
        parts: dict[str, Any] = {"name": self.name}
        for key, part in (("selection", self.policy), ("storage", self.storage), ("sharing", self.sharing)):
            if part is not None:  # a run from before there was such a part is the same run
                parts[key] = part.identity()
        return parts

    @property
    def label(self) -> str:
        """Short name for tables: ``snapkv 512``, ``cla2 + kivi4``, ``key_diff 64 + adaptive``.

        Lossless storages only differ in size, so they are not shown.
        """
        text = self.name if self.effective_budget is None else f"{self.name} {self.effective_budget}"
        text += self._changed_parts()
        if self.sharing is not None:
            text = self.sharing.label if self.policy.capabilities.keeps_everything else f"{self.sharing.label} + {text}"
        elif self.storage.name.startswith(self.name):  # the method is its storage: ``kivi4``
            return self.storage.name
        return text if self.storage.capabilities.lossless else f"{text} + {self.storage.name}"

    def _changed_parts(self) -> str:
        """Parts of an eviction policy that are not those of the method's YAML: `` + adaptive``, `` + every 128``."""
        usual, parts = parts_of(self.name), []
        for kind, own in (("scorer", "name"), ("allocator", "id"), ("schedule", "id")):
            part = getattr(self.policy, kind, None)
            if part is not None and getattr(part, own) != usual.get(kind, getattr(part, own)):
                parts.append(part.label if kind == "schedule" else getattr(part, own))
        return "".join(f" + {part}" for part in parts)

    @property
    def effective_budget(self) -> int | float | None:
        """The policy's budget, or None where it has none (``full`` accepts ``method.budget`` and ignores it)."""
        return getattr(self.policy, "budget", None)
