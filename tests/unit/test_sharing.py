"""The sharing models: every invariant that holds without training, in eager and sdpa attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sharing_models import DOWNWARD, LATENT, RETENTION, SHAPE, UPWARD, config_of, name_of, plain_config, shared_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from kvbench.conf.errors import InputError
from kvbench.methods.cache.layout import describe_layers
from kvbench.methods.sharing.cla import CLA
from kvbench.methods.sharing.framework import KVShare
from kvbench.methods.sharing.heads import Heads
from kvbench.methods.sharing.kv_map import Segment, segments
from kvbench.methods.sharing.lckv import LCKV
from kvbench.methods.sharing.mla import MLA
from kvbench.methods.sharing.yoco import YOCO
from kvbench.models.kvshare.config import KVShareLlamaConfig
from kvbench.models.kvshare.model import KVShareLlamaForCausalLM
from kvbench.models.kvshare.retention import retention
from kvbench.tasks.text import Text

ALL = [*DOWNWARD, *UPWARD, RETENTION, LATENT]
CLOSE = 1e-9  # float64
NEAR = {"sdpa": CLOSE, "eager": 1e-4}
"""Eager attention takes its softmax in float32 and is tried on float32 models."""


def ids(length, seed=0, batch=1):
    return torch.randint(2, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(*lengths):
    longest = max(lengths)
    rows = [F.pad(ids(n, seed), (longest - n, 0)) for seed, n in enumerate(lengths)]
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return torch.cat(rows), mask


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


def exact(sharing):
    """As many passes as tokens if a layer has a higher KV source."""
    return {"encode": "exact"} if sharing in UPWARD else {}


every_map = pytest.mark.parametrize("sharing", ALL, ids=name_of)
every_map_and_kernel = pytest.mark.parametrize(
    ("sharing", "attention"),
    [
        pytest.param(
            sharing, attention, marks=() if is_quick else pytest.mark.slow, id=f"{name_of(sharing)}-{attention}"
        )
        for attention in ("sdpa", "eager")
        for sharing in ALL
        for is_quick in [attention == "sdpa" or sharing in (CLA(2), LCKV(2), RETENTION)]
    ],
)
both_kernels = pytest.mark.parametrize("attention", ["sdpa", "eager"])


# the maps --------------------------------------------------------------------------------------------------------


def test_the_papers_maps():
    assert CLA(3).source(10) == [0, 1, 1, 1, 4, 4, 4, 7, 7, 7]
    assert len(set(CLA(3).source(20))) == 7
    assert CLA(1).source(5) == Heads().source(5) == [0, 1, 2, 3, 4]
    assert YOCO().source(6) == [0, 1, 2, 3, 3, 3]
    assert YOCO().layer_types(6) == ["sliding_attention"] * 3 + ["full_attention"] * 3
    assert LCKV(2).source(6) == [0, 4, 4, 4, 4, 5]
    assert LCKV(0).source(4) == [3, 3, 3, 3]
    assert LCKV(10).source(30) == [0, 1, 2, 3, 4, *[24] * 20, 25, 26, 27, 28, 29]
    assert KVShare(3, "sandwich", "middle").source(22) == [0, *[10] * 20, 21]


@pytest.mark.parametrize("layers", [6, 8, 12])
def test_the_methods_are_members_of_the_family(layers):
    for own in (1, 2, 3):
        assert YOCO(own).source(layers) == KVShare(own + 1, "pizza", "bottom").source(layers)
    for factor in (2, 3):
        if layers % factor == 0:
            assert CLA(factor).source(layers) == KVShare(layers // factor, "lasagna", "bottom").source(layers)
    for warmup in (2, 4):
        assert LCKV(warmup).source(layers) == KVShare(warmup + 1, "sandwich", "top").source(layers)


def test_lasagna_puts_the_short_blocks_first_and_layer_0_owns_its_keys():
    assert KVShare(3, "lasagna", "bottom").source(8) == [0, 0, 2, 2, 2, 5, 5, 5]
    assert KVShare(3, "lasagna", "top").source(8) == [0, 1, 4, 4, 4, 7, 7, 7]
    assert KVShare(3, "lasagna", "top", force_first_kv=False).source(8) == [1, 1, 4, 4, 4, 7, 7, 7]


def test_segments():
    assert segments([0, 4, 4, 4, 4, 5]) == [Segment(0, 0, False), Segment(1, 4, True), Segment(5, 5, False)]
    sandwich = segments(KVShare(3, "sandwich", "middle").source(22))
    assert sandwich == [Segment(0, 0, False), Segment(1, 10, True), Segment(11, 21, False)]
    assert segments([3, 1, 4, 3, 4, 5]) == [Segment(0, 4, True), Segment(5, 5, False)]  # overlapping references
    assert segments([1, 1, 3, 3]) == [Segment(0, 1, True), Segment(2, 3, True)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kv_source_layers": [0, 0, 0]}, "3 entries for 6 layers"),
        ({"kv_source_layers": [0, 0, 1, 1, 4, 4]}, r"kv_source_layers\[2\] is 1, and layer 1 does not own keys"),
        ({"kv_source_layers": [0, 0, 9, 3, 4, 4]}, r"kv_source_layers\[2\] is 9, which is no layer"),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 3, "kv_source_layers": [0, 0, 2, 3, 4, 5]},
            "layer 1 is full_attention and its source, layer 0, is sliding",
        ),
        ({"layer_types": ["sliding_attention"] + ["full_attention"] * 5}, "sliding_window is None and layer 0 slides"),
        ({"layer_types": ["chunked"] + ["full_attention"] * 5}, r"layer_types\[0\] is 'chunked'"),
        (
            {"layer_types": ["sliding_attention"] * 6, "kv_source_layers": [1, 1, 2, 3, 4, 5], "sliding_window": 4},
            "layer 0 has the higher layer 1 as its source",
        ),
        (
            {
                "layer_types": ["full_attention", "sliding_attention", "full_attention"] * 2,
                "kv_source_layers": [2, 1, 2, 3, 4, 5],
                "sliding_window": 4,
            },
            "layer 1 is sliding_attention and between",
        ),
        ({"upward_style": "old"}, "upward_style is 'old'"),
        ({"iter_backward": 0}, "iter_backward=0 must be >= 1"),
        ({"kv_lora_rank": 8}, "kv_lora_rank is 8 and qk_rope_head_dim is missing"),
    ],
    ids=str,
)
def test_a_broken_map_says_which_rule_and_which_layer(keys, message):
    with pytest.raises(ValueError, match=message):
        KVShareLlamaConfig(**(SHAPE | keys))


@pytest.mark.parametrize(
    "make",
    [
        lambda: CLA(0),
        lambda: YOCO(mixer="mamba"),
        lambda: YOCO(window=1),
        lambda: YOCO(6).source(6),
        lambda: LCKV(5).source(6),
        lambda: LCKV(style="new"),
        lambda: KVShare(7, "pizza").source(6),
        lambda: KVShare(partition="calzone"),
        lambda: KVShare(map=[0, 0]).source(6),
        lambda: KVShare(map=[0, 0, 1, 1, 4, 4]).config_keys(SHAPE),
        lambda: Heads(3).config_keys(SHAPE),
        lambda: MLA(qk_rope_head_dim=5),
    ],
)
def test_bad_settings_name_their_key(make):
    with pytest.raises(InputError, match=r"^method\.sharing"):
        make()


# 1, 2, 3, 4, 5: a forward ----------------------------------------------------------------------------------------


@torch.no_grad()
@both_kernels
def test_with_every_layer_its_own_it_is_llama(attention):
    theirs = LlamaForCausalLM(plain_config(attn_implementation=attention)).eval()
    ours = KVShareLlamaForCausalLM(config_of(Heads(2), attention)).eval()
    ours.load_state_dict(theirs.state_dict())
    x, mask = left_padded(20, 13)
    assert torch.equal(ours(ids(20)).logits, theirs(ids(20)).logits)
    padded = {"attention_mask": mask, "position_ids": positions_of(mask)}
    assert torch.equal(ours(x, **padded).logits, theirs(x, **padded).logits)


@torch.no_grad()
@every_map_and_kernel
def test_token_by_token_in_chunks_and_all_at_once_are_the_same(sharing, attention):
    model, x = shared_model(sharing, attention, **exact(sharing)), ids(24)
    whole = model(x, use_cache=False).logits
    for parts in ([1] * 24, [15, 5, 4], [1, 23], [23, 1]):
        past, out = DynamicCache(config=model.config), []
        for part in x.split(parts, dim=1):
            out.append(model(part, past_key_values=past).logits)
        assert (torch.cat(out, dim=1) - whole).abs().max() < NEAR[attention], parts


@torch.no_grad()
@every_map_and_kernel
def test_no_token_sees_a_later_one(sharing, attention):
    model, x = shared_model(sharing, attention), ids(24)
    other = x.clone()
    other[0, -1] = (x[0, -1] + 1) % 90 + 2
    assert torch.equal(model(x).logits[:, :-1], model(other).logits[:, :-1])


@every_map_and_kernel
def test_left_padding_changes_nothing_and_gradients_are_finite(sharing, attention):
    model = shared_model(sharing, attention).train()
    lengths = (20, 11, 1)
    x, mask = left_padded(*lengths)
    logits = model(x, attention_mask=mask, position_ids=positions_of(mask)).logits
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(ids(length, row), n_iter=9).logits
        assert (logits[row, -length:] - alone[0]).abs().max() < NEAR[attention]
    logits[mask.bool()].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sharing", UPWARD, ids=name_of)
def test_the_kernels_own_causal_mask_is_the_mask_with_a_slot_of_zeros(sharing, attention):
    """Without padding sdpa takes neither mask nor slot; a mask of ones makes it take both."""
    model, x = shared_model(sharing, attention), ids(17, batch=2)
    assert (model(x).logits - model(x, attention_mask=torch.ones_like(x)).logits).abs().max() < NEAR[attention]


# 6, 15: what is stored -------------------------------------------------------------------------------------------


def test_layers_of_gated_retention_are_described_as_recurrent():
    described = describe_layers(shared_model(RETENTION))
    assert described == {"full_attention": 1, "recurrent": 3, "reading_others": 2}


@torch.no_grad()
@every_map
def test_only_sources_store_and_as_many_bytes_as_the_formula_says(sharing):
    model = shared_model(sharing)
    past = DynamicCache(config=model.config)
    model(ids(20), past_key_values=past)
    config, held = model.config, 0
    stored = [layer for layer in past.layers if getattr(layer, "keys", None) is not None]
    kinds = [config.layer_types[s] for s in sorted(set(config.kv_source_layers))]
    assert len(stored) == sum(kind != "linear_attention" for kind in kinds)
    for kind in kinds:
        tokens = {"full_attention": 20, "sliding_attention": min(20, 7), "linear_attention": 0}[kind]
        numbers = 12 + 4 if sharing is LATENT else 2 * config.num_key_value_heads * config.head_dim
        held += numbers * tokens * 8
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in stored) == held


@pytest.mark.parametrize("sharing", [*DOWNWARD, *UPWARD], ids=name_of)
def test_parameters_are_the_plain_models_less_the_consumers_projections(sharing):
    model = shared_model(sharing)
    config = model.config
    plain = LlamaForCausalLM(plain_config(num_key_value_heads=config.num_key_value_heads))
    owners = len(set(config.kv_source_layers))
    gone = (6 - owners) * 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    norms = owners * config.hidden_size if config.separate_kv_norm else 0
    assert model.num_parameters() == plain.num_parameters() - gone + norms


# 7: prefill leaves early ------------------------------------------------------------------------------------------


@torch.no_grad()
@both_kernels
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("sharing", DOWNWARD, ids=name_of)
def test_layers_above_the_last_source_run_for_the_last_tokens_alone(sharing, keep, attention):
    model = shared_model(sharing, attention)
    x, mask = left_padded(20, 12)
    last = max(model.config.kv_source_layers)
    for given in ({}, {"attention_mask": mask, "position_ids": positions_of(mask)}):
        whole = model(x, **given).logits[:, -keep:]
        past, columns, hooks = DynamicCache(config=model.config), *counted(model)
        out = model(x, past_key_values=past, logits_to_keep=keep, **given).logits
        for hook in hooks:
            hook.remove()
        assert (out - whole).abs().max() < NEAR[attention]
        if keep == 1 or attention == "eager" or given:  # sdpa without a mask needs all rows or a single one
            assert columns == [20] * last + [keep] * (6 - last)
        step = ids(1, 9, batch=2)
        after = {}
        if given:
            after = {"attention_mask": F.pad(mask, (0, 1), value=1), "position_ids": mask.sum(1, keepdim=True)}
        again = model(torch.cat([x, step], dim=1), **({} if not given else _longer(mask))).logits[:, -1]
        assert (model(step, past_key_values=past, **after).logits[:, -1] - again).abs().max() < NEAR[attention]


def counted(model):
    """A list that gets the columns of each layer's MLP, and the hooks to take off."""
    columns = []
    return columns, [
        layer.mlp.register_forward_pre_hook(lambda _, args: columns.append(args[0].shape[1]))
        for layer in model.model.layers
    ]


