"""Configurations: every key with its type and meaning, presets, overrides, choices by name, grids' axes."""
