"""Fetch, verify and convert the default model, and print its folder. Does nothing if the model is cached.

    python scripts/fetch_model.py

``KVBENCH_CACHE`` moves the cache. Exit status 2 and one line on stderr if the model cannot be fetched.
"""

import logging
import sys

from kvbench.conf.errors import InputError
from kvbench.models.embedded import Embedded


def main() -> int:
    """Fetch the model, and return the exit status."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("kvbench").setLevel(logging.INFO)
    model = Embedded()
    try:
        print(f"{model.name}: {model.fetch()}\n  weights: {model.fingerprint()}")
    except InputError as error:
        print(f"kvbench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
