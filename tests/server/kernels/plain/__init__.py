"""Tests of server/kernels/."""
