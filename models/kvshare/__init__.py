"""A Llama whose layers share keys and values, as a transformers model class."""
