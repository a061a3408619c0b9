"""LongBench: rows, prompts, truncation, metrics. Every test names the wrong number it guards against."""

import gzip
import hashlib
import json
import logging
import random
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer, with_chat_template
from fake_hub import FakeHub
from omegaconf import OmegaConf

from kvbench.conf.errors import InputError
from kvbench.tasks import longbench_data, longbench_metrics
from kvbench.tasks.longbench import LongBench, truncate_middle
from kvbench.tasks.longbench_spec import CATEGORIES, E_DATASETS, ENGLISH_16, SPECS, bucket

YAML = Path(__file__).parents[2] / "conf" / "task" / "longbench.yaml"

CLASSES = {"trec": ["Food", "Other", "Other entity"], "lsht": ["军事", "体育"]}
ANSWERS = {"passage_retrieval_en": ["Paragraph 7"], "passage_retrieval_zh": ["段落7"], "passage_count": ["7"]}


def row(dataset: str = "qasper", number: int = 0, **changes: Any) -> dict[str, Any]:
    """One row in the official schema."""
    values = {
        "input": f"question {number}?",
        "context": f"context {number}",
        "answers": ANSWERS.get(dataset, ["yes"]),
        "length": 1000 * number,
        "dataset": dataset,
        "language": "en",
        "all_classes": CLASSES.get(dataset),
        "_id": f"id-{number}",
    }
    return values | changes


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(folder: Path, dataset: str, rows: list[dict[str, Any]], stem: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem or dataset}.jsonl"
    path.write_bytes(jsonl(rows))
    return path


def full(dataset: str) -> list[dict[str, Any]]:
    """As many rows as the official file has."""
    return [row(dataset, number) for number in range(SPECS[dataset].rows)]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text, "an error for the user is one line"
    return text


# --- the data sets ----------------------------------------------------------------------------------------------------


def test_prompts_and_limits_are_the_official_ones_byte_for_byte(shared_data: Path) -> None:
    """A "corrected" typo or a lost blank changes the tokens of every prompt, and no score can be compared any more."""
    prompts = json.loads((shared_data / "longbench/dataset2prompt.json").read_text(encoding="utf-8"))
    limits = json.loads((shared_data / "longbench/dataset2maxlen.json").read_text(encoding="utf-8"))
    assert {name: spec.prompt for name, spec in SPECS.items()} == prompts
    assert {name: spec.max_new_tokens for name, spec in SPECS.items()} == limits


def test_the_official_oddities_are_kept() -> None:
    """The two places someone will want to tidy up; holds without the shared data too."""
    assert SPECS["narrativeqa"].prompt.count("the question asconcisely as") == 1
    assert SPECS["narrativeqa"].prompt.count("the story asconcisely as") == 1
    assert "\n\n Answer the question based on the above article as concisely" in SPECS["qasper"].prompt
    assert "all news. \n\nNews:\n" in SPECS["multi_news"].prompt


