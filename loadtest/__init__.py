"""Measures: bench/ is `manylora bench`, checks/ promises, lab/ experiments, material/ what these and tests use."""
