"""Tests of manylora/."""
