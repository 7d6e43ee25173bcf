"""Tests of loadtest/checks/bars."""
