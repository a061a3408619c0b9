"""Which models work: every decoder of transformers' causal-LM mapping, as a tiny random model against transformers.

    python scripts/models_page.py NAME...    # what came of these, path by path
    python scripts/models_page.py            # the page
    python scripts/models_page.py --write    # the page, into docs/reference/models.md

It takes some minutes on one core. tests/integration/test_architectures.py compares the page with the installed
transformers.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from kvbench.models.architecture_settings import LAYERS, WINDOW
from kvbench.models.architectures import model_types, variants
from kvbench.runners.engine.conformance import (
    EXACT,
    PATHS,
    PROMPT,
    REFUSED,
    ROW_LENGTHS,
    STEPS,
    TOLERANCE,
    TRACEBACK,
    UNTESTED,
    WRONG,
    Form,
    run_form,
    verdict_of,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "models.md"
HEAD = f"""# Models

Written by `python scripts/models_page.py --write` with {{versions}}; not to be edited by hand.

Every decoder of transformers' causal-LM mapping, as a random model of {LAYERS} layers whose weights make peaked
attention, against its own eager attention with its own cache, both in float64: a prompt of {PROMPT} tokens and {STEPS}
further ones. Paths: {", ".join(f"`{path}`" for path in PATHS)} (`batch`: rows of {", ".join(map(str, ROW_LENGTHS))}
tokens, each as it is alone; `feed`: the further tokens together; `snapkv` and `kivi8`: with nothing lost). Windows are
{WINDOW} tokens; further forms of an architecture (windows passed while decoding, kinds of RoPE, ...) are run as well.

* **exact**: every logit of every path is within {TOLERANCE:g} of the largest. "2 of 4 layers": the method works on the
  layers with full attention; windows, chunks and recurrent states are kept as the model needs them.
* **refused**: one line when the cache is made, and no result.
* **untested**: transformers itself cannot run it here, for the reason given.
* **WRONG** (logits differ and nothing is said) and **traceback** do not occur.
"""


def versions() -> str:
    """What the page was made with."""
    return f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"


def read(path: Path) -> tuple[str, dict[str, str]]:
    """(versions, verdict of each model type) of a page, in the order of the mapping."""
    if not path.exists():
        return "nothing", {}
    text = path.read_text()
    found = re.search(r"--write` with (.*?); not", text)
    assert found is not None, f"{path} does not say which versions it was made with"
    verdicts = dict(re.findall(r"^\| `([^`]+)` \| (\w+)", text, re.MULTILINE))
    return found[1], {name: verdicts[name] for name in model_types() if name in verdicts}


def run(name: str) -> list[Form]:
    """All forms of an architecture."""
    try:
        return [run_form(name, variant) for variant in variants(name)]
    except Exception as error:  # its module cannot be imported
        return [Form("", {}, f"{type(error).__name__}: {error}")]


def reason(detail: str) -> str:
    """A refusal without the key and the value it begins with, for a table."""
    return re.sub(r"^[\w.]+=\S+: ", "", detail).replace("|", "\\|")


def remarks(forms: Sequence[Form]) -> str:
    """What the verdict of the first form does not say: paths and forms that are not like it."""
    first, out = forms[0], []
    for form in forms:
        groups: dict[tuple[str, str], list[str]] = {}
        for path, outcome in form.outcomes.items():
            if outcome.verdict not in (EXACT, first.verdict):
                groups.setdefault((outcome.verdict, reason(outcome.detail)), []).append(path)
        for (verdict, detail), paths in groups.items():
            where = "all paths" if len(paths) == len(form.outcomes) else ", ".join(f"`{path}`" for path in paths)
            out.append(f"{form.variant + ': ' if form.variant else ''}{where} {verdict}: {detail}")
        if form.failure and form is not first:
            out.append(f"{form.variant}: untested: {form.failure}")
    return "<br>".join(out)


def layers(form: Form) -> str:
    """On how many of the layers that hold something a method works."""
    holding = sum(n for kind, n in form.layers.items() if kind != "shared")
    full = form.layers.get("full", 0) + form.layers.get("both", 0)
    return f"{full} of {holding}" if full < holding else "all"


def render(results: dict[str, list[Form]]) -> str:
    """The page."""
    verdicts = {name: verdict_of(forms) for name, forms in results.items()}
    lines = [
        HEAD.format(versions=versions()),
        "| `model_type` | verdict | layers | what it has | remarks |",
        "|---|---|---|---|---|",
    ]
    for name, forms in results.items():
        if verdicts[name] in (EXACT, WRONG, TRACEBACK):
            first = forms[0]
            lines.append(
                f"| `{name}` | {verdicts[name]} | {layers(first)} | {', '.join(first.features)} | {remarks(forms)} |"
            )
    for verdict, title in ((REFUSED, "Refused"), (UNTESTED, "Untested")):
        lines += ["", f"## {title}", "", "| `model_type` | verdict | reason |", "|---|---|---|"]
        for name, forms in results.items():
            if verdicts[name] == verdict:
                why = forms[0].failure or next(o.detail for o in forms[0].outcomes.values() if o.verdict == REFUSED)
                lines.append(f"| `{name}` | {verdict} | {reason(why)} |")
    counts = Counter(verdicts.values())
    numbers = [f"{title} {counts[v]}" for v, title in ((EXACT, "exact"), (REFUSED, "refused"), (UNTESTED, "untested"))]
    numbers += [f"wrong silently {counts[WRONG]}", f"tracebacks {counts[TRACEBACK]}"]
    forms_run = sum(len(forms) for forms in results.values())
    lines += ["", "## Numbers", "", f"{len(results)} model types in {forms_run} forms: {', '.join(numbers)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the architectures, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; all where none is named")
    parser.add_argument("--write", action="store_true", help="write docs/reference/models.md")
    args = parser.parse_args()
    unknown = set(args.names) - set(model_types())
    if unknown or (args.write and args.names):
        parser.error(f"not in transformers' mapping: {', '.join(unknown)}" if unknown else "--write takes no names")
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results = {}
    for name in args.names or model_types():
        results[name] = run(name)
        print(f"{name}: {verdict_of(results[name])}", file=sys.stderr, flush=True)
    if args.names:
        for name, forms in results.items():
            for form in forms:
                print(f"{name} [{form.variant}] {form.verdict} {form.failure}")
                for path, outcome in form.outcomes.items():
                    print(f"    {path}: {outcome.verdict} {outcome.difference:.0e} {outcome.detail}")
    elif args.write:
        PAGE.write_text(render(results))
    else:
        print(render(results), end="")


if __name__ == "__main__":
    main()
