"""The HTML of the report: fixed markup, scripts and style, and the data as JSON blocks that are never parsed as HTML.

A strict Content-Security-Policy lets run exactly the two scripts of this package (by their sha256), and lets the page
load nothing from anywhere. The scripts put texts into the page as text nodes only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from .data import ReportData

SCRIPTS = ("core.js", "filters.js", "table.js", "charts.js", "examples.js", "views.js", "main.js")
"""Parts of the page's own script, in this order; they share one scope."""

LIBRARY = "vendor/plotly-cartesian.min.js"

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>kvbench report</title>
<style>{style}</style>
</head>
<body>
<noscript>This page needs JavaScript: all that it shows is in it, and nothing is loaded.</noscript>
{blocks}
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def page(data: ReportData) -> str:
    """The whole page as one text."""
    library, style = _part(LIBRARY), _part("style.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_part(name) for name in SCRIPTS) + "})();\n"
    blocks = [_block("report-data", "application/json", json_text(data.meta))]
    blocks += [_block(f"examples-{group}", "text/plain", packed) for group, packed in data.chunks.items()]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_source(library)} {_source(script)}",
            "style-src 'unsafe-inline'",  # Plotly positions its parts with style attributes
            "img-src data: blob:",  # a figure saved as a picture
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return PAGE.format(policy=policy, style=style, blocks="\n".join(blocks), library=library, script=script)


def json_text(value: Any) -> str:
    """JSON in ASCII in which no HTML parser finds a tag, an entity or a comment, nor JavaScript an end of line."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _block(name: str, kind: str, text: str) -> str:
    return f'<script type="{kind}" id="{name}">{text}</script>'


def _source(script: str) -> str:
    """A script as a source of a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _part(name: str) -> str:
    return (files("kvbench.analysis") / "report" / name).read_text(encoding="utf-8")
