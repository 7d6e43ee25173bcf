"""Tests of loadtest/lab."""
