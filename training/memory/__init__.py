"""What a run will need in memory, what gets it in, and trying it."""
