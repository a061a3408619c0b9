"""Measurements of time, memory and energy."""
