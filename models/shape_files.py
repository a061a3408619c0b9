"""Published shapes of models: a file of each, which is the ``config.json`` of the model that it is named after.

``tiny`` is for tests: the structure of the large ones at a size that runs in milliseconds. ``kvbench kv-size`` reads
the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable

SHAPE_FILES: Mapping[str, Traversable] = {
    file.name.removesuffix(".json"): file
    for file in (resources.files("kvbench.models") / "shapes").iterdir()
    if file.name.endswith(".json")
}
