"""KV-cache compression methods: policy (which tokens stay) x storage (how they are held) x sharing (who owns them).

Importing this package registers the ``"kvbench"`` attention function with transformers.
"""

from .cache.cache import KVCache
from .cache.fan_out import FanOutCache
from .cache.method import Method

__all__ = ["FanOutCache", "KVCache", "Method"]
