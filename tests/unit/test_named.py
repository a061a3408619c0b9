"""A method's name in Python: what it names, or an error, and never a full cache under another name."""

from __future__ import annotations

from importlib.resources import files

import pytest

from kvbench.conf.errors import InputError
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.names import BASE, PART, parts_of, token_methods
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.sharing.cla import CLA
from kvbench.methods.storage.dense import Dense
from kvbench.methods.storage.kivi import Kivi
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.config.methods import named_method

NAMES = sorted(p.name.removesuffix(".yaml") for p in files("kvbench.conf").joinpath("method").iterdir() if p.is_file())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "full"])
def test_a_name_alone_is_no_full_cache(name):
    for budget in (None, 64):
        with pytest.raises(InputError, match="every token would stay") as error:
            Method(name, budget=budget)
        call = f'kvbench.method("{name}"{", budget=64" if budget else ""})'
        assert call in str(error.value) and "\n" not in str(error.value)


def test_parts_are_read_with_and_without_a_comment():
    """The files are searched as text: a pattern that finds nothing would let every method pass for its name."""
    assert parts_of("h2o") == {"scorer": "attention_sums", "allocator": "uniform", "schedule": "every_step"}
    assert parts_of("snapkv_kivi4") == parts_of("snapkv") != {}
    assert PART.findall("  - scorer: a\n  - override schedule: b # why (ours: c)\n  - storage: d\n") == [
        ("scorer", "a"),
        ("schedule", "b"),
    ]
    assert BASE.search("defaults:\n  - base # why\n") and not BASE.search("defaults:\n  - scorer: a\n")


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_still_makes_its_method(name):
    method = named_method(name)
    assert token_methods()[name] is not method.policy.capabilities.keeps_everything


def test_a_token_method_s_name_over_another_storage_is_refused_too():
    for storage in (Ragged(), Kivi(4)):
        with pytest.raises(InputError, match="every token would stay"):
            Method("snapkv", storage=storage)
    with pytest.raises(InputError, match="every token would stay"):
        Method("mine", budget=64)
    with pytest.raises(InputError, match="every token would stay"):
        Method("kivi", storage=Dense())


def test_what_is_what_its_name_says_is_not_refused():
    made = [Method("full"), Method("full", budget=64), Method("mine"), Method("kivi", storage=Kivi(4), budget=64)]
    made += [
        Method("cla", sharing=CLA(2), budget=64),
        Method("snapkv", EvictionPolicy(SnapKV(), 64)),
        Method("mine", EvictionPolicy(SnapKV(), 64)),
    ]
    assert [m.effective_budget for m in made] == [None, None, None, None, None, 64, 64]
    assert named_method("full budget=64").policy.capabilities.keeps_everything
    assert named_method("snapkv budget=64").policy == EvictionPolicy(SnapKV(), 64)
