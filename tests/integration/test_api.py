"""The public API: ``import kvbench`` and what is in it."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from local_model import save_local_model
from tiny_models import SHAPE, prompt_ids, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

import kvbench

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_PAGE = ROOT / "docs" / "how-to" / "use_in_python.md"


@pytest.mark.parametrize("name", sorted(set(kvbench.__all__) - {"__version__"}))
def test_every_public_name_resolves_and_is_documented(name):
    assert getattr(kvbench, name).__doc__.strip()
    assert name in dir(kvbench)


def test_type_checkers_see_what_python_imports():
    """The imports under ``TYPE_CHECKING`` and the table of lazy imports agree, and both are ``__all__``."""
    tree = ast.parse(Path(kvbench.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.asname or alias.name: getattr(importlib.import_module(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvbench.")
        for alias in node.names
    }
    assert seen == {name: getattr(kvbench, name) for name in kvbench.__all__ if name != "__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SnapKv'"):
        kvbench.SnapKv  # noqa: B018


def test_the_version_is_the_one_of_pyproject():
    assert kvbench.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize("use", ["", "; kvbench.InputError; kvbench.load_runs; dir(kvbench)"])
def test_import_alone_and_reading_results_import_no_torch(use):
    code = f"import sys, kvbench{use}; print({{'torch', 'transformers', 'hydra'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_a_checkout_s_own_folders_are_imported_whatever_is_installed(tmp_path):
    """Without links and without an installation, from another folder."""
    code = "import kvbench.conf.errors as e, sys; print(e.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == str(ROOT / "conf" / "errors.py"), done.stderr


# method ---------------------------------------------------------------------------------------------------------------


def test_method_is_what_the_command_line_makes():
    made = kvbench.method("snapkv", budget=512)
    assert made == kvbench.EvictionMethod("snapkv", scorer=kvbench.SnapKV(), budget=512)
    assert made.policy == kvbench.EvictionPolicy(kvbench.SnapKV(), 512)
    composed = kvbench.method("snapkv", budget=0.25, storage="kivi4", scorer={"window": 16})
    assert composed.policy == kvbench.EvictionPolicy(kvbench.SnapKV(window=16), 0.25)
    assert composed.storage == kvbench.Kivi(bits=4)
    assert kvbench.method("kivi", storage={"bits": 2}).storage == kvbench.Kivi(bits=2)
    assert kvbench.method("full", budget=None) == kvbench.Method("full")


@pytest.mark.parametrize(
    ("name", "options", "key", "message"),
    [
        ("snapvk", {}, "method", "did you mean snapkv"),
        ("snapkv", {"buget": 5}, "method.buget", "has no key buget; must be one of .*did you mean budget"),
        ("snapkv", {"scorer": {"windw": 5}}, "method.scorer.windw", "did you mean window"),
        ("snapkv", {"budget": {"x": 5}}, "method.budget.x", "method.budget has no key x$"),
        ("snapkv", {"scorer": "h2o"}, "method/scorer", "must be one of"),
        ("snapkv", {"storage": "kivi3"}, "method/storage", "did you mean kivi"),
        ("snapkv", {"storage": None}, "method/storage", "must be one of"),
        ("snapkv", {"budget": "many"}, "method.budget", "must be a whole number of tokens"),
        ("snapkv", {"budget": object()}, "method.budget", "must be a number"),
        ("snapkv", {"budget": "${nothing}"}, "method", "nothing"),
        ("h2o", {"storage": "kivi4"}, "method/storage", "holds rounded tokens"),
        ("full", {"name": "snapkv"}, "method", "every token would stay"),
    ],
)
def test_what_method_cannot_use_is_one_line_of_input_error(name, options, key, message):
    with pytest.raises(kvbench.InputError, match=message) as error:
        kvbench.method(name, **options)
    assert error.value.key == key and "\n" not in str(error.value)


def test_method_works_inside_another_program_s_hydra(tmp_path):
    """Its own configuration is neither read nor disturbed."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    (tmp_path / "app.yaml").write_text("x: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert kvbench.method("snapkv", budget=64).policy.budget == 64
        assert hydra.compose("app").x == 1
    assert not GlobalHydra.instance().is_initialized()


# compress -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    """The tiny model with transformers' own attention, as a user has it."""
    made = tiny_model(dtype=torch.float32)
    made.set_attn_implementation("sdpa")
    return made


