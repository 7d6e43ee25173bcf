"""Tests of server/api/."""
