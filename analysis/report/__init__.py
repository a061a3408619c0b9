"""One self-contained HTML page of finished runs: see :mod:`.cli` for the command."""
