"""Tables of finished runs, from their records alone: Markdown, LaTeX, CSV or HTML.

    kvbench table results/reference                  # Markdown, to read or to paste
    kvbench table results/reference -o table.tex     # LaTeX (booktabs)
    kvbench table results/reference -o cells.csv     # one row a number, with its interval and the run it came from
    kvbench table results/reference --by-budget      # scores alone: a row a method, a column a budget
    kvbench table results/reference --against snapkv # paired differences from snapkv at each budget
    kvbench table RESULTS MORE_RESULTS --methods full,snapkv --tasks 'longbench*' --columns mean,kept

Runs stand in one table only when nothing but the method differs: same model, same rows of the same data, same dtype,
device and seed. So a score on the bundled set, on a subset and on all of LongBench can never meet.
"""

from .accuracy import accuracy_table
from .budgets import budget_tables
from .cells import GIB, MIB, Cell, Table
from .command import main, write
from .efficiency import efficiency_table, search_table
from .groups import KINDS, tables
from .latex import latex
from .notes import different_layers
from .text import markdown
from .training import at_best_rate, train_table

__all__ = [
    "GIB",
    "KINDS",
    "MIB",
    "Cell",
    "Table",
    "accuracy_table",
    "at_best_rate",
    "budget_tables",
    "different_layers",
    "efficiency_table",
    "latex",
    "main",
    "markdown",
    "search_table",
    "tables",
    "train_table",
    "write",
]