def test_compress_gives_the_cache_of_the_method_and_restores_the_attention(model):
    ids = prompt_ids(50)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**options)
    with kvbench.compress(model, "snapkv", budget=20, scorer={"window": 4}) as cache:
        assert model.config._attn_implementation == "kvbench"
        generated = model.generate(**options, past_key_values=cache)
    assert model.config._attn_implementation == "sdpa"
    assert [layer.policy for layer in cache.layers] == [kvbench.EvictionPolicy(kvbench.SnapKV(window=4), 20)] * 3
    assert cache.kv_bytes_logical == 3 * 2 * 2 * 16 * 4 * (20 + 5)  # layers, K and V, heads, head_dim, bytes; tokens
    with kvbench.compress(model, "snapkv", budget=20, scorer={"window": 4}) as again:
        first = kvbench.generate(model, again, ids, max_new_tokens=6)
    assert generated[0, 50:].tolist() == first.tokens[0]
    assert torch.equal(model.generate(**options), plain)


def test_compress_takes_a_method(model):
    with kvbench.compress(model, kvbench.Method("mine", kvbench.EvictionPolicy(kvbench.LastQuery(), 16))) as cache:
        assert {layer.policy.scorer for layer in cache.layers} == {kvbench.LastQuery()}
    with (
        pytest.raises(kvbench.InputError, match=r"method\.budget=5: goes with a method's name"),
        kvbench.compress(model, kvbench.Method("full"), budget=5),
    ):
        pass


def test_compress_restores_the_attention_after_an_exception(model):
    with pytest.raises(ZeroDivisionError), kvbench.compress(model, "snapkv", budget=40):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == "sdpa"


def test_compress_restores_the_attention_of_a_model_that_is_refused():
    """All layers attend over a window, which is found out after the attention has been switched."""
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8))
    before = model.config._attn_implementation
    with pytest.raises(kvbench.InputError, match="use method=full"), kvbench.compress(model, "snapkv", budget=40):
        pytest.fail("gave a cache")
    assert model.config._attn_implementation == before


def test_cache_gives_what_compress_gives_and_leaves_the_attention_switched(model):
    ids = prompt_ids(50)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**options)
    with kvbench.compress(model, "snapkv", budget=20, scorer={"window": 4}) as cache:
        expected = model.generate(**options, past_key_values=cache)
    cache = kvbench.cache("snapkv", model, budget=20, scorer={"window": 4})
    assert torch.equal(model.generate(**options, past_key_values=cache), expected)
    assert cache.kv_bytes == 3 * 2 * 2 * 16 * 4 * (20 + 5) < cache.kv_bytes_stored  # 4 bytes; the slots for more
    assert model.config._attn_implementation == "kvbench"
    assert torch.equal(model.generate(**options), plain)


@pytest.mark.parametrize("method", ["snapkv", kvbench.Method("full")])
def test_cache_is_never_a_full_cache_under_another_name(model, method):
    with pytest.raises(kvbench.InputError):
        kvbench.cache(method, model, budget=-1)
    assert model.config._attn_implementation == "sdpa"
    cache = kvbench.cache("snapkv", model, budget=40)
    kvbench.prefill(model, cache, prompt_ids(100))
    assert [held.max().item() for held in cache.tokens_held] == [40] * 3


def test_compress_inside_compress_keeps_the_outer_attention(model):
    with kvbench.compress(model, "full"):
        with kvbench.compress(model, "full"):
            pass
        assert model.config._attn_implementation == "kvbench"
    assert model.config._attn_implementation == "sdpa"


def test_the_page_on_python_runs(tmp_path, capsys):
    """docs/how-to/use_in_python.md, block by block, as a reader would paste them."""
    made = AutoModelForCausalLM.from_pretrained(save_local_model(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    names = {"model": made, "tokenizer": tokenizer}
    blocks = re.findall(r"```python\n(.*?)```", PYTHON_PAGE.read_text(encoding="utf-8"), re.S)
    for block in blocks:
        exec(compile(block, PYTHON_PAGE.name, "exec"), names)
    assert len(blocks) == 7 and made.config._attn_implementation == "sdpa"
    assert names["held"] <= names["allocated"]
    prompt, turns = names["inputs"].input_ids.shape[1], names["text"].shape[1]
    assert prompt < turns <= prompt + 20 + 11 + 16, "the prompt, two questions in bytes and two replies"
    assert names["cache"].tokens_seen.tolist() == [prompt + 4]
    assert "bytes of tokens" in capsys.readouterr().out


def test_the_snippets_of_the_readme_run(model, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    ids = prompt_ids(50)
    for snippet in snippets:
        names = {"model": model, "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
        exec(compile(snippet, "README.md", "exec"), names)
        assert names["cache"].tokens_seen.tolist() == [50 + 64 - 1]
        if "ValueNorm" in names:  # what a run needs of it
            policy = kvbench.EvictionPolicy(names["ValueNorm"](), budget=512)
            assert policy.identity()["class"] == "ValueNorm"
    assert snippets and model.config._attn_implementation == "sdpa"