def test_each_data_set_has_the_official_protocol() -> None:
    """trec in a chat template, or qasper cut to its first line, is another benchmark under the same name."""
    no_chat = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name, spec in SPECS.items() if not spec.chat} == no_chat
    assert {name for name, spec in SPECS.items() if spec.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert {name for name, spec in SPECS.items() if spec.stop_tokens or spec.min_new_tokens} == {"samsum"}
    assert (SPECS["samsum"].stop_tokens, SPECS["samsum"].min_new_tokens) == (("\n",), 1)
    by_metric: dict[str, set[str]] = {}
    for name, spec in SPECS.items():
        by_metric.setdefault(spec.metric, set()).add(name)
    assert by_metric == {
        "qa_f1": {"narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"},
        "qa_f1_zh": {"multifieldqa_zh"},
        "rouge": {"gov_report", "qmsum", "multi_news", "samsum"},
        "rouge_zh": {"dureader", "vcsum"},
        "classification": {"trec", "lsht"},
        "retrieval": {"passage_retrieval_en"},
        "retrieval_zh": {"passage_retrieval_zh"},
        "count": {"passage_count"},
        "code_sim": {"lcc", "repobench-p"},
    }


def test_sizes_and_groups_are_those_of_the_paper() -> None:
    assert len(SPECS) == 21
    assert sum(spec.rows for spec in SPECS.values()) == 4750
    assert len(E_DATASETS) == 13
    assert sum(spec.rows_e for spec in SPECS.values()) == 3668
    assert set(SPECS) - set(ENGLISH_16) == {
        "multifieldqa_zh",
        "dureader",
        "vcsum",
        "lsht",
        "passage_retrieval_zh",
    }
    assert list(dict.fromkeys(spec.category for spec in SPECS.values())) == list(CATEGORIES)


def test_gold_files_have_the_official_number_of_rows(shared_data: Path) -> None:
    """The number of rows decides whether a score may be called LongBench."""
    for name, spec in SPECS.items():
        with gzip.open(shared_data / f"longbench/gold/{name}.jsonl.gz") as file:
            assert sum(1 for _ in file) == spec.rows, name


# --- rows to examples -------------------------------------------------------------------------------------------------


def test_real_rows_become_the_official_prompts(shared_data: Path) -> None:
    """All real rows at hand, rendered as the official code renders them."""
    templates = json.loads((shared_data / "longbench/dataset2prompt.json").read_text(encoding="utf-8"))
    task = LongBench(data_dir=str(shared_data / "longbench"))
    examples = task.examples()
    assert list(dict.fromkeys(example.dataset for example in examples)) == list(SPECS)
    for dataset in SPECS:
        with gzip.open(shared_data / f"longbench/{dataset}.jsonl.gz") as file:
            rows = [json.loads(line) for line in file]
        mine = [example for example in examples if example.dataset == dataset]
        assert [example.prompt for example in mine] == [templates[dataset].format(**row) for row in rows]
        assert [list(example.answers) for example in mine] == [row["answers"] for row in rows]
        assert [example.meta["length"] for example in mine] == [row["length"] for row in rows]
        assert [example.meta["row"] for example in mine] == list(range(len(rows)))
        assert len({example.id for example in mine}) == len(rows)
    assert task.source().name == "longbench-subset"


def test_complete_official_files_are_called_longbench(shared_data: Path) -> None:
    task = LongBench(["passage_retrieval_zh", "multi_news"], data_dir=str(shared_data / "longbench"))
    source = task.source()
    assert (source.name, source.revision) == ("longbench", None)
    raw = gzip.decompress((shared_data / "longbench/multi_news.jsonl.gz").read_bytes())
    assert source.sha256["multi_news"] == hashlib.sha256(raw).hexdigest()
    assert list(source.sha256) == ["passage_retrieval_zh", "multi_news"], "the user's order"
    assert len(task.examples()) == 400


def test_a_score_on_fewer_rows_is_never_called_longbench(tmp_path: Path) -> None:
    """Ten rows of a set, or nineteen sets of 21, give a number that must not stand beside a published one."""
    write(tmp_path, "qasper", full("qasper"))
    write(tmp_path, "trec", full("trec")[:-1])
    assert LongBench(["qasper"], data_dir=str(tmp_path)).source().name == "longbench"
    assert LongBench(["qasper"], data_dir=str(tmp_path), limit=200).source().name == "longbench"
    assert LongBench(["qasper"], data_dir=str(tmp_path), limit=199).source().name == "longbench-subset"
    assert LongBench(["trec"], data_dir=str(tmp_path)).source().name == "longbench-subset"
    assert LongBench(["qasper", "trec"], data_dir=str(tmp_path)).source().name == "longbench-subset"
    (tmp_path / "trec.jsonl").unlink()
    assert LongBench(data_dir=str(tmp_path)).source().name == "longbench-subset", "one complete set of 21"


def test_folder_gzip_subfolder_and_archive_give_the_same_rows_and_hash(tmp_path: Path) -> None:
    rows = [row(number=number) for number in range(3)]
    content = jsonl(rows)
    write(tmp_path / "plain", "qasper", rows)
    write(tmp_path / "nested" / "data", "qasper", rows)
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "qasper.jsonl.gz").write_bytes(gzip.compress(content))
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("data/qasper.jsonl", content)
    tasks = [
        LongBench(data_dir=str(place)) for place in (tmp_path / "plain", tmp_path / "nested", tmp_path / "gz", archive)
    ]
    assert all(task.examples() == tasks[0].examples() for task in tasks)
    assert {task.source().sha256["qasper"] for task in tasks} == {hashlib.sha256(content).hexdigest()}


def test_limit_takes_the_first_rows_and_keeps_their_ids(tmp_path: Path) -> None:
    """A resumed run finds its place by id: an id must not depend on how many rows were asked for."""
    rows = [row(number=number, _id=identifier) for number, identifier in enumerate(["x", None, "x", "", "x:2"])]
    write(tmp_path, "qasper", rows)
    whole = LongBench(data_dir=str(tmp_path)).examples()
    assert [example.id for example in whole] == ["x", "qasper:1", "x:2", "qasper:3", "x:2:4"]
    assert LongBench(data_dir=str(tmp_path), limit=3).examples() == whole[:3]
    assert LongBench(data_dir=str(tmp_path), limit=99).examples() == whole


def test_rows_without_the_id_field_and_with_other_fields_are_fine(tmp_path: Path) -> None:
    bare = row()
    del bare["_id"]
    write(tmp_path, "qasper", [bare, row(number=1, _source="Moby Dick, chapter 1")])
    assert [example.id for example in LongBench(data_dir=str(tmp_path)).examples()] == ["qasper:0", "id-1"]


