"""Where the time of a decode step on a CPU goes, and what other ways of attending would take.

    python scripts/bench_decode_parts.py [--prompt-tokens 4096] [--dtype bfloat16] [--compile] [-o FILE]

One process, the default model, one sequence. First a step as it is, without its attention, without its linear layers,
and without both, in turn. Then a product with every weight, for one row and for more (a prompt's, at last), as
torch.nn.Linear has it, with the weights in blocks, and with those that meet the same input joined as well (as steps
that are not compiled have it), beside the time of only adding the same weights up. Then the attention of one layer over
caches that lie cold in memory, in several forms in turn, beside adding up again; of whole heads and of heads in two
parts at other lengths too, and of a single head. ``--compile`` adds the kernels in C++ for the products and the
attention, what torch.compile makes of the latter, and a step as ``runner.compile`` has it (needs a C++ compiler).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench_engine import finish, random_ids

from kvbench.methods.cache.cache import KVCache
from kvbench.methods.cache.cpu_threads import split_kv_attention
from kvbench.methods.cache.forward import LayerCall
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.storage.kernels import cpu
from kvbench.models.embedded import Embedded
from kvbench.runners.engine import DecodeStep, decode, decode_step, prefill
from kvbench.runners.engine.compiled import MAX_ROWS, Affine, CompiledDecoder, compile_decoder, product
from kvbench.runners.engine.prepacked import PrepackedLinear
from kvbench.runners.engine.weights import prepack_linear_weights
from kvbench.runners.measure.bandwidth import read_bandwidth
from kvbench.runners.records import provenance

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SCALE = 0.125
CACHE_BYTES, REPEATS = 200_000_000, 60
"""Bytes of the different caches, more than any processor holds, and calls of each form."""
ROWS = (1, 2, 4, 8, 16, 64, 512)
LENGTHS = (512, 1024, 2048, 4096, 8192)


def whole_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's flash kernel: a head is a thread's."""
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


def parts(number: int) -> Form:
    """The same with the slots of each head in parts, as the engine has it."""
    return lambda q, k, v: split_kv_attention(q, k, v, SCALE, number)


def batched_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two matrix products over all heads."""
    return torch.matmul(torch.matmul(q, k.transpose(2, 3)).mul_(SCALE).softmax(-1), v)


def products_by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two matrix products for each head."""
    pairs = zip(q[0], k[0], v[0], strict=True)
    return torch.stack([torch.mm(torch.mm(a, b.t()).mul_(SCALE).softmax(-1), c) for a, b, c in pairs])[None]


def products_by_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two products with a vector for each query."""
    out = [
        torch.mv(v[0, h].t(), torch.mv(k[0, h], q[0, h, j]).mul_(SCALE).softmax(-1))
        for h in range(k.shape[1])
        for j in range(q.shape[2])
    ]
    return torch.stack(out).view_as(q)


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Products and sums as they stand in the definition: for a compiler."""
    weights = ((k[:, :, :, None] * q[:, :, None]).sum(-1) * SCALE).softmax(2)
    return (weights[..., None] * v[:, :, :, None]).sum(2)


def cpp_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The kernel that compiled steps use."""
    return cpu.attention(q.flatten(1, 2)[:, :, None], k, v, LogitRule(SCALE))[0].view_as(q)


def adding_up(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Reading alone."""
    return k.sum() + v.sum()


