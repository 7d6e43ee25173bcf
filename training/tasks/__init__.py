"""Several adapters, one for each task, trained side by side on one base."""
