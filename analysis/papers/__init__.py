"""Published numbers of each paper beside ours: see :mod:`.cli` for the command."""
