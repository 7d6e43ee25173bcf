"""Tests of server/chat/."""
