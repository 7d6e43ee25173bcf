"""What a run shows: live progress, and a report that stands alone."""
