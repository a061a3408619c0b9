"""``kvbench COMMAND ...``: hands over to the module of that name; each is also ``python -m kvbench.<module>``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "run": ("kvbench.runners.cli", "run a method on a task and record it"),
    "table": ("kvbench.analysis.tables", "tables of finished runs: Markdown, CSV, LaTeX"),
    "plot": ("kvbench.analysis.plots", "figures of finished runs: Pareto plots, time over length"),
    "kv-size": ("kvbench.analysis.kv_size", "bytes of a KV cache, from the formula"),
    "score": ("kvbench.runners.score", "score LongBench prediction files"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Dispatch; the exit status is the command's own."""
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print("usage: kvbench COMMAND ...\n")
        print("\n".join(f"  {command:<8} {what}" for command, (_, what) in COMMANDS.items()))
        print("\nkvbench COMMAND --help says more.")
        return 0
    if name not in COMMANDS:
        print(f"error: kvbench {name}: no such command; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[name][0]).main(args[1:])
    except BrokenPipeError:  # `kvbench table ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
