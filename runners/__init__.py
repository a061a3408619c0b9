"""Runners, and the engine, measurements and records that they use."""
