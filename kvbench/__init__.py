"""KV-cache compression for transformers models, measured in quality, bytes and speed.

    import kvbench

    with kvbench.compress(model, "snapkv", budget=512) as cache:
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

The names of ``__all__`` are the public API. They are imported when they are first used, so ``import kvbench`` is fast,
and what only reads results (:func:`load_runs`) needs no torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbench.analysis.load import load as load_runs
    from kvbench.conf.errors import InputError
    from kvbench.methods.cache.cache import KVCache
    from kvbench.methods.cache.method import Method
    from kvbench.methods.policies.allocators.adaptive import Adaptive
    from kvbench.methods.policies.allocators.base import Allocator
    from kvbench.methods.policies.allocators.pyramid import Pyramid
    from kvbench.methods.policies.allocators.uniform import Uniform
    from kvbench.methods.policies.eviction import EvictionPolicy
    from kvbench.methods.policies.eviction_method import EvictionMethod
    from kvbench.methods.policies.policy import CachePolicy, KeepEverything
    from kvbench.methods.policies.pyramid_infer.policy import PyramidInfer
    from kvbench.methods.policies.schedules.after_prefill import AfterPrefill
    from kvbench.methods.policies.schedules.base import Schedule
    from kvbench.methods.policies.schedules.every_n import EveryN
    from kvbench.methods.policies.schedules.every_step import EveryStep
    from kvbench.methods.policies.scorers.attention_sums import AttentionSums
    from kvbench.methods.policies.scorers.base import Scorer
    from kvbench.methods.policies.scorers.expected_attention import ExpectedAttention
    from kvbench.methods.policies.scorers.key_diff import KeyDiff
    from kvbench.methods.policies.scorers.key_norm import KeyNorm
    from kvbench.methods.policies.scorers.last_query import LastQuery
    from kvbench.methods.policies.scorers.position import Position
    from kvbench.methods.policies.scorers.random_tokens import RandomTokens
    from kvbench.methods.policies.scorers.snapkv import SnapKV
    from kvbench.methods.policies.streaming_llm import StreamingLLM
    from kvbench.methods.sharing.base import Sharing
    from kvbench.methods.sharing.cla import CLA
    from kvbench.methods.sharing.heads import Heads
    from kvbench.methods.sharing.lckv import LCKV
    from kvbench.methods.sharing.mla import MLA
    from kvbench.methods.sharing.yoco import YOCO
    from kvbench.methods.storage.base import Storage
    from kvbench.methods.storage.dense import Dense
    from kvbench.methods.storage.hf_quantized import HFQuantized
    from kvbench.methods.storage.kivi import Kivi
    from kvbench.methods.storage.minicache.storage import MiniCache
    from kvbench.methods.storage.minicache_kivi import MiniCacheKivi
    from kvbench.methods.storage.ragged import Ragged
    from kvbench.runners.api import cache, compress, method
    from kvbench.runners.engine import Generation, Sampling, decode, generate, prefill

    __version__: str

__all__ = [
    "CLA",
    "LCKV",
    "MLA",
    "YOCO",
    "Adaptive",
    "AfterPrefill",
    "Allocator",
    "AttentionSums",
    "CachePolicy",
    "Dense",
    "EveryN",
    "EveryStep",
    "EvictionMethod",
    "EvictionPolicy",
    "ExpectedAttention",
    "Generation",
    "HFQuantized",
    "Heads",
    "InputError",
    "KVCache",
    "KeepEverything",
    "KeyDiff",
    "KeyNorm",
    "Kivi",
    "LastQuery",
    "Method",
    "MiniCache",
    "MiniCacheKivi",
    "Position",
    "Pyramid",
    "PyramidInfer",
    "Ragged",
    "RandomTokens",
    "Sampling",
    "Schedule",
    "Scorer",
    "Sharing",
    "SnapKV",
    "Storage",
    "StreamingLLM",
    "Uniform",
    "__version__",
    "cache",
    "compress",
    "decode",
    "generate",
    "load_runs",
    "method",
    "prefill",
]

# Module below kvbench, and the names that it defines. The imports above say the same to type checkers.
_NAMES_BY_MODULE = {
    "analysis.load": ("load_runs",),
    "conf.errors": ("InputError",),
    "methods.cache.cache": ("KVCache",),
    "methods.cache.method": ("Method",),
    "methods.policies.allocators.adaptive": ("Adaptive",),
    "methods.policies.allocators.base": ("Allocator",),
    "methods.policies.allocators.pyramid": ("Pyramid",),
    "methods.policies.allocators.uniform": ("Uniform",),
    "methods.policies.eviction": ("EvictionPolicy",),
    "methods.policies.eviction_method": ("EvictionMethod",),
    "methods.policies.policy": ("CachePolicy", "KeepEverything"),
    "methods.policies.schedules.after_prefill": ("AfterPrefill",),
    "methods.policies.schedules.base": ("Schedule",),
    "methods.policies.schedules.every_n": ("EveryN",),
    "methods.policies.schedules.every_step": ("EveryStep",),
    "methods.policies.scorers.base": ("Scorer",),
    "methods.policies.scorers.key_norm": ("KeyNorm",),
    "methods.policies.scorers.position": ("Position",),
    "methods.policies.scorers.expected_attention": ("ExpectedAttention",),
    "methods.policies.scorers.attention_sums": ("AttentionSums",),
    "methods.policies.scorers.key_diff": ("KeyDiff",),
    "methods.policies.pyramid_infer.policy": ("PyramidInfer",),
    "methods.policies.scorers.random_tokens": ("RandomTokens",),
    "methods.policies.scorers.snapkv": ("SnapKV",),
    "methods.policies.streaming_llm": ("StreamingLLM",),
    "methods.policies.scorers.last_query": ("LastQuery",),
    "methods.sharing.base": ("Sharing",),
    "methods.sharing.cla": ("CLA",),
    "methods.sharing.heads": ("Heads",),
    "methods.sharing.lckv": ("LCKV",),
    "methods.sharing.mla": ("MLA",),
    "methods.sharing.yoco": ("YOCO",),
    "methods.storage.base": ("Storage",),
    "methods.storage.dense": ("Dense",),
    "methods.storage.hf_quantized": ("HFQuantized",),
    "methods.storage.kivi": ("Kivi",),
    "methods.storage.minicache.storage": ("MiniCache",),
    "methods.storage.minicache_kivi": ("MiniCacheKivi",),
    "methods.storage.ragged": ("Ragged",),
    "runners.api": ("cache", "compress", "method"),
    "runners.engine": ("Generation", "Sampling", "decode", "generate", "prefill"),
}
_MODULES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}
_DEFINED_AS = {"load_runs": "load"}

if not (Path(__file__).parent / "methods").is_dir():  # a checkout: the subpackages are next to this folder, not in it
    __path__.append(str(Path(__file__).resolve().parents[1]))


if not TYPE_CHECKING:  # a type checker would take any name for a public one

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used (PEP 562)."""
        if name == "__version__":
            value = _version()
        elif name in _MODULES:
            value = getattr(_imported(name), _DEFINED_AS.get(name, name))
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _imported(name: str) -> Any:
    """The module of a public name; where it needs a package that is missing, the error names the extra to install."""
    try:
        return import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        extras = import_module(f"{__name__}.conf.extras")
        extra = extras.extra_of(error.name)
        if extra is None:
            raise
        raise ImportError(f"kvbench.{name} needs the package {error.name}: {extras.install(extra)}") from error


def _version() -> str:
    """Version in the checkout's ``pyproject.toml``, or of the installed distribution where this is no checkout."""
    import tomllib
    from importlib.metadata import version

    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if (Path(__file__).parent / "methods").is_dir() or not project.is_file():
        return version("kvbench")
    return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
