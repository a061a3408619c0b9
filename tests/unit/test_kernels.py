"""Triton kernels against attention in float64, on a CUDA device or in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvbench.methods.cache.logits import LogitRule

pytest.importorskip("triton")
from kvbench.methods.storage import kivi, minicache_kivi, quest, static_kivi, step_attention
from kvbench.methods.storage.kernels import dense
from kvbench.methods.storage.kernels.launch import Tiling
from kvbench.methods.storage.minicache import pair
from kvbench.methods.storage.minicache.static import static_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference from float64 on the same inputs; outputs are of magnitude 1."""


def supported(*_, layout_problem: str | None = None) -> bool:
    """Stand-in for ``uses_kernel``: by the kernel on the CPU too; never silently by PyTorch."""
    assert layout_problem is None
    return True


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact(query, keys, values, visible, rule):
    """Output [B, H_q, 1, D_v] and weights [B, H, g, S] in float64; ``visible`` [B, 1 or H, S]."""
    batch, heads = keys.shape[:2]
    q = query.double().reshape(batch, heads, -1, query.shape[3])
    logits = q @ keys.double().transpose(2, 3) * rule.scaling
    if rule.softcap is not None:
        logits = rule.softcap * (logits / rule.softcap).tanh()
    logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    if rule.sinks is not None:
        sink = rule.sinks.double().view(1, heads, -1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    weights = logits.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values.double()).flatten(1, 2)[:, :, None], weights


def check_dense(batch, heads, group, dim, value_dim, length, used, dtype, holes, softcap, sinks, window, weights):
    query = numbers(batch, heads * group, 1, dim, seed=1, dtype=dtype)
    keys, values = (
        numbers(batch, heads, length, dim, seed=2, dtype=dtype),
        numbers(batch, heads, length, value_dim, seed=3, dtype=dtype),
    )
    rule = LogitRule(2 * dim**-0.5, softcap, numbers(heads * group, seed=4) if sinks else None)
    slot = torch.arange(length, device=DEVICE)
    visible = (slot < used)[None, None].expand(batch, 1, length)
    if window is not None:
        visible = visible & (slot >= used - window)
    valid = None
    if holes:
        valid = numbers(batch, holes, length, seed=5) > -0.5
        valid[..., used - 1] = True
        visible = visible & valid
    for x in (keys, values):
        x[:, :, used:] = float("nan")  # unused slots are not read
    stored = dense.rectangular(keys, values, valid, torch.tensor([used], device=DEVICE))
    out, given = dense.attention(query, stored, rule, window, weights)
    expected, expected_weights = exact(query, keys.nan_to_num(), values.nan_to_num(), visible, rule)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    if weights is not None:
        if weights == "mean":
            expected_weights = expected_weights.mean(2, keepdim=True)
        torch.testing.assert_close(given.double(), expected_weights, rtol=0, atol=TOLERANCE[dtype] / 4)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DENSE = [  # B, H, group, D, D_v, slots, used, dtype, mask heads, soft cap, sinks, window, weights
    (2, 3, 1, 64, 64, 300, 250, F32, 1, None, False, None, None),
    (1, 1, 4, 128, 128, 1000, 1000, BF16, 0, 5.0, True, None, "heads"),
    (2, 3, 3, 96, 96, 70, 70, F16, 3, None, True, 33, "mean"),
    (1, 1, 8, 192, 128, 129, 128, F32, 1, 2.0, False, None, "mean"),
    (1, 1, 1, 16, 16, 1, 1, F32, 0, None, False, None, "heads"),
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense_kernel_matches_float64(case):
    check_dense(*case)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 500, 3000])
