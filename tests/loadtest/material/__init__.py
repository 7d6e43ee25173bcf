"""Tests of loadtest/material."""
