"""Tests of loadtest/bench/peers."""