def _longer(mask):
    mask = F.pad(mask, (0, 1), value=1)
    return {"attention_mask": mask, "position_ids": positions_of(mask)}


@torch.no_grad()
def test_it_does_not_leave_early_where_someone_looks():
    model, x = shared_model(YOCO(window=8)), ids(20)
    states = model(x, logits_to_keep=1, output_hidden_states=True).hidden_states
    assert [s.shape[1] for s in states] == [20] * 7
    eager = shared_model(YOCO(window=8), "eager")
    weights = eager(x, logits_to_keep=1, output_attentions=True).attentions
    assert len(weights) == 6 and all(w.shape[-2] == 20 for w in weights)


# 8, 9, 10: passes ------------------------------------------------------------------------------------------------


@torch.no_grad()
@both_kernels
@pytest.mark.parametrize("sharing", UPWARD, ids=name_of)
def test_after_r_passes_the_first_r_tokens_are_exact(sharing, attention):
    model, x = shared_model(sharing, attention), ids(24)
    past, steps = DynamicCache(config=model.config), []
    for token in x.split(1, dim=1):
        steps.append(model(token, past_key_values=past).logits)
    sequential = torch.cat(steps, dim=1)
    for passes in (1, 2, 5, 12, 24):
        far = (model(x, n_iter=passes).logits - sequential).abs().amax(-1)[0]
        assert far[:passes].max() < NEAR[attention], passes
        if passes <= 5:
            assert far.max() > 1e-3  # and the others are not, so that this can fail
    assert torch.equal(model(x, n_iter=24).logits, model(x, n_iter=99).logits)


