"""The HTML report: what is in the page, that no text of a record can become HTML, and that damaged input is named."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from records import accuracy, efficiency, save, save_samples, with_samples

from kvbench.analysis.load import load
from kvbench.analysis.report.cli import main
from kvbench.analysis.report.data import report_data
from kvbench.analysis.report.page import SCRIPTS, json_text, page

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "analysis" / "report"
EVIL = "</script><script>document.title = 'owned'</script><!--<img src=x onerror=alert(1)>\u2028&amp;"


class Blocks(HTMLParser):
    """The scripts of a page by their id, as a browser would split them, and every other tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict, str]] = []
        self.tags: list[str] = []
        self.policy = ""
        self._open: dict | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.policy = found.get("content", "") if "Policy" in (found.get("http-equiv") or "") else self.policy
        if tag == "script":
            self._open = found
            self.scripts.append((found, ""))

    def handle_endtag(self, tag):
        self._open = None if tag == "script" else self._open

    def handle_data(self, data):
        if self._open is not None:
            self.scripts[-1] = (self._open, self.scripts[-1][1] + data)

    def block(self, name):
        (found,) = (text for attributes, text in self.scripts if attributes.get("id") == name)
        return found

    @property
    def meta(self):
        return json.loads(self.block("report-data"))

    def examples(self, group=0):
        return json.loads(zlib.decompress(base64.b64decode(self.block(f"examples-{group}"))))


def made(folder: Path, *options: str) -> Blocks:
    assert main([str(folder), "-o", str(folder / "out" / "report.html"), *options]) == 0
    return Blocks((folder / "out" / "report.html").read_text(encoding="utf-8"))


def sample(data_set: str, name: str, prediction, score: float, **more) -> dict:
    return {"dataset": data_set, "id": name, "prediction": prediction, "score": score, "prompt_tokens": 9} | more


@pytest.fixture
def results(tmp_path):
    of_full = [sample("lcc", "a", "yes", 1.0), sample("qasper", "b", "no", 0.5)]
    of_method = [sample("lcc", "a", "yes", 1.0), sample("qasper", "b", EVIL, 0.0)]
    full = with_samples(accuracy("full", None, 22.0), of_full)
    method = with_samples(accuracy("snapkv", 512, 20.0), of_method)
    save(tmp_path, full, method, efficiency("full", None, 10.0), efficiency("snapkv", 512, 5.0))
    save_samples(tmp_path, full, of_full)
    save_samples(tmp_path, method, of_method)
    return tmp_path


def test_the_page_holds_the_numbers_of_every_run(results):
    meta = made(results).meta
    runs = {(meta["groups"][run["group"]]["kind"], run["label"]): run for run in meta["runs"]}
    assert len(meta["runs"]) == 4 and len(meta["groups"]) == 2
    snapkv = runs["accuracy", "snapkv 512"]
    assert snapkv["score"] == [50.0, 49.0, 51.0, 2] and snapkv["difference"] == [-2.0, -3.0, -1.0, 20]
    assert snapkv["test"] == [1.0, 0, 1, 1]  # p, won, tied, lost: one difference cannot be significant
    assert meta["groups"][snapkv["group"]]["sets"] == ["lcc", "qasper"]
    assert [found[0] for found in snapkv["sets"]] == [100.0, 0.0]
    assert snapkv["bytes"]["kv_ratio"] == 0.125 and snapkv["budget"] == 512 and not snapkv["full"]
    timed = runs["efficiency", "snapkv 512"]
    assert (
        timed["times"]["tpot_ms"] == [5.0, 4.5, 5.5] and timed["speed_up"] == 1.5 and timed["mbu"] == [0.5, 0.45, 0.55]
    )
    assert runs["accuracy", "full"]["full"] and runs["accuracy", "full"]["difference"] is None
    assert snapkv["identity"] == timed["identity"] != runs["accuracy", "full"]["identity"]  # quality meets speed by it
    assert set(meta["looks"]) == {"full", "snapkv"}


def test_examples_are_paired_and_each_text_is_kept_once(results):
    found = made(results)
    chunk = found.examples()
    assert chunk["examples"] == [["lcc", "a", 9], ["qasper", "b", 9]]
    assert chunk["texts"] == ["yes", "no", EVIL]
    full, snapkv = (chunk["runs"][run["id"]] for run in found.meta["runs"] if run.get("examples"))
    assert full == [[100.0, 50.0], [0, 1], [None, None]]
    assert snapkv == [[100.0, 0.0], [0, 2], [None, None]]


