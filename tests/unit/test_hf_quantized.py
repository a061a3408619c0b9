"""transformers' quantised cache in our storage, against transformers' own ``generate`` with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from optimum.quanto.library import extensions
from tiny_models import prompt_ids, tiny_model
from transformers.cache_utils import QuantizedCache

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.method import Method
from kvbench.methods.storage import hf_quantized
from kvbench.methods.storage.hf_quantized import HFQuantized, build_extension
from kvbench.methods.storage.kivi import Kivi
from kvbench.runners.engine import decode, generate, prefill

pytest.importorskip("optimum.quanto")


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("residual", [4, 128])
def test_it_is_transformers_own(bits, residual):
    """The same tokens from the same model, over ten roundings of everything and over none."""
    model, ids = tiny_model(dtype=torch.float32), torch.cat([prompt_ids(50, 1), prompt_ids(50, 2)])
    storage = HFQuantized(bits=bits, group=16, residual=residual)
    ours = generate(model, Method("x", storage=storage).new_cache(model), ids, max_new_tokens=40).tokens
    cache = QuantizedCache("quanto", model.config, nbits=bits, q_group_size=16, residual_length=residual)
    model.set_attn_implementation("sdpa")
    try:
        theirs = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
    finally:
        model.set_attn_implementation("kvbench")
    assert theirs[:, 50:].tolist() == ours
    full = generate(model, Method("full").new_cache(model), ids, max_new_tokens=40).tokens
    assert bits == 4 or ours != full  # two bits show


def test_old_tokens_are_rounded_again_and_kivis_are_not():
    """What tells the two apart: after 8 more roundings the prompt's keys have moved."""
    model, ids = tiny_model(dtype=torch.float32), prompt_ids(48)
    moved = {}
    for storage in (HFQuantized(bits=4, group=16, residual=4), Kivi(bits=4, group=4, residual=4)):
        cache = Method("x", storage=storage).new_cache(model)
        prefill(model, cache, ids)
        before = cache.layers[0].storage.read()[1][:, :, :40].clone()
        for i in range(32):
            decode(model, cache, torch.tensor([i + 1]))
        after = cache.layers[0].storage.read()[1][:, :, :40]
        moved[storage.name] = (after - before).abs().max().item()
    assert moved["kivi4"] == 0
    assert moved["hf_quantized4"] > 0, moved


def test_a_copy_goes_on_alone():
    model = tiny_model(dtype=torch.float32)
    cache = Method("x", storage=HFQuantized(group=16, residual=4)).new_cache(model)
    prefill(model, cache, prompt_ids(30))
    other = copy.deepcopy(cache)
    ours, theirs = (torch.stack([decode(model, c, torch.tensor([i + 1])) for i in range(10)]) for c in (cache, other))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch", [1, 2])
def test_bytes_at_every_step(batch):
    model = tiny_model(dtype=torch.bfloat16)
    method = Method("x", storage=HFQuantized(group=16, residual=5))
    shape, cache = kv_shape(model.config, model.dtype), method.new_cache(model)
    prefill(model, cache, torch.cat([prompt_ids(20, i) for i in range(batch)]))
    for n in range(1, 13):
        decode(model, cache, torch.arange(batch) + n)
        formula = batch * method.bytes_formula(shape, 20, n)
        assert cache.kv_bytes_logical == formula
        assert 0 <= cache.kv_bytes_stored - formula <= shape.layers * method.storage.capabilities.padding_bytes


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hf_quantized, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"hf_quantized4: needs the package optimum-quanto: pip install"):
        Method("x", storage=HFQuantized()).new_cache(tiny_model())


class FakeExtension:
    """Stands for optimum-quanto's: ``lib`` waits for torch's lock file, as its FileBaton does, or fails."""

    def __init__(self, folder: Path, error: Exception | None = None):
        self.build_directory, self.error = str(folder), error
        self._lib: object = None

    @property
    def lib(self) -> object:
        assert not (Path(self.build_directory) / "lock").exists(), "would wait for ever"
        if self.error is not None:
            raise self.error
        self._lib = self._lib or object()
        return self._lib


@pytest.fixture
def extension(tmp_path, monkeypatch) -> FakeExtension:
    fake = FakeExtension(tmp_path / "build")
    (tmp_path / "build").mkdir()
    monkeypatch.setattr(extensions, "get_extension", lambda name: fake)
    return fake


def test_a_lock_file_of_a_killed_compilation_is_deleted(extension, tmp_path, capsys):
    (tmp_path / "build" / "lock").touch()
    build_extension("cpu")
    assert extension._lib is not None
    assert capsys.readouterr().err == "kvbench: compiling optimum-quanto's extension, once (minutes)\n"
    (tmp_path / "build" / "lock").touch()
    build_extension("cpu")  # loaded: nothing is asked
    assert (tmp_path / "build" / "lock").exists()


def test_an_extension_that_is_compiled_is_loaded_without_a_word(extension, tmp_path, capsys):
    (tmp_path / "build" / "quanto_cpp.so").touch()
    build_extension("cpu")
    assert capsys.readouterr().err == ""


def test_waiting_for_another_compilation_ends_in_one_line(extension, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_quantized, "BUILD_TIMEOUT_S", 0.1)
    with FileLock(tmp_path / "kvbench-build.lock"), pytest.raises(InputError, match=r"kvbench-build\.lock"):
        build_extension("cpu")
    build_extension("cpu")
    assert extension._lib is not None


def test_a_compilation_that_fails_is_one_line(extension):
    extension.error = RuntimeError("Ninja is required to load C++ extensions\nand more")
    with pytest.raises(InputError, match=r"cannot be compiled in .*: Ninja is required") as error:
        build_extension("cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"bits": 8}, {"group": 0}, {"residual": 0}], ids=str)
def test_bad_settings(options):
    with pytest.raises(InputError, match=r"method\.storage\."):
        HFQuantized(**options)


def test_a_group_that_does_not_divide_the_head():
    model = tiny_model()
    with pytest.raises(InputError, match=r"method\.storage\.group=12: must divide"):
        prefill(model, Method("x", storage=HFQuantized(group=12)).new_cache(model), prompt_ids(10))
