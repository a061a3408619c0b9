"""What a method's YAML says about itself for the test suites."""

from __future__ import annotations

import re
from importlib.resources import files


def own_settings(name: str) -> dict[str, str]:
    """A method's settings in the suites, from the line ``# contract tests: key=value ...`` of its YAML.

    Budgets there are 40 of prompts of 13 to 70 tokens, which a method's defaults may not allow.
    """
    text = files("kvbench.conf").joinpath("method", f"{name}.yaml").read_text()
    found = re.search(r"^# contract tests: (.*)$", text, re.MULTILINE)
    return {} if found is None else dict(setting.split("=") for setting in found[1].split())