@torch.no_grad()
@pytest.mark.parametrize("sharing", UPWARD[:3], ids=name_of)
def test_where_the_passes_begin_does_not_matter_in_the_end(sharing, monkeypatch):
    model, x = shared_model(sharing), ids(16)
    before = model(x, n_iter=16).logits
    new_zeros = torch.Tensor.new_zeros

    def ones_for_the_first_carry(self, *shape):
        return new_zeros(self, *shape) + (shape[-2:] == (16, 8))

    monkeypatch.setattr(torch.Tensor, "new_zeros", ones_for_the_first_carry)
    assert (model(x, n_iter=16).logits - before).abs().max() < CLOSE
    assert (model(x, n_iter=1).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("sharing", UPWARD, ids=name_of)
def test_gradients_flow_through_the_last_passes(sharing):
    """With b=1 none reaches the shared keys and values through the layers that use them, with b=2 some does."""
    x = ids(16)
    gradients = {}
    for backward in (1, 2):
        model = shared_model(sharing, iter_backward=backward, iter_forward=3).train()
        model(x, labels=x).loss.backward()
        without = {n for n, p in model.named_parameters() if p.grad is None}
        top = max(s for i, s in enumerate(model.config.kv_source_layers) if s > i)
        weight = model.model.layers[top].self_attn.k_proj.weight
        assert without == set() if backward == 2 else all("proj" in n for n in without)
        gradients[backward] = torch.zeros_like(weight) if weight.grad is None else weight.grad
    assert (gradients[1] - gradients[2]).abs().max() > 1e-6


def test_the_loss_on_changing_keys_is_added_and_is_nothing_when_they_hold_still():
    x = ids(16)
    plain, weighted = (shared_model(LCKV(2), kv_loss_weight=w).train() for w in (0.0, 3.0))
    without, with_it = plain(x, labels=x).loss, weighted(x, labels=x).loss
    change = plain.model(x).kv_loss
    assert change > 0 and (with_it - without - 3 * change).abs() < CLOSE
    assert plain.model(x, n_iter=16).kv_loss < 1e-12


@pytest.mark.parametrize("sharing", [CLA(2), YOCO(window=8), LCKV(2), RETENTION], ids=name_of)
def test_activation_checkpointing_gives_the_same_gradients(sharing):
    x, found = ids(16), []
    for checkpointing in (False, True):
        model = shared_model(sharing).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(x, labels=x).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all((a - b).abs().max() < CLOSE for a, b in zip(*found, strict=True))


def test_mixed_precision_leaves_a_retention_state_in_float32():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 8, generator=generator) for _ in range(3))
    decay = torch.zeros(1, 2, 20)
    exact, _ = retention(q, k, v, decay)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, state = retention(q, k, v, decay)
    assert torch.equal(mixed, exact) and state.dtype == torch.float32


