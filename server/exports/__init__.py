"""Exports on a running server: a job for each, in a process of its own, one after the other. No HTTP."""
