"""Composition and checks of a run's configuration."""
