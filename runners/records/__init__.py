"""Records of runs, and the loggers that copy them."""
