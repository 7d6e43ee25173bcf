"""Merge and export: one adapter and its base made into a model that stands alone."""