@pytest.mark.parametrize("dim", [(64, 64), (96, 96), (128, 128), (256, 256), (192, 128)], ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_dense_kernel_over_the_grid(length, dim, group):
    for i, dtype in enumerate((F32, F16, BF16)):
        holes, cap, sinks = (0, 1, 3)[i], (None, 3.0, None)[i], (True, False, True)[(i + length) % 3]
        window = (None, 17, None)[(i + group) % 3]
        weights = (None, "heads", "mean")[(i + length + group) % 3]
        check_dense(1, 3, group, *dim, length + i, length, dtype, holes, cap, sinks, window, weights)


@pytest.mark.parametrize(("group", "dtype", "holes"), [(1, BF16, False), (3, F32, True)])
def test_ragged_kernel_matches_float64(group, dtype, holes):
    """Heads of very different lengths, with and without holes."""
    lengths, dim = [1, 200, 37, 64], 64
    room = [n + 5 for n in lengths]
    starts = torch.tensor([0, *torch.tensor(room).cumsum(0)[:-1].tolist()], device=DEVICE)
    keys, values = numbers(sum(room), dim, seed=1, dtype=dtype), numbers(sum(room), dim, seed=2, dtype=dtype)
    query = numbers(2, 2 * group, 1, dim, seed=3, dtype=dtype)
    rule = LogitRule(0.2, None, numbers(2 * group, seed=4))
    counts = torch.tensor(lengths, device=DEVICE)
    valid = numbers(2, 2, max(room), seed=5) > -0.5 if holes else None
    if valid is not None:
        valid[..., 0] = True
    out, _ = dense.attention(query, dense.ragged(keys, values, (2, 2), max(room), starts, counts, valid), rule)
    for n, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=True)):
        b, h = divmod(n, 2)
        heads = slice(h * group, (h + 1) * group)
        part = (x[start : start + length][None, None] for x in (keys, values))
        every = torch.ones(1, 1, length, dtype=torch.bool, device=DEVICE)
        visible = every if valid is None else valid[b : b + 1, h : h + 1, :length]
        expected, _ = exact(query[b : b + 1, heads], *part, visible, LogitRule(0.2, None, rule.sinks[heads]))
        torch.testing.assert_close(out[b : b + 1, heads].double(), expected, rtol=0, atol=TOLERANCE[dtype])


def check_pages(lengths, page, count, group, dim, value_dim, dtype, softcap=None):
    """A list of some pages of each of two heads, the last one among them; other tokens are NaN, for none is read."""
    starts = torch.tensor([0, lengths[0] + 3], device=DEVICE)
    query = numbers(1, 2 * group, 1, dim, seed=3, dtype=dtype)
    plain = [numbers(sum(lengths) + 9, width, seed=i, dtype=dtype) for i, width in enumerate((dim, value_dim))]
    stored = [torch.full_like(x, float("nan")) for x in plain]
    rule = LogitRule(2 * dim**-0.5, softcap, numbers(2 * group, seed=4))
    pages = torch.full((2, count), -1, device=DEVICE)
    slots = []
    for n, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=True)):
        last = (length - 1) // page
        chosen = [*torch.randperm(last, generator=torch.Generator().manual_seed(n))[: count - 1].tolist(), last]
        pages[n, -len(chosen) :] = torch.tensor(chosen, device=DEVICE)
        slots.append([start + t for p in chosen for t in range(p * page, min(length, (p + 1) * page))])
        for x, own in zip(plain, stored, strict=True):
            own[slots[n]] = x[slots[n]]
    ends = torch.tensor(lengths, device=DEVICE)
    segments = dense.paged(dense.ragged(*stored, (1, 2), max(lengths), starts, ends), pages, page)
    out, _ = dense.attention(query, segments, rule)
    for n, own in enumerate(slots):
        heads = slice(n * group, (n + 1) * group)
        visible = torch.ones(1, 1, len(own), dtype=torch.bool, device=DEVICE)
        part = (x[own][None, None] for x in plain)
        expected, _ = exact(query[:, heads], *part, visible, LogitRule(rule.scaling, softcap, rule.sinks[heads]))
        torch.testing.assert_close(out[:, heads].double(), expected, rtol=0, atol=TOLERANCE[dtype])


PAGES = [  # tokens of two heads, page, pages, query heads per KV head, D, D_v, dtype
    ([200, 37], 16, 5, 1, 64, 64, F32),
    ([90, 301], 12, 4, 3, 96, 32, F16),  # a page that is no power of two
    ([1, 16], 16, 3, 2, 32, 32, BF16),  # fewer tokens than pages
]


@pytest.mark.parametrize("case", PAGES, ids=str)
def test_paged_kernel_reads_the_listed_pages_only(case):
    check_pages(*case)


@pytest.mark.parametrize("is_static", [False, True])
def test_quest_step_by_kernel_matches_pytorch(is_static, monkeypatch):
    layer = quest.Quest(4, 16, full_layers=0).new_layers(1)[0]
    layer.write(*(numbers(2, 3, 50, 32, seed=i) for i in (1, 2)))
    if is_static:
        layer.make_static(5)
    for step in range(5):
        layer.append(*(numbers(2, 3, 1, 32, seed=10 * step + i) for i in (3, 4)))
        query, outs = 3 * numbers(2, 6, 1, 32, seed=10 * step + 5), []
        for by_kernel in (False, True):
            monkeypatch.setattr(step_attention, "uses_kernel", lambda *_, by_kernel=by_kernel: by_kernel)
            outs.append(layer.attend(query, LogitRule(0.3, None, numbers(6, seed=9)), None))
        torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[1, 17], [500, 64], [3000, 2999]], ids=str)
