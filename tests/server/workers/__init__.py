"""Tests of server/workers/."""
