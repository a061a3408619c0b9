"""``kvbench COMMAND ...``: runs the module of a command; each is also ``python -m kvbench.<module>``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ..conf.errors import InputError
from ..conf.extras import extra_of, install
from .terminal import CLOSED, lasting_streams

COMMANDS = {
    "run": ("kvbench.runners.cli", "run a method on a task and record it"),
    "table": ("kvbench.analysis.tables", "tables of finished runs: Markdown, CSV, LaTeX"),
    "plot": ("kvbench.analysis.figures.cli", "figures of finished runs: quality against memory and speed, and more"),
    "report": ("kvbench.analysis.report.cli", "one HTML page of finished runs, to open in a browser"),
    "paper": ("kvbench.analysis.papers.cli", "a paper's published numbers beside ours, with a verdict"),
    "kv-size": ("kvbench.analysis.kv_size", "bytes of a KV cache, from the formula"),
    "verify": ("kvbench.analysis.verify", "compute the numbers of every record again and say what differs"),
    "score": ("kvbench.runners.score", "score LongBench prediction files"),
    "completion": ("kvbench.runners.completion", "Tab completion for bash, zsh and fish"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Dispatch; the exit status is the command's own, or 2 where its output could not be written.

    A closed pipe (``kvbench table | head``) is no error. The result of ``run`` is a record, so it continues without a
    reader, and its exit status tells whether the record is complete.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else "--help"
    with lasting_streams() as out:
        status = _dispatch(name, args[1:])
        out.flush()
        if out.error is not None and out.error.errno not in CLOSED and (name != "run" or {"-h", "--help"} & set(args)):
            print(f"error: kvbench {name}: standard output: {out.error.strerror}", file=sys.stderr)
            return status or 2
    return status


def _dispatch(name: str, args: list[str]) -> int | None:
    if name in ("-h", "--help"):
        print("usage: kvbench COMMAND ...\n")
        print("\n".join(f"  {command:<10} {what}" for command, (_, what) in COMMANDS.items()))
        print("\nkvbench COMMAND --help says more.")
        return 0
    if name not in COMMANDS:
        print(f"error: kvbench {name}: no such command; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        status: int | None = importlib.import_module(COMMANDS[name][0]).main(args)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name)
        if extra is None:
            raise
        needed = f"is not installed, and kvbench {name} needs it: {install(extra)}"
        print(f"error: {InputError('package', str(error.name), needed)}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