@pytest.mark.parametrize("page", [1, 16, 20, 64])
@pytest.mark.parametrize("group", [1, 8])
def test_paged_kernel_over_the_grid(lengths, page, group):
    for dtype, dim, softcap in ((F32, 64, None), (F16, 128, 3.0), (BF16, 256, None)):
        check_pages(lengths, page, max(3, 1024 // page), group, dim, dim, dtype, softcap)


@pytest.fixture
def kernels_in_storage(monkeypatch):
    """Storages use the kernels on the CPU as well."""
    for module in (kivi, static_kivi):
        monkeypatch.setattr(module, "uses_kernel", supported)


def check_kivi(bits, length, dtype, rows=1, dim=64, residual=32, softcap=None, sinks=False, steps=(0,)):
    """Static and growing segments against attention in float64 over what they dequantize to."""
    held = kivi.KiviSegments(bits, 32, residual)
    held.append(numbers(2, length, dim, seed=1, dtype=dtype), numbers(2, length, dim, seed=2, dtype=dtype))
    held.flush()
    index = torch.arange(2, device=DEVICE)
    fixed = kivi.KiviSegments.static([(index, held.take(index))], (1, 2), max(steps) + 1)
    rule = LogitRule(2 * dim**-0.5, softcap)
    with_sinks = LogitRule(rule.scaling, softcap, numbers(2 * rows, seed=4)) if sinks else rule
    for step in range(max(steps) + 1):
        new = [numbers(2, 1, dim, seed=10 + 2 * step + i, dtype=dtype) for i in range(2)]
        held.append(*new)
        fixed.append(*(x[:, 0] for x in new))
        if step in steps:
            query = numbers(1, 2 * rows, 1, dim, seed=5, dtype=dtype)
            keys, values = (x.unflatten(0, (1, 2)) for x in held.read())
            visible = torch.ones(1, 1, keys.shape[2], dtype=torch.bool, device=DEVICE)
            for out, used in (
                (held.attend(query.reshape(2, rows, 1, dim), rule).reshape(query.shape), rule),
                (fixed.attend(query, with_sinks), with_sinks),
            ):
                expected, _ = exact(query, keys, values, visible, used)
                torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
        held.flush()
        fixed.flush()
        fixed.between_steps()


KIVI = [  # bits, query heads per KV head, tokens, dtype, and other options
    (4, 1, 100, F32, {"steps": (0, 30)}),  # over a flush
    (2, 3, 100, F32, {"dim": 96, "softcap": 3.0, "sinks": True}),
    (8, 1, 70, BF16, {"residual": 64}),
    (4, 4, 140, BF16, {"residual": 128, "dim": 128}),
    (2, 1, 150, F16, {"residual": 128, "dim": 32}),
    (8, 2, 65, F16, {}),
]


@pytest.mark.parametrize("case", KIVI, ids=str)
def test_kivi_kernel_matches_float64(case, kernels_in_storage):
    *settings, options = case
    bits, rows, length, dtype = settings
    check_kivi(bits, length, dtype, rows, **options)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 128, 129, 500, 3000])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_kivi_kernel_over_the_grid(bits, length, rows, kernels_in_storage):
    for i, dtype in enumerate((F32, F16, BF16)):
        dim, residual = ((64, 32), (96, 64), (128, 128))[(i + rows) % 3]
        options = {"softcap": 3.0} if i == 0 else {"sinks": True}
        check_kivi(bits, length, dtype, rows, dim, residual, **options)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("gamma", "padded", "group"), [(0.0, False, 1), (0.3, True, 3), (1.0, False, 2)])
