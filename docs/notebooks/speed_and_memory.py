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
# # Speed and memory
#
# First the bytes, which are exact anywhere; then times, which are those of the machine that this runs on.

# %%
import time
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvbench

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    initializer_range=0.1,
)
model = LlamaForCausalLM(config).eval()  # a step's time does not depend on the values of the weights
input_ids = torch.randint(3, 1024, (1, 2000))

# %% [markdown]
# ## Bytes
#
# KV bytes = layers x KV heads x tokens x head_dim x 2 x bytes of a number. `kvbench kv-size` has the formula for any
# model.

# %%
METHODS = {
    "full": {},
    "snapkv 256": {"name": "snapkv", "budget": 256},
    "streaming_llm 256": {"name": "streaming_llm", "budget": 256},
    "kivi4": {"name": "kivi", "storage": "kivi4"},
    "snapkv 256 + kivi4": {"name": "snapkv", "budget": 256, "storage": "kivi4"},
}


def new_method(label):
    options = dict(METHODS[label])
    return kvbench.method(options.pop("name", label), **options)


formula = 4 * 4 * 2000 * 32 * 2 * 4
for label in METHODS:
    with kvbench.compress(model, new_method(label)) as cache:
        kvbench.prefill(model, cache, input_ids)
    print(f"{label:<20} {cache.kv_bytes:>10,} bytes  {cache.kv_bytes / formula:6.1%} of the full cache")
    if label == "full":
        assert cache.kv_bytes == cache.kv_bytes_stored == formula

# %% [markdown]
# ## Times
#
# The prompt is prefilled once a method; then each decode step is timed, and the median counts. A table that is to be
# shown to anyone needs more than that: processes of their own, warm-ups, repetitions in turn with the full cache, and
# the machine in the record. That is what `kvbench run runner=efficiency` does.

# %%
STEPS = 16


def step_ms(label):
    with kvbench.compress(model, new_method(label)) as cache:
        token = kvbench.prefill(model, cache, input_ids).argmax(-1)
        times = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            token = kvbench.decode(model, cache, token).argmax(-1)
            times.append(1e3 * (time.perf_counter() - begin))
    return median(times[1:])


for label in METHODS:
    print(f"{label:<20} {step_ms(label):7.2f} ms a step")

# %% [markdown]
# The same as a record, with TTFT, TPOT, peaks and the bound that memory bandwidth sets:
#
#     kvbench run runner=efficiency method=snapkv method.budget=256 workload.prompt_tokens=2000 workload.new_tokens=32
