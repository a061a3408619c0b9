"""Architectures in which layers share keys and values, one per file; the model class is in ``models/kvshare``."""
