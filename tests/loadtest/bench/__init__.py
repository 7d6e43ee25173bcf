"""Tests of loadtest/bench."""
