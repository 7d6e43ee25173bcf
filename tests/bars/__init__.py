"""Tests of loadtest/bars."""
