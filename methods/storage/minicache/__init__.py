"""MiniCache (Liu et al., 2024, arXiv 2405.14366): pairs of layers with merged keys and values."""