def test_a_prediction_or_a_label_that_is_a_script_stays_text(results):
    record = accuracy("evil", 64, 19.0)
    record["method_label"] = label = EVIL.replace("\u2028", "")  # a label is one line
    save(results, record)
    found = made(results)
    kinds = [attributes.get("type") for attributes, _ in found.scripts]
    assert kinds == ["application/json", "text/plain", None, None]  # data, one group's examples, the library, the page
    assert not {"img", "a", "iframe"} & set(found.tags)
    assert label in [run["label"] for run in found.meta["runs"]]
    raw = found.block("report-data")
    assert raw.isascii() and not set("<>&") & set(raw)


@pytest.mark.parametrize("value", [EVIL, "\ud800 alone", "\x00\x1f", "中文", {"a": ["<", 1.5, None, True]}])
def test_json_comes_back_as_it_was(value):
    text = json_text(value)
    assert json.loads(text) == value and text.isascii() and "<" not in text


def test_only_the_two_scripts_of_the_page_may_run(results):
    found = made(results)
    rules = dict(rule.split(" ", 1) for rule in found.policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == "'none'" and rules["form-action"] == "'none'"
    scripts = [text for attributes, text in found.scripts if "type" not in attributes]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert rules["script-src"] == " ".join(f"'sha256-{one}'" for one in hashes)
    assert "unsafe" not in rules["script-src"] and not re.search(r"https?:", found.policy)


def test_the_scripts_never_parse_html():
    for name in SCRIPTS:
        source = (PACKAGE / name).read_text(encoding="utf-8")
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function", source
        )
        assert not found, f"{name}: {found}"
        assert "fetch(" not in source and "XMLHttpRequest" not in source and "</script" not in source


def test_the_library_is_the_one_that_is_named():
    library = PACKAGE / "vendor" / "plotly-cartesian.min.js"
    readme = (PACKAGE / "vendor" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(library.read_bytes()).hexdigest() in readme
    assert "MIT" in (PACKAGE / "vendor" / "LICENSE").read_text(encoding="utf-8")
    assert not {"</script", "<!--"} & set(re.findall(r"</script|<!--", library.read_text(encoding="utf-8")))


def test_the_same_records_give_the_same_page(results):
    runs, problems = load(results)
    pages = [page(report_data(runs, problems, [results], "1.0")) for _ in range(2)]
    assert pages[0] == pages[1]


def test_predictions_can_be_left_out(results):
    chunk = made(results, "--no-predictions").examples()
    assert chunk["texts"] == [] and all(set(columns[1]) == {-1} for columns in chunk["runs"].values())
    assert [columns[0] for columns in chunk["runs"].values()] == [[100.0, 50.0], [100.0, 0.0]]


def test_groups_of_one_title_name_what_differs(tmp_path):
    short, long = accuracy("full", None, 22.0), accuracy("full", None, 23.0)
    for record, length in ((short, 4000), (long, None)):
        record["identity"]["task"] = record["identity"]["task"] | {"max_length": length}
    settings = sorted(group["setting"] for group in made(save(tmp_path, short, long)).meta["groups"])
    assert ["max_length 4000" in settings[0], "max_length null" in settings[1]] == [True, True]


def test_runs_are_chosen_as_for_tables(results, capsys):
    meta = made(results, "--methods", "snapkv").meta
    assert {run["method"] for run in meta["runs"]} == {"snapkv"}
    assert main([str(results), "-o", str(results / "x.html"), "--methods", "snapvk"]) == 2
    assert "--methods=snapvk" in capsys.readouterr().err


def test_a_needle_map_is_the_mean_of_its_cells(tmp_path):
    record = accuracy("full", None, 50.0, "needle")
    record["identity"]["task"] = {"class": "Needle", "limit": None}
    rows = [sample("needle-2048", f"depth-0.500-{i}", "x", score) for i, score in enumerate((1.0, 0.0))]
    rows.append(sample("needle-1024", "depth-0.000-0", "x", 1.0))
    save_samples(save(tmp_path, with_samples(record, rows)), record, rows)
    meta = made(tmp_path).meta
    assert meta["groups"][0]["depths"] == [0.0, 0.5] and meta["groups"][0]["lengths"] == [1024, 2048]
    assert meta["runs"][0]["map"] == [[0.0, 1024, 100.0, 1], [0.5, 2048, 50.0, 2]]


@pytest.mark.parametrize(("unit", "counts"), [({}, [6, 1, 0]), ({"unit": "nats per token"}, [0, 1, 6])])
def test_p_values_are_adjusted_over_the_group_and_fewer_nats_win(tmp_path, unit, counts):
    """Six of seven differences of one sign: p = 2 / 2^6; Holm doubles the smaller of two."""

    def rows(shift, sign=1):
        return [sample("lcc", f"{i}", "x", (i + (shift if i else 0) * (sign if i % 2 else 1)) / 8) for i in range(7)]

    made_of = {("full", None): rows(0), ("snapkv", 64): rows(1), ("h2o", 64): rows(1, -1)}
    for (method, budget), of_method in made_of.items():
        record = with_samples(accuracy(method, budget, 1.0) | unit, of_method)
        save_samples(save(tmp_path, record), record, of_method)
    tests = {run["method"]: run.get("test") for run in made(tmp_path).meta["runs"]}
    assert tests["full"] is None
    assert tests["snapkv"] == [0.0625, *counts] and tests["h2o"][0] == 1.0


def test_losses_are_shown_as_perplexity_and_kept_as_nats(tmp_path):
    rows = [sample("lcc", "a", [1.5, 2.5], 2.0)]
    record = with_samples(accuracy("full", None, 2.0) | {"unit": "nats per token"}, rows)
    save_samples(save(tmp_path, record), record, rows)
    found = made(tmp_path)
    assert found.meta["groups"][0]["fewer"] and found.meta["groups"][0]["unit"] == "perplexity"
    assert found.meta["runs"][0]["score"][0] == pytest.approx(math.exp(2.0), rel=1e-6)
    assert found.examples()["runs"][record["hash"]][0] == [2.0] and found.examples()["texts"] == ["[1.5, 2.5]"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), "is missing; the run is shown"),
        (lambda path: path.write_text('{"dataset": "lcc", "id"'), "line 1 is no row of an example"),
        (lambda path: path.write_text(path.read_text() * 2), "line 3 repeats the example lcc/a"),
    ],
)
def test_damaged_examples_are_named_and_the_rest_is_shown(results, capsys, damage, told):
    path = next(path for path in results.rglob("samples.jsonl") if "snapkv" in str(path))
    damage(path)
    meta = made(results).meta
    assert [run["label"] for run in meta["runs"] if run.get("examples")] == ["full"] and len(meta["runs"]) == 4
    assert told in " ".join(meta["problems"]) and told in capsys.readouterr().err


