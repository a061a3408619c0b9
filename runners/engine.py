"""Prefill and decode: two plain functions; generation and the scoring of given text on top of them.

    logits = prefill(model, cache, input_ids, attention_mask)   # read the prompt, compress it
    logits = decode(model, cache, token)                        # one more token per row
    for logits in feed(model, cache, ids):                      # several more

The model is a transformers causal LM; everything that differs between methods happens inside the cache.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..conf.errors import InputError
from ..methods.cache.cache import KVCache
from ..methods.cache.rotary import DYNAMIC_ROPE_TYPES
from ..models.kvshare.model import KVShareLlamaForCausalLM
from ..tasks.base import Likelihood
from .fused_decode import fused_decode_step, supports_fused_decode

AT_ONCE = 256
"""Columns fed together after a prompt, at most."""
LOGITS = 1 << 28
"""Logits in memory at a time, at most: fewer columns go together where rows are many and the vocabulary is large."""


def rope_type(model: PreTrainedModel) -> str | None:
    """The kind of the model's RoPE, as its config says."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    found: str | None = rope.get("rope_type")
    return found


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Read the prompts and compress them.

    Args:
        model: the model that ``cache`` was made for.
        cache: a fresh cache.
        input_ids: [B, T], padded on the left.
        attention_mask: [B, T], 1 for a real token; None: no padding.
        chunk_size: feed this many columns at a time (same result, less memory); None: all at once. Where layers are
            independent, each reads the whole prompt in such pieces and compresses it before the next one begins, so
            that the peak is the compressed cache, one layer's keys and values, and the hidden states.

    Returns:
        Logits of the last token, [rows, vocabulary], rows as in :func:`decode`.

    Raises:
        InputError: there is no token, the cache has been used, or the model takes its prompts in one piece.
        RuntimeError: a layer did not hand its keys and values to the cache (full attention would run silently).
    """
    if not input_ids.shape[1]:
        raise InputError("prompt", "of no tokens", "must have at least one token")
    if cache.get_seq_length():
        raise InputError(
            "cache", f"of {cache.get_seq_length()} tokens", "has been used; make a new one for each prompt"
        )
    if cache.separate_prefills:
        return cache.join(
            [prefill(model, one, input_ids, attention_mask, chunk_size) for one in cache.separate_prefills]
        )
    length = input_ids.shape[1]
    mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if cache.recomputes:
        return _forward_all(model, cache, input_ids, mask)[:, -1]
    pieces = chunk_size is not None and chunk_size < length
    by_layers = pieces and cache.layers_are_independent and _decoder_layers(model) is not None
    kind = rope_type(model)
    if kind in DYNAMIC_ROPE_TYPES and (mask is not None or (pieces and not by_layers)):
        raise InputError(
            "runner.chunk_size" if mask is None else "batch_size",
            chunk_size if mask is None else input_ids.shape[0],
            f"the model's RoPE ({kind}) depends on the length of what is fed together: "
            "use batch_size=1 and runner.chunk_size=null",
        )
    if pieces and cache.states is not None:
        raise InputError(
            "runner.chunk_size", chunk_size, "a model with recurrent layers takes a prompt in one piece: null"
        )
    if mask is None:
        positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    else:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache.prompt_length = length
    step = length if chunk_size is None or by_layers else chunk_size
    if by_layers:
        assert chunk_size is not None
        reading: AbstractContextManager[None] = _layer_by_layer(model, cache, chunk_size)
    else:
        reading = nullcontext()
    # Given a number, Gemma 4 leaves the other tokens out of the layers that only read keys, and a method would not see
    # their queries.
    takes_index = cache.plan.shares and not isinstance(model, KVShareLlamaForCausalLM)
    for start in range(0, length, step):
        end = min(length, start + step)
        with reading:
            logits = model(
                input_ids=input_ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor([end - start - 1], device=input_ids.device) if takes_index else 1,
            ).logits
    if any(cache.get_seq_length(i) != length for i in cache.plan.attending):
        raise RuntimeError(f"{type(model).__name__} did not route every layer's attention through the kvbench cache")
    cache.end_prompt()
    return logits[:, -1].repeat(cache.copies, 1)


def _decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """The layers of a transformers decoder; None for a model with a loop of its own over them."""
    if isinstance(model, KVShareLlamaForCausalLM):
        return None
    return getattr(model.get_decoder(), "layers", None)


@contextmanager
def _layer_by_layer(model: PreTrainedModel, cache: KVCache, step: int) -> Iterator[None]:
    """Have each decoder layer take what it is given in pieces of ``step`` columns, for one forward.

    A column's way through a layer depends on other columns by keys and values alone, which are the cache's. So a layer
    may read piece by piece, and what it gives may be written over what it was given.
    """
    layers = _decoder_layers(model)
    assert layers is not None
    of_instance = [vars(layer).get("forward") for layer in layers]
    last = layers[len(layers) - 1]

    def in_pieces(forward: Callable[..., Any], is_last: bool) -> Callable[..., torch.Tensor]:
        def whole(hidden_states: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
            length = hidden_states.shape[1]
            for start in range(0, length, step):
                end = min(length, start + step)
                out = forward(
                    hidden_states[:, start:end],
                    *(_piece("", x, start, end, length) for x in rest),
                    **{k: _piece(k, v, start, end, length) for k, v in how.items()},
                )
                hidden_states[:, start:end] = out[0] if isinstance(out, tuple) else out
            return hidden_states[:, -1:] if is_last else hidden_states  # nobody asks for the other columns

        return whole

    cache.chunk_states = {}
    try:
        for layer in layers:
            layer.forward = in_pieces(layer.forward, layer is last)
        yield
    finally:
        cache.chunk_states = None
        for layer, before in zip(layers, of_instance, strict=True):
            if before is None:
                del layer.forward
            else:  # a library's hook
                layer.forward = before


def _piece(name: str, value: Any, start: int, end: int, length: int) -> Any:
    """What columns ``start`` .. ``end`` - 1 of ``length`` need of a decoder layer's argument."""
    if isinstance(value, tuple):
        return tuple(_piece(name, x, start, end, length) for x in value)
    if not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask":  # of all columns so far, [B, columns]; the cache sees to causality
        return value[..., :end]
    if name == "cache_position":
        return value[start:end]
    # positions, their cosines and sines, inputs of a layer's own: [B, columns, ...] or [B, heads, columns, ...]
    for dim in (1, 2):
        if value.dim() > dim and value.shape[dim] == length:
            return value.narrow(dim, start, end - start)
    return value


