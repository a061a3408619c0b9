"""TurboQuant: the codebook and the rotation against their definitions, codes against a naive construction, errors."""

from __future__ import annotations

import math

import pytest
import torch
from packed_codes import unpack_codes
from tiny_models import prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.products import cached_attention
from kvbench.methods.storage.turboquant import TurboCodec, TurboQuant, codebook, rotation_matrix
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

# Positive levels and relative squared error for the exact distribution; found by another program, without this code.
LEVELS = {
    (64, 2): "0.056515 0.187497",
    (64, 3): "0.030469 0.093832 0.166168 0.263914",
    (64, 4): "0.015919 0.048090 0.081312 0.116487 0.154926 0.198856 0.252914 0.330796",
    (128, 2): "0.039992 0.133042",
    (128, 3): "0.021604 0.066586 0.118140 0.188397",
    (128, 4): "0.011303 0.034152 0.057772 0.082828 0.110288 0.141805 0.180836 0.237664",
}
ERRORS = {
    (64, 2): 0.114526,
    (64, 3): 0.033391,
    (64, 4): 0.009132,
    (128, 2): 0.116000,
    (128, 3): 0.033966,
    (128, 4): 0.009315,
    (32, 4): 0.008774,
    (80, 4): 0.009204,
    (96, 4): 0.009253,
    (256, 4): 0.009408,
}
GAINS = ["norm", "unit", "least_squares", "unbiased"]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restored(codec: TurboCodec, x: torch.Tensor) -> torch.Tensor:
    codec.fit(x[None], None)
    return codec.unrotate(codec.decode(codec.encode(x, []), [], torch.float32))


@pytest.mark.parametrize(("dim", "bits"), [*ERRORS, (16, 2), (16, 4), (3, 2)])
def test_codebook_is_optimal_for_its_density(dim, bits):
    """Symmetric, the table's, and each level is its cell's mean by numerical integration of the density."""
    levels = codebook(dim, bits)
    assert torch.equal(levels, -levels.flip(0)) and (levels.diff() > 0).all()
    if (dim, bits) in LEVELS:
        expected = torch.tensor([float(x) for x in LEVELS[dim, bits].split()]).double()
        torch.testing.assert_close(levels[len(levels) // 2 :], expected, rtol=0, atol=1e-6)
    angle = torch.linspace(-math.pi / 2, math.pi / 2, 400_001, dtype=torch.float64)  # t = sin(angle)
    t, weight = angle.sin(), angle.cos() ** (dim - 2)
    cell = torch.bucketize(t, (levels[1:] + levels[:-1]) / 2)
    mass, moment = (torch.zeros(2**bits).double().index_add_(0, cell, x) for x in (weight, weight * t))
    torch.testing.assert_close(levels, moment / mass, rtol=0, atol=1e-5)
    error = float(dim * (weight * (t - levels[cell]) ** 2).sum() / weight.sum())
    assert error == pytest.approx(ERRORS.get((dim, bits), error), abs=2e-6)


@pytest.mark.parametrize("kind", ["hadamard", "dense", "none"])
def test_rotations_are_orthogonal(kind):
    for dim in (16, 64, 128):
        matrix = rotation_matrix(dim, kind)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim).double(), rtol=0, atol=1e-12)
    if kind == "hadamard":  # row i, column j: the parity of i AND j, times the sign of column j
        matrix = rotation_matrix(16, kind) * 4
        parity = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)]).double()
        assert torch.equal(matrix, parity * matrix[0]) and set(matrix[0].tolist()) == {-1.0, 1.0}


