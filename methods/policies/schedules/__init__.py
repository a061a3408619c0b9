"""Schedules of evictions, one per file."""
