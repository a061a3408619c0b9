"""Fetch, verify and convert the default model, and print where it is. Does nothing when it is there already.

    python scripts/fetch_model.py

``KVBENCH_CACHE`` moves the cache. Exit status 2 and one line on stderr when the model cannot be had.
"""

import sys

from kvbench.conf.errors import InputError
from kvbench.models.embedded import Embedded


def main() -> int:
    model = Embedded()
    try:
        print(f"{model.name}: {model.fetch()}\n  weights: {model.fingerprint()}")
    except InputError as error:
        print(f"kvbench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
