"""Tests of server/model/."""