def test_bfloat16_trains():
    for sharing in (CLA(2), YOCO(window=8), LCKV(2), RETENTION):
        model = shared_model(sharing, dtype=torch.bfloat16).train()
        model(ids(16), labels=ids(16)).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


# 11, 12: as transformers uses it ---------------------------------------------------------------------------------


@torch.no_grad()
@every_map_and_kernel
def test_generate_is_greedy_recomputation_alone_and_in_a_padded_batch(sharing, attention):
    model = shared_model(sharing, attention, **exact(sharing))
    lengths = (15, 9)
    x, mask = left_padded(*lengths)
    together = model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, length in enumerate(lengths):
        told = ids(length, row)
        alone = model.generate(told, max_new_tokens=8, do_sample=False)
        for _ in range(8):
            told = torch.cat([told, model(told, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(alone, told)
        assert torch.equal(together[row, -8:], told[0, -8:])


@torch.no_grad()
@every_map
def test_beam_search_is_that_without_a_cache(sharing):
    model = shared_model(sharing, **exact(sharing))
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    cached, plain = (model.generate(ids(12), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_a_static_cache_gives_the_same_text_and_is_refused_where_it_cannot_work():
    for sharing in DOWNWARD:
        model = shared_model(sharing, dtype=torch.float32)
        dynamic, static = (
            model.generate(ids(12), max_new_tokens=8, do_sample=False, cache_implementation=kind, disable_compile=True)
            for kind in (None, "static")
        )
        assert torch.equal(dynamic, static), sharing
    with pytest.raises(ValueError, match="static cache"):
        shared_model(LCKV(2)).generate(ids(12), max_new_tokens=2, cache_implementation="static", disable_compile=True)


@every_map
def test_saved_and_loaded_it_says_the_same(sharing, tmp_path):
    model = shared_model(sharing, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "kvshare_llama"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, KVShareLlamaForCausalLM)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    said = (m.generate(ids(10), max_new_tokens=6, do_sample=False) for m in (model, loaded))
    assert torch.equal(*said)


def test_a_plain_checkpoint_loads_without_a_word(tmp_path):
    plain = LlamaForCausalLM(plain_config())
    plain.save_pretrained(tmp_path)
    for sharing in (CLA(2), LCKV(2), YOCO(separate_kv_norm=False)):
        model, info = KVShareLlamaForCausalLM.from_pretrained(
            tmp_path, config=config_of(sharing), output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        own = model.model.layers[0].self_attn.q_proj.weight
        assert torch.equal(own, plain.model.layers[0].self_attn.q_proj.weight)


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_last_pass():
    for sharing in (CLA(2), LCKV(2)):
        model, x = shared_model(sharing, "eager"), ids(12)
        out = model(x, output_hidden_states=True, output_attentions=True)
        assert len(out.hidden_states) == 7 and len(out.attentions) == 6
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


# 16, 17: YOCO ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_token_outside_every_window_counts_through_the_cross_layers_alone():
    model, x = shared_model(YOCO(window=4)), ids(40)
    other = x.clone()
    other[0, 3] = x[0, 3] % 90 + 3
    assert (model(x).logits[:, -1] - model(other).logits[:, -1]).abs().max() > 1e-6  # 3 layers of window 4 reach 9 back
    layer = model.model.layers[3].self_attn
    project_kv = layer.project_kv

    def without(hidden, cos_sin):
        keys, values = project_kv(hidden, cos_sin)
        keys[:, :, :20], values[:, :, :20] = 0.0, 0.0
        return keys, values

    layer.project_kv = without
    assert torch.equal(model(x).logits[:, -1], model(other).logits[:, -1])


def test_retention_in_chunks_of_any_size_is_the_recurrence():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 29, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    decay = -torch.rand(2, 3, 29, generator=generator, dtype=torch.float64)
    state = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    naive = []
    for t in range(29):
        state = decay[:, :, t, None, None].exp() * state + torch.einsum("bhi,bhj->bhij", k[:, :, t], v[:, :, t])
        naive.append(torch.einsum("bhi,bhij->bhj", q[:, :, t], state))
    naive = torch.stack(naive, dim=2)
    for chunk in (1, 5, 8, 29, 64):
        out, last = retention(q, k, v, decay, chunk=chunk)
        assert (out - naive).abs().max() < 1e-12 and (last - state).abs().max() < 1e-12
    first, half = retention(q[:, :, :11], k[:, :, :11], v[:, :, :11], decay[:, :, :11])
    second, _ = retention(q[:, :, 11:], k[:, :, 11:], v[:, :, 11:], decay[:, :, 11:], half)
    assert (torch.cat([first, second], dim=2) - naive).abs().max() < 1e-12


# 13: lm-eval ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", [CLA(2), YOCO(window=8), LCKV(2), RETENTION], ids=name_of)
def test_lm_eval_scores_and_generates_alike_in_any_batch(sharing):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs the package lm-eval")
    from lm_eval.api.instance import Instance

    tokenizer = Text().new_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token
    model = shared_model(sharing, dtype=torch.float32, vocab_size=len(tokenizer), **exact(sharing))
    pairs = [("The cat sat on the", " mat"), ("One two", " three four"), ("A", " rather longer continuation")]

    def requests(kind, arguments):
        return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]

    found = {}
    for size in (1, 3):
        lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=64)
        scored = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
        told = lm.generate_until(
            requests("generate_until", [(context, settings) for context, _ in pairs]), disable_tqdm=True
        )
        found[size] = scored, told
    (alone, said_alone), (together, said_together) = found[1], found[3]
    assert [a[0] for a in alone] == pytest.approx([b[0] for b in together], abs=1e-3)
    assert said_alone == said_together and all(said_alone)
