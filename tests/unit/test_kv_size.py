"""``kvbench kv-size``: figures worked out another way, what a config may look like, the files it writes, its errors."""

import csv
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbench.analysis.kv_size import Grid, KVConfig, heat_map, human, in_k, kv_bytes, latent_bytes, load, main
from kvbench.conf.errors import InputError

SHAPES = sorted((Path(__file__).resolve().parents[2] / "models" / "shapes").glob("*.json"))
K = 1024
GIB = 2**30
SMALL = {"num_hidden_layers": 6, "num_attention_heads": 8, "hidden_size": 64}


def read(**changes: Any) -> KVConfig:
    """A small config with ``changes``; None takes a field out."""
    fields = {field: value for field, value in (SMALL | changes).items() if value is not None}
    return KVConfig.from_json(fields, "small")


def run(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What the command prints; it must succeed."""
    assert main([str(arg) for arg in args]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def cells(output: str) -> dict[str, list[str]]:
    """First column -> the others, of the Markdown table in ``output``."""
    lines = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "bits", "per_token"),
    [
        # A layer of MHA stores a key and a value as wide as the hidden state: 32 layers x 2 x 4096 numbers x 2 bytes
        ("llama2-7b", 16, 512 * K),
        ("llama2-13b", 16, 800 * K),  # 40 layers x 2 x 5120 x 2 bytes
        # GQA stores kv_heads / query_heads of that: 8 of 32 heads are a quarter, of 64 an eighth
        ("llama3-8b", 16, 128 * K),
        ("mistral-7b", 16, 128 * K),
        ("llama2-70b", 16, 320 * K),  # 80 layers x 2 x 8192 / 8 x 2 bytes
        ("llama3-70b", 16, 320 * K),
        ("qwen2.5-7b", 16, 56 * K),  # 28 layers x 2 x 3584 / 7 x 2 bytes
        ("smollm2-135m", 16, 23_040),  # 22.5 KiB: 30 layers x 2 x 576 / 3 x 2 bytes
        ("smollm2-135m", 32, 45 * K),
        ("llama2-7b", 8, 256 * K),
        ("llama2-7b", 4, 128 * K),
        ("llama2-7b", 4.5, 144 * K),
    ],
)
def test_bytes_of_a_token(model: str, bits: float, per_token: int) -> None:
    assert kv_bytes(load(model), 1, 1, bits) == per_token
    assert kv_bytes(load(model), 3, 5 * K, bits) == 15 * K * per_token


def test_llama2_7b_takes_16_gib_at_32k_and_64_gib_at_128k() -> None:
    """Batch and length count alike: only their product matters."""
    for batch in (1, 2, 8, 32):
        assert kv_bytes(load("llama2-7b"), batch, 32 * K // batch, 16) == 16 * GIB
        assert kv_bytes(load("llama2-7b"), batch, 128 * K // batch, 16) == 64 * GIB


@pytest.mark.parametrize("kv_heads", [8, 2, 1])  # MHA, GQA, MQA
@pytest.mark.parametrize("window", [None, 7, 100])
def test_the_formula_is_the_size_of_the_arrays(kv_heads: int, window: int | None) -> None:
    """The same cache as arrays: every third layer full, the others cut to their window."""
    batch, tokens = 2, 20
    types = ["full_attention" if layer % 3 == 0 or window is None else "sliding_attention" for layer in range(6)]
    whole = np.zeros((2, batch, kv_heads, tokens, 16), np.float16)
    held = [whole if kind == "full_attention" else whole[..., -window:, :].copy() for kind in types]
    config = read(num_key_value_heads=kv_heads, head_dim=16, layer_types=types, sliding_window=window)
    assert kv_bytes(config, batch, tokens, 16) == sum(layer.nbytes for layer in held)


def test_a_part_of_a_byte_is_a_byte() -> None:
    assert kv_bytes(KVConfig(layers=1, kv_heads=1, head_dim=1), 1, 1, 3) == 1
    assert kv_bytes(KVConfig(layers=1, kv_heads=1, head_dim=1), 1, 3, 3) == 3


# --- configs ---------------------------------------------------------------------------------------------------------


def test_absent_fields_are_what_transformers_takes_them_for() -> None:
    assert read() == read(num_key_value_heads=8, head_dim=8)
    nulls = KVConfig.from_json(SMALL | {"num_key_value_heads": None, "head_dim": None, "sliding_window": None}, "small")
    assert nulls == read()
    assert read(head_dim=32).head_dim == 32  # not 64 / 8
    assert read(num_key_value_heads=2).kv_heads == 2


def test_the_text_config_is_the_one_that_counts() -> None:
    outer = {"text_config": SMALL | {"num_key_value_heads": 2}, "num_hidden_layers": 99, "vision_config": SMALL}
    assert KVConfig.from_json(outer, "small") == read(num_key_value_heads=2)


def test_layers_that_share_count_once_for_each_source() -> None:
    types = ["sliding_attention"] * 3 + ["full_attention"] * 3
    shared = {"kv_source_layers": [0, 1, 2, 3, 3, 3], "layer_types": types, "sliding_window": 10}
    config = KVConfig.from_json(SMALL | shared, "yoco")
    assert (config.layers, config.sliding_layers) == (4, 3)
    with pytest.raises(InputError, match="kv_source_layers"):
        KVConfig.from_json(SMALL | shared | {"kv_source_layers": [0, 0]}, "yoco")


@pytest.mark.parametrize(
    ("changes", "sliding_layers"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 10}, 3),
        ({"layer_types": ["full_attention"] * 6, "sliding_window": 10}, 0),
        ({"model_type": "mistral", "sliding_window": 10}, 6),
        ({"model_type": "qwen2", "sliding_window": 10, "use_sliding_window": False}, 0),
        ({"model_type": "mistral"}, 0),
    ],
)
def test_only_layers_that_slide_are_cut(changes: dict[str, Any], sliding_layers: int) -> None:
    config, full = read(**changes), read()
    assert config.sliding_layers == sliding_layers
    assert kv_bytes(config, 1, 10, 16) == kv_bytes(full, 1, 10, 16)
    a_layer = kv_bytes(full, 1, 1, 16) // 6
    assert kv_bytes(full, 1, 25, 16) - kv_bytes(config, 1, 25, 16) == 15 * sliding_layers * a_layer


@pytest.mark.parametrize(
    ("layers", "heads", "latent", "widths", "numbers"),
    [
        (60, 128, (512, 64), (128, 128), 34_560),  # DeepSeek-V2
        (61, 128, (512, 64), (128, 128), 35_136),  # DeepSeek-V3, Kimi K2
        (27, 16, (512, 64), (128, 128), 15_552),  # DeepSeek-V2-Lite
        (62, 40, (256, 32), (64, 64), 17_856),  # MiniCPM3
    ],
)
def test_mla_counts_latents_and_what_they_expand_to(
    layers: int, heads: int, latent: tuple[int, int], widths: tuple[int, int], numbers: int
) -> None:
    config = KVConfig.from_json(mla(layers, heads, latent, widths), "mla")
    assert latent_bytes(config, 1, 1, 16) == 2 * numbers
    assert latent_bytes(config, 3, 5 * K, 8) == 15 * K * numbers
    key, value = np.zeros((heads, widths[0] + latent[1]), np.float16), np.zeros((heads, widths[1]), np.float16)
    assert kv_bytes(config, 1, 1, 16) == layers * (key.nbytes + value.nbytes)
    assert kv_bytes(config, 3, 5 * K, 8) == 15 * K * layers * (key.size + value.size)
    assert latent_bytes(read(), 1, 1, 16) == 0


def mla(layers: int, heads: int, latent: tuple[int, int], widths: tuple[int, int]) -> dict[str, Any]:
    """A config with multi-head latent attention; its num_key_value_heads and head_dim must not be believed."""
    sizes = {"kv_lora_rank": latent[0], "qk_rope_head_dim": latent[1], "head_dim": latent[1], "num_key_value_heads": 1}
    sizes |= {"qk_nope_head_dim": widths[0], "v_head_dim": widths[1], "num_attention_heads": heads}
    return sizes | {"num_hidden_layers": layers, "hidden_size": 7168}


LLAMA4 = {"model_type": "llama4_text", "attention_chunk_size": 10}


@pytest.mark.parametrize(
    ("changes", "chunked_layers"),
    [
        ({"layer_types": ["chunked_attention", "full_attention"] * 3, "attention_chunk_size": 10}, 3),
        ({"layer_types": ["full_attention"] * 6, "attention_chunk_size": 10}, 0),
        (LLAMA4, 5),  # every fourth is full
        (LLAMA4 | {"no_rope_layers": []}, 5),
        (LLAMA4 | {"no_rope_layers": [1, 1, 0, 1, 1, 0]}, 4),
        (LLAMA4 | {"no_rope_layer_interval": 2}, 3),
    ],
)
def test_chunked_layers_hold_a_chunk_at_most(changes: dict[str, Any], chunked_layers: int) -> None:
    config, full = read(**changes), read()
    assert (config.layers, config.chunked_layers) == (6, chunked_layers)
    a_layer = kv_bytes(full, 1, 1, 16) // 6
    for tokens in (1, 9, 10, 11, 25):
        held = max(len(range(n // 10 * 10, n + 1)) for n in range(tokens))  # tokens that the n-th, from 0, sees
        assert kv_bytes(config, 1, tokens, 16) == a_layer * ((6 - chunked_layers) * tokens + chunked_layers * held)


@pytest.mark.parametrize(
    ("changes", "layers", "sliding_layers", "states"),
    [
        ({"layer_types": ["linear_attention", "conv", "full_attention"] * 2}, 2, 0, ("2 linear_attention", "2 conv")),
        ({"layer_types": ["mamba"] * 5 + ["attention"]}, 1, 0, ("5 linear_attention",)),
        ({"layer_types": ["recurrent"] * 4 + ["sliding_attention"] * 2, "sliding_window": 4}, 2, 2, ("4 recurrent",)),
        (
            {"layer_types": ["hybrid", "hybrid_sliding"] * 3, "sliding_window": 4},
            6,
            3,
            ("3 hybrid", "3 hybrid_sliding"),
        ),
        ({"layer_types": ["moe", "mlp", "full_attention"] * 2}, 2, 0, ()),
        ({"full_attention_interval": 3}, 2, 0, ("4 linear_attention",)),
        ({"full_attention_interval": 4}, 1, 0, ("5 linear_attention",)),
        ({"full_attention_interval": 4, "layer_types": ["full_attention"] * 6}, 6, 0, ()),
        ({"attn_layer_period": 8, "layer_types": ["conv", "full_attention"] * 3}, 3, 0, ("3 conv",)),
    ],
)
def test_of_a_hybrid_only_layers_with_keys_and_values_count(
    changes: dict[str, Any], layers: int, sliding_layers: int, states: tuple[str, ...]
) -> None:
    config = read(**changes)
    assert (config.layers, config.sliding_layers, config.states) == (layers, sliding_layers, states)
    assert 6 * kv_bytes(config, 1, 3, 16) == layers * kv_bytes(read(), 1, 3, 16)
    assert ("not counted" in str(config)) == bool(states)
    assert all(state in str(config) for state in states)


def test_qwen3_next_holds_keys_and_values_in_every_fourth_layer() -> None:
    sizes = {"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256}
    config = KVConfig.from_json(sizes | {"hidden_size": 2048, "full_attention_interval": 4}, "qwen3-next")
    assert kv_bytes(config, 1, 1, 16) == 24 * K  # 12 layers x 2 heads x 2 x 256 x 2 bytes
    assert config.states == ("36 linear_attention",)


def test_the_last_layers_hold_nothing_where_they_share() -> None:
    types = (["sliding_attention"] * 4 + ["full_attention"]) * 7  # as Gemma 3n: 20 of 35 layers hold keys and values
    changes = {"num_hidden_layers": 35, "layer_types": types, "sliding_window": 512, "num_kv_shared_layers": 15}
    config = read(**changes)
    assert (config.layers, config.sliding_layers) == (20, 16)
    a_layer = 2 * 64 * 2
    assert kv_bytes(config, 1, 4 * K, 16) == a_layer * (4 * 4 * K + 16 * 512)
    assert read(num_kv_shared_layers=0) == read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, "config.json=num_hidden_layers: the config lacks this field"),
        ({"num_attention_heads": None}, "config.json=num_attention_heads: the config lacks"),
        ({"hidden_size": None}, "config.json=hidden_size: the config lacks"),
        ({"num_hidden_layers": "32"}, "config.json:num_hidden_layers=32: must be a whole number"),
        ({"num_key_value_heads": 0}, "config.json:num_key_value_heads=0: must be"),
        ({"num_key_value_heads": [8, 4]}, "config.json:num_key_value_heads=[8, 4]: must be"),
        ({"hidden_size": 4}, "config.json:head_dim=0: must be"),
        ({"kv_lora_rank": 512}, "config.json=qk_nope_head_dim: the config lacks"),
        (
            {"kv_lora_rank": 512, "index_topk": 2048},
            "config.json:index_topk=2048: the formula does not hold: the indexer",
        ),
        ({"global_head_dim": 512}, "config.json:global_head_dim=512: the formula does not hold: head_dim differs"),
        ({"block_configs": [{}]}, "the number of KV heads differs between layers"),
        ({"multi_query": True}, "use --layers, --kv-heads and --head-dim"),
        ({"attn_layer_period": 8}, "config.json:attn_layer_period=8: only some of the layers"),
        ({"block_types": ["recurrent", "attention"]}, "layer_types must say which"),
        (
            {"attention_chunk_size": 4},
            "config.json:attention_chunk_size=4: layer_types must say which layers are chunked",
        ),
        ({"layer_types": ["chunked_attention"] * 6}, "config.json=attention_chunk_size: the config lacks"),
        ({"layer_types": ["conv", "mamba"] * 3}, "layer_types=conv, linear_attention: no layer has keys and values"),
        ({"num_kv_shared_layers": 6}, "config.json:num_kv_shared_layers=6: must be below the 6 layers"),
        ({"layer_types": ["full_attention"] * 5 + ["indexed_attention"]}, "layer_types=indexed_attention: the formula"),
        ({"sliding_window": 10}, "config.json:sliding_window=10: layer_types must say which layers slide"),
        ({"layer_types": ["full_attention"] * 5 + ["rwkv"]}, "config.json:layer_types=rwkv: the formula knows"),
        ({"layer_types": "full"}, "config.json:layer_types=full: the formula knows"),
        ({"layer_types": ["full_attention"] * 5}, "config.json:layer_types=5 entries: must be 6 entries"),
        ({"layer_types": ["sliding_attention"] * 6}, "config.json=sliding_window: the config lacks"),
    ],
)
def test_a_config_the_formula_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        read(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", SHAPES, ids=lambda file: file.stem)
def test_a_shape_is_the_same_for_the_calculator_and_for_the_model(file: Path) -> None:
    import torch  # in this test alone: the others show what a machine without it can do

    from kvbench.methods.cache.kv_shape import kv_shape
    from kvbench.models.random import SHAPES as MODELS

    shape, config = kv_shape(MODELS[file.stem], torch.float16), load(file.stem)
    assert set(MODELS) == {path.stem for path in SHAPES}
    assert MODELS[file.stem].model_type == json.loads(file.read_text())["model_type"]
    for size in ("layers", "kv_heads", "head_dim", "query_heads"):
        assert getattr(config, size) == getattr(shape, size), size
    assert config.sliding_layers == 0
    assert MODELS[file.stem].rope_parameters["rope_theta"] == json.loads(file.read_text())["rope_theta"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama-30b", 32_528_943_616),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_a_shape_makes_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """A mistyped size would show here."""
    shape = json.loads((SHAPES[0].parent / f"{name}.json").read_text())
    hidden, heads, kv_heads = (shape[f] for f in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    kv_width = hidden // heads * kv_heads
    biases = hidden + 2 * kv_width if shape["model_type"] == "qwen2" else 0  # of q, k and v
    attention = 2 * hidden * hidden + 2 * hidden * kv_width + biases
    layer = attention + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    embeddings = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    assert embeddings + shape["num_hidden_layers"] * layer + hidden == parameters


# --- the command -----------------------------------------------------------------------------------------------------


FORMULA = "KV bytes = batch x layers x kv_heads x tokens x head_dim x 2 x bits/8"


def test_the_default_is_a_table_of_llama2_7b(capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys)
    assert output.startswith("KV cache of llama2-7b in float16")
    assert cells(output)["batch"] == ["4k tokens", "32k tokens", "128k tokens"]
    assert cells(output)["1"] == ["2 GiB", "16 GiB", "64 GiB"]
    assert [line for line in output.splitlines() if "bits" in line] == [FORMULA]


def test_a_single_point_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--tokens", "32k", "--batch", 2).splitlines()
    assert FORMULA in lines
    assert "         = 2 x 32 x 32 x 32768 x 128 x 2 x 16/8" in lines
    assert "         = 34,359,738,368 bytes = 32 GiB; 512 KiB per token" in lines


def test_the_numbers_written_out_give_the_result(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sliding = SMALL | {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 10}
    (tmp_path / "config.json").write_text(json.dumps(sliding))
    chunked = SMALL | {"layer_types": ["chunked_attention", "full_attention"] * 3, "attention_chunk_size": 10}
    (tmp_path / "chunked.json").write_text(json.dumps(chunked))
    chunks = ["--model", tmp_path / "chunked.json"]
    for args in (["--model", tmp_path], chunks, ["--model", "llama3-8b", "--dtype", "int4"], ["--bits", 2.25]):
        _, numbers, result = run(capsys, *args, "--tokens", "4k", "--batch", 3).splitlines()[2:5]
        expected = eval(numbers.replace("=", "").replace("x", "*"))
        assert int(result.split()[1].replace(",", "")) == expected


def test_mla_is_shown_as_latents_and_as_expanded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "v3.json").write_text(json.dumps(mla(61, 128, (512, 64), (128, 128))))
    model = ["--model", tmp_path / "v3.json", "--dtype", "bfloat16"]
    lines = run(capsys, *model, "--tokens", "1k", "--batch", 2).splitlines()
    assert lines[3] == "         = 2 x 61 x 128 x 1024 x (192 + 128) x 16/8"
    assert lines[4] == "         = 10,234,101,760 bytes = 9.53 GiB; 4.77 MiB per token"
    assert lines[5] == "latent   = batch x layers x tokens x (kv_lora_rank + qk_rope_head_dim) x bits/8"
    assert lines[6] == "         = 2 x 61 x 1024 x (512 + 64) x 16/8"
    assert lines[7] == "         = 143,917,056 bytes = 137 MiB; 68.6 KiB per token"
    assert "MLA: query heads 128, KV heads 128, expanded keys 192 and values 128 wide, latent 512 + 64" in lines[-1]
    output = run(capsys, *model, "--tokens", "1k,2k", "--batch", 2)
    assert output.splitlines()[2:5] == [lines[2], lines[5], ""]
    rows = cells(output)
    assert (rows["2"], rows["2, latent"]) == (["9.53 GiB", "19.1 GiB"], ["137 MiB", "274 MiB"])
    run(capsys, *model, "--tokens", "1k", "-o", tmp_path / "kv.csv")
    run(capsys, "--tokens", "1k", "-o", tmp_path / "llama.csv")
    row, other = (next(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("kv.csv", "llama.csv"))
    assert (row["head_dim"], row["value_dim"], row["latent_bytes"]) == ("192", "128", str(K * 70_272))
    assert int(row["kv_bytes"]) == K * 61 * 128 * (192 + 128) * 2
    assert (other["value_dim"], other["latent_bytes"]) == ("128", "")


def test_models_are_compared_at_one_batch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "other.json").write_text(json.dumps(SMALL | {"num_key_value_heads": 1}))
    models = f"llama2-7b, llama3-8b,{folder},{folder / 'config.json'},{tmp_path / 'other.json'}"
    output = run(capsys, "--model", models, "--dtype", "bfloat16", "--batch", 2, "--tokens", "1,32k")
    rows = cells(output)
    assert rows["model"] == ["1 tokens", "32k tokens"]
    assert rows["llama2-7b"] == ["1 MiB", "32 GiB"]
    assert rows["llama3-8b"] == ["256 KiB", "8 GiB"]
    assert rows["mine"] == ["3 KiB", "96 MiB"]  # 6 layers x 2 x 64 numbers x 2 bytes, twice
    assert rows["other"] == ["384 bytes", "12 MiB"]
    assert "batch 2, in bfloat16" in output
    assert output.count("bits/8") == output.count(FORMULA) == 1
    assert "MHA: query heads 8, KV heads 8" in output
    assert "MQA: query heads 8, KV heads 1" in output
    assert "GQA: query heads 32, KV heads 8" in output


def test_any_shape(capsys: pytest.CaptureFixture[str]) -> None:
    output = run(capsys, "--layers", 32, "--kv-heads", 1, "--head-dim", 128, "--tokens", "32k,32768, 1K,2", "--bits", 3)
    assert cells(output)["batch"] == ["2 tokens", "1k tokens", "32k tokens"]
    assert cells(output)["1"] == ["6 KiB", "3 MiB", "96 MiB"]
    assert output.startswith("KV cache of this shape at 3 bits")


@pytest.mark.parametrize(
    ("size", "shown"),
    [(1, "1 bytes"), (1023, "1,023 bytes"), (1024, "1 KiB"), (23_040, "22.5 KiB"), (2**40 - 1, "1,024 GiB")]
    + [(1024**power, f"1 {unit}") for power, unit in ((2, "MiB"), (3, "GiB"), (4, "TiB"))]
    + [(5000 * 2**40, "5,000 TiB"), (int(99.96 * 2**20), "100 MiB")],
)
def test_sizes_are_shown_in_the_largest_unit(size: int, shown: str) -> None:
    assert human(size) == shown


def test_lengths_are_shown_in_k_only_when_that_is_exact() -> None:
    assert [in_k(tokens) for tokens in (1024, 131_072, 1000, 1025)] == ["1k", "128k", "1000", "1025"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--help"])
    output = capsys.readouterr().out
    assert leave.value.code == 0
    assert "KV bytes = batch x layers x kv_heads x tokens x head_dim x 2 x bits/8" in output
    examples = output.split("examples:")[1]
    assert examples.count("kvbench kv-size ") >= 4


def test_no_torch_is_needed() -> None:
    code = "import sys; sys.modules.update(torch=None, transformers=None)\n"
    code += "from kvbench.analysis.kv_size import main; sys.exit(main(['--tokens', '32k']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "16 GiB" in result.stdout


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_csv_holds_the_formula(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "kv.csv"
    run(capsys, "--model", "llama3-8b", "--batch", "4,1", "--tokens", "1000,4k", "--bits", 4.5, "-o", file)
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [(row["batch"], row["tokens"]) for row in rows] == [
        ("1", "1000"),
        ("1", "4096"),
        ("4", "1000"),
        ("4", "4096"),
    ]
    for row in rows:
        batch, tokens, layers, kv_heads, head_dim = (
            int(row[factor]) for factor in ("batch", "tokens", "layers", "kv_heads", "head_dim")
        )
        assert int(row["kv_bytes"]) == batch * layers * kv_heads * tokens * head_dim * 2 * float(row["bits"]) / 8
        assert (row["model"], layers, kv_heads, head_dim, row["bits"]) == ("llama3-8b", 32, 8, 128, "4.5")


def test_the_markdown_file_is_the_printed_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = run(capsys, "--batch", "1,16")
    assert run(capsys, "--batch", "1,16", "-o", tmp_path / "kv.md") == f"wrote {tmp_path / 'kv.md'}\n"
    assert (tmp_path / "kv.md").read_text() == printed


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_heat_map_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, ending: str, start: bytes) -> None:
    first, again = tmp_path / f"first.{ending}", tmp_path / f"again.{ending}"
    for file in (first, again):
        run(capsys, "--batch", "1,2", "-o", file)
    assert first.read_bytes().startswith(start)
    assert len(first.read_bytes()) > 5000
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("models", [["llama2-7b"], ["llama2-7b", "smollm2-135m", "tiny"]])
@pytest.mark.parametrize("tokens", [[1], [1000, 4096], [2**power for power in range(10, 21)]])
def test_every_cell_of_a_heat_map_is_labelled_and_no_two_labels_touch(models: list[str], tokens: list[int]) -> None:
    batches = [2**power for power in range(9)] if len(models) == 1 else [1]
    rows = [(load(model), batch) for model in models for batch in batches]
    grid = Grid("KV cache of something with a long name in float16", rows, tokens, 16, by_model=len(models) > 1)
    figure = heat_map(grid)
    figure.draw_without_rendering()
    axes, bar = figure.axes
    labels = [text.get_text() for text in axes.texts]
    assert labels == [human(kv_bytes(*row, length, 16)) for row in rows for length in tokens]
    assert [text.get_text() for text in axes.get_yticklabels()] == grid.labels()
    assert axes.get_xlabel() and axes.get_ylabel() and bar.get_ylabel()
    assert len(bar.get_yticklabels()) > 1
    texts = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), *bar.get_yticklabels()]
    texts += [axes.xaxis.label, axes.yaxis.label, bar.yaxis.label, *figure.texts]
    boxes = [text.get_window_extent() for text in texts]
    touching = [
        (a, b) for (a, box), (b, other) in combinations(zip(texts, boxes, strict=True), 2) if box.overlaps(other)
    ]
    assert touching == []
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model", "llama2-7"],
            "--model=llama2-7: must be a path to a config.json or to a folder with one, or one of llama-30b, ",
        ),
        (["--model", "llama2-7"], "did you mean llama2-7b"),
        (["--model", "nothing"], "must be a path to a config.json or to a folder with one, or one of"),
        (["--model", "FOLDER"], "--model=FOLDER: must be a path to a config.json"),  # a folder without a config.json
        (["--model", "FOLDER/text.json"], "text.json: is not JSON: Expecting value"),
        (["--model", "FOLDER/bytes.json"], "bytes.json: is not JSON: "),
        (["--model", "FOLDER/list.json"], "list.json: must hold a JSON object"),
        (["--model", "FOLDER/lacking.json"], "lacking.json=num_attention_heads: the config lacks this field"),
        (["--model", "FOLDER/list.json/config.json"], "cannot be read: "),
        (["--model", "x" * 300], "cannot be read: "),
        (["--batch", "0"], "--batch=0: must be whole numbers of at least 1"),
        (["--batch", "1,,2"], "--batch=1,,2: must be"),
        (["--tokens", "abc"], "--tokens=abc: must be"),
        (["--tokens", "1.5k"], "--tokens=1.5k: must be"),
        (["--tokens", "-4k"], "--tokens"),
        (["--tokens", "9" * 5000], "--tokens="),
        (["--model", "tiny,llama2-7b", "--batch", "1,2"], "--batch=1,2: must be one number for several models"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--dtype", "int8", "--bits", "3"], "not allowed with argument"),
        (["--bits", "0"], "--bits=0.0: must be above 0"),
        (["--bits", "nan"], "--bits=nan: must be above 0"),
        (["--layers", "2", "--kv-heads", "2"], "--head-dim=None: must be at least 1, as --layers"),
        (["--layers", "0", "--kv-heads", "2", "--head-dim", "2"], "--layers=0: must be at least 1"),
        (["--layers", "x"], "invalid int value: 'x'"),
        (["--layers", "2", "--model", "tiny"], "--model=tiny: must be left out"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["-o", "FOLDER/kv.pdf"], "kv.pdf: must end in .svg, .png, .csv, .md"),
        (["-o", "FOLDER/list.json/kv.svg"], "kv.svg: cannot be written: "),
        (["-o", "FOLDER/taken.csv"], "taken.csv: cannot be written: "),
    ],
)
def test_errors_are_one_line(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.json").write_text("model: llama")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "lacking.json").write_text('{"num_hidden_layers": 2}')
    (tmp_path / "taken.csv").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main([arg.replace("FOLDER", str(tmp_path)) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message.replace("FOLDER", str(tmp_path)) in captured.err
    assert sorted(tmp_path.rglob("*")) == before