def test_unicode_line_separators_and_braces_stay_inside_a_row(tmp_path: Path) -> None:
    """str.splitlines would cut a row at U+2028; str.format would trip over code if it were part of the template."""
    context = "int main() { return {0}; } \u2028 next \x85 line"
    write(tmp_path, "lcc", [row("lcc", context=context)])
    (example,) = LongBench(data_dir=str(tmp_path)).examples()
    assert example.prompt == f"Please complete the code given below. \n{context}Next line of code:\n"


def test_no_context_takes_only_the_context_out(tmp_path: Path) -> None:
    write(tmp_path, "hotpotqa", [row("hotpotqa", context="THE EVIDENCE")])
    (plain,) = LongBench(data_dir=str(tmp_path)).examples()
    task = LongBench(data_dir=str(tmp_path), no_context=True)
    (control,) = task.examples()
    assert task.source().name == "longbench-subset-no-context", "a control never stands among scores"
    assert control.prompt == plain.prompt.replace("THE EVIDENCE", "")
    assert control.prompt != plain.prompt
    assert control.answers == plain.answers


# --- LongBench-E ------------------------------------------------------------------------------------------------------


def test_longbench_e_reads_its_own_files_and_splits_at_4000_and_8000(tmp_path: Path) -> None:
    lengths = [0, 3999, 4000, 7999, 8000, 20000]
    write(tmp_path, "qasper", [row(length=1)])
    write(tmp_path, "qasper", [row(number=i, length=length) for i, length in enumerate(lengths)], stem="qasper_e")
    task = LongBench(["qasper"], e=True, data_dir=str(tmp_path))
    examples = task.examples()
    assert [example.meta["bucket"] for example in examples] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+", "8k+"]
    assert [bucket(length) for length in lengths] == [example.meta["bucket"] for example in examples]
    assert task.source().name == "longbench-e-subset"
    assert [task.group(example) for example in examples[1:5]] == [
        "qasper/0-4k",
        "qasper/4-8k",
        "qasper/4-8k",
        "qasper/8k+",
    ]


def test_longbench_e_complete(tmp_path: Path) -> None:
    write(tmp_path, "qasper", [row(number=number) for number in range(224)], stem="qasper_e")
    assert LongBench(["qasper"], e=True, data_dir=str(tmp_path)).source().name == "longbench-e"


