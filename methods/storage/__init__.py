"""Representations of kept tokens in memory, one per file; configured in ``conf/method/storage/``."""
