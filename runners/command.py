"""``kvbench COMMAND ...``: hands over to the module of that name; each is also ``python -m kvbench.<module>``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "run": ("kvbench.runners.cli", "run a method on a task and record it"),
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
    return importlib.import_module(COMMANDS[name][0]).main(args[1:])


if __name__ == "__main__":
    sys.exit(main())
