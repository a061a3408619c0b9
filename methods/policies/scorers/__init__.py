"""Scorers of tokens, one per file."""
