"""The functions of the public API: a method by its name, and its cache for one batch of a transformers model.

``kvbench.method``, ``kvbench.compress`` and ``kvbench.cache``; :mod:`kvbench` re-exports them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conf.errors import InputError
from ..methods.cache.attention import kvbench_attention, use_kvbench_attention
from ..methods.cache.cache import KVCache
from ..methods.cache.method import Method
from .config.methods import configured_method


def method(name: str, /, **options: Any) -> Method:
    """The method that ``method=NAME method.KEY=VALUE ...`` is on the command line.

        kvbench.method("snapkv", budget=512)
        kvbench.method("snapkv", budget=0.25, storage="kivi4", scorer={"window": 16})

    Args:
        name: One of ``conf/method``, with the defaults of its YAML.
        options: Keys of that YAML with their values, nested as there.

    Raises:
        InputError: There is no such name or key, or the value cannot be used.
    """
    return configured_method(name, options)


@contextmanager
def compress(
    model: PreTrainedModel, method: str | Method, /, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> Iterator[KVCache]:
    """A fresh KV cache for one batch of ``model``, to use inside a ``with`` block.

        with kvbench.compress(model, "snapkv", budget=512) as cache:
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

    The model runs with kvbench's attention function inside the block, and with the one it had before after it, also
    where the block raises an exception. The cache cannot be used further after the block; what it measures, such as
    ``cache.kv_bytes_logical``, can be read.

    Args:
        model: A causal language model of transformers.
        method: A name, as for :func:`method`, or a method.
        tokenizer: The model's tokenizer, for methods that put words to the model (``kvzip``).
        options: See :func:`method`; only with a name.

    Raises:
        InputError: The method or an option cannot be used, or the model cannot be served.
    """
    chosen = _chosen(method, options)
    with kvbench_attention(model):
        yield chosen.new_cache(model, tokenizer)


def cache(
    method: str | Method, model: PreTrainedModel, /, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> KVCache:
    """A fresh KV cache for one batch of ``model``, without a block around it.

        cache = kvbench.cache("snapkv", model, budget=512)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

    The model keeps kvbench's attention function, which gives what its own gives where there is no such cache, until
    ``model.set_attn_implementation("sdpa")``. :func:`compress` restores it by itself.

    Args:
        method: A name, as for :func:`method`, or a method.
        model: A causal language model of transformers.
        tokenizer: See :func:`compress`.
        options: See :func:`method`; only with a name.

    Raises:
        InputError: As :func:`compress`; the model is then as it was.
    """
    chosen = _chosen(method, options)
    with kvbench_attention(model):
        made = chosen.new_cache(model, tokenizer)
    use_kvbench_attention(model)
    return made


def _chosen(method: str | Method, options: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return configured_method(method, options)
    if options:
        key, value = next(iter(options.items()))
        raise InputError(f"method.{key}", value, "goes with a method's name; a Method has its own settings")
    return method
