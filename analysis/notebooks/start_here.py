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
# # Start here
#
# Everything kvbench prints is made from the records of finished runs, so everything can be made again here: point
# `RESULTS` at a results folder. No model, no GPU and no torch is needed.

# %%
# %matplotlib inline
from pathlib import Path

from IPython.display import Markdown, display

from kvbench.analysis.figures import draw, figures
from kvbench.analysis.load import comparable, frame, load
from kvbench.analysis.stats import paired_difference
from kvbench.analysis.tables import markdown, tables

RESULTS = Path("../../results/reference/pareto_quick")
runs, problems = load(RESULTS)
print(f"{len(runs)} runs, {len(problems)} records that cannot be read", *problems, sep="\n")

# %% [markdown]
# ## The runs as a data frame
#
# One row a run. `kv_bytes_stored` is memory that the cache takes after the prompt; `kv_ratio` is its share of the plain
# cache's.

# %%
runs_frame = frame(runs)
runs_frame[["kind", "task", "model", "label", "dtype", "score", "kv_ratio", "decode_tokens_per_s"]].round(3)

# %% [markdown]
# ## The tables
#
# Only runs that differ in nothing but their method stand in one table.

# %%
for table in tables(runs):
    display(Markdown(markdown(table)))

# %% [markdown]
# ## The figures
#
# `kvbench plot` writes these and others as files; `kvbench plot --help` lists the kinds.

# %%
for spec in figures(runs, ["pareto", "speed", "length", "trained"]):
    print(spec.title, *spec.caption, sep="\n")
    display(draw(spec))

# %% [markdown]
# ## Where a method loses
#
# A mean hides which examples pay. Each run has its predictions and scores, example by example: here are those that lost
# most against the full cache, under the smallest budget of the first group.

# %%
group = next(g for g in comparable(runs) if g[0].record["kind"] == "accuracy" and len(g) > 1)
full = next(run for run in group if run.is_full_cache)
small = min((run for run in group if not run.is_full_cache), key=lambda run: run.record["bytes"]["kv_bytes_stored"])
before = {(row["dataset"], row["id"]): row for row in full.samples()}
after = {(row["dataset"], row["id"]): row for row in small.samples()}
losses = sorted(before, key=lambda key: after[key]["score"] - before[key]["score"])
for key in losses[:3]:
    print("/".join(key), f"score {before[key]['score']:.2f} -> {after[key]['score']:.2f}")
    print("  full:       ", before[key]["prediction"][:100].replace("\n", " "))
    print(f"  {small.label}:", after[key]["prediction"][:100].replace("\n", " "))

# %% [markdown]
# ## The paired difference, by hand
#
# The interval of a difference is that of the examples' own differences, which is why it is narrower than two intervals
# side by side. The record's own difference comes from the same rows; `kvbench verify` computes all of them again.


# %%
def by_set(rows):
    out: dict[str, dict[str, float]] = {}
    for (dataset, example), row in rows.items():
        out.setdefault(dataset, {})[example] = 100 * row["score"]
    return out


difference = paired_difference(by_set(after), by_set(before))
print(f"{small.label} - full: {difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]")
assert abs(difference.mean - small.record["paired"]["difference"]["mean"]) < 1e-9
