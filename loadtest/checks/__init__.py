"""Promises that a command holds the product to: exit status 0 or 1."""
