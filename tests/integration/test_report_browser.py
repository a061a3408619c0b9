"""The HTML report in headless Chromium: no error, filters, sorting, hover, click to the run, and text that stays text.

Skipped where playwright or a Chromium is missing: `pip install playwright` and Debian's `chromium` are enough.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
from records import accuracy, efficiency, save, save_samples, with_samples

from kvbench.analysis.load import Run
from kvbench.analysis.report.cli import main
from kvbench.analysis.report.data import report_data
from kvbench.analysis.report.page import page as html

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EVIL = "<b>b</b></script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER)
        yield found
        found.close()


@pytest.fixture
def view(browser):
    """A function that opens a page at a view; whatever the page complains of fails the test."""
    complaints: list[str] = []
    tab = browser.new_page(viewport={"width": 1360, "height": 900})
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: complaints.append(request.url) if request.url[:4] == "http" else None)

    def opened(path: Path, address: str = ""):
        tab.goto(f"{path.as_uri()}#{address}")
        return tab

    yield opened
    tab.close()
    assert complaints == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Six scored and two timed runs, one of a method whose name and predictions are scripts."""
    folder = tmp_path_factory.mktemp("small")
    scores = {
        "full": (0.5, 0.9, 0.2),
        "snapkv 512": (0.5, 0.1, 0.8),
        "snapkv 64": (0.4, 0.1, 0.7),
        "random 64": (0, 0.1, 0.3),
    }
    records, samples = [], []
    for label, of_examples in scores.items():
        method, _, budget = label.partition(" ")
        text = EVIL if method == "random" else f"reply of {label}"
        rows = [
            {"dataset": "lcc", "id": f"e{i}", "prediction": f"{text} {i}", "score": score, "prompt_tokens": 100 + i}
            for i, score in enumerate(of_examples)
        ]
        record = accuracy(method, int(budget) if budget else None, 20.0)
        record["method_label"] = EVIL if method == "random" else label
        records.append(with_samples(record, rows))
        samples.append(rows)
    others = [accuracy("full", None, 60.0, "other"), accuracy("h2o", 64, 30.0, "other")]
    save(folder, *records, *others, efficiency("full", None, 10.0), efficiency("snapkv", 512, 5.0))
    for record, rows in zip(records, samples, strict=True):
        save_samples(folder, record, rows)
    assert main([str(folder), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


def run_id(tab, label: str) -> str:
    """The hash of a run by its label, in the first group that has it."""
    runs = json.loads(tab.locator("#report-data").text_content())["runs"]
    return next(run["id"] for run in runs if run["label"] == label and run.get("examples"))


def show_run(tab, label: str) -> None:
    tab.evaluate("address => { location.hash = address; }", f"view=run&run={run_id(tab, label)}")
    tab.wait_for_selector(".example")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "report.html"
    assert main([str(ROOT / "results" / "reference"), "-o", str(path)]) == 0
    return path


def column(tab, table: str, number: int) -> list[str]:
    return tab.locator(f'table[data-table="{table}"] tbody tr td:nth-child({number})').all_inner_texts()


def head(tab, table: str, name: str):
    return tab.locator(f'table[data-table="{table}"] th button', has_text=name).first


def test_every_view_of_the_committed_records_opens_without_an_error(view, reference):
    tab = view(reference)
    names = tab.locator("nav button").evaluate_all("nodes => nodes.map(node => node.dataset.view)")
    assert names == ["quality", "speed", "needle", "training", "all", "run", "provenance"]
    for name in names:
        tab.click(f'nav button[data-view="{name}"]')
        tab.wait_for_function("() => [...document.querySelectorAll('.chart')].every(c => 'ready' in c.dataset)")
        assert tab.locator("main").inner_text()
    runs = json.loads(tab.locator("#report-data").text_content())["runs"]
    kinds = {run["group"]: run for run in runs}
    for run in kinds.values():  # one run of each group
        tab.evaluate("address => { location.hash = address; }", f"view=run&run={run['id']}")
        tab.wait_for_selector(f"h2 >> text={run['label']}")
        if run.get("examples"):
            tab.wait_for_selector(".example")


def test_columns_sort_both_ways_with_missing_values_last(view, small):
    tab = view(small, "view=all")
    head(tab, "all", "score").click()
    assert column(tab, "all", 6) == ["60.00", "53.33", "46.67", "40.00", "30.00", "13.33", "–", "–"]
    head(tab, "all", "score").click()
    assert column(tab, "all", 6) == ["13.33", "30.00", "40.00", "46.67", "53.33", "60.00", "–", "–"]
    assert tab.locator("th[aria-sort=ascending]").inner_text() == "score"
    head(tab, "all", "model").click()  # of words: ascending first
    assert tab.locator("th[aria-sort=ascending]").inner_text() == "model"


def test_filters_narrow_every_view_and_can_be_undone(view, small):
    tab = view(small, "view=all")
    tab.click('details[data-filter="method"] summary')
    assert tab.locator('details[data-filter="method"] label').all_inner_texts() == [
        "full\n3",
        "h2o\n1",
        "random\n1",
        "snapkv\n3",
    ]
    tab.check('details[data-filter="method"] input[value="snapkv"]')
    assert tab.locator("#shown").inner_text() == "3 of 8 runs"
    tab.click('details[data-filter="budget"] summary')
    tab.check('details[data-filter="budget"] input[value="64"]')
    assert column(tab, "all", 1) == ["snapkv 64"]
    tab.click('nav button[data-view="speed"]')
    assert "leave no timed run" in tab.locator("main").inner_text()
    tab.go_back()  # the address is the state
    assert column(tab, "all", 1) == ["snapkv 64"]
    tab.click("#reset")
    assert tab.locator("#shown").inner_text() == "8 of 8 runs"
    tab.fill(".bar input[type=search]", "OTHER h2o")
    tab.wait_for_selector("#shown >> text=1 of 8 runs")


def test_a_point_says_what_it_is_and_opens_its_run(view, small):
    tab = view(small, "view=quality")
    tab.wait_for_selector(".chart[data-ready]")
    buttons = tab.locator(".modebar-btn").evaluate_all("nodes => nodes.map(node => node.dataset.title)")
    assert buttons == ["Download plot", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"]  # no upload
    assert tab.locator("#choose-group option").all_inner_texts()[0].startswith("longbench, m, ")
    wanted = run_id(tab, "snapkv 512")
    where = """wanted => {
        const chart = document.querySelector('.chart');
        const trace = chart._fullData.find(one => one.customdata && one.customdata.includes(wanted));
        const i = trace.customdata.indexOf(wanted);
        const {left, top} = chart.getBoundingClientRect();
        const {xaxis, yaxis} = chart._fullLayout;
        return [left + xaxis._offset + xaxis.d2p(trace.x[i]), top + yaxis._offset + yaxis.d2p(trace.y[i])];
    }"""
    x, y = tab.evaluate(where, wanted)
    tab.mouse.move(x, y)
    tab.wait_for_selector("#hover:not([hidden])")
    lines = tab.locator("#hover").inner_text().splitlines()
    assert lines[:2] == ["snapkv 512", "longbench, m"] and "n = 3" in lines[2] and "46.67 [45.67, 47.67]" in lines[2]
    assert lines[3] == "vs full: −2.00 [−3.00, −1.00]"
    tab.mouse.click(x, y)
    tab.wait_for_selector("h2 >> text=snapkv 512")
    assert f"run={wanted}" in tab.url


def test_worst_losses_come_first_beside_the_full_cache(view, small):
    tab = view(small)
    show_run(tab, "snapkv 512")
    ids = ".example > div:first-child > span:nth-of-type(1)"
    assert tab.locator(ids).all_inner_texts() == ["e1", "e0", "e2"]
    assert tab.locator(".example").first.locator("pre").all_inner_texts() == [
        "reply of snapkv 512 1",
        "reply of full 1",
    ]
    assert "1 have a worse score than with full, 1 a better one, 1 the same" in tab.locator("main").inner_text()
    assert "Mean difference over the data sets: −6.67" in tab.locator("main").inner_text()  # (0 - 80 + 60) / 3
    tab.select_option("#example-order", "gains")
    assert tab.locator(ids).all_inner_texts() == ["e2", "e0", "e1"]
    tab.select_option("#choose-against", run_id(tab, "snapkv 64"))
    tab.wait_for_function("() => document.querySelectorAll('.pair strong')[1].textContent === 'snapkv 64'")


def test_a_script_in_a_label_or_a_prediction_stays_text(view, small):
    tab = view(small, "view=quality")
    tab.wait_for_selector(".chart[data-ready]")
    assert EVIL in column(tab, "quality", 1)
    assert tab.locator(".legend text", has_text="<b>b</b></script>").count() == 1  # the figure shows tags as text
    show_run(tab, EVIL)
    assert tab.locator(".example pre").first.inner_text().startswith(EVIL)
    assert tab.title() == "kvbench report" and tab.locator("img").count() == 0


def test_downloads_hold_the_runs_that_are_shown(view, small):
    tab = view(small, "view=all&method=snapkv")
    with tab.expect_download() as caught:
        tab.click("#runs-csv")
    rows = list(csv.DictReader(io.StringIO(Path(caught.value.path()).read_text())))
    assert [row["label"] for row in rows if row["kind"] == "accuracy"] == ["snapkv 64", "snapkv 512"]
    assert [float(row["percent mean"]) for row in rows[:2]] == [40.0, pytest.approx(46.66667)]
    with tab.expect_download() as caught:
        tab.click("#runs-json")
    assert len(json.loads(Path(caught.value.path()).read_text())) == 3
    show_run(tab, "snapkv 512")
    with tab.expect_download() as caught:
        tab.click("#examples-csv")
    assert len(Path(caught.value.path()).read_text().splitlines()) == 4


def test_five_thousand_runs_are_usable(view, tmp_path):
    runs = []
    for model, task, method, budget in itertools.product(range(5), range(10), range(20), range(5)):
        record = accuracy(f"method-{method}", 2 ** (5 + budget), 20.0 + budget + method / 10, f"task-{task}")
        record["model"] = record["identity"]["model"]["name"] = f"model-{model}"
        record["hash"] = f"{model}-{task}-{method}-{budget}"
        runs.append(Run(tmp_path / record["hash"], record, record["method_label"]))
    path = tmp_path / "report.html"
    path.write_text(html(report_data(runs, [], [tmp_path], "1.0")), encoding="utf-8")
    assert path.stat().st_size < 10e6
    tab = view(path, "view=all")
    assert tab.locator("#shown").inner_text() == "5000 of 5000 runs"
    assert len(column(tab, "all", 1)) == 50 and "1 to 50 of 5000" in tab.locator("main").inner_text()
    seconds = tab.evaluate("""async () => {
        const start = performance.now();
        for (const hash of ['view=all&task=task-3', 'view=all&q=method-7', 'view=quality&model=model-2', 'view=all']) {
            location.hash = hash;
            await new Promise(done => setTimeout(done));
            await new Promise(requestAnimationFrame);
        }
        return (performance.now() - start) / 1000;
    }""")
    assert seconds < 8, f"four views of 5,000 runs took {seconds:.1f} s"
    head(tab, "all", "score").click()
    assert column(tab, "all", 6)[0] == "25.90"
    tab.click("text=next")
    assert "51 to 100 of 5000" in tab.locator("main").inner_text()
