"""KV-cache compression methods: policy (tokens to keep) x storage (their representation) x sharing (KV sources).

Importing this package registers the ``"kvbench"`` attention function with transformers.
"""

from .cache.cache import KVCache
from .cache.fan_out import FanOutCache
from .cache.method import Method

__all__ = ["FanOutCache", "KVCache", "Method"]
