"""The decoder for all served families, and its loader."""
