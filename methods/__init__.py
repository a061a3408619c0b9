"""KV-cache compression methods: selection (which tokens stay) x storage (how they are held).

Importing this package registers the ``"kvbench"`` attention function with transformers.
"""

from .base import KVCache, Method
from .fan_out import FanOutCache

__all__ = ["FanOutCache", "KVCache", "Method"]