# --- input that cannot be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"limit": 0}, ["task.limit=0", "must be a whole number >= 1, or null"]),
        ({"limit": -3}, ["task.limit=-3"]),
        ({"limit": 2.5}, ["task.limit=2.5"]),
        ({"limit": True}, ["task.limit=true"]),
        ({"max_length": 1}, ["task.max_length=1", "must be a whole number >= 2, or null"]),
        ({"truncate": "left"}, ["task.truncate=left", "one of middle, none"]),
        ({"code_sim": "fuzzywuzzy"}, ["task.code_sim=fuzzywuzzy", "levenshtein, official"]),
        ({"source": "huub"}, ["task.source=huub", "did you mean hub?"]),
        ({"source": "hub", "data_dir": "/x"}, ["task.source=hub", "must be auto when task.data_dir is given (/x)"]),
        ({"source": "mini", "e": True}, ["task.source=mini", "no LongBench-E"]),
        ({"e": "yes"}, ["task.e=yes", "true or false"]),
        ({"no_context": 1}, ["task.no_context=1", "true or false"]),
        ({"datasets": ["hotpot_qa"]}, ["task.datasets=hotpot_qa", "did you mean hotpotqa"]),
        ({"datasets": "qasper,treck"}, ["task.datasets=treck", "did you mean trec"]),
        (
            {"datasets": ["narrativeqa"], "e": True},
            ["task.datasets=narrativeqa", "must be one of 2wikimqa, gov_report"],
        ),
        ({"datasets": ["qasper", "qasper"]}, ["task.datasets=[qasper,qasper]", "none twice"]),
        ({"datasets": []}, ["task.datasets=[]"]),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_with_its_key(fields: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(InputError) as error:
        LongBench(**fields)
    text = one_line(error)
    assert all(part in text for part in expected), text


def test_data_sets_may_be_given_as_hydra_gives_them() -> None:
    assert LongBench(OmegaConf.create(["qasper", "trec"])).datasets == ("qasper", "trec")
    assert LongBench("qasper, trec").datasets == ("qasper", "trec")


def test_missing_folder_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        LongBench(data_dir=str(tmp_path / "nope")).source()
    assert one_line(error) == f"task.data_dir={tmp_path / 'nope'}: no such folder or data.zip"

    write(tmp_path, "qasper", [row()])
    write(tmp_path, "trec", [row("trec")])
    with pytest.raises(InputError) as error:
        LongBench(["qasper", "hotpotqa", "musique"], data_dir=str(tmp_path)).source()
    assert one_line(error).startswith(f"task.data_dir={tmp_path}: must hold hotpotqa.jsonl, musique.jsonl;")
    assert "has qasper, trec" in str(error.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError) as error:
        LongBench(data_dir=str(empty)).source()
    assert "must hold <dataset>.jsonl" in one_line(error)


GOOD = jsonl([row()])


def escaped(**changes: Any) -> bytes:
    """A row in ASCII, where JSON spells half of a character as "\\ud800"."""
    return json.dumps(row(**changes)).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "where", "expected"),
    [
        (b"", "", "must hold at least one row"),
        (b"\n\n", "", "must hold at least one row"),
        (GOOD + GOOD[: len(GOOD) // 2], ":2", "not a line of JSON"),
        (GOOD + b"<html>\n" + GOOD, ":2", "not a line of JSON"),
        (GOOD + b'{"input": "\xff\xfe"}\n', ":2", "not a line of JSON"),
        (GOOD + b"[1, 2]\n", ":2", "must be a JSON object"),
        (jsonl([{"input": "a", "context": "b"}]), ":1", "answers, length, dataset, language, all_classes"),
        (jsonl([row(context=None)]), ":1=context", "must be a string"),
        (jsonl([row(length="8k")]), ":1=length", "whole number"),
        (jsonl([row(answers="yes")]), ":1", "`answers` must be a list"),
        (jsonl([row(answers=[])]), ":1", "`answers` must be a list"),
        (GOOD + escaped(context="half \ud800 of one"), ":2=context", "half of a character"),
        (GOOD + escaped(input="\udfff"), ":2=input", "half of a character"),
        (escaped(_id="a\ud800"), ":1=_id", "half of a character"),
        (escaped(answers=["\ud800"]), ":1=answers", "half of a character"),
        (GOOD + b'{"input": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", ":2", "not a line of JSON"),
        (GOOD + b"[" * 100_000 + b"\n", ":2", "not a line of JSON"),
        (GOOD + b'{"length": ' + b"7" * 5000 + b"}\n", ":2", "not a line of JSON"),
    ],
)
def test_damaged_rows_are_reported_with_file_and_line(
    tmp_path: Path, content: bytes, where: str, expected: str
) -> None:
    """A download that was cut must not become a smaller benchmark."""
    (tmp_path / "qasper.jsonl").write_bytes(content)
    write(tmp_path, "trec", [row("trec")])
    with pytest.raises(InputError) as error:
        LongBench(["qasper"], data_dir=str(tmp_path)).source()
    text = one_line(error)
    assert f"qasper.jsonl{where}" in text
    assert expected in text
    assert len(LongBench(["trec"], data_dir=str(tmp_path)).examples()) == 1, "other data sets are unharmed"


def test_a_damaged_row_after_the_limit_is_still_reported(tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_bytes(GOOD * 5 + b"{")
    with pytest.raises(InputError, match=r"qasper.jsonl:6"):
        LongBench(["qasper"], data_dir=str(tmp_path), limit=2).source()


@pytest.mark.parametrize(
    ("dataset", "changes", "expected"),
    [
        ("trec", {"all_classes": None}, "`all_classes` must list the class names of trec"),
        ("passage_retrieval_en", {"answers": ["7"]}, "must look like Paragraph 7"),
        ("passage_retrieval_zh", {"answers": ["Paragraph 7"]}, "must look like 段落7"),
    ],
)
def test_rows_that_the_metric_cannot_score_are_found_before_the_run(
    tmp_path: Path, dataset: str, changes: dict[str, Any], expected: str
) -> None:
    """The metric would raise on them, after the model has worked for hours."""
    write(tmp_path, dataset, [row(dataset, **changes)])
    with pytest.raises(InputError) as error:
        LongBench(data_dir=str(tmp_path)).source()
    assert expected in one_line(error)


def test_a_cut_gzip_file_is_reported_with_its_line(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [row(number=i, context="".join(rng.choices("abcdefghij", k=2000))) for i in range(50)]
    packed = gzip.compress(jsonl(rows))
    (tmp_path / "qasper.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"qasper\.jsonl:\d+=damaged: the compressed file ends or breaks here"):
        LongBench(data_dir=str(tmp_path)).source()
    (tmp_path / "qasper.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match=r"qasper\.jsonl:1=damaged"):
        LongBench(data_dir=str(tmp_path)).source()


@pytest.mark.parametrize("member", ["../evil.jsonl", "data/../../evil", "/etc/evil", "C:/evil", "..\\evil"])
def test_an_archive_that_points_outside_itself_is_refused(tmp_path: Path, member: str) -> None:
    """Zip slip: unpacking such an archive would write anywhere. It is not LongBench's, whatever else it holds."""
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("data/qasper.jsonl", GOOD)
        bundle.writestr(zipfile.ZipInfo(member), b"x")
    with pytest.raises(InputError, match="points outside the archive"):
        LongBench(data_dir=str(archive)).source()


@pytest.mark.parametrize("spoil", ["encrypted", "unknown compression"])
def test_an_archive_that_cannot_be_unpacked_is_one_line(tmp_path: Path, spoil: str) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("data/qasper.jsonl", GOOD)
    content = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the member's own header, and the directory's
        start = content.index(signature) + flags
        field, value = (start, 1) if spoil == "encrypted" else (start + 2, 99)
        content[field] = value
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"qasper\.jsonl=unreadable") as error:
        LongBench(["qasper"], data_dir=str(archive)).source()
    one_line(error)


def test_a_file_that_is_no_archive_and_a_damaged_archive(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"task\.data_dir=.*must be a folder or LongBench's data\.zip"):
        LongBench(data_dir=str(path)).source()
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("data/qasper.jsonl", GOOD)
    content = bytearray(path.read_bytes())
    content[40 + len("data/qasper.jsonl")] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"qasper\.jsonl:1=damaged"):
        LongBench(data_dir=str(path)).source()


# --- hub and bundled set ----------------------------------------------------------------------------------------------


def fake_hub(monkeypatch: pytest.MonkeyPatch, archive: Path | None, reachable: tuple[str, ...]) -> FakeHub:
    if archive is not None:
        monkeypatch.setattr(longbench_data, "HUB_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    return FakeHub(monkeypatch, archive, "data.zip", longbench_data.HUB_REVISION, reachable)


def test_a_download_that_fails_does_not_quietly_become_the_bundled_set(
    monkeypatch: pytest.MonkeyPatch, archive: Path
) -> None:
    fake = fake_hub(monkeypatch, archive, longbench_data.HUB_REPOS)
    fake.broken = longbench_data.HUB_REPOS
    with pytest.raises(InputError, match=r"the download of .*data\.zip .* failed: .*No space left") as error:
        LongBench().source()
    assert "\n" not in str(error.value)
    assert fake.calls, "the hub was asked first"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A complete LongBench in the hub's format, with tiny rows."""
    path = tmp_path / "hub" / "data.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name in SPECS:
            bundle.writestr(f"data/{name}.jsonl", jsonl(full(name)))
    return path


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mini"
    write(folder, "trec", [row("trec")])
    write(folder, "qasper", [row(_source="a public-domain book")])
    monkeypatch.setattr(longbench_data, "mini_folder", lambda: folder)
    return folder


def test_the_hub_archive_is_pinned_and_complete(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    """Without a pinned revision the same command scores other rows next year."""
    hub = fake_hub(monkeypatch, archive, ("THUDM/LongBench",))
    task = LongBench(source="hub")
    source = task.source()
    assert (source.name, source.location, source.revision) == (
        "longbench",
        "THUDM/LongBench/data.zip",
        "5e628be450b7e67fb7ae6e201bd6d8f7056f7672",
    )
    assert list(source.sha256) == list(SPECS)
    assert len(task.examples()) == 4750
    assert [what for what, _ in hub.calls] == ["probe", "download"], "fetched once, not once per call"
    assert longbench_data.HUB_REVISION in hub.calls[0][1]


def test_the_renamed_repository_is_tried_too(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    hub = fake_hub(monkeypatch, archive, ("zai-org/LongBench",))
    assert LongBench(["trec"]).source().location == "zai-org/LongBench/data.zip"
    assert hub.calls[-1] == ("download", "zai-org/LongBench")


def test_a_cached_archive_needs_no_network(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    """Compute nodes have no network; what the login node fetched must be found."""
    hub = fake_hub(monkeypatch, archive, ())
    hub.cached, hub.offline = ("zai-org/LongBench",), True
    assert LongBench(["trec"]).source().name == "longbench"
    assert hub.calls == []


def test_an_archive_with_other_bytes_is_refused(
    monkeypatch: pytest.MonkeyPatch, archive: Path, mini: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged or exchanged download must stop the run, not turn it quietly into a mini run."""
    fake_hub(monkeypatch, archive, ("THUDM/LongBench",))
    monkeypatch.setattr(longbench_data, "HUB_SHA256", "0" * 64)
    with pytest.raises(InputError, match="the sha256 must be 0000"):
        LongBench().source()


def test_auto_falls_back_to_mini_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, mini: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mini score shown as a LongBench score is the worst number this harness could print."""
    fake_hub(monkeypatch, None, ())
    task = LongBench()
    with caplog.at_level(logging.WARNING):
        source = task.source()
        task.examples()
    assert (source.name, source.location, source.revision) == (
        "longbench-mini",
        "kvbench.tasks/data/longbench_mini",
        None,
    )
    assert [example.dataset for example in task.examples()] == ["qasper", "trec"], "the paper's order, all there are"
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    assert "longbench-mini" in message
    assert "THUDM/LongBench (ConnectionError: Name or service not known)" in message


def test_mini_is_asked_without_the_hub(monkeypatch: pytest.MonkeyPatch, mini: Path) -> None:
    hub = fake_hub(monkeypatch, None, ())
    assert LongBench(["qasper"], source="mini").source().name == "longbench-mini"
    assert LongBench(["qasper"], source="mini", limit=1).source().name == "longbench-mini"
    assert hub.calls == []


def test_what_mini_does_not_have_is_an_error_that_lists_what_it_has(
    monkeypatch: pytest.MonkeyPatch, mini: Path
) -> None:
    fake_hub(monkeypatch, None, ())
    with pytest.raises(InputError) as error:
        LongBench(["qasper", "vcsum"]).source()
    text = one_line(error)
    assert text.startswith("task.datasets=vcsum: must be in the source")
    assert "has qasper, trec" in text
    assert "zai-org/LongBench" in text
    with pytest.raises(InputError, match=r"task\.source=auto: longbench-mini has no LongBench-E"):
        LongBench(e=True).source()


def test_source_hub_without_network_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = fake_hub(monkeypatch, None, ())
    with pytest.raises(InputError) as error:
        LongBench(source="hub").source()
    text = one_line(error)
    assert text.startswith("task.source=hub: LongBench cannot be fetched")
    assert "THUDM/LongBench (ConnectionError" in text
    assert "zai-org/LongBench (ConnectionError" in text
    hub.offline, hub.calls = True, []
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        LongBench(source="hub").source()
    assert hub.calls == []


def test_a_hub_that_never_answers_is_given_up_quickly(tmp_path: Path) -> None:
    """huggingface_hub's download retries for minutes; a user without network must see the mini set in seconds.

    Here a real socket accepts and stays silent, the slowest kind of no.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        code = (
            "import time; from kvbench.tasks import hub, longbench_data as d; hub.PROBE_TIMEOUT_S = 0.4\n"
            "from huggingface_hub import get_hf_file_metadata\n"
            "start = time.time()\n"
            "try: d.open_hub()\n"
            "except hub.HubUnavailable as error: print(time.time() - start)"
        )
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "PATH": "/usr/bin:/bin",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 0.8 < float(done.stdout) < 15, "two names, one silent wait each, and a slow import"


def test_the_bundled_set_is_in_the_official_schema() -> None:
    """Whatever is bundled must be readable by the reader of the real thing."""
    task = LongBench(source="mini")
    if not longbench_data.open_mini().files:
        pytest.skip("no data set in tasks/data/longbench_mini yet")
    assert task.source().name == "longbench-mini"
    examples = task.examples()
    assert {example.dataset for example in examples} == set(longbench_data.open_mini().files)
    for example in examples:
        assert task.score(example, example.answers[0]) > 0.5, f"{example.dataset} {example.id}: its own answer scores 0"


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Any:
    return with_chat_template(tokenizer)


def example_of(tmp_path: Path, dataset: str, prompt: str) -> tuple[LongBench, Any]:
    from dataclasses import replace

    write(tmp_path, dataset, [row(dataset)])
    task = LongBench([dataset], data_dir=str(tmp_path))
    return task, replace(task.examples()[0], prompt=prompt)


def test_a_long_prompt_loses_its_middle(tokenizer: Any, tmp_path: Path) -> None:
    """Left truncation cuts off the instruction, right truncation the question; both give a low score with no error."""
    task, example = example_of(tmp_path, "lcc", "abcdefghijklmnopqrstuvwxyz")
    ids = tokenizer("abcdefghijklmnopqrstuvwxyz").input_ids
    assert len(ids) == 27, "<s> and 26 letters"
    assert truncate_middle(ids, tokenizer, 10) == "abcd" + "vwxyz", "<s> is one of the first five, and not in the text"
    assert truncate_middle(ids, tokenizer, 11) == "abcd" + "vwxyz", "an odd limit is rounded down in each half"
    assert task.encode(example, tokenizer, 10) == tokenizer("abcdvwxyz").input_ids
    assert task.encode(example, tokenizer, 27) == ids, "just as long as allowed: untouched"
    assert len(task.encode(example, tokenizer, 26)) == 26
    assert task.encode(example, tokenizer, None) == ids


def test_the_smaller_of_the_two_limits_holds(tokenizer: Any, tmp_path: Path) -> None:
    task, example = example_of(tmp_path, "lcc", "abcdefghijklmnopqrstuvwxyz")
    task.max_length = 10
    short = tokenizer("abcdvwxyz").input_ids
    assert task.encode(example, tokenizer, None) == short
    assert task.encode(example, tokenizer, 20) == short
    assert len(task.encode(example, tokenizer, 4)) == 4


def test_truncation_comes_before_the_chat_template(chat_tokenizer: Any, tmp_path: Path) -> None:
    """The other way round, the template's own tokens (who speaks, where the answer starts) would be cut out."""
    task, example = example_of(tmp_path, "qasper", "abcdefghijklmnopqrstuvwxyz")
    ids = task.encode(example, chat_tokenizer, 10)
    assert chat_tokenizer.decode(ids) == "<s>[user]abcdvwxyz[assistant]"
    assert ids.count(chat_tokenizer.bos_token_id) == 1, "the template wrote <s>; the tokenizer must not add another"


@pytest.mark.parametrize("dataset", sorted(SPECS))
def test_only_the_right_data_sets_get_the_chat_template(dataset: str, chat_tokenizer: Any, tmp_path: Path) -> None:
    task, example = example_of(tmp_path, dataset, "prompt")
    expected = "<s>[user]prompt[assistant]" if SPECS[dataset].chat else "<s>prompt"
    assert chat_tokenizer.decode(task.encode(example, chat_tokenizer, None)) == expected


def test_a_base_model_gets_the_plain_prompt(tokenizer: Any, tmp_path: Path) -> None:
    task, example = example_of(tmp_path, "qasper", "prompt")
    assert tokenizer.decode(task.encode(example, tokenizer, None)) == "<s>prompt"


def test_truncate_none_refuses_a_long_prompt(tokenizer: Any, tmp_path: Path) -> None:
    task, example = example_of(tmp_path, "qasper", "abcdefghijklmnopqrstuvwxyz")
    task.truncate = "none"
    assert len(task.encode(example, tokenizer, 27)) == 27
    with pytest.raises(InputError) as error:
        task.encode(example, tokenizer, 26)
    assert one_line(error) == (
        "task.truncate=none: qasper example id-0 has 27 prompt tokens and the limit is 26; use task.truncate=middle"
    )


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "predictions",
    [pytest.param("llama2-7b-chat-4k", marks=pytest.mark.slow), "minilongbench_example", "adversarial"],
)
def test_the_official_scores_are_reproduced(shared_data: Path, predictions: str) -> None:
    """21 data sets of real or hostile predictions against the official scorer's own output, sample by sample."""
    folder = shared_data / "longbench/predictions" / predictions
    expected = json.loads((folder / "expected_scores.json").read_text())
    per_sample: dict[str, Any] = {}
    if (folder / "expected_per_sample.json.gz").exists():
        per_sample = json.loads(gzip.decompress((folder / "expected_per_sample.json.gz").read_bytes()))
    assert set(expected) == set(SPECS)
    for dataset, figures in expected.items():
        with gzip.open(folder / f"{dataset}.jsonl.gz") as file:
            rows = [json.loads(line) for line in file]
        samples = per_sample.get(dataset, figures)
        if isinstance(samples, list):
            samples = {"per_sample": samples}
        for variant, figure, sample_key in (
            ("official", "official", "per_sample"),
            ("levenshtein", "official_with_python_Levenshtein", "per_sample_python_Levenshtein"),
        ):
            if figure not in figures:
                assert dataset not in ("lcc", "repobench-p")
                continue
            scores = [
                longbench_metrics.example_score(dataset, r["pred"], r["answers"], rows[-1]["all_classes"], variant)
                for r in rows
            ]
            assert longbench_metrics.dataset_score(scores) == figures[figure], (dataset, variant)
            if sample_key in samples:
                assert scores == pytest.approx(samples[sample_key], abs=1e-9), (dataset, variant)


def random_text(rng: random.Random) -> str:
    """Sentences over few words, so that many common subsequences are equally long: the tie-break shows."""
    words = [rng.choice(["a", "b", "c", "d", "", "x.y", ".", " "]) for _ in range(rng.randrange(0, 40))]
    return " ".join(words)


def test_rouge_equals_the_package() -> None:
    """The fast ROUGE-L against the package that the official scorer calls: same float, not nearly the same."""
    from rouge import Rouge

    rng = random.Random(0)
    compared = 0
    for _ in range(3000):
        prediction, answer = random_text(rng), random_text(rng)
        try:
            expected = Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
        except ValueError:
            expected = 0.0
        assert longbench_metrics.rouge(prediction, answer) == expected, (prediction, answer)
        compared += expected > 0
    assert compared > 1000


def call_at_depth(depth: int, *args: str) -> float:
    return call_at_depth(depth - 1, *args) if depth else longbench_metrics.rouge(*args)


def test_a_long_sentence_scores_as_in_the_official_process() -> None:
    """The package recurses once per step and the official code scores the overflow 0. Called from pytest or Hydra,
    some 100 frames deeper than the official script, it would overflow earlier and score 0 where the script does not."""
    fits = " ".join(f"w{i}" for i in range(990))
    assert longbench_metrics.rouge(fits, fits) > 0.99
    assert call_at_depth(300, fits, fits) == longbench_metrics.rouge(fits, fits)
    assert longbench_metrics.rouge(f"{fits} more", f"{fits} more") == 0.0
    assert longbench_metrics.rouge(f"{fits}. more", f"{fits}. more") > 0.99, "two sentences, each short enough"


OFFICIAL_CHAIN = """
import json, sys
from rouge import Rouge
def rouge_score(prediction, ground_truth, **kwargs):
    try:
        return Rouge().get_scores([prediction], [ground_truth], avg=True)["rouge-l"]["f"]
    except RecursionError:
        return 0.0
def rouge_zh_score(prediction, ground_truth, **kwargs):
    return rouge_score(prediction, ground_truth)
def scorer(metric, predictions, answers):
    total_score = 0.
    for (prediction, ground_truths) in zip(predictions, answers):
        score = 0.
        for ground_truth in ground_truths:
            score = max(score, metric(prediction, ground_truth, all_classes=None))
        total_score += score
    return total_score
if __name__ == "__main__":
    scores = []
    for metric, words in zip((rouge_score, rouge_score, rouge_zh_score, rouge_zh_score), json.loads(sys.argv[1])):
        text = " ".join(map(str, range(words)))
        scores.append(scorer(metric, [text], [[text]]))
    print(json.dumps(scores))
"""


@pytest.mark.slow
def test_the_recursion_limits_are_measured_not_guessed(tmp_path: Path) -> None:
    """The package called through as many functions as in the official eval.py: how long may a sentence be?"""
    (tmp_path / "eval.py").write_text(OFFICIAL_CHAIN)
    most, most_zh = longbench_metrics._MAX_STEPS, longbench_metrics._MAX_STEPS_ZH
    words = json.dumps([most, most + 1, most_zh, most_zh + 1])
    done = subprocess.run([sys.executable, str(tmp_path / "eval.py"), words], capture_output=True, text=True)
    assert [score > 0 for score in json.loads(done.stdout)] == [True, False, True, False], done.stderr


def test_classification_keeps_the_official_removal_bug() -> None:
    """ "Other" and "Other e" are both part of the answer; removing the first makes the loop step over the second."""
    classes = ["Other", "Other e", "Other entity"]
    assert longbench_metrics.classification("Other entity", "Other entity", classes) == 0.5
    assert longbench_metrics.classification("Other entity", "Other entity", ["Other", "Food", "Other entity"]) == 1.0
    assert longbench_metrics.classification("Food", "Other entity", classes) == 0.0


def test_the_two_code_similarities_differ() -> None:
    prediction, answer = "self.weight = nn.Parameter(weight)", "weight = self.weight.t()"
    official = longbench_metrics.code_sim(prediction, answer)
    other = longbench_metrics.code_sim(prediction, answer, "levenshtein")
    assert official != other
    assert longbench_metrics.code_sim("", "") == 1.0
    assert longbench_metrics.code_sim("", "x") == 0.0
    assert longbench_metrics.code_sim("```python\n# comment\n// c\nx = 1\ny = 2", "x = 1") == 1.0
    assert longbench_metrics.code_sim("   \nx = 1", "x = 1") < 1.0, "a line of blanks is the first line"


def test_the_task_scores_with_the_rows_own_classes_and_its_code_sim(tmp_path: Path) -> None:
    write(tmp_path, "trec", [row("trec", answers=["Food"])])
    write(tmp_path, "lcc", [row("lcc", answers=["weight = self.weight.t()"])])
    write(tmp_path, "qasper", [row(answers=["no", "the yes"])])
    task = LongBench(data_dir=str(tmp_path), code_sim="levenshtein")
    qasper, trec, lcc = task.examples()
    assert task.score(qasper, "Yes.") == 1.0, "best of the answers"
    assert task.score(trec, "\n\nFood\nOther") == 1.0, "first line only"
    assert task.score(trec, "Food Other") == 0.5
    assert task.score(lcc, "self.weight = nn.Parameter(weight)") == longbench_metrics.code_sim(
        "self.weight = nn.Parameter(weight)", "weight = self.weight.t()", "levenshtein"
    )
    assert task.group(qasper) == "qasper", "scores are averaged inside a data set"


# --- configuration and import -----------------------------------------------------------------------------------------


def test_the_yaml_has_every_key_and_explains_it() -> None:
    """The help text is made from the comments."""
    lines = YAML.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# LongBench")
    assert all("  # " in line for line in lines[2:] if not line.startswith("#"))
    config = OmegaConf.to_container(OmegaConf.load(YAML))
    assert isinstance(config, dict)
    assert config.pop("_target_") == "kvbench.tasks.longbench.LongBench"
    assert LongBench(**config) == LongBench(), "the YAML's defaults are the class's"
    assert set(config) == {
        "datasets", "e", "limit", "data_dir", "source", "max_length", "truncate", "code_sim", "no_context"
    }  # fmt: skip


def test_the_task_imports_nothing_heavy() -> None:
    """`kvbench --help` and the scorer run on a laptop without torch, and at once."""
    code = (
        "import sys, kvbench.tasks.longbench\n"
        "heavy = {'torch', 'transformers', 'numpy', 'jieba', 'rouge', 'rapidfuzz', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_average_that_papers_report_is_over_the_16_sets_without_chinese() -> None:
    task = LongBench(datasets=["qasper"])
    every = [spec.name for spec in SPECS.values()]
    ((_, over),) = task.averages(every).items()
    assert len(over) == 16
    assert not [name for name in over if name.endswith("_zh") or name in ("dureader", "vcsum", "lsht")]
    assert task.averages(over) == {}, "it is the mean already"
    assert task.averages(every[:5]) == {}, "a part of the sets has no such average"
