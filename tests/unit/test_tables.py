"""Tables from records alone: what may stand together, what is bold, what is said of runs without numbers."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from records import accuracy, efficiency, estimate, save

from kvbench.analysis import stats
from kvbench.analysis.figures import figures
from kvbench.analysis.load import Run, compressed_layers, frame, load
from kvbench.analysis.repetitions import of_repetitions
from kvbench.analysis.tables import budget_tables, efficiency_table, main, tables
from kvbench.analysis.tables.groups import each_table
from kvbench.analysis.tables.reference import Reference
from kvbench.conf.versions import CURRENT_VERSIONS


def made(folder, *records):
    return tables(load(save(folder, *records))[0])


def texts(table, label):
    """{column: text} of one row; columns that occur twice keep the last."""
    row = next(row for row in table.rows if row[0].text == label)
    return dict(zip(table.columns, (cell.text for cell in row), strict=True))


def cell(table, label, column):
    row = next(row for row in table.rows if row[0].text == label)
    return row[table.columns.index(column)]


def test_recorded_and_eager_steps_in_one_table_are_said_so():
    made = [efficiency("full", None, 10.0), efficiency("h2o", 128, 5.0)]
    for record, way in zip(made, ("cuda graph", "eager"), strict=True):
        record["decode"] = way
    runs = [Run(Path(), record, record["method_label"]) for record in made]
    assert any("(cuda graph: full; eager: h2o 128)" in note for note in efficiency_table(runs).notes)
    made[0]["decode"] = "eager"
    assert not any("not run alike" in note for note in efficiency_table(runs).notes)


def test_energy_has_a_column_where_it_was_measured():
    made = [efficiency("full", None, 10.0), efficiency("snapkv", 128, 5.0)]
    made[1]["energy"] = {"problem": None, "joules": 65.0, "joules_per_output_token": 1.0}
    made[0]["energy"] = {"problem": "no energy counter can be read"}
    table = efficiency_table([Run(Path(), record, record["method_label"]) for record in made])
    assert [row[table.columns.index("J/token")].text for row in table.rows] == ["-", "1.000"]
    del made[1]["energy"]
    assert "J/token" not in efficiency_table([Run(Path(), r, r["method_label"]) for r in made]).columns


def test_the_compression_stands_beside_the_prefill_that_it_is_part_of(tmp_path):
    """Where a record has it; a stream has none, and a table of older records has no such column."""
    records = [efficiency("snapkv", 128, 10.0), efficiency("streaming_llm", 128, 5.0)]
    (table,) = made(tmp_path / "old", *records)
    assert "compression ms" not in table.columns
    spread = {"median": 12.34, "min": 12.0, "max": 13.0, "repetitions": [12.0, 12.34, 13.0]}
    for record, value in zip(records, (spread, None), strict=True):
        record["metrics"]["compression_ms"] = value
    (table,) = made(tmp_path / "new", *records)
    at = table.columns.index("compression ms")
    assert table.columns[at - 1] == "TTFT ms"
    assert {row[0].text: row[at].text for row in table.rows} == {"snapkv 128": "12.3", "streaming_llm 128": "-"}
    assert list(frame(table.runs)["compression_ms"].dropna()) == [12.34]
    again = of_repetitions(records[1] | {"limit": {"bytes_read_per_step": 1e9}}, None)
    assert again["metrics"].keys() == records[1]["metrics"].keys() - {"compression_ms"}


def test_bytes_read_a_step_stand_beside_the_bytes_held():
    """Where a record has them; a table of older records has no such column."""
    made = [efficiency("full", None, 10.0), efficiency("quest", None, 5.0)]
    runs = [Run(Path(), record, record["method_label"]) for record in made]
    assert "read a step" not in efficiency_table(runs).columns
    made[1]["bytes"]["kv_bytes_read_per_step"] = 3 * 2**20
    table = efficiency_table(runs)
    at = table.columns.index("read a step")
    assert table.columns[at - 1] == "KV MiB, batch"
    assert [row[at].text for row in table.rows] == ["-", "3.00"]


@pytest.mark.parametrize("kind", ["accuracy", "efficiency"])
@pytest.mark.parametrize("form", [[], ["--by-budget"]])
def test_a_table_of_runs_under_two_rules_for_equal_scores_says_so(tmp_path, capsys, kind, form):
    """Runs from before there was a rule name none; those that rank no tokens have none to name."""
    if kind == "efficiency" and form:
        return
    make = accuracy if kind == "accuracy" else efficiency
    old, new, full = make("snapkv", 128, 20.0), make("snapkv", 256, 21.0), make("full", None, 22.0)
    stream = make("streaming_llm", 128, 19.0)
    stream["identity"]["method"]["selection"] = {"class": "StreamingLLM", "budget": 128}
    new["identity"]["method"]["selection"]["ties"] = "score, unpooled score, index"
    said = (
        "Tokens were not ranked alike (by score, then as the device sorts: snapkv 128; "
        "by score, unpooled score, index: snapkv 256)"
    )
    assert main([str(save(tmp_path / "both", old, new, full, stream)), *form]) == 0
    out = capsys.readouterr().out
    assert said in out
    rows = [line for line in out.splitlines() if line.startswith("| ") and "ties=score, unpooled score, index" in line]
    assert len(rows) == 1  # a row, and a figure's curve, of its own
    for alone in (old, new):
        assert main([str(save(tmp_path / str(alone["budget"]), alone, full, stream)), *form]) == 0
        assert "ranked alike" not in capsys.readouterr().out


WINDOW = {"kind": "sliding_attention", "tokens": 4096, "layers": 1}
CHUNK = {"kind": "chunked_attention", "tokens": 8192, "layers": 3}
LATENTS = {"held": "expanded keys and values", "latent_numbers_a_token": 576}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, None),
        ({"full_attention": 4}, "4 of 4 layers with attention"),
        (
            {"full_attention": 2, "local": [WINDOW, WINDOW]},
            "2 of 4 layers with attention (window of 4096 tokens in 2 layers)",
        ),
        (
            {"full_attention": 1, "local": [WINDOW, CHUNK], "recurrent": 6, "reading_others": 2},
            "1 of 7 layers with attention (chunk of 8192 tokens in 3 layers, window of 4096 tokens in 1 layer, "
            "keys and values of another layer in 2 layers, recurrent state in 6 layers)",
        ),
        (
            {"full_attention": 1, "latents": LATENTS},
            "1 of 1 layer with attention (expanded keys and values instead of 576 latent numbers a token)",
        ),
    ],
)
def test_compressed_layers_are_counted_among_those_with_attention(found, said):
    assert compressed_layers({} if found is None else {"cache_layers": found}) == said


@pytest.mark.parametrize("make", [accuracy, efficiency])
@pytest.mark.parametrize("form", [[], ["--by-budget"], ["--format", "tex"], ["--format", "csv"]])
def test_titles_say_which_layers_methods_work_on(tmp_path, capsys, make, form):
    """Of the record that says so; one from before the field says nothing of the layers."""
    if make is efficiency and form == ["--by-budget"]:
        return
    old, new = make("full", None, 22.0), make("snapkv", 128, 20.0)
    said = "methods work on 2 of 4 layers with attention (window of 4096 tokens in 2 layers)"
    for layers in (None, {"full_attention": 4}, {"full_attention": 2, "local": [WINDOW | {"layers": 2}]}):
        if layers is not None:
            new["cache_layers"] = layers
        assert main([str(save(tmp_path / str(layers), old, new)), *form]) == 0
        out = capsys.readouterr().out
        assert (said in out) == ("local" in (layers or {}))
        assert ("work on" in out) == (said in out)
        titles = [" ".join(spec.caption) for spec in figures(load(tmp_path / str(layers))[0], ["pareto"])]
        assert all((said in title) == (said in out) for title in titles)
        assert titles or make is efficiency


@pytest.mark.parametrize("make", [accuracy, efficiency])
@pytest.mark.parametrize("form", [[], ["--by-budget"], ["--format", "tex"], ["--format", "csv"]])
def test_rows_whose_methods_work_on_other_layers_are_told(tmp_path, capsys, make, form):
    """The same model under another release of transformers, say; a row that does not tell its layers is neither."""
    if make is efficiency and form == ["--by-budget"]:
        return
    runs = [make(name, budget, 20.0) for name, budget in (("full", None), ("snapkv", 128), ("h2o", 128), ("old", 64))]
    for record, layers in zip(runs, (4, 4, 2), strict=False):
        record["cache_layers"] = {"full_attention": layers}
    runs[2]["cache_layers"]["local"] = [WINDOW | {"layers": 2}]
    assert main([str(save(tmp_path, *runs)), *form]) == 0
    out = capsys.readouterr().out
    assert "methods work on different layers" in out
    if form != ["--format", "csv"]:
        windowed = "2 of 4 layers with attention (window of 4096 tokens in 2 layers): h2o 128"
        plain = "4 of 4 layers with attention: full, snapkv 128"
        assert f"Methods did not work on the same layers. {windowed}; {plain}. A part of a difference is that." in out
    assert all(
        "methods work on different layers" in " ".join(s.caption) for s in figures(load(tmp_path)[0], ["pareto"])
    )


def test_a_row_holds_scores_interval_difference_and_bytes(tmp_path):
    (table,) = made(tmp_path, accuracy("snapkv", 128, 20.0), accuracy("full", None, 22.0))
    assert [row[0].text for row in table.rows] == ["full", "snapkv 128"]  # the baseline first
    row = [c.text for c in table.rows[1]]
    assert row[:6] == ["snapkv 128", "19.00", "21.00", "20.00", "[19.00, 21.00]", "-2.00†"]
    assert row[6] == "[-3.00, -1.00]"
    assert sum(map(int, row[7].split("/"))) == 40  # won, tied and lost
    assert row[8:] == ["0.0", "2.00", "3.1 %", table.runs[1].record["hash"]]
    assert table.columns[1:3] == ["Qasper", "Lcc"]  # the paper's order and names


@pytest.mark.parametrize(
    "other",
    [
        accuracy("full", None, 99.0, task="longbench-mini"),
        accuracy("full", None, 99.0, task="longbench-subset"),
        accuracy("full", None, 99.0, seed=1),
        accuracy("full", None, 99.0, dtype="bfloat16"),
    ],
)
def test_runs_that_differ_in_more_than_the_method_never_meet(tmp_path, other):
    found = made(tmp_path, accuracy("snapkv", 128, 20.0), accuracy("full", None, 22.0), other)
    assert sorted(len(table.rows) for table in found) == [1, 2]


def test_names_say_what_kind_of_score_it_is(tmp_path):
    notes = {
        t.title.split(" ")[0]: " ".join(t.notes)
        for t in made(
            tmp_path, *(accuracy("full", None, 1.0, task=f"longbench{end}") for end in ("", "-mini", "-subset"))
        )
    }
    assert "not LongBench scores" in notes["longbench-mini"]
    assert "part of LongBench" in notes["longbench-subset"]
    assert "LongBench" not in notes["longbench"]


def test_bold_is_the_best_at_equal_bytes_and_never_the_full_cache(tmp_path):
    (table,) = made(
        tmp_path,
        accuracy("full", None, 30.0),
        accuracy("snapkv", 128, 15.0),
        accuracy("h2o", 128, 21.0),
        accuracy("snapkv", 256, 25.0),
        accuracy("h2o", 256, 19.0),
        accuracy("tova", 512, 29.0),
    )
    bold = {row[0].text for row in table.rows if row[table.columns.index("mean")].bold}
    assert bold == {"h2o 128", "snapkv 256"}
    assert table.blocks == [0, 1, 1, 2, 2, 3]


def test_methods_of_one_budget_are_compared_only_if_they_keep_the_same_bytes(tmp_path):
    """The same budget with 4 bits a number takes a quarter of the bytes."""
    small = accuracy("kivi", 256, 15.0)
    small["bytes"] = {"kv_bytes_stored": 2**20, "kv_ratio": 2**-6}
    (table,) = made(tmp_path, small, accuracy("snapkv", 256, 25.0), accuracy("h2o", 64, 10.0))
    assert [row[0].text for row in table.rows] == ["h2o 64", "kivi 256", "snapkv 256"]
    assert table.blocks == [1, 1, 2]
    assert cell(table, "kivi 256", "mean").bold
    assert not cell(table, "snapkv 256", "mean").bold


def test_the_mean_bytes_over_the_steps_decide_where_they_are_known(tmp_path):
    """Two methods with equal bytes after the prompt, one of which grows."""
    growing, steady = accuracy("snapkv", 256, 25.0), accuracy("h2o", 256, 15.0)
    growing["bytes"]["kv_bytes_mean"] = 2 * growing["bytes"]["kv_bytes_stored"]
    steady["bytes"]["kv_bytes_mean"] = steady["bytes"]["kv_bytes_stored"]
    (table,) = made(tmp_path, growing, steady)
    assert table.blocks == [1, 2]
    assert texts(table, "snapkv 256")["mean KV MiB"] == "8.00"
    assert texts(table, "h2o 256")["mean KV MiB"] == "4.00"


def test_shares_held_and_read_over_the_steps_stand_in_the_table(tmp_path):
    """A method that holds everything and reads a fourth, beside one that grows from an eighth to a fourth."""
    full, quest, growing = accuracy("full", None, 25.0), accuracy("quest", None, 24.0), accuracy("snapkv", 512, 20.0)
    for record, held, read in ((full, 1.0, 1.0), (quest, 1.03, 0.25), (growing, 0.1875, 0.1875)):
        means = {"kv_bytes_mean": held, "kv_bytes_read_mean": read, "kv_bytes_full_mean": 1.0}
        record["bytes"] |= {key: 2**26 * value for key, value in means.items()} | {"kv_ratio_mean": held}
    (table,) = made(tmp_path / "three", full, quest, growing)
    shown = [(texts(table, name)["KV kept"], texts(table, name)["KV read"]) for name in ("quest", "snapkv 512")]
    assert shown == [("103.0 %", "25.0 %"), ("18.8 %", "18.8 %")]
    assert any(note.startswith("KV read: ") for note in table.notes)
    (table,) = made(tmp_path / "two", full, growing)
    assert "KV read" not in table.columns  # what is read is what is held
    budgets, others = budget_tables(load(save(tmp_path / "budgets", full, quest, growing))[0])
    assert "Bytes kept of the full cache, mean over the predicted tokens: 512: 18.8 %." in budgets.notes[0]
    assert [cell.text for cell in others.rows[1]][2:] == ["103.0 %", "25.0 %"]


def test_what_cannot_be_told_from_the_best_is_bold_with_it(tmp_path):
    """Two methods that differ by chance, and one that is worse beyond doubt."""
    (table,) = made(
        tmp_path, *(accuracy(*run) for run in (("snapkv", 128, 25.0), ("h2o", 128, 25.1), ("tova", 128, 9.0)))
    )
    assert {row[0].text for row in table.rows if row[table.columns.index("mean")].bold} == {"snapkv 128", "h2o 128"}


def test_nothing_is_bold_where_nothing_can_be_told_apart(tmp_path):
    (table,) = made(tmp_path, accuracy("snapkv", 128, 25.0), accuracy("h2o", 128, 25.1), accuracy("tova", 512, 30.0))
    assert not any(cell.bold for row in table.rows for cell in row)


def test_a_difference_from_the_full_cache_is_marked_after_holm_s_rule(tmp_path):
    runs = [accuracy("full", None, 22.0), accuracy("snapkv", 128, 10.0), accuracy("h2o", 128, 22.05)]
    (table,) = made(tmp_path, *runs)
    assert cell(table, "snapkv 128", "vs full").text == "-12.00†"
    assert cell(table, "h2o 128", "vs full").text == "+0.05"
    assert cell(table, "snapkv 128", "vs full").p < 0.05 < cell(table, "h2o 128", "vs full").p
    assert any("Holm" in note for note in table.notes)


def test_against_pairs_every_row_with_the_method_s_row_of_its_budget(tmp_path, capsys):
    """Differences, intervals and p-values are those of analysis/stats, adjusted over the table."""
    settings = [
        ("full", None, 22.0),
        ("snapkv", 128, 19.0),
        ("snapkv", 256, 21.5),
        ("h2o", 128, 18.5),
        ("h2o", 256, 21.0),
    ]
    folder = save(tmp_path, *(accuracy(*setting) for setting in [*settings, ("tova", 64, 15.0)]))
    runs = {run.label: run for run in load(folder)[0]}
    scores = {label: run.examples.by_data_set() for label, run in runs.items()}
    pairs = {"h2o 128": "snapkv 128", "h2o 256": "snapkv 256"}
    compared = {label: stats.compare(scores[label], scores[other]) for label, other in pairs.items()}
    adjusted = stats.holm({label: comparison.p for label, comparison in compared.items()})
    (table,) = each_table(list(runs.values()), reference=Reference("snapkv"))
    assert len(compared) == 2 and {row[0].text for row in table.rows} == set(runs)
    for row in table.rows:
        label, columns = row[0].text, dict(zip(table.columns, row, strict=True))
        difference = row[table.columns.index("vs snapkv")]
        if label not in pairs:
            assert (difference.text, columns["p (Holm)"].text, columns["won/tied/lost"].text) == ("-", "-", "-")
            continue
        expected = compared[label].difference
        assert (difference.value, difference.low, difference.high) == (expected.mean, expected.low, expected.high)
        assert columns["p (Holm)"].value == difference.p == adjusted[label]
        assert columns["won/tied/lost"].text == f"{compared[label].won}/{compared[label].tied}/{compared[label].lost}"
    assert "than with snapkv." in " ".join(table.notes) and "the full cache" not in " ".join(table.notes)

    (one,) = each_table(list(runs.values()), reference=Reference("snapkv 256"))
    others = {label: stats.compare(scores[label], scores["snapkv 256"]) for label in runs if label != "snapkv 256"}
    adjusted = stats.holm({label: comparison.p for label, comparison in others.items()})
    assert {row[0].text: row[one.columns.index("p (Holm)")].value for row in one.rows} == {
        **adjusted,
        "snapkv 256": None,
    }

    assert main([str(folder), "--against", "snapkv", "--columns", "vs*,p*"]) == 0
    assert "| vs snapkv | p (Holm) |" in " ".join(capsys.readouterr().out.split())
    assert main([str(folder), "--against", "snapkv", "--by-budget"]) == 0
    assert main([str(folder), "--against", "full"]) == 0
    assert "vs full" in capsys.readouterr().out


def test_against_names_one_method_of_the_results(tmp_path, capsys):
    two = [accuracy("snapkv", 128, 19.0, seed=0) for _ in range(2)]
    two[1]["identity"]["method"]["selection"]["window"] = 16
    folder = save(tmp_path, *two, accuracy("h2o", 128, 18.0))
    for name, message in (
        ("snapvk", "is in none of these results: they have h2o, snapkv; did you mean snapkv"),
        ("snapkv", "is more than one method here: name one of snapkv (window="),
    ):
        assert main([str(folder), "--against", name]) == 2
        assert capsys.readouterr().err.startswith(f"error: --against={name}: {message}")
    for name in ("snapkv 128 (window=16)", "snapkv (window=16)"):
        assert main([str(folder), "--against", name, "--columns", "vs*"]) == 0
        assert f"vs {name}" in capsys.readouterr().out


def test_against_takes_no_method_in_another_storage(tmp_path, capsys):
    packed = accuracy("snapkv", 128, 19.0) | {"method_label": "snapkv 128 + kivi4"}
    folder = save(tmp_path, packed, accuracy("h2o", 128, 18.0))
    assert main([str(folder), "--against", "snapkv"]) == 2
    assert "they have h2o, snapkv + kivi4; did you mean" in capsys.readouterr().err


def test_a_margin_says_which_methods_are_within_it(tmp_path, capsys):
    """Losses of 1, 6 and 3 points whose intervals are about a point to each side, against a margin of 3."""
    runs = [("full", None, 22.0), ("snapkv", 128, 21.0), ("h2o", 128, 16.0), ("tova", 128, 19.0)]
    save(tmp_path, *(accuracy(*run) for run in runs))
    (table,) = each_table(load(tmp_path)[0], margin=3.0)
    found = {label: texts(table, label)["within 3"] for label in ("full", "snapkv 128", "h2o 128", "tova 128")}
    assert found == {"full": "-", "snapkv 128": "yes", "h2o 128": "no", "tova 128": "undecided"}
    assert any("above a loss of 3 points (yes)" in note for note in table.notes)
    assert main([str(tmp_path), "--margin", "3", "--columns", "mean,within*"]) == 0
    assert "|  within 3 |" in capsys.readouterr().out
    for wrong in (["--margin", "0"], ["--margin", "nan"], ["--margin", "1", "--by-budget"]):
        assert main([str(tmp_path), *wrong]) == 2
        assert capsys.readouterr().err.startswith("error: --margin=")


def test_a_margin_of_losses_is_in_nats_and_a_smaller_loss_is_better(tmp_path):
    records = [accuracy("full", None, 3.0), accuracy("snapkv", 128, 2.0), accuracy("h2o", 128, 4.0)]
    for record in records:
        record["unit"] = "nats per token"
        if "paired" in record:
            record["paired"]["difference"] = estimate(record["average"]["mean"] - 3.0, half=0.5)
    (table,) = each_table(load(save(tmp_path, *records))[0], margin=0.1)
    assert [texts(table, label)["within 0.1"] for label in ("snapkv 128", "h2o 128")] == ["yes", "no"]


def test_a_data_set_on_which_the_full_cache_fails_is_marked(tmp_path):
    """A score that is 0 cannot fall."""
    runs = [accuracy("full", None, 22.0), accuracy("snapkv", 128, 20.0)]
    for record in runs:
        record["scores"]["lcc"] = estimate(0.0)
        record["scores"]["qasper"] = estimate(2 * record["average"]["mean"])
    save(tmp_path, *runs)
    for path in tmp_path.rglob("samples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"score": 0.0} if row["dataset"] == "lcc" else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (table,) = tables(load(tmp_path)[0])
    assert (cell(table, "full", "Lcc").text, cell(table, "full", "Qasper").text) == ("0.00°", "44.00")
    assert cell(table, "snapkv 128", "Lcc").text == "0.00"
    assert any("no method can lose there" in note for note in table.notes)


def test_output_that_grows_is_told(tmp_path):
    save(tmp_path, accuracy("full", None, 22.0), accuracy("snapkv", 128, 20.0))
    (path,) = tmp_path.glob("*/snapkv/*/samples.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"new_tokens": row["new_tokens"] + 5}) + "\n" for row in rows))
    (table,) = tables(load(tmp_path)[0])
    assert cell(table, "snapkv 128", "tokens vs full").text == "+5.0"


def test_tables_of_one_output_say_every_setting_in_which_they_differ(tmp_path):
    runs = [accuracy("full", None, 22.0), accuracy("full", None, 21.0)]
    runs[0]["identity"]["task"] = {**runs[0]["identity"]["task"], "max_length": 4000}
    runs[1]["identity"]["task"] = {**runs[1]["identity"]["task"], "max_length": None}
    titles = sorted(table.title for table in made(tmp_path, *runs))
    assert [title.endswith(end) for title, end in zip(titles, ("max_length 4000", "max_length null"), strict=True)] == [
        True
    ] * 2
    (alone,) = made(tmp_path / "alone", runs[0])
    assert "max_length" not in alone.title


@pytest.mark.parametrize("task", ["longbench-mini", "longbench-subset"])
@pytest.mark.parametrize(
    "form", [["--by-budget"], [], ["--format", "csv"], ["--format", "latex"], ["--format", "html"]]
)
def test_every_form_says_what_scores_are_not(tmp_path, capsys, task, form):
    save(tmp_path, accuracy("full", None, 22.0, task=task), accuracy("snapkv", 128, 20.0, task=task))
    assert main([str(tmp_path), *form]) == 0
    said = {"longbench-mini": "not LongBench scores", "longbench-subset": "published LongBench scores"}[task]
    assert said in capsys.readouterr().out


def test_less_time_and_memory_is_better_more_speed_is_better(tmp_path):
    (table,) = made(
        tmp_path, efficiency("snapkv", 128, 5.0), efficiency("h2o", 128, 8.0), efficiency("full", None, 9.0)
    )
    assert cell(table, "snapkv 128", "TPOT ms").bold
    assert cell(table, "snapkv 128", "decode tok/s").bold
    assert not cell(table, "h2o 128", "TPOT ms").bold
    row = texts(table, "snapkv 128")
    assert (row["TPOT ms"], row["min - max"], row["decode tok/s"]) == ("5.00", "4.50 - 5.50", "200.0")
    assert (row["peak decode MiB"], row["speed-up"], row["by bytes"]) == ("600", "1.50 x", "2.00 x")


def test_a_machine_that_cannot_measure_something_has_a_dash_and_a_reason(tmp_path):
    record = efficiency("full", None, 9.0)
    record["memory"] = {"problem": "no peak here", "peak_prefill": None, "peak_decode": None}
    record["limit"]["mbu"] = None
    record["bandwidth"] = {"copy_bytes_per_s": None, "problem": "no room for the copy"}
    (table,) = made(tmp_path, record)
    row = texts(table, "full")
    assert row["peak decode MiB"] == row["MBU"] == "-"
    assert "no peak here" in " ".join(table.notes)
    assert "no room for the copy" in " ".join(table.notes)


@pytest.mark.parametrize("kind", ["accuracy", "efficiency"])
def test_a_run_without_memory_keeps_its_row(tmp_path, kind):
    maker = accuracy if kind == "accuracy" else efficiency
    lost = maker("snapkv", 64, 1.0) | {"status": "oom", "problem": "CUDA out of memory"}
    for key in ("scores", "average", "averages", "bytes", "metrics", "memory", "limit", "paired"):
        lost.pop(key, None)
    (table,) = made(tmp_path, lost, maker("full", None, 9.0))
    assert [c.text for c in table.rows[1]][:2] == ["snapkv 64", "out of memory"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert len(made(tmp_path / "alone", lost)) == 1


def test_two_settings_of_one_method_are_told_apart(tmp_path):
    other = accuracy("snapkv", 128, 21.0)
    other["identity"]["method"]["selection"]["window"] = 16
    other["hash"] = "other"
    (table,) = made(tmp_path, accuracy("snapkv", 128, 20.0), other)
    assert {row[0].text for row in table.rows} == {"snapkv 128 (window=32)", "snapkv 128 (window=16)"}


def test_csv_names_the_run_and_interval_of_every_number(tmp_path, capsys):
    save(tmp_path, accuracy("snapkv", 128, 20.0), accuracy("full", None, 22.0))
    assert main([str(tmp_path), "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    mean = next(r for r in rows if r["method"] == "snapkv 128" and r["column"] == "mean")
    assert (float(mean["value"]), float(mean["low"]), float(mean["high"]), mean["n"]) == (20.0, 19.0, 21.0, "40")
    assert json.loads((load(tmp_path)[0][1].path / "record.json").read_text())["budget"] == 128
    assert mean["run"] == os.path.relpath(load(tmp_path)[0][1].path)
    assert all(r["run"] for r in rows)


def test_latex_escapes_and_names_its_runs(tmp_path, capsys):
    save(tmp_path, accuracy("ada_kv", 128, 20.0), accuracy("h2o", 128, 22.0))
    assert main([str(tmp_path), "--format", "tex"]) == 0
    out = capsys.readouterr().out
    assert r"ada\_kv 128 & " in out
    assert r"\textbf{22.00}" in out
    assert r"3.1 \%" in out
    assert f"% ada_kv 128: {tmp_path}" in out


def test_broken_records_are_reported_and_the_others_shown(tmp_path, capsys):
    save(tmp_path, accuracy("full", None, 22.0))
    for name, content in (("cut", '{"schema": 1, "sta'), ("new", '{"schema": 99}'), ("odd", '{"schema": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(content)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "| full" in shown.out
    errors = shown.err.splitlines()
    assert len(errors) == 3
    assert "cut/record.json: is not JSON" in errors[0]
    assert "has schema 99; this version reads 1" in errors[1]
    assert "lacks status" in errors[2]


def test_an_empty_folder_says_what_to_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: RESULTS={tmp_path}: holds no finished run")


def test_an_unknown_ending_and_an_unwritable_file_are_one_line(tmp_path, capsys):
    save(tmp_path, accuracy("full", None, 22.0))
    assert main([str(tmp_path), "-o", "table.xls"]) == 2
    assert "must be a file ending in one of csv, html, md, tex" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path), "-o", str(tmp_path / "file" / "t.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_times_whose_ranges_overlap_have_no_best_one(tmp_path):
    """5.0 and 5.5 ms, each give or take 10 %: one is not faster than the other on this evidence."""
    (table,) = made(
        tmp_path, efficiency("snapkv", 128, 5.0), efficiency("h2o", 128, 5.5), efficiency("full", None, 9.0)
    )
    assert not cell(table, "snapkv 128", "TPOT ms").bold
    assert not cell(table, "snapkv 128", "peak decode MiB").bold  # both print 600


def test_every_run_of_a_method_with_two_settings_tells_which(tmp_path):
    """Also where no two labels collide: a window of 16 at one budget and of 32 at another are not one method."""
    other = accuracy("snapkv", 256, 21.0)
    other["identity"]["method"]["selection"]["window"] = 16
    (table,) = made(tmp_path, accuracy("snapkv", 128, 20.0), other, accuracy("full", None, 22.0))
    assert {row[0].text for row in table.rows} == {"full", "snapkv 128 (window=32)", "snapkv 256 (window=16)"}


def test_rows_of_an_older_version_of_a_part_are_marked(tmp_path, capsys):
    """In every kind of table; a record of today's version and one of another part are not."""
    older, current, drawn = (accuracy("kivi", None, 20.0), accuracy("kivi", None, 21.0), accuracy("random", 128, 9.0))
    older["identity"]["method"]["storage"] = {"class": "Kivi", "bits": 4}
    current["identity"]["method"]["storage"] = {"class": "Kivi", "bits": 4, "version": CURRENT_VERSIONS["Kivi"]}
    drawn["identity"]["method"]["selection"] = {"class": "RandomTokens", "budget": 128}
    for record, label in ((older, "kivi4"), (current, "kivi4 new")):
        record["method_label"] = label
    runs = load(save(tmp_path / "a", older, current, drawn, accuracy("snapkv", 128, 20.0)))[0]
    (table,) = tables(runs)
    assert {row[0].text for row in table.rows} == {"kivi4‡", "kivi4 new", "random 128‡", "snapkv 128"}
    assert "‡: older version of the policy or the storage, whose results may differ from today's." in table.notes
    by_curve, others = budget_tables(runs)
    assert [row[1].text[-1] for row in by_curve.rows] == ["‡", "]"]
    assert any("of the policy," in note for note in by_curve.notes)
    assert [row[0].text for row in others.rows] == ["kivi4‡", "kivi4 new"]
    assert others.title == f"{by_curve.title}, other methods"
    assert any("of the storage," in note for note in others.notes)
    assert main([str(tmp_path / "a"), "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {row["method"] for row in rows if "older version" in row["warning"]} == {"kivi4", "random 128"}

    timed = efficiency("kivi", None, 5.0)
    timed["identity"]["method"]["storage"] = {"class": "Kivi", "bits": 4}
    (table,) = made(tmp_path / "b", timed, efficiency("full", None, 10.0))
    assert [row[0].text for row in table.rows] == ["full", "kivi‡"] and any("‡" in note for note in table.notes)


def test_code_that_differs_is_told(tmp_path):
    one, two = accuracy("full", None, 22.0), accuracy("snapkv", 128, 20.0)
    one["provenance"] = {"git": {"sha": "a" * 40, "dirty": False}, "packages": {"torch": "2.13.0"}}
    two["provenance"] = {"git": {"sha": "b" * 40, "dirty": True}, "packages": {"torch": "2.14.0"}}
    (table,) = made(tmp_path, one, two)
    notes = " ".join(table.notes)
    assert "more than one commit: aaaaaaa, bbbbbbb." in notes
    assert "more than one torch: 2.13.0, 2.14.0." in notes
    assert "differs from its commit" in notes


def test_rows_that_other_processes_made_are_told(tmp_path):
    """Of five sessions, the second made nothing; nor did the last one, which joined the others' rows."""

    def session(after, sha, cpu):
        return {"after_examples": after, "git": {"sha": sha * 40}, "packages": {}, "hardware": {"cpu": cpu}}

    one = accuracy("full", None, 22.0)
    one["data"]["examples"] = {"qasper": 4, "lcc": 3}
    for name, n in one["data"]["examples"].items():
        one["scores"][name]["n"] = n
    one["average"]["n"] = 7
    makers = [(0, "a", "Xeon"), (2, "b", "M4"), (2, "a", "Xeon"), (4, "c", "EPYC"), (7, "d", "Graviton")]
    one["sessions"] = [session(*maker) for maker in makers]
    (table,) = made(tmp_path, one)
    notes = " ".join(table.notes)
    assert "of more than one commit: aaaaaaa, ccccccc." in notes
    assert "on more than one processor: EPYC, Xeon." in notes


def test_prompts_read_in_several_ways_are_told_in_16_bits(tmp_path):
    """Chunk size and shared prefills are not in a run's identity; in bfloat16 each way rounds differently."""

    def notes(folder, dtype, chunks=(None, None), others=(1, 1)):
        runs = [accuracy("full", None, 22.0), accuracy("snapkv", 128, 20.0)]
        for record, chunk, count in zip(runs, chunks, others, strict=True):
            record["identity"]["dtype"] = dtype
            record["sessions"] = [{"after_examples": 0, "git": {"sha": "a" * 40}, "packages": {}, "chunk_size": chunk}]
            record["rode_with"] = ["x"] * count
        of_all = made(tmp_path / folder, *runs)
        by_budget = budget_tables(load(tmp_path / folder)[0])
        said = [[n for t in group for n in t.notes if "rounds differently" in n] for group in (of_all, by_budget)]
        assert said[0] == said[1]
        return " ".join(said[0])

    assert "in chunks of all, 512 tokens" in notes("a", "bfloat16", chunks=(None, 512))
    assert "for 1, 6 methods at once" in notes("b", "bfloat16", others=(0, 5))
    assert notes("c", "bfloat16") == notes("d", "float32", chunks=(None, 512), others=(0, 5)) == ""


def test_bits_on_a_32_bit_cache_are_told(tmp_path):
    record = accuracy("kivi", None, 20.0)
    record["identity"]["method"]["selection"] = {"class": "Selection"}
    record["identity"]["method"]["storage"] = {"class": "Kivi", "bits": 4}
    (table,) = made(tmp_path, record, accuracy("full", None, 22.0))
    assert "share of a 32-bit cache" in " ".join(table.notes)
    record["identity"]["dtype"] = "bfloat16"
    assert "32-bit" not in " ".join(made(tmp_path / "half", record)[0].notes)


def test_a_record_without_its_results_is_skipped_too(tmp_path, capsys):
    torn = accuracy("snapkv", 128, 20.0)
    del torn["bytes"]
    save(tmp_path, torn, accuracy("full", None, 22.0))
    assert main([str(tmp_path)]) == 0
    assert "lacks bytes" in capsys.readouterr().err


def test_by_budget_is_a_row_a_method_and_a_column_a_budget(tmp_path, capsys):
    for budget, mean in ((128, 10.0), (256, 20.0)):
        save(tmp_path / f"s{budget}", accuracy("snapkv", budget, mean))
    save(tmp_path / "h256", accuracy("h2o", 256, 15.0))
    save(tmp_path / "full", accuracy("full", None, 22.0))
    save(tmp_path / "oom", accuracy("h2o", 128, 1.0) | {"status": "oom"})
    assert main([str(tmp_path), "--by-budget"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert ["method / budget", "128", "256"] in rows
    assert ["snapkv", "10.0 [9, 11]†", "**20.0 [19, 21]†**"] in rows
    assert ["h2o", "", "15.0 [14, 16]†"] in rows
    assert ["full", "22.0 [21, 23]", "100.0 %"] in rows
    titles = [line.strip("*") for line in out.splitlines() if line.startswith("**")]
    assert len(titles) == 2 and titles[1] == f"{titles[0]}, the full cache"
    assert "128: 3.1 %, 256: 6.2 %" in out
    assert main([str(tmp_path), "--by-budget", "-o", str(tmp_path / "x.csv")]) == 2
    assert "--by-budget=csv" in capsys.readouterr().err


def test_a_fraction_of_the_prompt_is_a_column_where_several_methods_have_it(tmp_path):
    """A share that one method alone has would be a column of one cell; 1.0 is another budget than one token."""
    runs = [("snapkv", 0.125, 10.0), ("h2o", 0.125, 12.0), ("snapkv", 0.25, 20.0), ("h2o", 0.25, 15.0)]
    runs += [("pyramid_infer", 0.6, 18.0), ("h2o", 1, 2.0), ("h2o", 1.0, 21.0), ("snapkv", 1.0, 21.0)]
    shown = [accuracy(name, budget, mean) for name, budget, mean in runs]
    save(tmp_path, accuracy("full", None, 22.0), *shown)
    of_budgets, others = budget_tables(load(tmp_path)[0])
    assert of_budgets.columns == ["method / budget", "0.125", "0.25", "1"]
    assert texts(of_budgets, "h2o")["0.25"].startswith("15.0 [14, 16]")
    assert texts(of_budgets, "h2o")["1"].startswith("2.0 [1, 3]")
    assert [row[0].text for row in others.rows] == ["full", "pyramid_infer 0.6", "h2o 1.0", "snapkv 1.0"]


def test_samples_are_split_at_line_feeds_alone(tmp_path):
    """str.splitlines would cut a row at characters that JSON leaves as they are."""
    rows = [{"id": str(i), "prediction": f"a{separator}b"} for i, separator in enumerate("\u2028\u2029\x85\x1c\r\n")]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_bytes(text.encode())
    assert Run(tmp_path, {}, "full").samples() == rows


def test_a_results_folder_holds_the_user_s_own_runs_and_the_committed_ones_have_to_be_named(tmp_path, capsys):
    save(tmp_path / "reference" / "make_run", accuracy("full", None, 22.0))
    assert main([str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    save(tmp_path / "longbench-mini", accuracy("full", None, 23.0))
    for folder, mean in ((tmp_path, 23.0), (tmp_path / "reference", 22.0)):
        assert [run.record["average"]["mean"] for run in load(folder)[0]] == [mean]
