"""Allocators of a budget to layers and heads, one per file."""
