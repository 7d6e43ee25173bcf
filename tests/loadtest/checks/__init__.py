"""Tests of loadtest/checks."""