def milliseconds(forms: Mapping[str, Form], caches: Sequence[Tensors]) -> dict[str, float]:
    """Of one call of each form, in turn, each on another cache than the form before it."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    which = itertools.cycle(caches)
    for _ in range(REPEATS + 5):
        for name, form in forms.items():
            one = next(which)
            start = time.perf_counter()
            form(*one)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(some[5:]) for name, some in times.items()}


def made_caches(config: Any, length: int, dtype: torch.dtype, heads: int) -> list[Tensors]:
    """(query, keys, values) of one layer behind ``length`` tokens, often enough to lie cold in memory."""
    dim, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    made = []
    for _ in range(max(4, CACHE_BYTES // (2 * heads * length * dim * dtype.itemsize)) | 1):  # odd: forms go round
        k, v = torch.randn(2, 1, heads, length + 63, dim).to(dtype)[:, :, :, :length]
        made.append((torch.randn(1, heads, groups, dim).to(dtype), k, v))
    return made


def steps_without(model: Any, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of a step with parts of it left out, in turn."""
    cache = Method("full").new_cache(model)
    token = prefill(model, cache, ids).argmax(-1)
    real = KVCache.attend, PrepackedLinear.forward

    def no_attention(self: KVCache, layer: int, call: LayerCall, *rest: Any) -> torch.Tensor:
        return call.query

    def no_linear(self: PrepackedLinear, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)

    variants = {
        "whole": real,
        "without_attention": (no_attention, real[1]),
        "without_linear_layers": (real[0], no_linear),
        "without_both": (no_attention, no_linear),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    seen = cache.tokens_seen
    try:
        for _ in range(repeats):
            for name, (attend, linear) in variants.items():
                KVCache.attend, PrepackedLinear.forward = attend, linear  # type: ignore[method-assign,assignment]
                cache.tokens_seen = seen
                for _ in range(10):
                    start = time.perf_counter()
                    decode(model, cache, token)
                    times[name].append(time.perf_counter() - start)
    finally:
        KVCache.attend, PrepackedLinear.forward = real  # type: ignore[method-assign]
    return {name: 1e3 * median(found) for name, found in times.items()}


def products(plain: Any, joined: Any, compiled: CompiledDecoder | None, repeats: int) -> dict[str, dict[int, float]]:
    """Milliseconds of a product with every weight that a step reads, for so many rows; in C++ for few alone."""
    layers = {
        "linear": [m for m in plain.modules() if isinstance(m, torch.nn.Linear)],
        "blocked": [PrepackedLinear(m) for m in plain.modules() if isinstance(m, torch.nn.Linear)],
        "joined": [m for m in joined.modules() if isinstance(m, PrepackedLinear)],
    }
    weights: list[Affine] = []
    if compiled is not None:
        weights = [w for one in compiled.layers for w in (one.query_key_value, one.output, one.gate_and_up, one.down)]
        weights.append(compiled.output)
    found: dict[str, dict[int, float]] = {name: {} for name in (*layers, "cpp", "adding_up")}
    for rows in ROWS:
        inputs = {m.in_features: torch.randn(rows, m.in_features, dtype=plain.dtype) for m in layers["linear"]}

        def of(name: str, inputs: dict[int, torch.Tensor] = inputs) -> None:
            for layer in layers[name]:
                layer(inputs[layer.in_features])

        def adding() -> None:
            for layer in layers["linear"]:
                layer.weight.sum()

        def of_kernel(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for by in weights:
                product(inputs[by.weight.shape[1]], by)

        forms: dict[str, Callable[[], None]] = {n: partial(of, n) for n in layers} | {"adding_up": adding}
        if weights and rows <= MAX_ROWS:
            of_kernel()
            forms["cpp"] = of_kernel
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(5 * repeats if rows <= 16 else repeats):
            for name, form in forms.items():
                start = time.perf_counter()
                form()
                times[name].append(time.perf_counter() - start)
        for name, some in times.items():
            found[name][rows] = 1e3 * median(some)
    return found


def steps_compiled(model: Any, compiled: CompiledDecoder, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of a step as it is and compiled, in turn."""
    steps: dict[str, DecodeStep] = {}
    for name, one, decoder in (("eager", model, None), ("compiled", compiled.model, compiled)):
        cache = Method("full").new_cache(one)
        token = prefill(one, cache, ids).argmax(-1)
        steps[name] = decode_step(one, cache, token, 10 * repeats + 1, compiled=decoder)
    first = [step(token) for step in steps.values()]
    assert (first[0] - first[1]).abs().max() < (1e-3 if model.dtype == torch.float32 else 1)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            for _ in range(10):
                start = time.perf_counter()
                step(token)
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(found) for name, found in times.items()}


@torch.inference_mode()
def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    plain = Embedded().load("cpu", dtype).model
    model = copy.deepcopy(plain)
    prepack_linear_weights(model)
    compiled_model: CompiledDecoder | None = None
    if args.compile:
        compiled_model = compile_decoder(copy.deepcopy(plain))
    config, compiled = model.config, {}
    steps = steps_without(model, random_ids(1, args.prompt_tokens), args.repeats)
    for name, value in steps.items():
        print(f"step, {name:<24} {value:7.2f} ms", flush=True)
    weights = products(plain, model, compiled_model, args.repeats)
    for rows in ROWS:
        each = ", ".join(f"{name} {times[rows]:.1f} ms" for name, times in weights.items() if rows in times)
        print(f"weights, {rows} rows: {each}", flush=True)
    if compiled_model is not None:
        for length in (args.prompt_tokens, args.prompt_tokens // 8):
            compiled[length] = steps_compiled(model, compiled_model, random_ids(1, length), args.repeats)
            each = ", ".join(f"{name} {value:.2f} ms" for name, value in compiled[length].items())
            print(f"step behind {length} tokens: {each}", flush=True)
    forms: dict[str, Form] = {"whole_heads": whole_heads, "in_2_parts": parts(2), "in_8_parts": parts(8)}
    heads_or_parts = dict(list(forms.items())[:2])
    forms |= {f.__name__: f for f in (batched_products, products_by_head, products_by_query)}
    if args.compile:
        forms |= {"sums_compiled": torch.compile(sums, dynamic=True), "cpp_kernel": cpp_kernel}
    kv_heads: int = config.num_key_value_heads
    caches = made_caches(config, args.prompt_tokens + 1, dtype, kv_heads)
    expected = whole_heads(*caches[0])
    for name, form in forms.items():
        assert (form(*caches[0]) - expected).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2), name
    found = milliseconds({**forms, "adding_up": adding_up}, caches)
    read = caches[0][1].nbytes + caches[0][2].nbytes
    for name, value in found.items():
        print(f"attention, {name:<20} {value:7.3f} ms  {read / value / 1e6:6.1f} GB/s", flush=True)
    by_length: dict[int, dict[int, dict[str, float]]] = {kv_heads: {}, 1: {}}
    for heads, length in itertools.product(by_length, LENGTHS):
        times = milliseconds(heads_or_parts, made_caches(config, length, dtype, heads))
        by_length[heads][length] = times
        each = ", ".join(f"{name} {value:.3f} ms" for name, value in times.items())
        print(f"attention of {heads} heads over {length} tokens: {each}", flush=True)
    result = {
        "step_ms": steps,
        "weights_ms": weights,
        "step_ms_by_length": compiled,
        "attention_ms": found,
        "attention_bytes": read,
        "attention_ms_by_heads_and_length": by_length,
        "read_bandwidth_gb_per_s": read_bandwidth("cpu") / 1e9,
        "settings": {"prompt_tokens": args.prompt_tokens, "dtype": args.dtype, "threads": torch.get_num_threads()},
        "provenance": provenance.collect("cpu"),
    }
    finish(result, args.output)


if __name__ == "__main__":
    main()
