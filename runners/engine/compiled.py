"""Decode steps of a Llama-like decoder in C++, for one or two rows on a CPU (``runner.compile``).

With so few rows a product with a weight costs little more than reading the weight, and a library's matrix products are
far from that speed (docs/explanation/engine.md). ``decoder.cpp`` reads each weight once, from front to back, and
computes the small operations between the products. Each layer takes two calls: one before its attention and one after
it. The cache computes the attention, by a kernel in C++ if it has one for the storage
(:mod:`...methods.storage.kernels.cpu`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from ctypes import CDLL, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ...conf.errors import InputError
from ...methods.cache.cache import KVCache
from ...methods.cache.forward import LayerCall
from ...methods.cache.kernel_use import cpu_kernels
from ...methods.cache.logits import LogitRule
from ...methods.storage.kernels import cpu
from ...methods.storage.kernels.cpp import SCALARS, CompilerError, compile_kernels
from .fused_decode import supports_fused_decode
from .fused_weights import Affine, fuse
from .step import COMPILED, DecodeStep
from .step_operations import is_changed
from .weights import copy_mapped_tensors

MAX_ROWS = 2
"""oneDNN's matrix products of four rows and more are faster than those of ``decoder.cpp``."""
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2}
"""Numbers in ``decoder.cpp`` of activations, by their names in a model's configuration."""


class LayerWeights(NamedTuple):
    """Weights of one decoder layer; ``head_norms`` are those of queries and keys, if the model has them."""

    attention_norm: torch.Tensor
    query_key_value: Affine
    head_norms: tuple[torch.Tensor | None, torch.Tensor | None]
    output: Affine
    mlp_norm: torch.Tensor
    gate_and_up: Affine
    down: Affine


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        *((name, c_int64) for name in ("activation", "threads")),
        ("epsilon", c_double),
    ]