def naive(x: torch.Tensor, bits: int, gain: str, rotation: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, gains, distance to the nearest boundary) in float64, by the definitions, one vector at a time."""
    matrix, levels = rotation_matrix(x.shape[-1], rotation), codebook(x.shape[-1], bits)
    codes, gains, margins = [], [], []
    for vector in x.double():
        norm = math.sqrt(sum(float(v) ** 2 for v in vector))
        y = matrix @ (vector / norm)
        distance = (y[:, None] - levels).abs()
        code = distance.argmin(1)
        two = distance.sort(1).values
        c = levels[code]
        dot, square = float(y @ c), float(c @ c)
        factor = {"norm": 1, "unit": square**-0.5, "least_squares": dot / square, "unbiased": 1 / dot}[gain]
        codes.append(code)
        gains.append(norm * factor)
        margins.append((two[:, 1] - two[:, 0]).min())
    return torch.stack(codes), torch.tensor(gains), torch.stack(margins)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("dim", "rotation"), [(64, "hadamard"), (80, "dense"), (16, "none")])
@pytest.mark.parametrize("gain", GAINS)
def test_codes_match_a_naive_construction(bits, gain, rotation, dim):
    """Compare packed codes, rounded gains and dequantized vectors."""
    x = numbers(60, dim)
    codes, gains, margin = naive(x, bits, gain, rotation)
    clear = margin > 1e-6  # float32 and float64 may differ on a boundary
    assert clear.sum() > 55
    codec = TurboCodec(bits, gain, rotation)
    codec.fit(x[None, None], None)
    *planes, stored = codec.encode(x[None], [])
    assert [p.dtype for p in planes] == [torch.uint8] * (2 if bits == 3 else 1)
    assert sum(p[0, 0].nbytes for p in planes) == dim * bits // 8 == codec.token_bytes(dim) - 2
    found = unpack_codes(planes, bits, dim)[0]
    assert torch.equal(found[clear], codes[clear])
    torch.testing.assert_close(stored[0].double(), gains.double(), rtol=2**-11, atol=0)
    expected = codebook(dim, bits)[codes] @ rotation_matrix(dim, rotation) * stored[0].double()[:, None]
    read = codec.unrotate(codec.decode([*planes, stored], [], torch.float64))
    torch.testing.assert_close(read[0][clear], expected[clear], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dim", "bits"), [(64, 2), (64, 3), (64, 4), (128, 4)])
def test_errors_are_those_of_the_theory(dim, bits):
    """Between the bounds for any quantizer and for this one; each gain has the property that it is named for."""
    x = numbers(20_000, dim)
    square = x.square().sum(-1)
    back = {gain: restored(TurboCodec(bits, gain, "hadamard"), x[None])[0] for gain in GAINS}
    errors = {gain: (y - x).square().sum(-1) for gain, y in back.items()}
    relative = float((errors["norm"] / square).mean())
    assert relative == pytest.approx(ERRORS[dim, bits], rel=0.01)
    assert 4.0**-bits < relative < math.sqrt(3) * math.pi / 2 * 4.0**-bits
    torch.testing.assert_close(back["unit"].norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    torch.testing.assert_close((back["unbiased"] * x).sum(-1), square, rtol=1e-3, atol=0)
    for gain in ("norm", "unit", "unbiased"):
        assert (errors["least_squares"] <= errors[gain] + 1e-3 * square * 2**-bits).all()


def test_a_common_offset_needs_the_signs():
    x = 3 + numbers(2000, 128)
    error = (restored(TurboCodec(4, "norm", "hadamard"), x[None])[0] - x).norm() / x.norm()
    assert error**2 < 0.02
    plain = rotation_matrix(128, "hadamard") * rotation_matrix(128, "hadamard")[0].sign()
    y = (x / x.norm(dim=-1, keepdim=True)).double() @ plain.T
    levels = codebook(128, 4)
    nearest = levels[torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)]
    assert float((nearest - y).square().sum(-1).mean()) > 0.3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unusual_vectors(bits):
    """Zero, one channel, all alike, tiny and huge: finite; least squares is never worse than zero."""
    one_hot_when_rotated = rotation_matrix(64, "hadamard")[3].float()
    x = torch.stack([torch.zeros(64), torch.eye(64)[5], torch.ones(64), 1e-6 * torch.ones(64), one_hot_when_rotated])
    back = restored(TurboCodec(bits, "least_squares", "hadamard"), x[None])[0]
    assert back.isfinite().all() and (back[0] == 0).all()
    assert ((back - x).square().sum(-1) <= 1.001 * x.square().sum(-1)).all()
    assert restored(TurboCodec(bits, "unbiased", "hadamard"), 1e6 * torch.ones(1, 1, 64)).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("is_static", [False, True])
def test_attention_is_over_the_stored_numbers(bits, is_static):
    """Rotated queries over codes, a few tokens at a time, on heads of different lengths."""
    keys, values, query = numbers(2, 3, 30, 16), numbers(2, 3, 30, 8, seed=1), numbers(2, 6, 1, 16, seed=2)
    layer = TurboQuant(bits, value_bits=4).new_layers(1)[0]
    layer.write(keys, values, torch.arange(30) >= torch.tensor([[0, 3, 9], [21, 5, 0]])[..., None])
    if is_static:
        layer.make_static(4)
    layer.append(numbers(2, 3, 1, 16, seed=3), numbers(2, 3, 1, 8, seed=4))
    rule = LogitRule(0.3, 5.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbench.methods.storage.coded.CHUNK_ELEMENTS", 7 * 16 * 6)
        found = layer.attend(query, rule, None)
    torch.testing.assert_close(found, cached_attention(query, *layer.read()[:2], rule, layer.valid), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 4])
def test_measured_bytes_match_the_formula(bits, batch):
    model = tiny_model()
    method, shape = Method("turboquant", storage=TurboQuant(bits)), kv_shape(model.config, model.dtype)
    cache = method.new_cache(model)
    prefill(model, cache, torch.cat([prompt_ids(50, seed) for seed in range(batch)]))
    expected = shape.layers * shape.kv_heads * 50 * 2 * (shape.head_dim * bits // 8 + 2)
    assert (
        cache.kv_bytes_stored == cache.kv_bytes_logical == batch * expected == batch * method.bytes_formula(shape, 50)
    )
    decode(model, cache, torch.arange(batch))
    assert cache.kv_bytes_logical == batch * method.bytes_formula(shape, 50, 1)


def test_a_head_dim_that_cannot_be_is_refused():
    x = numbers(1, 1, 4, 80)
    with pytest.raises(InputError, match=r"method\.storage\.rotation=hadamard: needs a head_dim .* power of two"):
        TurboQuant().new_layers(1)[0].write(x, x)
    TurboQuant(rotation="dense").new_layers(1)[0].write(x, x)
    x = numbers(1, 1, 4, 20)
    with pytest.raises(InputError, match=r"method\.storage\.bits=3: does not fill whole bytes with .* head_dim of 20"):
        TurboQuant(3, rotation="dense").new_layers(1)[0].write(x, x)
    with pytest.raises(InputError, match=r"method\.storage\.bits=1: must be one of 2, 3, 4"):
        TurboQuant(1)


def test_labels_and_needs():
    assert named_method("turboquant").needs == "a head_dim that is a power of two"
    assert named_method("turboquant storage.rotation=dense").needs == ""
    assert named_method("turboquant storage.bits=3").label == "turboquant3"
    mixed = named_method("snapkv budget=32 storage=turboquant storage.bits=3 storage.value_bits=4")
    assert mixed.label == "snapkv 32 + turboquant3v4"
