"""Quest, KVQuant and CaM against the numbers of their authors' own code (``golden_authors.json``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_codes import unpack_codes

from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.policies.merging import Merging
from kvbench.methods.policies.scorers.cam import CaM
from kvbench.methods.storage import kvquant
from kvbench.methods.storage.dense import DenseLayer
from kvbench.methods.storage.kvquant import KeyCodec, ValueCodec
from kvbench.methods.storage.quest import FEWEST_PAGES, QuestLayer, choose_pages, page_bounds

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parent.parent / "golden" / "golden_authors.json").read_text(encoding="utf-8")
)
QUEST, KVQUANT, CAM = (GOLDEN[name] for name in ("quest", "kvquant", "cam"))


@pytest.mark.parametrize("case", QUEST["cases"], ids=lambda case: f"page {case['page']}, budget {case['budget']}")
def test_quest_bounds_and_pages_are_the_authors(case):
    """Their evaluation reads the pages of the largest bounds; their kernels and ours read the last page in any case."""
    keys, query = torch.tensor(QUEST["keys"]), torch.tensor(case["query"])[:, None]  # [H, T, D], [H, 1, D]
    page, count = case["page"], max(FEWEST_PAGES, case["budget"] // case["page"])
    low, high = page_bounds(keys, page)
    bound = (query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT)[:, 0]  # [H, pages]
    scores = torch.tensor(case["scores"])
    torch.testing.assert_close(bound, scores, rtol=1e-5, atol=1e-5)
    length = torch.full((len(keys),), keys.shape[1])
    ours = choose_pages(query, (low, high), length, page, count, keys.shape[2] ** -0.5)
    last = scores.shape[1] - 1
    for head, published in enumerate(case["pages"]):
        assert len(published) == count
        others = sorted((p for p in published if p != last), key=lambda p, head=head: -scores[head, p])
        assert sorted(ours[head].tolist()) == sorted([*others[: count - 1], last])


def test_quest_attends_as_the_authors_where_they_read_the_last_page():
    compared = 0
    for case in QUEST["cases"]:
        keys, values = (torch.tensor(QUEST[name])[None] for name in ("keys", "values"))  # [1, H, T, D]
        page = case["page"]
        layer = QuestLayer(page, max(FEWEST_PAGES, case["budget"] // page))
        layer.write(keys[:, :, :-1], values[:, :, :-1])
        layer.append(keys[:, :, -1:], values[:, :, -1:])
        out = layer.attend(torch.tensor(case["query"])[None, :, None], LogitRule(keys.shape[3] ** -0.5), None)
        last = (keys.shape[2] - 1) // page
        for head, published in enumerate(case["pages"]):
            if last in published:
                torch.testing.assert_close(out[0, head, 0], torch.tensor(case["output"][head]), rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared >= 8


@pytest.mark.parametrize("case", KVQUANT["cases"], ids=lambda case: f"{case['bits']} bits")
def test_kvquant_codes_and_numbers_are_the_authors(case, monkeypatch):
    """With their thresholds and codebook: the same outliers, codes and dequantized keys and values."""
    levels, bits, m = torch.tensor(case["levels"], dtype=torch.float64), case["bits"], KVQUANT["outliers"]
    monkeypatch.setattr(kvquant, "gaussian_levels", lambda bits, share: levels)
    high, low = torch.tensor(KVQUANT["high"]), torch.tensor(KVQUANT["low"])
    keys = torch.tensor(KVQUANT["keys"])[None]  # [1, T, D]
    middle, half = ((x / 2).half()[None] for x in (high + low, high - low))
    assert torch.equal(middle[0].float() * 2, high + low) and torch.equal(half[0].float() * 2, high - low)
    values = torch.tensor(KVQUANT["values"])[None]
    for codec, x, constants, name, exact in (
        (KeyCodec(bits, m, sinks=1), keys, [keys[:, :1], middle, half], "key", 1),
        (ValueCodec(bits, m, sinks=0), values, [values[:, :0]], "value", 0),
    ):
        planes = codec.encode(x, constants)
        channels = planes[codec.code_planes + 1][0].long()
        rest = torch.ones(x.shape[1:], dtype=torch.bool).scatter_(1, channels, False)
        assert [sorted(row.tolist()) for row in channels[exact:]] == case[f"{name}_outliers"][exact:]
        codes = unpack_codes([plane[0] for plane in planes[: codec.code_planes]], bits, x.shape[2])
        assert torch.equal(codes[exact:][rest[exact:]], torch.tensor(case[f"{name}_codes"])[exact:][rest[exact:]])
        found = codec.decode(planes, constants, torch.float32)[0]
        torch.testing.assert_close(found, torch.tensor(case[f"{name}s"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CAM["cases"], ids=range(len(CAM["cases"])))
def test_cam_merges_as_the_authors(case):
    """A token merges where its score is above the mean of the window: then it is above that of the others in it."""
    values, scores = torch.tensor(case["values"])[None], torch.tensor(case["scores"])[None]  # [1, H, T, D], [1, H, T-1]
    expected, victim = torch.tensor(case["merged"])[None], CAM["victim"]
    storage = DenseLayer()
    storage.write(values, values)
    scorer = CaM(receivers=CAM["window"] - 1, bernoulli=False)
    merging = Merging(scorer, 0)
    merging.begin(torch.tensor([values.shape[2]]))
    kept = torch.ones(values.shape[:3], dtype=torch.bool)
    kept[:, :, victim] = False
    place = torch.full((*values.shape[:2], 1), victim)
    scores = torch.nn.functional.pad(scores, (0, 1))  # the newest token has received no attention yet
    merging.merge_one(storage, scores, kept, place, torch.ones_like(place, dtype=torch.bool), in_place=False)
    keys, found, _ = storage.read()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(keys, values)
    merged = (expected != values).any(-1).any(-1)[0].tolist()
    assert True in merged and False in merged
