"""How a budget is shared out among layers and heads: one allocator a file."""
