"""Run the published functions behind ``golden.json`` again and compare; exit status 1 if an entry differs.

    python tests/golden/check_golden.py --snapkv SnapKV --factory KVCache-Factory --adakv AdaKV --tova TOVA --kivi KIVI

The arguments are checkouts of the repositories and commits that README.md names. PyramidInfer's lengths, which need
transformers 4.46, and the counts of KIVI's quantized tokens, which its model class computes, are not run here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

T, D, WINDOW = 40, 8, 4


def load(path: Path, *stubs: str) -> ModuleType:
    """Import a module from a file; ``stubs``: modules that it imports and that nothing here calls."""
    for name in stubs:
        if importlib.util.find_spec(name.split(".")[0]) is None or name in sys.modules:
            stub = sys.modules[name] = ModuleType(name)
            stub.__getattr__ = lambda attribute: lambda x=None, *_, **__: x  # type: ignore[method-assign]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys by the formulas of the file, and values that are positions: [1, heads, T, D] float64."""
    h, t, d = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (4, T, D)), indexing="ij")
    query = 1.5 * torch.sin(1.7 * (h + 1) + 0.9 * (t + 1) * (d + 1) + 0.31 * t * h)
    keys = 1.5 * torch.cos(0.6 * (h + 1) * (d + 1) + 1.3 * t + 0.17 * t * t * (d + 1))
    return query[None], keys[None, :kv_heads].clone(), t[None, :kv_heads].clone()


def kept(cluster: Any, kv_heads: int = 4, expanded: bool = False) -> list[list[int]]:
    """Return the positions that a cluster of SnapKV's interface keeps of each head."""
    query, keys, values = inputs(kv_heads)
    if expanded:
        keys, values = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (keys, values))
    values = cluster.update_kv(keys, query, values, None, 4 // kv_heads)[1]
    return [sorted(int(t) for t in head[:, 0]) for head in values[0]]


def snapkv(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    own = load(arguments.snapkv / "snapkv" / "monkeypatch" / "snapkv_utils.py").SnapKVCluster
    for kernel, pooling in ((5, "avg"), (5, "max"), (7, "max"), (1, "avg")):
        yield f"snapkv_mha C=12 w=4 k={kernel} {pooling}pool", kept(own(WINDOW, 12, kernel, f"{pooling}pool"))
    name = "snapkv_gqa_expanded C=12 w=4 k=5 avgpool (per query head)"
    yield name, kept(own(WINDOW, 12, 5, "avgpool"), 2, expanded=True)


def factory(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    module = load(arguments.factory / "pyramidkv" / "pyramidkv_utils.py")
    for reduction in ("mean", "max"):
        cluster = module.SnapKVCluster(WINDOW, 12, 5, "avgpool", gqa_score_agg=reduction)
        yield f"snapkv_gqa_kvhead agg={reduction} C=12 w=4 k=5 avgpool", kept(cluster, 2)
    for layer in range(4):
        cluster = module.PyramidKVCluster(4, WINDOW, 12, 5, "avgpool", beta=4, layer_idx=layer)
        yield f"pyramidkv layer={layer}/4 C=12 w=4 beta=4 k=5 avgpool", kept(cluster)
    name = "pyramidkv official kept tokens per layer"
    budgets = {}
    for budget, length in ((128, 8192), (64, 8192), (2048, 8192), (2048, 5000), (2048, 4000), (128, 100)):
        clusters = (module.PyramidKVCluster(32, 8, budget, 5, "avgpool", beta=20, layer_idx=i) for i in range(32))
        x = torch.zeros(1, 1, length, 1)
        counts = [cluster.update_kv(x, x, x, None, 1)[0].shape[2] for cluster in clusters]
        budgets[f"C={budget} w=8 beta=20 L=32 T={length}"] = counts
    yield name, budgets
    yield "h2o_prefill recent=4 heavy=8 (full causal accumulation)", kept(module.H2OKVCluster(4, 12))
    yield "streamingllm sinks=4 recent=8", kept(module.StreamingLLMKVCluster(8, 12))
    merge = load(arguments.factory / "pyramidkv" / "minicache.py").minicache_slerp
    current, previous = (torch.tensor(x, dtype=torch.float64)[None, None, None] for x in ([0, 2, 0, 0], [1, 0, 0, 0]))
    direction, *numbers = merge(current, previous, interpolation=0.6)
    found = dict(zip(("norm_current", "norm_previous", "angle"), map(float, numbers), strict=True))
    name = "minicache slerp current=[0,2,0,0] previous=[1,0,0,0] t=0.6"
    yield name, {"direction": direction.flatten().tolist(), **found}


def adakv(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    module = load(arguments.adakv / "adaptive_snapkv" / "monkeypatch" / "snapkv_utils.py", "flash_attn")
    for floor in (0.0, 0.2, 0.5):
        options = {
            "window_size": WINDOW,
            "kernel_size": 7,
            "pooling": "maxpool",
            "base_capacity": 12,
            "floor_alpha": floor,
        }
        cluster = module.AdaptiveSnapKVCluster(**options, skip=0, normalize=False, layer_idx=0, num_hidden_layers=1)
        query, keys, values = inputs()
        positions = cluster.update_kv(keys, query, values)[1][:, 0]
        lengths = cluster.head_lens.tolist()
        name = f"adakv floor={floor} base=12 w=4 k=7 maxpool"
        yield f"{name} head_lens", lengths
        yield f"{name} kept", [sorted(int(t) for t in head) for head in positions.split(lengths)]


def tova(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    module = load(arguments.tova / "src" / "tova_cache.py")
    query, keys, values = inputs()
    weights = (query[:, :, -1:] @ keys.mT / D**0.5).softmax(-1)
    cache = SimpleNamespace(cache_size=12, key_cache=[keys], value_cache=[values])
    module.TOVACache.reduce(cache, 0, weights)
    yield "tova cache=12 (prefill reduce)", [int(t) for t in cache.value_cache[0][0, 0, :, 0]]


def kivi(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    module = load(arguments.kivi / "quant" / "new_pack.py", "triton", "triton.language")
    group = torch.tensor([-1.0, 0.2, 0.9, 2.0]).repeat(4)[None, None, None]  # a packed number has 16 codes
    code, scale, zero = module.quant_and_pack_vcache(group.clone(), 4, 2)
    codes = module.unpack_tensor(code, 2, 3)[0, 0, 0, :4].tolist()
    read = module.unpack_and_dequant_vcache(code, scale, zero, 4, 2)
    found = {"zero": float(zero.flatten()[0]), "scale": float(scale.flatten()[0])}
    yield "kivi", {**found, "q": codes, "dequant": read[0, 0, 0, :4].tolist()}


def equal(found: Any, expected: Any) -> bool:
    """Whether two entries are equal, floating-point numbers up to 1e-5."""
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return abs(found - expected) < 1e-5


def main() -> int:
    golden = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
    golden["kivi"] = golden["kivi"]["2bit group [-1.0,0.2,0.9,2.0]"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("snapkv", "factory", "adakv", "tova", "kivi"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="checkout of the published code")
    torch.set_default_dtype(torch.float64)  # masks of the published code have the default dtype
    arguments, wrong = parser.parse_args(), 0
    for run in (snapkv, factory, adakv, tova, kivi):
        for name, found in run(arguments):
            is_equal = equal(found, golden[name])
            wrong += not is_equal
            print("equal  " if is_equal else f"DIFFERS {found} {golden[name]}", name)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
