"""Write ``golden_authors.json``: what the authors' own code of Quest, KVQuant and CaM gives on small inputs.

    git clone https://github.com/mit-han-lab/Quest && git -C Quest checkout 01c1623
    git clone https://github.com/SqueezeAILab/KVQuant && git -C KVQuant checkout 57a2383
    git clone https://github.com/zyxxmu/cam && git -C cam checkout fc80e64
    python tests/golden/make_golden_authors.py --quest Quest --kvquant KVQuant --cam cam

Their functions are imported and run in float32 on a CPU. What a function needs and does not use here (a rotation, since
queries and keys are given as after RoPE; scikit-learn, for a codebook that is given) is replaced by a stand-in.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

OUTPUT = Path(__file__).with_name("golden_authors.json")
GRID = 64
"""Inputs are multiples of 1 / GRID, so that they and the middle of two of them are exact in float16 and in the file."""


def load(path: Path) -> ModuleType:
    """Import a module from a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(*shape: int, seed: int) -> torch.Tensor:
    """Gaussian numbers on the grid, float32."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * GRID).round() / GRID


def quest(checkout: Path) -> dict[str, Any]:
    """Run the evaluation's attention of one decode step and record its page scores, its pages and its output."""
    module = load(checkout / "evaluation" / "quest_attention.py")
    module.apply_rotary_pos_emb = lambda query, keys, *_: (query, keys)
    seen: dict[str, torch.Tensor] = {}
    select = module.local_heavy_hitter_mask

    def recorded(scores: torch.Tensor, budget: int, page: int) -> torch.Tensor:
        mask: torch.Tensor = select(scores, budget, page)
        seen.update(scores=scores, mask=mask)
        return mask

    module.local_heavy_hitter_mask = recorded
    heads, length, dim = 2, 45, 8
    keys, values = (numbers(1, heads, length, dim, seed=seed) for seed in (1, 2))
    queries = 2 * numbers(4, 1, heads, 1, dim, seed=3)
    cases = []
    for query in queries:
        for page, budget in ((4, 16), (4, 24), (8, 16), (16, 16)):
            attention = SimpleNamespace(
                layer_id=2,
                num_heads=heads,
                num_key_value_heads=heads,
                num_key_value_groups=1,
                head_dim=dim,
                hidden_size=heads * dim,
                token_budget=budget,
                chunk_size=page,
                rotary_emb=lambda *_: (None, None),
                q_proj=lambda _, query=query: query.transpose(1, 2).reshape(1, 1, -1),
                k_proj=lambda _: keys[:, :, -1:].transpose(1, 2).reshape(1, 1, -1),
                v_proj=lambda _: values[:, :, -1:].transpose(1, 2).reshape(1, 1, -1),
                o_proj=lambda x: x,
            )
            position = torch.tensor([[length - 1]])
            past = keys[:, :, :-1], values[:, :, :-1]
            out = module.forward(attention, torch.zeros(1, 1, heads * dim), None, position, past, use_cache=True)[0]
            pages = seen["mask"][0, :, 0, ::page]  # [H, pages]
            cases.append(
                {
                    "query": query[0, :, 0].tolist(),
                    "page": page,
                    "budget": budget,
                    "scores": seen["scores"][0, :, 0, ::page].tolist(),
                    "pages": [row.nonzero()[:, 0].tolist() for row in pages],
                    "output": out.reshape(heads, dim).tolist(),
                }
            )
    return {"keys": keys[0].tolist(), "values": values[0].tolist(), "cases": cases}


