"""Whether a data directory is as it should be, while no server runs on it: registry, files, and both."""
