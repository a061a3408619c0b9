"""What a token is worth: one scorer a file."""
