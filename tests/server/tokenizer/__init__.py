"""Tests of server/tokenizer/."""
