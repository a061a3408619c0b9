"""Figures of finished runs; ``kvbench plot`` writes them."""
