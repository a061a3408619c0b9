"""A compression method (which tokens are kept, how they are stored, which layers share them) and its cache factory.

    method = Method("snapkv", EvictionPolicy(SnapKV(), budget=512))
    cache = method.new_cache(model)             # for one batch
    model.generate(**inputs, past_key_values=cache)

The cache works with ``model.generate`` and with :mod:`kvbench.runners.engine`: the registered attention function
(``attention.py``) passes each layer's new queries, keys and values to :meth:`.cache.KVCache.attend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...conf.errors import InputError
from ...conf.options import Options
from ..policies.budget import Budget
from ..policies.local import LocalAttention
from ..policies.model_layer import ModelLayer
from ..policies.names import parts_of, token_methods
from ..policies.policy import CachePolicy, KeepEverything
from ..policies.request import request_of
from ..sharing.base import Sharing
from ..sharing.kv_map import FULL, LINEAR
from ..sharing.plan import Plan, plan_of
from ..storage.base import LayerStorage, Storage
from ..storage.dense import Dense
from .attention import use_kvbench_attention
from .cache import KVCache
from .composition import check_storage, latent_layers
from .kv_shape import KVShape
from .layer import CacheLayer
from .layout import layout_of, model_shape, reset_rope, rotary_of
from .narrowing import narrow_between_layers
from .output_projection import output_weights_of
from .recurrent import RecurrentStates
from .retention import RecurrentLayer


@dataclass(frozen=True)
class Method(Options):
    """A KV-cache compression method: policy x storage x sharing.

    Attributes:
        name: Name on the command line (``method=``).
        policy: Which tokens each layer keeps.
        storage: How kept tokens are represented in memory.
        sharing: Which layers own keys and values, as part of the model; None: whatever the loaded model has.
        budget: Value of the key ``method.budget``. The policy has its own copy, which is the one in effect.
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
        check_storage(self.name, self.policy, self.storage)
        if self.sharing is not None and self.sharing.shares:
            self._check_sharing()

    @property
    def needs(self) -> str:
        """Requirements of the method that a reader of its results must know; empty: none."""
        parts = [self.policy.capabilities.needs, self.storage.capabilities.needs]
        parts.append("" if self.sharing is None else self.sharing.needs)
        return "; ".join(part for part in parts if part)

    @property
    def shares_prompt(self) -> bool:
        """Whether the method can share a prefill with others (``fan_out.py``)."""
        return self.policy.capabilities.attends_whole_prompt

    @property
    def shares_steps(self) -> bool:
        """Whether the method can share batched decode steps with others (``fan_out.py``)."""
        return True

    def _check_name(self) -> None:
        """Reject a policy that keeps everything under the name of a token method, or with a budget it would ignore.

        ``method=full``, storage methods and sharing methods accept and ignore a budget, so that a sweep can include
        them.
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
                "has no policy, storage or sharing of that name, so every token would stay; in Python pass the "
                f'policy, as in Method("snapkv", EvictionPolicy(SnapKV(), 64)), or call '
                f'kvbench.method("{self.name}"{budget and f", {budget}"})',
            )

    def _check_sharing(self) -> None:
        """Reject policies and storages that do not work on layers that share keys and values."""
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
        """Reject a model on whose layers the method cannot work."""
        if plan.shares:
            self._check_sharing()
        if self.policy.capabilities.stored_queries and plan.shares:
            raise InputError(
                "method/schedule",
                self.policy.schedule.id,  # type: ignore[attr-defined]
                f"re-scores tokens with one layer's queries, and layers of {type(model).__name__} share keys and "
                "values; use method/schedule=after_prefill",
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
                "prefills token by token, and a model whose layers attend over the keys of a higher layer encodes a "
                "prompt in several passes; use method.policy.mode=prefill_evict",
            )
        count = plan.layer_types.count(FULL)
        if not count and not (self.policy.capabilities.keeps_everything and self.storage.capabilities.lossless):
            raise InputError(
                "method",
                self.name,
                f"works on layers that attend over all tokens, and {type(model).__name__} as configured has none: each "
                "layer keeps its own window whatever the method; use method=full",
            )

    @property
    def passes(self) -> int | None:
        """See :attr:`.sharing.base.Sharing.passes`; methods can share a prefill only if their values are equal."""
        return None if self.sharing is None else self.sharing.passes

    def new_cache(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> KVCache:
        """Switch ``model`` to kvbench's attention function and return an empty cache for one batch.

        There is one cache layer for each layer that owns keys and values; its tokens are scored by the queries of all
        layers that attend over them. Local-attention layers keep their window and recurrent layers their state,
        whatever the method.

        Args:
            model: The model.
            tokenizer: The model's tokenizer; None: there is none, or the method needs none.

        Raises:
            InputError: The model is not supported, or the method does not work on its layers or needs a tokenizer.
        """
        use_kvbench_attention(model)
        config = model.config.get_text_config()
        if self.sharing is not None:
            self.sharing.fit(config)
        plan = layout_of(model).plan
        reset_rope(model)
        self._check_plan(plan, model)
        count = plan.layer_types.count(FULL)
        stores: Sequence[LayerStorage] = (
            latent_layers(self.name, self.policy, self.storage, count)
            if plan.holds_latents
            else self.storage.new_layers(count)
        )
        owners = [owner for owner, kind in zip(plan.owners, plan.layer_types, strict=True) if kind == FULL]
        described = [self._model_layer(model, owner, place, count, tokenizer) for place, owner in enumerate(owners)]
        for store, layer in zip(stores, described, strict=True):
            store.bind(layer.rotary)
        storage, states = iter(stores), iter(self.policy.new_states(described))
        layers: list[Any] = []
        recurrent = RecurrentStates(config, plan.recurrent) if plan.recurrent else None
        for number, (owner, kind, span) in enumerate(zip(plan.owners, plan.layer_types, plan.spans, strict=True)):
            if kind == LINEAR:
                layers.append(RecurrentLayer() if recurrent is None else recurrent.cache.layers[owner])
                continue
            place = plan.layer_types[:number].count(kind)
            if span is None:
                cache_layer = CacheLayer(place, count, self.policy, next(states), next(storage))
            else:
                local = LocalAttention(span)
                state = local.new_state(self._model_layer(model, owner, place, count, tokenizer))
                cache_layer = CacheLayer(place, count, local, state, Dense().new_layers(1)[0], span)
            cache_layer.model_layer = owner
            layers.append(cache_layer)
        cache = KVCache(layers, plan, self.passes)
        cache.states = recurrent
        cache.requantizes_on_append = not self.storage.capabilities.keeps_stored
        if self.policy.capabilities.narrows_prompt:
            narrow_between_layers(model, cache, self.name)
        return cache

    def _model_layer(self, model: PreTrainedModel, owner: int, place: int, count: int, tokenizer: Any) -> ModelLayer:
        """A layer of the model as its policy sees it; see :class:`..policies.model_layer.ModelLayer`."""
        rotary = partial(rotary_of, model, owner, self.name)
        output_weights = partial(output_weights_of, model, owner, self.name)
        return ModelLayer(owner, place, count, rotary, output_weights, partial(request_of, tokenizer))

    def bytes_formula(self, shape: KVShape, prompt_length: int, new_tokens: int = 0) -> int:
        """Return the expected bytes of one sequence after a prompt and ``new_tokens`` generated tokens."""
        return self._bytes(shape, [1] * shape.layers, prompt_length, new_tokens)

    def read_formula(self, model: PreTrainedModel) -> Callable[..., int]:
        """Return the bytes a decode step reads, as a function of the prompt's length and the new tokens (0).

        Each cache layer counts once per layer of the model that attends over it. Layers that share a budget count with
        their mean, which is exact if equally many layers attend over each of them.
        """
        plan, shape = plan_of(model.config.get_text_config()), model_shape(model)
        readers = {
            span: sum(plan.cache_layer.count(n) for n, s in enumerate(plan.spans) if s == span) for span in plan.spans
        }
        shape = replace(shape, local=tuple(replace(x, layers=readers[x.span]) for x in shape.local))
        return partial(self._bytes, shape, plan.consumers(FULL), read=True)

    def _bytes(
        self, shape: KVShape, repeats: Sequence[int], prompt_length: int, new_tokens: int = 0, read: bool = False
    ) -> int:
        """Return the bytes by the formula, counting full-attention layer ``l`` ``repeats[l]`` times."""
        formula = self.storage.bytes_read_formula if read else self.storage.bytes_formula
        heads = shape.query_heads if self.policy.capabilities.stores_query_heads else shape.kv_heads
        tokens = self.policy.kept_tokens(prompt_length, new_tokens, shape.layers, heads)
        counted: list[Any] = [n for n, count in zip(tokens, repeats, strict=True) for _ in range(count)]
        stored = round(formula(counted, heads, shape, new_tokens))  # means over heads may be fractions
        state = self.policy.state_bytes(shape, heads, prompt_length, new_tokens)
        return stored + state + shape.fixed_bytes(prompt_length + new_tokens)

    def identity(self) -> dict[str, Any]:
        """Return what determines the method's results, as plain data; see :class:`.conf.identity.HasIdentity`."""
        parts: dict[str, Any] = {"name": self.name}
        for key, part in (("selection", self.policy), ("storage", self.storage), ("sharing", self.sharing)):
            if part is not None:  # runs recorded before a part existed keep their identity
                parts[key] = part.identity()
        return parts

    @property
    def label(self) -> str:
        """Short name for tables: ``snapkv 512``, ``cla2 + kivi4``, ``key_diff 64 + adaptive``.

        Lossless storages differ only in size, so they are not shown.
        """
        text = self.name if self.effective_budget is None else f"{self.name} {self.effective_budget}"
        text += self._changed_parts()
        if self.sharing is not None:
            text = self.sharing.label if self.policy.capabilities.keeps_everything else f"{self.sharing.label} + {text}"
        elif self.storage.name.startswith(self.name):  # the method is its storage: ``kivi4``
            return self.storage.name
        return text if self.storage.capabilities.lossless else f"{text} + {self.storage.name}"

    def _changed_parts(self) -> str:
        """Return the parts of an eviction policy that differ from the method's YAML: `` + adaptive + every 128``.

        The scorer that another one builds on is always named: ``chunkkv 64 over key_diff``. With the parameters that a
        scorer declares as ``labelled_parameters``, the allocator is named, too: ``(epsilon 0.01, adaptive)``.
        """
        scorer, allocator, schedule = (getattr(self.policy, kind, None) for kind in ("scorer", "allocator", "schedule"))
        if scorer is None or allocator is None or schedule is None:
            return ""
        defaults, named = parts_of(self.name), scorer.chain()
        text = "" if scorer.name == defaults.get("scorer", scorer.name) else f" + {scorer.name}"
        text += "".join(f" over {inner.name}" for inner in named[1:])
        settings = [f"{key} {getattr(part, key)}" for part in named for key in part.labelled_parameters]
        if settings:
            text += f" ({', '.join([*settings, allocator.label])})"
        elif allocator.label != defaults.get("allocator", allocator.label):
            text += f" + {allocator.label}"
        return text if schedule.id == defaults.get("schedule", schedule.id) else f"{text} + {schedule.label}"

    @property
    def effective_budget(self) -> int | float | None:
        """Budget of the policy; None if it has none (``full`` accepts ``method.budget`` and ignores it)."""
        return getattr(self.policy, "budget", None)
