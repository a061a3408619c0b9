"""Eviction policies: what a token is worth, how a budget is shared out, and when tokens leave."""