@torch.inference_mode()
def decode(model: PreTrainedModel, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
    """Feed one token per row: [rows] int64 -> logits [rows, vocabulary]; rows are ``cache.copies`` x B."""
    if cache.recomputes:
        return _forward_all(model, cache, token[:, None], None)[:, -1]
    if supports_fused_decode(model):
        return fused_decode_step(model, cache, token)
    return model(
        input_ids=token[:, None],
        position_ids=cache.next_positions()[:, None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


@torch.inference_mode()
def feed(model: PreTrainedModel, cache: KVCache, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Feed several tokens to every row after the prompt, each after the one before it.

    They go through the model several at a time where that is the same as one by one: not where tokens are rounded as
    they age, nor where RoPE depends on the length of what is fed together or layers keep a recurrent state.

    Args:
        model: the model that ``cache`` was made for.
        cache: one that has read a prompt.
        ids: [rows, n], rows as in :func:`decode`, without padding.

    Yields:
        Logits of the next columns, [rows, m, vocabulary] each, n columns in all.
    """
    step = min(AT_ONCE, max(1, LOGITS // (ids.shape[0] * model.config.get_text_config().vocab_size)))
    if cache.requantizes_on_append or cache.states is not None or rope_type(model) in DYNAMIC_ROPE_TYPES:
        step = 1
    for piece in ids.split(step, dim=1):
        n = piece.shape[1]
        if cache.recomputes:
            yield _forward_all(model, cache, piece, None, n)
        elif n == 1:
            yield decode(model, cache, piece[:, 0])[:, None]
        else:
            yield model(
                input_ids=piece,
                position_ids=cache.next_positions()[:, None] + torch.arange(n, device=piece.device),
                past_key_values=cache,
                use_cache=True,
            ).logits


def _forward_all(
    model: PreTrainedModel, cache: KVCache, ids: torch.Tensor, mask: torch.Tensor | None, last: int = 1
) -> torch.Tensor:
    """Without a cache: the whole sequence through the model again; logits [B, last, vocabulary] of its end."""
    ids, mask = cache.extend(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    padded = None if bool(mask.all()) else mask
    out = model(input_ids=ids, attention_mask=padded, position_ids=positions, use_cache=False, logits_to_keep=last)
    logits: torch.Tensor = out.logits[:, -last:]
    return logits


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids [B, T], mask [B, T]); the mask is None when all prompts are equally long."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if all(len(p) == longest for p in prompts):
        return ids, None
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this is drawn from.
        seeds: one seed per prompt row, or one for all. A row's draws depend on its own seed alone, not on its batch,
            and the members of a fan-out draw the same numbers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seeds: int | Sequence[int] = 0


@dataclass
class Generation:
    """What came out of :func:`generate`.

    Attributes:
        tokens: one list of new token ids per row, the stop token not included; rows as in :func:`decode`.
        steps: decode steps run (batched over rows).
    """

    tokens: list[list[int]]
    steps: int


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    min_new_tokens: int = 0,
    sampling: Sampling | None = None,
    chunk_size: int | None = None,
    after_prefill: Callable[[], None] | None = None,
    question: torch.Tensor | None = None,
    until: Callable[[int, list[int]], bool] | None = None,
) -> Generation:
    """Prefill, then decode until every row has ended.

    Args:
        model, cache, input_ids, attention_mask, chunk_size: see :func:`prefill`.
        max_new_tokens: tokens per row at most; >= 1.
        stop_ids: a row ends when it would produce one of these. Empty: all rows run to ``max_new_tokens`` (which is
            how speed is measured).
        min_new_tokens: no stop id is produced before a row has this many tokens (its probability is set to zero).
        sampling: greedy when None.
        after_prefill: called without arguments once the prompt is compressed, before anything else is fed.
        question: [B, q] further tokens of the prompts that no method sees before it compresses.
        until: a row also ends, after a token that is kept, where ``until(prompt row, its tokens)`` says so.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    batch, members = input_ids.shape[0], cache.copies
    draw = _Sampler(sampling or Sampling(), stop_ids, min_new_tokens, batch, input_ids.device)
    logits = prefill(model, cache, input_ids, attention_mask, chunk_size)
    if after_prefill is not None:
        after_prefill()
    if question is not None:
        (logits,) = collections.deque(feed(model, cache, question.repeat(members, 1)), maxlen=1)  # only the last
        logits = logits[:, -1]

    tokens: list[list[int]] = [[] for _ in range(batch * members)]
    rows = list(range(batch * members))  # row of `tokens` that each decode row stands for
    ended = [False] * (batch * members)
    steps = 0
    while True:
        token = draw(logits, steps)
        for row, value in zip(rows, token.tolist(), strict=True):
            if not ended[row]:
                if value in draw.stop_ids:
                    ended[row] = True
                else:
                    tokens[row].append(value)
                    ended[row] = until is not None and until(row % batch, tokens[row])
        steps += 1
        if steps >= max_new_tokens or all(ended):
            return Generation(tokens, steps - 1)
        if members > 1 and any(ended):
            rows, token = _drop_ended_members(cache, rows, ended, token, batch)
        logits = decode(model, cache, token)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    continuations: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
    *,
    chunk_size: int | None = None,
    after_prefill: Callable[[], None] | None = None,
) -> list[list[Likelihood]]:
    """Read the prompts, compress them, and ask what the model then thinks of continuations, each after a copy.

    A continuation is scored through the compressed cache alone if ``given`` holds at least one token: the first token
    after a prompt is predicted before anything is compressed.

    Args:
        model, cache, input_ids, attention_mask, chunk_size, after_prefill: as in :func:`generate`.
        continuations: for each prompt, pairs of ``given`` tokens that follow it and of the tokens to be scored, one or
            more of these.

    Returns:
        For each row (as in :func:`decode`) the likelihoods in the order of its prompt's continuations.
    """
    batch, members = input_ids.shape[0], cache.copies
    last = prefill(model, cache, input_ids, attention_mask, chunk_size)
    if after_prefill is not None:
        after_prefill()
    out: list[list[Likelihood]] = [[] for _ in range(batch * members)]
    most = max(len(c) for c in continuations)
    for number in range(most):
        asked = [c[number] if number < len(c) else ((), ()) for c in continuations]
        tails = [[*given, *scored] for given, scored in asked]
        width = max(len(tail) for tail in tails)
        # What pads a shorter row comes after all that is scored of it, and the copy is thrown away.
        ids = torch.tensor([tail + [0] * (width - len(tail)) for tail in tails], device=input_ids.device)
        fork = cache if number == most - 1 else cache.fork()
        log_probs, greedy = _follow(model, fork, last, ids.repeat(members, 1))
        for row in range(batch * members):
            given, scored = asked[row % batch]
            if scored:
                where = slice(len(given), len(given) + len(scored))
                out[row].append(Likelihood(log_probs[row, where].tolist(), greedy[row, where].tolist()))
    return out


def _follow(
    model: PreTrainedModel, cache: KVCache, last: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each of ``ids`` [rows, n] and whether it is the most probable token, both [rows, n].

    ``last`` [rows, vocabulary] are the logits that predict the first of them.
    """
    log_probs, greedy, start = [], [], 0
    for logits in itertools.chain([last[:, None]], feed(model, cache, ids[:, :-1]) if ids.shape[1] > 1 else ()):
        wanted = ids[:, start : start + logits.shape[1], None]
        log_probs.append(logits.float().log_softmax(-1).gather(-1, wanted)[..., 0])
        greedy.append(logits.argmax(-1, keepdim=True)[..., 0] == wanted[..., 0])
        start += logits.shape[1]
    return torch.cat(log_probs, dim=1), torch.cat(greedy, dim=1)


def _drop_ended_members(
    cache: KVCache, rows: list[int], ended: list[bool], token: torch.Tensor, batch: int
) -> tuple[list[int], torch.Tensor]:
    """Leave out the members of a fan-out whose rows have all ended, so that the others do not wait for them."""
    stay = []
    for member in reversed(range(cache.copies)):
        mine = rows[member * batch : (member + 1) * batch]
        if all(ended[row] for row in mine):
            cache.drop(member)
        else:
            stay.append(member)
    index = [m * batch + b for m in reversed(stay) for b in range(batch)]
    return [rows[i] for i in index], token[torch.tensor(index, device=token.device)]


class _Sampler:
    """Draws the next token of every row from its logits."""

    def __init__(
        self, sampling: Sampling, stop_ids: Sequence[int], min_new_tokens: int, batch: int, device: torch.device
    ):
        self.sampling, self.min_new_tokens = sampling, min_new_tokens
        self.stop_ids = frozenset(stop_ids)
        self._stop = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=device)
        seeds = [sampling.seeds] * batch if isinstance(sampling.seeds, int) else sampling.seeds
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: torch.Tensor, produced: int) -> torch.Tensor:
        """[rows, vocabulary] -> [rows] int64; rows are members x B. ``produced``: tokens each row has so far."""
        if produced < self.min_new_tokens and len(self._stop):
            logits = logits.index_fill(1, self._stop, float("-inf"))
        if self.sampling.temperature == 0.0:
            return logits.argmax(-1)
        probabilities = (logits.float() / self.sampling.temperature).softmax(-1)
        ordered, index = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the better tokens: the best one always stays
        ordered = ordered.masked_fill(before >= self.sampling.top_p, 0.0)
        cumulative = ordered.cumsum(-1)
        uniform = torch.stack([torch.rand(1, generator=g) for g in self._generators]).to(logits.device)  # [B, 1]
        point = uniform.repeat(logits.shape[0] // len(self._generators), 1) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, point, right=True).clamp(max=ordered.shape[-1] - 1)
        return index.gather(-1, drawn)[:, 0]
