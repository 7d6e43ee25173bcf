"""Tests of server/engine/."""
