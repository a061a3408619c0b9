"""Architectures in which layers share keys and values: one model class, and one small file for each way of sharing."""
