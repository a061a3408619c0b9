"""The configuration tree (YAML) and the one error type a user's input can raise."""