class CompiledDecoder:
    """Compiled decode steps of one model: the logits of :func:`..decoding.decode`, up to rounding.

    Weights with the same input are concatenated in one tensor, and the layers' own weights become views of it: each
    weight is stored once, and the model can be used as before. Weights that are replaced later are not seen.

    Args:
        model: Model that :func:`can_compile`; changed in place.

    Attributes:
        layers: Weights of the decoder layers.
        output: Weight of the output layer.
    """

    def __init__(self, model: PreTrainedModel):
        self.model: Any = model
        self.layers = [_weights_of(layer) for layer in self.model.model.layers]
        self.output, self._last_norm = _affine(self.model.lm_head), self.model.model.norm.weight.detach()
        self._pointers = [_pointers(weights) for weights in self.layers]
        self._output_pointers = _pointers(self.output)
        config, attention = model.config, self.model.model.layers[0].self_attn
        self._rule = LogitRule(attention.scaling)
        self._sizes = _Sizes(
            *(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, attention.head_dim),
            *(config.intermediate_size, ACTIVATIONS[config.hidden_act], torch.get_num_threads()),
            config.rms_norm_eps,
        )

    @torch.inference_mode()
    def __call__(self, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
        """[rows] int64, at most :data:`MAX_ROWS` rows -> logits [rows, vocabulary]."""
        base, sizes, at_sizes, rows = self.model.model, self._sizes, ctypes.byref(self._sizes), len(token)
        kernels = compiled_kernels(rows, self.output.weight.dtype)
        x = base.embed_tokens(token[:, None])
        cos, sin = (c.contiguous() for c in base.rotary_emb(x, position_ids=cache.next_positions()[:, None]))
        with cpu_kernels():
            for number, layer in enumerate(self._pointers):
                query = x.new_empty(rows, sizes.heads, 1, sizes.head_dim)
                key, value = (x.new_empty(rows, sizes.kv_heads, 1, sizes.head_dim) for _ in range(2))
                before = (x, cos, sin, query, key, value)
                kernels.before_attention(layer, at_sizes, *(t.data_ptr() for t in before))
                out = cache.attend(number, LayerCall(query, key, value, self._rule), None).to(x.dtype).contiguous()
                result = torch.empty_like(x)
                kernels.after_attention(layer, at_sizes, out.data_ptr(), x.data_ptr(), result.data_ptr())
                x = result
        logits = x.new_empty(rows, len(self.output.weight))
        output = self._last_norm.data_ptr(), self._output_pointers
        kernels.output_logits(*output, at_sizes, x.data_ptr(), logits.data_ptr(), logits.shape[1])
        return logits

    def prepare(self, rows: int) -> None:
        """Compile for this number of rows, unless already compiled.

        Raises:
            InputError: There is no C++ compiler, or it fails.
        """
        sizes, dtype = self._sizes, self.output.weight.dtype
        sizes.threads = torch.get_num_threads()
        one = torch.empty(1, 1, 1, sizes.head_dim, dtype=dtype)
        query, key = one.expand(1, sizes.heads, 1, -1), one.expand(1, sizes.kv_heads, 1, -1)
        try:
            compiled_kernels(rows, dtype)
            if cpu.problem(query, key, key) is None:
                cpu.compiled(sizes.head_dim, sizes.head_dim, sizes.heads // sizes.kv_heads, dtype)
        except CompilerError as error:
            problem = "needs a C++ compiler that works: g++, clang++, or the one that CXX names"
            raise InputError("runner.compile", True, f"{problem} ({error}); false: steps without it") from error


@functools.cache
def compiled_kernels(rows: int, dtype: torch.dtype) -> CDLL:
    """The functions of ``decoder.cpp`` for so many rows.

    Raises:
        CompilerError: There is no compiler, or it fails.
    """
    library = compile_kernels(Path(__file__).with_name("decoder.cpp"), dtype, ROWS=rows)
    functions = {
        "before_attention": [c_void_p] * 8,
        "after_attention": [c_void_p] * 5,
        "output_logits": [*[c_void_p] * 5, c_int64],
        "product": [*[c_void_p] * 3, c_int64, c_int64, c_int],
    }
    for name, arguments in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def product(x: torch.Tensor, by: Affine) -> torch.Tensor:
    """A linear layer: [rows, in_features] -> [rows, out_features], with at most :data:`MAX_ROWS` rows."""
    out = x.new_empty(len(x), len(by.weight))
    pointers = _pointers(by), x.data_ptr(), out.data_ptr()
    kernels = compiled_kernels(len(x), x.dtype)
    kernels.product(*pointers, x.shape[1], out.shape[1], torch.get_num_threads())
    return out


def can_compile(model: PreTrainedModel) -> bool:
    """Whether a compiled step computes what ``model(...)`` does: a Llama-like decoder on the CPU without hooks."""
    if model.device.type != "cpu" or not supports_fused_decode(model):
        return False
    dtypes, config = {p.dtype for p in model.parameters()}, model.config
    if len(dtypes) != 1 or not dtypes <= SCALARS.keys() or config.hidden_act not in ACTIVATIONS:
        return False
    modules, source = list(model.modules()), type(model).__module__
    norms: list[Any] = [m for m in modules if "Norm" in type(m).__name__]
    if any(type(norm).__module__ != source or norm.variance_epsilon != config.rms_norm_eps for norm in norms):
        return False
    base: Any = model.model
    if {type(layer.mlp.act_fn) for layer in base.layers} != {type(ACT2FN[config.hidden_act])}:
        return False
    return not any(map(is_changed, modules)) and all(type(m) is nn.Linear for m in modules if hasattr(m, "in_features"))


def compile_decoder(model: PreTrainedModel) -> CompiledDecoder:
    """The compiled decoder of a model that :func:`can_compile`; its weights are copied out of mapped files first."""
    copy_mapped_tensors(model)
    return CompiledDecoder(model)


class CompiledStep(DecodeStep):
    """A compiled step of one cache.

    Args:
        decoder: The model's compiled decoder.
        rows: Number of rows.
    """

    mode = COMPILED

    def __init__(self, decoder: CompiledDecoder, cache: KVCache, rows: int):
        super().__init__(cache)
        self._decoder = decoder
        decoder.prepare(rows)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self._decoder(self.cache, token)


def _weights_of(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    return LayerWeights(
        layer.input_layernorm.weight.detach(),
        fuse((attention.q_proj, attention.k_proj, attention.v_proj)),
        (None, None) if norms is None else (norms[0].weight.detach(), norms[1].weight.detach()),
        _affine(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        fuse((mlp.gate_proj, mlp.up_proj)),
        _affine(mlp.down_proj),
    )


def _affine(layer: nn.Linear) -> Affine:
    return Affine(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def _pointers(weights: Any) -> Any:
    """A C struct of pointers to tensors, in the order of a (nested) tuple of them; null for None."""
    tensors = list(_flat(weights))
    assert all(x is None or x.is_contiguous() for x in tensors)
    return (c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def _flat(weights: Any) -> Iterator[torch.Tensor | None]:
    for part in weights:
        if isinstance(part, tuple):
            yield from _flat(part)
        else:
            yield part
