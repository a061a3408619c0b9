"""Cache policies: which tokens to keep, by a scorer, an allocator and a schedule."""