def test_merged_kernel_matches_float64(gamma, padded, group, dtype, monkeypatch):
    """Both layers of a pair, with tokens retained in keys or in values, pads, and a new token."""
    monkeypatch.setattr(pair, "uses_kernel", supported)
    heads, dim, length = 2, 32, 90
    both = pair.Pair(0.6, gamma, "top_ratio")
    valid = torch.arange(length, device=DEVICE)[None] >= torch.tensor([[0], [11]], device=DEVICE)
    for layer in range(2):
        new = [numbers(2, heads, length, dim, seed=2 * layer + i, dtype=dtype) for i in range(2)]
        both.append(layer, *new, valid[:, None] if padded else None)
    both.merge()
    for layer in range(2):
        both.append(layer, *(numbers(2, heads, 1, dim, seed=8 + 2 * layer + i, dtype=dtype) for i in range(2)), None)
        query = numbers(2, heads, group, dim, seed=20, dtype=dtype)
        visible = torch.ones(2, 1, length + 1, dtype=torch.bool, device=DEVICE) if both.valid is None else both.valid
        for rule in (LogitRule(0.2), LogitRule(0.5, 2.0, numbers(heads * group, seed=4))):
            out = both.attend(layer, query, rule).flatten(1, 2)[:, :, None]
            expected, _ = exact(query.flatten(1, 2)[:, :, None], *both.read(layer), visible, rule)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def check_merged_codes(bits, length, dtype, rows=1, dim=64, block=32, gamma=0.1, softcap=None, sinks=False, blocks=0):
    """Growing and static pairs with packed directions against attention in float64 over what they restore."""
    heads, rule = 2, LogitRule(2 * dim**-0.5, softcap, numbers(2 * rows, seed=4) if sinks else None)
    storage = minicache_kivi.MiniCacheKivi(gamma=gamma, bits=bits, group=32, residual=block)

    def directions(x, is_keys, capacity):
        return minicache_kivi.QuantizedDirections(x, bits, storage.group, is_keys, capacity)

    both = pair.Pair(storage.t, gamma, storage.retention, block, directions)
    steps = blocks * block + 2
    both.reserved = steps if blocks else 0
    for layer in range(2):
        both.append(layer, *(numbers(2, heads, length, dim, seed=2 * layer + i, dtype=dtype) for i in range(2)), None)
    both.merge()
    fixed = static_pair([(slice(None), both)], 2, steps)
    for step in range(steps):
        for layer in range(2):
            new = [numbers(2, heads, 1, dim, seed=50 + 4 * step + 2 * layer + i, dtype=dtype) for i in range(2)]
            for one in (both, fixed):
                one.append(layer, *new, None)
                if step not in (0, steps - 1):
                    continue
                query = numbers(2, heads, rows, dim, seed=20, dtype=dtype)
                keys, values = one.read(layer)
                visible = one.visible(layer)
                if visible is None:
                    visible = torch.ones(2, 1, keys.shape[2], dtype=torch.bool, device=DEVICE)
                assert visible.sum() == 2 * (length + step + 1)
                out = one.attend(layer, query, rule).flatten(1, 2)[:, :, None]
                expected, _ = exact(query.flatten(1, 2)[:, :, None], keys, values, visible, rule)
                torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
        both.merge()
        fixed.merge()
        fixed.between_steps()


MERGED_CODES = [  # bits, tokens, dtype, and other options
    (4, 100, F32, {"blocks": 1}),  # over a merge
    (2, 100, F32, {"rows": 3, "dim": 96, "softcap": 3.0, "sinks": True}),
    (8, 70, BF16, {"block": 64, "gamma": 1.0}),
    (4, 140, BF16, {"rows": 4, "block": 128, "dim": 128, "gamma": 0.0}),
    (2, 150, F16, {"block": 128, "dim": 32, "gamma": 0.3}),
]


@pytest.mark.parametrize("case", MERGED_CODES, ids=str)
def test_merged_codes_kernel_matches_float64(case, monkeypatch):
    monkeypatch.setattr(pair, "uses_kernel", supported)
    bits, length, dtype, options = case
    check_merged_codes(bits, length, dtype, **options)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("length", [32, 33, 128, 500, 3000])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_merged_codes_kernel_over_the_grid(bits, length, rows, monkeypatch):
    monkeypatch.setattr(pair, "uses_kernel", supported)
    for i, dtype in enumerate((F32, F16, BF16)):
        dim, block = ((64, 32), (96, 64), (128, 128))[(i + rows) % 3]
        if length < block:
            continue
        options = {"softcap": 3.0} if i == 0 else {"sinks": True}
        check_merged_codes(bits, length, dtype, rows, dim, block, **options)


@pytest.mark.parametrize(
    ("block", "group", "problem"), [(32, 32, None), (48, 16, "48 codes"), (32, 2, "2 codes"), (8, 8, "8 tokens")]
)
@pytest.mark.parametrize("is_keys", [True, False])
def test_layouts_that_the_kernel_for_merged_codes_does_not_read(block, group, problem, is_keys):
    directions = minicache_kivi.QuantizedDirections(numbers(1, 1, block, 32), 4, group, is_keys)
    found = directions.kernel_problem(block)
    assert (found is None) if problem is None else (problem in found)


def test_a_split_is_a_multiple_of_a_tile_and_fills_the_device():
    device = torch.device("cpu")
    assert Tiling(64).chunk(32, 16384, 16384, device) == 2048  # 8 splits of 32 heads: 256 programs
    assert Tiling(64).chunk(1000, 100, 100, device) == 128
    assert Tiling(64).chunk(1, 1 << 20, 1 << 20, device) == 1 << 13  # at most 128 splits


@pytest.mark.slow
def test_the_page_of_compiled_kernels_is_current():
    """Compiles every kernel for an H100, which the interpreter does not: it accepts what the compiler refuses."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "kernel_report.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