def kvquant(checkout: Path) -> dict[str, Any]:
    """Run the simulated quantization of keys with given thresholds and of values with their own, by given codebooks."""
    if importlib.util.find_spec("sklearn") is None:
        sys.modules["sklearn"], sys.modules["sklearn.cluster"] = ModuleType("sklearn"), ModuleType("sklearn.cluster")
        sys.modules["sklearn.cluster"].KMeans = None  # type: ignore[attr-defined]
    module = load(checkout / "quant" / "kvquant" / "simquant_module_quantizer.py")
    nearest, rounded = module.round_to_nearest_pole_sim, []

    def recorded(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        rounded.append(nearest(x, levels))
        return rounded[-1]

    module.round_to_nearest_pole_sim = recorded
    tokens, dim, outliers = 20, 16, 2
    high = 1.5 + numbers(dim, seed=4).abs()  # thresholds of each channel
    low = -1.25 - numbers(dim, seed=5).abs()
    keys, values = (numbers(tokens, dim, seed=seed).clamp(-1, 1) for seed in (6, 7))
    generator = torch.Generator().manual_seed(8)
    for token in range(tokens):  # exactly two numbers of each vector are outliers, one on each side
        first, second = torch.randperm(dim, generator=generator)[:outliers].tolist()
        keys[token, first], keys[token, second] = high[first] + 1 + token / 8, low[second] - 0.5
        values[token, first], values[token, second] = 3 + token / 16, -2.75
    cases = []
    for bits in (2, 3, 4):
        levels = numbers(2**bits, seed=10 + bits).mul(0.4).add(torch.linspace(-0.9, 0.9, 2**bits)).clamp(-1, 1)
        levels = levels.sort().values.mul(1000).round() / 1000
        mask = module.get_outliers(keys, 0, high, low, first_few_fp16=1)
        found = module.quant_fn_nuq_recon(
            keys, bits, 0, False, True, mask, high, low, [levels.numpy()], first_few_fp16=1
        )
        value_mask = module.get_outliers_dynamic(values, -1, 0.99, first_few_fp16=-1)
        value_found = module.quant_fn_nuq_recon(values, bits, -1, True, True, value_mask, lut=[levels.numpy()])
        codes = [torch.searchsorted(levels, x.reshape(tokens, dim)).tolist() for x in rounded[-2:]]
        cases.append(
            {
                "bits": bits,
                "levels": levels.tolist(),
                "key_outliers": [row.nonzero()[:, 0].tolist() for row in mask],
                "key_codes": codes[0],
                "keys": found.tolist(),
                "value_outliers": [row.nonzero()[:, 0].tolist() for row in value_mask],
                "value_codes": codes[1],
                "values": value_found.tolist(),
            }
        )
    inputs = {"keys": keys, "values": values, "low": low, "high": high}
    return {**{name: x.tolist() for name, x in inputs.items()}, "outliers": outliers, "cases": cases}


def cam(checkout: Path) -> dict[str, Any]:
    """Run one merge of the deterministic rule of the OPT class: no start tokens, a recent window of 33 tokens."""
    module = load(checkout / "cam_hf" / "utils_hh" / "modify_opt_cam.py")
    heads, length, dim, window = 6, 40, 4, 33
    cases = []
    for seed in range(3):
        values = numbers(heads, length, dim, seed=20 + seed)
        scores = numbers(heads, length - 1, seed=30 + seed).abs() + 0.25  # of all tokens but the newest
        merged = module.local_cam_mask(values.clone(), scores, 0, window)
        cases.append({"values": values.tolist(), "scores": scores.tolist(), "merged": merged.tolist()})
    return {"window": window, "victim": length - 1 - window, "cases": cases}


def rounded_numbers(x: Any) -> Any:
    """Return lists with their numbers at float32's precision."""
    if isinstance(x, dict):
        return {key: rounded_numbers(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded_numbers(value) for value in x]
    return float(f"{x:.8g}") if isinstance(x, float) else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("quest", "kvquant", "cam"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="checkout of the published code")
    arguments = parser.parse_args()
    entries = {
        "quest": quest(arguments.quest),
        "kvquant": kvquant(arguments.kvquant),
        "cam": cam(arguments.cam),
    }
    OUTPUT.write_text(json.dumps(rounded_numbers(entries), separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
