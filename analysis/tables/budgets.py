"""Tables of scores alone: a row a method, a column a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..held import reads_another_part, share_held, share_read
from ..load import Run, average, comparable, fewer_is_better
from .accuracy import title
from .cells import Cell, Table, fixed, label, older_sign, percent
from .marks import BEST, BLOCKS, DAGGER, EQUAL_BYTES, READ, Tests, in_blocks, members_of, significant, tests_of
from .notes import different_layers, guards, made_by, missing_sets, older_versions, tie_rules, ways_of_reading
from .reference import FULL_CACHE, Reference


def budget_tables(runs: Sequence[Run], tested: bool = True, reference: Reference = FULL_CACHE) -> list[Table]:
    """Scores of each group of comparable runs: a row a method and a column a budget, and runs without such a budget.

    Budgets are those in tokens, and fractions of the prompt that several methods have; a run whose fraction one method
    alone has is in the second table.

    Args:
        runs: of any kind.
        tested: whether differences are tested, and the best are bold.
        reference: method that the others are compared with.
    """
    tables = []
    for group in comparable([r for r in runs if r.record["kind"] == "accuracy" and r.done]):
        by_curve: dict[str, dict[float, Run]] = {}
        others = []
        methods: dict[float, set[str]] = {}
        for run in group:
            methods.setdefault(run.record["budget"], set()).add(run.record["method"])
        for run in group:
            budget = run.record["budget"]
            is_share = isinstance(budget, float) and budget < 1  # 1.0 is the whole prompt, which has no column
            is_column = isinstance(budget, int) or (is_share and len(methods[budget]) > 1)
            if is_column and not run.is_full_cache:
                by_curve.setdefault(run.curve, {})[budget] = run
            else:
                others.append(run)
        tests = tests_of(group, reference.run_for) if tested else Tests()
        if by_curve:
            tables.append(_by_budget(group, dict(sorted(by_curve.items())), tests, reference, is_alone=not others))
        if others:
            tables.append(_others(group, others, tests, reference, is_second=bool(by_curve)))
    return tables


def _by_budget(
    group: Sequence[Run],
    by_curve: Mapping[str, Mapping[float, Run]],
    tests: Tests,
    reference: Reference,
    is_alone: bool,
) -> Table:
    budgets = sorted({b for row in by_curve.values() for b in row})
    best = {
        hash_
        for budget in budgets
        for block in _equal_bytes([row[budget] for row in by_curve.values() if budget in row])
        for hash_ in tests.best(block)
    }
    rows = [
        [Cell(curve), *(_marked(row[b], tests, best) if b in row else Cell("") for b in budgets)]
        for curve, row in by_curve.items()
    ]
    shown = [run for row in by_curve.values() for run in row.values()]
    what = "Perplexity" if fewer_is_better(group[0].record) else "Mean score"
    notes = [*guards(group[0].record), *missing_sets(group)]
    notes.append(f"{what} and its 95 % interval. {_bytes_kept(by_curve, budgets)}")
    if best:
        notes.append(
            "Bold: the best of a column and all that do not differ significantly from it, among those at equal bytes."
        )
    notes += [significant(reference.words)] if any(map(tests.is_significant, shown)) else []
    notes += older_versions(shown) + tie_rules(shown) + different_layers(group)
    if is_alone:
        notes += ways_of_reading(group)
    notes += [note for note in made_by(shown) if note not in notes]
    first = [next(iter(row.values())) for row in by_curve.values()]
    return Table(title(group), ["method / budget", *map(str, budgets)], rows, first, notes)


def _equal_bytes(runs: Sequence[Run]) -> list[list[Run]]:
    ordered, blocks = in_blocks(runs)
    return [[ordered[i] for i in places] for places in members_of(ordered, blocks)]


def _bytes_kept(by_curve: Mapping[str, Mapping[float, Run]], budgets: Sequence[float]) -> str:
    """Share of the full cache's bytes at each budget: of most methods, and of those that keep another share."""
    parts = []
    for budget in budgets:
        shares = {curve: 100 * share_held(row[budget]) for curve, row in by_curve.items() if budget in row}
        middle = sorted(shares.values())[len(shares) // 2]
        usual = [share for share in shares.values() if _is_near(share, middle)]
        text = f"{budget}: {_range(min(usual), max(usual))} %"
        odd = [f"{curve} {share:.1f} %" for curve, share in shares.items() if not _is_near(share, middle)]
        parts.append(f"{text} ({', '.join(odd)})" if odd else text)
    runs = [run for row in by_curve.values() for run in row.values()]
    when = ", mean over the predicted tokens" if all("kv_ratio_mean" in run.record["bytes"] for run in runs) else ""
    return f"Bytes kept of the full cache{when}: {', '.join(parts)}."


def _is_near(share: float, middle: float) -> bool:
    return abs(share - middle) <= EQUAL_BYTES * middle


def _range(low: float, high: float) -> str:
    texts = f"{low:.1f}", f"{high:.1f}"
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _others(group: Sequence[Run], others: Sequence[Run], tests: Tests, reference: Reference, is_second: bool) -> Table:
    """A row a run, of the runs that are in no column of budgets."""
    column = "perplexity" if fewer_is_better(group[0].record) else "score"
    others, blocks = in_blocks(others)
    best = {hash_ for block in _equal_bytes(others) for hash_ in tests.best(block)}
    has_read = reads_another_part(others)
    rows = [
        [label(run), _with_interval(run, tests, best), percent(share_held(run))]
        + ([percent(share_read(run))] if has_read else [])
        for run in others
    ]
    notes = guards(group[0].record) + missing_sets(group) + ([BLOCKS, BEST] if best else [])
    notes += [significant(reference.words)] if any(map(tests.is_significant, others)) else []
    notes += [READ] if has_read else []
    notes += ways_of_reading(group) + older_versions(others) + made_by(group)
    kind = "the full cache" if all(run.is_full_cache for run in others) else "other methods"
    return Table(
        f"{title(group)}, {kind}" if is_second else title(group),
        ["method", column, "KV kept", *(["KV read"] if has_read else [])],
        rows,
        others,
        notes,
        blocks=blocks,
    )


def _marked(run: Run, tests: Tests, best: set[str]) -> Cell:
    """The score of one run of a row of several."""
    cell = _with_interval(run, tests, best)
    return cell._replace(text=cell.text + older_sign(run))


def _with_interval(run: Run, tests: Tests, best: set[str]) -> Cell:
    estimate: Mapping[str, Any] = average(run.record)
    mean, ends = (".2f", ".1f") if fewer_is_better(run.record) else (".1f", ".0f")
    text = fixed(estimate["mean"], mean)
    if estimate["low"] is not None:
        text += f" [{fixed(estimate['low'], ends)}, {fixed(estimate['high'], ends)}]"
    text += DAGGER if tests.is_significant(run) else ""
    is_best = run.record["hash"] in best
    return Cell(text, estimate["mean"], estimate["low"], estimate["high"], estimate["n"], bold=is_best)
