"""``kvbench score``: score prediction files in LongBench's own format, made by kvbench or by anyone else.

    python -m kvbench.runners.score PREDICTIONS_DIR [--code-sim official|levenshtein] [--e] [-o FILE]

The folder has ``<dataset>.jsonl`` or ``<dataset>.jsonl.gz``, one row per example with ``pred``, ``answers``,
``all_classes`` and (for ``--e``) ``length``: what the official ``pred.py`` writes. Printed is what the official
``eval.py`` puts into ``result.json``: one JSON object ``{dataset: score}``, x100 and rounded to 2 decimals. No model,
no torch.

Exit status 2 and one line per problem on standard error when something cannot be used; the other files are scored and
printed all the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from ..conf.errors import InputError
from ..conf.wording import one_of
from ..tasks.longbench_data import numbered_lines, open_jsonl, parse_json_line
from ..tasks.longbench_metrics import CODE_SIMS, bucket_score, dataset_score, example_score, unscorable
from ..tasks.longbench_spec import E_BUCKETS, SPECS, bucket

SUFFIXES = (".jsonl", ".jsonl.gz")

Score = float | dict[str, float | None]


def score_folder(
    folder: Path, code_sim: str = "official", e: bool = False
) -> tuple[dict[str, Score], list[InputError]]:
    """Score every prediction file of a folder.

    Returns:
        ``{data set: score}``, or with ``e`` ``{data set: {bucket: score}}`` (None for a bucket without examples), in
        the order of the paper's tables; and one error for each file that cannot be used.

    Raises:
        InputError: There is no such folder, or no prediction file in it.
    """
    if not folder.is_dir():
        raise InputError("PREDICTIONS_DIR", folder, "no such folder")
    files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.is_file())
    if not files:
        raise InputError("PREDICTIONS_DIR", folder, "must contain files <dataset>.jsonl or <dataset>.jsonl.gz")
    scores: dict[str, Score] = {}
    problems: list[InputError] = []
    by_dataset: dict[str, list[Path]] = {}
    for path in files:
        by_dataset.setdefault(path.name.split(".")[0], []).append(path)
    for dataset, paths in by_dataset.items():
        try:
            scores[dataset] = score_file(dataset, paths, code_sim, e)
        except InputError as error:
            problems.append(error)
    return {dataset: scores[dataset] for dataset in SPECS if dataset in scores}, problems


def score_file(dataset: str, paths: list[Path], code_sim: str, e: bool) -> Score:
    """Score of one data set from its one file; InputError with file and line for anything that cannot be used."""
    if dataset not in SPECS:
        raise InputError(str(paths[0]), dataset, f"the name of the file {one_of(dataset, SPECS)}")
    if len(paths) > 1:
        raise InputError(str(paths[0]), paths[1].name, "two files contain predictions of the same data set")
    rows = _read(paths[0], dataset, e)
    # The official code scores all rows with the class names of the last one.
    all_classes = rows[-1]["all_classes"]
    scores = [example_score(dataset, row["pred"], row["answers"], all_classes, code_sim) for row in rows]
    if not e:
        return dataset_score(scores)
    buckets: dict[str, list[float]] = {name: [] for name in E_BUCKETS}
    for row, score in zip(rows, scores, strict=True):
        buckets[bucket(row["length"])].append(score)
    return {name: bucket_score(values) for name, values in buckets.items()}


def _read(path: Path, dataset: str, e: bool) -> list[dict[str, Any]]:
    fields = ("pred", "answers", "all_classes", *(("length",) if e else ()))
    rows = []
    try:
        with open_jsonl(path) as file:
            for number, line in numbered_lines(file, str(path)):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                row = parse_json_line(line, where)
                missing = [field for field in fields if field not in row]
                if missing:
                    raise InputError(where, ", ".join(missing), "the row lacks these fields of a prediction file")
                if not isinstance(row["pred"], str):
                    raise InputError(where, "pred", "must be a string")
                if e and (isinstance(row["length"], bool) or not isinstance(row["length"], int)):
                    raise InputError(where, f"length:{row['length']}", "must be a whole number for --e")
                problem = unscorable(SPECS[dataset], row["answers"], row["all_classes"])
                if problem:
                    raise InputError(where, dataset, problem)
                rows.append(row)
    except OSError as error:
        raise InputError(str(path), "unreadable", str(error)) from error
    if not rows:
        raise InputError(str(path), "empty", "the file must contain at least one prediction")
    return rows


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise a one-line error, where argparse would print the usage and exit."""
        raise _UsageError(message)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 when something could not be used."""
    parser = _Parser(
        prog="kvbench score",
        description="Score LongBench prediction files (<dataset>.jsonl or .jsonl.gz) as the official eval.py does.",
    )
    parser.add_argument("folder", metavar="PREDICTIONS_DIR", type=Path, help="folder with the prediction files")
    parser.add_argument(
        "--code-sim",
        choices=CODE_SIMS,
        default="official",
        help="official: difflib; levenshtein: what the official code gives with python-Levenshtein installed",
    )
    parser.add_argument("--e", action="store_true", help="LongBench-E: one score per length bucket")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the JSON object to FILE too")
    problems: list[Exception] = []
    try:
        args = parser.parse_args(argv)
        scores, unusable = score_folder(args.folder, args.code_sim, args.e)
        problems += unusable
        if scores:
            text = json.dumps(scores, indent=2)
            print(text)
            if args.output:
                _write(args.output, text + "\n")
    except (InputError, _UsageError) as error:
        problems.append(error)
    for problem in problems:
        print(f"kvbench score: {problem}", file=sys.stderr)
    return 2 if problems else 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError("-o", path, f"cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
