# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Add a method
#
# A token method is a product: a **scorer** says what a token is worth, an **allocator** shares the budget out among
# layers and heads, a **schedule** says when tokens leave, and a **storage** holds what stays. Here a scorer is
# written and combined with parts that are there.

# %%
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvbench
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.prompt import Prompt

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    initializer_range=0.2,
)
model = LlamaForCausalLM(config).eval()  # random weights are enough to see which tokens stay
input_ids = torch.randint(3, 512, (1, 300))

# %% [markdown]
# ## A scorer
#
# One function: the prompt's keys and values of a layer in, a number for each token of each KV head out. The largest
# stay.


# %%
class ValueNorm(kvbench.Scorer):
    """Keep the tokens with the longest values."""

    id, name = "ValueNorm", "value_norm"  # in records; as typed on the command line

    def score(self, prompt, state=None):
        return prompt.values.float().norm(dim=-1)  # [R, H_kv, T]


def held(method):
    """Tokens that each layer and head holds after a prompt, and the bytes of the cache."""
    with kvbench.compress(model, method) as cache:
        kvbench.prefill(model, cache, input_ids)
    return [layer[0].tolist() for layer in cache.tokens_held], cache.kv_bytes


uniform = kvbench.Method("value_norm", kvbench.EvictionPolicy(ValueNorm(), budget=64, sinks=4, recent=16))
held(uniform)

# %% [markdown]
# ## With other parts
#
# The same scorer under Ada-KV's budgets, which differ between heads, and in 4 bits.

# %%
adaptive = kvbench.EvictionPolicy(ValueNorm(), budget=64, sinks=4, recent=16, allocator=kvbench.Adaptive())
per_head, adaptive_bytes = held(kvbench.Method("value_norm", adaptive))
print(per_head)
_, plain_bytes = held(uniform)
_, quantized_bytes = held(kvbench.Method("value_norm", uniform.policy, kvbench.Kivi(bits=4, residual=16, group=16)))
print(plain_bytes, "bytes,", quantized_bytes, "in 4 bits")
assert quantized_bytes < plain_bytes

# %% [markdown]
# ## Against the rule in plain Python
#
# A new method gets a test that does not use its own code: the rule as loops over lists.

# %%
values = torch.randn(1, 4, 100, 16)
queries, keys = torch.randn(1, 8, 1, 16), torch.randn(1, 4, 100, 16)
prompt = Prompt(queries, keys, values, LogitRule(16**-0.5), 0, 1)
kept = kvbench.EvictionPolicy(ValueNorm(), budget=20, recent=4).select(prompt).slots[0].tolist()
for head in range(4):
    lengths = {t: float(values[0, head, t].norm()) for t in range(96)}
    expected = [*sorted(sorted(lengths, key=lengths.get)[-16:]), 96, 97, 98, 99]
    assert kept[head] == expected
print("as expected")

# %% [markdown]
# ## On the command line
#
# A file `value_norm.py` with the class and a YAML of two lines make it `method/scorer=value_norm`, with tables, plots
# and pairing like any other; docs/how-to/add_a_method.md has both, and a test follows that page.