def test_a_damaged_record_is_named_and_the_rest_is_shown(results, capsys):
    next(path for path in results.rglob("record.json") if "full" in str(path)).write_text("[]")
    meta = made(results).meta
    assert len(meta["runs"]) == 3 and "schema None" in meta["problems"][0] and "schema None" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "12"])
def test_what_is_no_number_is_shown_as_none(tmp_path, value):
    runs, _ = load(save(tmp_path, accuracy("snapkv", 512, 20.0)))
    runs[0].record["average"]["mean"] = value
    runs[0].record["bytes"]["kv_ratio"] = value
    (run,) = report_data(runs, [], [tmp_path], "1.0").meta["runs"]
    assert run["score"] is None and "kv_ratio" not in run["bytes"]


def test_what_cannot_be_written_or_read_is_one_line(tmp_path, capsys):
    save(tmp_path / "good", accuracy("full", None, 20.0))
    assert main([str(tmp_path / "good"), "-o", str(tmp_path / "report.pdf")]) == 2
    assert capsys.readouterr().err.endswith("report.pdf: must be a file ending in .html\n")
    assert main([str(tmp_path / "none"), "-o", str(tmp_path / "r.html")]) == 2
    save(tmp_path / "bad", accuracy("full", None, 20.0) | {"schema": 99})
    assert main([str(tmp_path / "bad"), "-o", str(tmp_path / "r.html")]) == 2
    assert "holds no record that can be read" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_the_page_of_the_committed_records_stays_small(tmp_path):
    output = tmp_path / "report.html"
    assert main([str(ROOT / "results" / "reference"), "-o", str(output)]) == 0
    assert output.stat().st_size < 10e6
    found = Blocks(output.read_text(encoding="utf-8"))
    hashes = {path.parent.name for path in (ROOT / "results" / "reference").rglob("record.json")}
    assert {run["id"] for run in found.meta["runs"]} == hashes
    assert all("is the same run as" in problem for problem in found.meta["problems"])
    titles = [tuple(group[key] for key in ("kind", "task", "model", "setting")) for group in found.meta["groups"]]
    assert len(set(titles)) == len(titles)
