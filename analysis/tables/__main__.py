"""``python -m kvbench.analysis.tables``: the same as ``kvbench table``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
